"""The `stableqat` command.

`fit`, `validate` and `test` are LightningCLI in subclass mode: any setting of trainer, model and
data comes from YAML files and flags. The tool verbs are functions, imported when called, so that help
answers at once. A user's mistake is one line on stderr and exit code 2 (`--debug` shows the traceback); a
fault of the program keeps its traceback.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from keyword import iskeyword
from typing import Any, get_args, get_origin

from stableqat.cli.arguments import check_arguments
from stableqat.cli.help import RUN_VERBS
from stableqat.errors import UserError, did_you_mean
from stableqat.terminal import plain
from stableqat.trust import allowing

TOOL_VERBS = {
    "sweep": ("stableqat.studies.command", "run the points of one or more studies"),
    "compare": (
        "stableqat.analysis.command",
        "make tables, pictures and a report of studies",
    ),
    "publish": ("stableqat.analysis.command", "copy studies for publication, with thinned event files"),
    "bench": ("stableqat.bench.command", "measure time and memory of the methods beside full precision"),
    "consolidate": ("stableqat.checkpoints.command", "merge a sharded checkpoint into one file"),
    "import": ("stableqat.importing.command", "make a run of a released StableQAT or ParetoQ checkpoint"),
    "export": (
        "stableqat.export.command",
        "write packed weights for a runtime, proven equal to the model",
    ),
    "evaluate": ("stableqat.evaluate.command", "measure perplexity, accuracy and harness tasks of any model"),
    "predict": ("stableqat.predict.command", "generate text from prompts, or name the classes of images"),
    "data sample": ("stableqat.data.prepare.command", "draw documents from a corpus, local or on the Hub"),
    "data tokenize": ("stableqat.data.prepare.command", "turn documents into rows of tokens on disk"),
}

_OF_RUN_VERBS = re.compile(r"-c$|--(config|ckpt_path|model|data|trainer)\b")

# torch warns about torchao, which transformers imports if it is installed
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.

    Returns:
        0 when done, also after a run that diverged; 1 if points of a study failed; 2 after a user's mistake;
        130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        with allowing(arguments) as arguments:
            return _dispatch(arguments)
    except UserError as error:
        if debug:
            raise
        # a data loader's worker passes its error on as a traceback's text
        line = str(error).rpartition("UserError: ")[2]
        print(f"stableqat: {plain(line)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("stableqat: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # how argument parsers end, after help for example
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _dispatch(arguments: list[str]) -> int:
    group = "data" if arguments[:1] == ["data"] else ""  # its verbs have two words
    words = 2 if group else 1
    verb = " ".join(arguments[:words])
    if arguments[words - 1 : words] in ([], ["-h"], ["--help"]):
        _parser(group).print_help()
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"stableqat {version('stableqat')}")
        return 0
    if verb in RUN_VERBS:
        arguments = check_arguments(arguments)
        # Libraries read these once, at import
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # our own errors say it
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        return import_module("stableqat.cli.lightning").run(arguments)
    if verb == "predict" and any(_OF_RUN_VERBS.match(argument) for argument in arguments):
        raise UserError(
            "predict takes a model, not a configuration: stableqat predict RUN --prompts FILE "
            "(or --images FOLDER)"
        )
    if verb in TOOL_VERBS:
        return _tool(verb, arguments[words:])
    verbs = [*RUN_VERBS, *TOOL_VERBS]
    raise UserError(f"{verb} is not a verb of stableqat; {did_you_mean(verb, verbs)}")


def _parser(group: str) -> argparse.ArgumentParser:
    verbs = {**RUN_VERBS, **{verb: text for verb, (_, text) in TOOL_VERBS.items()}}
    lines = "\n".join(f"  {verb:<13} {text}" for verb, text in verbs.items() if verb.startswith(group))
    return argparse.ArgumentParser(
        prog="stableqat",
        usage="stableqat VERB [-c CONFIG.yaml ...] [--KEY VALUE ...]",
        description="Quantization-aware training of LLMs and ViTs at 1-4 bits.",
        epilog=f"verbs (each has its own --help):\n{lines}\n\nwith any verb:\n"
        "  --debug                show the traceback of a mistake\n"
        "  --allow PACKAGE.CLASS  let files name a class that is not this suite's",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _tool(verb: str, arguments: list[str]) -> int:
    import jsonargparse

    from stableqat.cli.messages import OneLineErrors

    class ToolParser(OneLineErrors, jsonargparse.ArgumentParser):  # type: ignore[misc]
        pass

    home, description = TOOL_VERBS[verb]
    name = verb.split()[-1]
    function = getattr(import_module(home), f"{name}_" if iskeyword(name) else name)
    parser = ToolParser(prog=f"stableqat {verb}", description=description)
    parameters, texts = signature(function).parameters, _described(function)
    for name, parameter in parameters.items():
        if get_origin(parameter.annotation) in (list, Sequence):  # jsonargparse alone wants brackets
            listed: dict[str, Any] = {"nargs": "+", "type": get_args(parameter.annotation)[0]}
            if parameter.kind is parameter.KEYWORD_ONLY:
                listed["default"] = list(parameter.default)
                name = f"--{name}"
            parser.add_argument(name, help=texts[parameter.name], **listed)
        elif iskeyword(word := name.removesuffix("_")):  # a flag whose name Python reserves
            told = {"type": parameter.annotation, "help": texts[name], "required": True}
            parser.add_argument(f"--{word}", **told)
        else:
            others: set[str | int] = {other for other in parameters if other != name}
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD  # if it has no default
            parser.add_function_arguments(function, as_group=False, as_positional=positional, skip=others)
    values = vars(parser.parse_args(arguments))
    return function(**{f"{key}_" if iskeyword(key) else key: value for key, value in values.items()})


def _described(function: Callable[..., int]) -> dict[str, str | None]:
    from docstring_parser import parse

    return {each.arg_name: each.description for each in parse(function.__doc__ or "").params}


def entry() -> None:
    """Console-script entry point."""
    sys.exit(main())

"""The `stableqat` command.

`fit`, `validate` and `test` are LightningCLI in subclass mode: any setting of trainer, model and
data comes from YAML files and flags. The tool verbs are functions, imported when called, so that help
answers at once. A user's mistake is one line on stderr and exit code 2 (`--debug` shows the traceback); a
fault of the program keeps its traceback.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from stableqat.cli.arguments import check_arguments
from stableqat.cli.help import RUN_VERBS, people_page
from stableqat.cli.tool import TOOL_VERBS, run_tool
from stableqat.errors import UserError, did_you_mean
from stableqat.terminal import plain, quiet_libraries
from stableqat.trust import allowing

_OF_RUN_VERBS = re.compile(r"-c$|--(config|ckpt_path|model|data|trainer)\b")

# torch warns about torchao, which transformers imports if it is installed
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.

    Returns:
        0 when done, also after a run that diverged; 1 if points of a study failed; 2 after a user's mistake;
        130 after Ctrl-C; 143 after SIGTERM.
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
    if verb in RUN_VERBS and {"-h", "--help"} & set(arguments):
        asked = next(at for at, argument in enumerate(arguments, 1) if argument in ("-h", "--help"))
        rest = arguments[asked:]
        if not rest or rest[0].startswith("-"):
            print(people_page(verb), end="")
            return 0
        if rest != ["all"]:
            raise UserError(f"help: takes nothing or all, not {' '.join(rest)}; write --help all")
        arguments = [verb, "--help"]
    if verb in RUN_VERBS:
        arguments = check_arguments(arguments)
        quiet_libraries(progress=sys.stderr.isatty())
        return import_module("stableqat.cli.lightning").run(arguments)
    if verb == "predict" and any(_OF_RUN_VERBS.match(argument) for argument in arguments):
        raise UserError(
            "predict takes a model, not a configuration: stableqat predict RUN --prompts FILE "
            "(or --images FOLDER)"
        )
    if verb in TOOL_VERBS:
        return run_tool(verb, arguments[words:])
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


def entry() -> None:
    """Console-script entry point."""
    sys.exit(main())

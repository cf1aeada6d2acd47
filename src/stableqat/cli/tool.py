"""The tool verbs: functions, imported when called; their arguments are flags, their docstrings help."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from itertools import pairwise
from keyword import iskeyword
from types import FrameType
from typing import Any, get_args, get_origin

TOOL_VERBS = {
    "sweep": ("stableqat.studies.command", "run the points of one or more studies"),
    "runs": ("stableqat.analysis.listing", "list runs with their state, losses and size"),
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
    "diagnose": (
        "stableqat.diagnose.command",
        "find the layers that need training, and mixed widths for a size",
    ),
    "ptq": ("stableqat.ptq.command", "round a model without training, to a run"),
    "evaluate": ("stableqat.evaluate.command", "measure perplexity, accuracy and harness tasks of any model"),
    "landscape": ("stableqat.landscape.command", "measure the loss around the weights of runs"),
    "predict": ("stableqat.predict.command", "generate text from prompts, or name the classes of images"),
    "data sample": ("stableqat.data.prepare.command", "draw documents from a corpus, local or on the Hub"),
    "data tokenize": ("stableqat.data.prepare.command", "turn documents into rows of tokens on disk"),
    "completion": ("stableqat.cli.completion", "print a completion script for your shell"),
}
_BOOLEANS = ("true", "false", "yes", "no")


def run_tool(verb: str, arguments: Sequence[str]) -> int:
    """Run a tool verb; SIGTERM ends it like an exception, so that it leaves nothing half written.

    Args:
        verb: The verb.
        arguments: Its flags.

    Returns:
        The exit code.
    """
    values = vars(tool_parser(verb).parse_args(list(_spelled_out(verb, arguments))))
    values = {f"{key}_" if iskeyword(key) else key: value for key, value in values.items()}
    with _terminable():
        return _function(verb)(**values)


def _spelled_out(verb: str, arguments: Sequence[str]) -> Iterator[str]:
    """Flags as jsonargparse wants them: --dry-run is --dry_run true."""
    parameters = signature(_function(verb)).parameters
    for word, following in pairwise([*arguments, ""]):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in parameters:
            yield word
            continue
        yield f"--{name}{equals}{value}"
        if parameters[name].annotation is bool and not equals and following.lower() not in _BOOLEANS:
            yield "true"


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals arrive in no other
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends two; the second would stop the cleaning up
    raise SystemExit(128 + number)


def tool_parser(verb: str) -> Any:
    """Return the parser of a tool verb: jsonargparse's, from its function's signature and docstring.

    Args:
        verb: The verb.
    """
    import jsonargparse

    from stableqat.cli.messages import OneLineErrors

    class ToolParser(OneLineErrors, jsonargparse.ArgumentParser):  # type: ignore[misc]
        pass

    function = _function(verb)
    parser = ToolParser(prog=f"stableqat {verb}", description=TOOL_VERBS[verb][1])
    parameters, texts = signature(function).parameters, _described(function)
    for name, parameter in parameters.items():
        if get_origin(parameter.annotation) in (list, Sequence):  # jsonargparse alone wants brackets
            listed: dict[str, Any] = {"nargs": "+", "type": get_args(parameter.annotation)[0]}
            if parameter.default is not parameter.empty:
                listed["default"] = list(parameter.default)
            if parameter.kind is parameter.KEYWORD_ONLY:
                name = f"--{name}"
            elif "default" in listed:
                listed["nargs"] = "*"
            _add_up(parser.add_argument(name, help=texts[parameter.name], **listed))
        elif iskeyword(word := name.removesuffix("_")):  # a flag whose name Python reserves
            told = {"type": parameter.annotation, "help": texts[name], "required": True}
            parser.add_argument(f"--{word}", **told)
        else:
            others: set[str | int] = {other for other in parameters if other != name}
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD  # if it has no default
            parser.add_function_arguments(function, as_group=False, as_positional=positional, skip=others)
    return parser


def _add_up(action: Any) -> None:
    """Make a list's flag, given again, add to its values; jsonargparse alone keeps the last."""
    given: list[str] = []

    class Adding(type(action)):  # type: ignore[misc]
        def __call__(self, parser: Any, settings: Any, values: list[str], flag: str | None = None) -> None:
            given.extend(values)
            super().__call__(parser, settings, list(given), flag)

    action.__class__ = Adding


def _function(verb: str) -> Callable[..., int]:
    name = verb.split()[-1]
    return getattr(import_module(TOOL_VERBS[verb][0]), f"{name}_" if iskeyword(name) else name)


def _described(function: Callable[..., int]) -> dict[str, str | None]:
    from docstring_parser import parse

    return {each.arg_name: each.description for each in parse(function.__doc__ or "").params}

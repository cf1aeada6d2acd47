"""One line instead of jsonargparse's nested report.

A setting such as `model.quantizer.bits` passes through a parser for each class on its way, and
each wraps the error of the inner one in a report of its own. Here the innermost parser, which knows
what it would have accepted, says what is wrong; each outer one only puts its part of the key in front.
"""

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from stableqat.errors import UserError

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true, false",
    str: "text",
    NoneType: "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
}
_LISTED = 12  # names that a line can hold

_WITHIN = re.compile(r'^Parser key "([^"]+)"')
_NO_FILE = re.compile(r"""^Parser key "config": (.+): '(.+)'""")
_MISSING = re.compile(r"^the following arguments are required: (.+)")
_INCOMPLETE = re.compile(r"^argument (?:\S+/)?-*(\S+): (.*)")
_UNRECOGNIZED = re.compile(r"^unrecognized arguments: (\S+)")
_UNKNOWN = re.compile(
    r"(?:Group '([^']+)' does not accept o|Subcommand '\w+' does not accept o|O)ption '([^']+)'"
)
_INSIDE = re.compile(r"given class_path '[^']+':\n\s+([\w.]+): (.+)")
_CLASS = re.compile(
    r"class_path'?[ :=]+'([^']+)'|import path string: (\S+)|Expected '([^']+)' to be a subclass"
)
_CLASSLESS = re.compile(r"Given value: NestedArg\(key='([^']+)'")
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_VALUE = re.compile(r"G(?:iven|ot) value: (.*)")


class Fault(argparse.ArgumentError):
    """What is wrong with which key; keys are relative to the parser that raises it.

    Args:
        key: The key, as the user wrote it.
        problem: What is wrong, and the remedy if `near` is None.
        near: A key that may have been meant.
    """

    def __init__(self, key: str, problem: str, near: str | None = None) -> None:
        self.key, self.problem, self.near = key, problem, near
        super().__init__(None, f"{key}: {problem}" + (f"; did you mean {near}?" if near else ""))

    def within(self, parent: str) -> "Fault":
        """The same fault, seen from outside of `parent`."""
        return Fault(f"{parent}.{self.key}", self.problem, self.near and f"{parent}.{self.near}")


class OneLineErrors:
    """Mixin for a jsonargparse parser: a mistake ends the parsing as a `UserError` of one line."""

    exit_on_error: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take whole names only: part of one may be another setting, in another version."""
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[call-arg]

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a config file; what is wrong with it is told with its name."""
        try:
            return super().parse_path(path, *args, **kwargs)  # type: ignore[misc]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a text file; give a YAML file") from error

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what is wrong: a `UserError` from the command's own parser, a `Fault` from one inside it."""
        fault = _fault(self, message, ex)
        if self.exit_on_error:
            raise UserError(str(fault)) from ex
        raise fault from ex


def user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` among the causes of an exception."""
    return next((cause for cause in _causes(error) if isinstance(cause, UserError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _fault(parser: Any, message: str, ex: Exception | None) -> Fault | UserError:
    """What is wrong, from the cause if that says it, otherwise from jsonargparse's message."""
    key = match[1] if (match := _WITHIN.match(message)) else ""
    for cause in _causes(ex):
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, Fault):
            return cause.within(key) if key else cause
        if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark:
            return UserError(f"line {cause.problem_mark.line + 1} is not valid YAML: {cause.problem}")
    if match := _NO_FILE.match(message):
        return UserError(f"{match[2]}: {match[1][0].lower()}{match[1][1:]}; -c takes a YAML file")
    if message.startswith("Unexpected config:"):
        return UserError("holds no settings; write them as YAML, such as `trainer: {max_steps: 100}`")
    if match := _MISSING.match(message):
        tool = parser.exit_on_error and not any(action.dest == "config" for action in parser._actions)
        remedy = (
            "--help tells what to give" if tool else "set it in a config file (-c FILE.yaml) or as a flag"
        )
        return Fault(re.sub(r"\b(fit|validate|test|predict)\.", "", match[1]), f"missing; {remedy}")
    if match := _INCOMPLETE.match(message):
        return Fault(match[1], match[2].replace("expected one argument", "needs a value"))
    if match := _UNRECOGNIZED.match(message):
        if not match[1].startswith("-"):
            return UserError(f"{match[1]}: is no setting; write settings as --KEY VALUE")
        return _unknown(parser, match[1].lstrip("-").split("=")[0])
    if match := _UNKNOWN.match(message):
        group = f"{match[1]}." if match[1] else ""
        return _unknown(getattr(ex, "subcommand_parser", parser), group + match[2])
    if match := _INSIDE.search(message):  # a fault inside one of several types that the key may have
        return Fault(match[1], match[2]).within(key)
    if match := _CLASSLESS.search(message):
        problem = f"comes before the class of {key}; name that first, with -c or --{key} CLASS"
        return Fault(f"{key}.{match[1]}", problem)
    if not key:
        return UserError(" ".join(message.split()))
    action = next((action for action in parser._actions if action.dest == key), None)
    return Fault(key, refusal(getattr(action, "_typehint", None), message))


def _unknown(parser: Any, key: str) -> Fault:
    options = [a.dest for a in parser._actions if not re.search(r"(^|\.)(help|print_\w+)$", a.dest)]
    heads = list(dict.fromkeys(["class_path", "init_args", *(option.split(".")[0] for option in options)]))
    head, dot, rest = key.partition(".")
    if head in heads:
        near = difflib.get_close_matches(key, options, 1)
    else:
        near = [n + dot + rest for n in difflib.get_close_matches(head, heads, 1)]
    near = near or [option for option in options if option.endswith(f".{key}")]
    if near:
        return Fault(key, "unknown key", near[0])
    known = f"there are {', '.join(options)}" if len(options) <= _LISTED else "--help lists what there is"
    return Fault(key, f"unknown key; {known}")


def untrusted(name: str) -> str:
    """Why a class that a file names is refused, see `stableqat.trust`."""
    return (
        f"{name} is no class of this suite or torch.optim, and a file's word is not enough to import it; "
        f"if you trust it, add --allow {name}"
    )


def refusal(hint: Any, message: str) -> str:
    """Why a value is refused, by the type that is wanted."""
    if denied := _DENIED.search(message):
        return untrusted(denied[1])
    types = list(alternatives(hint))
    bases = [t for t in types if inspect.isclass(t) and t not in _WORDS]
    wanted = [str(choice) for t in types if get_origin(t) is Literal for choice in get_args(t)]
    wanted += [word for t in types for word in _WORDS.get(get_origin(t) or t, "").split(", ") if word]
    values = _VALUE.findall(message)
    names = [name for match in _CLASS.findall(message) for name in match if name]
    given = names[0] if names else values[-1] if values else ""
    if bases and (wanted in ([], ["null"]) or "given class_path" in message):
        return f"{given} is no {bases[0].__name__} that can be imported{_suggestion(given, bases)}"
    if wanted:
        *most, last = sorted(dict.fromkeys(wanted), key="null".__eq__)
        return f"must be {', '.join(most)}{' or ' if most else ''}{last}, not {given}"
    return " ".join(message.split())


def _suggestion(given: str, bases: list[type]) -> str:
    known = {derived.__name__.lower(): derived for base in bases for derived in _derived(base)}
    leaves = {name: derived.__name__ for name, derived in known.items() if not derived.__subclasses__()}
    name = given.split(".")[-1].lower()
    if name in known:  # in other letters, or one of several of that name
        match = known[name]
        whole = f"{match.__module__}.{match.__qualname__}" if match.__name__ == given else match.__name__
        return f"; did you mean {whole}?"
    if near := difflib.get_close_matches(name, leaves, 1, cutoff=0.7):
        return f"; did you mean {leaves[near[0]]}?"
    return f"; choose one of {', '.join(sorted(leaves.values()))}" if len(leaves) <= _LISTED else ""


def alternatives(hint: Any) -> Iterator[Any]:
    """The types that a hint allows; for a factory, what it makes."""
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from alternatives(each)
    elif get_origin(hint) is Callable:
        yield from alternatives(get_args(hint)[-1])
    else:
        yield hint


def _derived(base: type) -> Iterator[type]:
    """Subclasses that a user would mean: this suite's own, and those from the package of `base`."""
    packages = ("stableqat", base.__module__.split(".")[0])
    below: list[type] = base.__subclasses__()
    for derived in below:
        if derived.__module__.split(".")[0] in packages:
            yield derived
            yield from _derived(derived)

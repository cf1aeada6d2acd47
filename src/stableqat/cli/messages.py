"""One line instead of jsonargparse's nested report.

A setting such as `model.quantizer.bits` passes through one parser per class, and each wraps the inner one's
error in a report of its own. Here the innermost parser, which knows what it accepts, says what is wrong; each
outer one only puts its part of the key in front.
"""

import argparse
import re
from collections.abc import Iterator
from typing import Any

import yaml

from stableqat.cli.arguments import nearest_key
from stableqat.errors import LISTED, UserError
from stableqat.refusals import refusal

_AS_YAML = {"None": "null", "True": "true", "False": "false"}
_WITHIN = re.compile(r'^Parser key "([^"]+)"')
_NO_FILE = re.compile(r"""^Parser key "config": (.+): '(.+)'""")
_MISSING = re.compile(r"^the following arguments are required: (.+)")
_INCOMPLETE = re.compile(r"^argument (?:\S+/)?-*(\S+): (.*)")
_UNRECOGNIZED = re.compile(r"^unrecognized arguments: (\S+)")
_UNKNOWN = re.compile(
    r"(?:Group '([^']+)' does not accept o|Subcommand '\w+' does not accept o|O)ption '([^']+)'"
)
_INSIDE = re.compile(r"given class_path '[^']+':\n\s+([\w.]+): (.+)")
_ENTRY = re.compile(r"\n {4,}Given value: (?P<value>.+)\n(.*\n)*? {2}Given value: (?P<mapping>\{.+\})$")
_OF_FACTORY = re.compile(r"expects a function or a callable class: ([\w.]+): (.+?)\. Got value: ")
_CLASSLESS = re.compile(r"Given value: NestedArg\(key='([^']+)'")


class Fault(argparse.ArgumentError):
    """What is wrong with which key; keys are relative to the parser that raises it.

    Args:
        key: The key, as the user wrote it.
        problem: What is wrong, and the remedy if `named` is None.
        named: The key that the remedy names.
        remedy: What to do, with braces in place of that key.
    """

    def __init__(
        self, key: str, problem: str, named: str | None = None, remedy: str = "did you mean {}?"
    ) -> None:
        self.key, self.problem, self.named, self.remedy = key, problem, named, remedy
        super().__init__(None, f"{key}: {problem}" + (f"; {remedy.format(named)}" if named else ""))

    def within(self, parent: str) -> "Fault":
        """The same fault, seen from outside of `parent`."""
        named = self.named and f"{parent}.{self.named}"
        return Fault(f"{parent}.{self.key}", self.problem, named, self.remedy)


class OneLineErrors:
    """Mixin for a jsonargparse parser: a mistake ends the parsing as a `UserError` of one line."""

    exit_on_error: bool
    ending = ""  # of the help text, printed as it is

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take whole names only: in another version, a part may mean another setting."""
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[call-arg]

    def format_help(self) -> str:
        """The help text; values are written as in a configuration."""
        text = super().format_help() + self.ending  # type: ignore[misc]
        return re.sub(r"``(\w+)``", r"`\1`", re.sub(r"\b(None|True|False)\b", lambda m: _AS_YAML[m[0]], text))

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file; its name begins the message about a mistake in it."""
        try:
            return super().parse_path(path, *args, **kwargs)  # type: ignore[misc]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a text file; name a YAML file") from error

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
    """What is wrong, from the exception's causes or else from jsonargparse's message."""
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
        return UserError("holds no settings; write YAML, such as `trainer: {max_steps: 100}`")
    if match := _MISSING.match(message):
        tool = parser.exit_on_error and not any(action.dest == "config" for action in parser._actions)
        remedy = "see --help" if tool else "set it in a configuration (-c FILE.yaml) or as a flag"
        return Fault(re.sub(r"\b(fit|validate|test)\.", "", match[1]), f"missing; {remedy}")
    if match := _INCOMPLETE.match(message):
        return Fault(match[1], match[2].replace("expected one argument", "needs a value"))
    if match := _UNRECOGNIZED.match(message):
        if not match[1].startswith("-"):
            return UserError(f"{match[1]}: not a setting; write settings as --KEY VALUE")
        return _unknown(parser, match[1].lstrip("-").split("=")[0])
    if match := _UNKNOWN.match(message):
        group = f"{match[1]}." if match[1] else ""
        return _unknown(getattr(ex, "subcommand_parser", parser), group + match[2])
    if match := _INSIDE.search(message):  # a fault inside one of several types that the key may have
        return Fault(match[1], match[2]).within(key)
    action = next((action for action in parser._actions if action.dest == key), None)
    entry = _ENTRY.search(message)
    if entry and (name := _name_of(entry["value"], entry["mapping"])) not in ("class_path", "init_args"):
        told = message[: entry.end("value")]  # a fault in an entry of a mapping
        key, message = f"{key}.{name}", told[told.rindex("Does not validate") :]
    if match := _OF_FACTORY.search(message):
        return Fault(match[1], match[2]).within(key)
    if match := _CLASSLESS.search(message):
        remedy = "name that first, with -c or --{} CLASS"
        return Fault(f"{key}.{match[1]}", f"comes before the class of {key}", key, remedy)
    if not key:
        return UserError(" ".join(message.split()))
    return Fault(key, refusal(getattr(action, "_typehint", None), message))


def _name_of(value: str, mapping: str) -> str:
    """The name of an entry in the text of a mapping, by the text of its value."""
    name = re.search(rf"('[^']*'|\w+): ({re.escape(value)}|{re.escape(repr(value))})", mapping)
    return name[1].strip("'") if name else ""


def _unknown(parser: Any, key: str) -> Fault:
    options = [a.dest for a in parser._actions if not re.search(r"(^|\.)(help|print_\w+)$", a.dest)]
    if near := nearest_key(key, [*options, "class_path", "init_args"]):
        return Fault(key, "unknown key", near)
    known = f"choose one of {', '.join(options)}" if len(options) <= LISTED else "--help lists the settings"
    return Fault(key, f"unknown key; {known}")

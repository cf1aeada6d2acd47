"""Why a value is refused: what its type accepts, and which class the user probably meant."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from stableqat.errors import LISTED, nearest

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

_CLASS = re.compile(
    r"class_path'?[ :=]+'([^']+)'|import path string: (\S+)|Expected '([^']+)' to be a subclass"
)
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_VALUE = re.compile(r"G(?:iven|ot) value: (.*)")


def untrusted(name: str) -> str:
    """Why a class that a file names is refused, see `stableqat.trust`."""
    return (
        f"{name} is not a class of this suite or torch.optim, and a file alone cannot have it imported; "
        f"if you trust it, add --allow {name}"
    )


def refusal(hint: Any, message: str) -> str:
    """Why the type of a setting refuses a value.

    Args:
        hint: The type.
        message: What jsonargparse says about the value.
    """
    if denied := _DENIED.search(message):
        return untrusted(denied[1])
    types = list(dict.fromkeys(alternatives(hint)))
    bases = [t for t in types if inspect.isclass(t) and t not in _WORDS]
    wanted = [str(choice) for t in types if get_origin(t) is Literal for choice in get_args(t)]
    wanted += [word for t in types for word in _WORDS.get(get_origin(t) or t, "").split(", ") if word]
    values = _VALUE.findall(message)
    names = [name for match in _CLASS.findall(message) for name in match if name]
    given = names[0] if names else values[-1] if values else ""
    home, dot, _ = given.partition(".")
    if bases and dot and find_spec(home) is None:
        return f"{given}: no module {home} is installed, nor in the current folder; correct the name"
    if bases and (wanted in ([], ["null"]) or "given class_path" in message):
        return f"{given} is not {article(bases[0])} that can be imported{_suggestion(given, bases)}"
    if wanted:
        *most, last = sorted(dict.fromkeys(wanted), key="null".__eq__)
        return f"must be {', '.join(most)}{' or ' if most else ''}{last}, not {given}"
    return " ".join(message.split())


def _import_path(cls: type) -> str:
    """The shortest path that a class is imported by."""
    parts = cls.__module__.split(".")
    homes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    found = (home for home in homes if getattr(sys.modules.get(home), cls.__name__, None) is cls)
    return f"{next(found, cls.__module__)}.{cls.__qualname__}"


def article(base: type) -> str:
    """The name of a class with its article."""
    return f"{'an' if base.__name__[0] in 'AEIO' else 'a'} {base.__name__}"


def _suggestion(given: str, bases: list[type]) -> str:
    known = {derived.__name__.lower(): derived for base in bases for derived in _derived(base)}
    usable = {name: derived.__name__ for name, derived in known.items() if not inspect.isabstract(derived)}
    name = given.split(".")[-1].lower()
    if name in known:  # in another case, at another place, or one of several of this name
        match = known[name]
        placed = match.__name__ == given.rpartition(".")[2]
        return f"; did you mean {_import_path(match) if placed else match.__name__}?"
    if near := nearest(name, usable, cutoff=0.7):
        return f"; did you mean {usable[near]}?"
    return f"; choose one of {', '.join(sorted(usable.values()))}" if len(usable) <= LISTED else ""


def alternatives(hint: Any) -> Iterator[Any]:
    """The types that a hint allows; for a factory, or a mapping of factories, the types that they make."""
    for each in members(hint):
        if get_origin(each) is Callable or is_mapping_of_factories(each):
            yield from alternatives(get_args(each)[-1])
        else:
            yield each


def members(hint: Any) -> list[Any]:
    """The members of a union, nested ones included; of any other type, the type alone."""
    if get_origin(hint) in (Union, UnionType):
        return [member for each in get_args(hint) for member in members(each)]
    return [hint]


def is_mapping_of_factories(hint: Any) -> bool:
    """Whether a type is `dict[str, F]`, F a factory or None."""
    values = get_args(hint)[-1:] if get_origin(hint) is dict else ()
    return any(get_origin(each) is Callable for value in values for each in get_args(value))


def _derived(base: type) -> Iterator[type]:
    """Subclasses that a user may mean: this suite's own, and those from the package of `base`."""
    packages = ("stableqat", base.__module__.split(".")[0])
    below: list[type] = base.__subclasses__()
    for derived in below:
        if derived.__module__.split(".")[0] in packages:
            yield derived
            yield from _derived(derived)

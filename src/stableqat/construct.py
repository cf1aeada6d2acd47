"""Build objects from the plain values of a file, by the types that their classes declare.

A class's arguments are checked against its annotations. Only an argument whose type is a class, or a factory
of one, takes `class_path` and `init_args`, and that class must be trusted (`stableqat.trust`). Any other
field refuses a `class_path`, whatever it names.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stableqat.errors import UserError, did_you_mean
from stableqat.refusals import alternatives, article, is_mapping_of_factories, members, refusal, untrusted
from stableqat.trust import NAME, is_trusted, walk

_PLAIN = (str, int, float, bool, NoneType)


def check_plain(value: Any, where: str) -> None:
    """Refuse a value that is not plain data, or that names a class.

    Args:
        value: The value of a field that cannot hold a class.
        where: File and field, for the message.

    Raises:
        UserError: Naming the field.
    """
    for key, item in walk(value, where):
        if re.search(r"(^|\.)(class_path|init_args|dict_kwargs)$", key):
            raise UserError(f"{where}{key}: a class cannot be named here; this setting is plain data")
        if not isinstance(item, (*_PLAIN, dict, list, tuple)):
            raise UserError(f"{where}{key}: holds {type(item).__name__}, not plain data; take another file")


def arguments(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Arguments of a class from plain values of a file, by the types that the class declares.

    Args:
        cls: The class.
        values: Plain values by argument; a class is written as `class_path` and `init_args`.
        where: File and field, for the message.

    Raises:
        UserError: Naming the field, if it is unknown, its value has another type, or a class is not trusted.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a mapping of settings, not {_short(values)}")
    hints, made = argument_types(cls), {}
    for key, value in values.items():
        if key not in hints:
            remedy = did_you_mean(str(key), hints, "another version may have written this file")
            raise UserError(f"{where}.{_short(key)} is not a setting of {cls.__name__}; {remedy}")
        made[key] = _value(hints[key], value, f"{where}.{key}")
    return made


def find_class(name: Any, bases: Sequence[type], where: str) -> type:
    """The class that a file names.

    Args:
        name: Its import path.
        bases: It must derive from one of these.
        where: File and field, for the message.

    Raises:
        UserError: If it is not trusted, or derives from none of these.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: {_short(name)} is not the import path of a class")
    home, _, attribute = name.rpartition(".")
    module = sys.modules.get(home)
    if module is None:
        if not is_trusted(name):
            raise UserError(f"{where}: {untrusted(name)}")
        try:
            module = import_module(home)
        except ImportError as error:
            raise UserError(f"{where}: {name} cannot be imported: {error}") from error
    found = getattr(module, attribute, None)
    # a class of this kind that is already imported needs no trust
    if isinstance(found, type) and issubclass(found, tuple(bases)):
        return found
    raise UserError(f"{where}: {name} is not {' or '.join(map(article, bases))}; take another file")


def _value(hint: Any, value: Any, where: str) -> Any:
    """An argument from a plain value, by its type."""
    choices = members(hint)
    if value is None and (NoneType in choices or Any in choices):
        return None
    for choice in choices:
        if is_mapping_of_factories(choice) and isinstance(value, Mapping) and "class_path" not in value:
            (_, each) = get_args(choice)
            return {str(key): _value(each, spec, f"{where}.{key}") for key, spec in value.items()}
    for choice in choices:
        if get_origin(choice) is Callable:
            found, init_args = _specified(value, list(alternatives(choice)), where)
            return partial(found, **init_args)
        if is_dataclass(choice):
            return choice(**arguments(choice, value, where))  # type: ignore[operator, arg-type]
    check_plain(value, where)
    if not _fits(value, hint):
        raise UserError(f"{where}: {refusal(hint, f'Got value: {_short(value)}')}")
    return tuple(value) if isinstance(value, list) and any(get_origin(c) is tuple for c in choices) else value


def _specified(value: Any, bases: list[type], where: str) -> tuple[type, dict[str, Any]]:
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        raise UserError(f"{where}: must name a class as class_path and init_args, not {_short(value)}")
    if surplus := [key for key in spec if key not in ("class_path", "init_args")]:
        raise UserError(f"{where}: {_short(surplus[0])} is neither class_path nor init_args; remove it")
    found = find_class(spec["class_path"], bases, where)
    return found, arguments(found, spec.get("init_args") or {}, where)


def argument_types(cls: type) -> dict[str, Any]:
    """The types of a class's arguments, including those that it passes on to its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        try:
            hints = get_type_hints(base.__init__)  # type: ignore[misc]
        except (NameError, TypeError, AttributeError):  # annotations only for type checkers
            hints = {}
        for each in parameters:
            if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
                found.setdefault(each.name, hints.get(each.name, Any))
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return found


def _fits(value: Any, hint: Any) -> bool:
    if len(choices := members(hint)) > 1:
        return any(_fits(value, each) for each in choices)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    kind = origin or hint
    if kind in (int, float):
        return type(value) in (int, kind)
    if kind in (Any, object) or not isinstance(kind, type):  # a type variable, for example
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, dict) and (
            not inner or all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
        )
    if kind in (list, tuple) or (kind is not str and issubclass(kind, Iterable) and origin is not None):
        if not isinstance(value, list | tuple):
            return False
        types = inner if kind is tuple and ... not in inner else inner[:1] * len(value)
        return not inner or (len(value) == len(types) and all(map(_fits, value, types)))
    return isinstance(value, kind)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value) if isinstance(value, _PLAIN) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."

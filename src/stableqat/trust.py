"""Which classes a file may name: its values are data, and only classes of a fixed list are built from them.

A checkpoint's hyper-parameters, a run's `config.yaml`, a study or a configuration may come from anybody. They
name classes of this suite, torch's optimizers and schedulers, and a few of Lightning's. Whatever else they
name is refused before it is imported, unless the user allows it: on the command line with `--allow
my_methods.Mine`, or by naming the class there (`--model.quantizer my_methods.Mine`); in Python by having
imported it. In a field whose type is no class a `class_path` is refused whatever it names.
"""

import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from stableqat.errors import UserError, did_you_mean
from stableqat.refusals import alternatives, refusal, untrusted

T = TypeVar("T")

TRUSTED = (
    "stableqat",
    "torch.optim",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli.ReduceLROnPlateau",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.csv_logs.CSVLogger",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
)
VARIABLE = "STABLEQAT_ALLOW"  # the user's own names; the processes that a run starts inherit it
STUDY = "STABLEQAT_STUDY"  # set where a study has written the command line: that is no word of the user's
# settings that name classes
KEYS = ("class_path", "model", "data", "quantizer", "optimizer", "lr_scheduler")
TRAINER_KEYS = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_DEPTH, _VALUES = 32, 100_000  # far more than settings need
_PLAIN = (str, int, float, bool, NoneType)


def allowed() -> list[str]:
    """What the user allows beside `TRUSTED`: classes, modules or packages."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def is_trusted(name: str) -> bool:
    """Whether a file may name a class, by its import path."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in (*TRUSTED, *allowed()))


@contextmanager
def allowing(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Inside, files may name what the user names on a command line; a study's names nothing.

    Args:
        arguments: The command line.

    Yields:
        It without its `--allow NAME`.

    Raises:
        UserError: If a name is no import path.
    """
    if STUDY in os.environ:
        yield list(arguments)
        return
    rest, names, before = [], [], os.environ.get(VARIABLE)
    flags = iter(arguments)
    for flag in flags:
        key, equals, value = flag.partition("=")
        if key != "--allow":
            rest.append(flag)
            continue
        name = value if equals else next(flags, "")
        if not _NAME.fullmatch(f"{name}.x"):
            raise UserError(f"allow: {name or 'nothing'} is no import path; write --allow my_package.MyClass")
        names.append(name)
    said = (value for key, value in words(rest) if _names_classes(key) and isinstance(value, str))
    names += filter(_NAME.fullmatch, said)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *names]))
    try:
        yield rest
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def words(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What the user sets on a command line: all dotted keys and values, also those within flow-style YAML."""
    if STUDY in os.environ:
        return
    for flag, following in itertools.pairwise([*arguments, ""]):
        key, equals, joined = flag.partition("=")
        value: Any = joined if equals else following
        if not key.startswith("--"):
            continue
        if value.lstrip()[:1] in ("{", "["):
            with suppress(yaml.YAMLError, RecursionError, ValueError):  # the parser says what is wrong
                value = yaml.safe_load(value)
        for inner, each in walk({key.strip("-+"): value}, key):
            yield inner.strip("."), each


@contextmanager
def wall() -> Iterator[None]:
    """Inside, jsonargparse imports nothing else for a value, and builds nothing where any value may stand."""
    from jsonargparse import _common, set_parsing_settings

    names = [name for name in allowed() if name.partition(".")[0] != "jsonargparse"]  # it refuses that itself
    for name in tuple(names):
        home, _, attribute = name.rpartition(".")
        try:  # a class may be defined elsewhere than where the user knows it from
            found = getattr(import_module(home), attribute, None) if home else None
        except ImportError:  # the parser says so
            continue
        if isinstance(found, type):
            names.append(f"{found.__module__}.{found.__qualname__}")
    before = dict(_common.parsing_settings)
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *dict.fromkeys(names)],
    )
    try:
        yield
    finally:
        _common.parsing_settings.update(before)


def check_settings(values: Any, where: str) -> None:
    """Refuse settings from a file that name a class which is not trusted; nothing is imported.

    Args:
        values: The settings, as nested blocks or under dotted keys.
        where: File, for the message.

    Raises:
        UserError: Naming the key; also if they are nested without end.
    """
    for key, value in walk(values, where):
        if _names_classes(key):
            for name in _named(value):
                if not (is_trusted(name) or _is_imported(name) or Path(name).is_file()):
                    raise UserError(f"{where}: {_setting(key)}: {untrusted(name)}")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings as plain values.

    Args:
        path: The file.

    Raises:
        UserError: Naming it, if it is no such file, or nested without end.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise UserError(f"{path}: cannot be read as settings ({reason}); get the file again") from error
    if not isinstance(settings, dict):
        held = "nothing" if settings is None else type(settings).__name__
        raise UserError(f"{path}: must hold a mapping of settings, not {held}; get the file again")
    for _ in walk(settings, str(path)):
        pass
    return settings


def check_plain(value: Any, where: str) -> None:
    """Refuse what is more than plain values of a file's size, or would be made a class of.

    Args:
        value: A value of a field that holds no class.
        where: File and field, for the message.

    Raises:
        UserError: Naming the field.
    """
    for key, item in walk(value, where):
        if re.search(r"(^|\.)(class_path|init_args|dict_kwargs)$", key):
            raise UserError(f"{where}{key}: this setting is plain data, and no class is made of it; refused")
        if not isinstance(item, (*_PLAIN, dict, list, tuple)):
            raise UserError(f"{where}{key}: holds {type(item).__name__}, not a plain value; refused")


def build(cls: type[T], values: Any, where: str) -> T:
    """Make an object from values of a file.

    Args:
        cls: Its class.
        values: Arguments of the class as plain values.
        where: File and field, for the message.

    Raises:
        UserError: As `arguments`, or what the class itself refuses.
    """
    return cls(**arguments(cls, values, where))


def arguments(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Arguments of a class from plain values of a file, by the types that the class declares.

    Args:
        cls: The class.
        values: Plain values by argument; for a class, or what makes one, `class_path` and `init_args`.
        where: File and field, for the message.

    Raises:
        UserError: Naming the field: an unknown one, a value of another type, a class that is not trusted.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a mapping of settings, not {_short(values)}")
    hints, made = argument_types(cls), {}
    for key, value in values.items():
        if key not in hints:
            remedy = did_you_mean(str(key), hints, "another version may have written this file")
            raise UserError(f"{where}.{_short(key)} is no setting of {cls.__name__}; {remedy}")
        made[key] = _value(hints[key], value, f"{where}.{key}")
    return made


def find_class(name: Any, bases: Sequence[type], where: str) -> type:
    """The class that a file names.

    Args:
        name: Its import path.
        bases: It must derive from one of these.
        where: File and field, for the message.

    Raises:
        UserError: If it is not trusted, or none of these.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}: {_short(name)} is no import path of a class")
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
    # what the program has imported and is of this kind, it has imported for this
    if isinstance(found, type) and issubclass(found, tuple(bases)):
        return found
    raise UserError(f"{where}: {name} is no {' or '.join(base.__name__ for base in bases)}; refused")


def _value(hint: Any, value: Any, where: str) -> Any:
    """An argument from a plain value, by its type."""
    choices = list(_members(hint))
    if value is None and (NoneType in choices or Any in choices):
        return None
    for choice in choices:
        if get_origin(choice) is Callable:
            found, init_args = _specified(value, list(alternatives(choice)), where)
            return partial(found, **init_args)
        if is_dataclass(choice):
            return build(choice, value, where)  # type: ignore[arg-type]
    check_plain(value, where)
    if not _fits(value, hint):
        raise UserError(f"{where}: {refusal(hint, f'Got value: {_short(value)}')}")
    return tuple(value) if isinstance(value, list) and any(get_origin(c) is tuple for c in choices) else value


def _specified(value: Any, bases: list[type], where: str) -> tuple[type, dict[str, Any]]:
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        raise UserError(f"{where}: must name a class as class_path and init_args, not {_short(value)}")
    if surplus := [key for key in spec if key not in ("class_path", "init_args")]:
        raise UserError(f"{where}: {_short(surplus[0])} is neither class_path nor init_args; refused")
    found = find_class(spec["class_path"], bases, where)
    return found, arguments(found, spec.get("init_args") or {}, where)


def argument_types(cls: type) -> dict[str, Any]:
    """The types of a class's arguments, with those that it hands on to its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        try:
            hints = get_type_hints(base.__init__)  # type: ignore[misc]
        except (NameError, TypeError, AttributeError):  # annotations for a type checker alone
            hints = {}
        kinds = [parameter.kind for parameter in parameters]
        for parameter, kind in zip(parameters, kinds, strict=True):
            if kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _members(each)
    else:
        yield hint


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (Any, object) or not isinstance(kind, type):  # or a type variable
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


def walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """All values with their dotted keys; refuses more of them, or deeper ones, than settings have."""
    stack, left = [("", value, 0)], _VALUES
    while stack:
        key, item, depth = stack.pop()
        yield key, item
        pairs = item.items() if isinstance(item, Mapping) else ()
        children = [(f"{key}.{name}", each) for name, each in pairs]
        if isinstance(item, list | tuple):
            children = [(key, each) for each in item]
        left -= len(children) + 1
        if depth > _DEPTH or left < 0:
            raise UserError(f"{where}: nested too deep, or too long, for settings; refused")
        stack += [(name, each, depth + 1) for name, each in children]


def _is_imported(name: str) -> bool:
    """Whether the program itself has imported a class, and one of a kind that settings name."""
    torch, (home, _, attribute) = sys.modules.get("torch"), name.rpartition(".")
    found = getattr(sys.modules.get(home), attribute, None)
    if torch is None or not isinstance(found, type):
        return False
    return issubclass(found, (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler))


def _setting(key: str) -> str:
    """A key as one gives it on the command line."""
    return key.strip(".").replace(".init_args", "").removesuffix(".class_path")


def _names_classes(key: str) -> bool:
    *above, last = key.strip(".").replace(".init_args", "").split(".")
    return last in KEYS or (last in TRAINER_KEYS and above[-1:] in ([], ["trainer"]))


def _named(value: Any) -> list[str]:
    """Import paths that a value of a setting names: itself, or those within flow-style YAML."""
    if not isinstance(value, str):
        return []
    if value.lstrip()[:1] in ("{", "["):
        return [match[0] for match in _NAME.finditer(value)]
    return [value] if _NAME.fullmatch(value) else []


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, _PLAIN) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."

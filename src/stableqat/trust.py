"""Which classes a file may name.

A checkpoint's hyper-parameters, a run's `config.yaml`, a study or a configuration may come from anybody. They
may name classes of this suite, torch's optimizers and schedulers, and some of Lightning's. Any other class is
refused before it is imported, unless the user allows it: on the command line with `--allow my_methods.Mine`
or by naming it there (`--model.quantizer my_methods.Mine`), in Python by importing it. What the command line
names may lie in the current folder.
"""

import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import yaml

from stableqat.errors import UserError
from stableqat.refusals import untrusted

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
VARIABLE = "STABLEQAT_ALLOW"  # names that the user allows; the processes of a run inherit it
STUDY = "STABLEQAT_STUDY"  # set where a study, not the user, wrote the command line
# settings that name classes
QUANTIZERS = ("quantizer", "input_quantizer", "attention_quantizer")  # a class, or a mapping to classes
KEYS = ("class_path", "model", "data", *QUANTIZERS, "optimizer", "lr_scheduler")
TRAINER_KEYS = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_DEPTH, _VALUES = 32, 100_000  # far more than settings need


def allowed() -> list[str]:
    """What the user allows in addition to `TRUSTED`: classes, modules or packages."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def is_trusted(name: str) -> bool:
    """Whether a file may name the class of this import path."""
    return _lies_in(name, (*TRUSTED, *allowed()))


def allow_flags() -> str:
    """The flags with which another command may read what this one writes, each after a space."""
    return "".join(f" --allow {name}" for name in allowed() if not _lies_in(name, TRUSTED))


def _lies_in(name: str, prefixes: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


class _CurrentFolder(MetaPathFinder):
    """Finds modules that the user allows in the current folder, if none that is installed has their name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is None and fullname in {name.partition(".")[0] for name in allowed()}:
            return PathFinder.find_spec(fullname, [os.getcwd()])
        return None


@contextmanager
def allowing(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Let files name what the user names on the command line; a study's command line allows nothing.

    Args:
        arguments: The command line.

    Yields:
        The command line without `--allow NAME`.

    Raises:
        UserError: If a name is not an import path.
    """
    if not any(isinstance(finder, _CurrentFolder) for finder in sys.meta_path):
        sys.meta_path.append(_CurrentFolder())
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
        if not NAME.fullmatch(f"{name}.x"):
            raise UserError(f"allow: {name or 'nothing'} is not an import path; write --allow PACKAGE.CLASS")
        names.append(name)
    said = (value for key, value in words(rest) if _names_classes(key) and isinstance(value, str))
    names += filter(NAME.fullmatch, said)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *names]))
    try:
        yield rest
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def words(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What the user, not a study, sets on a command line: see `flags`."""
    if STUDY not in os.environ:
        yield from flags(arguments)


def flags(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What a command line sets: dotted keys with values, also those inside flow-style YAML."""
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
    """Make jsonargparse import trusted classes only, and build none for a setting of any type."""
    from jsonargparse import _common, set_parsing_settings

    names = [name for name in allowed() if name.partition(".")[0] != "jsonargparse"]  # always refused
    for name in tuple(names):
        home, _, attribute = name.rpartition(".")
        try:  # a class may be defined elsewhere than the user imports it from
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
    """Refuse settings of a file that name an untrusted class, without importing anything.

    Args:
        values: The settings, as nested blocks or under dotted keys.
        where: The file, for the message.

    Raises:
        UserError: If a setting names one, or the settings are nested too deep; names the key.
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
        UserError: If the file does not hold settings; names it.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise UserError(f"{path}: cannot be read as settings ({reason}); copy it again") from error
    if not isinstance(settings, dict):
        held = "nothing" if settings is None else type(settings).__name__
        raise UserError(f"{path}: must hold a mapping of settings, not {held}; copy it again")
    for _ in walk(settings, str(path)):
        pass
    return settings


def walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """All values with their dotted keys.

    Raises:
        UserError: If there are too many, or they are nested too deep.
    """
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
            raise UserError(f"{where}: too deep, or too long, for settings; take another file")
        stack += [(name, each, depth + 1) for name, each in children]


def _is_imported(name: str) -> bool:
    """Whether the program has already imported a class, and settings may name its kind."""
    torch, (home, _, attribute) = sys.modules.get("torch"), name.rpartition(".")
    found = getattr(sys.modules.get(home), attribute, None)
    if torch is None or not isinstance(found, type):
        return False
    return issubclass(found, (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler))


def _setting(key: str) -> str:
    """A key as it is written on the command line."""
    return key.strip(".").replace(".init_args", "").removesuffix(".class_path")


def _names_classes(key: str) -> bool:
    *above, last = key.strip(".").replace(".init_args", "").split(".")
    # by layer pattern, whose dots look like keys
    named = last in KEYS or not set(QUANTIZERS).isdisjoint(above)
    return named or (last in TRAINER_KEYS and above[-1:] in ([], ["trainer"]))


def _named(value: Any) -> list[str]:
    """The import paths that a value names: itself, or those inside flow-style YAML."""
    if not isinstance(value, str):
        return []
    if value.lstrip()[:1] in ("{", "["):
        return [match[0] for match in NAME.finditer(value)]
    return [value] if NAME.fullmatch(value) else []

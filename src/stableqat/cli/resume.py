"""The checkpoint that `ckpt_path` names, and its model's settings beside the configured ones.

Lightning silently starts anew where there is no checkpoint, and silently lets a checkpoint's settings replace
the configured ones.
"""

import logging
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from stableqat.checkpoints.names import BEST, CHECKPOINTS, LAST, is_sharded, last_checkpoints
from stableqat.checkpoints.read import check_sums, read_rest
from stableqat.construct import arguments, find_class
from stableqat.errors import UserError
from stableqat.modules import QATModule
from stableqat.modules.hyperparameters import saved_arguments
from stableqat.trust import QUANTIZERS

logger = logging.getLogger(__name__)

_QUANTIZERS = tuple(f"init_args.{key}" for key in QUANTIZERS)
# null in a configuration leaves them to the start, the data or the model's size
_LEFT_OPEN = (
    "init_args.new_classifier",
    "init_args.model_name",
    "init_args.num_classes",
    "init_args.optimizer.init_args.lr",
)


def find_resumed(settings: Namespace) -> str | None:
    """The checkpoint that `ckpt_path` names; `last` and `best` are in the run's folder.

    If the last one is damaged or missing, a warning says so and the one before it is taken.

    Raises:
        UserError: If there is no such checkpoint, or it is damaged.
    """
    path = settings.get("ckpt_path")
    if path is None:
        return None
    if path != "last":
        path = Path(path) if path != "best" else _run_folder(settings) / CHECKPOINTS / BEST
        _check_resumed(path, settings.trainer.strategy)
        return str(path)
    folder = _run_folder(settings)
    last, found = folder / CHECKPOINTS / LAST, last_checkpoints(folder)
    previous = next((each for each in found if each != last), None)
    try:
        _check_resumed(last, settings.trainer.strategy)
    except UserError as error:
        if previous is None or (last in found and not isinstance(error, _DamagedError)):
            raise
        _check_resumed(previous, settings.trainer.strategy)
        logger.warning("%s; resuming from the one before it, %s", str(error).partition("; ")[0], previous)
        return str(previous)
    return str(last)


class _DamagedError(UserError):
    """A checkpoint that cannot be read, or differs from what was written."""


def _check_resumed(path: Path, strategy: str | Namespace) -> None:
    if not path.exists():
        raise UserError(f"ckpt_path: {path} does not exist; name a checkpoint, or leave it out to start anew")
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"ckpt_path: {path} is not a checkpoint; name one, or write last")
    try:
        check_sums(path)
        checkpoint = read_rest(path)
    except UserError as error:
        raise _DamagedError(f"ckpt_path: {error}") from error
    if "pytorch-lightning_version" not in checkpoint:
        raise UserError(
            f"ckpt_path: {path} was not written by a run and cannot be resumed; name it as model.init_from"
        )
    kind = strategy if isinstance(strategy, str) else strategy.class_path
    if path.is_dir() and not kind.lower().endswith(("fsdp2", "fsdp2strategy")):
        raise UserError(
            f"ckpt_path: {path} is sharded and resumes with --trainer.strategy fsdp2; for {kind}, merge it "
            f"first: stableqat consolidate {path}"
        )


def saved_model(path: Path, configured: Namespace) -> dict[str, Any] | None:
    """The class and arguments of a checkpoint's model; None if the checkpoint does not hold them.

    Args:
        path: The checkpoint.
        configured: The configured model, whose name of the class is kept.

    Raises:
        UserError: If they are not settings of a model.
    """
    saved = read_rest(path)
    if not saved["hyper_parameters"]:
        return None
    cls, values = saved_arguments(QATModule, path, saved)
    arguments(cls, values, f"{path}: hyper_parameters")
    same = find_class(configured.class_path, [QATModule], "model") is cls
    named = configured.class_path if same else saved["hyper_parameters"]["_class_path"]
    return {"class_path": named, "init_args": values}


def differences(configured: Namespace, saved: Namespace) -> list[tuple[str, Any, Any]]:
    """Settings in which the configured model and a checkpoint's differ: (key, configured, saved).

    A checkpoint holds the whole architecture, such as all keys of a transformers config. Only keys that the
    configuration names are compared, and none if a model folder or `init_from` brought the architecture.
    """
    mine, other = (_flat(each) for each in (configured, saved))
    for key in _QUANTIZERS:
        if mine.get(key) != other.get(key):  # then their settings have nothing in common
            mine, other = ({k: v for k, v in f.items() if not k.startswith(f"{key}.")} for f in (mine, other))
    start = mine.pop("init_args.init_from", None)
    other.pop("init_args.init_from", None)
    if (teacher := "init_args.teacher.source") in mine and mine[teacher] is None:
        mine[teacher] = start  # its default, under which it was saved
    for key in _LEFT_OPEN:
        if key in mine and mine[key] is None:
            mine[key] = other.get(key)
    brought = start is not None
    for key, block in list(other.items()):
        if isinstance(block, dict) and isinstance(named := mine.get(key), dict):
            del mine[key], other[key]
            mine |= {f"{key}.{k}": named[k] for k in named if k in block}
            other |= {f"{key}.{k}": block[k] for k in named if k in block}
        elif isinstance(block, dict) and (brought or isinstance(mine.get(key), str)):
            mine[key] = block
    pairs = {key: (mine.get(key), other.get(key)) for key in sorted(mine.keys() | other.keys())}
    return [
        (f"model.{key.replace('init_args.', '')}", a, b)
        for key, (a, b) in pairs.items()
        if as_saved(a) != as_saved(b)
    ]


def _flat(model: Namespace) -> dict[str, Any]:
    """Settings by dotted key; of a mapping of quantizers its patterns in their order, and those of each."""
    flat = dict(vars(model.as_flat()))
    for key in _QUANTIZERS:
        if isinstance(mapping := flat.get(key), dict):
            flat[key] = f"a mapping of {', '.join(map(str, mapping))}"
            for pattern, made in mapping.items():
                inside = vars(made.as_flat()) if isinstance(made, Namespace) else {"class_path": made}
                flat |= {f"{key}.{pattern}.{name}": value for name, value in inside.items()}
        elif named := flat.pop(f"{key}.class_path", None):
            flat[key] = named
    return flat


def _run_folder(settings: Namespace) -> Path:
    run_logger = settings.trainer.logger
    args = run_logger.get("init_args") if isinstance(run_logger, Namespace) else None
    if args is None or args.get("version") is None:
        raise UserError(
            "ckpt_path: last and best need the run's folder; add --trainer.logger.version, or name the file"
        )
    version = args.version if isinstance(args.version, str) else f"version_{args.version}"
    return Path(args.save_dir) / (args.name or "") / version


def as_saved(value: Any) -> Any:
    """A value of a setting as a file holds it: a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value

"""The arguments of a module, saved in its checkpoints as plain values and built from them again.

A checkpoint loads without pickled code: a class, or what makes one (`functools.partial`), is saved as
`class_path` and `init_args`, and a file's values make only classes that `stableqat.trust` knows.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from stableqat.construct import argument_types, arguments, check_plain, find_class
from stableqat.errors import UserError

# what the model is the same without: left out where a checkpoint's model is only evaluated or read
ONLY_FOR_TRAINING: dict[str, Any] = {
    "compile_model": False,
    "graphed": False,
    "activation_checkpointing": False,
    "lean_loss": False,
    "teacher": None,
    "init_quantizers": "weights",
}

# what leaves activations in full precision where nothing calibrates their scales
FULL_ACTIVATIONS: dict[str, Any] = dict.fromkeys(("input_quantizer", "attention_quantizer", "cache_bits"))


def save_plain_hyperparameters(module: L.LightningModule) -> None:
    """Save the arguments of a module's class and of its bases, as plain values.

    The command line passes them in plain already; other callables than classes cannot be saved.

    Args:
        module: Within its `__init__`.
    """
    module.save_hyperparameters(logger=False)
    if "_class_path" not in module.hparams:
        plain = {
            key: _plain(value)
            for key, value in module.hparams.items()
            if not callable(value) or _is_importable(value)
        }
        module.hparams.clear()
        module.hparams.update(plain)
        module.hparams["_class_path"] = f"{type(module).__module__}.{type(module).__qualname__}"
        module.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"


def saved_arguments(
    base: type[L.LightningModule], path: Path, read: dict[str, Any], *, replaced: Iterable[str] = ()
) -> tuple[type, dict[str, Any]]:
    """The class of a checkpoint's module, and its arguments as plain values.

    Args:
        base: The class must be this one or derive from it.
        path: Checkpoint file or folder, for messages.
        read: What `read_checkpoint` made of it.
        replaced: Arguments to leave out.

    Raises:
        UserError: If it is another class, or an argument is unknown and not plain.
    """
    where = f"{path}: hyper_parameters"
    values = dict(read[base.CHECKPOINT_HYPER_PARAMS_KEY])
    named = values.pop("_class_path", f"{base.__module__}.{base.__qualname__}")
    values.pop("_instantiator", None)  # Lightning's way: a function to import
    found = find_class(named, [base], f"{where}._class_path")
    known = argument_types(found)
    for key in values.keys() - known.keys():  # of another version of this suite, left out
        check_plain(values[key], f"{where}.{key}")
    return found, {key: value for key, value in values.items() if key in known and key not in replaced}


def rebuild(base: type[L.LightningModule], path: Path, read: dict[str, Any], **changes: Any) -> Any:
    """The module of a checkpoint, not yet configured.

    Args:
        base: Its class must be this one or derive from it.
        path: Checkpoint file or folder, for messages.
        read: What `read_checkpoint` made of it.
        changes: Arguments that replace the checkpoint's, as they are; those that the class lacks are left
            out.

    Raises:
        UserError: As `saved_arguments`, or if an argument has another type, or names an untrusted class.
    """
    found, values = saved_arguments(base, path, read, replaced=changes)
    made = arguments(found, values, f"{path}: hyper_parameters")
    known = argument_types(found)
    try:
        return found(**made, **{key: value for key, value in changes.items() if key in known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _is_importable(value: Callable[..., Any]) -> bool:
    target = value.func if isinstance(value, partial) else value
    positional = isinstance(value, partial) and value.args
    return isinstance(target, type) and "<locals>" not in target.__qualname__ and not positional


def _plain(value: Any) -> Any:
    if isinstance(value, partial):
        return {**_plain(value.func), "init_args": {k: _plain(v) for k, v in value.keywords.items()}}
    if isinstance(value, type):
        return {"class_path": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return asdict(value)  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return list(value)
    return value

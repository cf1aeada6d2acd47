"""Read a checkpoint of this suite, one file or sharded, and verify that it is what was written.

Files are read with `weights_only`: nothing in them is executed.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from stableqat.checkpoints.names import REST, is_sharded
from stableqat.checkpoints.sharded import damaged_files, read_whole
from stableqat.errors import UserError
from stableqat.trust import check_settings

_REST = {"hyper_parameters": dict, "callbacks": dict, "global_step": int}
_KINDS = {dict: "a mapping", int: "a whole number"}


def read_checkpoint(path: Path, *, optimizers: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this suite: tensors and plain values only.

    Args:
        path: A file, or a folder of shards, of which the tensors are put together.
        optimizers: Also read the optimizers of a sharded checkpoint; a file always brings them.

    Raises:
        UserError: If the checkpoint is cut short, or holds something else.
    """
    if is_sharded(path):
        checkpoint = read_rest(path)
        with _reading(path):
            whole = read_whole(path, only="" if optimizers else "state_dict")
        checkpoint["state_dict"] = whole.pop("state_dict", None)
        if optimizers:
            checkpoint["optimizer_states"] = [{"state": {}, **whole[key]} for key in sorted(whole)]
    else:
        with _reading(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_rest(path, checkpoint)
    state = checkpoint.get("state_dict")
    if not (isinstance(state, dict) and all(isinstance(each, Tensor) for each in state.values())):
        raise UserError(f"{path}: not a checkpoint of this suite (it has no state_dict of tensors alone)")
    return checkpoint


def read_rest(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds besides weights and optimizers, whose shards are left alone.

    Raises:
        UserError: As `read_checkpoint`.
    """
    if not is_sharded(path):
        return read_checkpoint(path)  # which maps tensors from the disk
    with _reading(path):
        checkpoint = torch.load(path / REST, map_location="cpu", weights_only=True)
    _check_rest(path, checkpoint)
    return checkpoint


def check_sums(path: Path) -> None:
    """Compare a checkpoint with its own checksums, which torch ignores; reads a gigabyte per second.

    Raises:
        UserError: If they differ.
    """
    with _reading(path):
        if is_sharded(path):
            bad = next(iter(damaged_files(path)), None)
        else:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
    if bad is not None:
        raise UserError(f"{path}: damaged ({bad} is not what was written); take another one")


def _check_rest(path: Path, checkpoint: object) -> None:
    """Check what Lightning and this suite take for granted, in a file that anybody may have written."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint of this suite (it is not a mapping)")
    for key, kind in _REST.items():
        value = checkpoint.setdefault(key, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {key}: must be {_KINDS[kind]}, not {str(value)[:60]}; take another one")
    check_settings(checkpoint["hyper_parameters"], f"{path}: hyper_parameters")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # not an Exception; it holds one per process
            cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RuntimeError | EOFError | zipfile.BadZipFile | OSError | ValueError | KeyError):
            raise UserError(
                f"{path}: not a readable checkpoint (cut short or damaged); take another one"
            ) from error
        if isinstance(cause, UnpicklingError):
            raise UserError(f"{path}: holds more than tensors and plain values; refused") from error
        raise

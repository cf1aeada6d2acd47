"""Write a checkpoint beside its place, bring it to the disk, and move it: it is whole, or it is not there.

The price is disk space: the old checkpoint and the new one are there together until the move.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from stableqat.checkpoints.names import OLD, PARTIAL, PREVIOUS
from stableqat.errors import UserError
from stableqat.files import remove


class NotWrittenError(UserError):
    """A checkpoint that the disk did not take."""


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a file as it is serialised, and to the end.

    Lightning's own makes a copy in memory, another in the folder for temporary files, and copies that one
    over the old checkpoint where it lies on another file system: cut there, neither is whole.
    """

    def save_checkpoint(self, checkpoint: Any, path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a path where nothing is lost."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's word for whatever the disk says
                raise _os_error(error) or error from error
            file.flush()
            os.fsync(file.fileno())


def put(partial: Path, path: Path) -> None:
    """Move a whole checkpoint to its place; a folder cannot replace another in one move."""
    if path.is_dir():
        old = path.with_name(path.name + OLD)
        path.rename(old)
        partial.rename(path)
        remove(old)
    else:
        partial.replace(path)


def keep_previous(path: Path) -> None:
    """Name the last checkpoint as the one before it; a file keeps its own name, too, until it is replaced."""
    previous = path.with_name(PREVIOUS)
    remove(previous)
    try:
        os.link(path, previous)
    except OSError:  # a folder, or a file system without links
        path.rename(previous)


def tidy(path: Path) -> None:
    """Remove what a killed run left half done at a checkpoint's place."""
    old = path.with_name(path.name + OLD)
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (Path(f"{path}{PARTIAL}"), old):
        remove(left)


def on_disk(action: Any, *args: Any) -> str | None:
    """Why the operating system refused to write, which torch tells in its own words; None if it did not."""
    try:
        action(*args)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        return cause.strerror or type(cause).__name__
    return None


def _os_error(error: BaseException | None) -> OSError | None:
    if isinstance(error, CheckpointException):  # of several processes
        return next((found for e, _ in error.failures.values() if (found := _os_error(e))), None)
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error

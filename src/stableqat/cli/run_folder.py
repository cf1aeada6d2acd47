"""The folder of a run: it can be written, is new or resumed, and one process at a time writes it."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stableqat.checkpoints.names import CONFIG, LOCK, last_checkpoints
from stableqat.errors import UserError
from stableqat.files import remove

_NUMBERED = (CSVLogger, TensorBoardLogger)  # a folder for each run


def check_run_folder(log_dir: str, ckpt_path: str | None) -> None:
    """Refuse a run's folder that cannot be written, or that holds another run than the resumed one.

    Args:
        log_dir: The folder.
        ckpt_path: The checkpoint to resume from.

    Raises:
        UserError: Naming the folder.
    """
    folder = Path(log_dir)
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"trainer.logger.save_dir: {folder} cannot be written ({existing}: {error.strerror}); "
            "choose another folder"
        ) from error
    resumes = ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents
    if (folder / CONFIG).exists() and not resumes:
        remedy = "remove it (it has no checkpoint to resume from)"
        if last_checkpoints(folder):
            remedy = "resume it with --ckpt_path last"
        raise UserError(
            f"{folder}: already holds a run; choose another --trainer.logger.version, or {remedy}"
        )


@contextmanager
def claimed(trainer: L.Trainer, settings: Namespace) -> Iterator[None]:
    """Inside, no other process writes the run's folder; the operating system frees it, however the run ends.

    If another run has taken the folder's number meanwhile, the next number is taken. A run that fails before
    its first step leaves nothing behind, and a folder that is empty at the end is removed.

    Args:
        trainer: The trainer.
        settings: The verb's settings.

    Raises:
        UserError: If another process writes this run, or has written one here meanwhile.
    """
    loggers: list[Any] = [each for each in trainer.loggers if isinstance(each, _NUMBERED)][:1]
    if not (loggers and trainer.is_global_zero):
        yield
        return
    [own] = loggers
    asked = settings.trainer.logger
    asked = asked[0] if isinstance(asked, list) else asked
    numbered = not isinstance(asked, Namespace) or asked.get("init_args.version") is None
    made = [each for each in Path(own.log_dir).absolute().parents if not each.exists()]
    while True:
        folder = Path(own.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=not numbered)
            break
        except FileExistsError:
            own._version = None
    lock = folder / LOCK
    try:
        with _locked(lock) as held:
            if not held:
                raise UserError(
                    f"{folder}: another process is writing this run; wait for it to end, or choose another "
                    "--trainer.logger.version"
                )
            check_run_folder(str(folder), settings.ckpt_path)
            before = set(folder.iterdir())
            try:
                yield
            except BaseException:
                if settings.ckpt_path is None and trainer.global_step == 0:
                    for made_here in set(folder.iterdir()) - before:
                        remove(made_here)
                raise
    finally:
        for empty in (folder, *made):
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process, not the one that forked it, holds a lock; its file is removed at the end."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # without locks on the file system, go ahead
                yield error.errno not in (errno.EACCES, errno.EAGAIN)
                return
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # its holder has just removed it
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return

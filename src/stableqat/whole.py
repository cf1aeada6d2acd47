"""Files and folders that appear when they are whole."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file beside its place and move it there at the end; after an exception nothing is left of it.

    Args:
        path: The file; what is there is replaced in one move.

    Yields:
        The path to write to, this process's own.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def left_over(path: Path) -> bool:
    """Whether a file is what a killed process left of one that it wrote with `whole`."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def hidden_folder(beside: Path, prefix: str) -> Iterator[Path]:
    """A hidden folder to make something in before it is moved to its place; removed at the end.

    Those that killed processes left are removed first: of them nobody holds the lock.

    Args:
        beside: The folder that gets it.
        prefix: How its name begins, with a dot.

    Yields:
        The folder.
    """
    for old in beside.glob(f"{prefix}*.part"):
        if lock := _locked(old):
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=beside))
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A file descriptor that holds the lock on a folder; None where it can't be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

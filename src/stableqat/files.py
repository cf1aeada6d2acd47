"""Paths, and files and folders that appear when they are whole."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from stableqat.errors import UserError


def only_local(name: str) -> bool:
    """Whether a name of a model or of data can only be a path: nothing on the Hub has a name like it."""
    suffix = Path(name).suffix in (".ckpt", ".jsonl", ".parquet")
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1 or suffix) and not set(":[{") & set(name)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
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
    """Whether a file is what a killed process left of one that it wrote with `whole_file`."""
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


@contextmanager
def whole_folder(path: str) -> Iterator[Path]:
    """Fill a new folder beside its place and move it there at the end; after an exception nothing is left.

    Args:
        path: The folder, of the setting `out`.

    Yields:
        The folder to write to, this process's own.

    Raises:
        UserError: If something is there already, at the end as well, or the place cannot be written.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    if os.path.lexists(folder):
        raise UserError(f"out: {path or folder} exists already; name a new folder")
    made = [parent for parent in folder.parents if not parent.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = stack.enter_context(hidden_folder(folder.parent, f".{folder.name}.")) / folder.name
            part.mkdir()
        except OSError as error:
            raise cannot_write(path, error) from error
        yield part
        if os.path.lexists(folder):
            raise UserError(f"out: {path} exists by now; name a new folder")
        try:
            part.rename(folder)
        except OSError as error:
            raise cannot_write(path, error) from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something is in it
            folder.rmdir()


def cannot_write(path: str, error: Exception) -> UserError:
    """What to say where a folder of the setting `out` cannot be written.

    Args:
        path: The folder.
        error: The reason.
    """
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"out: {path} cannot be written ({reason}); nothing is left of it, name another folder")

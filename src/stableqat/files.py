"""Paths, and files and folders that appear when they are complete."""

import errno
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
        path: The file; one that is there is replaced in one move.

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
    """Whether a killed process left this while it wrote a file or folder with this module."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def hidden_folder(beside: Path, prefix: str) -> Iterator[Path]:
    """A hidden folder to make something in before it is moved to its place; removed at the end.

    Those that killed processes left, on which nobody holds the lock, are removed first.

    Args:
        beside: The folder to make it in.
        prefix: The start of its name, with a dot.

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
    """A file descriptor that holds the lock on a folder; None where another process holds it."""
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
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a new folder beside its place and move it there at the end; after an exception nothing is left.

    Args:
        folder: The folder; its parents are made.

    Yields:
        The folder to write to, this process's own.

    Raises:
        FileExistsError: If something is there already, at the end as well.
        OSError: If the place cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        _refuse_existing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(folder.parent, f".{folder.name}.") as hidden:
            (part := hidden / folder.name).mkdir()
            yield part
            _refuse_existing(folder)
            try:
                part.rename(folder)
            except OSError:
                _refuse_existing(folder)  # made meanwhile
                raise
    finally:
        for parent in made:
            with suppress(OSError):  # something is in it
                parent.rmdir()


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """`whole_folder` for the setting `out`.

    Args:
        out: The folder.

    Yields:
        The folder to write to.

    Raises:
        UserError: If something is there already, or the place cannot be written. Other errors of the body
            pass, see `writing`.
    """
    folder = Path(out).expanduser()
    with ExitStack() as stack:
        try:
            part = stack.enter_context(whole_folder(folder))
        except FileExistsError as error:
            raise UserError(f"out: {out} exists already; name a new folder") from error
        except OSError as error:
            raise UserError(
                f"out: {out} cannot be written ({error.strerror}); name another folder"
            ) from error
        yield part
        with writing(f"out: {out}", "nothing is left of it, name another folder"):
            stack.close()


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Say in one line that something cannot be written.

    Args:
        what: The file or folder, behind the setting that names it.
        remedy: What to do.

    Raises:
        UserError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{what} cannot be written ({reason}); {remedy}") from error


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Paths, and files and folders that appear once they are complete."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from stableqat.errors import UserError


def only_local(name: str) -> bool:
    """Whether a name of a model or data set is a path: the Hub has no such names, or its folder is here."""
    suffix = Path(name).suffix in (".ckpt", ".jsonl", ".parquet")
    path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/") or suffix
    return (path or _folder_here(name) is not None) and not set(":[{") & set(name)


def _folder_here(name: str) -> str | None:
    """The folder, of a name as on the Hub, that exists in the current one."""
    first, slash, _ = name.partition("/")
    return first if slash and first.strip(".~") and Path(first).is_dir() else None


def is_missing(name: str) -> bool:
    """Whether a name of a model or data set can only be a path, and nothing is there."""
    return only_local(name) and not Path(name).expanduser().exists()


def check_source(source: str, *, local: bool = False) -> None:
    """Refuse a run, checkpoint or model folder that does not exist; other names may be on the Hub.

    Args:
        source: What the user names.
        local: Whether it can only be a path.

    Raises:
        UserError: If it is a path to nothing.
    """
    if is_missing(source) or (local and not Path(source).expanduser().exists()):
        what = "run or checkpoint" if local else "run, checkpoint or folder"
        raise UserError(f"{source}: there is no such {what}{as_it_stands(source)}")


def as_it_stands(path: str) -> str:
    """What a message adds to a path that does not exist: why it is not taken for another one, or a name."""
    if set("*?") & set(path):
        return " (globs are not expanded)"
    folder = _folder_here(path)
    return f" ({folder} is a folder here, so the Hub is not asked)" if folder and path.count("/") == 1 else ""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file next to its place and move it there at the end; an exception leaves nothing behind.

    Args:
        path: The file; an existing one is replaced in one move.

    Yields:
        The path to write to, which belongs to this process.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        _share(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def held_elsewhere(lock: Path) -> bool:
    """Whether another process holds a lock (`fcntl.lockf`) on a file; a file that is left over is free."""
    try:
        with lock.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def left_over(path: Path) -> bool:
    """Whether this is what a killed process left while it wrote a file or folder with this module."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def hidden_folder(beside: Path, prefix: str) -> Iterator[Path]:
    """Make a hidden folder, in which to prepare what is then moved to its place; remove it at the end.

    It first removes the folders of killed processes: those on which nobody holds the lock.

    Args:
        beside: The folder to make it in.
        prefix: The start of its name, with a dot.

    Yields:
        The folder.
    """
    for old in beside.glob(f"{prefix}*.part"):
        if lock := lock_folder(old):
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=beside))
    lock = lock_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock:
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for this process.

    Returns:
        A file descriptor that holds the lock until it is closed; None where another process holds it.
    """
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
    """Fill a new folder next to its place and move it there at the end; an exception leaves nothing behind.

    Args:
        folder: The folder; its parents are created.

    Yields:
        The folder to write to, which belongs to this process.

    Raises:
        FileExistsError: If something exists there, now or at the end.
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
            for file in part.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    _share(file)
            _refuse_existing(folder)
            try:
                part.rename(folder)
            except OSError:
                _refuse_existing(folder)  # created meanwhile
                raise
    finally:
        for parent in made:
            with suppress(OSError):  # something is in it
                parent.rmdir()


def _share(file: Path) -> None:
    """Let others read a file as far as the umask says; safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(file.stat().st_mode | 0o666 & ~mask)


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
        UserError: If something exists there, or the place cannot be written. Other errors of the body pass,
            see `writing`.
    """
    folder = Path(out).expanduser()
    with ExitStack() as stack:
        with writing(f"out: {out}", "name another folder"):
            try:
                part = stack.enter_context(whole_folder(folder))
            except FileExistsError as error:
                raise UserError(f"out: {out} exists already; name a new folder") from error
        yield part
        with writing(f"out: {out}", "nothing is left of it, name another folder"):
            stack.close()


def new_results(out: str, *companions: str, endings: Sequence[str] = (".json",)) -> Path:
    """The file of the setting `out`, which can be written and is not there yet; its folder is made.

    Args:
        out: The file.
        companions: Suffixes of the files that go beside it, `.png` for example.
        endings: Suffixes that it may have.

    Raises:
        UserError: If the file ends in none of them, it or a companion exists, or its folder cannot be
            written.
    """
    path = Path(out).expanduser()
    if path.suffix not in endings:
        raise UserError(f"out: {out} must end in {' or '.join(endings)}")
    for each in (path, *map(path.with_suffix, companions)):
        if each.exists():
            raise UserError(f"out: {each} exists already; name a new file")
    with writing(f"out: {out}", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Report in one line that something cannot be written.

    Args:
        what: The file or folder, after the setting that names it.
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
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

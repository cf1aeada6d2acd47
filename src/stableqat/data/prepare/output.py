"""An output folder that appears when it is whole, and a writing that goes on where it was killed.

Everything is written to `OUT.part`, which is renamed to `OUT` at the end, its hidden files left out. Shards
of all splits are cut together; each is written under a hidden name and moved, and then one small file,
replaced atomically, records the shards and the place in the input that they reach. Work after that record is
lost by a kill and done again, byte for byte.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, Protocol, Self, TypeVar

from stableqat.errors import UserError

MANIFEST = "manifest.json"
_STATE = ".state.json"
_REQUEST = ".request.json"
_TYPES: dict[type, str] = {dict: "mapping", list: "list", str: "text", int: "number"}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder that `stableqat data` wrote, or None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and "kind" in manifest else None


@dataclass(frozen=True)
class Shard:
    """A file of a finished output, as its manifest has it."""

    path: Path
    size: int
    sha256: str

    def check_size(self) -> None:
        """Raise UserError if the file is missing or was cut short."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            raise UserError(
                f"{self.path} is missing or not the {self.size} bytes that were written: copy it again"
            )

    def check_content(self) -> None:
        """Raise UserError if a byte of the file has changed; it is read once, and again if it is written."""
        self.check_size()
        known = self.path.resolve(), self.path.stat().st_mtime_ns, self.sha256
        if known in _whole:
            return
        with self.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise UserError(
                    f"{self.path} is damaged (its SHA-256 is not the manifest's): copy it again, or make "
                    "the set anew"
                )
        _whole.add(known)


V = TypeVar("V")

#: Shards whose content this process has found whole.
_whole: set[tuple[Path, int, str]] = set()


def read_field(folder: Path, manifest: dict[str, Any], kind: type[V], *keys: str | int) -> V:
    """Return what a folder's manifest says under some keys, each inside of the one before.

    Raises:
        UserError: nothing, or something of another type; names the key.
    """
    value: Any = manifest
    try:
        for key in keys:
            value = value[key]
    except (LookupError, TypeError):
        value = None
    if type(value) is not kind or not value:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({'.'.join(map(str, keys))} is no {_TYPES[kind]}): "
            "copy it again, or make the set anew"
        )
    return value


def read_shards(folder: Path, manifest: dict[str, Any]) -> dict[str, list[Shard]]:
    """Return the shards of each split of a finished output.

    Raises:
        UserError: the manifest lacks one of their fields; names it.
    """
    found: dict[str, list[Shard]] = {}
    for split in read_field(folder, manifest, dict, "splits"):
        found[split] = []
        for number in range(len(read_field(folder, manifest, list, "splits", split, "shards"))):
            at = "splits", split, "shards", number
            name = Path(read_field(folder, manifest, str, *at, "file")).name
            size = read_field(folder, manifest, int, *at, "bytes")
            found[split].append(Shard(folder / name, size, read_field(folder, manifest, str, *at, "sha256")))
    return found


def _new_folder(out: str) -> Path:
    """Return the folder that `out` names, if it can be made by a rename."""
    folder = Path(out).expanduser()
    try:
        if folder.is_symlink() or folder.name in ("", ".."):
            folder = folder.resolve()
        whole, here = Path(os.path.abspath(folder)), Path.cwd()
        if not out.strip() or whole in (here, *here.parents) or os.path.ismount(folder):
            raise UserError(
                f"out: {out!r} is no new folder: give a name inside of it, such as --out data/small"
            )
        folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise UserError(f"out: {out} is no folder that can be made ({error}): give another --out") from error
    return folder


class Output:
    """An output folder in the making; as a context, it is this process's alone.

    Args:
        out: the folder; `out.part` until it is whole.
        kind: what the folder holds.
        request: all that decides its content; what was begun with another one is refused.

    Raises:
        UserError: the folder holds something else, or another process is writing it.
    """

    def __init__(self, out: str, kind: str, request: dict[str, Any]):
        self.folder = _new_folder(out)
        self.part = self.folder.with_name(self.folder.name + ".part")
        self.kind, self.request = kind, request
        self._lock: IO[str] | None = None
        manifest = read_manifest(self.folder)
        #: Whether an earlier call has done it all.
        self.done = manifest is not None
        if manifest is not None:
            self._compare(manifest, self.folder, "give another --out")
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is no {kind}: give another --out")
        with self._writing("give another --out"):
            self.part.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.part / ".lock", "w")  # noqa: SIM115 - locked as long as it is open
        try:
            self._begin()
        except BaseException:
            self._lock.close()  # the error's traceback would keep it locked
            raise

    def _begin(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.part} is being written by another process") from error
        if begun := self.load(MANIFEST) or self.load(_REQUEST):
            self._compare(begun, self.part, "delete it or give another --out")
        with self._writing():
            if not begun:
                self.save(_REQUEST, {"kind": self.kind, "request": self.request})
            if (self.part / MANIFEST).is_file():  # killed in the last moment
                self._publish()
                self.done = True

    @contextmanager
    def _writing(self, remedy: str = "make room, and the same command goes on") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file = Path(os.fsdecode(error.filename or self.part))
            ours = file.is_relative_to(self.part) or self.part.is_relative_to(file)
            deed, where = ("written", self.part) if ours else ("read", file)
            raise UserError(f"{where} can't be {deed} ({error.strerror or error}): {remedy}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lock is not None:
            if isinstance(error, UserError) and self.part.is_dir() and not (self.part / _STATE).is_file():
                self.discard()  # the corrected command begins anew
            self._lock.close()
        if isinstance(error, OSError):  # what is read raises errors of its own
            with self._writing():
                raise error

    def _compare(self, found: dict[str, Any], folder: Path, remedy: str) -> None:
        if found.get("kind") != self.kind:
            raise UserError(f"{folder} holds a {found.get('kind')}, not a {self.kind}: {remedy}")
        wanted = json.loads(json.dumps(self.request))
        for key, value in wanted.items():
            if (other := read_field(folder, found, dict, "request").get(key)) != value:
                what = f" ({other}, not {value})" if isinstance(value, str | int | float | None) else ""
                raise UserError(f"{folder} holds a {self.kind} of another {key}{what}: {remedy}")

    def load(self, name: str) -> Any:
        """Return what was saved under a name, or None."""
        path = self.part / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path} is damaged: delete {self.part} to begin again") from error

    def save(self, name: str, value: Any) -> None:
        """Write a JSON file, wholly or not at all."""
        temporary = self.part / f".{name}"
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.part / name)

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, move the folder to its name and return the manifest."""
        manifest = {"kind": self.kind, "request": self.request} | manifest
        self.save(MANIFEST, manifest)
        self._publish()
        return manifest

    def _publish(self) -> None:
        for path in self.part.iterdir():
            if path.name.startswith("."):
                path.unlink()
        os.replace(self.part, self.folder)

    def discard(self) -> None:
        """Delete what was begun: it can't become a whole."""
        shutil.rmtree(self.part)


class Writer(Protocol):
    """What writes one shard to an open file."""

    def close(self) -> None:
        """Write what is left."""


W = TypeVar("W", bound=Writer)


class Shards(Generic[W]):
    """The shards of an output, all splits cut together.

    Args:
        output: where they go.
        suffix: of their names.
        start: makes the writer of a shard from its path.
    """

    def __init__(self, output: Output, suffix: str, start: Callable[[Path], W]):
        self.output, self.suffix, self.start = output, suffix, start
        state = output.load(_STATE) or {"cuts": 0, "shards": [], "place": None}
        self.cuts: int = state["cuts"]
        self.shards: list[dict[str, Any]] = state["shards"]
        #: The place that the last cut recorded, None before the first.
        self.place: Any = state["place"]
        self._open: dict[str, tuple[Path, W, dict[str, int]]] = {}

    def __getitem__(self, split: str) -> W:
        """The writer of a split's present shard."""
        if split not in self._open:
            path = self.output.part / f"{split}-{self.cuts:05}{self.suffix}"
            hidden = path.with_name(f".{path.name}")
            self._open[split] = path, self.start(hidden), {}
        return self._open[split][1]

    def count(self, split: str, **numbers: int) -> None:
        """Add to the numbers that are recorded with a split's present shard."""
        self[split]
        counts = self._open[split][2]
        for name, number in numbers.items():
            counts[name] = counts.get(name, 0) + number

    def counted(self, name: str) -> int:
        """Return the sum of a number over the shards that are open."""
        return sum(counts.get(name, 0) for _, _, counts in self._open.values())

    def cut(self, place: Any) -> None:
        """Close the open shards and record them with the place in the input that they reach."""
        for split, (path, writer, counts) in self._open.items():
            writer.close()
            hidden = path.with_name(f".{path.name}")
            with hidden.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.replace(hidden, path)
            about = {"file": path.name, "split": split, "bytes": path.stat().st_size, "sha256": digest}
            self.shards.append(about | counts)
        self._open.clear()
        self.cuts += 1
        self.place = place
        self.output.save(_STATE, {"cuts": self.cuts, "shards": self.shards, "place": place})

    def splits(self) -> dict[str, dict[str, Any]]:
        """Return each split's shards and the sums of their numbers."""
        found: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            split = found.setdefault(shard["split"], {"shards": []})
            split["shards"].append({key: value for key, value in shard.items() if key != "split"})
            for name in sorted(shard.keys() - {"file", "split", "sha256", "bytes"}):
                split[name] = split.get(name, 0) + shard[name]
        return {split: found[split] for split in ("train", "validation", "test") if split in found}

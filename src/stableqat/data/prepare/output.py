"""An output folder that appears once it is complete, and whose writing resumes after a kill.

Everything is written to `OUT.part`, which is renamed to `OUT` at the end, without its hidden files. Shards of
all splits are cut together; each is written under a hidden name and then moved, and one small file, replaced
atomically, records the shards and the place in the input that they reach. A kill loses the work after that
record; the next call repeats it, byte for byte.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from stableqat.data.prepared import MANIFEST, read_field, read_manifest
from stableqat.errors import UserError
from stableqat.files import remove, whole_file

_STATE = ".state.json"
_REQUEST = ".request.json"


def _new_folder(out: str) -> Path:
    """The folder that `out` names, if a rename can create it."""
    folder = Path(out).expanduser()
    try:
        if folder.is_symlink() or folder.name in ("", ".."):
            folder = folder.resolve()
        whole, here = Path(os.path.abspath(folder)), Path.cwd()
        if not out.strip() or whole in (here, *here.parents) or os.path.ismount(folder):
            raise UserError(f"out: {out!r} is not a new folder: name one inside it, such as --out data/small")
        folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise UserError(f"out: {out} cannot be created ({error}): give another --out") from error
    return folder


class Output:
    """An output folder in the making; as a context manager it belongs to this process alone.

    Args:
        out: The folder; it is `out.part` until it is complete.
        kind: What the folder holds.
        request: Everything that decides its content; an output begun with another request is refused.

    Raises:
        UserError: If the folder holds something else, or another process is writing it.
    """

    def __init__(self, out: str, kind: str, request: dict[str, Any]):
        self.folder = _new_folder(out)
        self.part = self.folder.with_name(self.folder.name + ".part")
        self.kind, self.request = kind, request
        self._lock: IO[str] | None = None
        manifest = read_manifest(self.folder)
        #: Whether an earlier call finished it.
        self.done = manifest is not None
        if manifest is not None:
            self._compare(manifest, self.folder, "give another --out")
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is not a {kind}: give another --out")
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
            where = f"another process is writing {self.part}"
            raise UserError(f"{where}: wait for it, or give another --out") from error
        if begun := self.load(MANIFEST) or self.load(_REQUEST):
            self._compare(begun, self.part, "delete it or give another --out")
        with self._writing():
            if not begun:
                self.save(_REQUEST, {"kind": self.kind, "request": self.request})
            if (self.part / MANIFEST).is_file():  # killed just before the rename
                self._publish()
                self.done = True

    @contextmanager
    def _writing(self, remedy: str = "make room and repeat the command; it resumes") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file = Path(os.fsdecode(error.filename or self.part))
            ours = file.is_relative_to(self.part) or self.part.is_relative_to(file)
            deed, where = ("written", self.part) if ours else ("read", file)
            raise UserError(f"{where} cannot be {deed} ({error.strerror or error}): {remedy}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lock is not None:
            if isinstance(error, UserError) and self.part.is_dir() and not (self.part / _STATE).is_file():
                self.discard()  # the corrected command starts over
            self._lock.close()
        if isinstance(error, OSError):  # reading raises UserErrors
            with self._writing():
                raise error

    def _compare(self, found: dict[str, Any], folder: Path, remedy: str) -> None:
        if found.get("kind") != self.kind:
            raise UserError(f"{folder} holds a {found.get('kind')}, not a {self.kind}: {remedy}")
        wanted = json.loads(json.dumps(self.request))
        for key, value in wanted.items():
            if (other := read_field(folder, found, dict, "request").get(key)) != value:
                what = f" ({other}, not {value})" if isinstance(value, str | int | float | None) else ""
                raise UserError(f"{folder} holds a {self.kind} with another {key}{what}: {remedy}")

    def load(self, name: str) -> Any:
        """What was saved under a name; None if nothing was."""
        path = self.part / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path} is damaged: delete {self.part} to start again") from error

    def save(self, name: str, value: Any) -> None:
        """Write a JSON file completely or not at all."""
        with whole_file(self.part / name) as part, part.open("w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and move the folder to its name."""
        self.save(MANIFEST, {"kind": self.kind, "request": self.request} | manifest)
        self._publish()

    def _publish(self) -> None:
        for path in self.part.iterdir():
            if path.name.startswith("."):
                remove(path)
        os.replace(self.part, self.folder)

    def discard(self) -> None:
        """Delete the unfinished output."""
        shutil.rmtree(self.part)


class Shards:
    """The shards of an output; all splits are cut together.

    Args:
        output: Where they go.
        suffix: How their names end.
        start: Makes the writer of a shard from its path; the writer has a method `close`.
    """

    def __init__(self, output: Output, suffix: str, start: Callable[[Path], Any]):
        self.output, self.suffix, self.start = output, suffix, start
        state = output.load(_STATE) or {"cuts": 0, "shards": [], "place": None}
        self.cuts: int = state["cuts"]
        self.shards: list[dict[str, Any]] = state["shards"]
        #: The place that the last cut recorded, None before the first.
        self.place: Any = state["place"]
        self._open: dict[str, tuple[Path, Any, dict[str, int]]] = {}

    def __getitem__(self, split: str) -> Any:
        """The writer of the open shard of a split."""
        if split not in self._open:
            path = self.output.part / f"{split}-{self.cuts:05}{self.suffix}"
            hidden = path.with_name(f".{path.name}")
            self._open[split] = path, self.start(hidden), {}
        return self._open[split][1]

    def count(self, split: str, **numbers: int) -> None:
        """Add to the numbers that are recorded with a split's open shard."""
        self[split]
        counts = self._open[split][2]
        for name, number in numbers.items():
            counts[name] = counts.get(name, 0) + number

    def counted(self, name: str) -> int:
        """The sum of a number over the open shards."""
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
        """The shards of each split and the sums of their numbers."""
        found: dict[str, dict[str, Any]] = {}
        for shard in self.shards:
            split = found.setdefault(shard["split"], {"shards": []})
            split["shards"].append({key: value for key, value in shard.items() if key != "split"})
            for name in sorted(shard.keys() - {"file", "split", "sha256", "bytes"}):
                split[name] = split.get(name, 0) + shard[name]
        return {split: found[split] for split in ("train", "validation", "test") if split in found}

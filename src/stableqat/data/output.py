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
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Generic, Protocol, Self, TypeVar

from stableqat.errors import UserError

MANIFEST = "manifest.json"
_STATE = ".state.json"
_REQUEST = ".request.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder that `stableqat data` wrote, or None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "kind" in manifest else None


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
        self.folder = Path(out).expanduser()
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
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.part / ".lock", "w")  # noqa: SIM115 - locked as long as it is open
        except OSError as error:
            raise UserError(f"{self.part} can't be written ({error.strerror}): give another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.part} is being written by another process") from error
        if begun := self.load(MANIFEST) or self.load(_REQUEST):
            self._compare(begun, self.part, "delete it or give another --out")
        else:
            self.save(_REQUEST, {"kind": kind, "request": request})
        if (self.part / MANIFEST).is_file():  # killed in the last moment
            self._publish()
            self.done = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _compare(self, found: dict[str, Any], folder: Path, remedy: str) -> None:
        if found["kind"] != self.kind:
            raise UserError(f"{folder} holds a {found['kind']}, not a {self.kind}: {remedy}")
        wanted = json.loads(json.dumps(self.request))
        for key, value in wanted.items():
            if (other := found["request"].get(key)) != value:
                what = f" ({other}, not {value})" if isinstance(value, str | int | float | None) else ""
                raise UserError(f"{folder} holds a {self.kind} of another {key}{what}: {remedy}")

    def load(self, name: str) -> Any:
        """Return what was saved under a name, or None."""
        path = self.part / name
        return json.loads(path.read_text()) if path.is_file() else None

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

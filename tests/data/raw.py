"""Raw corpora in the layouts of the public ones, and a command that is killed until it is through."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from sample_documents import document


def write_slimpajama(root: Path, chunks=3, files=4, documents=40, validation=20) -> Path:
    """A folder like SlimPajama's; the number of a document is the first word of its text."""
    first = 0
    folders = {f"train/chunk{c}": ("example_train", files) for c in range(1, chunks + 1)}
    if validation:
        folders |= {"validation/chunk1": ("example_holdout", 1)}
    for folder, (stem, count) in folders.items():
        (root / folder).mkdir(parents=True)
        for index in range(count):
            size = documents if folder.startswith("train") else validation
            lines = []
            for number in range(first, first + size):
                meta = {"redpajama_set_name": "RedPajama\u2014C4"}
                lines.append(json.dumps({"text": document(number), "meta": meta}) + "\n")
            first += size
            # Two frames, as files that were joined have them
            half = [zstandard.compress("".join(part).encode()) for part in (lines[:3], lines[3:])]
            (root / folder / f"{stem}_{index}.jsonl.zst").write_bytes(b"".join(half))
    return root


def write_fineweb(root: Path, files=3, documents=50) -> Path:
    """A folder like FineWeb-Edu's: parquet in several row groups, no validation split."""
    for index in range(files):
        numbers = range(index * documents, (index + 1) * documents)
        columns = {
            "text": [document(n) for n in numbers],
            "id": [f"<urn:uuid:{n}>" for n in numbers],
            "score": [n / 7 for n in numbers],
            "token_count": list(numbers),
        }
        path = root / "data" / f"CC-MAIN-{index % 2}" / f"train-{index:05}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=16)
    return root


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def records(folder: Path, split: str) -> list[dict]:
    """The documents of a sample's split, in order."""
    return [
        json.loads(line)
        for path in sorted(folder.glob(f"{split}-*.jsonl.zst"))
        for line in zstandard.decompress(path.read_bytes(), 1 << 26).splitlines()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


#: Marks the processes of a command, which inherit it.
MARK = "STABLEQAT_TEST_COMMAND"


def command_line(arguments: list[str], settings: str = "pass") -> list[str]:
    code = f"import sys; {settings}; from stableqat.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *arguments]


def kill_until_done(arguments: list[str], settings: str, out: Path, kills: int, seed: int) -> int:
    """Run a verb in a process, kill it at random moments after it has begun to write, and let it end.

    Returns:
        The number of runs that were killed while their work had cuts behind it.
    """
    command = command_line(arguments, settings)
    environment = os.environ | {MARK: str(out)}
    state = out.with_name(out.name + ".part") / ".state.json"
    chance, killed = random.Random(seed), 0
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": environment}
    for _ in range(kills):
        before = state.stat().st_mtime_ns if state.is_file() else 0
        with subprocess.Popen(command, **quiet) as process:
            while process.poll() is None:
                if state.is_file() and state.stat().st_mtime_ns != before:
                    time.sleep(chance.uniform(0, 0.03))
                    break
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        killed += state.is_file()
    subprocess.run(command, check=True, **quiet)
    return killed


def processes_of(out: Path) -> list[str]:
    """The processes that a command for `out`, or a killed one, has left running."""
    found, mark = [], f"{MARK}={out}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes()!r}")
        except OSError:  # it has ended, or is another user's
            continue
    return found

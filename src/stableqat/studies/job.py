"""One point in one process: what its folder records, and what happens in the child.

A child is forked from a server process that has imported the heavy libraries once, so it starts in
milliseconds and its crash, even a segmentation fault, costs one point. It leads its own session:
a Ctrl-C in the terminal reaches the sweep alone, which then asks its children to stop; when the
sweep itself is killed, its children end with it, so that no run is ever written by two processes.
"""

import contextlib
import fcntl
import itertools
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from stableqat.checkpoints.names import last_checkpoints
from stableqat.errors import UserError
from stableqat.events import read_run
from stableqat.files import left_over, remove
from stableqat.studies.claim import Claim
from stableqat.studies.record import ENDED, FINAL, Record
from stableqat.studies.study import Point
from stableqat.trust import STUDY

# What makes a run slow to start. Importing must start no thread and no parallel region (fork-safe).
PRELOAD = (
    "stableqat.cli.main",  # quiets what others say when they are imported
    "torch",
    "torch.utils.tensorboard",
    "lightning.pytorch.cli",
    "transformers.models.llama.modeling_llama",
    "timm",
    "stableqat.modules",
    "stableqat.data",
)
Main = Callable[[list[str]], int]


@dataclass
class Job:
    """A point on its way: to run, running, or with its outcome in `record`."""

    point: Point
    record: Record = field(default_factory=lambda: Record("waiting", {}))
    resume: bool = False
    changed: bool = False
    process: BaseProcess | None = None
    began: float = field(default_factory=time.monotonic)
    place: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.claim = Claim(self.point.folder)
        self.look()

    def look(self) -> None:
        """See in its folder whether the point is done, resumes or starts."""
        folder, settings = self.point.folder, self.point.settings()
        found = Record.read(folder)
        if found is None and folder.exists() and not all(map(left_over, folder.iterdir())):
            raise UserError(f"{folder} was not made by a sweep: move it away, or rename the study")
        saved = self.point.verb == "fit" and bool(last_checkpoints(folder))
        same = found is None or found.settings == settings
        made = found is not None and (found.status in (*FINAL, "running") or saved)
        self.changed = made and not same
        self.resume = saved and same
        if found is not None and same and found.status in FINAL:
            self.record = found
        else:
            self.record = Record("waiting", settings, found.seconds if found and self.resume else 0.0)

    def take(self) -> bool:
        """Whether this sweep may run the point now, by a new look: another may have been at work."""
        if not self.claim.take():
            self.record.status = "elsewhere"
            return False
        was_elsewhere, was_changed = self.record.status == "elsewhere", self.changed
        self.look()
        found = Record.read(self.point.folder)
        if was_elsewhere and found is not None and found.status == "failed":
            self.record = found  # in another sweep that runs now: not tried again by this one
        elif self.changed and not was_changed:
            self.record.status = "failed"
            self.record.error = (
                f"{self.point.folder} was made with other settings by another sweep in the meantime:"
                " rename the study to keep both, or add --rerun changed"
            )
        if self.record.status in ENDED:
            self.claim.release()
        return True

    @property
    def kind(self) -> tuple[str, str, bool]:
        """What says how long a run takes."""
        return self.point.study, self.point.verb, self.point.start is None

    @cached_property
    def gpus(self) -> int:
        """How many GPUs the run asks for."""
        devices = self.point.settings().get("trainer.devices", 1)
        return devices if isinstance(devices, int) and devices > 1 else 1

    @property
    def begins_anew(self) -> bool:
        """Whether an earlier attempt left something that is not continued."""
        folder = self.point.folder
        return not self.resume and folder.exists() and not all(map(left_over, folder.iterdir()))

    @property
    def replaced(self) -> Path:
        """Where that goes: out of the study, and not lost."""
        study = self.point.folder.parent
        names = (
            study.parent / ".replaced" / study.name / f"{self.point.name}.{n}" for n in itertools.count(1)
        )
        return next(name for name in names if not name.exists())

    def start(self, main: Main, threads: int) -> None:
        """Starts the point in a child process, resuming from its last checkpoint where `resume` says so."""
        folder = self.point.folder
        if self.begins_anew:
            replaced = self.replaced
            replaced.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, replaced)
        folder.mkdir(parents=True, exist_ok=True)
        for left in filter(left_over, folder.iterdir()):
            remove(left)
        self.record.status, self.record.error = "running", ""
        self.record.write(folder)
        (folder / "command.sh").write_text(self.point.command + "\n")
        argv = self.point.argv + (["--ckpt_path", "last"] if self.resume else [])
        context = multiprocessing.get_context("forkserver")
        self.began = time.monotonic()
        gpus = list(dict.fromkeys(self.place))
        self.process = context.Process(
            target=run_child, args=(main, argv, folder, self.record, threads, ",".join(gpus))
        )
        self.process.start()

    def finish(self, stopped: bool) -> None:
        """Takes the outcome of a child that ended; one that was told to stop is neither done nor failed."""
        assert self.process is not None
        folder, code = self.point.folder, self.process.exitcode
        assert code is not None
        self.process.close()
        self.process = None
        self.record = record = Record.read(folder) or self.record
        if record.status not in FINAL:
            record.seconds += time.monotonic() - self.began
            record.status = "cut" if stopped else "failed"
            if not stopped:
                killed = f"killed by {signal.Signals(-code).name}" if code < 0 else ""
                ended = killed or _last_line(folder / "log.txt")
                record.error = ended or f"ended with exit code {code} and no result"
            record.write(folder)
        self.claim.release()

    def give_up(self, error: Exception) -> None:
        """Counts as failed where its folder can't be written or read: that must end no other run."""
        self.process = None
        self.record.status, self.record.error = "failed", str(error)
        self.claim.release()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the child; SIGKILL to all that it started, too."""
        assert self.process is not None
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            if number == signal.SIGKILL:
                os.killpg(pid, number)


def run_stableqat(argv: list[str]) -> int:
    """Runs a `stableqat` command in this process."""
    from stableqat.cli.main import main

    return main(argv)


def start_server(preload: Sequence[str]) -> None:
    """Start the server that forks the children, deaf to what ends the sweep: it must outlive them.

    Who stops a job often signals every process of it, `timeout` and SLURM among them.

    Args:
        preload: Modules that the children find imported.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    # children could not use a CUDA that the server had started
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    ended_by = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ended_by}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


def run_child(main: Main, argv: list[str], folder: Path, record: Record, threads: int, gpus: str) -> None:
    """Body of a child process: one command, its output in `log.txt`, its outcome in `sweep.json`."""
    began = time.monotonic()
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # By default its own children, such as a loader's workers, start as it did: each would import all anew.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    with open(folder / "log.txt", "ab") as log, open(os.devnull) as nothing:
        fcntl.flock(log, fcntl.LOCK_EX)  # until a run is gone whose sweep was killed a moment ago
        log.write(f"$ {shlex.join(['stableqat', *argv])}\n".encode())
        log.flush()
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # A strategy that starts further processes repeats the command line that it finds here.
    sys.argv[1:] = argv
    os.environ[STUDY] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)

    code = main(argv)
    sys.stdout.flush()
    if code:
        sys.exit(code)

    record.status = "diverged" if read_run(folder).last("hp/diverged") == 1 else "done"
    record.seconds += time.monotonic() - began
    record.write(folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip() and line[:2] != "$ "), "")

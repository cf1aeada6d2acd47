"""Stands in for the `stableqat` command in the tests of the sweep: a run that can end in every way.

The argument `act` of a point says how it ends. Whatever moves a run's folder aside, `calls.txt` in
the study's folder keeps what began and what finished, a line each.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from stableqat.studies.command import run_studies
from stableqat.studies.study import read_study


def main(argv: list[str]) -> int:
    args = dict(zip(argv[1::2], argv[2::2], strict=True))
    folder = Path(*(args[f"--trainer.logger.{part}"] for part in ("save_dir", "name", "version")))
    act = args.get("--act", "finish")
    resumed = args.get("--ckpt_path")
    note(folder, f"resumed from {resumed}" if resumed else "began")
    print(f"working as told: {act}")

    if act == "refuse":
        print("data.file: there is no file words.txt", file=sys.stderr)
        return 2
    if act == "raise":
        raise RuntimeError("shapes differ")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "place":
        note(folder, f"on {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        time.sleep(0.5)
    if act == "processes":
        note(folder, f"starts processes by {multiprocessing.get_start_method()}")
    if act == "words":
        note(folder, f"study {os.environ.get('STABLEQAT_STUDY')}")
    if act == "diverge":
        log_scalar(folder, "hp/diverged", 1.0)
    if act in ("hang", "hang-saved", "hang-refuse") and not (folder.parent / "go").exists():
        if act == "hang-saved":
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
        with open(folder / "held", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # for as long as this process lives
            note(folder, "hangs")
            end = time.monotonic() + 300
            while time.monotonic() < end and not (act == "hang-refuse" and (folder.parent / "go").exists()):
                time.sleep(0.05)
        if act == "hang-refuse":
            return 2
    note(folder, "finished")
    return 0


def note(folder: Path, text: str) -> None:
    with open(folder.parent / "calls.txt", "a") as calls:
        calls.write(f"{folder.name} {text}\n")


def log_scalar(folder: Path, tag: str, value: float) -> None:
    """Writes an event file without torch, whose import would take longer than the test."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    writer.add_event(Event(step=1, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
    writer.close()


def run(*paths: str, rerun: str | None = None, workers: int | None = 4, gpus: tuple[str, ...] = ()) -> int:
    """Sweeps study files with stand-ins in place of runs."""
    studies = [read_study(path) for path in paths]
    return run_studies(studies, workers=workers, rerun=rerun, gpus=gpus, main=main, preload=())

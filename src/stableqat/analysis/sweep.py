"""`stableqat sweep`: runs the points of studies in a pool of processes, and takes up what was cut.

Every point is an ordinary run in its own folder. What is done is skipped; what was cut continues
from its last checkpoint, or begins anew where it had none; a point that fails doesn't stop the
others and is tried again by the next call. A point whose settings changed since it was made is
never mixed with the others silently: the sweep refuses, or, asked to, moves the old run aside.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from stableqat.analysis.board import Board
from stableqat.analysis.pool import Pool
from stableqat.analysis.runner import FINAL, PRELOAD, Job, Main, Record, run_stableqat
from stableqat.analysis.study import Point, Study, read_study
from stableqat.errors import UserError


def sweep(studies: list[str], *, workers: int | None = None, rerun: Literal["changed"] | None = None) -> int:
    """Runs all points of one or more studies that are not done yet.

    Ctrl-C stops the runs cleanly; the same command continues where they stopped.

    Args:
        studies: Study files (YAML).
        workers: Runs at a time, all studies together; the number of CPU cores if not given. Each
            run gets its share of the cores.
        rerun: "changed" runs those points again whose settings differ from what their folder was made
            with; the old runs are moved to `.replaced` in the logs folder. Without it the sweep refuses.

    Returns:
        0 if all points are done or ended as diverged, 1 if any failed, 128 + the signal if stopped.
    """
    return run_studies([read_study(path) for path in studies], workers=workers, rerun=rerun)


def run_studies(
    studies: Sequence[Study],
    *,
    workers: int | None = None,
    rerun: Literal["changed"] | None = None,
    main: Main = run_stableqat,
    preload: Sequence[str] = PRELOAD,
) -> int:
    """As `sweep`, for studies already read.

    Args:
        studies: Studies, each with a folder of its own.
        workers: As in `sweep`.
        rerun: As in `sweep`.
        main: What a child calls with the point's command line; returns an exit code.
        preload: Modules that the children find imported.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if workers is None else workers
    if workers < 1:
        raise UserError(f"workers: {workers} must be 1 or more")
    folders = [study.folder.resolve() for study in studies]
    for folder in {f for f in folders if folders.count(f) > 1}:
        raise UserError(f"two studies write to {folder}: give one of them another name")
    with contextlib.ExitStack() as locks:
        for study in studies:
            locks.enter_context(_alone(study.folder))
        jobs = _plan(studies, rerun)
        pool = Pool(jobs, workers=workers, threads=max(1, cores // workers), main=main, preload=preload)
        board = Board(jobs, workers)
        with board.shown():
            stopped_by = pool.run(board.tell)
        board.summary(stopped_by)
    if stopped_by:
        return 128 + stopped_by
    return 1 if any(job.record.status == "failed" for job in jobs) else 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the study's folder and keeps other sweeps out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - stays open, and so locked, until the end
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror}): set another folder as logs"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another sweep is at work in {folder}: wait for it or stop it") from error
        yield


def _plan(studies: Sequence[Study], rerun: str | None) -> list[Job]:
    """Decides for each point whether it is done, continues or begins, before anything runs."""
    jobs, changed = [], []
    for study in studies:
        for point in study.points:
            settings = point.settings()
            record = Record.read(point.folder)
            if record is None and point.folder.exists() and any(point.folder.iterdir()):
                raise UserError(f"{point.folder} was not made by a sweep: move it away, or rename the study")
            job = Job(point, record or Record("waiting", settings))
            job.resume = point.verb == "fit" and (point.folder / "checkpoints" / "last.ckpt").exists()
            same = job.record.settings == settings
            if not same and (job.record.status in FINAL or job.resume):
                changed.append(job)
            if job.record.status not in FINAL or not same:
                job.resume = job.resume and same
                job.record = Record("waiting", settings, job.record.seconds if job.resume else 0.0)
            jobs.append(job)
    if changed and rerun != "changed":
        first = changed[0].point
        raise UserError(
            f"{first.folder} was made with other settings ({_difference(first)}), and so were"
            f" {len(changed) - 1} more: rename the study to keep both, or add --rerun changed"
        )
    return jobs


def _difference(point: Point) -> str:
    record = Record.read(point.folder)
    assert record is not None
    old, new = record.settings, point.settings()
    keys = [key for key in {**old, **new} if old.get(key, "unset") != new.get(key, "unset")]
    parts = [f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}" for key in keys]
    return ", ".join(parts[:3]) + (f", {len(parts) - 3} more" if len(parts) > 3 else "")

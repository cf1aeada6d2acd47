"""`stableqat sweep`: runs the points of studies on all GPUs or cores, and resumes those that were cut.

Every point is an ordinary run in its own folder. A finished point is skipped; one that was cut resumes from
its last checkpoint, or starts over without one; one that fails does not stop the others, and the next call
tries it again. Any number of sweeps may work on one folder, on one machine or on several that share it: each
point is run by one of them. A point whose settings have changed since it was made is never silently mixed
with the others: the sweep refuses it or, if asked to, moves the old run aside.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stableqat.errors import UserError
from stableqat.files import whole_file, writing
from stableqat.shipped import find_config
from stableqat.studies.dry_run import show
from stableqat.studies.gpus import Slots, visible_gpus
from stableqat.studies.job import PRELOAD, Job, Main, run_stableqat
from stableqat.studies.plan import STUDY_FILE
from stableqat.studies.pool import Pool
from stableqat.studies.progress import Board
from stableqat.studies.record import FINAL, Record
from stableqat.studies.sharing import Sharing
from stableqat.studies.slurm import submit_sweep
from stableqat.studies.study import Point, Study, read_study
from stableqat.trust import allowed, check_settings

_SHARED_CORES = 4  # runs that a GPU's share of the cores is meant for, while nobody knows how many share it


def sweep(
    studies: list[str],
    *,
    workers: int | None = None,
    rerun: Literal["changed"] | None = None,
    slurm: str | None = None,
    dry_run: bool = False,
) -> int:
    """Runs all points of one or more studies that are not done yet.

    Ctrl-C stops the runs cleanly; the same command resumes them. If it is called again while it runs, even on
    another machine that shares the folder, the sweeps divide the points among them.

    Args:
        studies: Study files (YAML), or the names of shipped ones, such as llama/demo-study. A table in
            docs/studies.md describes every key of a study file.
        workers: Runs at a time, all studies together. By default `runs_per_gpu` of the study file on each
            visible GPU, or as many as train more together; one per core without a GPU. Each run gets its
            share of the cores.
        rerun: "changed" reruns the points whose settings differ from those their folder was made with, and
            moves the old runs to `.replaced` in the logs folder. Without it, the sweep refuses them.
        slurm: Options file (YAML). Submits this sweep as a SLURM job array instead of running it here:
            `tasks` workers of `timeout_min` minutes each, with any other options of submitit (gpus_per_node,
            cpus_per_task, slurm_partition, ...). `cluster: local` in it tries that on this machine.
        dry_run: Only lists the points with their command lines, and the steps and tokens of what is left to
            run; trains nothing, writes nothing.

    Returns:
        0 if all points are done or diverged, or if tasks were submitted or points listed; 1 if any failed;
        128 + the signal if stopped.
    """
    files = [find_config(name) for name in studies]
    read = [read_study(path) for path in files]
    for path, study in zip(studies, read, strict=True):
        for point in study.points:  # its command line comes from the file, not from the user
            check_settings(point.overlay.settings(), path)
    if dry_run:
        gpus = visible_gpus()
        show(read, _plan(read, rerun, len(gpus)), gpus=bool(gpus))
        return 0
    if slurm is None:
        return run_studies(read, workers=workers, rerun=rerun, gpus=visible_gpus())
    # Refuse here what a task would refuse in its log, after hours in the queue.
    Slots((), 1 if workers is None else workers)
    jobs = _plan(read, rerun, 0)
    arguments = [str(path.absolute()) for path in files]
    arguments += [f"--workers={workers}"] if workers is not None else []
    arguments += [f"--rerun={rerun}"] if rerun else []
    arguments += [f"--allow={name}" for name in allowed()]
    left = sum(job.changed or job.record.status not in FINAL for job in jobs)
    return submit_sweep(read, arguments, left, slurm)


def run_studies(
    studies: Sequence[Study],
    *,
    workers: int | None = None,
    rerun: Literal["changed"] | None = None,
    gpus: Sequence[str] = (),
    main: Main = run_stableqat,
    preload: Sequence[str] = PRELOAD,
) -> int:
    """`sweep`, for studies that are already read.

    Args:
        studies: Studies, each with a folder of its own.
        workers: As in `sweep`.
        rerun: As in `sweep`.
        gpus: Names of the GPUs to use.
        main: What a child calls with the command line of a point; returns an exit code.
        preload: Modules that are already imported in the children.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = [study.runs_per_gpu for study in studies if study.runs_per_gpu is not None]
    finds = workers is None and bool(gpus) and not given
    if workers is None:
        workers = len(gpus) * min(given, default=1) or cores
    slots = Slots(gpus, workers)
    jobs = _plan(studies, rerun, len(gpus))
    for study in studies:
        _keep(study)
    board = Board(jobs, workers)
    sharing = Sharing(slots, board.say) if finds else None
    threads = max(1, cores // (workers * (_SHARED_CORES if finds else 1)))
    pool = Pool(jobs, slots=slots, threads=threads, main=main, preload=preload, sharing=sharing)
    with board.shown():
        stopped_by = pool.run(board.tell)
    board.summary(stopped_by)
    if stopped_by:
        return 128 + stopped_by
    return 1 if any(job.record.status == "failed" for job in jobs) else 0


def _keep(study: Study) -> None:
    """Keep the study file with the runs, because it says what they were meant to test."""
    with writing(str(study.folder), "set another folder as logs"):
        study.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(study.folder / STUDY_FILE) as part:
            part.write_text(study.text)


def _plan(studies: Sequence[Study], rerun: str | None, gpus: int) -> list[Job]:
    """Decide for each point whether it is done, resumes or starts, before anything runs."""
    for study in studies:
        _check_names(study)
    folders = [study.folder.resolve() for study in studies]
    for folder in {f for f in folders if folders.count(f) > 1}:
        raise UserError(f"two studies write to {folder}: give one of them another name")
    jobs: dict[Path, Job] = {}
    for study in studies:
        for point in study.points:
            known = jobs.setdefault(point.folder, Job(point)).point
            if known.settings() != point.settings():
                raise UserError(f"two studies make {point.folder} with different settings; rename one")
    changed = [job for job in jobs.values() if job.changed]
    if changed and rerun != "changed":
        first = changed[0].point
        raise UserError(
            f"{first.folder} was made with other settings ({_difference(first)}), and so were"
            f" {len(changed) - 1} more: rename the study to keep both, or add --rerun changed"
        )
    if gpus and (most := max(job.gpus for job in jobs.values())) > gpus:
        raise UserError(f"trainer.devices: a run needs {most} GPUs, but there are {gpus} here")
    return list(jobs.values())


def _check_names(study: Study) -> None:
    """Refuse a study whose folder cannot be made, or whose points have names too long for a folder."""
    logs = study.folder.parent
    for folder in (study.folder, *study.folder.parents):
        if (folder.is_symlink() or folder.exists()) and not folder.is_dir():
            raise UserError(f"{folder} is not a folder: move it away, or set another folder as logs")
    existing = next(folder for folder in (logs, *logs.absolute().parents) if folder.is_dir())
    longest = os.pathconf(existing, "PC_NAME_MAX") - len(".9999")  # what is moved aside gets a number
    for name in (study.name, *(point.name for point in study.points)):
        if len(os.fsencode(name)) > longest:
            fault = f"a folder's name may have {longest} characters here, this one has {len(name)}"
            raise UserError(f"{name[:40]}...: {fault}: shorten the name of the arm or the study")


def _difference(point: Point) -> str:
    record = Record.read(point.folder)
    assert record is not None
    old, new = record.settings, point.settings()
    keys = [key for key in {**old, **new} if old.get(key, "unset") != new.get(key, "unset")]
    parts = [f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}" for key in keys]
    return ", ".join(parts[:3]) + (f", {len(parts) - 3} more" if len(parts) > 3 else "")

"""What `stableqat sweep --dry-run` shows: every point with its command line, and their cost.

Steps and tokens follow from the settings in the study's files; a setting that they leave to its default, such
as a batch size that suits the device, leaves the number open. The time is that of the study's finished runs.
"""

import math
from collections.abc import Iterable, Sequence

from stableqat.studies.job import Job
from stableqat.studies.plan import SHORT_AXES
from stableqat.studies.pool import expected_seconds
from stableqat.studies.record import FINAL
from stableqat.studies.study import Study, short
from stableqat.terminal import terminal

_TOKENS, _IMAGES = ("data.batch_size", "data.block_size"), ("data.batch_size",)  # of a process and batch


def show(studies: Sequence[Study], jobs: Sequence[Job], *, gpus: bool) -> None:
    """Print the points and the cost of what is left to run.

    Args:
        studies: The studies.
        jobs: Their points, as found in their folders.
        gpus: Whether the runs would share GPUs.
    """
    console = terminal()
    for study in studies:
        own = [job for job in jobs if job.point in study.points]
        console.print(f"{study.name}: {len(own)} points, in {study.folder}")
        for job in own:
            point, settings = job.point, job.point.overlay.settings()
            axes = [f"{name} {short(settings[key])}" for name, key in SHORT_AXES.items() if key in settings]
            said = [f"arm {point.arm}", *axes, _state(job)]
            console.print(f"\n{point.name}: {', '.join(said)}\n  {point.command}")
        console.print()
    console.print(_cost(studies, jobs, gpus))


def _state(job: Job) -> str:
    if job.changed:
        return "runs again: its settings have changed"
    if job.record.status in FINAL:
        return job.record.status
    return "resumes" if job.resume else "to run"


def _cost(studies: Sequence[Study], jobs: Sequence[Job], gpus: bool) -> str:
    """Runs, steps, tokens or images and, if runs have finished before, time."""
    left = [job for job in jobs if job.changed or job.record.status not in FINAL]
    fits = [job for job in left if job.point.verb == "fit"]
    parts = [f"{len(left)} of {len(jobs)} points ({len(fits)} of them train)"]
    steps = {id(job): _whole(job, "trainer.max_steps") for job in fits}
    if fits:
        parts.append(_sum(steps.values(), "steps"))
    for rows, unit in ((_TOKENS, "tokens"), (_IMAGES, "images")):
        if own := [job for job in fits if _takes_images(job) == (unit == "images")]:
            parts.append(_sum((_product(steps[id(job)], _per_step(job, rows)) for job in own), unit))
    text = f"To run: {', '.join(parts)}."
    seconds = [expected_seconds(job, list(jobs)) for job in left]
    if left and all(map(math.isfinite, seconds)):
        share = {study.name: study.runs_per_gpu or 1 if gpus else 1 for study in studies}
        each = [s * job.gpus / share[job.point.study] for s, job in zip(seconds, left, strict=True)]
        unit = "GPU-hours" if gpus else "hours of one worker"
        text += f" As finished runs took: about {sum(each) / 3600:.2g} {unit}."
    return text


def _takes_images(job: Job) -> bool:
    return str(job.point.overlay.settings().get("data.class_path")).endswith("ImageDataModule")


def _per_step(job: Job, keys: Sequence[str]) -> int | None:
    """The tokens or images of a step, over all processes."""
    settings = job.point.overlay.settings()
    count: int | None = 1
    for key in keys:
        count = _product(count, _whole(job, key))
    for key in ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches"):
        count = _product(count, _whole(job, key) if key in settings else 1)
    return count


def _whole(job: Job, key: str) -> int | None:
    """A setting that is a positive whole number; None if it is open."""
    value = job.point.overlay.settings().get(key)
    return value if isinstance(value, int) and value > 0 else None


def _product(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other


def _sum(numbers: Iterable[int | None], unit: str) -> str:
    """A sum in words; without the numbers that are open."""
    found = list(numbers)
    known = [number for number in found if number is not None]
    if not known:
        return f"{unit} open"
    return f"{sum(known):,} {unit}" + (
        f" and those of {len(found) - len(known)} more" if len(known) < len(found) else ""
    )

"""`stableqat publish`: a study's event files, small enough to give away.

Each run keeps one event file with its hyper-parameters (so the HParams tab works) and its scalars, thinned;
tags of single layers and checkpoints stay behind. `stableqat compare` says the same of the copy. A run of
its own, `overlay`, holds means over the seeds and a custom-scalars layout that draws all arms of one
learning rate in one chart.
"""

import math
import shutil
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from stableqat.analysis.arms import Arm, Comparison
from stableqat.analysis.compare import read_comparisons
from stableqat.analysis.events import COMPARED, OVERLAY, Run, find_runs, read_run
from stableqat.analysis.study import short
from stableqat.errors import UserError

MOST_MEGABYTES = 8.0
OVERLAID = ("train/loss", "train/grad_norm", "quant/flip_rate", "quant/oscillation", "quant/scale_drift")


def publish(folders: list[str], *, out: str = "lightning_logs/published", points: int = 100) -> int:
    """Copies studies for publication: their event files, thinned.

    Args:
        folders: Folders of studies.
        out: Folder that gets a folder a study; a study that lies there already is refused.
        points: Most values of a tag that are kept, first and last among them.

    Returns:
        0.
    """
    if points < 2:
        raise UserError(f"points: {points} must be 2 or more")
    target = Path(out)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for folder in map(Path, folders):
        if (target / folder.name).exists():
            raise UserError(f"{target / folder.name} exists already: move it away, or give another --out")
        comparisons = [c for c in read_comparisons([folder]) if c.folder == folder]
        if not comparisons:
            raise UserError(
                f"{folder} holds studies, but no runs of its own: name the folders of the studies"
            )
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".publish-", dir=target) as made:
                copy = Path(made) / folder.name
                for path in find_runs(folder):
                    _write_run(read_run(path, COMPARED), copy / path.name, points)
                _write_overlay(comparisons[0], copy / OVERLAY, points)
                if (folder / "study.yaml").exists():
                    shutil.copyfile(folder / "study.yaml", copy / "study.yaml")
                copy.rename(target / folder.name)
        except OSError as error:
            raise UserError(f"{target} can't be written ({error.strerror}): give another --out") from error
        size = sum(file.stat().st_size for file in (target / folder.name).rglob("*") if file.is_file()) / 1e6
        more = f", more than {MOST_MEGABYTES:g} MB: lower --points" if size > MOST_MEGABYTES else ""
        console.print(f"published: {target / folder.name}, {size:.1f} MB{more}")
    return 0


def thinned(series: dict[int, float], points: int) -> dict[int, float]:
    """At most `points` values, evenly over the steps, with the first, the last and what is not finite.

    Args:
        series: Step to value.
        points: How many to keep, 2 or more.
    """
    steps = sorted(series)
    if len(steps) <= points:
        return {step: series[step] for step in steps}
    kept = {steps[round(i * (len(steps) - 1) / (points - 1))] for i in range(points)}
    kept |= {step for step in steps if not math.isfinite(series[step])}
    return {step: series[step] for step in steps if step in kept}


def _write_run(run: Run, folder: Path, points: int) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(folder)) as writer:
        metrics = {tag: run.last(tag) for tag in run.scalars if tag.startswith("hp/")}
        for summary in hparams(run.hparams, metrics):
            writer._get_file_writer().add_summary(summary, 0)
        for tag, series in run.scalars.items():
            for step, value in thinned(series, points).items():
                writer.add_scalar(tag, value, step)


def _write_overlay(comparison: Comparison, folder: Path, points: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    layout: dict[str, dict[str, list[object]]] = {}
    with SummaryWriter(str(folder)) as writer:
        for tag in OVERLAID:
            for lr in comparison.lrs:
                tags = []
                for arm in comparison.fits:
                    series = thinned(_mean(arm, lr, tag), points)
                    name = f"{tag} at lr {short(lr)}/{comparison.label(arm)}"
                    for step, value in series.items():
                        writer.add_scalar(name, value, step)
                    tags += [name] if series else []
                if tags:
                    layout.setdefault(tag, {})[f"lr {short(lr)}"] = ["Multiline", tags]
        writer.add_custom_scalars(layout)


def _mean(arm: Arm, lr: float, tag: str) -> dict[int, float]:
    """Mean over the seeds at the steps that all runs have logged."""
    series = [run.scalars[tag] for run in arm.at(lr) if tag in run.scalars]
    common = set.intersection(*map(set, series)) if series else set()
    return {step: statistics.fmean(each[step] for each in series) for step in sorted(common)}

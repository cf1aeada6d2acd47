"""`stableqat publish`: a study's event files, small enough to give away.

Each run keeps one event file with its hyper-parameters (so the HParams tab works) and its scalars, thinned;
tags of single layers and checkpoints stay behind. `stableqat compare` says the same of the copy, but for what
counts logged steps (spikes, gradient norms, means over training) where a run logged more of them than are
kept. A run of its own, `overlay`, holds means over the seeds and a custom-scalars layout that draws all arms
of one learning rate in one chart.
"""

import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stableqat.analysis.command import read_comparisons
from stableqat.analysis.comparison import Arm, Comparison
from stableqat.analysis.labels import NAMED
from stableqat.errors import UserError
from stableqat.events import COMPARED, OVERLAY, find_runs, hparams_events, read_run
from stableqat.files import whole_folder, writing
from stableqat.studies.study import short
from stableqat.terminal import terminal

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

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
    console = terminal()
    for folder in map(Path, folders):
        name = folder.resolve().name
        if (target / name).exists():
            raise UserError(f"{target / name} exists already: move it away, or give another --out")
        comparisons = [c for c in read_comparisons([folder]) if c.folder == folder]
        if not comparisons:
            raise UserError(
                f"{folder} holds studies, but no runs of its own: name the folders of the studies"
            )
        with writing(str(target), "name another folder with --out"), whole_folder(target / name) as copy:
            for path in find_runs(folder):
                if path.parent == folder:
                    _write_run(path, copy / path.name, points, comparisons[0].named(path))
            _write_overlay(comparisons[0], copy / OVERLAY, points)
            if (folder / "study.yaml").exists():
                shutil.copyfile(folder / "study.yaml", copy / "study.yaml")
        size = sum(file.stat().st_size for file in (target / name).rglob("*") if file.is_file()) / 1e6
        more = f", more than {MOST_MEGABYTES:g} MB: lower --points" if size > MOST_MEGABYTES else ""
        console.print(f"published: {target / name}, {size:.1f} MB{more}")
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


def _write_run(source: Path, folder: Path, points: int, named: str | None) -> None:
    run = read_run(source, COMPARED)
    with _writer(folder) as write:
        for event in hparams_events(source):
            if named is not None:
                _add_name(event.summary, named)
            write(event.summary, event.step)
        for tag, series in run.scalars.items():
            for step, value in thinned(series, points).items():
                write(_scalar(tag, value), step)


def _write_overlay(comparison: Comparison, folder: Path, points: int) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    layout = layout_pb2.Layout()
    with _writer(folder) as write:
        for tag in OVERLAID:
            charts = []
            for lr in comparison.lrs:
                chart = layout_pb2.Chart(title=f"lr {short(lr)}")
                for arm in comparison.fits:
                    name = f"{tag} at lr {short(lr)}/{comparison.label(arm)}"
                    series = thinned(_mean(arm, lr, tag), points)
                    for step, value in series.items():
                        write(_scalar(name, value), step)
                    chart.multiline.tag.extend([f"^{re.escape(name)}$"] if series else [])
                charts += [chart] if chart.multiline.tag else []
            if charts:
                layout.category.add(title=tag, chart=charts)
        write(_layout(layout), 0)


def _add_name(summary: "Summary", named: str) -> None:
    """Make the name that tells an arm apart a hyper-parameter: what it was told from stays behind."""
    from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_STRING
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for value in summary.value:
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        if data.HasField("session_start_info"):
            data.session_start_info.hparams[NAMED].string_value = named
        if data.HasField("experiment"):
            data.experiment.hparam_infos.add(name=NAMED, type=DATA_TYPE_STRING)
        value.metadata.plugin_data.content = data.SerializeToString()


def _layout(layout: "Layout") -> "Summary":
    """What the custom-scalars tab reads; TensorBoard's own function for it wants TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME)
    text = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=text, metadata=metadata)])


@contextmanager
def _writer(folder: Path) -> Iterator[Callable[["Summary", int], None]]:
    """An event file in a new folder."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    try:
        yield lambda summary, step: writer.add_event(Event(step=step, summary=summary, wall_time=time.time()))
    finally:
        writer.close()


def _scalar(tag: str, value: float) -> "Summary":
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def _mean(arm: Arm, lr: float, tag: str) -> dict[int, float]:
    """Mean over the seeds at the steps that all runs have logged."""
    series = [run.scalars[tag] for run in arm.at(lr) if tag in run.scalars]
    common = set.intersection(*map(set, series)) if series else set()
    return {step: statistics.fmean(each[step] for each in series) for step in sorted(common)}

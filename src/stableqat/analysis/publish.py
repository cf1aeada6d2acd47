"""What `stableqat publish` writes: a study's event files, small enough to share.

Each run keeps one event file with its hyper-parameters (so the HParams tab works) and its scalars, thinned;
tags of single layers and checkpoints are left out. `stableqat compare` says the same of the copy, except for
figures over logged steps (spikes, gradient norms, means over training) if a run logged more steps than are
kept.

`overlay` holds means over the seeds and a layout for the custom-scalars tab that draws all arms of one
learning rate in one chart. TensorBoard chooses colours and symbols itself: a colour per run and, within a
run, a symbol per series. So each method is a run of the overlay and keeps one colour in all charts, and its
arms differ by symbol. The colour itself cannot be set.
"""

import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stableqat.analysis.arms import NAMED, Result
from stableqat.analysis.comparison import Summary
from stableqat.events import COMPARED, OVERLAY, find_runs, hparams_events, read_run
from stableqat.studies.plan import STUDY_FILE
from stableqat.studies.study import short

if TYPE_CHECKING:
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

OVERLAID = ("train/loss", "train/grad_norm", "quant/flip_rate", "quant/oscillation", "quant/scale_drift")


def thinned(series: dict[int, float], points: int) -> dict[int, float]:
    """About `points` values, evenly over the steps, with the first, the last and all that are not finite.

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


def write_copy(summary: Summary, folder: Path, points: int) -> None:
    """Write the copy of a study.

    Args:
        summary: The study.
        folder: A new folder.
        points: Largest number of values to keep of a tag, the first and the last among them.
    """
    results = [run for arm in summary.arms for run in arm.runs]
    named = {run.folder: run.hparams.get(NAMED) for run in results}
    for path in find_runs(summary.folder):
        if path.parent == summary.folder:
            _write_run(path, folder / path.name, points, named.get(path))
    _write_overlay(summary, folder / OVERLAY, points)
    if (summary.folder / STUDY_FILE).exists():
        shutil.copyfile(summary.folder / STUDY_FILE, folder / STUDY_FILE)


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


def _write_overlay(summary: Summary, folder: Path, points: int) -> None:
    """Write the means, one run per method, and in the run above them the layout of their charts."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    charts: dict[str, dict[float, list[str]]] = {tag: {lr: [] for lr in summary.lrs} for tag in OVERLAID}
    for method in dict.fromkeys(arm.method for arm in summary.fits):
        with _writer(folder / re.sub(r"[^\w.+-]", "_", method)) as write:
            for arm in summary.fits:
                for lr, cell in arm.cells.items() if arm.method == method else ():
                    for tag, by_lr in charts.items():
                        name = f"{tag} at lr {short(lr)}/{arm.label}"
                        series = thinned(_mean(cell.runs, tag), points)
                        for step, value in series.items():
                            write(_scalar(name, value), step)
                        by_lr[lr] += [f"^{re.escape(name)}$"] if series else []
    layout = layout_pb2.Layout()
    for tag, by_lr in charts.items():
        lines = {lr: layout_pb2.MultilineChartContent(tag=names) for lr, names in by_lr.items() if names}
        drawn = [layout_pb2.Chart(title=f"lr {short(lr)}", multiline=each) for lr, each in lines.items()]
        if drawn:
            layout.category.add(title=tag, chart=drawn)
    with _writer(folder) as write:
        write(_layout(layout), 0)


def _add_name(summary: "summary_pb2.Summary", named: str) -> None:
    """Make the name that tells an arm apart a hyper-parameter, because its origin is not copied."""
    from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_STRING
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for value in summary.value:
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        if data.HasField("session_start_info"):
            data.session_start_info.hparams[NAMED].string_value = named
        if data.HasField("experiment"):
            data.experiment.hparam_infos.add(name=NAMED, type=DATA_TYPE_STRING)
        value.metadata.plugin_data.content = data.SerializeToString()


def _layout(layout: "Layout") -> "summary_pb2.Summary":
    """The summary that the custom-scalars tab reads; TensorBoard's own function for it needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME)
    text = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=text, metadata=metadata)])


@contextmanager
def _writer(folder: Path) -> Iterator[Callable[["summary_pb2.Summary", int], None]]:
    """An event file in a new folder."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    try:
        yield lambda summary, step: writer.add_event(Event(step=step, summary=summary, wall_time=time.time()))
    finally:
        writer.close()


def _scalar(tag: str, value: float) -> "summary_pb2.Summary":
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def _mean(runs: Sequence[Result], tag: str) -> dict[int, float]:
    """Mean over the seeds at the steps that all runs logged."""
    series = [run.scalars[tag] for run in runs if tag in run.scalars]
    common = set.intersection(*map(set, series)) if series else set()
    return {step: statistics.fmean(each[step] for each in series) for step in sorted(common)}

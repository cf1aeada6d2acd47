"""A map of the layers: signal to noise and flips of each, as `QuantizerMonitor` logs them.

A row is an arm, at its best learning rate, of the first seed that did not diverge; the columns are the layers
in the model's order. Only these runs' tags of layers are read, because a run may have thousands.
"""

import math
import os
import statistics
from functools import partial
from typing import TYPE_CHECKING

from stableqat.analysis.arms import Result
from stableqat.analysis.comparison import ArmSummary, Summary
from stableqat.analysis.panels import Panel
from stableqat.analysis.style import Style, as_written
from stableqat.events import read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAGS = {
    "snr_db": "signal to noise (dB), at the end",
    "flip_rate": "codes that flip per step, mean over training",
}
PREFIXES = ("layers/", "quant/")  # the latter in runs of earlier versions
MOST_ARMS, MOST_NAMES = 24, 30


def layers(summary: Summary, _: dict[str, Style]) -> list[Panel]:
    """A panel for each quantity and family."""

    def draw(axes: "Axes", what: str, table: dict[str, dict[str, float]]) -> None:
        from matplotlib.colors import LogNorm

        names = list(dict.fromkeys(name for row in table.values() for name in row))
        values = [[row.get(name, math.nan) for name in names] for row in table.values()]
        positive = [value for row in values for value in row if value > 0]
        norm = LogNorm() if what == "flip_rate" and positive else None
        image = axes.imshow(values, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, pad=0.01)
        step = math.ceil(len(names) / MOST_NAMES)
        places = range(0, len(names), step)
        shared = os.path.commonpath([name.replace(".", "/") for name in names]) if len(names) > 1 else ""
        labels = [as_written(names[i][len(shared) :].removeprefix(".")) for i in places]
        axes.set_xticks(places, labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(table)), [as_written(label) for label in table], fontsize=7)
        axes.set_title(TAGS[what], fontsize=9)
        axes.grid(visible=False)

    panels: list[Panel] = []
    for images in (False, True):
        arms = [arm for arm in summary.quantized if arm.images == images][:MOST_ARMS]
        logged = {arm.label: _by_layer(run) for arm in arms if (run := _shown(arm))}
        for what in TAGS:
            table = {label: row for label, of in logged.items() if (row := of.get(what))}
            panels += [partial(draw, what=what, table=table)] if table else []
    return panels


def _shown(arm: ArmSummary) -> Result | None:
    """The first run at the best learning rate that did not diverge."""
    runs = arm.cells[arm.selected.lr].runs if arm.selected else []
    return next((run for run in runs if not run.diverged), None)


def _by_layer(run: Result) -> dict[str, dict[str, float]]:
    """What was logged of each layer, by quantity and layer."""
    found: dict[str, dict[str, float]] = {what: {} for what in TAGS}
    for tag, series in read_run(run.folder, PREFIXES).scalars.items():
        layer, _, what = tag.partition("/")[2].rpartition("/")
        finite = [value for _, value in sorted(series.items()) if math.isfinite(value)]
        if layer and what in TAGS and finite:
            found[what][layer] = finite[-1] if what == "snr_db" else statistics.fmean(finite)
    return found

"""Scales of pictures show what was measured: zeros, and differences that are small."""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from synthetic import ended, summary_of

from stableqat.analysis import panels, plot
from stableqat.analysis.style import styles_of


def test_an_arm_without_flips_is_drawn_at_zero() -> None:
    runs = ended({"STE": {1e-3: [3.0], 1e-2: [3.0]}, "LSQ": {1e-3: [3.0], 1e-2: [3.0]}})
    for run in runs:
        run.scalars["quant/flip_rate"] = {1: 0.0 if run.hparams["method"] == "LSQ" else 3e-4}
    summary = summary_of(runs)
    axes = Figure().subplots()
    panels.flips(summary, styles_of(summary.fits))[0](axes)
    places = axes.transData.transform([(1e-3, 0.0), (1e-3, 1e-4), (1e-3, 3e-4)])[:, 1]
    assert axes.bbox.y0 < places[0] < places[1] < places[2] < axes.bbox.y1
    assert axes.get_yscale() == "symlog"
    for run in runs:
        run.scalars["quant/flip_rate"] = {1: 3e-4}
    panels.flips(summary_of(runs), styles_of(summary.fits))[0](axes := Figure().subplots())
    assert axes.get_yscale() == "log"


def test_differences_have_round_ticks_and_name_their_arms_once(tmp_path: Path) -> None:
    near = {"STE": {1e-3: [3.0, 3.1]}, "LSQ": {1e-3: [3.0057, 3.1041]}}
    for losses, scale in ((near, "linear"), (near | {"DSQ": {1e-3: [3.3, 3.9]}}, "symlog")):
        summary = summary_of(ended(losses), tmp_path)
        figure = plot._figure([summary], styles_of(summary.fits), panels.differences, (4, 3), 3, "xy", True)
        assert figure is not None
        figure.canvas.draw()
        axes = figure.subfigs[0].axes[0]
        assert axes.get_xscale() == scale
        labels = [text.get_text() for text in axes.get_xticklabels()]
        assert (
            max(len(label.lstrip("\N{MINUS SIGN}").replace(".", "").lstrip("0")) for label in labels) <= 2
        ), labels
        boxes = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
        inside = [box for box in boxes if axes.bbox.x0 <= box.x0 + box.width / 2 <= axes.bbox.x1]
        assert all(one.x1 < other.x0 for one, other in pairwise(inside))
        assert not figure.legends

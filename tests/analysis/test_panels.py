"""Scales of pictures show what was measured: zeros, and differences that are small."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic import COMMON, ended, summary_of

from stableqat.analysis import layers, panels, plot
from stableqat.analysis.style import styles_of
from stableqat.events import Run


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


def test_names_of_a_hundred_characters_stay_inside_every_picture(monkeypatch, tmp_path: Path) -> None:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: figures.setdefault(Path(part).name, self))
    monkeypatch.setattr(plot, "whole_file", nullcontext)
    runs = []
    for name in ("one name of a hundred characters in words " * 3, "unbroken_" * 11):
        losses = {"STE": {1e-3: [3.0, 3.1], 1e-2: [3.2, 3.3]}, "DSQ": {1e-3: [3.1, 3.1], 1e-2: [3.0, 3.1]}}
        for bits in (2, 4):
            settings = {"named": name[:100], "bits": bits, "deployed_mb": float(bits)}
            runs += ended(losses, **settings)
    measured = COMMON | {"method": "FP", "subcommand": "validate", "attention": "key, value: " * 8 + "LSQ 8"}
    runs.append(Run(tmp_path / "fp", measured, {"val/loss": {0: 2.5}}))
    by_layer = {"layers/one/snr_db": {1: 9.0}, "layers/two/snr_db": {1: 8.0}}
    monkeypatch.setattr(layers, "read_run", lambda folder, _: Run(folder, scalars=by_layer))
    plot.draw_all([summary_of(runs, tmp_path)], tmp_path)
    pictures = ("compare", "differences", "bits", "sizes", "lr_bits", "layers")
    assert set(figures) == {f"{name}.png" for name in pictures}
    for name, figure in figures.items():
        figure.canvas.draw()
        named = figure.findobj(lambda each: isinstance(each, Text) and len(each.get_text()) > 40)
        assert named
        for text in named:
            box, inside = text.get_window_extent(), figure.bbox.padded(2)
            assert all(inside.contains(*corner) for corner in box.get_points()), (name, text.get_text())

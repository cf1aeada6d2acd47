"""The pictures of a comparison: losses and the quantizers' behaviour, over learning rates and over steps.

An arm looks the same in every picture, see `style`. `panels` draws what is in the pictures.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stableqat.analysis import panels, widths
from stableqat.analysis.comparison import Summary
from stableqat.analysis.layers import layers
from stableqat.analysis.panels import Panel
from stableqat.analysis.style import Style, as_written, line_of, styles_of
from stableqat.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "compare": "Loss at the end of training against learning rate, mean over seeds. Bands: 95% t interval"
    " from 5 seeds on, otherwise smallest to largest. A cross marks a mean with diverged runs in it, each"
    " counted as the cap. An open triangle at the upper edge is a mean beyond it. Top-1 has no"
    " point where a run diverged.",
    "curves": "Loss over training steps, a panel per learning rate, mean over seeds. A line continues dotted,"
    " as the mean of the others, where the first of its seeds diverged; crosses mark the last finite loss of"
    " each diverged run. A loss beyond the upper edge is drawn along it.",
    "gradient_norm": "Norm of the whole gradient before clipping, over training steps. Lines and crosses as"
    " in the curves of the loss.",
    "flips": "Share of codes that change in a step, and share that change back against their last"
    " direction, mean over a run, against learning rate. Bands over seeds and crosses as for the loss. Where"
    " something is zero, the scale is linear below its lowest decade.",
    "scale_drift": "How far scales have moved at the end, mean |log2(s / s_start)|, and the share of weights"
    " outside the grid, against learning rate. Bands and crosses as for the loss.",
    "differences": "Difference to the baseline, runs of the same learning rate and seed paired: mean and"
    " 95% t interval; left of zero is better than the baseline. Filled: p < 0.05 after Holm's correction."
    " Shaded: the margin of equivalence. The scale is linear up to the lines and logarithmic beyond.",
    "bits": "Reported loss of each arm at its best learning rate against bits; lines join arms that differ in"
    " bits alone. Bars over seeds as for the loss; grey: rounding without training; black: full precision.",
    "sizes": "Reported loss of each arm at its best learning rate against the size of its packed weights:"
    " codes in their bits, scales and all that is not quantized in 16. Grey steps (the Pareto front): the"
    " lowest loss of what is no larger.",
    "lr_bits": "Mean of min(loss, cap) over learning rates and bits, darker is higher; all methods of a"
    " family share the colours. Bold: the selected learning rate; x: with a diverged run.",
    "layers": "Signal to noise of quantization by layer, and share of codes that flip in a step, of one run"
    " per arm: the first seed at its best learning rate that did not diverge.",
    "speed": "Throughput of each run (median of what it logged) and its time, by method; bars are means. Runs"
    " that shared a device slowed each other, so compare only methods that shared it alike.",
}


def draw_all(summaries: list[Summary], folder: Path) -> list[Path]:
    """Write a PNG of every picture for which something was logged.

    Args:
        summaries: One or more studies; a picture has a row of panels for each.
        folder: Where to write; files of the same name are replaced.

    Returns:
        The files, `compare.png` first.
    """
    styles = styles_of(arm for summary in summaries for arm in summary.fits)
    page = partial(_figure, summaries, styles)
    figures = {
        "compare": page(panels.losses, (6.6, 4.6), columns=2),
        "curves": page(panels.curves, (3.3, 2.5), columns=4, share="xy"),
        "gradient_norm": page(panels.gradient_norms, (3.3, 2.5), columns=4, share="xy"),
        "flips": page(panels.flips, (6.0, 3.8), columns=2, share="x"),
        "scale_drift": page(panels.scales, (6.0, 3.8), columns=2, share="x"),
        "differences": page(panels.differences, (4.0, 3.2), columns=3, share="xy", own=True),
        "bits": page(widths.bits, (6.6, 4.2), columns=2, own=True),
        "sizes": page(widths.sizes, (6.6, 4.2), columns=2, own=True),
        "lr_bits": page(widths.maps, (4.4, 2.4), columns=3, own=True),
        "layers": page(layers, (7.0, 4.2), columns=2, own=True),
        "speed": page(panels.speed, (5.0, 2.6), columns=3, own=True),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            with whole_file(path) as part:
                figure.savefig(part, format="png", dpi=130)
            paths.append(path)
    return paths


def _figure(
    summaries: list[Summary],
    styles: dict[str, Style],
    content: Callable[[Summary, dict[str, Style]], list[Panel]],
    size: tuple[float, float],
    columns: int,
    share: str = "",
    own: bool = False,
) -> "Figure | None":
    """A figure with the panels of the studies below each other.

    Args:
        summaries: The studies.
        styles: Look of each arm.
        content: What makes the panels of a study.
        size: Width and height of a panel, in inches.
        columns: Most panels beside each other.
        share: Axes that all panels of a study share.
        own: Whether panels name what they draw themselves; otherwise a legend at the top names the arms.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    studies = [(summary, drawn) for summary in summaries if (drawn := content(summary, styles))]
    if not studies:
        return None
    beside = [min(columns, len(drawn)) for _, drawn in studies]  # few panels fill the row, too
    columns = max(beside)
    rows = [math.ceil(len(drawn) / n) for (_, drawn), n in zip(studies, beside, strict=True)]
    labels = {arm.label: None for summary, _ in studies for arm in summary.fits}
    entries = [Line2D([], [], label=as_written(label), **styles[label]) for label in labels]
    if any(run.diverged for summary, _ in studies for arm in summary.fits for run in arm.runs):
        entries.append(Line2D([], [], label="diverged", color="grey", marker="x", linestyle=""))
    width = size[0] * max(columns, 6 / size[0])
    across = max(1, min(len(entries), int(width / (0.08 * line_of(labels) + 0.95))))
    tall = max(as_written(label).count("\n") + 1 for label in labels)
    height = 0.0 if own else 0.2 * tall * math.ceil(len(entries) / across)
    height += (size[1] + 0.1) * sum(rows) + 0.3 * len(rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False).flat
    for (summary, drawn), part, lines, columns in zip(studies, parts, rows, beside, strict=True):
        part.suptitle(as_written(summary.name), fontweight="bold")
        table = part.subplots(lines, columns, sharex="x" in share, sharey="y" in share, squeeze=False)
        grid = list(table.flat)
        for axes, draw in zip(grid, drawn, strict=False):
            axes.grid(alpha=0.25)
            draw(axes)
        for number, axes in enumerate(grid):
            axes.set_visible(number < len(drawn))
            axes.tick_params(labelbottom=True)
            if "x" in share and number + columns < len(drawn):
                axes.set_xlabel("")
            if "y" in share and number % columns:
                axes.set_ylabel("")
    if not own:
        figure.legend(
            handles=entries,
            loc="outside upper center",
            ncols=across,
            fontsize=9,
            frameon=False,
            handlelength=3.5,
        )
    return figure

"""The pictures of a comparison: losses and the quantizers' behaviour, over learning rates and over steps.

An arm looks the same in every picture, and a method has one colour in all of them; its variants are told
apart by markers and dashes. What is in them: see `panels`.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.analysis import panels
from stableqat.analysis.comparison import Comparison, diverged
from stableqat.analysis.drawing import as_written, colour_of
from stableqat.analysis.panels import Panel, Style
from stableqat.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "compare": "Loss at the end of training against learning rate, mean over seeds. Bands: 95% t interval"
    " from 5 seeds on, otherwise smallest to largest. A cross marks a mean with diverged runs in it, each"
    " counted as the cap; what is worse than the upper edge stands at the edge. Top-1 has no"
    " point where a run diverged.",
    "curves": "Loss over training steps, a panel a learning rate, mean over seeds. A line goes on dotted, as"
    " the mean of the others, where the first of its seeds diverged; crosses mark the last finite loss of"
    " each diverged run.",
    "gradient_norm": "Norm of the whole gradient before clipping, over training steps. Lines and crosses as"
    " in the curves of the loss.",
    "flips": "Share of codes that change in a step, and share that change back against their last"
    " direction, mean over a run, against learning rate. Bands over seeds and crosses as for the loss.",
    "scale_drift": "How far scales have moved at the end, mean |log2(s / s_start)|, and the share of weights"
    " outside the grid, against learning rate. Bands and crosses as for the loss.",
    "differences": "Difference to the baseline, runs of the same learning rate and seed paired: mean and"
    " 95% t interval; left of zero is better than the baseline. Filled: p < 0.05 after Holm's correction."
    " Shaded: the margin of equivalence. The scale is linear up to the lines and logarithmic beyond.",
}
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)))


def draw_all(comparisons: list[Comparison], folder: Path) -> list[Path]:
    """Writes every picture for which something was logged as PNG.

    Args:
        comparisons: One or more studies; a picture has a row of panels for each.
        folder: Where to write; files of the same name are replaced.

    Returns:
        The files, `compare.png` first.
    """
    styles = _styles(comparisons)
    page = partial(_figure, comparisons, styles)
    figures = {
        "compare": page(panels.losses, (6.6, 4.6), columns=2),
        "curves": page(panels.curves, (3.3, 2.5), columns=4, share="xy"),
        "gradient_norm": page(panels.gradient_norms, (3.3, 2.5), columns=4, share="xy"),
        "flips": page(panels.flips, (6.0, 3.8), columns=2, share="x"),
        "scale_drift": page(panels.scales, (6.0, 3.8), columns=2, share="x"),
        "differences": page(panels.differences, (4.0, 3.2), columns=3, share="xy"),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            with whole_file(path) as part:
                figure.savefig(part, format="png", dpi=130)
            paths.append(path)
    return paths


def _styles(comparisons: list[Comparison]) -> dict[str, Style]:
    """Label to line style: the colour is the method's, dashes count its variants."""
    styles: dict[str, Style] = {}
    variants: Counter[str] = Counter()
    markers = count()
    for comparison in comparisons:
        for arm in comparison.fits:
            label, method = comparison.label(arm), str(arm.hparams.get("method"))
            if label not in styles:
                styles[label] = {
                    "color": colour_of(method),
                    "marker": "." if method == "FP" else MARKERS[next(markers) % len(MARKERS)],
                    "linestyle": DASHES[variants[method] % len(DASHES)],
                }
                variants[method] += 1
    return styles


def _figure(
    comparisons: list[Comparison],
    styles: dict[str, Style],
    content: Callable[[Comparison, dict[str, Style]], list[Panel]],
    size: tuple[float, float],
    columns: int,
    share: str = "",
) -> "Figure | None":
    """A figure with the panels of each study below each other and the legend on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    studies = [(comparison, drawn) for comparison in comparisons if (drawn := content(comparison, styles))]
    if not studies:
        return None
    columns = min(columns, max(len(drawn) for _, drawn in studies))
    rows = [math.ceil(len(drawn) / columns) for _, drawn in studies]
    labels = {comparison.label(arm): None for comparison, _ in studies for arm in comparison.fits}
    entries = [Line2D([], [], label=as_written(label), **styles[label]) for label in labels]
    if any(diverged(run) for comparison, _ in studies for arm in comparison.fits for run in arm.runs):
        entries.append(Line2D([], [], label="diverged", color="grey", marker="x", linestyle=""))
    width = size[0] * max(columns, 6 / size[0])
    across = max(1, min(len(entries), int(width / (0.08 * max(map(len, labels)) + 0.75))))
    height = 0.2 * math.ceil(len(entries) / across)
    figure = Figure(
        figsize=(width, (size[1] + 0.1) * sum(rows) + 0.3 * len(rows) + height), layout="constrained"
    )
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False).flat
    for (comparison, drawn), part, lines in zip(studies, parts, rows, strict=True):
        part.suptitle(as_written(comparison.name), fontweight="bold")
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
    figure.legend(handles=entries, loc="outside upper center", ncols=across, fontsize=9, frameon=False)
    return figure

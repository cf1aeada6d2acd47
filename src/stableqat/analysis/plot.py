"""The picture of a comparison: final metric against learning rate, a line an arm, a panel a study.

Losses are drawn as they are, up to as far above the cap as the cap lies above the best; what is worse
stands at the upper edge, and diverged runs there as crosses. A study of images has a panel for
top-1, too. Bars are standard deviations over seeds. Colours are Okabe and Ito's, told apart by
colour-blind readers, and every arm has a marker of its own besides.
"""

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from stableqat.analysis.arms import LOSS, Comparison
from stableqat.analysis.study import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP*"
TOP1 = "val/top1"


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Writes the picture as PNG.

    Args:
        comparisons: One or more studies.
        path: File to write, whatever its name ends in.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(c, tag) for c in comparisons for tag in (LOSS, TOP1) if any(arm.finals(tag) for arm in c.fits)]
    labels = dict.fromkeys(comparison.label(arm) for comparison in comparisons for arm in comparison.fits)
    numbers = {label: number for number, label in enumerate(labels)}
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (comparison, tag) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _draw_arms(axes, comparison, tag, numbers)
        _draw_references(axes, comparison, tag)
        axes.set_title(comparison.folder.name)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss (nats)" if tag == LOSS else "validation top-1 (%)")
        axes.set_xscale("log")
        axes.set_xlim(comparison.lrs[0] / 1.5, comparison.lrs[-1] * 1.5)
        axes.set_xticks(comparison.lrs, [short(lr) for lr in comparison.lrs])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _draw_arms(axes: "Axes", comparison: Comparison, tag: str, numbers: dict[str, int]) -> None:
    edge = _edge(comparison) if tag == LOSS else math.inf
    crossed = False
    for place, arm in enumerate(comparison.fits):
        label = comparison.label(arm)
        full_precision = arm.hparams.get("method") == "FP"
        colour = "black" if full_precision else COLOURS[numbers[label] % len(COLOURS)]
        dodge = 1.02 ** (place - (len(comparison.fits) - 1) / 2)  # so that equal points don't hide each other
        points, crosses = [], []
        for lr in comparison.lrs:
            cell = comparison.cell(arm, lr)
            if cell is None:
                continue
            values = [min(v, edge) if tag == LOSS else 100 * v for v in arm.finals(tag, lr)]
            if values and math.isfinite(statistics.fmean(values)):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((lr * dodge, statistics.fmean(values), spread))
            if cell.diverged:
                crosses.append(lr * dodge)
        x, y, spreads = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            x,
            y,
            yerr=spreads if any(spreads) else None,
            label=label,
            color=colour,
            marker=MARKERS[numbers[label] % len(MARKERS)],
            linestyle="--" if full_precision else "-",
            markersize=5,
            linewidth=1.4,
            capsize=3,
        )
        at_edge = math.isfinite(edge)
        axes.plot(
            crosses,
            [edge if at_edge else 0.02] * len(crosses),
            "x",
            transform=axes.transData if at_edge else axes.get_xaxis_transform(),
            color=colour,
            markersize=11,
            markeredgewidth=2,
        )
        crossed = crossed or bool(crosses)
    if crossed:
        axes.plot([], [], "x", color="grey", label="diverged")
    if math.isfinite(edge):
        axes.axhline(comparison.cap[0], color="tab:red", linewidth=0.8, alpha=0.5, label="cap", zorder=1)


def _edge(comparison: Comparison) -> float:
    """The largest loss that is drawn."""
    cap, best = comparison.cap[0], min(comparison.best(arm)[0] for arm in comparison.fits)
    return cap + max(cap - best, 0.1 * abs(cap)) if math.isfinite(cap) else math.inf


def _draw_references(axes: "Axes", comparison: Comparison, tag: str) -> None:
    """Horizontal lines of full precision and PTQ; what lies beyond the edge is named, but off the scale."""
    scale = 1 if tag == LOSS else 100
    edge = _edge(comparison) if tag == LOSS else math.inf
    styles = ("--", ":", "-.", (0, (1, 3)), (0, (6, 4)))
    heights = list(axes.dataLim.intervaly)
    for number, arm in enumerate([a for a in comparison.arms if a.kind != "fit"]):
        value = arm.mean(tag)
        if value is None or not math.isfinite(value):
            continue
        value *= scale
        if value <= edge:
            heights.append(value)
        axes.axhline(
            value,
            color="black" if arm.kind == "fp" else "grey",
            linestyle="-" if arm.kind == "fp" else styles[number % len(styles)],
            linewidth=1,
            label=f"{comparison.label(arm)}: {value:.3f}"
            if tag == LOSS
            else f"{comparison.label(arm)}: {value:.1f}",
            zorder=1,
        )
    margin = 0.05 * (max(heights) - min(heights)) or 0.1
    axes.set_ylim(min(heights) - margin, max(heights) + margin)

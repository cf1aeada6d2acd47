"""What each picture shows of one study: panels over learning rates, over steps, and of differences.

A function here returns the panels of its picture, each of which draws on axes it is given; none where
nothing was logged. Nothing that diverged is left out: in means of losses it counts as the cap, and
crosses say where it was. Of top-1, which has no cap, nothing is drawn there.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from stableqat.analysis.caps import Group
from stableqat.analysis.comparison import LOSS, TOP1, Arm, Comparison, diverged
from stableqat.analysis.curves import average, finite
from stableqat.analysis.drawing import as_written
from stableqat.analysis.stability import FLIP_RATE, GRAD_NORM, TRAIN_LOSS
from stableqat.analysis.statistics import LEVEL, paired
from stableqat.events import Run
from stableqat.studies.study import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH_FOR_T = 5
ENOUGH_FOR_A_CURVE = 4

Style = dict[str, Any]
Panel = Callable[["Axes"], None]


def losses(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """Loss, and top-1 of images, at the end against learning rate."""
    edges = _edges(comparison)

    def final(arm: Arm, lr: float) -> list[float]:
        cell = comparison.cell(arm, lr)
        return [min(loss, edges[arm.group]) for loss in cell.losses] if cell else []

    def top1(arm: Arm, lr: float) -> list[float]:
        return [100 * value for value in arm.finals(TOP1, lr)]

    def draw(axes: "Axes", group: Group, tag: str) -> None:
        arms = [arm for arm in comparison.fits if arm.group in (group, Group(None, group.images))]
        _against_lr(axes, comparison, arms, styles, final if tag == LOSS else top1)
        axes.set_ylabel("validation loss (nats)" if tag == LOSS else "validation top-1 (%)")
        if len(groups) > 1:
            axes.set_title(group.name, fontsize=9)
        cap = comparison.caps[group].loss
        if tag == LOSS and math.isfinite(cap):
            axes.axhline(cap, color="tab:red", linewidth=0.8, alpha=0.6, label="cap", zorder=1)
        _draw_references(axes, comparison, group, tag, edges[group] if tag == LOSS else math.inf)

    groups = list(dict.fromkeys(arm.group for arm in comparison.quantized or comparison.fits))
    return [
        partial(draw, group=group, tag=tag)
        for group in groups
        for tag in ([LOSS, TOP1] if group.images and _logged(comparison, TOP1) else [LOSS])
    ]


def flips(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """Flips and oscillation, mean over a run, against learning rate."""
    names = {FLIP_RATE: "codes that flip a step", "quant/oscillation": "codes that flip back a step"}
    return _behaviour(comparison, styles, names, lambda series: statistics.fmean(series.values()), "log")


def scales(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """Drift of the scales and clipped weights, at the end, against learning rate."""
    names = {
        "quant/scale_drift": "|log2(s / s_start)| at the end",
        "quant/clipped": "weights outside the grid",
    }
    return _behaviour(comparison, styles, names, lambda series: series[max(series)], "linear")


def _behaviour(
    comparison: Comparison,
    styles: dict[str, Style],
    names: dict[str, str],
    summary: Callable[[dict[int, float]], float],
    scale: str,
) -> list[Panel]:
    """A panel for each logged tag: one figure a run against learning rate."""

    def values(arm: Arm, lr: float, tag: str) -> list[float]:
        return [summary(series) for run in arm.at(lr) if (series := _finite(run, tag))]

    def draw(axes: "Axes", tag: str) -> None:
        _against_lr(axes, comparison, comparison.fits, styles, partial(values, tag=tag))
        axes.set_ylabel(names[tag])
        axes.set_yscale(scale)

    return [partial(draw, tag=tag) for tag in names if _logged(comparison, tag)]


def _against_lr(
    axes: "Axes",
    comparison: Comparison,
    arms: list[Arm],
    styles: dict[str, Style],
    values: Callable[[Arm, float], list[float]],
) -> None:
    """A line an arm through the means over seeds, with a band and crosses."""
    for place, arm in enumerate(arms):
        style = styles[comparison.label(arm)]
        # side by side, so that equal points don't hide each other
        dodge = 1.02 ** (place - (len(arms) - 1) / 2)
        found = {lr: seeds for lr in comparison.lrs if (seeds := values(arm, lr))}
        x = [lr * dodge for lr in found]
        y = [statistics.fmean(seeds) for seeds in found.values()]
        axes.plot(x, y, markersize=4.5, linewidth=1.4, **style)
        lows, highs = zip(*map(_band, found.values()), strict=True) if found else ((), ())
        axes.fill_between(x, lows, highs, color=style["color"], alpha=0.13, linewidth=0)
        crosses = [
            (px, py)
            for lr, px, py in zip(found, x, y, strict=True)
            if any(diverged(run) for run in arm.at(lr))
        ]
        if crosses:
            axes.plot(
                *zip(*crosses, strict=True), "x", color=style["color"], markersize=10, markeredgewidth=2
            )
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    axes.set_xlim(comparison.lrs[0] / 1.5, comparison.lrs[-1] * 1.5)
    axes.set_xticks(comparison.lrs, [short(lr) for lr in comparison.lrs])
    axes.minorticks_off()


def _band(seeds: list[float]) -> tuple[float, float]:
    sample = paired(seeds, margin=0.0)
    if len(seeds) < ENOUGH_FOR_T or sample.low is None or sample.high is None:
        return min(seeds), max(seeds)
    return sample.low, sample.high


def _edges(comparison: Comparison) -> dict[Group, float]:
    """The largest loss that is drawn of each group: as far above the cap as the cap lies above the best."""
    edges = {}
    for group, cap in comparison.caps.items():
        arms = [arm for arm in comparison.fits if arm.group == group]
        cells = (comparison.cell(arm, lr) for arm in arms for lr in comparison.lrs)
        above = max(cap.loss - min(cell.mean for cell in cells if cell), 0.1 * abs(cap.loss))
        edges[group] = cap.loss + above if math.isfinite(cap.loss) else math.inf
    return edges


def _draw_references(axes: "Axes", comparison: Comparison, group: Group, tag: str, edge: float) -> None:
    """Horizontal lines of full precision and PTQ; what lies beyond the edge is named, but off the scale."""
    scale = 1 if tag == LOSS else 100
    styles = ("--", ":", "-.", (0, (1, 3)), (0, (6, 4)))
    heights = list(axes.dataLim.intervaly)
    references = [arm for arm in comparison.arms if arm.kind == "fp" and arm.images == group.images]
    references += [arm for arm in comparison.ptqs if arm.group == group]
    for number, arm in enumerate(references):
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
            linewidth=0.9,
            label=f"{as_written(comparison.label(arm))}: {value:.{3 if tag == LOSS else 1}f}",
            zorder=1,
        )
    heights = [height for height in heights if math.isfinite(height)]
    if heights:
        margin = 0.05 * (max(heights) - min(heights)) or 0.1
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="best", framealpha=0.7)


def curves(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """Loss over steps: of validation where that was often enough, otherwise of training."""
    validated = [len(run.scalars.get(LOSS, {})) for arm in comparison.fits for run in arm.runs]
    often = validated and statistics.median(validated) >= ENOUGH_FOR_A_CURVE
    tag, name = (LOSS, "validation loss (nats)") if often else (TRAIN_LOSS, "training loss (nats)")
    return _over_steps(comparison, styles, tag, name, _edges(comparison))


def gradient_norms(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """Norm of the gradient over steps."""
    return _over_steps(comparison, styles, GRAD_NORM, "gradient norm", {}, "log")


def _over_steps(
    comparison: Comparison,
    styles: dict[str, Style],
    tag: str,
    name: str,
    edges: dict[Group, float],
    scale: str = "linear",
) -> list[Panel]:
    """A panel a learning rate with a line an arm over steps."""

    def draw(axes: "Axes", lr: float) -> None:
        for arm in comparison.fits:
            style = {**styles[comparison.label(arm)], "marker": "", "linewidth": 1.1}
            runs, edge = arm.at(lr), edges.get(arm.group, math.inf)
            together, survivors = average(runs, tag)
            axes.plot(list(together), [min(v, edge) for v in together.values()], **style)
            axes.plot(
                list(survivors), [min(v, edge) for v in survivors.values()], **{**style, "linestyle": ":"}
            )
            ends = [max(series.items()) for run in runs if diverged(run) and (series := _finite(run, tag))]
            for step, value in ends:
                axes.plot(step, min(value, edge), "x", color=style["color"], clip_on=False, zorder=3)
        axes.set_title(f"lr {short(lr)}", fontsize=9)
        axes.set_yscale(scale)
        axes.set_xlabel("step")
        axes.set_ylabel(name)

    return [partial(draw, lr=lr) for lr in comparison.lrs] if _logged(comparison, tag) else []


def differences(comparison: Comparison, styles: dict[str, Style]) -> list[Panel]:
    """A forest plot of each arm's differences to the baseline."""
    measured = [each for each in comparison.differences if each.mean is not None]
    rows = list(dict.fromkeys((each.quantity, each.lr) for each in measured))
    rows.sort(key=lambda row: (row[0] != "loss", row[1] or 0.0))

    def draw(axes: "Axes", arm: str, baseline: str) -> None:
        axes.axvline(0, color="grey", linewidth=0.8)
        if comparison.plan.margin:
            axes.axvspan(
                -comparison.plan.margin, comparison.plan.margin, color="grey", alpha=0.2, linewidth=0
            )
        for each in measured:
            if (each.arm, each.baseline) == (arm, baseline):
                y = rows.index((each.quantity, each.lr))
                colour = styles[arm]["color"]
                sure = each.p_holm is not None and each.p_holm < LEVEL
                filled: Literal["full", "none"] = "full" if sure else "none"
                assert each.mean is not None
                if each.low is not None and each.high is not None:
                    axes.plot([each.low, each.high], [y, y], color=colour, linewidth=1.4)
                axes.plot(each.mean, y, "o", color=colour, markersize=5, fillstyle=filled)
        axes.set_title(as_written(f"{arm} - {baseline}"), fontsize=9)
        from matplotlib.ticker import SymmetricalLogLocator

        linear = 2 * (comparison.plan.margin or 0.01)
        axes.set_xscale("symlog", linthresh=linear)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=[1, 2, 5]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("difference (nats)")
        axes.set_yticks(range(len(rows)), [f"lr {short(lr)}" if q == "loss" else q for q, lr in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)

    pairs = dict.fromkeys((each.arm, each.baseline) for each in measured)
    return [partial(draw, arm=arm, baseline=baseline) for arm, baseline in pairs]


def _finite(run: Run, tag: str) -> dict[int, float]:
    return finite(run.scalars.get(tag, {}))


def _logged(comparison: Comparison, tag: str) -> bool:
    return any(_finite(run, tag) for arm in comparison.fits for run in arm.runs)

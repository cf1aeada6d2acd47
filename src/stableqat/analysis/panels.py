"""What each picture shows of one study: panels over learning rates and steps, of differences and of speed.

Each function returns the panels of its picture, which draw on the axes they are given; none if nothing was
logged. No run that diverged is left out: it counts as the cap in means of losses, and crosses mark it. Top-1
has no cap, so nothing is drawn there. A mean beyond the upper edge is an open triangle at the edge.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stableqat.analysis.arms import LOSS, TOP1, Group, Result
from stableqat.analysis.comparison import ArmSummary, Summary
from stableqat.analysis.stability import FLIP_RATE, GRAD_NORM, TRAIN_LOSS
from stableqat.analysis.statistics import LEVEL, paired
from stableqat.analysis.style import LINE, Style, as_written, line_of, look_of
from stableqat.studies.record import Record
from stableqat.studies.study import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH_FOR_T = 5
ENOUGH_FOR_A_CURVE = 4

Panel = Callable[["Axes"], None]


def losses(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """Final loss, and top-1 of images, against learning rate."""
    edges = _edges(summary)

    def final(arm: ArmSummary, lr: float) -> list[float]:
        return arm.cells[lr].losses

    def top1(arm: ArmSummary, lr: float) -> list[float]:
        return [100 * value for value in arm.cells[lr].top1]

    def draw(axes: "Axes", group: Group, tag: str) -> None:
        arms = [arm for arm in summary.fits if arm.group in (group, Group(None, group.images))]
        edge = edges[group] if tag == LOSS else math.inf
        _against_lr(axes, summary, arms, styles, final if tag == LOSS else top1, edge)
        axes.set_ylabel("validation loss (nats)" if tag == LOSS else "validation top-1 (%)")
        if len(groups) > 1:
            axes.set_title(group.name, fontsize=9)
        cap = summary.caps[group].loss
        if tag == LOSS and math.isfinite(cap):
            axes.axhline(cap, color="tab:red", linewidth=0.8, alpha=0.6, label="cap", zorder=1)
        _draw_references(axes, summary, group, tag, edge)

    groups = list(dict.fromkeys(arm.group for arm in summary.quantized or summary.fits))
    return [
        partial(draw, group=group, tag=tag)
        for group in groups
        for tag in ([LOSS, TOP1] if group.images and _logged(summary, TOP1) else [LOSS])
    ]


def flips(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """Flips and oscillation, as means over a run, against learning rate."""
    names = {FLIP_RATE: "codes that flip per step", "quant/oscillation": "codes that flip back per step"}
    return _behaviour(summary, styles, names, lambda series: statistics.fmean(series.values()), log=True)


def scales(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """Drift of the scales and clipped weights, at the end, against learning rate."""
    names = {
        "quant/scale_drift": "|log2(s / s_start)| at the end",
        "quant/clipped": "weights outside the grid",
    }
    return _behaviour(summary, styles, names, lambda series: series[max(series)])


def _behaviour(
    summary: Summary,
    styles: dict[str, Style],
    names: dict[str, str],
    figure: Callable[[dict[int, float]], float],
    log: bool = False,
) -> list[Panel]:
    """A panel for each logged tag: one figure per run against learning rate."""

    def values(arm: ArmSummary, lr: float, tag: str) -> list[float]:
        return [figure(series) for run in arm.cells[lr].runs if (series := _finite(run, tag))]

    def draw(axes: "Axes", tag: str) -> None:
        _against_lr(axes, summary, summary.fits, styles, partial(values, tag=tag))
        axes.set_ylabel(names[tag])
        if log:
            _from_zero(axes, [v for arm in summary.fits for lr in arm.cells for v in values(arm, lr, tag)])

    return [partial(draw, tag=tag) for tag in names if _logged(summary, tag)]


def _from_zero(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic ordinate that is linear below its lowest decade if it has to show zeros."""
    positive = [value for value in values if value > 0]
    if positive and min(values) > 0:
        axes.set_yscale("log")
    elif positive:
        decade = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_yscale("symlog", linthresh=decade, linscale=0.3, subs=range(2, 10))


def _against_lr(
    axes: "Axes",
    summary: Summary,
    arms: list[ArmSummary],
    styles: dict[str, Style],
    values: Callable[[ArmSummary, float], list[float]],
    edge: float = math.inf,
) -> None:
    """A line per arm through the means over seeds, with a band, crosses, and triangles at the upper edge."""
    for place, arm in enumerate(arms):
        style = styles[arm.label]
        # side by side, so that equal points do not hide each other
        dodge = 1.02 ** (place - (len(arms) - 1) / 2)
        found = {lr: seeds for lr in arm.cells if (seeds := values(arm, lr))}
        x = [lr * dodge for lr in found]
        means = [statistics.fmean(seeds) for seeds in found.values()]
        y = [min(mean, edge) for mean in means]
        inside = [i for i, mean in enumerate(means) if mean <= edge]
        axes.plot(x, y, markersize=4.5, linewidth=1.4, markevery=inside, **style)
        beyond = [x[i] for i in range(len(x)) if i not in inside]
        if beyond:
            look = {"color": style["color"], "markersize": 8, "markerfacecolor": "none"}
            axes.plot(beyond, [edge] * len(beyond), "^", **look)
            if "beyond the edge" not in axes.get_legend_handles_labels()[1]:
                axes.plot([], [], "^", **look | {"color": "grey", "label": "beyond the edge"})
        bands = [[min(end, edge) for end in band(seeds)] for seeds in found.values()]
        lows, highs = zip(*bands, strict=True) if bands else ((), ())
        axes.fill_between(x, lows, highs, color=style["color"], alpha=0.13, linewidth=0)
        lost = [i for i, lr in enumerate(found) if arm.cells[lr].diverged]
        if lost:
            crosses = [x[i] for i in lost], [y[i] for i in lost]
            axes.plot(*crosses, "x", color=style["color"], markersize=10, markeredgewidth=2)
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    axes.set_xlim(summary.lrs[0] / 1.5, summary.lrs[-1] * 1.5)
    axes.set_xticks(summary.lrs, [short(lr) for lr in summary.lrs])
    axes.minorticks_off()


def band(seeds: list[float]) -> tuple[float, float]:
    """What is drawn around a mean: the 95% t interval, or from smallest to largest of a few seeds."""
    sample = paired(seeds, margin=0.0)
    if len(seeds) < ENOUGH_FOR_T or sample.low is None or sample.high is None:
        return min(seeds), max(seeds)
    return sample.low, sample.high


def _edges(summary: Summary) -> dict[Group, float]:
    """The largest loss to draw of each group: as far above the cap as the cap is above the best loss."""
    edges = {}
    for group, cap in summary.caps.items():
        cells = [cell for arm in summary.fits if arm.group == group for cell in arm.cells.values()]
        above = max(cap.loss - min(cell.mean for cell in cells), 0.1 * abs(cap.loss))
        edges[group] = cap.loss + above if math.isfinite(cap.loss) else math.inf
    return edges


def _draw_references(axes: "Axes", summary: Summary, group: Group, tag: str, edge: float) -> None:
    """Horizontal lines for full precision and PTQ; the legend also names those beyond the edge."""
    scale = 1 if tag == LOSS else 100
    styles = ("--", ":", "-.", (0, (1, 3)), (0, (6, 4)))
    heights = list(axes.dataLim.intervaly)
    references = [arm for arm in summary.arms if arm.kind == "fp" and arm.images == group.images]
    references += [arm for arm in summary.arms if arm.kind == "ptq" and arm.group == group]
    for number, arm in enumerate(references):
        value = arm.loss if tag == LOSS else arm.top1
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
            label=f"{as_written(arm.label)}: {value:.{3 if tag == LOSS else 1}f}",
            zorder=1,
        )
    heights = [height for height in heights if math.isfinite(height)]
    if heights:
        margin = 0.05 * (max(heights) - min(heights)) or 0.1
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
    if names := axes.get_legend_handles_labels()[1]:
        below, across = (0.5, -0.11), 3 if line_of(names) < LINE / 2 else 1  # where no data are
        axes.legend(loc="upper center", bbox_to_anchor=below, ncols=across, fontsize=7, frameon=False)


def curves(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """Loss over steps: of validation if it ran often enough, otherwise of training."""
    validated = [len(run.scalars.get(LOSS, {})) for arm in summary.fits for run in arm.runs]
    often = validated and statistics.median(validated) >= ENOUGH_FOR_A_CURVE
    tag, name = (LOSS, "validation loss (nats)") if often else (TRAIN_LOSS, "training loss (nats)")
    return _over_steps(summary, styles, tag, name, _edges(summary))


def gradient_norms(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """Norm of the gradient over steps."""
    return _over_steps(summary, styles, GRAD_NORM, "gradient norm", {}, "log")


def _over_steps(
    summary: Summary,
    styles: dict[str, Style],
    tag: str,
    name: str,
    edges: dict[Group, float],
    scale: str = "linear",
) -> list[Panel]:
    """A panel per learning rate with a line per arm over steps."""

    def draw(axes: "Axes", lr: float) -> None:
        for arm in summary.fits:
            style = {**styles[arm.label], "marker": "", "linewidth": 1.1}
            runs = arm.cells[lr].runs if lr in arm.cells else []
            edge = edges.get(arm.group, math.inf)
            for mean, line in zip(_average(runs, tag), (style["linestyle"], ":"), strict=True):
                axes.plot(list(mean), [min(v, edge) for v in mean.values()], **{**style, "linestyle": line})
            ends = [max(series.items()) for run in runs if run.diverged and (series := _finite(run, tag))]
            for step, value in ends:
                axes.plot(step, min(value, edge), "x", color=style["color"], clip_on=False, zorder=3)
        axes.set_title(f"lr {short(lr)}", fontsize=9)
        axes.set_yscale(scale)
        axes.set_xlabel("step")
        axes.set_ylabel(name)

    return [partial(draw, lr=lr) for lr in summary.lrs] if _logged(summary, tag) else []


def _average(runs: Sequence[Result], tag: str) -> tuple[dict[int, float], dict[int, float]]:
    """The mean of several seeds at every step that was logged by all runs that get there.

    Seeds log at the same steps, but a run that diverges ends early. A mean that silently continued with the
    others would look better the more runs diverge, so the survivors are kept apart.

    Returns:
        Step to mean while all runs train, and the mean of the longer runs from the last of those steps on.
    """
    series = [_finite(run, tag) for run in runs]
    together: dict[int, float] = {}
    survivors: dict[int, float] = {}
    for step in sorted({step for each in series for step in each}):
        going = [each for each in series if each and max(each) >= step]
        if all(step in each for each in going):
            mean = statistics.fmean(each[step] for each in going)
            (together if len(going) == len(series) else survivors)[step] = mean
    if together and survivors:
        last = max(together)
        survivors = {last: together[last]} | survivors
    return together, survivors


def differences(summary: Summary, styles: dict[str, Style]) -> list[Panel]:
    """A forest plot of each arm's differences to the baseline."""
    measured = [each for each in summary.differences if each.mean is not None]
    rows = list(dict.fromkeys((each.quantity, each.lr) for each in measured))
    rows.sort(key=lambda row: (row[0] != "loss", row[1] or 0.0))
    margin = summary.plan.margin
    linear = 2 * (margin or 0.01)
    ends = [end for each in measured for end in (each.low, each.mean, each.high) if end is not None]
    reach = max(map(abs, ends), default=0.0)

    def draw(axes: "Axes", arm: str, baseline: str) -> None:
        from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

        axes.axvline(0, color="grey", linewidth=0.8)
        if margin:
            axes.axvspan(-margin, margin, color="grey", alpha=0.2, linewidth=0)
        colour, marker = styles[arm]["color"], styles[arm]["marker"]
        for each in measured:
            if (each.arm, each.baseline) == (arm, baseline):
                y = rows.index((each.quantity, each.lr))
                sure = each.p_holm is not None and each.p_holm < LEVEL
                assert each.mean is not None
                if each.low is not None and each.high is not None:
                    axes.plot([each.low, each.high], [y, y], color=colour, linewidth=1.4)
                face = colour if sure else "none"
                axes.plot(each.mean, y, marker, color=colour, markersize=5, markerfacecolor=face)
        axes.set_title(as_written(f"{arm} - {baseline}"), fontsize=9)
        if reach > linear:
            axes.set_xscale("symlog", linthresh=linear)
            subs = [1, 2, 5] if reach < 5 * linear else [1]
            axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=subs))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("difference (nats)")
        axes.set_yticks(range(len(rows)), [f"lr {short(lr)}" if q == "loss" else q for q, lr in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)

    pairs = dict.fromkeys((each.arm, each.baseline) for each in measured)
    return [partial(draw, arm=arm, baseline=baseline) for arm, baseline in pairs]


def speed(summary: Summary, _: dict[str, Style]) -> list[Panel]:
    """Throughput of each method, and how long its runs took, a point per run."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in summary.fits:
        for run in arm.runs:
            for name, tag in {"tokens / s": "perf/tokens_per_s", "images / s": "perf/images_per_s"}.items():
                if rates := _finite(run, tag):
                    found.setdefault(name, {}).setdefault(arm.method, []).append(
                        statistics.median(rates.values())
                    )
            record = Record.read(run.folder)
            if record and record.status == "done":
                found.setdefault("minutes per run", {}).setdefault(arm.method, []).append(record.seconds / 60)

    def draw(axes: "Axes", name: str) -> None:
        for place, (method, values) in enumerate(found[name].items()):
            colour, marker = look_of(method)
            axes.barh(place, statistics.fmean(values), color=colour, alpha=0.35)
            axes.plot(values, [place] * len(values), marker, color=colour, markersize=4, linestyle="")
        axes.set_yticks(range(len(found[name])), [as_written(method) for method in found[name]])
        axes.set_ylim(max(len(found[name]), 3) - 0.5, -0.5)
        axes.set_xlabel(name)

    return [partial(draw, name=name) for name in found]


def _finite(run: Result, tag: str) -> dict[int, float]:
    """The finite values of a series."""
    return {step: value for step, value in run.scalars.get(tag, {}).items() if math.isfinite(value)}


def _logged(summary: Summary, tag: str) -> bool:
    return any(_finite(run, tag) for arm in summary.fits for run in arm.runs)

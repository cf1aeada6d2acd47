"""Pictures over bit widths: loss against bits and size, and maps of the loss over learning rates and bits.

A line is all arms that differ in their bits only. Each arm is drawn at its best learning rate, with the loss
that is reported for it.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from stableqat.analysis.comparison import ArmSummary, Summary
from stableqat.analysis.panels import Panel, band
from stableqat.analysis.style import LINES, Style, as_written, look_of
from stableqat.studies.study import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = dict[str, dict[float, ArmSummary]]  # name of a line to bits to arm


def bits(summary: Summary, _: dict[str, Style]) -> list[Panel]:
    """Reported loss against bits, a line per method, for each family of two widths or more."""

    def draw(axes: "Axes", images: bool) -> None:
        trained, rounded = lines[images], _lines(summary, "ptq", images)
        _draw_lines(axes, trained, rounded, lambda arm, shift: _width(arm) + 0.03 * shift)
        for arm in summary.arms:
            if arm.kind == "fp" and arm.images == images and (loss := _reported(arm)) is not None:
                axes.axhline(loss, color="black", linewidth=0.9, label=as_written(arm.label), zorder=1)
        widths = sorted(_places(trained, _width))
        axes.set_xticks(widths, [short(width) for width in widths])
        _finish(axes, "bits", images if len(families) > 1 else None)

    lines = {images: _lines(summary, "fit", images) for images in (False, True)}
    families = [images for images in lines if len(_places(lines[images], _width)) > 1]
    return [partial(draw, images=images) for images in families]


def sizes(summary: Summary, _: dict[str, Style]) -> list[Panel]:
    """Reported loss against deployed size and its Pareto front, for each family of two sizes or more."""

    def draw(axes: "Axes", images: bool) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        trained, rounded = lines[images], _weighed(_lines(summary, "ptq", images))
        _draw_lines(axes, trained, rounded, lambda arm, shift: (arm.megabytes or 0.0) * 1.012**shift)
        known = [arm for each in (trained, rounded) for arms in each.values() for arm in arms.values()]
        known += [arm for arm in summary.arms if arm.method == "FP" and arm.images == images]
        found = []
        for arm in known:
            if arm.megabytes and (loss := _reported(arm)) is not None:
                found.append((arm.megabytes, loss))
                if arm.method == "FP":
                    marker, label = {"fp": "*", "fit": "."}[arm.kind], as_written(arm.label)
                    axes.plot(*found[-1], marker, color="black", markersize=8, label=label)
        front = pareto(found)
        x, y = zip(*front, (max(place for place, _ in found), front[-1][1]), strict=True)
        axes.step(x, y, where="post", color="0.85", linewidth=6, zorder=0, label="Pareto front")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=[1, 2, 3, 5, 7]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        _finish(axes, "deployed size (MB)", images if len(families) > 1 else None)

    lines = {images: _weighed(_lines(summary, "fit", images)) for images in (False, True)}
    families = [images for images in lines if len(_places(lines[images], lambda arm: arm.megabytes)) > 1]
    return [partial(draw, images=images) for images in families]


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other is smaller and has a loss as low, from the smallest to the lowest.

    Args:
        points: Sizes and losses.
    """
    front: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    return front


def _draw_lines(
    axes: "Axes", trained: Lines, rounded: Lines, place: Callable[[ArmSummary, float], float]
) -> None:
    """Draw the reported loss of arms.

    Args:
        axes: Where.
        trained: Lines of arms that train.
        rounded: Lines of arms that are only rounded.
        place: The abscissa of an arm; its second argument sets lines side by side.
    """
    variants: dict[str, int] = {}
    for number, (name, arms) in enumerate(trained.items()):
        method = next(iter(arms.values())).method
        colour, marker = look_of(method)
        variants[method] = variants.get(method, -1) + 1
        x = [place(arm, number - (len(trained) - 1) / 2) for arm in arms.values()]
        samples = [arm.selected.losses for arm in arms.values() if arm.selected]
        y = [statistics.fmean(sample) for sample in samples]
        look = {"color": colour, "marker": marker, "linestyle": LINES[variants[method] % len(LINES)]}
        axes.plot(x, y, markersize=5, linewidth=1.4, label=as_written(name), **look)
        for at, sample in zip(x, samples, strict=True):
            axes.plot([at, at], band(sample), color=colour, linewidth=1.4)
    for number, (name, arms) in enumerate(rounded.items()):
        losses = {place(arm, 0.0): loss for arm in arms.values() if (loss := _reported(arm)) is not None}
        look = {"color": "grey", "marker": ".", "linestyle": LINES[(number + 1) % len(LINES)]}
        axes.plot(list(losses), list(losses.values()), linewidth=0.9, label=as_written(name), **look)


def _finish(axes: "Axes", abscissa: str, images: bool | None) -> None:
    axes.set_xlabel(abscissa)
    axes.set_ylabel("validation loss (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8, frameon=False, handlelength=3.5)
    if images is not None:
        axes.set_title("images" if images else "text", fontsize=9)


def maps(summary: Summary, _: dict[str, Style]) -> list[Panel]:
    """The loss over learning rates and bits, a panel per method, all of a family in the same colours."""

    def draw(axes: "Axes", name: str, arms: dict[float, ArmSummary], losses: list[float]) -> None:
        low, high = min(losses), max(losses)
        table = [[_mean(arm, lr) for lr in summary.lrs] for arm in arms.values()]
        axes.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
        for row, arm in enumerate(arms.values()):
            for column, lr in enumerate(summary.lrs):
                if lr in arm.cells:
                    lost = " x" if arm.cells[lr].diverged else ""
                    best = arm.selected is not None and arm.selected.lr == lr
                    dark = (table[row][column] - low) > 0.5 * (high - low)
                    axes.text(
                        column,
                        row,
                        f"{table[row][column]:.3f}{lost}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        fontweight="bold" if best else "normal",
                        color="white" if dark else "black",
                    )
        axes.grid(visible=False)
        axes.set_xticks(range(len(summary.lrs)), [short(lr) for lr in summary.lrs], fontsize=8)
        axes.set_yticks(range(len(arms)), [short(width) for width in arms])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("bits")
        axes.set_title(as_written(name), fontsize=9)

    panels: list[Panel] = []
    for images in (False, True):
        lines = {name: arms for name, arms in _lines(summary, "fit", images).items() if len(arms) > 1}
        losses = [
            value
            for arms in lines.values()
            for arm in arms.values()
            for lr in arm.cells
            if math.isfinite(value := _mean(arm, lr))
        ]
        if losses and len(summary.lrs) > 1:
            panels += [partial(draw, name=name, arms=arms, losses=losses) for name, arms in lines.items()]
    return panels


def _mean(arm: ArmSummary, lr: float) -> float:
    """The mean of min(loss, cap); nan where nothing ran."""
    return statistics.fmean(arm.cells[lr].capped.values()) if lr in arm.cells else math.nan


def _reported(arm: ArmSummary) -> float | None:
    """The loss of the batches that arms which train report, so that all lie on one axis."""
    return next((v for key, v in arm.figures.items() if key.startswith("reported loss")), None)


def _width(arm: ArmSummary) -> float:
    width: float = arm.hparams["bits"]
    return width


def _places(lines: Lines, place: Callable[[ArmSummary], Any]) -> set[Any]:
    """Where the arms of lines lie on an axis."""
    return {place(arm) for arms in lines.values() for arm in arms.values()}


def _weighed(lines: Lines) -> Lines:
    """The arms of lines whose size is known."""
    found = {name: {k: arm for k, arm in arms.items() if arm.megabytes} for name, arms in lines.items()}
    return {name: arms for name, arms in found.items() if arms}


def _lines(summary: Summary, kind: str, images: bool) -> Lines:
    found: Lines = {}
    for arm in summary.arms:
        width = arm.hparams.get("bits")
        if arm.kind == kind and arm.images == images and width is not None and arm.method != "FP":
            own = f"{short(width)}-bit"
            name = " ".join(word for word in arm.label.split(" ") if word != own)
            found.setdefault(name, {})[width] = arm
    return {name: dict(sorted(arms.items())) for name, arms in found.items()}

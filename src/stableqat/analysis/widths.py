"""Pictures over bit widths: loss against bits, and maps of the loss over learning rates and bits.

A line is all arms that differ in their bits only. Each arm is drawn at its best learning rate, with the loss
that is reported for it.
"""

import math
import statistics
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

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
        trained, rounded = _lines(summary, "fit", images), _lines(summary, "ptq", images)
        variants: dict[str, int] = {}
        for number, (name, arms) in enumerate(trained.items()):
            method = next(iter(arms.values())).method
            colour, marker = look_of(method)
            variants[method] = variants.get(method, -1) + 1
            x = [width + 0.03 * (number - (len(trained) - 1) / 2) for width in arms]  # side by side
            samples = [list(arm.selected.by_seed.values()) for arm in arms.values() if arm.selected]
            y = [statistics.fmean(sample) for sample in samples]
            look = {"color": colour, "marker": marker, "linestyle": LINES[variants[method] % len(LINES)]}
            axes.plot(x, y, markersize=5, linewidth=1.4, label=as_written(name), **look)
            for place, sample in zip(x, samples, strict=True):
                axes.plot([place, place], band(sample), color=colour, linewidth=1.4)
        for number, (name, arms) in enumerate(rounded.items()):
            losses = {width: loss for width, arm in arms.items() if (loss := _reported(arm)) is not None}
            look = {"color": "grey", "marker": ".", "linestyle": LINES[(number + 1) % len(LINES)]}
            axes.plot(list(losses), list(losses.values()), linewidth=0.9, label=as_written(name), **look)
        for arm in summary.arms:
            if arm.kind == "fp" and arm.images == images and (loss := _reported(arm)) is not None:
                axes.axhline(loss, color="black", linewidth=0.9, label=as_written(arm.label), zorder=1)
        widths = sorted({width for arms in trained.values() for width in arms})
        axes.set_xticks(widths, [short(width) for width in widths])
        axes.set_xlabel("bits")
        axes.set_ylabel("validation loss (nats)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8, frameon=False, handlelength=3.5)
        if len(families) > 1:
            axes.set_title("images" if images else "text", fontsize=9)

    families = [images for images in (False, True) if _several(_lines(summary, "fit", images).values())]
    return [partial(draw, images=images) for images in families]


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


def _several(lines: Iterable[dict[float, ArmSummary]]) -> bool:
    return len({width for arms in lines for width in arms}) > 1


def _lines(summary: Summary, kind: str, images: bool) -> Lines:
    found: Lines = {}
    for arm in summary.arms:
        width = arm.hparams.get("bits")
        if arm.kind == kind and arm.images == images and width is not None and arm.method != "FP":
            own = f"{short(width)}-bit"
            name = " ".join(word for word in arm.label.split(" ") if word != own)
            found.setdefault(name, {})[width] = arm
    return {name: dict(sorted(arms.items())) for name, arms in found.items()}

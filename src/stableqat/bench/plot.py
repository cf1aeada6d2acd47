"""The picture of a benchmark, from its JSON: one panel per question, one row per arm.

Dots are medians of the ratios to full precision, thick bars their quartiles, thin bars their smallest and
largest; the vertical line is full precision itself, or a plain copy for the kernels.
"""

from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from stableqat.analysis.style import FILLS, as_written, look_of
from stableqat.bench.report import FULL_PRECISION, copy_shares, memory_ratio, ratios, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_FORWARD_BACKWARD = "forward_backward_ms"


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture as PNG.

    Args:
        result: What the benchmark's JSON holds.
        path: File to write, whatever its name ends in.
    """
    from matplotlib.figure import Figure

    modes, kernels = result["modes"], result["kernels"]
    arms = list(dict.fromkeys(arm for mode in modes.values() for arm in mode if arm != FULL_PRECISION))
    measured = any(memory_ratio(mode, arm) for mode in modes.values() for arm in arms)
    panels = len(modes) + measured + bool(kernels)
    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(
        figsize=(1.2 + 3.6 * columns, 0.4 + rows * (1.1 + 0.36 * len(arms))), layout="constrained"
    )
    heading = as_written(f"{title(result)}; {result['device']}", int(13 * figure.get_figwidth()))
    figure.suptitle(heading, fontsize=10)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in grid[panels:]:
        axes.set_visible(False)
    grid = grid[:panels]
    for axes, (name, mode) in zip(grid, modes.items(), strict=False):
        _draw_times(axes, mode, arms)
        axes.set_title(f"{name}: forward + backward", fontsize=9)
        axes.set_xlabel("time / full precision")
    if measured:
        _draw_memory(grid[len(modes)], modes, arms)
    if kernels:
        _draw_kernels(grid[-1], kernels, arms)
    for axes in grid:
        axes.margins(x=0.1)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(1, color="black", linewidth=1, zorder=1)
    grid[0].set_yticks(range(len(arms)), map(as_written, arms))
    grid[0].set_ylim(len(arms) - 0.4, -0.6)
    figure.savefig(path, format="png", dpi=150)


def _draw_times(axes: "Axes", mode: dict[str, Any], arms: list[str]) -> None:
    for place, arm in enumerate(arms):
        if values := ratios(mode, arm, _FORWARD_BACKWARD):
            _draw_spread(axes, values, place, arm)
        else:
            look: dict[str, Any] = {"color": "grey", "fontsize": 8, "ha": "center", "va": "center"}
            axes.text(0.5, place, "failed", transform=axes.get_yaxis_transform(), **look)


def _draw_memory(axes: "Axes", modes: dict[str, Any], arms: list[str]) -> None:
    offsets = _offsets(len(modes))
    for number, (name, mode) in enumerate(modes.items()):
        axes.plot([], [], "o", color="grey", fillstyle=FILLS[number], linestyle="none", label=name)
        for place, arm in enumerate(arms):
            if ratio := memory_ratio(mode, arm):
                colour, marker = look_of(arm)
                axes.plot(ratio, place + offsets[number], marker, color=colour, fillstyle=FILLS[number])
    axes.set_title("peak memory", fontsize=9)
    axes.set_xlabel("memory / full precision")
    _legend(axes)


def _draw_kernels(axes: "Axes", kernels: dict[str, Any], arms: list[str]) -> None:
    for number, what in enumerate(("forward", "backward")):
        offset = _offsets(2)[number]
        axes.plot([], [], "o", color="grey", fillstyle=FILLS[number], linestyle="none", label=what)
        for place, arm in enumerate(arms):
            if arm in kernels[what]:
                shares = copy_shares(kernels, what, arm)
                _draw_spread(axes, shares, place + offset, arm, FILLS[number])
    axes.set_title("kernels alone", fontsize=9)
    axes.set_xlabel("bandwidth / copy")
    _legend(axes)


def _legend(axes: "Axes") -> None:
    """Below the panel, where it covers no data."""
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=3, frameon=False)


def _draw_spread(axes: "Axes", values: list[float], height: float, arm: str, fill: str = "full") -> None:
    colour, marker = look_of(arm)
    axes.plot([min(values), max(values)], [height] * 2, color=colour, linewidth=1)
    if len(values) > 1:
        low, _, high = quantiles(values, n=4, method="inclusive")
        axes.plot([low, high], [height] * 2, color=colour, linewidth=4, alpha=0.5, solid_capstyle="butt")
    axes.plot(median(values), height, marker, color=colour, fillstyle=fill, markersize=6)


def _offsets(number: int) -> list[float]:
    """Return heights around a row's own, so that equal values do not hide each other."""
    return [0.22 * (place - (number - 1) / 2) for place in range(number)]

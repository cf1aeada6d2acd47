"""The pictures of `stableqat landscape`: lines, maps, basins, and the losses over training."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.analysis.style import as_written
from stableqat.files import whole_file
from stableqat.landscape.trajectory import losses_over_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Panel = Callable[[Axes], None]

ANCHORS = {
    "start": ("start", "o"),
    "start_deployed": ("start, rounded", "s"),
    "trained": ("trained", "^"),
    "trained_deployed": ("trained, deployed", "*"),
}


def draw(records: dict[str, dict[str, Any]], folders: dict[str, Path | None], out: Path) -> list[Path]:
    """Draw what records hold.

    Args:
        records: By run.
        folders: The runs' folders, with their event files.
        out: Folder for the pictures, which replace those of an earlier call.

    Returns:
        The files.
    """
    pages = {
        "lines": {name: _lines(r["lines"]) for name, r in records.items() if "lines" in r},
        "map": {name: _map(r["map"]) for name, r in records.items() if "map" in r},
        "basin": {name: _basin(r["basin"]) for name, r in records.items() if "basin" in r},
        "trajectory": {name: panel for name in records if (panel := _trajectory(folders[name])) is not None},
    }
    made = []
    for page, panels in pages.items():
        if panels:
            with whole_file(out / f"{page}.png") as part:
                _figure(panels).savefig(part, format="png", dpi=130)
            made.append(out / f"{page}.png")
    return made


def _figure(panels: "dict[str, Panel]") -> "Figure":
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.6, 5.0 * columns), 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, panel) in zip(grid, panels.items(), strict=False):
        axes.set_title(as_written(name), fontsize=10)
        panel(axes)
    return figure


def _lines(record: dict[str, Any]) -> "Panel":
    def panel(axes: "Axes") -> None:
        shares = record["shares"]
        for number, (name, values) in enumerate((k, v) for k, v in record.items() if k != "shares"):
            axes.plot(shares, _numbers(values["loss"]), color=f"C{number}", label=name)
            if "predicted" in values:
                predicted = _numbers(values["predicted"])
                axes.plot(shares, predicted, color=f"C{number}", linestyle=":", label=f"{name}, predicted")
        axes.set_xlabel("share of the way")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return panel


def _map(record: dict[str, Any]) -> "Panel":
    def panel(axes: "Axes") -> None:
        losses = [_numbers(row) for row in record["loss"]]
        drawn = axes.contourf(record["x"], record["y"], losses, levels=24, cmap="viridis")
        axes.figure.colorbar(drawn, ax=axes, label="loss")
        ways = [record["places"]["start"][:2], record["places"]["trained"][:2]]
        axes.plot(*zip(*ways, strict=True), color="white", linewidth=1, label="start to trained")
        if record["way"]:
            xs, ys = zip(*(each[1:3] for each in record["way"]), strict=True)
            axes.plot(xs, ys, color="red", linewidth=1, marker=".", markersize=3, label="deployed, training")
        for key, (name, marker) in ANCHORS.items():
            x, y, _ = record["places"][key]
            axes.plot(x, y, marker, color="white", markeredgecolor="black", label=name)
        for number, (name, (x, y, *_)) in enumerate(record["others"].items()):
            axes.plot(x, y, "X", color=f"C{number + 1}", markeredgecolor="black", label=as_written(name))
        axes.set_xlabel("towards the rounded start")
        axes.set_ylabel("towards the deployed model")
        axes.legend(fontsize=6)

    return panel


def _basin(record: dict[str, Any]) -> "Panel":
    def panel(axes: "Axes") -> None:
        places = range(len(record))
        looks = {
            "rounding": ("rounding error", "k_"),
            "random": ("radius, random", "o"),
            "top": ("radius, steepest", "v"),
            "top_reach": ("rounding along the steepest", "_"),
        }
        for key, (label, look) in looks.items():
            values = [each[key] for each in record.values()]
            axes.plot(places, _numbers(values), look, label=label)
        axes.set_yscale("log")
        axes.set_ylabel("steps of the grid (root mean square)")
        axes.set_xticks(places, map(as_written, record), rotation=90, fontsize=6)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=7)

    return panel


def _trajectory(folder: Path | None) -> "Panel | None":
    if folder is None:
        return None
    found = losses_over_steps(folder)
    if not found:
        return None

    def panel(axes: "Axes") -> None:
        for name, values in found.items():
            axes.plot(list(values), list(values.values()), marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return panel


def _numbers(values: list[float | None]) -> list[float]:
    """Values for a picture, with gaps where they are unknown or not finite."""
    return [value if value is not None and isfinite(value) else float("nan") for value in values]

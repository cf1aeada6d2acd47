"""The pictures of `stableqat diagnose`: maps of layers and widths, and predicted against actual losses."""

import re
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.diagnose.verdict import METHODS
from stableqat.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
LEAST = 1e-5  # rise of a loss that a picture tells from none


def draw(table: list[Row], chosen: dict[str, dict[str, int]], out: Path) -> list[Path]:
    """Draw the table.

    Args:
        table: A row per layer and width.
        chosen: By size budget, the width of each layer.
        out: Folder for the pictures.

    Returns:
        The files.
    """
    widths = list(dict.fromkeys(row["bits"] for row in table))
    pages = {
        "loss": _losses(table, widths),
        "basin": _basins(table, widths),
        "predicted": [[_against(table, widths, method) for method in METHODS]],
        "widths": [[_chosen(table, widths, budget, own)] for budget, own in chosen.items()],
    }
    return [_page(panels, out / f"{name}.png") for name, panels in pages.items() if panels]


Panel = Callable[["Axes"], None]


def _page(panels: list[list[Panel]], file: Path) -> Path:
    from matplotlib.figure import Figure

    columns = len(panels[0])
    size = (max(7.5, 6.5 * columns), 0.4 + 2.4 * len(panels) if columns * len(panels) > 2 else 4.2)
    figure = Figure(figsize=size, layout="constrained")
    for line, own in zip(figure.subplots(len(panels), columns, squeeze=False), panels, strict=True):
        for axes, panel in zip(line, own, strict=True):
            panel(axes)
    with whole_file(file) as part:
        figure.savefig(part, format="png", dpi=130)
    return file


def _losses(table: list[Row], widths: list[int]) -> list[list[Panel]]:
    from matplotlib.colors import LogNorm

    highest = max(LEAST * 10, *(row[f"{method} actual"] for row in table for method in METHODS))
    look = {"norm": LogNorm(LEAST, highest), "cmap": "viridis", "label": "rise of the loss"}

    def panel(bits: int, method: str) -> Panel:
        title = f"{METHODS[method]}, {bits} bits"
        return _map(table, bits, title, lambda row: max(row[f"{method} actual"], LEAST), look)

    return [[panel(bits, method) for method in METHODS] for bits in widths]


def _basins(table: list[Row], widths: list[int]) -> list[list[Panel]]:
    from matplotlib.colors import LogNorm

    look = {"norm": LogNorm(1 / 16, 16), "cmap": "RdBu_r", "label": "grid step / basin width"}
    return [[_map(table, bits, f"{bits} bits", lambda row: row["step / width"], look)] for bits in widths]


def _chosen(table: list[Row], widths: list[int], budget: str, own: dict[str, int]) -> Panel:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(colormaps["viridis_r"].resampled(len(widths)).colors)  # type: ignore[attr-defined]
    look = {"norm": BoundaryNorm([-0.5 + i for i in range(len(widths) + 1)], len(widths)), "cmap": colours}
    look |= {"label": "bits", "ticks": dict(enumerate(widths))}
    title = f"at most {budget} bits per weight"
    return _map(table, widths[0], title, lambda row: widths.index(own[row["layer"]]), look)


def _map(
    table: list[Row], bits: int, title: str, value: Callable[[Row], float | None], look: dict[str, Any]
) -> Panel:
    """A cell per layer: blocks from left to right, the layers of a block from top to bottom."""
    own = [row for row in table if row["bits"] == bits]
    kinds = list(dict.fromkeys(_within_block(row["layer"]) for row in own))
    blocks = sorted({row["block"] for row in own})
    cells = [[nan] * len(blocks) for _ in kinds]
    for row in own:
        found = value(row)
        place = kinds.index(_within_block(row["layer"])), blocks.index(row["block"])
        cells[place[0]][place[1]] = nan if found is None else found

    def panel(axes: "Axes") -> None:
        image = axes.imshow(cells, aspect="auto", norm=look["norm"], cmap=look["cmap"])
        bar = axes.figure.colorbar(image, ax=axes, ticks=list(look.get("ticks", ())) or None)
        bar.set_label(look["label"], fontsize=8)
        bar.ax.tick_params(labelsize=7)
        if "ticks" in look:
            bar.ax.set_yticklabels(map(str, look["ticks"].values()))
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_xticks(
            range(0, len(blocks), -(-len(blocks) // 16)), blocks[:: -(-len(blocks) // 16)], fontsize=7
        )
        axes.set_xlabel("block", fontsize=8)
        axes.set_title(title, fontsize=9)

    return panel


def _against(table: list[Row], widths: list[int], method: str) -> Panel:
    def panel(axes: "Axes") -> None:
        seen: list[float] = []
        for number, bits in enumerate(widths):
            own = [row for row in table if row["bits"] == bits]
            xs, ys = ([max(row[f"{method} {key}"], LEAST) for row in own] for key in ("predicted", "actual"))
            axes.plot(xs, ys, ".", color=f"C{number}", markersize=4, label=f"{bits} bits")
            seen += [*xs, *ys]
        axes.plot([LEAST, max(seen)], [LEAST, max(seen)], color="black", linewidth=0.8, label="as predicted")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("predicted rise of the loss")
        axes.set_ylabel("actual")
        axes.set_title(METHODS[method], fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return panel


def _within_block(name: str) -> str:
    """A layer's name after its block's number."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]

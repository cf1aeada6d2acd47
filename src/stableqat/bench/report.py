"""A benchmark's result as tables, from the JSON alone, so that they can be made again later.

Times are medians over rounds. Ratios to full precision are taken within a round, between passes a few seconds
apart, and given as median, smallest and largest.
"""

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

FULL_PRECISION = "FP"
NOTES = (
    "Medians over rounds; ratios to full precision are taken within a round: median (smallest-largest)."
    " A step is forward, backward and AdamW. Peak: of forward and backward, with the model's own parameters"
    " and without optimizer states. State: parameters and optimizer states, without gradients."
    " GB = 10^9 bytes."
)
Row = dict[str, str]  # text by column; trailing blanks tell equal titles apart
_TITLES = {
    "eager": "Eager",
    "compiled": "Compiled (torch.compile, block by block)",
    "graphed": "Graphed (compiled blocks, replayed as CUDA graphs)",
}


def ratios(mode: dict[str, Any], arm: str, key: str) -> list[float]:
    """Divide an arm's times by full precision's, round by round; empty if either was not measured.

    Args:
        mode: A mode's results by arm.
        arm: Name of the arm.
        key: Which times, such as `step_ms`.
    """
    mine, base = (mode.get(name, {}).get(key) or [] for name in (arm, FULL_PRECISION))
    return [a / b for a, b in zip(mine, base, strict=False)]


def memory_ratio(mode: dict[str, Any], arm: str) -> float | None:
    """Divide an arm's peak memory by full precision's; None if either was not measured."""
    mine, base = (mode.get(name, {}).get("peak_bytes") for name in (arm, FULL_PRECISION))
    return mine / base if mine and base else None


def copy_shares(kernels: dict[str, Any], what: str, method: str) -> list[float]:
    """Return a method's bandwidth in `forward` or `backward` as a share of the copy's, round by round."""
    record, copy = kernels[what][method], kernels["copy"]
    return [
        (record["bytes"] / mine) / (copy["bytes"] / base)
        for mine, base in zip(record["ms"], copy["ms"], strict=True)
    ]


def markdown(result: dict[str, Any]) -> str:
    """Write the result in Markdown."""
    blocks = [f"# {title(result)}", "\n".join(f"- {line}" for line in header(result))]
    for name, rows, remarks in _tables(result):
        blocks.append(f"## {name}\n\n{_grid(rows)}")
        blocks += ["\n".join(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n\n".join([*blocks, NOTES]) + "\n"


def terminal(result: dict[str, Any]) -> Iterator[Table | str]:
    """Yield the result for a terminal: lines and tables in order."""
    yield "\n".join([title(result), *header(result), ""])
    for name, rows, remarks in _tables(result):
        table = Table(title=name, box=SIMPLE_HEAD, padding=(0, 1), title_justify="left")
        for number, key in enumerate(rows[0]):
            table.add_column(key, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row.values())
        yield table
        yield from remarks
    yield NOTES


def title(result: dict[str, Any]) -> str:
    """Return model, shape, precision and width in a line."""
    settings = result["settings"]
    unit = f"x {settings['tokens']} tokens" if settings["tokens"] else "images"
    loss = f", {settings['loss']} loss" if settings.get("loss") else ""  # older files do not have it
    shape = f"{settings['batch']} {unit}, {settings['precision']}, {settings['bits']} bits"
    return f"{settings['model']}, {shape}{loss}"


def header(result: dict[str, Any]) -> list[str]:
    """Return what one has to know to repeat the run."""
    seeds = ", ".join(map(str, result["seeds"]))
    return [
        f"`{result['command']}`",
        f"{result['device']}, {result['date']}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"{result['settings']['rounds']} rounds in turn; inputs of seeds {seeds}; random weights",
    ]


def _tables(result: dict[str, Any]) -> Iterator[tuple[str, list[Row], list[str]]]:
    """Yield title, rows and remarks of each table."""
    settings = result["settings"]
    for name, mode in result["modes"].items():
        rows = [_row(mode, arm, settings) for arm in mode]
        remarks = [f"{arm} failed: {record['failed']}" for arm, record in mode.items() if "failed" in record]
        yield _TITLES[name], rows, remarks
    if kernels := result["kernels"]:
        size = " x ".join(map(str, kernels["shape"]))
        yield f"Fake quantization alone, {size}, float32 in, bfloat16 out", _kernel_rows(kernels), []


def _row(mode: dict[str, Any], arm: str, settings: dict[str, Any]) -> Row:
    record = mode[arm]
    step, peak, memory = record.get("step_ms"), record.get("peak_bytes"), memory_ratio(mode, arm)
    state = record.get("state_bytes")  # older files do not have it
    return {
        "arm": f"{arm} (failed)" if "failed" in record else arm,
        "kernels": record.get("path") or "-",
        "forward ms": _median(record.get("forward_ms")),
        "backward ms": _median(record.get("backward_ms")),
        "fwd + bwd ms": _median(record.get("forward_backward_ms")),
        "ratio to FP": _spread(ratios(mode, arm, "forward_backward_ms")),
        "step ms": _median(step),
        "ratio to FP ": _spread(ratios(mode, arm, "step_ms")),
        f"{settings['unit']}/s": f"{settings['items'] / median(step) * 1e3:,.0f}" if step else "-",
        "peak GB": f"{peak / 1e9:.2f}" if peak else "-",
        "ratio to FP  ": f"{memory:.3f}" if memory else "-",
        "state GB": f"{state / 1e9:.2f}" if state else "-",
    }


def _kernel_rows(kernels: dict[str, Any]) -> list[Row]:
    rows = []
    for name in ("copy", *kernels["forward"]):
        row = {"kernel": name}
        for what in ("forward", "backward"):
            record = kernels["copy"] if name == "copy" else kernels[what][name]
            shares = [] if name == "copy" else copy_shares(kernels, what, name)
            row[f"{what} ms"] = f"{median(record['ms']):.4f}"
            row[f"{what} TB/s"] = f"{record['bytes'] / median(record['ms']) / 1e9:.2f}"
            row[f"{what} / copy"] = _spread(shares)
        rows.append(row)
    return rows


def _median(values: list[float] | None) -> str:
    return f"{median(values):.2f}" if values else "-"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{median(values):.3f}" + (f" ({low}-{high})" if low != high else "")


def _grid(rows: list[Row]) -> str:
    lines = [[key.strip() for key in rows[0]], *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)

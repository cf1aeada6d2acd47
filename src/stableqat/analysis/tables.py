"""A comparison as text: Markdown to read, CSV and JSON to compute with.

Markdown begins with what the comparison says, and has up to four tables: what the arms reach, their losses by
learning rate, how calm training was, and the differences from the baseline; columns that no arm fills are
left out. CSV has the first three, one row per arm, unrounded. JSON has everything down to the single runs,
with null for values that are not finite, so that any parser reads it.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stableqat.analysis.comparison import ArmSummary, Cell, Summary
from stableqat.analysis.conclusions import conclusions
from stableqat.analysis.differences import Difference
from stableqat.analysis.notes import notes
from stableqat.analysis.sensitivity import Band
from stableqat.analysis.stability import FIGURES
from stableqat.studies.study import short


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: Its title; empty for the first one.
        lines: Its lines of cells, the first of them the header.
        best: Line and column of the cells to mark, see `best`.
    """

    title: str
    lines: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Page:
    """A comparison as people read it.

    Attributes:
        summary: The figures.
        conclusions: What they say, in a paragraph for each group of arms.
        tables: Its tables.
        notes: What a reader needs to know about the tables, one paragraph per subject.
    """

    summary: Summary
    conclusions: list[str]
    tables: list[Table]
    notes: str


def write_page(summary: Summary) -> Page:
    """What a comparison says, its tables and their notes."""
    table = summary.rows
    calm = [key for key in table[0] if key in FIGURES]
    hidden = {*summary.columns, *calm, "edge", "divergence rate"}
    keys = [key for key in table[0] if key not in hidden]
    rates = [key for key in keys if key.startswith("lr ") and key != "lr sensitivity"]
    trained = {arm.label for arm in summary.arms if arm.kind == "fit"}

    def marked(title: str, rows: list[dict[str, Any]], keys: list[str]) -> Table:
        places = ((i, j, row["arm"], key) for i, row in enumerate(rows, 1) for j, key in enumerate(keys))
        best = {(i, j) for i, j, arm, key in places if arm in trained & {*summary.best.get(key, ())}}
        return Table(title, _lines(rows, keys), frozenset(best))

    if len(rates) > 1:  # what they come to first, as the rates may be many
        tables = [marked("", table, [key for key in keys if key not in rates])]
        fits = [row for row in table if any(row[key] is not None for key in rates)]
        tables.append(marked("Loss by learning rate", fits, ["arm", *rates]))
    else:
        tables = [marked("", table, keys)]
    if calm:
        fits = [row for row in table if row.get("divergence rate") is not None]
        tables.append(Table("Training", _lines(fits, ["arm", "divergence rate", *calm])))
    if any(each.n > 1 for each in summary.differences):
        tables.append(_differences(summary.differences))
    return Page(summary, conclusions(summary), tables, notes(summary))


def _differences(differences: list[Difference]) -> Table:
    several = len({each.baseline for each in differences}) > 1
    lines = []
    for each in differences:
        line = {"arm": each.arm, "baseline": each.baseline} if several else {"arm": each.arm}
        line["of"] = each.quantity if each.lr is None else f"{each.quantity} at {short(each.lr)}"
        line |= {"pairs": str(each.n), "difference": _number(each.mean, "+.4f"), "95% interval": "-"}
        if each.low is not None and each.high is not None:
            line["95% interval"] = f"[{each.low:+.4f}, {each.high:+.4f}]"
        line |= {"p": _number(each.p, ".2g"), "p (Holm)": _number(each.p_holm, ".2g")}
        lines.append(line | {"verdict": each.verdict})
    title = "Differences" if several else f"Differences from {differences[0].baseline}"
    return Table(title, [list(lines[0]), *(list(line.values()) for line in lines)])


def markdown(page: Page) -> str:
    """What the comparison says and its tables in Markdown, with their notes."""
    parts = [f"## {page.summary.name}", *page.conclusions]
    for table in page.tables:
        lines = [
            [f"**{cell}**" if (i, j) in table.best else cell for j, cell in enumerate(line)]
            for i, line in enumerate([[cell.replace("|", r"\|") for cell in line] for line in table.lines])
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
        text = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in ruled]
        parts += [f"### {table.title}"] if table.title else []
        parts.append("\n".join(text))
    return "\n\n".join([*parts, page.notes])


def comma_separated(pages: Sequence[Page]) -> str:
    """All rows as one CSV, unrounded; each learning rate has columns for mean, std, n and diverged."""
    flat = []
    for page in pages:
        for row in page.summary.rows:
            line: dict[str, Any] = {"study": page.summary.name}
            for key, value in row.items():
                if key.startswith("lr ") and key != "lr sensitivity":
                    parts: dict[str, Any] = dict.fromkeys(("mean", "std", "n", "diverged"))
                    parts |= _cell(value) if value else {}
                    line |= {f"{key} {part}": number for part, number in parts.items()}
                elif key == "usable octaves":
                    line[key] = value.octaves if value else None
                    ends = asdict(value) if value else {}
                    line |= {f"usable lr {name}": each for name, each in ends.items()}
                else:
                    line[key] = value
            flat.append(line)
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in flat for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def as_json(pages: Sequence[Page]) -> str:
    """Everything down to the runs, as strict JSON: null for values that are not finite."""
    studies = []
    for page in pages:
        summary = page.summary
        studies.append(
            {
                "study": summary.name,
                "conclusions": page.conclusions,
                "lrs": summary.lrs,
                "caps": [asdict(group) | asdict(cap) for group, cap in summary.caps.items()],
                "baseline": summary.plan.baseline,
                "margin": summary.plan.margin,
                "selected on": summary.selected_on,
                "reported on": summary.reported_on,
                "full precision": summary.full_precision,
                "arms": [_arm(arm) for arm in summary.arms],
                "differences": [asdict(each) for each in summary.differences],
                "notes": page.notes,
            }
        )
    return json.dumps(_strict({"studies": studies}), indent=1, allow_nan=False) + "\n"


def _arm(arm: ArmSummary) -> dict[str, Any]:
    cells = [
        {"lr": lr, **_cell(cell), "above": cell.above, "capped": cell.capped, **cell.stability}
        for lr, cell in arm.cells.items()
    ]
    runs = []
    for run, calm in zip(arm.runs, arm.calm, strict=True):
        about = {"run": run.folder.name, "lr": run.hparams.get("lr"), "seed": run.hparams.get("seed")}
        runs.append(about | {"diverged": run.diverged, "last": run.last} | calm)
    about = {"arm": arm.label, "kind": arm.kind, "hparams": arm.hparams}
    return about | {"figures": arm.figures, "cells": cells, "runs": runs}


def _cell(cell: Cell) -> dict[str, Any]:
    return {"mean": cell.mean, "std": cell.std, "n": len(cell.losses), "diverged": cell.diverged}


def _strict(value: Any) -> Any:
    if isinstance(value, Band):
        return asdict(value) | {"octaves": value.octaves}
    if isinstance(value, dict):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(table: list[dict[str, Any]], keys: list[str]) -> list[list[str]]:
    return [keys, *([_text(key, row) for key in keys] for row in table)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if isinstance(value, Cell):
        if value.diverged == len(value.losses):
            return "diverged"
        spread = "" if value.std is None else f" +- {value.std:.4f} ({len(value.losses)})"
        return f"{value.mean:.4f}{spread}" + (f", {value.diverged} diverged" if value.diverged else "")
    if isinstance(value, Band):
        ends = " to ".join(short(float(f"{lr:.2g}")) for lr in (value.low, value.high))
        return f"{'>= ' * value.open}{value.octaves:.2f} ({ends})"
    if value is None or value == "":
        return "-"
    if key == "selected lr":
        return short(value) + (f" ({row['edge']} edge)" if row["edge"] else "")
    if key == "lr sensitivity":
        one_sided = {"lower": " (upward)", "upper": " (downward)"}
        return f"{value:.4f}" + one_sided.get(row["edge"], "")
    if key == "deployed MB":
        return format(value, ".3g" if value < 100 else ".0f")
    forms = {"top-1": ".1%", "recovered": ".0%", "divergence rate": ".0%", "perplexity": ".2f"}
    forms |= {"reported loss": ".4f", "worst loss": ".4f"}
    if form := forms.get(key.partition(",")[0]):  # without the half of validation
        return format(value, form)
    return f"{value:.3g}" if isinstance(value, float) else short(value)

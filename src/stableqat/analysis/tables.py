"""A comparison as text: Markdown to read, CSV and JSON to compute with.

Markdown has up to three tables: losses, how calm training was, and the differences from the
baseline; columns that no arm fills are left out. CSV has the first two, a row an arm, unrounded. JSON
has everything down to the single runs; what is not finite there is null, so that any parser reads it.
"""

import csv
import io
import json
import math
import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stableqat.analysis.band import TOLERANCE, Band
from stableqat.analysis.comparison import TOP1, Arm, Cell, Comparison, diverged
from stableqat.analysis.labels import UNSET
from stableqat.analysis.stability import FEWEST, FLOOR, SIGMAS, WINDOW, stability
from stableqat.analysis.statistics import LEVEL
from stableqat.events import Run
from stableqat.studies.study import short
from stableqat.terminal import printable

PERPLEXITY = "val/perplexity"
ODD_HALF, ALL = ", odd batches", ", all batches"


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row an arm, column to value; full precision and PTQ at the top.

    Columns: "arm" (its label), hyper-parameters, "lr <x>" (a `Cell`) for each learning rate, figures. Columns
    that are empty in all rows are left out.
    """
    table = []
    for arm in comparison.arms:
        row: dict[str, Any] = {"arm": comparison.label(arm)}
        row |= {key: arm.hparams.get(key) for key in comparison.columns}
        if arm.kind == "fit":
            row |= {f"lr {short(lr)}": comparison.cell(arm, lr) for lr in comparison.lrs}
        else:
            row |= {"method": row["arm"] if arm.kind == "fp" else "PTQ", "mask": None}
            row |= {f"lr {short(lr)}": None for lr in comparison.lrs}
        table.append(row | _figures(comparison, arm))
    filled = [key for key in _keys(table) if any(row.get(key) is not None for row in table)]
    return [{key: row.get(key) for key in filled} for row in table]


def _figures(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    selected = comparison.selected(arm) if arm.kind == "fit" else None
    loss = selected.loss if selected else arm.mean(comparison.selection[1])
    figures: dict[str, Any] = {"selected lr": None, "edge": None}
    figures |= {"selected lr": selected.lr, "edge": selected.edge} if selected else {}
    figures |= {"reported loss" + _part(comparison): loss}
    figures |= _qualities(comparison, arm, selected.lr if selected else None)
    if selected is None:
        kept = ("recovered", "lr sensitivity", "usable octaves", "worst loss", "diverged", "divergence rate")
        return figures | dict.fromkeys(kept) | {"runs": len(arm.runs)}
    lost = sum(map(diverged, arm.runs))
    figures["recovered"] = comparison.recovered(arm)
    figures |= {"lr sensitivity": comparison.sensitivity(arm), "usable octaves": comparison.band(arm)}
    figures["worst loss"] = comparison.worst(arm)
    figures |= {"diverged": lost, "divergence rate": lost / len(arm.runs), "runs": len(arm.runs)}
    return figures | _stability(arm.runs)


def _part(comparison: Comparison) -> str:
    """Of which validation batches a reported figure is, where it is not of all."""
    on, reported = comparison.selection
    return ODD_HALF if on != reported else ""


def _qualities(comparison: Comparison, arm: Arm, lr: float | None) -> dict[str, float | None]:
    """Perplexity of the same batches as the reported loss, and top-1, which is logged of all only."""
    losses = arm.finals(comparison.selection[1], lr) if arm.logged(PERPLEXITY) else []
    perplexity = statistics.fmean(map(math.exp, losses)) if losses else None
    part = _part(comparison)
    return {"perplexity" + part: perplexity, "top-1" + ALL * bool(part): arm.mean(TOP1, lr)}


def _stability(runs: list[Run]) -> dict[str, float]:
    return stability(runs, [run for run in runs if not diverged(run)])


def notes(comparison: Comparison) -> str:
    """What has to be known to read the tables, a paragraph a subject."""
    if not comparison.fits:
        return "Validation loss in nats."
    table, (on, reported) = rows(comparison), comparison.selection
    edges = [f"{row['arm']} ({short(row['selected lr'])}, {row['edge']})" for row in table if row.get("edge")]
    texts = [
        "Validation loss in nats, mean +- standard deviation (runs) over seeds."
        f" Learning rates: {', '.join(map(short, comparison.lrs))}. {_about_caps(comparison)}; a diverged run"
        " counts as the cap.",
        "Selected lr: the smallest mean over seeds of min(loss, cap) on"
        + (
            f" {on}, the even validation batches; the reported loss is {reported}, of the odd ones, and so is"
            " the perplexity, its exp by seed. What is given by learning rate, LR sensitivity, worst loss and"
            " differences are of all batches."
            if on != reported
            else f" {on}; not all runs logged its two halves, so the loss of the same batches is reported"
            " and, as the best of several, flatters."
        ),
    ]
    lost = [arm for arm in comparison.fits if any(map(diverged, arm.at(comparison.selected(arm).lr)))]
    if lost and (names := [key for key in table[0] if key.startswith(("perplexity", "top-1"))]):
        text = f"{' and '.join(names)}: mean over seeds at the selected lr; - where one of them diverged."
        texts.append(text[0].upper() + text[1:])
    if edges:
        texts.append(
            f"At the edge of its learning rates, so the best may lie beyond: {', '.join(edges)}. At the lower"
            " edge LR sensitivity looks upward only: it says what larger learning rates cost."
        )
    texts.append(
        "LR sensitivity: mean over the learning rates of min(loss, cap) - best. Worst loss: the largest"
        " min(loss, cap). Both by seed, then averaged, from seeds with all learning rates. Usable octaves: of"
        f" the learning rates around the best with a loss at most {TOLERANCE:g} nats above it,"
        " read off a monotone cubic over log2(lr), by seed, then averaged; >= where the grid ends first."
        " Recovered: (PTQ - reported) / (PTQ - FP), PTQ on the arm's own grid and scale."
    )
    if any("spikes per 1000" in row or "grad norm median" in row for row in table):
        texts.append(
            f"Spikes per 1000 logged steps: a training loss above the median of the {WINDOW} before it by"
            f" more than {SIGMAS} robust standard deviations (1.4826 MAD) and {FLOOR} nats; the first"
            f" {FEWEST} are not judged. Gradient norms: before clipping, the logged steps of all runs pooled."
            " Flip rate: mean over training; oscillation, scale drift, gradient cosine: at its end; of the"
            " runs that did not diverge."
        )
    if comparison.quantized:
        texts.append(_about_differences(comparison))
    if comparison.usual:
        settings = ", ".join(f"{key} {value}" for key, value in comparison.usual.items() if value != UNSET)
        texts.append(f"Settings where an arm has them and its name does not say otherwise: {settings}.")
    return "\n\n".join(texts)


def _about_caps(comparison: Comparison) -> str:
    groups: dict[str, list[str]] = {}
    for group, cap in comparison.caps.items():
        groups.setdefault(f"{cap.loss:.4g} ({cap.source})", []).append(group.name)
    if len(groups) == 1:
        return f"Cap: {next(iter(groups))}"
    return "Caps: " + ", ".join(f"{cap} at {' and '.join(names)}" for cap, names in groups.items())


def _about_differences(comparison: Comparison) -> str:
    found, margin = comparison.differences, comparison.plan.margin
    if not found:
        return "Differences: none, because no baseline has another quantized arm of its bit width beside it."
    if all(each.n < 2 for each in found):
        return "Differences: not tested, because that takes two seeds or more that both arms ran with."
    sizes = {q: sum(e.quantity == q and e.p is not None for e in found) for q in (e.quantity for e in found)}
    names = ", ".join(dict.fromkeys(each.baseline for each in found))
    tests = ", ".join(f"{quantity}: {number}" for quantity, number in sizes.items())
    text = (
        f"Differences: arm minus baseline ({names}), paired by seed, losses up to the cap; 95%"
        " t intervals and two-sided paired t tests. Holm's correction within a family: all quantized"
        " arms and learning rates of the study for the loss, all quantized"
        f" arms for each of the others (tests: {tests})."
        f" Equivalent: the 90% interval lies within +-{margin:g} nats (TOST at {LEVEL:.0%})"
        + ("" if margin else ", the study names no margin")
        + f"; lower, higher: otherwise, where Holm's p is below {LEVEL:g}. Identical: every pair is the same"
        " number, as where both sides compute the same; capped: that number is the cap. Neither is tested or"
        " counts in a family. Intervals cover what seeds vary: where all runs begin from one checkpoint, the"
        " order of its data, and no other checkpoint, corpus or size."
    )
    unpaired = sum(each.unpaired for each in found if each.quantity == "loss")
    return text + (
        f" Runs left out of pairs because the other side lacks them: {unpaired}." if unpaired else ""
    )


def text_tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """The tables to read: a title each, and lines of cells, the first of them the header."""
    table = rows(comparison)
    calm = [key for key in _keys([_stability(arm.runs) for arm in comparison.fits]) if key in table[0]]
    hidden = {*comparison.columns, *calm, "edge", "divergence rate"}
    tables = [("", _lines(table, [key for key in table[0] if key not in hidden]))]
    if calm:
        fits = [row for row in table if row.get("divergence rate") is not None]
        tables.append(("Training", _lines(fits, ["arm", "divergence rate", *calm])))
    if any(each.n > 1 for each in comparison.differences):
        several = len({each.baseline for each in comparison.differences}) > 1
        lines = []
        for each in comparison.differences:
            line = {"arm": each.arm, "baseline": each.baseline} if several else {"arm": each.arm}
            line["of"] = each.quantity if each.lr is None else f"{each.quantity} at {short(each.lr)}"
            line |= {"pairs": str(each.n), "difference": _number(each.mean, "+.4f"), "95% interval": "-"}
            if each.low is not None and each.high is not None:
                line["95% interval"] = f"[{each.low:+.4f}, {each.high:+.4f}]"
            line |= {"p": _number(each.p, ".2g"), "p (Holm)": _number(each.p_holm, ".2g")}
            lines.append(line | {"verdict": each.verdict})
        title = "Differences" if several else f"Differences from {comparison.differences[0].baseline}"
        tables.append((title, [list(lines[0]), *(list(line.values()) for line in lines)]))
    return tables


def tensorboard(folders: Sequence[Path]) -> str:
    """The command that opens TensorBoard on some folders."""
    places = [folder.resolve() for folder in folders]
    if len({place.parent for place in places}) == 1:
        where = "--logdir", os.path.relpath(places[0] if len(places) == 1 else places[0].parent)
    else:
        where = "--logdir_spec", ",".join(f"{place.name}:{os.path.relpath(place)}" for place in places)
    return printable(shlex.join(["tensorboard", *where]))


def markdown(comparison: Comparison) -> str:
    """The tables in Markdown, with their notes."""
    parts = [f"## {comparison.name}"]
    for title, cells in text_tables(comparison):
        lines = [[cell.replace("|", r"\|") for cell in line] for line in cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
        text = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in ruled]
        parts += [f"### {title}"] if title else []
        parts.append("\n".join(text))
    return "\n\n".join([*parts, notes(comparison)])


def comma_separated(comparisons: list[Comparison]) -> str:
    """All rows as one CSV, unrounded; a learning rate has columns for mean, std, n and diverged."""
    flat = []
    for comparison in comparisons:
        for row in rows(comparison):
            line: dict[str, Any] = {"study": comparison.name}
            for key, value in row.items():
                if key.startswith("lr ") and key != "lr sensitivity":
                    parts: dict[str, Any] = dict.fromkeys(("mean", "std", "n", "diverged"))
                    parts |= _cell(value) if value else {}
                    line |= {f"{key} {part}": number for part, number in parts.items()}
                elif key == "usable octaves":
                    line[key] = value.octaves if value else None
                    line |= {
                        f"usable lr {name}": each for name, each in (asdict(value) if value else {}).items()
                    }
                else:
                    line[key] = value
            flat.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, _keys(flat), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def as_json(comparisons: list[Comparison]) -> str:
    """All that is known, down to the runs: strict JSON, null for what is not finite."""
    studies = []
    for comparison in comparisons:
        arms = []
        for arm in comparison.arms:
            cells = []
            for lr in comparison.lrs if arm.kind == "fit" else []:
                if cell := comparison.cell(arm, lr):
                    seeds = {str(seed): loss for seed, loss in comparison.losses(arm, lr).items()}
                    cells.append({"lr": lr, **_cell(cell), "capped": seeds, **_stability(arm.at(lr))})
            arms.append(
                {"arm": comparison.label(arm), "kind": arm.kind, "hparams": arm.hparams}
                | {"figures": _figures(comparison, arm), "cells": cells, "runs": list(map(_run, arm.runs))}
            )
        studies.append(
            {
                "study": comparison.name,
                "lrs": comparison.lrs,
                "caps": [asdict(group) | asdict(cap) for group, cap in comparison.caps.items()],
                "baseline": comparison.plan.baseline,
                "margin": comparison.plan.margin,
                "selected on": comparison.selection[0],
                "reported on": comparison.selection[1],
                "full precision": comparison.full_precision,
                "arms": arms,
                "differences": [asdict(each) for each in comparison.differences],
                "notes": notes(comparison),
            }
        )
    return json.dumps(_strict({"studies": studies}), indent=1, allow_nan=False) + "\n"


def _run(run: Run) -> dict[str, Any]:
    lasts = {tag: run.last(tag) for tag in run.scalars}
    about = {"run": run.folder.name, "lr": run.hparams.get("lr"), "seed": run.hparams.get("seed")}
    return about | {"diverged": diverged(run), "last": lasts} | _stability([run])


def _cell(cell: Cell) -> dict[str, Any]:
    return {"mean": cell.mean, "std": cell.std, "n": len(cell.losses), "diverged": cell.diverged}


def _strict(value: Any) -> Any:
    if isinstance(value, Band):
        return asdict(value) | {"octaves": value.octaves}
    if isinstance(value, dict):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keys(table: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in table for key in row))


def _lines(table: list[dict[str, Any]], keys: list[str]) -> list[list[str]]:
    return [keys, *([_text(key, row) for key in keys] for row in table)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if isinstance(value, Cell):
        if value.diverged == len(value.losses):
            return "diverged"
        text = f"{value.mean:.4f}"
        if value.std is not None:
            text += f" +- {value.std:.4f} ({len(value.losses)})"
        return text + (f", {value.diverged} diverged" if value.diverged else "")
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
    if key.startswith("top-1"):
        return f"{value:.1%}"
    if key in ("recovered", "divergence rate"):
        return f"{value:.0%}"
    if key.startswith("perplexity"):
        return f"{value:.2f}"
    if key.startswith(("reported loss", "worst loss")):
        return f"{value:.4f}"
    return f"{value:.3g}" if isinstance(value, float) else short(value)

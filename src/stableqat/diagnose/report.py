"""What a diagnosis writes: tables, pictures, and mappings of mixed widths."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stableqat.diagnose.verdict import in_words, rows, summary

FILE, TABLE = "diagnosis.json", "diagnosis.csv"
Record = dict[str, Any]


def write_report(
    folder: Path, known: Record, budgets: Sequence[float], tolerance: float, out: str
) -> list[str]:
    """Write everything into a folder.

    Args:
        folder: The folder.
        known: `settings`, `family`, `skip` and what was `measured`.
        budgets: Sizes of mixed widths in bits per weight; none for the widths between narrowest and widest.
        tolerance: Rise of the loss that is accepted of the whole model.
        out: The folder's later name.

    Returns:
        What it says, as lines for the terminal.
    """
    measured, widths = known["measured"], known["settings"]["bits"]
    table = rows(measured, tolerance)
    whole = summary(measured, table)
    budgets = list(budgets) or widths[1:-1] or [sum(widths) / len(widths)]
    mixed = {f"{budget:g}": _mixed(table, budget) for budget in budgets}
    record = {**known, "tolerance": tolerance, "table": table, "summary": whole, "mixed": mixed}
    (folder / FILE).write_text(json.dumps(record, indent=1))
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    commands = [_write_mapping(folder, known, budget, own, out) for budget, own in mixed.items()]
    # matplotlib is slow to import
    from stableqat.diagnose.plot import draw

    pictures = draw(table, {budget: own["widths"] for budget, own in mixed.items()}, folder)
    lines = [f"loss in full precision: {measured['loss']:.4g}", *_markdown(whole), *in_words(table)]
    lines += [_told(budget, own) for budget, own in mixed.items()]
    written = [TABLE, FILE, *(path.name for path in pictures)]
    return [*lines, f"written to {out}: {', '.join(written)}", f"next: {commands[0]}"]


def _mixed(table: list[Record], budget: float) -> Record:
    """The widths that harm least within a budget, beside those of one width for all."""
    # scipy is slow to import
    from stableqat.diagnose.widths import choose_widths

    costs: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    for row in table:
        costs.setdefault(row["layer"], {})[row["bits"]] = row["gptq score"]
        sizes[row["layer"]] = row["weights"]
    chosen = dict(zip(costs, choose_widths(list(costs.values()), list(sizes.values()), budget), strict=True))
    found: Record = {
        "bits": sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes.values()),
        "score": sum(costs[name][bits] for name, bits in chosen.items()),
    }
    uniform = max(bits for bits in next(iter(costs.values())) if bits <= budget)
    found["uniform"] = {"bits": uniform, "score": sum(each[uniform] for each in costs.values())}
    return found | {"widths": chosen}


def _write_mapping(folder: Path, known: Record, budget: str, mixed: Record, out: str) -> str:
    """Write the overlay of a budget, and return the command that trains with it."""
    from stableqat.diagnose.mapping import overlay, patterns_of

    settings, name = known["settings"], f"quantizer-{budget}.yaml"
    base = "llama/finetune" if known["family"] == "text" else "vit/finetune"
    command = (
        f"stableqat fit -c {base} -c {Path(out) / name} --model.init_from {settings['source']} "
        f"--data.source {settings['data']}"
    )
    told = f"{mixed['bits']:.3g} bits per weight on average, at most {budget}; chosen by stableqat diagnose"
    options = {key: settings[key] for key in ("grid", "group_size") if settings[key] is not None}
    patterns = patterns_of(mixed["widths"])
    text = overlay(patterns, settings["quantizer"], options, known["skip"], [told, f"  {command}"])
    (folder / name).write_text(text)
    return command


def _told(budget: str, mixed: Record) -> str:
    uniform = mixed["uniform"]
    return (
        f"quantizer-{budget}.yaml: {mixed['bits']:.3g} bits per weight, summed score "
        f"{mixed['score']:.4g} (all at {uniform['bits']} bits: {uniform['score']:.4g})"
    )


def _markdown(table: list[Record]) -> list[str]:
    cells = [[f"{value:.3g}" for value in row.values()] for row in table]
    return [f"| {' | '.join(line)} |" for line in (list(table[0]), ["---:"] * len(table[0]), *cells)]

"""`stableqat compare`: event files in, a table and a picture out.

A run is a folder with event files, a study the folder above it. The table goes to `compare.md` and,
unrounded, to `compare.csv`, the picture to `compare.png`. What the figures mean: see `arms`.
"""

import csv
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stableqat.analysis.arms import LOSS, Cell, Comparison, diverged, usable
from stableqat.analysis.events import Run, find_runs, read_run
from stableqat.analysis.study import short
from stableqat.errors import UserError

log = logging.getLogger(__name__)


def compare(folders: list[str], *, out: str | None = None) -> int:
    """Compares the runs of one or more studies: a table, a picture, and the line that opens TensorBoard.

    Args:
        folders: Folders of studies, such as lightning_logs/demo-llama, or one that holds studies.
        out: New folder for compare.md, compare.csv and compare.png. If not given they go, in place of
            those of an earlier call, to the study's own; for several folders to the one that holds them all.

    Returns:
        0; a run that can't be compared is named in a warning and left out.
    """
    from stableqat.analysis.plot import draw

    if out is not None and Path(out).exists():
        raise UserError(f"out: {out} exists already; name a new folder, or leave --out away")
    comparisons = read_comparisons([Path(folder) for folder in folders])
    logs = Path(os.path.relpath(os.path.commonpath([Path(folder).resolve() for folder in folders])))
    target = Path(out) if out else logs
    report = "\n\n".join([*map(markdown, comparisons), f"tensorboard --logdir {logs}"]) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        _replace(target / "compare.md", lambda part: part.write_text(report))
        _replace(target / "compare.csv", lambda part: part.write_text(comma_separated(comparisons)))
        _replace(target / "compare.png", lambda part: draw(comparisons, part))
    except OSError as error:
        raise UserError(
            f"{target} can't be written ({error.strerror}): give another folder as --out"
        ) from error

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for comparison in comparisons:
        if console.is_terminal:
            console.print(_terminal(comparison), soft_wrap=False)
            console.print(notes(comparison))
        else:
            console.print(markdown(comparison))
    console.print(f"\nwritten to {target}: compare.md, compare.csv, compare.png\ntensorboard --logdir {logs}")
    return 0


def read_comparisons(folders: list[Path]) -> list[Comparison]:
    """Reads the runs in and under the folders, a comparison for each folder that holds runs.

    Raises:
        UserError: A folder without event files, or without a run that can be compared.
    """
    comparisons: dict[Path, Comparison] = {}
    for folder in folders:
        studies: dict[Path, list[Run]] = {}
        for path in find_runs(folder):
            run = read_run(path)
            for problem in run.problems:
                log.warning("%s", problem)
            if usable(run):
                studies.setdefault(path.parent, []).append(run)
        if not find_runs(folder):
            raise UserError(f"{folder}: no event files in or under this folder: name the folder of a study")
        if not studies:
            raise UserError(f"{folder}: none of its runs can be compared (see the warnings)")
        comparisons |= {study: Comparison(study, runs) for study, runs in studies.items()}
    return list(comparisons.values())


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table: a row an arm, column to value; full precision and PTQ at the top."""
    qualities = {"val/perplexity": "perplexity", "val/top1": "top-1"}
    logged = [tag for tag in qualities if any(arm.finals(tag) for arm in comparison.arms)]
    table = []
    for arm in comparison.arms:
        row: dict[str, Any] = {key: arm.hparams.get(key) for key in comparison.columns}
        trained = arm.kind == "fit"
        if not trained:
            row |= {"method": comparison.label(arm) if arm.kind == "fp" else "PTQ", "mask": None}
        best, best_lr = comparison.best(arm) if trained else (arm.mean(LOSS), None)
        for lr in comparison.lrs:
            row[f"lr {short(lr)}"] = comparison.cell(arm, lr) if trained else None
        row |= {"best lr": best_lr, "best loss": best}
        row |= {qualities[tag]: arm.mean(tag, best_lr) for tag in logged}
        row["recovered"] = comparison.recovered(arm) if trained else None
        row["lr sensitivity"] = comparison.sensitivity(arm) if trained else None
        row["worst loss"] = comparison.worst(arm) if trained else None
        row["diverged"] = sum(map(diverged, arm.runs)) if trained else None
        row["runs"] = len(arm.runs)
        table.append(row)
    return table


def notes(comparison: Comparison) -> str:
    """What has to be known to read the table."""
    cap, source = comparison.cap
    return (
        "Validation loss in nats, mean +- standard deviation (runs) over seeds."
        f" Learning rates: {', '.join(map(short, comparison.lrs))}."
        f" Cap: {cap:.4g} ({source}); a diverged run counts as the cap."
        " LR sensitivity: mean over the learning rates of min(loss, cap) - best."
        " Recovered: (PTQ - best) / (PTQ - FP), PTQ on the arm's own grid and scale."
    )


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, with its notes."""
    table = rows(comparison)
    lines = [list(table[0]), *([_text(key, value) for key, value in row.items()] for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    text = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
    return f"## {comparison.folder.name}\n\n" + "\n".join(text) + f"\n\n{notes(comparison)}"


def comma_separated(comparisons: list[Comparison]) -> str:
    """All tables as one CSV, unrounded; a learning rate has columns for mean, std, n and diverged."""
    flat = []
    for comparison in comparisons:
        for row in rows(comparison):
            line: dict[str, Any] = {"study": comparison.folder.name}
            for key, value in row.items():
                if key.startswith("lr ") and key != "lr sensitivity":
                    parts: dict[str, Any] = dict.fromkeys(("mean", "std", "n", "diverged"))
                    if isinstance(value, Cell):
                        parts |= {"mean": value.mean, "std": value.std}
                        parts |= {"n": len(value.losses), "diverged": value.diverged}
                    line |= {f"{key} {part}": number for part, number in parts.items()}
                else:
                    line[key] = value
            flat.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _text(key: str, value: Any) -> str:
    if isinstance(value, Cell):
        if value.diverged == len(value.losses):
            return "diverged"
        text = f"{value.mean:.4f}"
        if value.std is not None:
            text += f" +- {value.std:.4f} ({len(value.losses)})"
        return text + (f", {value.diverged} diverged" if value.diverged else "")
    if value is None or value == "":
        return "-"
    if key == "top-1":
        return f"{value:.1%}"
    if key == "recovered":
        return f"{value:.0%}"
    if key == "perplexity":
        return f"{value:.2f}"
    if key in ("best loss", "worst loss", "lr sensitivity"):
        return f"{value:.4f}"
    return short(value)


def _terminal(comparison: Comparison) -> Table:
    table = rows(comparison)
    picture = Table(title=str(comparison.folder), box=SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for key in table[0]:
        picture.add_column(key, justify="left" if key in comparison.columns else "right")
    for row in table:
        picture.add_row(*(_text(key, value) for key, value in row.items()))
    return picture


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)

"""`stableqat compare`: event files in; tables, pictures and a report out.

A run is a folder with event files, a study the folder above it. `compare.md` is what the terminal shows,
`compare.csv` the same unrounded, `compare.json` everything down to the runs, `compare.html` a report with
the pictures in it that opens without a network. What the figures mean: see `arms`, `stability`, `statistics`.
"""

import logging
import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from stableqat.analysis.comparison import Comparison, usable
from stableqat.analysis.tables import (
    as_json,
    comma_separated,
    markdown,
    notes,
    rows,
    tensorboard,
    text_tables,
)
from stableqat.errors import UserError
from stableqat.events import COMPARED, Run, find_runs, read_run
from stableqat.files import hidden_folder, writing
from stableqat.terminal import printable, terminal

__all__ = ["compare", "markdown", "notes", "read_comparisons", "rows"]

log = logging.getLogger(__name__)


def compare(folders: list[str], *, out: str | None = None) -> int:
    """Compares the runs of one or more studies: tables, pictures, and the line that opens TensorBoard.

    Args:
        folders: Folders of studies, such as lightning_logs/demo-llama, or one that holds studies.
        out: New folder for compare.md, .csv, .json, .html and the pictures. If not given they go, in place of
            those of an earlier call, to the study's own; for several folders to the one that holds them all.

    Returns:
        0; a run that can't be compared is named in a warning and left out.
    """
    if out is not None and Path(out).exists():
        raise UserError(f"out: {out} exists already; name a new folder, or leave --out away")
    comparisons = read_comparisons([Path(folder) for folder in folders])
    from stableqat.analysis import report
    from stableqat.analysis.plot import draw_all

    logs = Path(os.path.relpath(os.path.commonpath([Path(folder).resolve() for folder in folders])))
    target = Path(out) if out else logs
    command = tensorboard([Path(folder) for folder in folders])
    text = "\n\n".join([*map(markdown, comparisons), command]) + "\n"
    place = target.parent if out else target
    with writing(str(target), "name another folder with --out"):
        place.mkdir(parents=True, exist_ok=True)
        with hidden_folder(place, ".compare-") as made:
            part = made / "compare"
            part.mkdir()
            (part / "compare.md").write_text(text)
            (part / "compare.csv").write_text(comma_separated(comparisons))
            (part / "compare.json").write_text(as_json(comparisons))
            report.write(comparisons, draw_all(comparisons, part), part / "compare.html")
            written = sorted(path.name for path in part.iterdir())
            if out:
                part.rename(target)
            else:
                for name in written:
                    os.replace(part / name, target / name)

    console = terminal()
    for comparison in comparisons:
        if console.is_terminal:
            for title, lines in text_tables(comparison):
                console.print(_terminal(title or printable(str(comparison.folder)), lines), soft_wrap=False)
            console.print(notes(comparison))
        else:
            console.print(markdown(comparison))
    console.print(f"\nwritten to {target}: {', '.join(written)}\n{command}")
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
            run = read_run(path, COMPARED)
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


def _terminal(title: str, lines: list[list[str]]) -> Table:
    picture = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for number, key in enumerate(lines[0]):
        picture.add_column(key, justify="right" if number else "left")
    for line in lines[1:]:
        picture.add_row(*line)
    return picture

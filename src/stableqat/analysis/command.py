"""`stableqat compare`: event files in; tables, pictures and a report out. `stableqat publish`: a small copy.

A run is a folder with event files, and a study is the folder above it. `compare.md` holds what the terminal
shows, `compare.csv` the same unrounded, `compare.json` everything down to the runs, and `compare.html` a
report with its pictures that opens without a network. `arms`, `caps`, `sensitivity`, `differences` and
`stability` explain the figures.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich.table
from rich.box import SIMPLE_HEAD
from rich.text import Text

from stableqat.analysis.comparison import read_summaries
from stableqat.analysis.listing import PUBLISHED
from stableqat.analysis.tables import Table, as_json, comma_separated, markdown, write_page
from stableqat.errors import UserError, check_range
from stableqat.events import find_runs
from stableqat.files import hidden_folder, whole_folder, writing
from stableqat.terminal import plain, terminal

MOST_MEGABYTES = 8.0


def compare(folders: list[str], *, out: str | None = None) -> int:
    """Compares the runs of one or more studies: tables, pictures, and the line that opens TensorBoard.

    Args:
        folders: Folders of studies, such as lightning_logs/demo-llama, or one that holds studies.
        out: New folder for compare.md, .csv, .json, .html and the pictures. By default they replace those of
            an earlier call in the study's own folder or, for several folders, in the one that holds them all.

    Returns:
        0; a run that cannot be compared is named in a warning and left out.
    """
    if out is not None and Path(out).exists():
        raise UserError(f"out: {out} exists already; name a new folder, or leave out --out")
    summaries = read_summaries([Path(folder) for folder in folders])
    pages = [write_page(summary) for summary in summaries]
    from stableqat.analysis import report
    from stableqat.analysis.plot import draw_all

    logs = Path(os.path.relpath(os.path.commonpath([Path(folder).resolve() for folder in folders])))
    command = _tensorboard([Path(folder) for folder in folders])
    texts = [markdown(page) for page in pages]
    target = Path(out) if out else logs
    made = whole_folder(target) if out else _replaced(logs)
    with writing(str(target), "name another folder with --out"), made as part:
        (part / "compare.md").write_text("\n\n".join([*texts, command]) + "\n")
        (part / "compare.csv").write_text(comma_separated(pages))
        (part / "compare.json").write_text(as_json(pages))
        pictures = draw_all(summaries, part)
        report.write(pages, pictures, part / "compare.html", command)
        written = sorted(path.name for path in part.iterdir())

    console = terminal()
    for page, text in zip(pages, texts, strict=True):
        if console.is_terminal:
            console.print("\n\n".join(page.conclusions) + "\n", markup=False, highlight=False)
            for table in page.tables:
                console.print(_table(table, plain(str(page.summary.folder))), soft_wrap=False)
            console.print(page.notes)
        else:
            console.print(text)
    console.print(f"\nwritten to {target}: {', '.join(written)}\n{command}")
    return 0


def publish(folders: list[str], *, out: str = f"lightning_logs/{PUBLISHED}", points: int = 100) -> int:
    """Copies studies for publication: their event files, thinned.

    Args:
        folders: Folders of studies.
        out: Folder that gets a folder per study; a study that exists there is refused.
        points: Largest number of values to keep of a tag, the first and the last among them.

    Returns:
        0.
    """
    from stableqat.analysis.publish import write_copy

    check_range("points", points, 2)
    for folder in map(Path, folders):
        target = Path(out, folder.resolve().name)
        summaries = [summary for summary in read_summaries([folder]) if summary.folder == folder]
        if not summaries:
            raise UserError(f"{folder} holds studies, but no runs of its own; name the studies' folders")
        if target.exists():
            raise UserError(f"{target} exists already; move it away, or name another folder with --out")
        with writing(str(target), "name another folder with --out"), whole_folder(target) as part:
            write_copy(summaries[0], part, points)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
        more = f", more than {MOST_MEGABYTES:g} MB: lower --points" if size > MOST_MEGABYTES else ""
        terminal().print(f"published: {target}, {size:.1f} MB{more}")
    return 0


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder whose files replace those of the same names in `folder`, all at the end."""
    with hidden_folder(folder, ".compare-") as part:
        yield part
        for path in part.iterdir():
            os.replace(path, folder / path.name)


def _tensorboard(folders: Sequence[Path]) -> str:
    """The command that opens TensorBoard on some folders, and on no other runs beside them."""
    places = [folder.resolve() for folder in folders]
    above = {place.parent for place in places}
    if len(places) == 1:
        where = "--logdir", os.path.relpath(places[0])
    elif len(above) == 1 and all(not {run, *run.parents}.isdisjoint(places) for run in find_runs(*above)):
        where = "--logdir", os.path.relpath(*above)
    else:
        where = "--logdir_spec", ",".join(f"{place.name}:{os.path.relpath(place)}" for place in places)
    return plain(shlex.join(["tensorboard", *where]))


def _table(table: Table, name: str) -> rich.table.Table:
    title = table.title or name
    picture = rich.table.Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for number, key in enumerate(table.lines[0]):
        picture.add_column(key, justify="right" if number else "left")
    for i, line in enumerate(table.lines[1:], 1):
        marks = ("bold" if (i, j) in table.best else "" for j in range(len(line)))
        picture.add_row(*map(Text, line, marks))
    return picture

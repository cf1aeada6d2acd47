"""`stableqat runs`: the runs under a folder, one per line, read from their event files."""

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stableqat.analysis.arms import LOSS, TOP1
from stableqat.checkpoints.names import CONFIG, LOCK, last_checkpoints
from stableqat.errors import UserError, counted
from stableqat.events import Run, find_runs, read_run
from stableqat.files import held_elsewhere
from stableqat.studies.record import FILE as RECORD
from stableqat.studies.study import short
from stableqat.terminal import plain, size, terminal

READ = ("hp/", LOSS, TOP1, "val/perplexity", "train/loss")
COLUMNS = {  # of the table, with the attribute that each shows
    "name": "name",
    "family": "family",
    "method": "method",
    "bits": "bits",
    "grid": "grid",
    "lr": "lr",
    "state": "state",
    "steps": "steps",
    "best": "best_loss",
    "rounded": "loss_ptq",
    "full precision": "loss_fp",
    "size": "megabytes",
    "age": "age",
}
SPARE = ("family", "grid", "full precision", "size", "steps")  # left out of a table that is too wide, in turn
PUBLISHED = "published"  # where `publish` puts its copies by default
ATTENTION_BITS = re.compile(r": \S+ (\d+)")  # in a run's `attention`, as "key, value: PerToken 8 ste none"
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Row:
    """What the table says of a run; None where the run does not.

    Attributes:
        name: Its folder.
        family: text or images.
        method: Name of its method; FP is full precision.
        bits: Width of its weights.
        input_bits: Width of its activations, if they are quantized.
        attention: How what attention multiplies is quantized, in words.
        grid: Their grid.
        lr: Learning rate.
        state: running, finished, diverged, stopped or failed; damaged if its files cannot be read.
        step: The last step that it logged.
        planned: The steps it is to take.
        best_loss: Its lowest validation loss.
        loss_ptq: The validation loss of its start, rounded.
        loss_fp: The same in full precision.
        megabytes: Size of its folder.
        age: Seconds since it last wrote its event files.
    """

    name: str
    family: str | None
    method: str | None
    bits: float | None
    input_bits: float | str | None
    attention: str | None
    grid: str | None
    lr: float | None
    state: str
    step: int
    planned: int | None
    best_loss: float | None
    loss_ptq: float | None
    loss_fp: float | None
    megabytes: float
    age: float


def runs(
    folders: Sequence[str] = ("lightning_logs",),
    *,
    sort: Literal["age", "name", "method", "bits", "lr", "state", "loss", "size"] = "age",
    json: bool = False,
) -> int:
    """Lists the runs under some folders, those of sweeps too.

    Args:
        folders: The folders; lightning_logs if there are none. What lies in a folder named `published` is
            left out, unless you name that folder or one inside it.
        sort: What to sort by; the youngest run, or the lowest number, comes first.
        json: Print a list of objects instead of a table; losses and times are not rounded.

    Returns:
        0; a run that cannot be read is listed as damaged or failed.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"folders: {folder} is not a folder; name one that holds runs")
    found, copies = set[Path](), set[Path]()
    for place in map(Path, folders):
        own = _folders(place)
        copies |= (published := {path for path in own if PUBLISHED in path.relative_to(place).parts})
        found |= own - published
    key = {"loss": "best_loss", "size": "megabytes"}.get(sort, sort)
    rows = sorted(map(_row, sorted(found)), key=lambda row: _order(getattr(row, key)))
    console = terminal()
    if json:
        console.print(_as_json(rows))
    elif not rows:
        console.print(f"no runs under {plain(', '.join(folders))}")
    else:
        for line in _table(rows, console.width if console.is_terminal else None):
            console.print(line)
    if (left := len(copies - found)) and not json:
        console.print(f"{counted(left, 'published run')} left out; name a published folder to list its runs")
    return 0


def _folders(place: Path) -> set[Path]:
    """The folders of runs under a folder, also of those that logged nothing."""
    others = {path.parent for name in (CONFIG, RECORD) for path in place.rglob(name)}
    shown = {p for p in others if not any(part.startswith(".") for part in p.relative_to(place).parts)}
    return {*find_runs(place), *shown}


def _row(folder: Path) -> Row:
    try:
        run = read_run(folder, READ)
    except (OSError, ValueError) as error:
        run = Run(folder, problems=[str(error)])
    settings, scalars = run.hparams, run.scalars
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    events = [file.stat().st_mtime for file in folder.glob("events.out.tfevents.*")]
    losses = [loss for loss in scalars.get(LOSS, {}).values() if math.isfinite(loss)]
    planned = settings.get("max_steps", -1)
    return Row(
        name=plain(str(folder)),
        family="images" if TOP1 in scalars else "text" if "val/perplexity" in scalars else None,
        method=settings.get("method"),
        bits=settings.get("bits"),
        input_bits=settings.get("input_bits"),
        attention=settings.get("attention"),
        grid=settings.get("grid"),
        lr=settings.get("lr"),
        state=_state(run),
        step=max((max(series) for series in scalars.values() if series), default=0),
        planned=planned if planned > 0 else None,
        best_loss=min(losses, default=None),
        loss_ptq=_known(run, "hp/loss_ptq"),
        loss_fp=_known(run, "hp/loss_fp"),
        megabytes=sum(file.st_size for file in files) / 1e6,
        age=time.time() - max(events, default=folder.stat().st_mtime),
    )


def _state(run: Run) -> str:
    """What became of a run, by its lock and what it logged last."""
    step, planned = run.last("hp/steps"), run.hparams.get("max_steps", -1)
    measured = run.hparams.get("subcommand") == "validate" and LOSS in run.scalars
    if held_elsewhere(run.folder / LOCK):
        return "running"
    if run.problems and not run.scalars:
        return "damaged"
    if run.last("hp/diverged") == 1:
        return "diverged"
    finished = run.last("hp/finished")
    if measured or finished == 1 or (finished is None and step is not None and step >= planned > 0):
        return "finished"
    began = any(max(series) > 0 for series in run.scalars.values() if series)
    return "stopped" if began or last_checkpoints(run.folder) else "failed"


def _known(run: Run, tag: str) -> float | None:
    value = run.last(tag)
    return value if value is not None and math.isfinite(value) else None


def _order(value: Any) -> tuple[bool, Any]:
    """Sorts names by the numbers in them, and what is unknown to the end."""
    if isinstance(value, str):
        value = [(not part.isdigit(), int(part) if part.isdigit() else part) for part in _parts(value)]
    return value is None, value


def _parts(name: str) -> list[str]:
    return re.findall(r"\d+|\D+", name)


def _as_json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _table(rows: Sequence[Row], room: int | None = None) -> list[str]:
    """The lines of the table, with a heading.

    Args:
        rows: The runs.
        room: Characters of a line; None for as many as the table takes.
    """
    table = {head: [head, *(_cell(row, key) for row in rows)] for head, key in COLUMNS.items()}
    widths = {head: max(map(len, cells)) for head, cells in table.items()}
    for head in SPARE:
        if room is not None and sum(widths.values()) + 2 * (len(widths) - 1) > room:
            del table[head], widths[head]
    left = ("name", "family", "method", "grid", "state")
    columns = [
        [cell.ljust(widths[head]) if head in left else cell.rjust(widths[head]) for cell in cells]
        for head, cells in table.items()
    ]
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _cell(row: Row, key: str) -> str:
    if key == "steps":
        return f"{row.step}" if row.planned is None else f"{row.step}/{row.planned}"
    value = getattr(row, key)
    if key == "bits" and row.input_bits is not None:
        value = f"W{value}A{row.input_bits}"
    if key == "bits" and row.attention is not None:
        own = "/".join(dict.fromkeys(ATTENTION_BITS.findall(row.attention)))
        return ", ".join(filter(None, (value and str(value), f"attention {own}".rstrip())))
    if value is None:
        return "-"
    if key == "age":
        seconds, unit = next((u for u in UNITS if value >= u[0]), UNITS[-1])
        return f"{max(value, 0) / seconds:.0f} {unit}"
    if key == "megabytes":
        return size(value * 1e6)
    if key == "lr":
        return short(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)

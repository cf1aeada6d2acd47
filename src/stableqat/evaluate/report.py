"""Results for people and programs: a table, a JSON file, TensorBoard scalars in the runs' own folders.

Each evaluation adds an event file to the run's folder and changes no other file; of a figure measured twice
at the same step, readers show the last.
"""

import io
import json
import logging
import os
import socket
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stableqat.evaluate.model import labels
from stableqat.files import whole_file, writing

logger = logging.getLogger(__name__)

_TITLE = 38  # letters that fit the width of a panel
LIBRARIES = ("stableqat", "torch", "transformers", "timm", "torchmetrics")


def keep(records: list[dict[str, Any]], settings: dict[str, Any], file: Path | None) -> None:
    """Log the last model's scalars, and rewrite the file.

    Args:
        records: What `measure` has returned for each model so far.
        settings: How they were measured.
        file: JSON file; None writes none.

    Raises:
        UserError: If the file cannot be written.
    """
    if (run := records[-1]["run"]) is not None:
        _log(Path(run), records[-1])
    if file is None:
        return
    names = [*LIBRARIES, "lm_eval"] if settings["tasks"] else LIBRARIES
    versions = {name: version(name) for name in names}
    results = {"sources": records, "settings": settings, "versions": versions}
    with writing(f"out: {file}", "make room, or name another file"):
        with whole_file(file) as part:
            part.write_text(json.dumps(results, indent=2, default=str) + "\n")
        if any("images" in record for record in records):
            _draw(records, file.with_suffix(".png"))


def show(records: list[dict[str, Any]], file: Path | None) -> None:
    """Print the table, what its data is, and the file's name if it exists."""
    from rich.console import Console

    # rich would narrow a table in a file or a pipe
    console = Console(markup=False, highlight=False, width=None if os.isatty(1) else 200)
    console.print(table(records))
    lines = {}
    for record in reversed(records):
        for data, told in record.get("perplexity", {}).items():
            what = f"{told['split']}, documents {told['documents']}; {told['tokens']} tokens scored"
            lines[data] = f"{data}: {what}, {told['how']}"
        for data, told in record.get("images", {}).items():
            lines[data] = f"{data}: {told['split']}; {told['images']} images"
    left_out = [f"no perplexity of {r['source']}: {r['left_out']}" for r in records if "left_out" in r]
    written = [str(file)] if file is not None and file.exists() else []
    for line in [*lines.values(), *left_out, *written]:
        console.print(line, soft_wrap=True)


def figures(record: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield a model's figures: name, value, and standard error where there is one.

    `mean/acc` averages tasks and groups, without the tasks that a group already sums up.
    """
    for data, told in record.get("perplexity", {}).items():
        yield f"perplexity/{data}", told["perplexity"], None
        yield f"loss/{data}", told["loss"], None
    for data, told in record.get("images", {}).items():
        for what in (name for name in ("top1", "top5", "loss") if name in told):
            yield f"{what}/{data}", told[what], None
    accuracies = []
    for task, told in record.get("tasks", {}).items():
        for metric, score in told["metrics"].items():
            yield f"{task}/{metric}", score["value"], score["stderr"]
            if metric == "acc" and told["group"] is None:
                accuracies.append(score["value"])
    if len(accuracies) > 1:
        yield "mean/acc", sum(accuracies) / len(accuracies), None


def table(records: list[dict[str, Any]]) -> Any:
    """Make a table with one row per figure and one column per model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 1))
    made.add_column("")
    columns, names = [], labels(record["source"] for record in records)
    for record in records:
        made.add_column(f"{names[record['source']]}\n{record['about']}", justify="right", overflow="fold")
        columns.append({name: (value, error) for name, value, error in figures(record)})
    for name in dict.fromkeys(name for column in columns for name in column):
        made.add_row(name, *(_cell(column.get(name)) for column in columns))
    return made


def _cell(figure: tuple[float, float | None] | None) -> str:
    if figure is None:
        return ""
    value, error = figure
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _draw(records: list[dict[str, Any]], file: Path) -> None:
    """Draw confusion matrices, each row as shares of its class."""
    import numpy as np
    from matplotlib.figure import Figure

    panels = [(each, *image) for each in records for image in each.get("images", {}).items()]
    figure = Figure(figsize=(4.2 * len(panels), 5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    names = labels(record["source"] for record in records)
    for axis, (record, data, told) in zip(axes, panels, strict=True):
        title = [names[record["source"]], record["about"], f"{data}, top-1 {told['top1']:.4f}"]
        lines = [line for part in title for line in textwrap.wrap(part, _TITLE)]
        confusion, classes = np.array(told["confusion"], float), told["classes"]
        shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axis.set(xlabel="predicted", ylabel="true")
        axis.set_title("\n".join(lines), fontsize="medium", parse_math=False)  # names may hold a $
        if len(classes) <= 20:  # more names cannot be read
            axis.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
            axis.set_yticks(range(len(classes)), classes, parse_math=False)
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    with whole_file(file) as part:
        figure.savefig(part, format="png", dpi=120)


def _log(run: Path, record: dict[str, Any]) -> None:
    """Write an event file in one go; TensorBoard's writer does it in a thread, whose errors go unseen."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import scalar

    stamp, content = time.time_ns(), io.BytesIO()
    second, rest = divmod(stamp, 10**9)
    writer, event = RecordWriter(content), partial(Event, wall_time=stamp / 1e9)
    writer.write(event(file_version="brain.Event:2").SerializeToString())
    for name, value, _ in figures(record):
        summary = scalar(f"eval/{name}", value)
        writer.write(event(step=record["step"], summary=summary).SerializeToString())
    name = f"events.out.tfevents.{second}.{socket.gethostname()}.{os.getpid()}.{rest}.evaluate"
    try:
        with whole_file(run / name) as part:
            part.write_bytes(content.getvalue())
    except OSError as error:
        reason = error.strerror or error
        logger.warning("%s: takes no event file (%s); the figures are not logged", run, reason)

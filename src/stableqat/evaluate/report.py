"""Results for people and programs: a table, a JSON file, TensorBoard scalars in the runs' own folders.

A run's folder gets an event file of its own for each evaluation, its other files stay as they are; of a
figure that was taken twice at the same step, readers show the last.
"""

import json
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.evaluate.subject import labels
from stableqat.whole import whole

logger = logging.getLogger(__name__)

LIBRARIES = ("stableqat", "torch", "transformers", "timm", "torchmetrics")


def keep(records: list[dict[str, Any]], settings: dict[str, Any], file: Path | None) -> None:
    """Write the last model's scalars, and the file anew.

    Args:
        records: What `measure` returned for each model so far.
        settings: How it was measured.
        file: JSON file, None for none.

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
    try:
        with whole(file) as part:
            part.write_text(json.dumps(results, indent=2, default=str) + "\n")
        if any("images" in record for record in records):
            _draw(records, file.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"out: {file} cannot be written ({error.strerror or error})") from error


def show(records: list[dict[str, Any]], file: Path | None) -> None:
    """Print the table, what its texts are, and the file's name if it is there."""
    from rich.console import Console

    # a table in a file or a pipe keeps its width
    console = Console(markup=False, highlight=False, width=None if os.isatty(1) else 200)
    console.print(table(records))
    texts = {data: told for each in reversed(records) for data, told in each.get("perplexity", {}).items()}
    for data, told in texts.items():
        what = f"{told['split']} split, documents {told['documents']}; {told['tokens']} tokens scored"
        console.print(f"{data}: {what}, {told['how']}", soft_wrap=True)
    for record in records:
        if "left_out" in record:
            console.print(f"no perplexity of {record['source']}: {record['left_out']}", soft_wrap=True)
    if file is not None and file.exists():
        console.print(f"{file}", soft_wrap=True)


def figures(record: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """A model's figures: name, value, and standard error where there is one.

    `mean/acc` is that of tasks and groups, without the tasks that a group sums up already.
    """
    for data, told in record.get("perplexity", {}).items():
        yield f"perplexity/{data}", told["perplexity"], None
        yield f"loss/{data}", told["loss"], None
    for data, told in record.get("images", {}).items():
        for what in ("top1", "top5", "loss"):
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
    """A row a figure, a column a model."""
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
    """Confusion matrices, each row as shares of its class."""
    import numpy as np
    from matplotlib.figure import Figure

    panels = [(each, *image) for each in records for image in each.get("images", {}).items()]
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    names = labels(record["source"] for record in records)
    for axis, (record, data, told) in zip(axes, panels, strict=True):
        title = f"{names[record['source']]}, {record['about']}"
        confusion, classes = np.array(told["confusion"], float), told["classes"]
        shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axis.set(xlabel="predicted", ylabel="true", title=f"{title}\n{data}, top-1 {told['top1']:.4f}")
        if len(classes) <= 20:  # more names cannot be read
            axis.set_xticks(range(len(classes)), classes, rotation=90)
            axis.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    with whole(file) as part:
        figure.savefig(part, format="png", dpi=120)


def _log(run: Path, record: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(run, filename_suffix=".evaluate") as writer:
            for name, value, _ in figures(record):
                writer.add_scalar(f"eval/{name}", value, record["step"])
    except OSError as error:
        logger.warning("%s: no event file could be written (%s)", run, error.strerror or error)

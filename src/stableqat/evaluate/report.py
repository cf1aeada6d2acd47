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
from stableqat.evaluate.subject import label
from stableqat.whole import whole

logger = logging.getLogger(__name__)

LIBRARIES = ("stableqat", "torch", "transformers", "timm", "torchmetrics")


def publish(records: list[dict[str, Any]], settings: dict[str, Any], file: Path | None) -> None:
    """Print the table, write the file and the scalars.

    Args:
        records: What `measure` returned for each model.
        settings: How it was measured.
        file: JSON file, None for none.

    Raises:
        UserError: If a file cannot be written.
    """
    from rich.console import Console

    # a table in a file or a pipe keeps its width
    console = Console(markup=False, highlight=False, width=None if os.isatty(1) else 200)
    console.print(table(records))
    for data, told in records[0].get("perplexity", {}).items():
        what = f"{told['split']} split, documents {told['documents']}; {told['tokens']} tokens scored"
        console.print(f"{data}: {what}, {told['how']}", soft_wrap=True)
    try:
        if file is not None:
            names = [*LIBRARIES, "lm_eval"] if settings["tasks"] else LIBRARIES
            versions = {name: version(name) for name in names}
            results = {"sources": records, "settings": settings, "versions": versions}
            with whole(file) as part:
                part.write_text(json.dumps(results, indent=2, default=str) + "\n")
            console.print(f"{file}", soft_wrap=True)
            if any("images" in record for record in records):
                _draw(records, file.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"out: {file} cannot be written ({error.strerror or error})") from error
    for record in records:
        if record["run"] is not None:
            _log(Path(record["run"]), record)


def figures(record: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """A model's figures: name, value, and standard error where there is one."""
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
            if metric == "acc":
                accuracies.append(score["value"])
    if len(accuracies) > 1:
        yield "mean/acc", sum(accuracies) / len(accuracies), None


def table(records: list[dict[str, Any]]) -> Any:
    """A row a figure, a column a model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 1))
    made.add_column("")
    columns = []
    for record in records:
        made.add_column(f"{label(record['source'])}\n{record['about']}", justify="right", overflow="fold")
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
    for axis, (record, data, told) in zip(axes, panels, strict=True):
        title = f"{label(record['source'])}, {record['about']}"
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

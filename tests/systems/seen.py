"""A callback that writes down which rows each process trains on."""

import json
from pathlib import Path
from typing import Any

import lightning as L


class Seen(L.Callback):
    """Adds a line for each batch: the steps done before it, and its rows.

    Args:
        path: File to add to; each process has its own, with its rank at the end.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        line = {"step": trainer.global_step, "rows": batch["input_ids"].tolist()}
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")

"""How a run shows where it is: one bar for the whole of a training, or a line every so often."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stableqat.terminal import clock

logger = logging.getLogger(__name__)

REDRAWN = 0.5  # seconds between two looks at the metrics, for which a GPU is waited
FIRST_LINE, SELDOM = 10.0, 600.0  # seconds until the first line of a log; they double up to the second number


class TrainingProgress(ProgressBar):
    """One bar for all steps of a training, with the time left; a line every so often off a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        """Show nothing: another process does."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave it to the first process."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step from which the run starts or resumes."""
        planned = trainer.estimated_stepping_batches
        self._total = int(planned) if 0 < planned < float("inf") else None
        self._step = trainer.global_step
        self._counted_from: tuple[int, float] | None = None
        self._told, self._pause = time.monotonic(), FIRST_LINE
        console = Console(stderr=True)
        if self._enabled and console.is_terminal:
            columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=console)
            self._bar.add_task("", total=self._total, completed=self._step)
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Tell where the run is, if it is time and a step is done."""
        if not self._enabled or trainer.global_step == self._step:
            return
        self._step, now = trainer.global_step, time.monotonic()
        if self._counted_from is None:  # the first step says little about the others
            self._counted_from = self._step, now
        due = now - self._told > (self._pause if self._bar is None else REDRAWN)
        if self._bar is not None and (due or self._step == self._total):
            self._bar.update(self._bar.task_ids[0], completed=self._step, description=self._where(trainer))
        elif due:
            logger.info(self._where(trainer))
            self._pause = min(2 * self._pause, SELDOM)
        self._told = now if due else self._told

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Tell how far a validation is, on a terminal."""
        if self._bar is not None and not trainer.sanity_checking:
            words = f"step {self._step}, validating {batch_idx + 1} of {trainer.num_val_batches[0]}"
            self._bar.update(self._bar.task_ids[0], description=words)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the bar where it is."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the bar where it is."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _where(self, trainer: L.Trainer) -> str:
        of = "" if self._total is None else f" of {self._total}"
        left = ""
        if self._total is not None and self._counted_from is not None and self._step > self._counted_from[0]:
            first, began = self._counted_from
            seconds = (time.monotonic() - began) / (self._step - first) * (self._total - self._step)
            left = f", {clock(seconds)} left"
        found = {
            name: trainer.callback_metrics.get(name) for name in ("train/loss", *trainer.progress_bar_metrics)
        }
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None)
        return f"step {self._step}{of}{left}{': ' * bool(metrics)}{metrics}"

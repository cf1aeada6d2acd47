"""The record of a run in TensorBoard: its settings, and the same `hp/*` metrics for every run.

TensorBoard's HParams tab joins runs by the names of settings and metrics, so its parallel-coordinates view
shows a grid of methods, learning rates and seeds.
"""

from math import isfinite, nan
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stableqat.callbacks.baseline import Baseline
from stableqat.callbacks.divergence import DivergenceGuard
from stableqat.callbacks.tabs import write_layout, write_settings
from stableqat.files import whole_file
from stableqat.surgery import SurgeryReport

SURGERY = "surgery.txt"  # in a run's folder


class RunRecord(L.Callback):
    """Log flat settings once at the start, and `hp/*` whenever they change."""

    def __init__(self) -> None:
        self._losses = {"hp/val_loss": nan, "hp/best_val_loss": nan}
        self._rows: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the record of a training run."""
        self._open(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the record of a run that only validates."""
        if trainer.state.fn == "validate":
            self._open(trainer, pl_module, "validate")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update the record with a validation's loss."""
        if not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            loss = trainer.callback_metrics["val/loss"].item()
            best = min(filter(isfinite, (self._losses["hp/best_val_loss"], loss)), default=nan)
            self._losses = {"hp/val_loss": loss, "hp/best_val_loss": best}
            self._rows = _validated_rows(trainer)
            self._log(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the record of a finished run, even of one that resumes with nothing left to do."""
        self._log(trainer, finished=True)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        """Flush the logs before a checkpoint, so that a run killed after it resumes without a gap."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far, and the number of rows of the last one, for a resumed run."""
        return {**self._losses, "validation_rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._rows = state_dict.get("validation_rows")
        self._losses = {key: state_dict[key] for key in self._losses}

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, subcommand: str) -> None:
        settings = {**pl_module.describe(), "subcommand": subcommand}  # type: ignore[operator]
        if trainer.optimizers:
            group = trainer.optimizers[0].param_groups[0]
            settings["lr"] = trainer.optimizers[0].defaults["lr"]
            settings["weight_decay"] = group.get("weight_decay", 0.0)
            settings["optimizer"] = type(trainer.optimizers[0]).__name__
            settings["max_steps"] = trainer.max_steps
            for config in trainer.lr_scheduler_configs:
                settings["warmup_steps"] = getattr(config.scheduler, "warmup_steps", 0)
            settings["gradient_clip_val"] = trainer.gradient_clip_val or 0.0
            if describe := getattr(getattr(trainer, "datamodule", None), "describe", None):
                settings.update(describe())
        keep_report(getattr(pl_module, "surgery", None), trainer)
        images = getattr(pl_module, "family", None) == "images"
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                write_settings(logger, settings, self._metrics(trainer), trainer.global_step)
                quantized = settings.get("method", "FP") != "FP"
                write_layout(logger, images=images, quantized=quantized, step=trainer.global_step)

    def _log(self, trainer: L.Trainer, finished: bool = False) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics(trainer, finished), step=trainer.global_step)

    def _metrics(self, trainer: L.Trainer, finished: bool = False) -> dict[str, float]:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        guard = next((c for c in callbacks if isinstance(c, DivergenceGuard)), None)
        baseline = next((c for c in callbacks if isinstance(c, Baseline)), Baseline(enabled=False))
        initial = guard.initial_loss if guard is not None else None
        return {
            **self._losses,
            **baseline.losses,
            "hp/initial_loss": nan if initial is None else initial,
            "hp/diverged": float(guard is not None and guard.diverged),
            "hp/steps": float(trainer.global_step),
            "hp/finished": float(finished),
        }


def run_folder(trainer: L.Trainer) -> Path | None:
    """The run's folder, if its first logger has made one; `trainer.log_dir` would ask the other processes."""
    for logger in trainer.loggers[:1]:
        folder = Path(logger.log_dir) if isinstance(logger, TensorBoardLogger | CSVLogger) else None
        if folder is not None and folder.is_dir():
            return folder
    return None


def keep_report(report: SurgeryReport | None, trainer: L.Trainer) -> None:
    """Write the surgery report, with each layer and the quantized share, to the run's folder."""
    if report is None or not trainer.is_global_zero:
        return
    if (folder := run_folder(trainer)) is not None:
        with whole_file(folder / SURGERY) as part:
            part.write_text(report.lines())


def _validated_rows(trainer: L.Trainer) -> int | None:
    """Count the rows of the validation split, the first ones, that all processes take together."""
    order = getattr(trainer.val_dataloaders, "sampler", None)
    if not hasattr(order, "global_batch"):
        return None
    return min(order.size, int(trainer.num_val_batches[0]) * order.global_batch)  # type: ignore[union-attr]

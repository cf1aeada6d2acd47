"""Two checkpoints a run: the best by validation loss, and the last, to resume from.

Both are written to a temporary name and moved (Lightning's atomic save), and neither while
the divergence guard is suspicious: a good checkpoint is never overwritten by a bad one.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from stableqat.callbacks.divergence import DivergenceGuard


class _GuardedCheckpoint(ModelCheckpoint):
    enabled: bool

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not _suspicious(trainer):
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _suspicious(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _suspicious(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if not _suspicious(trainer):
            super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _suspicious(trainer):
            super().on_train_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # a gradient that is not finite poisons the weights under a loss that still is
        healthy = all(guard.check_parameters(trainer, trainer.lightning_module) for guard in _guards(trainer))
        if healthy and self.enabled:
            super()._save_checkpoint(trainer, filepath)


class BestCheckpoint(_GuardedCheckpoint):
    """Keep `checkpoints/best.ckpt`, the state with the lowest metric.

    Args:
        monitor: Metric to watch.
        mode: min or max.
        enabled: False writes nothing, for short runs of a study that is after their curves alone.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", enabled: bool = True) -> None:
        self.enabled = enabled
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )


class LastCheckpoint(_GuardedCheckpoint):
    """Keep `checkpoints/last.ckpt`: after every validation, at the end, and on an exception.

    Args:
        every_n_train_steps: Save after this many steps instead of after validations.
        enabled: False writes nothing; such a run begins anew after a cut.
    """

    def __init__(self, every_n_train_steps: int | None = None, enabled: bool = True) -> None:
        self.enabled = enabled
        super().__init__(
            filename="last",
            save_on_exception=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state, unless the last save was at this very step, or nothing is to be saved."""
        super().on_train_end(trainer, pl_module)
        if not _suspicious(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))


def _guards(trainer: L.Trainer) -> list[DivergenceGuard]:
    return [c for c in trainer.callbacks if isinstance(c, DivergenceGuard)]  # type: ignore[attr-defined]


def _suspicious(trainer: L.Trainer) -> bool:
    return any(guard.suspicious for guard in _guards(trainer))

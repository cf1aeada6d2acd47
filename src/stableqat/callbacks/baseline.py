"""What a start loses before it trains: in full precision, and rounded to nearest.

QAT is judged between these two losses. Both are measured on the rows that the run validates on, before its
first step, and without any effect on the training.
"""

import logging
import sys
from math import isfinite, nan
from typing import Any

import lightning as L
import torch

from stableqat.errors import UserError
from stableqat.evaluate.isolation import isolated
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers

logger = logging.getLogger(__name__)


class Baseline(L.Callback):
    """Log `hp/loss_fp` and `hp/loss_ptq`: the start's validation loss in full precision and rounded.

    Rounded is what the quantized model deploys before its first step. Each takes one validation. A run in
    full precision has the first alone, and a run without validation, or one that resumes, measures neither.

    Args:
        enabled: False measures nothing.
        stop_at_chance: Stop where `init_from` names a start that predicts no better than chance in full
            precision, before training on it is wasted.
    """

    def __init__(self, enabled: bool = True, stop_at_chance: bool = True) -> None:
        self.enabled = enabled
        self.stop_at_chance = stop_at_chance
        self.loss_fp = self.loss_ptq = nan

    @property
    def losses(self) -> dict[str, float]:
        """Both losses by their tags; NaN where nothing is measured."""
        return {"hp/loss_fp": self.loss_fp, "hp/loss_ptq": self.loss_ptq}

    def in_words(self, now: float | None = None) -> str:
        """Return what is known of the losses, as one line; empty where nothing is.

        Args:
            now: The present validation loss, if there is one.
        """
        known = {"full precision": self.loss_fp, "rounded": self.loss_ptq, "now": nan if now is None else now}
        parts = [f"{loss:.4g} {what}" for what, loss in known.items() if isfinite(loss)]
        return f"validation loss: {', '.join(parts)}" if parts else ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step.

        Raises:
            UserError: If a start is no better than chance.
        """
        if not self.enabled or trainer.fast_dev_run or trainer.global_step:  # type: ignore[attr-defined]
            return
        if not hasattr(pl_module, "chance") or not sum(trainer.num_val_batches):
            return  # not a training system of this suite, or nothing to validate on
        with full_precision(pl_module):
            self.loss_fp = validation_loss(trainer, pl_module)
        if quantized_layers(pl_module):
            self.loss_ptq = validation_loss(trainer, pl_module)
        for each in trainer.loggers:
            each.log_metrics(self.losses, step=trainer.global_step)
        if trainer.is_global_zero:
            logger.info("start: %s", self.in_words())
        if self.stop_at_chance:
            self._check(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, for a resumed run."""
        return dict(self.losses)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.loss_fp, self.loss_ptq = state_dict["hp/loss_fp"], state_dict["hp/loss_ptq"]

    def _check(self, pl_module: Any) -> None:
        start, chance = pl_module.init_from, pl_module.chance()
        if start is None or chance is None or self.loss_fp < chance:
            return
        needs = "tokenizer" if pl_module.family == "text" else "mean, std and order of classes"
        raise UserError(
            f"model.init_from: {start} predicts no better than chance: its validation loss is "
            f"{self.loss_fp:.4g}, that of a guess {chance:.4g}; check that it is the right checkpoint and "
            f"that the data has its {needs}, or train it anyway with --baseline.stop_at_chance false"
        )


@torch.no_grad()
def validation_loss(trainer: L.Trainer, pl_module: Any, batches: int | None = None) -> float:
    """The loss that a validation would log, without its hooks and logs.

    Args:
        trainer: Has the validation data.
        pl_module: A training system of this suite.
        batches: At most this many batches, the first ones; None takes those of a validation.
    """
    loader: Any = trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, list) else loader
    numbers = range(int(min(trainer.num_val_batches[0], sys.maxsize if batches is None else batches)))
    with trainer.precision_plugin.forward_context(), isolated(pl_module.model):
        for number, batch in zip(numbers, loader, strict=False):  # a loader may draw a seed as it begins
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            trainer.strategy.validation_step(batch, number)
        loss: float = pl_module.val_loss.compute()["loss"].item()
    pl_module.reset_metrics()
    return loss

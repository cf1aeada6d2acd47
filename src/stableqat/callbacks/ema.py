"""An exponential moving average of the weights: what is validated, saved as best and exported.

    average <- d * average + (1 - d) * weights after each step t, with d = min(decay, (1 + t) / (10 + t))

The rise of d lets the average follow a young run, whose weights are still far from where they end.
Lightning's `WeightAveraging` keeps the average, swaps it in for validations and saves both. Latent weights
and scales are averaged; a constant, such as the floor of a scale, stays what it is bit for bit.
"""

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from stableqat.errors import check_range


class EMA(WeightAveraging):
    """Validate, save and deploy a moving average of the weights, while training continues on the weights.

    Args:
        decay: Share of the average that a step keeps: 0.999 averages over about 1,000 steps. null averages
            nothing.
    """

    def __init__(self, decay: float | None = None) -> None:
        check_range("ema.decay", decay, 0, below=1, null=True)
        self.decay = decay
        self._swapped = False
        super().__init__(multi_avg_fn=self._add)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Build the model where its run would, and copy it."""
        if self.decay is None or stage != "fit":
            return
        with trainer.strategy.tensor_init_context():  # the same random weights as without an average
            pl_module.configure_model()
        with warnings.catch_warnings():  # a sharding strategy is refused
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
            super().setup(trainer, pl_module, stage)
        average: Any = self._average_model
        average.n_averaged = average.n_averaged.cpu()  # which is looked at in every step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After each step."""
        return self.decay is not None and step_idx is not None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the model's place."""
        self._swap(pl_module, True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in place for those that measure after a validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back, before anything is saved."""
        self._swap(pl_module, False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Put the weights back, before an interrupted run is saved."""
        self._swap(pl_module, False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the weights in place: the last checkpoint, from which a longer run resumes, needs both."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module."""
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps that are averaged; nothing where none are."""
        return {} if self.decay is None else super().state_dict()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the model, and the weights beside it."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume with both; evaluate with the average."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _swap(self, pl_module: L.LightningModule, average: bool) -> None:
        if self._average_model is not None and average != self._swapped:
            self._swap_models(pl_module)
            self._swapped = average

    @torch.no_grad()
    def _add(self, averages: list[Tensor], weights: list[Tensor], _: Any) -> None:
        assert self.decay is not None
        step = self._latest_update_step
        if averages[0].is_floating_point():
            kept = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, weights, 1 - kept)  # exact where both are equal
        else:
            torch._foreach_copy_(averages, weights)

"""How the latent and the deployed weights move in the landscape: does training re-enter the basin?

`landscape/loss_latent` is the loss of the weights that training moves, `landscape/loss_deployed` that of what
is deployed. If rounding leaves a basin, the deployed loss falls first, while the latent one need not.
`landscape/distance` is `|Q(w) - w| / |w|`, and `landscape/code_flips` the share of codes that differ from the
measurement before. Codes that are kept let `stableqat landscape` draw the way of the deployed weights.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from stableqat.callbacks.baseline import validation_loss
from stableqat.callbacks.record import run_folder
from stableqat.callbacks.throughput import untimed
from stableqat.errors import UserError, check_range
from stableqat.landscape.codes import codes_file, write_codes
from stableqat.landscape.space import WeightSpace, trained_weights
from stableqat.layers.full_precision import full_precision
from stableqat.quantizers import QuantizedWeight


class Trajectory(L.Callback):
    """Log losses, distance and flips of latent and deployed weights, without effect on the training.

    Args:
        every_n_steps: Optimizer steps between measurements, the first before step 1; 0 measures nothing. A
            run that resumes has no flips at its first measurement.
        batches: Validation batches for each of the two losses, the first ones; null takes those of a
            validation.
        keep_codes: Keep codes and scales of each measurement in the run's folder, in as many bits as the
            codes take.

    Raises:
        UserError: If a number is out of range.
    """

    def __init__(self, every_n_steps: int = 0, batches: int | None = None, keep_codes: bool = False) -> None:
        check_range("trajectory.every_n_steps", every_n_steps, 0)
        check_range("trajectory.batches", batches, 1, null=True)
        self.every_n_steps = every_n_steps
        self.batches = batches
        self.keep_codes = keep_codes
        self._codes: list[Tensor] | None = None
        self._seen_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that has no validation loss of this suite."""
        if self.every_n_steps and not hasattr(pl_module, "val_loss"):
            raise UserError(
                f"trajectory.every_n_steps: {type(pl_module).__name__} is not a training system of this "
                "suite, whose validation loss it needs; set it to 0"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the start; a run that resumes has it already.

        Raises:
            UserError: If there is nothing to validate on, or weights are sharded.
        """
        self._codes, self._seen_step = None, trainer.global_step
        if not self.every_n_steps or not trained_weights(pl_module):
            return
        if not sum(trainer.num_val_batches):
            raise UserError(
                "trajectory.every_n_steps: needs validation data to measure losses on; set it to 0"
            )
        if not trainer.global_step:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure after every n-th optimizer step."""
        step, self._seen_step = self._seen_step, trainer.global_step
        if (
            self.every_n_steps
            and step != trainer.global_step
            and not trainer.global_step % self.every_n_steps
        ):
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trained_weights(pl_module):  # full precision, or frozen
            return
        space, step = WeightSpace(pl_module), trainer.global_step
        with untimed(trainer):
            with full_precision(pl_module):
                latent = validation_loss(trainer, pl_module, self.batches)
            values = {
                "landscape/loss_latent": latent,
                "landscape/loss_deployed": validation_loss(trainer, pl_module, self.batches),
            }
            quantized = list(space.quantized())
            codes, self._codes = self._codes, [each.codes for each in quantized]
            values["landscape/distance"] = _distance(space, quantized)
            if codes is not None:
                pairs = zip(codes, self._codes, strict=True)
                flips = torch.stack([(a != b).sum() for a, b in pairs]).sum()
                values["landscape/code_flips"] = flips.item() / space.size
            folder = run_folder(trainer)
            if self.keep_codes and folder is not None and trainer.is_global_zero:
                write_codes(space, quantized, codes_file(folder, step))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


@torch.no_grad()
def _distance(space: WeightSpace, quantized: list[QuantizedWeight]) -> float:
    pairs = zip(space.weights.values(), space.dequantized(quantized), strict=True)
    lengths = [torch.stack([weight.norm(), (value - weight).norm()]) for weight, value in pairs]
    length, away = torch.stack(lengths).norm(dim=0).tolist()
    return float(away / length)

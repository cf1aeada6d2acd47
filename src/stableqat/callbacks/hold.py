"""Fake-quantize each weight once while weights stay as they are: in evaluation, in an accumulated gradient.

Every forward between two changes of a weight needs the same fake-quantized value. Holding it costs the memory
of the weights in the compute type, so it is not done where a single forward would use it.
"""

from typing import Any

import lightning as L
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.hold import hold_weights, release_weights


class HoldWeights(L.Callback):
    """Hold the fake-quantized weights of a module for as long as its weights do not change.

    The modules of this suite and `PrepareQAT` bring it along. It comes after the callbacks that swap weights
    for an evaluation (`WeightAveraging`).
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Hold from the first micro-batch of an accumulated gradient on."""
        if trainer.accumulate_grad_batches > 1:
            self._hold(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Release: the step is about to change the weights."""
        release_weights(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold for an evaluation, and nothing from before: another callback may have swapped weights."""
        release_weights(pl_module)
        self._hold(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Release after an evaluation, FSDP2's roots too: they stay gathered for a backward."""
        release_weights(pl_module)
        for model in pl_module.children():
            if isinstance(model, FSDPModule):
                model.reshard()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_end = on_predict_end = on_validation_end

    def _hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with trainer.precision_plugin.forward_context():
            hold_weights(pl_module)

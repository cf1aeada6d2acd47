"""Fake-quantizes each weight once while weights do not change: in evaluation, and over accumulated batches.

Every forward between two changes of a weight needs the same fake-quantized value. Holding it takes the memory
of the weights in the compute type, so a value that only one forward uses is not held.
"""

from typing import Any

import lightning as L
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.hold import hold_weights, release_weights


class HoldWeights(L.Callback):
    """Hold the fake-quantized weights of a module for as long as its weights do not change.

    The modules of this suite and `PrepareQAT` add it, after the callbacks that swap weights for an evaluation
    (`WeightAveraging`).
    """

    _holds = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Hold from the first micro-batch of an accumulated gradient."""
        if trainer.accumulate_grad_batches > 1:
            self._hold(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Release: the step is about to change the weights."""
        if self._holds:  # a walk over all modules takes longer than their step
            self._release(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold anew for an evaluation, as another callback may have swapped weights."""
        self._release(pl_module)
        self._hold(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Release after an evaluation; also FSDP2's roots, which stay gathered for a backward."""
        self._release(pl_module)
        for model in pl_module.children():
            if isinstance(model, FSDPModule):
                model.reshard()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_end = on_predict_end = on_validation_end

    def _hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._holds = True
        with trainer.precision_plugin.forward_context():
            hold_weights(pl_module)

    def _release(self, pl_module: L.LightningModule) -> None:
        self._holds = False
        release_weights(pl_module)

"""Makes a step depend only on its position in the run, so a resumed run repeats the uninterrupted one."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class StepPosition(L.Callback):
    """Seed each micro-batch (dropout, mixup, stochastic quantizers) by its position, and count no step twice.

    The position is the run's seed, the epoch, the batch and the process. The modules of this suite add the
    callback.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed all generators."""
        # a step cut short by an exception is saved as begun, and Lightning counts it as done on resume
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = trainer.global_step
        batches = loop.batch_progress.total
        batches.ready, batches.started = batches.processed + 1, batches.processed  # type: ignore[attr-defined]
        position = [pl_module.seed, pl_module.current_epoch, batch_idx, pl_module.global_rank]
        state = int(np.random.SeedSequence(position).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)

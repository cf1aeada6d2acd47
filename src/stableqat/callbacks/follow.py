"""Lets quantizers follow a run's training: its progress, their penalties, their own part of each step."""

from typing import Any

import lightning as L
from torch.optim import Optimizer

from stableqat.clock import Clock, follow


class FollowTraining(L.Callback):
    """Drive the clock of a module's quantizers, see `stableqat.follow`.

    The modules of this suite and `PrepareQAT` add it. Progress is the trainer's global step as a share of the
    run's planned steps. Gradients of penalties are added before clipping.
    """

    clock: Clock | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock where the run starts or resumes."""
        planned = trainer.estimated_stepping_batches
        total = None if planned in (float("inf"), -1) else int(planned)
        self.clock = follow(pl_module, trainer.optimizers, total, step=trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Follow the trainer, which also counts steps that an optimizer skipped."""
        assert self.clock is not None
        self.clock.at(trainer.global_step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the gradients of penalties, before clipping."""
        assert self.clock is not None
        self.clock.penalize(optimizer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the clock."""
        if self.clock is not None:
            self.clock.remove()
            self.clock = None

"""Learning-rate schedules: linear warm-up with a cosine, and what any schedule needs to compare and resume.

A schedule scales every parameter group by the same factor, so the scales keep their own multiplier.
"""

from math import cos, pi
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from stableqat.errors import UserError, check_range


class CosineWarmup(LambdaLR):
    """Linear warm-up over `warmup_steps`, then half a cosine to `final_ratio` at `total_steps`.

    Args:
        optimizer: The optimizer.
        warmup_steps: Steps before the peak, or a share of `total_steps` if below 1; 0 starts at the peak, as
            published recipes do.
        total_steps: Step at which the cosine ends; None takes the trainer's number of steps.
        final_ratio: Learning rate at the end, as a share of the peak.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | float = 0,
        total_steps: int | None = None,
        final_ratio: float = 0.0,
    ) -> None:
        check_range("warmup_steps", warmup_steps, 0)
        check_range("final_ratio", final_ratio, 0, 1)
        if total_steps is not None and total_steps <= warmup_steps:
            raise UserError(f"total_steps: {total_steps} must be more than warmup_steps, {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_ratio = final_ratio
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        warmup = self.warmup_steps
        if 0 < warmup < 1:
            warmup = int(warmup * (self.total_steps or 0))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.total_steps is None:
            return 1.0
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.final_ratio + (1 - self.final_ratio) * (1 + cos(pi * done)) / 2

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule, not its shape: resumed with more steps, a run follows their cosine."""
        shape = ("warmup_steps", "total_steps", "final_ratio")
        return {key: value for key, value in super().state_dict().items() if key not in shape}


def check_schedule(scheduler: object, trainer: L.Trainer) -> None:
    """Refuse a schedule that does not follow steps, has no end, or ends before the run.

    Raises:
        UserError: Naming the setting.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "lr_scheduler: ReduceLROnPlateau follows a metric, but runs only compare and resume if rates "
            "follow the step; take stableqat.modules.CosineWarmup or another schedule of torch"
        )
    epochs = trainer.max_epochs
    if epochs is None and any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        epochs = -1  # Lightning's default beside a Timer
    if getattr(scheduler, "total_steps", 0) is None and epochs == trainer.max_steps == -1:
        raise UserError(
            "total_steps: the schedule ends with the run, but the run has no end; set total_steps, "
            "trainer.max_steps or trainer.max_epochs"
        )
    _check_end(scheduler, trainer.max_steps)


def end_with_run(scheduler: object, trainer: L.Trainer) -> int | None:
    """Let a schedule without an end of its own end with the run.

    Args:
        scheduler: The schedule.
        trainer: Knows the number of steps.

    Returns:
        The steps of the run if the schedule ends with it.

    Raises:
        UserError: As `check_schedule`.
    """
    check_schedule(scheduler, trainer)
    if not hasattr(scheduler, "total_steps"):
        return None
    steps = trainer.estimated_stepping_batches
    _check_end(scheduler, steps)
    if scheduler.total_steps is not None:
        return None
    vars(scheduler)["total_steps"] = int(steps)
    return int(steps)


def _check_end(scheduler: object, steps: float) -> None:
    """Refuse a schedule that would raise in the middle of the run."""
    if isinstance(scheduler, OneCycleLR) and steps > scheduler.total_steps:
        raise UserError(
            f"total_steps: OneCycleLR ends after {scheduler.total_steps} steps, but the run takes {steps}; "
            f"set it to {steps}"
        )


def place(scheduler: object, steps: int | None) -> None:
    """Make a schedule this run's: a resumed one brings the rate, and the end, that were planned before.

    Args:
        scheduler: The schedule, at its step.
        steps: What `end_with_run` returned.
    """
    if steps is not None:
        vars(scheduler)["total_steps"] = steps
    if not isinstance(scheduler, LambdaLR):
        return  # the step alone does not decide its rates
    rates = [rate(scheduler.last_epoch) for rate in scheduler.lr_lambdas]
    scheduler._last_lr = [lr * rate for lr, rate in zip(scheduler.base_lrs, rates, strict=True)]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr

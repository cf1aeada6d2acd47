"""Ends a run that has diverged, records it, and keeps its good checkpoints.

A run has diverged if its loss, a weight or a scale is not finite, or if the moving average of the loss (EMA
0.9) stays above the initial loss + 1 for 20 steps. A step whose loss is not finite is skipped. Divergence is
a result, not an error: the run ends normally, with exit code 0.

A fused optimizer skips a step by itself, told so by a tensor on its device. Then nothing waits for the loss:
it is judged a step later, or when somebody asks.
"""

import logging
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from stableqat.callbacks.arrival import Deferred, on_its_way
from stableqat.errors import check_range
from stableqat.quantizers.shard import local

logger = logging.getLogger(__name__)


class DivergenceGuard(L.Callback):
    """Stop a diverged run.

    Args:
        margin: How far the moving average may rise above the initial loss, in nats.
        patience: Consecutive optimizer steps for which it may stay above that.
        decay: Decay of the moving average.
        check_parameters_every: Optimizer steps between checks that every weight and scale is finite.

    Raises:
        UserError: If a setting is out of range, so that it would end a healthy run or continue a diverged
            one.
    """

    def __init__(
        self, margin: float = 1.0, patience: int = 20, decay: float = 0.9, check_parameters_every: int = 50
    ) -> None:
        check_range("guard.margin", margin, 0)
        check_range("guard.patience", patience, 1)
        check_range("guard.decay", decay, 0, below=1)
        check_range("guard.check_parameters_every", check_parameters_every, 1)
        self.margin = margin
        self.patience = patience
        self.decay = decay
        self.check_parameters_every = check_parameters_every
        self.initial_loss: float | None = None
        self._diverged = False
        self._average = 0.0
        self._steps_above = 0
        self._micro_losses: list[Tensor] = []
        self._judgement = Deferred()

    @property
    def diverged(self) -> bool:
        """Whether the run has diverged."""
        self._judgement.catch_up()
        return self._diverged

    @property
    def suspicious(self) -> bool:
        """Whether the run has diverged or may be diverging, so that no checkpoint is written."""
        return self.diverged or self._steps_above > 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Collect the loss of a micro-batch, already divided by the number of micro-batches."""
        self._micro_losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the step's loss before any weight changes."""
        loss = trainer.strategy.reduce(torch.stack(self._micro_losses).sum(), reduce_op="mean")
        self._micro_losses.clear()
        if scaler := getattr(trainer.precision_plugin, "scaler", None):  # the loss here is scaled
            loss = loss / scaler.get_scale()
        judge = partial(self._judge, trainer, pl_module, trainer.global_step)
        if self.diverged:  # since the step before
            drop = True
        elif optimizer.defaults.get("fused") and not scaler:
            optimizer.found_inf = (~loss.isfinite()).float()  # type: ignore[attr-defined]
            self._judgement.put_off(partial(_judge_later, on_its_way(loss), judge))
            drop = False
        else:
            value = loss.item()
            judge(value)
            drop = not isfinite(value)
        if drop:
            pl_module.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient

    def _judge(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int, loss: float) -> None:
        if not isfinite(loss):
            self._stop(trainer, pl_module, step, f"the loss is {loss}")
            return
        if self.initial_loss is None:
            self.initial_loss = self._average = loss
        self._average = self.decay * self._average + (1 - self.decay) * loss
        above = self._average > self.initial_loss + self.margin
        self._steps_above = self._steps_above + 1 if above else 0
        if self._steps_above >= self.patience:
            reason = (
                f"the average loss {self._average:.3f} has stayed above the initial {self.initial_loss:.3f} "
                f"+ {self.margin} for {self.patience} steps"
            )
            self._stop(trainer, pl_module, step, reason)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Check the parameters themselves now and then, as a clipped infinity gives a finite loss."""
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._judgement.catch_up()
        if not self._diverged and trainer.global_step % self.check_parameters_every == 0:
            self.check_parameters(trainer, pl_module)

    def check_parameters(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether every weight and scale is finite on all processes; otherwise the run has diverged.

        Args:
            trainer: The trainer, which stops if one is not finite.
            pl_module: The module with the parameters.
        """
        bad = torch.tensor(float(bool(_non_finite(pl_module))), device=pl_module.device)
        if trainer.strategy.reduce(bad, reduce_op="sum") == 0:
            return True
        if not self.diverged:
            self._stop(trainer, pl_module, trainer.global_step, "a parameter is not finite")
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide like the uninterrupted one."""
        self._judgement.catch_up()
        return {"initial_loss": self.initial_loss, "average": self._average, "steps_above": self._steps_above}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.initial_loss = state_dict["initial_loss"]
        self._average = state_dict["average"]
        self._steps_above = state_dict["steps_above"]

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int, reason: str) -> None:
        self._diverged = True
        trainer.should_stop = True
        names = _non_finite(pl_module)
        blame = f"; not finite: {', '.join(names)}" if names else ""
        logger.warning("diverged at step %d: %s%s", step, reason, blame)


def _judge_later(read: Callable[[], Tensor], judge: Callable[[float], None]) -> None:
    judge(read().item())


@torch.no_grad()
def _non_finite(pl_module: L.LightningModule) -> list[str]:
    named = [(name, local(p)) for name, p in pl_module.named_parameters()]
    finite = torch.stack([p.isfinite().all() for _, p in named]).tolist()
    return [name for (name, _), ok in zip(named, finite, strict=True) if not ok]

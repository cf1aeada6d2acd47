"""The cosine between the surrogate's gradient and the gradient of a smoothed loss.

The loss of quantized weights is a staircase, but `L_s(v) = E L(Q(v + sigma e))` has a gradient: v are latent
weights in units of their scales, e is standard normal. By Stein's identity the central difference
`f = [L(v + sigma e) - L(v - sigma e)] / (2 sigma)` has `E f <u, e> = <u, grad L_s>` for any u, without an
error of linearisation, so `E f^2` is `|grad L_s|^2` plus a residue, the part of f that is not linear in e.
With `a` the slope of L_s along the surrogate's unit gradient u, `cos = a / sqrt(a^2 + E (f - a <u, e>)^2)`.
The residue pulls it towards 0, for the staircase alone by 2^(-1/4) = 0.84 (small sigma, weights spread
evenly), so compare methods only with each other, at one sigma. A small sigma measures the fit to the
staircase's shape; near 1/2 any constant surrogate fits.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from stableqat.callbacks.throughput import untimed
from stableqat.errors import UserError, check_range
from stableqat.landscape.space import Direction, Point, WeightSpace, dot, norm, trained_weights

CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # signs of the noise and of the surrogate's gradient


class GradientMismatch(L.Callback):
    """Log `quant/grad_cosine` and its standard error, `quant/grad_cosine_se`, without effect on the training.

    A module of your own needs a method `loss(batch)` that returns the training loss and logs nothing. The
    cosine is measured before a step, on the step's batch, from one gradient and four losses per direction; it
    takes the memory of two copies of the quantized weights.

    Args:
        every_n_steps: Optimizer steps between measurements, the first before step 1; 0 measures nothing.
        directions: Random directions per measurement; the error falls with their square root.
        sigma: Standard deviation of the smoothing noise in units of each weight's scale.

    Raises:
        UserError: If a setting is out of range, or weights are sharded.
    """

    def __init__(self, every_n_steps: int = 0, directions: int = 32, sigma: float = 0.1) -> None:
        check_range("mismatch.every_n_steps", every_n_steps, 0)
        check_range("mismatch.directions", directions, 2)
        if not 0 < sigma < float("inf"):
            raise UserError(f"mismatch.sigma: must be a number above 0, not {sigma}")
        self.every_n_steps = every_n_steps
        self.directions = directions
        self.sigma = sigma
        self._seen_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse sharded weights, as directions are drawn for whole ones, and a module without a `loss`."""
        if self.every_n_steps and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "mismatch.every_n_steps: gradient mismatch cannot be measured on sharded weights; "
                "set it to 0, or take --trainer.strategy ddp"
            )
        if self.every_n_steps and not _takes_a_batch(getattr(type(pl_module), "loss", None)):
            raise UserError(
                f"mismatch.every_n_steps: {type(pl_module).__name__} has no method loss(batch) to measure; "
                "define one that returns the training loss, and call it in training_step"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure at the first micro-batch of a step."""
        step = trainer.global_step
        if not self.every_n_steps or step % self.every_n_steps or step == self._seen_step:
            return
        self._seen_step = step
        if not trained_weights(pl_module):  # full precision, or frozen
            return
        probe = _Probe(trainer, pl_module, batch, self.sigma)
        first = step * self.directions  # the same directions in every run and process
        with untimed(trainer):
            cosine, error = _cosine(*probe.slopes(range(first, first + self.directions)))
        if cosine.isfinite():  # it is not if a gradient is 0 or a loss overflows
            metrics = {"quant/grad_cosine": cosine.item(), "quant/grad_cosine_se": error.item()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)


def _takes_a_batch(loss: Any) -> bool:
    """Whether this is a method of one argument, unlike a criterion that a module calls its loss."""
    try:
        inspect.signature(loss).bind("self", "batch")
    except TypeError:
        return False
    return True


class _Probe:
    """The training loss of one batch as a function of the latent weights in units of their scales.

    Args:
        trainer: Has the precision, and the processes over which to average the loss.
        pl_module: Has `loss` and the quantized weights.
        batch: The batch.
        sigma: Length of a step away from the weights.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, sigma: float) -> None:
        self.trainer, self.pl_module, self.batch, self.sigma = trainer, pl_module, batch, sigma
        self.space = WeightSpace(pl_module)

    def slopes(self, seeds: range) -> tuple[Tensor, Tensor, Tensor]:
        """Measure slopes of the loss, one per direction of noise.

        Args:
            seeds: One per direction.

        Returns:
            Slope along the surrogate's unit gradient at both ends of the noise, slope along the noise, and
            the component of the noise along that gradient.
        """
        gradient = self._unit_gradient()
        with self.space.kept() as start:
            losses = [[self._loss_at(start, gradient, seed, signs) for signs in CORNERS] for seed in seeds]
        shared = torch.stack([dot(gradient, self.space.noise(seed)) for seed in seeds])
        table = torch.stack([torch.stack(row) for row in losses]).float()
        table = self.trainer.strategy.reduce(table, reduce_op="mean").cpu().double()
        signs = torch.tensor(CORNERS, dtype=table.dtype)
        across, along = (table @ signs / (len(CORNERS) * self.sigma)).T
        return along, across, shared.cpu().double()

    def _unit_gradient(self) -> Point:
        """Return the surrogate's gradient by weights in units of their scales, of length 1 in total."""
        weights = list(self.space.weights.values())
        with _unnoticed(self.pl_module):
            found = torch.autograd.grad(self._loss(), weights, materialize_grads=True)
        mean = [self.trainer.strategy.reduce(each, reduce_op="mean") for each in found]
        scaled = list(self.space.in_steps(mean))  # the chain rule
        length = norm(scaled)
        return [each.div_(length) for each in scaled]

    @torch.no_grad()
    def _loss_at(self, start: Point, gradient: Point, seed: int, signs: Sequence[int]) -> Tensor:
        directions: tuple[Direction, Direction] = (self.space.noise(seed), gradient)
        steps = [
            (sign * self.sigma, self.space.in_steps(d)) for sign, d in zip(signs, directions, strict=True)
        ]
        self.space.move(start, *steps)
        with _unnoticed(self.pl_module):
            return self._loss()

    def _loss(self) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            loss: Tensor = self.pl_module.loss(self.batch)  # type: ignore[operator]
        return loss


def _cosine(along: Tensor, across: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine of this file's docstring and its standard error, by the jackknife over directions."""
    moments = torch.stack([along, across * across, across * shared, shared * shared])
    count = moments.shape[1]
    others = (moments.sum(1, keepdim=True) - moments) / (count - 1)
    error = ((count - 1) * _cosine_of(others).var(correction=0)).sqrt()
    return _cosine_of(moments.mean(1)), error


def _cosine_of(moments: Tensor) -> Tensor:
    along, square, product, shared = moments
    rest = square - 2 * along * product + along * along * shared
    return along / (along * along + rest).sqrt()


@contextmanager
def _unnoticed(pl_module: L.LightningModule) -> Iterator[None]:
    """Restore random states and buffers at the end."""
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    try:
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

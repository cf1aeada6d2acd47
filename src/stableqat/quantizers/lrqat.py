"""LR-QAT: the weight is frozen, and a low-rank term inside the rounding learns (arXiv 2406.06385).

`w_q = s (clamp(round(Phi + alpha/r A B), q_min, q_max) - z)`, where `Phi` is the start in units of its scale,
clipped to the grid and kept in 8 bits: the code's `b`, and `8 - b` of its fraction. Unlike LoRA, what was
learned disappears into the codes. A weight takes one byte, without a gradient or an optimizer's states; the
trade-off is a change of rank `r`, and a small product in each forward, which the backward computes again.
"""

from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from stableqat import ops
from stableqat.errors import UserError
from stableqat.quantizers.base import Quantizer, Role, local


class LRQAT(Quantizer):
    """Low-rank change of a frozen weight, straight-through gradient; integer grid by default.

    Factors `factor_a` (zero at first) and `factor_b` (Kaiming-uniform) learn beside the scale. `Phi` does not
    move with the scale, so the scale's gradient is `q - z` for every weight.

    Args:
        weight: The start, `(out, ...)`, which stays as it is.
        rank: Columns of A and rows of B, at most the smaller side of the weight.
        alpha: The product of the factors counts `alpha / rank`. Default: the rank, so that it counts once.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.

    Raises:
        UserError: If the rank is not a positive whole number, or as `Quantizer`.
    """

    trains_weight = False
    initial_scale: nn.Parameter
    factor_a: nn.Parameter
    factor_b: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int = 32,
        alpha: float | None = None,
        mask: ops.Mask = "range",
        **kwargs: Any,
    ) -> None:
        if isinstance(rank, bool) or rank != int(rank) or rank < 1:
            raise UserError(f"rank: must be a whole number from 1 on, not {rank}")
        self.rank = min(int(rank), weight.shape[0], weight[0].numel())
        self.alpha = float(self.rank if alpha is None else alpha)
        super().__init__(weight, surrogate=ops.Identity(mask), **kwargs)

    def allocate(self, shape: tuple[int, int], **options: Any) -> None:
        """Add the factors, and the scale in whose units the weight is taken."""
        super().allocate(shape, **options)
        rows, *inputs = self.weight_shape
        self.initial_scale = nn.Parameter(torch.full(shape, torch.nan, **options), requires_grad=False)
        self.factor_a = nn.Parameter(torch.full((rows, self.rank), torch.nan, **options))
        columns = torch.Size(inputs).numel()
        self.factor_b = nn.Parameter(torch.full((self.rank, columns), torch.nan, **options))

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set the scales, A to zero and B to Kaiming-uniform noise."""
        super().initialize(weight)
        self.initial_scale.copy_(self.scale)
        self.factor_a.zero_()
        nn.init.kaiming_uniform_(self.factor_b, a=sqrt(5))

    def roles(self) -> dict[str, Role]:
        """The factors have a learning rate of their own."""
        return {**super().roles(), "factor_a": "factor", "factor_b": "factor"}

    def describe(self) -> dict[str, str | int | float]:
        """Also rank and alpha."""
        return {**super().describe(), "rank": self.rank, "alpha": self.alpha}

    @torch.no_grad()
    def stored(self, weight: Tensor) -> Tensor:
        """`Phi` as int8, in units of `2^(bits - 8)`; of this process's shard."""
        weight = local(weight)
        if weight.dtype == torch.int8:
            return weight
        in_steps = _per_scale(torch.div, weight.to(self._working(weight)), local(self.initial_scale))
        phi = (in_steps + self.grid.zero_point).clamp(self.grid.q_min, self.grid.q_max)
        return (phi * self._units).round().to(torch.int8)

    def in_steps(self, weight: Tensor) -> Tensor:
        """The latent weight in steps of the scale, `Phi - z + alpha/r A B`; of this process's shard."""
        dtype, device = self._working(weight), "cpu" if weight.is_meta else weight.device.type
        b: Tensor = self.factor_b
        if isinstance(b, DTensor):  # outside the forward, for which FSDP gathers it
            b = b.full_tensor()
        with torch.autocast(device, enabled=False):  # what is deployed is computed without
            change = local(self.factor_a).to(dtype) @ b.to(dtype)
        phi = self.stored(weight).to(dtype) / self._units
        return phi - self.grid.zero_point + self.alpha / self.rank * change.view_as(phi)

    def latent(self, weight: Tensor) -> Tensor:
        """The tensor that is rounded, of this process's shard."""
        in_steps = self.in_steps(weight)
        scale = self.effective_scale().to(in_steps.dtype)
        return _per_scale(torch.mul, in_steps, scale).to(self._floating(weight).dtype)

    def set_latent(self, weight: Tensor, latent: Tensor) -> None:
        """Take a new start, without a change."""
        local(self.factor_a).zero_()
        local(self.initial_scale).copy_(self.effective_scale())
        local(weight).copy_(latent if weight.is_floating_point() else self.stored(latent))

    def codes(self, weight: Tensor) -> Tensor:
        """The codes, which do not depend on the scale."""
        return self._codes(self.in_steps(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; gradients reach the factors and the scale."""
        in_steps = self.in_steps(weight)
        low, high = self.grid.bounds(self.surrogate.mask)
        inside = in_steps.clamp(low, high)
        levels = self._codes(in_steps.detach()).to(in_steps.dtype) - self.grid.zero_point
        levels = levels + (inside - inside.detach())  # adds 0, and the gradient of what is inside
        shared = in_steps.numel() // self.scale.numel()
        moved = (self.scale - self.scale.detach()) / sqrt(shared * max(self.grid.q_max, 1))
        scale = (self.effective_scale() + moved).to(in_steps.dtype)  # LSQ's gradient scale, as everywhere
        return _per_scale(torch.mul, levels, scale).to(ops.compute_dtype(self._floating(weight)))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """See `Quantizer.linear`; None recomputes everywhere, lest each value outweigh what it is made of."""
        base: Any = super().linear
        compute = partial(base, **options)
        kept = options.get("recompute") is False or options.get("value") is not None
        if kept or not torch.is_grad_enabled():
            return compute(input, weight, bias)
        # up to what the product saves, not the product itself
        return checkpoint(compute, input, weight, bias, use_reentrant=False, preserve_rng_state=False)

    @property
    def _units(self) -> int:
        """Units of a stored weight per step."""
        return 2 ** (8 - self.bits)

    def _codes(self, in_steps: Tensor) -> Tensor:
        one = torch.ones_like(local(self.scale.detach()))
        return ops.quantize_codes(in_steps, one, grid=self.grid)

    def _floating(self, weight: Tensor) -> Tensor:
        """Has the type of values: the weight, or what learns if the weight is stored."""
        return weight if weight.is_floating_point() else self.factor_a

    def _working(self, weight: Tensor) -> torch.dtype:
        return torch.float64 if self._floating(weight).dtype == torch.float64 else torch.float32


def _per_scale(operation: Any, values: Tensor, scale: Tensor) -> Tensor:
    """Multiply or divide values by the scale that they share."""
    return operation(values.reshape(*scale.shape, -1), scale.unsqueeze(-1)).view_as(values)

"""The one place of forward and backward: round in the forward, a surrogate in the backward.

`fake_quantize` is what every quantizer calls. It saves only the tensors it was given and
recomputes codes and surrogate in the backward, so that QAT's memory is full precision's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stableqat.ops import reference
from stableqat.ops.grids import Grid
from stableqat.ops.surrogates import Surrogate


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    grid: Grid,
    surrogate: Surrogate,
    surrogate_param: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize `x`, with a surrogate gradient.

    Args:
        x: Latent weight, `(out, ...)`.
        scale: Distance between levels, positive: `(out, 1)`, `(out, groups)` (each group is
            a run of consecutive inputs) or `(1, 1)` for the whole tensor.
        zero_point: Replaces the grid's own, shaped like `scale`; receives no gradient.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        surrogate_param: The surrogate's learned parameter, shaped like `scale`.

    Returns:
        Values on the grid, shaped like `x`, in the autocast type where autocast is on and in
        the type of `x` otherwise; the mathematics is float32 either way.
    """
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)  # meta has no autocast to ask
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return _FakeQuantize.apply(x, scale, zero_point, surrogate_param, grid, surrogate, dtype)


def quantize_codes(x: Tensor, scale: Tensor, *, grid: Grid) -> Tensor:
    """The codes behind `fake_quantize`'s value, int8, shaped like `x`."""
    grouped, scale, _ = _grouped(x, scale, None)
    return reference.codes(grouped / scale, grid.zero_point, grid).to(torch.int8).reshape(x.shape)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: float, dtype: torch.dtype) -> Tensor:
    """`s * (q - z)` in `dtype`: bit for bit the value of `fake_quantize` for a weight of that type."""
    grouped, scale, _ = _grouped(codes.to(reference.working_dtype(dtype)), scale, None)
    return (grouped - zero_point).mul_(scale).reshape(codes.shape).to(dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        param: Tensor | None,
        grid: Grid,
        surrogate: Surrogate,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, param)
        ctx.grid, ctx.surrogate = grid, surrogate
        grouped, grouped_scale, zero = _grouped(x, scale, zero_point)
        value = reference.forward(grouped, grouped_scale, grid.zero_point if zero is None else zero, grid)
        # no cast where none is needed: torch 2.11 compiles an idle `.to` at the end, as it does in-place
        # steps of a forward, into a function whose gradients are all zero
        value = value.reshape(x.shape)
        return value if value.dtype == dtype else value.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, param = ctx.saved_tensors
        grouped, grouped_scale, zero = _grouped(x, scale, zero_point)
        grouped_param = None if param is None else param.to(grouped.dtype).unsqueeze(-1)
        weight_grad, scale_grad, param_grad = reference.backward(
            grad.reshape(grouped.shape).to(grouped.dtype),
            grouped,
            grouped_scale,
            ctx.grid.zero_point if zero is None else zero,
            ctx.grid,
            ctx.surrogate,
            grouped_param,
        )
        return (
            weight_grad.reshape(x.shape).to(x.dtype),
            scale_grad.squeeze(-1).to(scale.dtype),
            None,
            None if param_grad is None else param_grad.squeeze(-1).to(param.dtype),
            None,
            None,
            None,
        )


def _grouped(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = reference.working_dtype(x.dtype)
    zero = None if zero_point is None else zero_point.to(dtype).unsqueeze(-1)
    return x.reshape(*scale.shape, -1).to(dtype), scale.to(dtype).unsqueeze(-1), zero


class _FloorScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, floor: Tensor) -> Tensor:
        return torch.maximum(scale, floor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def floor_scale(scale: Tensor, floor: Tensor) -> Tensor:
    """`max(scale, floor)` whose gradient passes to `scale` on both sides, so that it can return.

    Args:
        scale: Learned scale.
        floor: Small positive floor, shaped like `scale`.

    Returns:
        A scale that is never zero or negative; NaN stays NaN.
    """
    return _FloorScale.apply(scale, floor)

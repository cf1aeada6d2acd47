"""Forward and backward of fake quantization in plain torch: the reference that every kernel must reproduce.

Tensors arrive grouped, as `(rows, groups, n)` with a scale of `(rows, groups, 1)` that the `n` weights of a
group share. Arithmetic is float32 (float64 for float64 input), whatever the storage type. The backward works
in place where it can: on a CPU, memory traffic decides its speed.
"""

from math import sqrt

import torch
from torch import Tensor

from stableqat.ops.grids import Grid
from stableqat.ops.operands import Operands
from stableqat.ops.surrogates import Surrogate


def grouped(operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands as the functions below take them: grouped `x`, scale (at least its floor) and parameter."""
    x, scale, floor, param = operands
    dtype = working_dtype(x.dtype)
    if floor is not None:
        scale = acting_scale(scale, floor)
    param = None if param is None else param.to(dtype).unsqueeze(-1)
    return x.reshape(*scale.shape, -1).to(dtype), scale.to(dtype).unsqueeze(-1), param


def acting_scale(scale: Tensor, floor: Tensor) -> Tensor:
    """The scale as the forward uses it: no closer to zero than its floor, and of the floor's sign."""
    return torch.where(floor < 0, torch.minimum(scale, floor), torch.maximum(scale, floor))


def codes(v: Tensor, grid: Grid) -> Tensor:
    """Codes `clamp(round(v + z), q_min, q_max)`, as floats, rounding half to even."""
    return (v + grid.zero_point).round().clamp(grid.q_min, grid.q_max)


def forward(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Fake-quantized value `s * (q - z)`, in the type of the arithmetic."""
    # nothing in place: compiled by torch 2.11, the gradients would all be zero
    return (codes(x / scale, grid) - grid.zero_point) * scale


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, grid: Grid, surrogate: Surrogate, param: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the weight, the scale and the surrogate's parameter.

    Weight: `grad * g(u) * inside`. Scale (LSQ, arXiv 1902.08153 eq. 3): `(q - z) - v` inside, the outermost
    level outside; on the binary grid `q - z` everywhere, because there the value is `s/2 * sign(w)`. `g(u)`
    never enters the scale's gradient, so methods differ in one thing only. The gradients of scale and
    parameter are multiplied by LSQ's `1 / sqrt(n * max(q_max, 1))`.

    Args:
        grad: Upstream gradient, grouped like `x`.
        x: Latent weight, `(rows, groups, n)`.
        scale: `(rows, groups, 1)`.
        grid: The grid.
        surrogate: The surrogate with its mask.
        param: The surrogate's learned parameter, shaped like `scale`, or None.

    Returns:
        Gradients shaped like `x`, `scale` and `param`.
    """
    v = x / scale
    y = v + grid.zero_point
    nearest = y.round()
    u = y.sub_(nearest)
    low, high = grid.bounds(surrogate.mask)
    clipped = v.clamp(low, high)
    inside = v.sub_(clipped).eq_(0)  # 0 or 1 as floats: boolean masks cost a CPU several times as much
    reached = grad * inside
    grad_scale = 1 / sqrt(x.shape[-1] * max(grid.q_max, 1))

    toward_scale = nearest.clamp_(grid.q_min, grid.q_max).sub_(grid.zero_point)
    if grid.name != "binary":
        toward_scale.sub_(clipped.mul_(inside))  # finite even where the weight is not
    scale_grad = toward_scale.mul_(grad).sum(-1, keepdim=True).mul_(grad_scale)

    factor, by_param = surrogate.derivatives(u, param)
    param_grad = None
    if by_param is not None:
        param_grad = by_param.mul_(reached).sum(-1, keepdim=True).mul_(scale).mul_(grad_scale)
    return (reached if factor is None else factor.mul_(reached)), scale_grad, param_grad


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""GPTQ (Frantar et al., arXiv 2210.17323): rounds inputs one by one, and later ones make up for earlier.

The layer's output error is `(w - q) H (w - q)^T` with `H = (2/n) sum x x^T` over calibration inputs. With U
the upper Cholesky factor of `H^-1`, input i is rounded and its error `e = (w_i - q_i) / U_ii` is spread over
the inputs still to come: `w_j -= e U_ij`. It sees the loss as a quadratic around the trained weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableqat import ops
from stableqat.quantizers import QuantizedWeight, Quantizer

_BLOCK = 128  # inputs whose errors are spread among themselves first
_MORE_DAMPING = 10.0
_ATTEMPTS = 4


class SecondMoment:
    """`(2/n) sum x x^T` over a layer's inputs, added up in float32.

    Args:
        inputs: Number of the layer's inputs.
        device: Where the sum is kept.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(inputs, inputs, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add inputs `(..., in)`."""
        x = x.detach().flatten(0, -2).float()
        self.sum.addmm_(x.T, x)
        self.rows += len(x)

    @property
    def value(self) -> Tensor:
        """The matrix, `(in, in)`."""
        return self.sum * (2 / max(self.rows, 1))


@dataclass(frozen=True)
class Rounded:
    """What became of a weight.

    Attributes:
        weight: Its codes and scales.
        error: `(w - q) H (w - q)^T`, summed over rows.
        nearest: The same for rounding to nearest with the starting scales.
        unseen: Number of inputs that were 0 in all of the calibration data; they are rounded to nearest.
        damping: The damping that was used.
    """

    weight: QuantizedWeight
    error: float
    nearest: float
    unseen: int
    damping: float


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    quantizer: Quantizer,
    *,
    damping: float = 0.01,
    act_order: bool = True,
) -> Rounded:
    """Round a weight onto its quantizer's grid.

    Args:
        weight: Latent weight, `(out, in)`.
        hessian: `(in, in)`.
        quantizer: Its grid and, per row or group, its scales.
        damping: Added to the diagonal, as a share of its mean; ten times more, up to a thousand times, where
            the matrix is singular all the same.
        act_order: Round inputs in the order of falling diagonal. A group's scales then come from the weights
            as they are; without it, from those that earlier groups have changed.

    Raises:
        ValueError: If the matrix is not finite, or singular with any damping.
    """
    grid, scale = quantizer.grid, quantizer.effective_scale().float()
    scale = scale.expand(len(weight), -1).clone()
    groups, original = scale.shape[1], weight.float()
    size = weight.shape[1] // groups
    unseen = hessian.diagonal() == 0
    h = hessian.clone()
    h.diagonal()[unseen] = 1.0
    order = torch.arange(len(h), device=h.device)
    if act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    factor, used = _inverse_factor(h[order][:, order], damping)
    w = original[:, order]
    codes, levels = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    group_of = (order // size).tolist()
    for start in range(0, len(h), _BLOCK):
        stop = min(start + _BLOCK, len(h))
        errors = w.new_zeros(len(w), stop - start)
        for i in range(start, stop):
            this, group = slice(i, i + 1), slice(group_of[i], group_of[i] + 1)
            if groups > 1 and not act_order and i % size == 0:
                scale[:, group] = _scale_of(w[:, i : i + size], quantizer)
            codes[:, this] = ops.quantize_codes(w[:, this], scale[:, group], grid=grid)
            levels[:, this] = ops.dequantize_codes(codes[:, this], scale[:, group], grid.zero_point, w.dtype)
            difference = (w[:, this] - levels[:, this]) / factor[i, i]
            w[:, i:stop] -= difference * factor[i, i:stop]
            errors[:, i - start] = difference[:, 0]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    codes, levels = codes[:, back], levels[:, back]
    made = quantizer.quantize(weight)
    own_scale = scale if made.scale.shape == scale.shape else scale[:1, :1]
    rounded = replace(made, codes=codes, scale=own_scale.to(made.scale.dtype))
    error, nearest = (output_error(original - v, hessian) for v in (levels, made.dequantize().float()))
    return Rounded(rounded, error, nearest, int(unseen.sum()), used)


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse, and the damping that it took."""
    if not torch.isfinite(hessian).all():
        raise ValueError("the inputs of calibration are not finite")
    mean = hessian.diagonal().mean()
    for attempt in range(_ATTEMPTS):
        used = damping * _MORE_DAMPING**attempt
        damped = hessian + used * mean * torch.eye(len(hessian), device=hessian.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if info == 0:
            return upper, used
    raise ValueError("the inputs of calibration depend on one another; take more data or more damping")


def _scale_of(weight: Tensor, quantizer: Quantizer) -> Tensor:
    shape = (len(weight), 1)
    return ops.initial_scale(weight, shape, quantizer.grid, quantizer.scale_init)


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """`d H d^T`, summed over the rows of `(out, in)`: twice the mean squared error of the layer's output."""
    return float(((difference @ hessian) * difference).sum())

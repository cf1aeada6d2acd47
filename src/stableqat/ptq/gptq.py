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
_LEAST_DAMPING = 1e-6


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
        hessian: `(in, in)`, finite; see `Moments`.
        quantizer: Its grid and, per row or group, its scales.
        damping: Added to the diagonal, as a share of its mean; ten times more, as often as it takes, where
            the matrix is singular all the same.
        act_order: Round inputs in the order of falling diagonal. A group's scales then come from the weights
            as they are; without it, from those that earlier groups have changed.
    """
    grid, original = quantizer.grid, weight.float()
    scale = quantizer.effective_scale().float().expand(len(weight), -1).clone()
    groups = scale.shape[1]
    size = weight.shape[1] // groups
    unseen = hessian.diagonal() == 0
    h = hessian.clone()
    h.diagonal()[unseen] = 1.0 if unseen.all() else hessian.diagonal()[~unseen].mean()
    order = torch.arange(len(h), device=h.device)
    if act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    factor, used = _inverse_factor(h[order][:, order], damping)
    w = original.T[order]  # (in, out), so that an input's weights lie together
    codes, levels = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    group_of = (order // size).tolist()
    block = _BLOCK if groups == 1 else size * max(1, _BLOCK // size)  # a group's weights are up to date
    for start in range(0, len(h), block):
        stop = min(start + block, len(h))
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            group = slice(group_of[i], group_of[i] + 1)
            if groups > 1 and not act_order and i % size == 0:
                scale[:, group] = _scale_of(w[i : i + size].T, quantizer)
            own, column = scale[:, group], w[i].unsqueeze(1)
            code = ops.quantize_codes(column, own, grid=grid)
            level = ops.dequantize_codes(code, own, grid.zero_point, w.dtype)
            codes[i], levels[i] = code[:, 0], level[:, 0]
            errors[i - start] = (w[i] - levels[i]) / factor[i, i]
            w[i + 1 : stop] -= torch.outer(factor[i, i + 1 : stop], errors[i - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    back = torch.argsort(order)
    codes, levels = codes[back].T.contiguous(), levels[back].T
    made = quantizer.quantize(weight)
    own = scale if made.scale.shape == scale.shape else scale[:1, :1]
    rounded = replace(made, codes=codes, scale=own.to(made.scale.dtype))
    error, nearest = (output_error(original - v, hessian) for v in (levels, made.dequantize().float()))
    return Rounded(rounded, error, nearest, int(unseen.sum()), used)


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse, and the damping that it took."""
    mean, used = hessian.diagonal().mean(), damping
    assert mean > 0
    while True:
        damped = hessian + used * mean * torch.eye(len(hessian), device=hessian.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if info == 0:
            return upper, used
        used = max(_MORE_DAMPING * used, _LEAST_DAMPING)


def _scale_of(weight: Tensor, quantizer: Quantizer) -> Tensor:
    shape = (len(weight), 1)
    return ops.initial_scale(weight, shape, quantizer.grid, quantizer.scale_init)


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """`d H d^T`, summed over the rows of `(out, in)`: twice the mean squared error of the layer's output."""
    return float(((difference @ hessian) * difference).sum())

"""The initial value of the learned scale: at 2 bits it matters more than the surrogate.

`max` covers every weight and wastes levels on outliers. `lsq` is `2 mean|w| / sqrt(q_max)` (Esser et al.
2020, arXiv 1902.08153). `mse` minimises `||w - Q(w)||^2` for each scale by a short search over the clipping
range, followed by least-squares refinements `s = <w, c> / <c, c>`. `signed_mse` also tries negative scales,
which turn the grid around. That matters on the integer grid: with a positive scale, `-2 .. 1` clips only
positive weights, so all rows of a layer lose some of their sum with the same sign, and layer after layer adds
to one offset. With the sign of the smaller error the offsets cancel and the error shrinks; on a pretrained
model this decides how far 2-bit training gets (docs/notes.md). `absmax_as_step` reproduces the 2-bit
initialisation of StableQAT's released code, which uses the range as the step and starts with over 90% of
Gaussian weights at code 0.
"""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from stableqat.ops import reference
from stableqat.ops.grids import Grid

ScaleInit = Literal["signed_mse", "mse", "max", "lsq", "absmax_as_step"]

_CANDIDATES = 12
_REFINEMENTS = 4
_CHUNK = 1 << 20  # weights that a search step holds at once: they fit into a CPU's cache


@torch.no_grad()
def initial_scale(weight: Tensor, shape: tuple[int, int], grid: Grid, how: ScaleInit) -> Tensor:
    """Compute the initial scale from the weights alone.

    Args:
        weight: Latent weight, `(out, ...)`, finite.
        shape: Shape of the scale, `(out, 1)`, `(out, groups)` or `(1, 1)`.
        grid: The grid that the scale is for.
        how: signed_mse, mse, max, lsq or absmax_as_step; on the binary grid each of them is `2 mean|w|`.

    Returns:
        float32 scale of `shape`, positive but for signed_mse on the integer grid; a group of zeros gets the
        mean magnitude of the others.
    """
    groups = weight.detach().reshape(shape[0] * shape[1], -1).to(reference.working_dtype(weight.dtype))
    chunk = max(1, _CHUNK // groups.shape[1])
    scale = torch.cat([_scale(part, grid, how) for part in groups.split(chunk)])
    usable = scale.abs() > 0
    fallback = scale[usable].abs().mean() if usable.any() else scale.new_tensor(1 / sqrt(groups.shape[1]))
    return torch.where(usable, scale, fallback).reshape(shape).float()


def _scale(w: Tensor, grid: Grid, how: ScaleInit) -> Tensor:
    magnitude = w.abs()
    if grid.name == "binary":
        return 2 * magnitude.mean(-1)
    if how == "lsq":
        return 2 * magnitude.mean(-1) / sqrt(max(grid.q_max, 1))
    largest = magnitude.amax(-1)
    if how == "mse" or (how == "signed_mse" and grid.name != "integer"):  # others are symmetric
        return _mse_scale(w, largest, grid)[0]
    if how == "signed_mse":
        scale, error = _mse_scale(w, largest, grid)
        turned, turned_error = _mse_scale(-w, largest, grid)
        return torch.where(turned_error < error, -turned, scale)
    if how == "absmax_as_step" and grid.name == "integer" and grid.bits == 2:
        return largest
    return largest / _reach(grid)


def _reach(grid: Grid) -> float:
    """The `v` to which `max` maps the largest weight."""
    if grid.name == "integer":
        return 2 if grid.bits == 2 else grid.q_max
    return grid.bounds("range")[1]


def _mse_scale(w: Tensor, largest: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    rms = w.square().mean(-1).sqrt()
    # from clipping nearly everything to clipping nothing, even on the grid's shorter side
    low, high = (0.8 * rms / grid.outermost).unsqueeze(-1), (largest / grid.levels[-1]).unsqueeze(-1)
    best_scale, best_error = high, _error(w, high, grid)
    ratio = (high / low).nan_to_num(1.0, 1.0, 1.0)
    for i in range(_CANDIDATES):
        scale = low * ratio ** (i / _CANDIDATES)
        best_scale, best_error = _better(w, scale, grid, best_scale, best_error)
    for _ in range(_REFINEMENTS):
        levels = reference.codes(w / best_scale, grid) - grid.zero_point
        fitted = (w * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        best_scale, best_error = _better(w, fitted, grid, best_scale, best_error)
    return best_scale.squeeze(-1), best_error.squeeze(-1)


def _error(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return reference.forward(w, scale, grid).sub_(w).square_().sum(-1, keepdim=True)


def _better(w: Tensor, scale: Tensor, grid: Grid, best: Tensor, best_error: Tensor) -> tuple[Tensor, Tensor]:
    error = _error(w, scale, grid)
    better = (error < best_error) & (scale > 0)  # NaN from an all-zero group is never better
    return torch.where(better, scale, best), torch.where(better, error, best_error)

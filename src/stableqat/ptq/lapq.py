"""LAPQ (Nahshan et al., arXiv 1911.07190): sets all scales together, by the loss that they lead to.

Each layer's scales first minimise `sum |w - Q(w)|^p`. The loss on calibration data over ten p from 2 to 4 is
nearly a parabola, whose minimum is the start of Powell's method over one factor per layer: it searches along
one direction after the other, without gradients, and replaces directions by the progress that it made. Unlike
a layer's own error, the loss sees how the errors of layers add up.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from stableqat import ops
from stableqat.layers.linear import QuantLinear
from stableqat.ops import Grid

NORMS = np.linspace(2, 4, 10)
_CANDIDATES = 80
_CHUNK = 1 << 20


@torch.no_grad()
def norm_scale(weight: Tensor, scale: Tensor, grid: Grid, p: float) -> Tensor:
    """The scales that minimise `sum |w - Q(w)|^p`, found on a fine grid around given ones.

    Args:
        weight: `(out, in)`.
        scale: Scales to search around, from half to twice as large, `(out, groups)` or `(1, 1)`.
        grid: The grid.
        p: The norm's exponent.
    """
    groups = weight.detach().float().reshape(scale.numel(), -1)
    own = scale.reshape(-1, 1).float()
    found = []
    for part, start in zip(*(x.split(max(1, _CHUNK // groups.shape[1])) for x in (groups, own)), strict=True):
        best, least = start.clone(), torch.full_like(start, torch.inf)
        for factor in torch.logspace(-1, 1, _CANDIDATES, base=2.0).tolist():
            tried = start * factor
            codes = ops.quantize_codes(part, tried, grid=grid)
            level = ops.dequantize_codes(codes, tried, grid.zero_point, torch.float32)
            error = (part - level).abs().pow(p).sum(1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        found.append(best)
    return torch.cat(found).reshape(scale.shape)


@torch.no_grad()
def lapq(
    layers: dict[str, QuantLinear],
    loss: Callable[[], float],
    *,
    evaluations: int = 2000,
    tell: Callable[[float, str], None] = lambda count, text: None,
) -> float:
    """Set the scales of all layers.

    Args:
        layers: The quantized layers of a model, whose scales are set in place.
        loss: The model's loss on calibration data.
        evaluations: How often Powell's method may compute the loss.
        tell: Is called with the number of evaluations so far, and what they found.

    Returns:
        The loss that the scales lead to.
    """
    start = {name: layer.weight_quantizer.effective_scale().clone() for name, layer in layers.items()}
    by_norm, losses = [], []
    for p in NORMS:
        scales = {
            name: norm_scale(layer.weight, start[name], layer.weight_quantizer.grid, float(p))
            for name, layer in layers.items()
        }
        _set(layers, scales)
        by_norm.append(scales)
        losses.append(loss())
        tell(len(losses), f"p {p:.2f}: loss {losses[-1]:.4f}")
    curve = np.polynomial.Polynomial.fit(NORMS, losses, 2).convert()
    best = NORMS[int(np.argmin(losses))]
    bowl = curve.coef[2] if len(curve.coef) > 2 else 0.0
    p = float(np.clip(-curve.coef[1] / (2 * bowl), NORMS[0], NORMS[-1])) if bowl > 0 else float(best)
    at_p = {
        name: norm_scale(layer.weight, start[name], layer.weight_quantizer.grid, p)
        for name, layer in layers.items()
    }
    _set(layers, at_p)
    if (least := loss()) > min(losses):  # the parabola is only a guide
        least, at_p = min(losses), by_norm[int(np.argmin(losses))]
    factors_of_least, count = np.ones(len(layers)), len(losses)

    def of(factors: np.ndarray) -> float:
        nonlocal count, least, factors_of_least
        count += 1
        scales = zip(at_p.items(), factors, strict=True)
        _set(layers, {name: scale * float(factor) for (name, scale), factor in scales})
        value = loss()
        if value < least:
            least, factors_of_least = value, factors.copy()
        tell(count, f"lapq: loss {least:.4f}")
        return value if np.isfinite(value) else 1e9

    bounds = [(0.5, 2.0)] * len(layers)
    minimize(of, np.ones(len(layers)), method="Powell", bounds=bounds, options={"maxfev": evaluations})
    _set(layers, {n: s * float(f) for (n, s), f in zip(at_p.items(), factors_of_least, strict=True)})
    return least


def _set(layers: dict[str, QuantLinear], scales: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        layer.release()
        layer.weight_quantizer.scale.copy_(scales[name])

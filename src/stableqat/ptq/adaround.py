"""AdaRound (Nagel et al., arXiv 2004.10568): learns per weight whether to round up or down.

    w_q = s clip(floor(w / s) + h(V), q_min, q_max),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

V starts where nothing is rounded yet, `h = w / s - floor(w / s)`, and minimises the squared error of the
layer's output plus `0.01 sum(1 - |2 h - 1|^beta)`, which drives h to 0 or 1 as beta falls from 20 to 2. The
output's error over all calibration inputs is `(w - w_q) H (w - w_q)^T` with GPTQ's H, so the inputs
themselves are not kept, and every step sees all of them. So that one strength of the penalty serves all
layers, the error counts in units of what rounding to nearest loses, 0.001 for each weight.
"""

from dataclasses import replace
from math import cos, pi

import torch
from torch import Tensor

from stableqat import ops
from stableqat.ptq.gptq import Rounded, output_error
from stableqat.quantizers import Quantizer

_WARM_UP = 0.2  # of the steps, without the penalty
_PENALTY = 0.01
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_ERROR_PER_WEIGHT = 1e-3
_LEARNING_RATE = 3e-2


@torch.enable_grad()
def adaround(weight: Tensor, hessian: Tensor, quantizer: Quantizer, *, steps: int = 1000) -> Rounded:
    """Round a weight onto its quantizer's grid.

    Args:
        weight: Latent weight, `(out, in)`.
        hessian: `(in, in)`, finite; see `Moments`.
        quantizer: Its grid and scales, which stay as they are.
        steps: Steps of Adam.
    """
    grid, original = quantizer.grid, weight.detach().float()
    made = quantizer.quantize(weight)
    scale = made.scale_of_blocks(1).float().expand_as(original)
    place = original / scale + grid.zero_point
    below = place.floor()
    nearest = output_error(original - made.dequantize().float(), hessian)
    share = _ERROR_PER_WEIGHT * weight.numel() / max(nearest, torch.finfo(torch.float32).tiny)
    v = start(place - below).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=_LEARNING_RATE)

    def level(up: Tensor) -> Tensor:
        return scale * ((below + up).clamp(grid.q_min, grid.q_max) - grid.zero_point)

    for step in range(steps):
        up = soft(v)
        difference = original - level(up)
        loss = share * ((difference @ hessian) * difference).sum()
        if (beta := _beta(step / steps)) is not None:
            loss = loss + penalty(up, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codes = (below + (soft(v) > 0.5)).clamp(grid.q_min, grid.q_max).to(torch.int8)
        rounded = replace(made, codes=codes)
        values = ops.dequantize_codes(codes, made.scale, grid.zero_point, torch.float32)
        error = output_error(original - values, hessian)
    return Rounded(rounded, error, nearest, int((hessian.diagonal() == 0).sum()), 0.0)


def soft(v: Tensor) -> Tensor:
    """h(V): the share of a step by which a weight lies above the level below it."""
    return (1.2 * v.sigmoid() - 0.1).clamp(0, 1)


def start(share: Tensor) -> Tensor:
    """The V whose h is the given share in [0, 1)."""
    return -torch.log(1.2 / (share + 0.1) - 1)


def penalty(up: Tensor, beta: float) -> Tensor:
    """What pulls h to 0 or 1."""
    return _PENALTY * (1 - (2 * up - 1).abs().pow(beta)).sum()


def _beta(done: float) -> float | None:
    """The exponent at a share of the steps; None during the warm-up."""
    if done < _WARM_UP:
        return None
    share = (done - _WARM_UP) / (1 - _WARM_UP)
    return _LAST_BETA + 0.5 * (_FIRST_BETA - _LAST_BETA) * (1 + cos(share * pi))

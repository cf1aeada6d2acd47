"""DSQ: a piecewise tanh as surrogate, with a learned sharpness (Gong et al. 2019, arXiv 1908.05033).

`g(u) = k sech^2(k t) / (2 (1 - a))`, where `t` is the distance to the nearest threshold and
`k = ln(2/a - 1)`. The forward is `round`; the gradient is that of the soft staircase, also for `a`. The mean
gradient is 1 for every `a`, but its variance grows without bound as `a` falls: sharp steps make rare, large
gradients. `a = sigmoid(a_logit)` stays inside (0, 1) by construction.
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn

from stableqat.ops import Mask, Tanh
from stableqat.quantizers.base import Quantizer


class DSQ(Quantizer):
    """Soft-staircase surrogate with a learned sharpness `a` per scale; integer grid by default.

    Args:
        weight: The latent weight, `(out, ...)`.
        a: Initial sharpness in (0, 1): a small one is a sharp step, one near 1 is STE.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    surrogate: Tanh

    def __init__(self, weight: Tensor, *, a: float = 0.2, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Tanh(mask, a), **kwargs)

    def allocate(self, shape: tuple[int, int], **options: Any) -> None:
        """Add the logit of `a`, shaped like the scale."""
        super().allocate(shape, **options)
        self.a_logit = nn.Parameter(torch.full(shape, torch.nan, **options))

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set scale, floor and `a`."""
        super().initialize(weight)
        self.a_logit.fill_(log(self.surrogate.a / (1 - self.surrogate.a)))

    def surrogate_param(self) -> Tensor:
        """The logit of `a`, shaped like the scale."""
        return self.a_logit

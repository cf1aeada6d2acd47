"""STE / LSQ: the straight-through estimator with a learned scale, the reference arm.

`d round / dv = 1` inside the range (Bengio et al. 2013, arXiv 1308.3432); the scale learns by LSQ's gradient
(Esser et al. 2020, arXiv 1902.08153). It is right about the trend and blind to where in its bin a weight
lies: it costs nothing, and weights oscillate around thresholds.
"""

from typing import Any

from torch import Tensor

from stableqat.ops import Identity, Mask
from stableqat.quantizers.base import Quantizer


class STE(Quantizer):
    """Straight-through gradient, learned scale (LSQ); integer grid by default.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def __init__(self, weight: Tensor, *, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Identity(mask), **kwargs)

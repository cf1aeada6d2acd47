"""Controls for StableQAT's surrogate: what is left of its effect without its shape?

Its `g(u)` is on average 0.30 and small near a level. `ScaledSTE` keeps the average only, `PermutedStableQAT`
all values but not their link to where a weight lies in its bin. An effect that both share is that of a
smaller or a noisier gradient. Under AdamW a constant factor changes nothing but clipping and epsilon.
"""

from typing import Any

from torch import Tensor

from stableqat.ops import Constant, Mask, Permuted
from stableqat.quantizers.base import Quantizer


class ScaledSTE(Quantizer):
    """STE with the weight's gradient times a constant.

    Args:
        weight: The latent weight, `(out, ...)`.
        value: The factor; the default is the mean of StableQAT's g at amplitude 0.21.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    is_control = True

    def __init__(self, weight: Tensor, *, value: float = 0.3025, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Constant(mask, value), **kwargs)


class PermutedStableQAT(Quantizer):
    """StableQAT with its factors shuffled, anew each step, among the weights that share a scale.

    Args:
        weight: The latent weight, `(out, ...)`.
        amplitude: See `StableQAT`.
        harmonics: See `StableQAT`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    is_control = True

    def __init__(
        self,
        weight: Tensor,
        *,
        amplitude: float = 0.21,
        harmonics: int = 1,
        mask: Mask = "range",
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, surrogate=Permuted(mask, amplitude, harmonics), **kwargs)

"""Controls for StableQAT's surrogate: how much of its effect remains without its shape?

Its `g(u)` is 0.30 on average and small near a level. `ScaledSTE` keeps only the average; `PermutedStableQAT`
keeps all values, but not their link to where a weight lies in its bin. An effect that both share comes from a
smaller or noisier gradient. Under AdamW a constant factor changes only clipping and the effect of epsilon.
"""

from typing import Any

from torch import Tensor

from stableqat.ops import Constant, Mask, Permuted
from stableqat.quantizers.base import Quantizer


class ScaledSTE(Quantizer):
    """STE with the weight's gradient multiplied by a constant.

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
    """StableQAT with its factors shuffled among the weights that share a scale, differently in each step.

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

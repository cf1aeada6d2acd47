"""StableQAT: a damped Fourier series of the staircase as surrogate (arXiv 2601.19320).

`g(u) = (1 - S) / (1 + S)`, `S = A sqrt(2) pi cos(pi u)` for one harmonic (eq. 4-10): near 1 at a threshold,
near 0 at a level, bounded, and at no cost but one sine. At A = 0.21 its mean is 0.30, so under SGD it also
takes smaller steps; A = 0 is STE.
"""

from typing import Any

from torch import Tensor

from stableqat.ops import Fourier, Mask
from stableqat.quantizers.base import Quantizer


class StableQAT(Quantizer):
    """Fourier surrogate, learned scale; integer grid by default.

    Args:
        weight: The latent weight, `(out, ...)`.
        amplitude: A of the series; 0 is STE. Above 0.225 (with one harmonic) the gradient would change its
            sign.
        harmonics: Number of odd harmonics to keep.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        amplitude: float = 0.21,
        harmonics: int = 1,
        mask: Mask = "range",
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, surrogate=Fourier(mask, amplitude, harmonics), **kwargs)

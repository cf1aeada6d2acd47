"""ParetoQ: the straight-through gradient on the grid that suits the width.

Liu et al. 2025 (arXiv 2502.02631): binary at 1 bit, ternary at 3 levels, the stretched (half-integer) grid at
2 bits, and the integer grid from 3 bits on, where the method is LSQ. ParetoQ's parameter is a range alpha;
the scale here is the distance between levels, alpha / 2^(b-1) (alpha / 1.5 for ternary). Its published start
is `scale_init: max`; the default is that of every method, so that arms start equal. At 3 bits and more this
arm is an A/A control of STE.
"""

from typing import Any

from torch import Tensor

from stableqat.ops import GridName, Identity, Mask
from stableqat.quantizers.base import Quantizer


class ParetoQ(Quantizer):
    """Straight-through gradient on ParetoQ's grid for the width.

    Args:
        weight: The latent weight, `(out, ...)`.
        mask: Weights that receive a gradient: range, levels or none.
        kwargs: See `Quantizer`.
    """

    def __init__(self, weight: Tensor, *, mask: Mask = "range", **kwargs: Any) -> None:
        super().__init__(weight, surrogate=Identity(mask), **kwargs)

    @classmethod
    def default_grid(cls, bits: int) -> GridName:
        """Stretched at 2 bits, integer above."""
        return "stretched" if bits == 2 else "integer"

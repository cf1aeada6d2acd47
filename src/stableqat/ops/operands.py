"""A weight with what goes with it, as the implementations take it."""

from typing import NamedTuple

from torch import Tensor

TOGETHER = 8  # weights that one launch takes at most


class Weight(NamedTuple):
    """A latent weight, its scales and what may come beside them.

    Attributes:
        x: Latent weight, `(out, ...)`.
        scale: Distance between levels, positive: `(out, 1)`, `(out, groups)` (each group is a run of
            consecutive inputs) or `(1, 1)` for the whole tensor.
        scale_floor: Small positive floor, shaped like `scale`: the acting scale is never below it, while its
            gradient passes to `scale` on both sides, so that it can return. NaN stays NaN.
        zero_point: Replaces the grid's own, shaped like `scale`; receives no gradient.
        param: The surrogate's learned parameter (of Tanh the logit of `a`), shaped like `scale`.
    """

    x: Tensor
    scale: Tensor
    scale_floor: Tensor | None = None
    zero_point: Tensor | None = None
    param: Tensor | None = None

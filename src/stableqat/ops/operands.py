"""The arguments of fake quantization: its tensors, and its constants.

Operations and nodes of a compiled graph take only tensors and plain values. There a text describes grid and
surrogate completely, so that a graph means the same in every process.
"""

from ast import literal_eval
from functools import cache
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from stableqat.ops.grids import Grid, GridName, Mask
from stableqat.ops.surrogates import KernelForm, KernelName, Surrogate, of_kernel

TOGETHER = 8  # weights per launch, at most


class Operands(NamedTuple):
    """The tensors of a fake-quantized weight.

    Attributes:
        x: Latent weight, `(out, ...)`.
        scale: Distance between levels, negative to turn the grid around: `(out, 1)`, `(out, groups)` (each
            group is a run of consecutive inputs) or `(1, 1)` for the whole tensor.
        scale_floor: Bound of the scale in use, shaped like `scale` and of its sign: the scale comes no closer
            to zero. The gradient reaches `scale` beyond it too, so that the scale can recover. NaN stays NaN.
        param: The surrogate's learned parameter (for Tanh, the logit of `a`), shaped like `scale`.
    """

    x: Tensor
    scale: Tensor
    scale_floor: Tensor | None = None
    param: Tensor | None = None


class Spec(NamedTuple):
    """The constants of a call.

    Attributes:
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        dtype: Type of the value.
    """

    grid: Grid
    surrogate: Surrogate
    dtype: torch.dtype


def to_text(grid: Grid, surrogate: Surrogate) -> str | None:
    """Grid and surrogate as text; None for a surrogate without a kernel."""
    kernel = surrogate.kernel
    if kernel is None:
        return None
    numbers = (grid.bits, grid.q_min, grid.q_max, grid.zero_point, *kernel.numbers)
    texts = [str(int(n)) if isinstance(n, int) else repr(float(n)) for n in numbers]
    return " ".join([grid.name, kernel.name, surrogate.mask, *texts])


@cache
def from_text(text: str, dtype: torch.dtype) -> Spec:
    """The spec that a text describes, with the surrogate that its kernel computes."""
    name, kernel, mask, *texts = text.split()
    assert name in get_args(GridName)
    assert mask in get_args(Mask)
    bits, q_min, q_max, zero_point, *numbers = map(literal_eval, texts)
    grid = Grid(cast(GridName, name), bits, q_min, q_max, zero_point)
    form = KernelForm(cast(KernelName, kernel), tuple(numbers))
    return Spec(grid, of_kernel(form, cast(Mask, mask)), dtype)

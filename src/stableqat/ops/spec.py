"""What a call needs beside the weight, and its form as text.

Operations and nodes of a compiled graph take tensors and plain values only; there grid and
surrogate stand as text that says all of them, so that a graph means the same in every process.
"""

from ast import literal_eval
from functools import cache
from typing import NamedTuple, cast, get_args

import torch

from stableqat.ops.grids import Grid, GridName, Mask
from stableqat.ops.surrogates import Constant, Fourier, Identity, Surrogate, Tanh

# exact types, made from a mask and these
_NUMBERS: dict[type[Surrogate], tuple[str, ...]] = {
    Identity: (),
    Constant: ("value",),
    Fourier: ("amplitude", "harmonics"),
    Tanh: ("a",),
}


class Spec(NamedTuple):
    """What a call needs beside the weight.

    Attributes:
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        dtype: Type of the value.
    """

    grid: Grid
    surrogate: Surrogate
    dtype: torch.dtype


def to_text(grid: Grid, surrogate: Surrogate) -> str | None:
    """Grid and surrogate as text; None for a surrogate that is not one of `ops.surrogates`' own."""
    if type(surrogate) not in _NUMBERS:
        return None
    codes = (grid.bits, grid.q_min, grid.q_max, grid.zero_point)
    numbers = [getattr(surrogate, name) for name in _NUMBERS[type(surrogate)]]
    texts = [str(int(n)) if isinstance(n, int) else repr(float(n)) for n in (*codes, *numbers)]
    return " ".join([grid.name, type(surrogate).__name__, surrogate.mask, *texts])


@cache
def from_text(text: str, dtype: torch.dtype) -> Spec:
    """The spec that a text stands for."""
    name, kind, mask, *texts = text.split()
    assert name in get_args(GridName)
    assert mask in get_args(Mask)
    bits, q_min, q_max, zero_point, *numbers = map(literal_eval, texts)
    cls = next(known for known in _NUMBERS if known.__name__ == kind)
    grid = Grid(cast(GridName, name), bits, q_min, q_max, zero_point)
    return Spec(grid, cls(cast(Mask, mask), *numbers), dtype)

"""What a call needs beside the weight, and its form as text.

Operations and nodes of a compiled graph take tensors and plain values only; there grid and
surrogate stand as text that says all of them, so that a graph means the same in every process.
"""

from ast import literal_eval
from functools import cache
from typing import NamedTuple, cast, get_args

import torch

from stableqat.ops.grids import Grid, GridName, Mask, make_grid
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
    numbers = [repr(getattr(surrogate, name)) for name in _NUMBERS[type(surrogate)]]
    return " ".join([grid.name, str(grid.bits), type(surrogate).__name__, surrogate.mask, *numbers])


@cache
def from_text(text: str, dtype: torch.dtype) -> Spec:
    """The spec that a text stands for."""
    grid, bits, kind, mask, *numbers = text.split()
    assert grid in get_args(GridName)
    assert mask in get_args(Mask)
    cls = next(known for known in _NUMBERS if known.__name__ == kind)
    surrogate = cls(cast(Mask, mask), *map(literal_eval, numbers))
    return Spec(make_grid(cast(GridName, grid), int(bits)), surrogate, dtype)

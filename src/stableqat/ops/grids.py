"""Where the levels are: the four uniform grids of weight-only QAT.

A grid maps `v = w / s` to a code `q = clamp(round(v + z), q_min, q_max)` and back to the value `s * (q - z)`.
`z` is 0 for grids with a level at zero (integer, ternary) and -1/2 for half-integer ones (stretched, binary),
which spend every code on a non-zero level. Integer and ternary follow LSQ (Esser et al. 2020, arXiv
1902.08153), stretched and binary ParetoQ (Liu et al. 2025, arXiv 2502.02631), in units of the distance
between levels. The trade-off: at 2 bits the stretched grid is symmetric, and the integer grid keeps an exact
zero.
"""

from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Literal

from stableqat.errors import UserError, check_known

GridName = Literal["integer", "stretched", "ternary", "binary"]
Mask = Literal["range", "levels", "none"]


@dataclass(frozen=True)
class Grid:
    """A uniform grid of `q_max - q_min + 1` levels at `q - zero_point` (in units of the scale).

    Attributes:
        name: integer, stretched, ternary or binary.
        bits: Bits that a code takes in storage.
        q_min: Smallest code.
        q_max: Largest code.
        zero_point: The code that would stand for the value 0; -0.5 on half-integer grids.
    """

    name: GridName
    bits: int
    q_min: int
    q_max: int
    zero_point: float

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels in units of the scale, ascending."""
        return tuple(q - self.zero_point for q in range(self.q_min, self.q_max + 1))

    @property
    def outermost(self) -> float:
        """The largest absolute level in units of the scale."""
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    def bounds(self, mask: Mask) -> tuple[float, float]:
        """The interval of `v` in which a weight receives a gradient.

        `range` is the rule that each grid was published with: LSQ's `[q_min, q_max]` on the integer grid, and
        half a step beyond the outermost levels on ParetoQ's grids, except binary, which ends at its levels.
        `levels` ends at the outermost levels on any grid; `none` masks nothing.

        Args:
            mask: The rule: range, levels or none.

        Returns:
            The lower and the upper end, both included.
        """
        if mask == "none":
            return -inf, inf
        if mask == "levels" or self.name in ("integer", "binary"):
            return self.levels[0], self.levels[-1]
        return self.levels[0] - 0.5, self.levels[-1] + 0.5

    def __str__(self) -> str:
        return self.name


@cache
def make_grid(name: GridName, bits: int) -> Grid:
    """Build a grid.

    Args:
        name: integer, stretched, ternary or binary.
        bits: Storage width: 2-8 for integer and stretched, 2 for ternary, 1 for binary.

    Returns:
        The grid.

    Raises:
        UserError: If the grid does not exist at this width.

    >>> make_grid("stretched", 2).levels
    (-1.5, -0.5, 0.5, 1.5)
    >>> make_grid("ternary", 2).levels
    (-1, 0, 1)
    """
    if name == "binary" and bits == 1:
        return Grid(name, 1, -1, 0, -0.5)
    if name == "ternary" and bits == 2:
        return Grid(name, 2, -1, 1, 0)
    if name in ("integer", "stretched") and 2 <= bits <= 8:
        half = 2 ** (bits - 1)
        return Grid(name, bits, -half, half - 1, 0 if name == "integer" else -0.5)
    widths = {"binary": "1", "ternary": "2", "integer": "2 to 8", "stretched": "2 to 8"}
    check_known("grid", name, widths)
    raise UserError(f"bits: the {name} grid takes {widths[name]} bits, not {bits}")

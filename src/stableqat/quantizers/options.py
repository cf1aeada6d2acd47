"""The options that all methods share, checked together: width, levels, grid and granularity."""

from torch import Tensor

from stableqat import ops
from stableqat.errors import UserError


def width_of(bits: int | None, levels: int | None, grid: str | None) -> int:
    """Storage width of a code.

    Raises:
        UserError: If an option is out of range, or two of them contradict each other.
    """
    if levels is None and bits is None:
        fixed = {"ternary": 2, "binary": 1}
        if grid not in fixed:
            raise UserError("bits: missing; give bits (1 to 8), or levels: 3 for ternary")
        return fixed[grid]
    if bits is not None and (isinstance(bits, bool) or bits != int(bits) or not 1 <= bits <= 8):
        raise UserError(f"bits: must be a whole number from 1 to 8, not {bits}")
    if levels is None:
        assert bits is not None
        return int(bits)
    if levels not in (2, 3, 4, 8, 16, 32, 64, 128, 256):
        raise UserError(f"levels: must be 3 or a power of two from 2 to 256, not {levels}")
    width = (levels - 1).bit_length()
    if bits is not None and bits != width:
        raise UserError(f"levels: {levels} levels take {width} bit(s), but bits is {bits}; leave one out")
    if grid is not None and (levels == 3) != (grid == "ternary"):
        raise UserError(f"levels: {levels} levels are not the {grid} grid; leave one of them out")
    return width


def special_grid(bits: int, levels: int | None) -> ops.GridName | None:
    """The grid of a width or number of levels that has only one; None if it has several."""
    if levels == 3:
        return "ternary"
    return "binary" if bits == 1 else None


def scale_shape(weight: Tensor, per_channel: bool, group_size: int | None) -> tuple[int, int]:
    """Rows and columns of the scale of a weight, see `Quantizer`."""
    if weight.ndim < 2:
        raise UserError(f"a quantizer takes a weight of two or more dimensions, not {tuple(weight.shape)}")
    rows, inputs = weight.shape[0], weight[0].numel()
    if group_size is None:
        return (rows, 1) if per_channel else (1, 1)
    if not per_channel:
        raise UserError("group_size: groups divide a row; leave per_channel at true, or leave group_size out")
    if group_size < 1 or inputs % group_size:
        raise UserError(f"group_size: {group_size} does not divide the layer's {inputs} inputs")
    return rows, inputs // group_size

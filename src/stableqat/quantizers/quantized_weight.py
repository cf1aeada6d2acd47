"""The deployed form of a weight, `scale * (codes - zero_point)`, which every file format is written from.

A half-integer grid fits into a symmetric integer format one bit wider: `s * (q + 1/2) = s/2 * (2q + 1)`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableqat import ops


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes with the scales that turn them into values.

    Attributes:
        codes: int8, shaped like the weight.
        scale: Distance between levels, `(out, 1)`, `(out, groups)` or `(1, 1)`.
        zero_point: Subtracted from the codes: 0, or -0.5 on half-integer grids.
        bits: Storage width of a code.
        grid: Name of the grid.
        dtype: Type of the weight that was quantized.
    """

    codes: Tensor
    scale: Tensor
    zero_point: float
    bits: int
    grid: str
    dtype: torch.dtype = torch.float32

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale: without groups, all inputs of a row."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """`scale * (codes - zero_point)`, bit for bit the quantizer's forward in evaluation."""
        return ops.dequantize_codes(self.codes, self.scale, self.zero_point, self.dtype)

    def by_row(self) -> "QuantizedWeight":
        """The same values with a scale per row, even if one scale serves the whole tensor."""
        return replace(self, scale=self.scale.expand(self.codes.shape[0], -1).contiguous())

    def integers(self) -> "QuantizedWeight":
        """The same values on an integer grid, one bit wider if this one is half-integer."""
        if self.zero_point == 0:
            return self
        wide = self.codes.to(torch.int16) * 2 + 1
        assert self.bits < 8, "checked before packing"
        return replace(
            self, codes=wide.to(torch.int8), scale=self.scale / 2, zero_point=0.0, bits=self.bits + 1
        )

    def scale_of_blocks(self, size: int) -> Tensor:
        """The scale of each run of `size` inputs, `(out, ceil(in / size))`; no run may cross groups."""
        blocks, groups = -(-self.codes.shape[1] // size), self.scale.shape[1]
        assert groups == 1 or self.group_size % size == 0
        return self.scale.repeat_interleave(blocks // groups, dim=1)

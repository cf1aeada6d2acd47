"""Codes and scales as bytes: what processes send one another in place of float32 weights.

A process's rows of a weight become one buffer: first the codes, then the acting scales in float32. A code
takes the next of 1, 2, 4 and 8 bits, so 3-bit codes travel in 4. A row's codes lie in planes: with four codes
to a byte, byte `b` holds columns `b`, `b + bytes`, `b + 2 bytes` and `b + 3 bytes`, so that neighbouring
threads read neighbouring weights. Decoded values equal those of fake quantization bit for bit.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stableqat.ops import reference
from stableqat.ops.dispatch import kernels_serve
from stableqat.ops.grids import Grid
from stableqat.ops.operands import Operands

try:
    from stableqat.ops import wire_kernels
except ImportError:  # torch without Triton, as on a Mac
    wire_kernels = None  # type: ignore[assignment]

_ALIGNED = 16  # bytes; codes and scales begin at multiples of it


@dataclass(frozen=True)
class Wire:
    """How one process's rows of a weight lie in its buffer.

    Attributes:
        grid: The grid of the codes.
        rows: Rows per process; the last process may have fewer, and sends zeros for the rest.
        columns: Weights per row.
        groups: Scales per row.
    """

    grid: Grid
    rows: int
    columns: int
    groups: int

    @cached_property
    def width(self) -> int:
        """Bits that a code takes."""
        return next(width for width in (1, 2, 4, 8) if width >= self.grid.bits)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that a row's codes take."""
        return -(-self.columns * self.width // 8)

    @cached_property
    def scales_at(self) -> int:
        """The byte at which the scales begin."""
        return _aligned(self.rows * self.row_bytes)

    @cached_property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.scales_at + _aligned(self.rows * self.groups * 4)

    @cached_property
    def per_scale(self) -> int:
        """Weights that share a scale."""
        return self.columns // self.groups


@torch.no_grad()
def encode(operands: Operands, wire: Wire) -> Tensor:
    """Quantize rows into a buffer.

    Args:
        operands: At most `wire.rows` rows of a weight, with a scale per row or group.
        wire: How they lie in the buffer.

    Returns:
        The buffer, uint8 `(wire.size,)`.
    """
    x, scale, floor, _ = operands
    buffer = torch.zeros(wire.size, dtype=torch.uint8, device=x.device)
    rows = x.shape[0]
    if rows == 0:
        return buffer
    if kernels_serve(x):
        wire_kernels.encode(operands, wire, buffer)
        return buffer
    grouped, acting, _ = reference.grouped(Operands(x, scale, floor))
    codes = (reference.codes(grouped / acting, wire.grid) - wire.grid.q_min).to(torch.uint8)
    planes = torch.zeros(rows, 8 // wire.width * wire.row_bytes, dtype=torch.uint8, device=x.device)
    planes[:, : wire.columns] = codes.view(rows, -1)
    packed = buffer[: rows * wire.row_bytes].view(rows, -1)
    for place, plane in enumerate(planes.split(wire.row_bytes, 1)):
        packed |= plane << place * wire.width
    scales = buffer[wire.scales_at :].view(torch.float32)
    scales[: rows * wire.groups] = acting.flatten()
    return buffer


@torch.no_grad()
def decode(buffers: Tensor, wire: Wire, value: Tensor) -> None:
    """Compute the fake-quantized weight from the buffers of all processes.

    Args:
        buffers: One after the other, uint8 `(processes * wire.size,)`.
        wire: How each process's rows lie in its buffer.
        value: Set to the values, `(out, columns)`, contiguous.
    """
    if kernels_serve(value):
        wire_kernels.decode(buffers, wire, value)
        return
    each = buffers.view(-1, wire.size)
    packed = each[:, : wire.rows * wire.row_bytes].reshape(-1, wire.row_bytes)
    places = range(0, 8, wire.width)
    codes = torch.cat([(packed >> place) & (2**wire.width - 1) for place in places], 1)[:, : wire.columns]
    scales = each[:, wire.scales_at :].contiguous().view(torch.float32)[:, : wire.rows * wire.groups]
    levels = codes.to(torch.float32).add_(wire.grid.q_min - wire.grid.zero_point)
    made = levels.view(-1, wire.groups, wire.per_scale).mul_(scales.reshape(-1, wire.groups, 1))
    value.copy_(made.view(-1, wire.columns)[: value.shape[0]])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED

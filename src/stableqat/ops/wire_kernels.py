"""Triton kernels that quantize rows into bytes and bytes into values, see `wire`.

Encoding reads a weight once (4 bytes) and writes its code; decoding reads the code and writes the value (2
bytes in bfloat16).
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stableqat.ops import kernels
from stableqat.ops.kernels import _acting_scale, _clamp, _divide, _round, _shift
from stableqat.ops.launch import FORWARD_TILE, Call, launch
from stableqat.ops.operands import Operands

if TYPE_CHECKING:
    from stableqat.ops.wire import Wire


# fmt: off
@triton.jit
def encode_kernel(
    x_ptr, scale_ptr, floor_ptr, codes_ptr, scales_ptr, rows, scales_at,
    N: tl.constexpr, ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr, PER_SCALE: tl.constexpr,
    WIDTH: tl.constexpr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, ZERO_POINT: tl.constexpr,
    FLOOR: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Codes and scales of a weight's rows; one program per tile of bytes."""
    # fmt: on
    program = tl.program_id(0)
    tiles = tl.cdiv(ROW_BYTES, COLUMNS)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    byte = (program % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    exists = (row < rows) & (byte < ROW_BYTES)
    packed = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for place in tl.static_range(8 // WIDTH):
        column = place * ROW_BYTES + byte
        mask = exists & (column < N)
        if GROUPS == 1:  # one load and one division per row
            at, has_scale = row, row < rows
        else:
            at, has_scale = row * GROUPS + column // PER_SCALE, mask
        scale = _acting_scale(scale_ptr, floor_ptr, at, has_scale, FLOOR)
        tl.store(scales_ptr + scales_at + at, scale, mask=has_scale)  # the same from each that shares it
        x = tl.load(x_ptr + row.to(tl.int64) * N + column, mask=mask, other=0.0).to(tl.float32)
        v = _divide(x, scale, tl.div_rn(1.0, scale), NATIVE)
        code = _clamp(_round(_shift(v, ZERO_POINT)), Q_MIN, Q_MAX) - Q_MIN
        packed |= tl.where(mask, code, 0.0).to(tl.int32) << (place * WIDTH)
    tl.store(codes_ptr + row.to(tl.int64) * ROW_BYTES + byte, packed.to(tl.uint8), mask=exists)


# fmt: off
@triton.jit
def decode_kernel(
    codes_ptr, scales_ptr, value_ptr, rows, rows_each, size, scales_at,
    N: tl.constexpr, ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr, PER_SCALE: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Values of a whole weight from the buffers of all processes; one program per tile.

    FIRST is the lowest level in units of the scale, and `size` and `scales_at` count scales, not bytes.
    """
    # fmt: on
    program = tl.program_id(0)
    tiles = tl.cdiv(N, COLUMNS)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    column = (program % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (column < N)
    process = (row // rows_each).to(tl.int64)
    own = row % rows_each
    place = column // ROW_BYTES
    byte = process * size * 4 + own.to(tl.int64) * ROW_BYTES + column % ROW_BYTES
    packed = tl.load(codes_ptr + byte, mask=mask, other=0).to(tl.int32)
    code = (packed >> (place * WIDTH)) & ((1 << WIDTH) - 1)
    if GROUPS == 1:
        scale = tl.load(scales_ptr + process * size + scales_at + own, mask=row < rows, other=0.0)
    else:
        at = process * size + scales_at + own * GROUPS + column // PER_SCALE
        scale = tl.load(scales_ptr + at, mask=mask, other=0.0)
    value = (code.to(tl.float32) + FIRST) * scale
    tl.store(value_ptr + row.to(tl.int64) * N + column, value, mask=mask)


def encode(operands: Operands, wire: "Wire", buffer: Tensor) -> None:
    """See `wire.encode`; sets the buffer."""
    x, scale, floor, _ = [None if tensor is None else tensor.contiguous() for tensor in operands]
    assert x is not None
    assert scale is not None
    call = _encode_call(wire, x.shape[0], floor is not None)
    launch(call, x, scale, scale if floor is None else floor, buffer, buffer.view(torch.float32))


def decode(buffers: Tensor, wire: "Wire", value: Tensor) -> None:
    """See `wire.decode`."""
    launch(_decode_call(wire, value.shape[0]), buffers, buffers.view(torch.float32), value)


@cache
def _encode_call(wire: "Wire", rows: int, floor: bool) -> Call:
    tile = _tile(wire.row_bytes, FORWARD_TILE * wire.width // 8)
    constants = {
        **_row(wire),
        "Q_MIN": wire.grid.q_min,
        "Q_MAX": wire.grid.q_max,
        "ZERO_POINT": wire.grid.zero_point,
        "FLOOR": floor,
        "NATIVE": kernels.NATIVE,
        **tile,
    }
    programs = _programs(rows, wire.row_bytes, tile)
    return Call(encode_kernel, programs, (rows, wire.scales_at // 4), constants)


@cache
def _decode_call(wire: "Wire", rows: int) -> Call:
    tile = _tile(wire.columns, FORWARD_TILE)
    constants = {**_row(wire), "FIRST": wire.grid.levels[0], **tile}
    numbers = (rows, wire.rows, wire.size // 4, wire.scales_at // 4)
    return Call(decode_kernel, _programs(rows, wire.columns, tile), numbers, constants)


def _row(wire: "Wire") -> dict[str, Any]:
    """What a kernel is compiled for: rows of few lengths, of which divisions become shifts."""
    return {
        "N": wire.columns,
        "ROW_BYTES": wire.row_bytes,
        "GROUPS": wire.groups,
        "PER_SCALE": wire.per_scale,
        "WIDTH": wire.width,
    }


def _tile(n: int, elements: int) -> dict[str, Any]:
    columns = min(triton.next_power_of_2(n), elements)
    return {"ROWS": elements // columns, "COLUMNS": columns}


def _programs(rows: int, n: int, tile: dict[str, Any]) -> int:
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(n, tile["COLUMNS"])

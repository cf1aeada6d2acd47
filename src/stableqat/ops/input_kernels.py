"""Triton kernels of fake-quantized activations, see `inputs`.

Memory bounds these passes as it does those over weights. The forward reads an activation and writes its value
(2 + 2 bytes in bfloat16). The backward reads the activation and the incoming gradient and writes the
activation's gradient and, if asked, the value again for the weight's gradient (4 + 4). One scale per
tensor learns from a sum over all its elements: programs sum the parts of the tensor, and one more program
sums these sums, always in the same order.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.tensor import DTensor

from stableqat.ops import kernels
from stableqat.ops.dispatch import kernels_serve
from stableqat.ops.fused import learns
from stableqat.ops.kernels import (
    _acting_scale,
    _clamp,
    _divide,
    _pulled_back,
    _round,
    _tanh,
    _tanh_constants,
)
from stableqat.ops.launch import FORWARD_TILE, Call, launch, surrogate_constants, traced
from stableqat.ops.operands import Spec

if TYPE_CHECKING:
    from stableqat.ops.inputs import InputGradients, InputOperands

PARTS = 2048  # of a tensor, at most: enough programs to fill a GPU, few enough sums for one program
TILE = 1024  # elements that a program of the backward handles at a time
FEATURES = 16384  # of a token whose scale a program finds by itself, at most


@triton.jit
def _add(x, y, NATIVE: tl.constexpr):
    """Sum x + y, rounded by itself: never one rounding with the product that x is, as in `input_value`."""
    if NATIVE:
        return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        return x + y


# fmt: off
@triton.jit
def _codes(
    lowest_ptr, offset_ptr, LEVELS: tl.constexpr, LOWEST: tl.constexpr, OFFSET: tl.constexpr,
):
    """The lowest code, the highest, and the value of code 0."""
    # fmt: on
    low = 0.0
    offset = 0.0
    if LOWEST:
        low = tl.load(lowest_ptr).to(tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr).to(tl.float32)
    return low, low + LEVELS, offset


@triton.jit
def _value(nearest, scale, low, high, offset, OFFSET: tl.constexpr, NATIVE: tl.constexpr):
    value = _clamp(nearest, low, high) * scale
    if OFFSET:
        value = _add(value, offset, NATIVE)
    return value


# fmt: off
@triton.jit
def tensor_forward_kernel(
    x_ptr, scale_ptr, floor_ptr, lowest_ptr, offset_ptr, value_ptr, n,
    LEVELS: tl.constexpr, FLOOR: tl.constexpr, LOWEST: tl.constexpr, OFFSET: tl.constexpr,
    NATIVE: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The value of an activation with one scale; one program per tile."""
    # fmt: on
    scale = _acting_scale(scale_ptr, floor_ptr, 0, True, FLOOR)
    low, high, offset = _codes(lowest_ptr, offset_ptr, LEVELS, LOWEST, OFFSET)
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    if OFFSET:
        x -= offset
    nearest = _round(_divide(x, scale, tl.div_rn(1.0, scale), NATIVE))
    tl.store(value_ptr + at, _value(nearest, scale, low, high, offset, OFFSET, NATIVE), mask=at < n)


# fmt: off
@triton.jit
def tensor_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, floor_ptr, lowest_ptr, offset_ptr, param_ptr, by_x_ptr, value_ptr, sums_ptr,
    n, part, parts,
    LEVELS: tl.constexpr, FLOOR: tl.constexpr, LOWEST: tl.constexpr, OFFSET: tl.constexpr,
    NATIVE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, VALUE: tl.constexpr,
):
    """The gradient of an activation with one scale, and sums for what is learned; one program per part."""
    # fmt: on
    program = tl.program_id(0)
    scale = _acting_scale(scale_ptr, floor_ptr, 0, True, FLOOR)
    inverse = tl.div_rn(1.0, scale)
    low, high, offset = _codes(lowest_ptr, offset_ptr, LEVELS, LOWEST, OFFSET)
    scale_sum = tl.full((COLUMNS,), 0.0, tl.float32)
    offset_sum = tl.full((COLUMNS,), 0.0, tl.float32)
    if KIND == "tanh":
        exponent, peak, by_tanh, by_bell = _tanh_constants(tl.load(param_ptr).to(tl.float32))
        param_sum = tl.full((COLUMNS,), 0.0, tl.float32)
    start = program.to(tl.int64) * part
    for begin in range(0, part, COLUMNS):
        at = start + begin + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        if OFFSET:
            x -= offset
        v = _divide(x, scale, inverse, NATIVE)
        nearest = _round(v)
        if VALUE:
            tl.store(value_ptr + at, _value(nearest, scale, low, high, offset, OFFSET, NATIVE), mask=at < n)
        u = v - nearest
        level = _clamp(nearest, low, high)
        if MASKED:
            inside = (v >= low) & (v <= high)
            scale_sum += grad * tl.where(inside, -u, level)
            if OFFSET:
                offset_sum += tl.where(inside, 0.0, grad)
            grad = tl.where(inside, grad, 0.0)
            u = tl.where(inside, u, 0.0)
        else:
            scale_sum += grad * (level - v)
            # far outside the codes float32 has no digits left for a distance
            u = tl.minimum(tl.maximum(u, -0.5), 0.5)
        if KIND == "tanh":
            factor, by_param = _tanh(u, exponent, peak, by_tanh, by_bell, NATIVE)
            param_sum += grad * by_param
            grad *= factor
        else:
            grad = _pulled_back(grad, u, KIND, STRENGTH, HARMONICS, NATIVE)
        tl.store(by_x_ptr + at, grad, mask=at < n)
    tl.store(sums_ptr + program, tl.sum(scale_sum))
    if OFFSET:
        tl.store(sums_ptr + parts + program, tl.sum(offset_sum))
    if KIND == "tanh":
        tl.store(sums_ptr + 2 * parts + program, tl.sum(param_sum) * scale)


# fmt: off
@triton.jit
def sums_kernel(
    sums_ptr, lowest_ptr, total_ptr, parts, features,
    LEVELS: tl.constexpr, LOWEST: tl.constexpr, OFFSET: tl.constexpr, LEARNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of scale, offset and the surrogate's parameter from the sums of all parts; one program."""
    # fmt: on
    _, high, _ = _codes(lowest_ptr, lowest_ptr, LEVELS, LOWEST, False)
    factor = 1 / tl.sqrt(features * tl.maximum(high, 1.0))
    at = tl.arange(0, COLUMNS)
    tl.store(total_ptr, tl.sum(tl.load(sums_ptr + at, mask=at < parts, other=0.0)) * factor)
    if OFFSET:
        tl.store(total_ptr + 1, tl.sum(tl.load(sums_ptr + parts + at, mask=at < parts, other=0.0)) * factor)
    if LEARNS:
        tl.store(
            total_ptr + 2, tl.sum(tl.load(sums_ptr + 2 * parts + at, mask=at < parts, other=0.0)) * factor
        )


@triton.jit
def _token_scale(x, Q_MAX: tl.constexpr):
    """The scale of each row of a tile, as in `inputs`: at least the least normal number."""
    return tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), Q_MAX + 0.0), 1.1754943508222875e-38)[:, None]


# fmt: off
@triton.jit
def token_forward_kernel(
    x_ptr, value_ptr, rows, n,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The value of an activation whose tokens have scales of their own; one program per few tokens."""
    # fmt: on
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    exists = (row < rows)[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    scale = _token_scale(x, Q_MAX)
    level = _clamp(_round(_divide(x, scale, tl.div_rn(1.0, scale), NATIVE)), Q_MIN, Q_MAX)
    tl.store(value_ptr + at, level * scale, mask=exists)


# fmt: off
@triton.jit
def token_backward_kernel(
    grad_ptr, x_ptr, by_x_ptr, value_ptr, rows, n,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KIND: tl.constexpr, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, VALUE: tl.constexpr,
):
    """The gradient of an activation whose tokens have scales of their own, which clip nothing."""
    # fmt: on
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    exists = (row < rows)[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32)
    scale = _token_scale(x, Q_MAX)
    v = _divide(x, scale, tl.div_rn(1.0, scale), NATIVE)
    nearest = _round(v)
    if VALUE:
        tl.store(value_ptr + at, _clamp(nearest, Q_MIN, Q_MAX) * scale, mask=exists)
    grad = _pulled_back(grad, v - nearest, KIND, STRENGTH, HARMONICS, NATIVE)
    tl.store(by_x_ptr + at, grad, mask=exists)


def serve_forward(x: Tensor, operands: "InputOperands", spec: Spec) -> bool:
    """Whether `forward` takes an activation: one that `backward` takes, but not in a graph.

    There the compiler fuses the plain expression with what makes the activation, which saves reading it.

    Args:
        x: `(..., features)`.
        operands: Its tensors.
        spec: Its constants.
    """
    return not traced(x) and serve_backward(x, operands, spec)


def serve_backward(x: Tensor, operands: "InputOperands", spec: Spec) -> bool:
    """Whether `backward` takes an activation: one for kernels (`dispatch`), with a surrogate that it knows.

    Args:
        x: `(..., features)`.
        operands: Its tensors.
        spec: Its constants.
    """
    if spec.surrogate.kernel is None or not kernels_serve(x) or type(x.numel()) is not int or not x.numel():
        return False
    if operands.scale is None:
        return x.shape[-1] <= FEATURES and not learns(spec.surrogate) and spec.surrogate.mask == "none"
    return not any(isinstance(tensor, DTensor) for tensor in operands)


def forward(x: Tensor, operands: "InputOperands", spec: Spec) -> Tensor:
    """See `inputs.input_value`, whose value this is bit for bit."""
    x = x.contiguous()
    value = torch.empty_like(x)
    if operands.scale is None:
        launch(_token_forward(x.numel() // x.shape[-1], x.shape[-1], spec), x, value)
        return value
    scale, floor, lowest, offset, _ = _filled(operands)
    launch(_tensor_forward(x.numel(), _present(operands), spec), x, scale, floor, lowest, offset, value)
    return value


def backward(
    grad: Tensor, x: Tensor, operands: "InputOperands", spec: Spec, *, with_value: bool
) -> tuple["InputGradients", Tensor | None]:
    """See `inputs.input_gradients`."""
    x, grad = x.contiguous(), grad.contiguous()
    by_x = torch.empty_like(x)
    value = torch.empty_like(x) if with_value else None
    written = by_x if value is None else value
    if operands.scale is None:
        call = _token_backward(x.numel() // x.shape[-1], x.shape[-1], spec, with_value)
        launch(call, grad, x, by_x, written)
        return (by_x, None, None, None), value
    scale, floor, lowest, offset, param = _filled(operands)
    parts, present = _parts(x.numel())[1], _present(operands)
    sums, total = (torch.empty((3, n), dtype=torch.float32, device=x.device) for n in (parts, 1))
    call = _tensor_backward(x.numel(), present, spec, with_value)
    launch(call, grad, x, scale, floor, lowest, offset, param, by_x, written, sums)
    launch(_sums(x.numel(), x.shape[-1], present, spec), sums, lowest, total)
    learned = zip((operands.scale, operands.offset, operands.param), total, strict=True)
    found = [None if tensor is None else by.reshape(tensor.shape).to(tensor.dtype) for tensor, by in learned]
    return (by_x, *found), value  # type: ignore[return-value]


_Present = tuple[bool, bool, bool]


def _present(operands: "InputOperands") -> _Present:
    """Which tensors there are besides the scale: a floor, a lowest code, an offset."""
    return operands.scale_floor is not None, operands.lowest is not None, operands.offset is not None


def _filled(operands: "InputOperands") -> list[Tensor]:
    """The tensors, with the scale in the place of those that a kernel does not look at."""
    assert operands.scale is not None
    return [operands.scale if tensor is None else tensor for tensor in operands]


def _parts(n: int) -> tuple[int, int]:
    """How many elements a part of a tensor has, and how many parts there are."""
    part = max(triton.cdiv(triton.cdiv(n, PARTS), TILE), 1) * TILE
    return part, triton.cdiv(n, part)


@cache
def _tensor_forward(n: int, present: _Present, spec: Spec) -> Call:
    constants = {**_tensor_constants(present, spec), "COLUMNS": FORWARD_TILE}
    return Call(tensor_forward_kernel, triton.cdiv(n, FORWARD_TILE), (n,), constants)


@cache
def _tensor_backward(n: int, present: _Present, spec: Spec, with_value: bool) -> Call:
    part, parts = _parts(n)
    constants = {
        **_tensor_constants(present, spec),
        "COLUMNS": TILE,
        "MASKED": spec.surrogate.mask != "none",
        **surrogate_constants(spec.surrogate),
        "VALUE": with_value,
    }
    return Call(tensor_backward_kernel, parts, (n, part, parts), constants)


@cache
def _sums(n: int, features: int, present: _Present, spec: Spec) -> Call:
    parts = _parts(n)[1]
    constants = {
        "LEVELS": spec.grid.q_max - spec.grid.q_min,
        "LOWEST": present[1],
        "OFFSET": present[2],
        "LEARNS": learns(spec.surrogate),
        "COLUMNS": triton.next_power_of_2(parts),
    }
    return Call(sums_kernel, 1, (parts, features), constants)


@cache
def _token_forward(rows: int, features: int, spec: Spec) -> Call:
    constants = _token_constants(features, spec)
    return Call(token_forward_kernel, triton.cdiv(rows, constants["ROWS"]), (rows, features), constants)


@cache
def _token_backward(rows: int, features: int, spec: Spec, with_value: bool) -> Call:
    constants = _token_constants(features, spec)
    constants |= {**surrogate_constants(spec.surrogate), "VALUE": with_value}
    return Call(token_backward_kernel, triton.cdiv(rows, constants["ROWS"]), (rows, features), constants)


def _tensor_constants(present: _Present, spec: Spec) -> dict[str, Any]:
    floor, lowest, offset = present
    return {
        "LEVELS": spec.grid.q_max - spec.grid.q_min,
        "FLOOR": floor,
        "LOWEST": lowest,
        "OFFSET": offset,
        "NATIVE": kernels.NATIVE,
    }


def _token_constants(features: int, spec: Spec) -> dict[str, Any]:
    columns = triton.next_power_of_2(features)
    return {
        "Q_MIN": spec.grid.q_min,
        "Q_MAX": spec.grid.q_max,
        "NATIVE": kernels.NATIVE,
        "ROWS": max(FORWARD_TILE // columns, 1),
        "COLUMNS": columns,
    }

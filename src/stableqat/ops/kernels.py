"""Triton kernels of fake quantization: what runs on a GPU.

A pass over a weight is bound by memory, so each kernel reads what it needs once and writes its
results once: the forward a weight (4 bytes in float32) and the value (2 in bfloat16), the backward weight,
incoming gradient and weight gradient (4 + 2 + 4), the sums for the scale and for the surrogate's
parameter on the way, and, where asked, the value again. Mathematics is float32, division and
rounding exactly as in `reference`; sums are taken in a fixed order, so that the same call on the same
input gives the same bits.

The distance to a level is `(w - level * s) / s` with a fused multiply-add: one rounding, where
`w / s - level` loses digits on wide grids. Sines are a polynomial and Chebyshev's recurrence.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

FIELDS = tl.constexpr(12)
"""What the table of several weights holds for each, as int64: the addresses of x, scale, scale_floor,
zero_point and param; number of scales, and of weights that share one; where the weight's elements begin,
its forward programs, its backward programs, its sums; grad_scale by the bits of its float32."""


@triton.jit
def _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR: tl.constexpr):
    scale = tl.load(scale_ptr + row, mask=exists, other=1.0).to(tl.float32)
    if FLOOR:
        floor = tl.load(floor_ptr + row, mask=exists, other=1.0).to(tl.float32)
        scale = tl.maximum(scale, floor, propagate_nan=tl.PropagateNan.ALL)
    return scale


@triton.jit
def _divide(x, scale, inverse, NATIVE: tl.constexpr):
    """Quotient x / scale, rounded as IEEE division does, from the reciprocal that a whole row shares.

    Two corrections by an exact remainder round right (Markstein 1990), at half the cost of a division. A
    quotient far beyond every grid stays as the plain product has it, infinite perhaps.
    """
    if NATIVE:
        product = x * inverse
        quotient = tl.fma(tl.fma(-product, scale, x), inverse, product)
        quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
        return tl.where(tl.abs(product) < 1e30, quotient, product)
    else:
        return tl.div_rn(x, scale)


@triton.jit
def _reciprocal(y, NATIVE: tl.constexpr):
    """1 / y within one unit in the last place, for y of ordinary size."""
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, True, 1)
    else:
        return 1 / y


@triton.jit
def _power_of_two(y, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, True, 1)
    else:
        return tl.exp2(y)


@triton.jit
def _round(y):
    """Half to even, exact below 2^22 and far outside every grid above."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _clamp(q, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr):
    q = tl.maximum(q, Q_MIN, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(q, Q_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _shift(v, zero, ZERO_POINTS: tl.constexpr, ZERO_POINT: tl.constexpr):
    """Sum v + zero; an addition of 0 would be kept, for the sake of -0."""
    if ZERO_POINTS or ZERO_POINT != 0:
        return v + zero
    else:
        return v


@triton.jit
def _forward_tile(
    program,
    x_ptr,
    scale_ptr,
    floor_ptr,
    zero_ptr,
    value_ptr,
    rows,
    n,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(n, COLUMNS)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < rows
    scale = _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR)[:, None]
    inverse = tl.div_rn(1.0, scale)
    zero = ZERO_POINT
    if ZERO_POINTS:
        zero = tl.load(zero_ptr + row, mask=exists, other=0.0).to(tl.float32)[:, None]
    offset = row.to(tl.int64)[:, None] * n + column[None, :]
    mask = exists[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    v = _divide(x, scale, inverse, NATIVE)
    code = _clamp(_round(_shift(v, zero, ZERO_POINTS, ZERO_POINT)), Q_MIN, Q_MAX)
    level = _shift(code, -zero, ZERO_POINTS, ZERO_POINT)
    tl.store(value_ptr + offset, level * scale, mask=mask)


@triton.jit
def _fourier(u, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, NATIVE: tl.constexpr):
    """(1 - S) / (1 + S); at a distance d from the threshold S is a sum of sin(k pi d), k = 1, 3, 5, ..."""
    distance = 0.5 - tl.abs(u)
    t = distance * distance
    # sin(pi d) on [0, 1/2], within 7e-9
    wave = distance * (
        3.141592741 + t * (-5.167709827 + t * (2.550076485 + t * (-0.5982836485 + t * 0.07764017582)))
    )
    s = STRENGTH * wave
    if HARMONICS > 1:
        twice = 2 - 4 * wave * wave  # 2 cos(2 pi d)
        before = -wave
        for m in tl.static_range(1, HARMONICS):
            after = twice * wave - before
            before = wave
            wave = after
            s += (STRENGTH / (2 * m + 1)) * wave
    return (1 - s) * _reciprocal(1 + s, NATIVE)


@triton.jit
def _backward_tile(
    program,
    grad_ptr,
    x_ptr,
    scale_ptr,
    floor_ptr,
    zero_ptr,
    param_ptr,
    weight_grad_ptr,
    scale_sums_ptr,
    param_sums_ptr,
    value_ptr,
    rows,
    n,
    splits,
    grad_scale,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASKED: tl.constexpr,
    BINARY: tl.constexpr,
    KIND: tl.constexpr,
    STRENGTH: tl.constexpr,
    HARMONICS: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    VALUE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = program // splits * ROWS + tl.arange(0, ROWS)
    split = program % splits
    exists = row < rows
    scale = _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR)[:, None]
    inverse = tl.div_rn(1.0, scale)
    zero = ZERO_POINT
    if ZERO_POINTS:
        zero = tl.load(zero_ptr + row, mask=exists, other=0.0).to(tl.float32)[:, None]
    if KIND == "tanh":
        logit = tl.load(param_ptr + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        logit = tl.minimum(tl.maximum(logit, -10.0), 10.0)
        a = 1 / (1 + tl.exp(-logit))
        rest = 1 / (1 + tl.exp(logit))  # 1 - a
        z = 2 * rest / a
        k = tl.where(z < 1e-3, z * (1 - 0.5 * z), tl.log(1 + z))
        exponent = -2.885390082 * k  # 2 k, in powers of two
        peak = 2 * k / rest
        by_tanh = 0.5 * a / rest
        by_bell = 4 / (2 - a)
        param_sum = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    scale_sum = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    start = row.to(tl.int64)[:, None] * n
    for first in range(split * SPLIT, min(n, (split + 1) * SPLIT), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        offset = start + column[None, :]
        mask = exists[:, None] & (column < n)[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        v = _divide(x, scale, inverse, NATIVE)
        nearest = _round(_shift(v, zero, ZERO_POINTS, ZERO_POINT))
        level = _shift(_clamp(nearest, Q_MIN, Q_MAX), -zero, ZERO_POINTS, ZERO_POINT)
        if VALUE:
            tl.store(value_ptr + offset, level * scale, mask=mask)
        inside = (v >= LOW) & (v <= HIGH)
        remainder = tl.fma(-level, scale, x)
        u = remainder * inverse
        if BINARY:
            scale_sum += grad * level
        else:
            scale_sum += grad * tl.where(inside, -u, level)
        if ZERO_POINTS or not MASKED:  # the nearest level may be one that the grid lacks
            remainder = tl.fma(zero - nearest, scale, x)
            u = remainder * inverse
        if HARMONICS > 2:  # so steep that the last bit counts
            u = tl.fma(tl.fma(-u, scale, remainder), inverse, u)
        # far outside the grid float32 has no digits left for a distance, and a masked infinity would be NaN
        if ZERO_POINTS or not MASKED or KIND == "tanh":
            u = tl.minimum(tl.maximum(u, -0.5), 0.5)
        grad = tl.where(inside, grad, 0.0)
        if KIND == "constant":
            grad *= STRENGTH
        elif KIND == "fourier":
            grad *= _fourier(u, STRENGTH, HARMONICS, NATIVE)
        elif KIND == "tanh":
            distance = 0.5 - tl.abs(u)  # to the nearest threshold
            # of a negative number, so that nothing cancels
            e = _power_of_two(exponent * distance, NATIVE)
            r = _reciprocal(1 + e, NATIVE)
            bell = e * r * r  # sech^2 / 4
            by_param = by_tanh * (2 * r - 1) - distance * bell * by_bell
            param_sum += grad * tl.where(u < 0, by_param, -by_param)
            grad *= bell * peak
        tl.store(weight_grad_ptr + offset, tl.where(inside, grad, 0.0), mask=mask)
    at = row * splits + split
    tl.store(scale_sums_ptr + at, tl.sum(scale_sum, 1) * grad_scale, mask=exists)
    if KIND == "tanh":
        tl.store(param_sums_ptr + at, tl.sum(param_sum * scale, 1) * grad_scale, mask=exists)


@triton.jit
def forward_kernel(
    x_ptr,
    scale_ptr,
    floor_ptr,
    zero_ptr,
    value_ptr,
    rows,
    n,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The value of one weight; a program a tile."""
    _forward_tile(
        tl.program_id(0),
        x_ptr,
        scale_ptr,
        floor_ptr,
        zero_ptr,
        value_ptr,
        rows,
        n,
        Q_MIN,
        Q_MAX,
        ZERO_POINT,
        FLOOR,
        ZERO_POINTS,
        NATIVE,
        ROWS,
        COLUMNS,
    )


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    floor_ptr,
    zero_ptr,
    param_ptr,
    weight_grad_ptr,
    scale_sums_ptr,
    param_sums_ptr,
    value_ptr,
    rows,
    n,
    splits,
    grad_scale,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASKED: tl.constexpr,
    BINARY: tl.constexpr,
    KIND: tl.constexpr,
    STRENGTH: tl.constexpr,
    HARMONICS: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    VALUE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Gradients of one weight; a program a row, or a part of a very long one."""
    _backward_tile(
        tl.program_id(0),
        grad_ptr,
        x_ptr,
        scale_ptr,
        floor_ptr,
        zero_ptr,
        param_ptr,
        weight_grad_ptr,
        scale_sums_ptr,
        param_sums_ptr,
        value_ptr,
        rows,
        n,
        splits,
        grad_scale,
        Q_MIN,
        Q_MAX,
        ZERO_POINT,
        LOW,
        HIGH,
        MASKED,
        BINARY,
        KIND,
        STRENGTH,
        HARMONICS,
        FLOOR,
        ZERO_POINTS,
        VALUE,
        NATIVE,
        ROWS,
        COLUMNS,
        SPLIT,
    )


@triton.jit
def _line(table_ptr, program, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The table's line of the weight that a program belongs to, and its number within that weight."""
    which = 0
    before = 0
    for i in tl.static_range(1, COUNT):
        first = tl.load(table_ptr + i * FIELDS + FIRST).to(tl.int32)
        which += (program >= first).to(tl.int32)
        before = tl.where(program >= first, first, before)
    return table_ptr + which * FIELDS, program - before, which


@triton.jit
def _pointer(line, field: tl.constexpr, like_ptr):
    return tl.multiple_of(tl.load(line + field).to(like_ptr.dtype), 16)


@triton.jit
def forward_many_kernel(
    table_ptr,
    x_like_ptr,
    scale_like_ptr,
    value_ptr,
    COUNT: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The values of several weights, one behind the other; see `FIELDS`."""
    line, program, _ = _line(table_ptr, tl.program_id(0), 8, COUNT)
    _forward_tile(
        program,
        _pointer(line, 0, x_like_ptr),
        _pointer(line, 1, scale_like_ptr),
        _pointer(line, 2, scale_like_ptr),
        _pointer(line, 3, scale_like_ptr),
        value_ptr + tl.multiple_of(tl.load(line + 7), 16),
        tl.load(line + 5).to(tl.int32),
        tl.multiple_of(tl.load(line + 6).to(tl.int32), 16),
        Q_MIN,
        Q_MAX,
        ZERO_POINT,
        FLOOR,
        ZERO_POINTS,
        NATIVE,
        ROWS,
        COLUMNS,
    )


@triton.jit
def backward_many_kernel(
    table_ptr,
    scale_like_ptr,
    grad_0,
    grad_1,
    grad_2,
    grad_3,
    grad_4,
    grad_5,
    grad_6,
    grad_7,
    x_like_ptr,
    weight_grad_ptr,
    scale_sums_ptr,
    param_sums_ptr,
    COUNT: tl.constexpr,
    Q_MIN: tl.constexpr,
    Q_MAX: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASKED: tl.constexpr,
    BINARY: tl.constexpr,
    KIND: tl.constexpr,
    STRENGTH: tl.constexpr,
    HARMONICS: tl.constexpr,
    FLOOR: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    VALUE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Gradients of several weights, one behind the other; see `FIELDS`."""
    line, program, which = _line(table_ptr, tl.program_id(0), 9, COUNT)
    grad_ptr = grad_0
    if which == 1:
        grad_ptr = grad_1
    if which == 2:
        grad_ptr = grad_2
    if which == 3:
        grad_ptr = grad_3
    if which == 4:
        grad_ptr = grad_4
    if which == 5:
        grad_ptr = grad_5
    if which == 6:
        grad_ptr = grad_6
    if which == 7:
        grad_ptr = grad_7
    n = tl.multiple_of(tl.load(line + 6).to(tl.int32), 16)
    start = tl.multiple_of(tl.load(line + 7), 16)
    sums = tl.load(line + 10)
    _backward_tile(
        program,
        tl.multiple_of(grad_ptr, 16),
        _pointer(line, 0, x_like_ptr),
        _pointer(line, 1, scale_like_ptr),
        _pointer(line, 2, scale_like_ptr),
        _pointer(line, 3, scale_like_ptr),
        _pointer(line, 4, scale_like_ptr),
        weight_grad_ptr + start,
        scale_sums_ptr + sums,
        param_sums_ptr + sums,
        weight_grad_ptr,
        tl.load(line + 5).to(tl.int32),
        n,
        1,
        tl.load(line + 11).to(tl.int32).to(tl.float32, bitcast=True),
        Q_MIN,
        Q_MAX,
        ZERO_POINT,
        LOW,
        HIGH,
        MASKED,
        BINARY,
        KIND,
        STRENGTH,
        HARMONICS,
        FLOOR,
        ZERO_POINTS,
        VALUE,
        NATIVE,
        ROWS,
        COLUMNS,
        SPLIT,
    )


NATIVE = isinstance(forward_kernel, JITFunction)
"""Whether kernels are compiled; Triton's interpreter lacks a fused multiply-add and a GPU's instructions."""

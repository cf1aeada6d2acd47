"""Triton kernels of fake quantization, for GPUs.

Memory bounds a pass over a weight, so each kernel reads its inputs once and writes its results once. The
forward reads the weight (4 bytes in float32) and writes the value (2 in bfloat16). The backward reads the
weight and the incoming gradient and writes the weight's gradient (4 + 2 + 4), and on the way it sums the
gradients of the scale and of the surrogate's parameter and, if asked, writes the value again. Arithmetic is
float32, with division and rounding exactly as in `reference`; sums run in a fixed order, so that the same
call on the same input gives the same bits.

The distance to a level is `(w - level * s) / s` with a fused multiply-add: one rounding, where
`w / s - level` loses digits on wide grids. Sines use a polynomial and Chebyshev's recurrence.

Several weights share a launch by their addresses: each kernel for many weights takes a tuple of pointers per
operand, picks the weight that a program belongs to, and continues like the kernel for one.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR: tl.constexpr):
    scale = tl.load(scale_ptr + row, mask=exists, other=1.0).to(tl.float32)
    if FLOOR:
        floor = tl.load(floor_ptr + row, mask=exists, other=1.0).to(tl.float32)
        below = tl.minimum(scale, floor, propagate_nan=tl.PropagateNan.ALL)
        above = tl.maximum(scale, floor, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.where(floor < 0, below, above)
    return scale


@triton.jit
def _divide(x, scale, inverse, NATIVE: tl.constexpr):
    """Quotient x / scale, rounded like IEEE division, from the reciprocal that a whole row shares.

    Two corrections by an exact remainder give the right rounding (Markstein 1990) at half the cost of a
    division. A quotient far beyond every grid keeps the value of the plain product, which may be infinite.
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
    """Round half to even: exact below 2^22; anything above is far outside every grid."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _clamp(q, q_min, q_max):
    q = tl.maximum(q, q_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(q, q_max, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _shift(v, zero: tl.constexpr):
    """Sum v + zero; adding 0 is skipped, because it would turn -0 into 0."""
    if zero != 0:
        return v + zero
    else:
        return v


# fmt: off
@triton.jit
def forward_kernel(
    x_ptr, scale_ptr, floor_ptr, value_ptr, first, rows, n,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, ZERO_POINT: tl.constexpr, FLOOR: tl.constexpr,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The value of one weight; one program per tile, counted from `first`."""
    # fmt: on
    program = tl.program_id(0) - first
    tiles = tl.cdiv(n, COLUMNS)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < rows
    scale = _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR)[:, None]
    inverse = tl.div_rn(1.0, scale)
    offset = row.to(tl.int64)[:, None] * n + column[None, :]
    mask = exists[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    v = _divide(x, scale, inverse, NATIVE)
    level = _shift(_clamp(_round(_shift(v, ZERO_POINT)), Q_MIN, Q_MAX), -ZERO_POINT)
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


# fmt: off
@triton.jit
def _pulled_back(
    grad, u, KIND: tl.constexpr, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, NATIVE: tl.constexpr
):
    """The incoming gradient times the slope of a surrogate that learns nothing."""
    # fmt: on
    if KIND == "constant":
        return grad * STRENGTH
    elif KIND == "fourier":
        return grad * _fourier(u, STRENGTH, HARMONICS, NATIVE)
    else:
        return grad


@triton.jit
def _tanh_constants(logit):
    """What `_tanh` needs of the logit of `a`."""
    logit = tl.minimum(tl.maximum(logit, -10.0), 10.0)
    a = 1 / (1 + tl.exp(-logit))
    rest = 1 / (1 + tl.exp(logit))  # 1 - a
    z = 2 * rest / a
    k = tl.where(z < 1e-3, z * (1 - 0.5 * z), tl.log(1 + z))
    exponent = -2.885390082 * k  # 2 k, in powers of two
    return exponent, 2 * k / rest, 0.5 * a / rest, 4 / (2 - a)


@triton.jit
def _tanh(u, exponent, peak, by_tanh, by_bell, NATIVE: tl.constexpr):
    """The soft staircase's slope, and its derivative by the logit of `a` in units of the scale."""
    distance = 0.5 - tl.abs(u)  # to the nearest threshold
    # the exponent is negative, so nothing cancels
    e = _power_of_two(exponent * distance, NATIVE)
    r = _reciprocal(1 + e, NATIVE)
    bell = e * r * r  # sech^2 / 4
    by_param = by_tanh * (2 * r - 1) - distance * bell * by_bell
    return bell * peak, tl.where(u < 0, by_param, -by_param)


# fmt: off
@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, scale_ptr, floor_ptr, param_ptr,
    weight_grad_ptr, scale_sums_ptr, param_sums_ptr, value_ptr,
    first, rows, n, splits, grad_scale,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, ZERO_POINT: tl.constexpr, FLOOR: tl.constexpr,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MASKED: tl.constexpr, BINARY: tl.constexpr,
    KIND: tl.constexpr, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, VALUE: tl.constexpr,
):
    """Gradients of one weight; one program per row, or per part of a very long one, counted from `first`."""
    # fmt: on
    program = tl.program_id(0) - first
    row = program // splits * ROWS + tl.arange(0, ROWS)
    split = program % splits
    exists = row < rows
    scale = _acting_scale(scale_ptr, floor_ptr, row, exists, FLOOR)[:, None]
    inverse = tl.div_rn(1.0, scale)
    if KIND == "tanh":
        logit = tl.load(param_ptr + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        exponent, peak, by_tanh, by_bell = _tanh_constants(logit)
        param_sum = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    scale_sum = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    start = row.to(tl.int64)[:, None] * n
    for begin in range(split * SPLIT, min(n, (split + 1) * SPLIT), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        offset = start + column[None, :]
        mask = exists[:, None] & (column < n)[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        v = _divide(x, scale, inverse, NATIVE)
        nearest = _round(_shift(v, ZERO_POINT))
        level = _shift(_clamp(nearest, Q_MIN, Q_MAX), -ZERO_POINT)
        if VALUE:
            tl.store(value_ptr + offset, level * scale, mask=mask)
        inside = (v >= LOW) & (v <= HIGH)
        remainder = tl.fma(-level, scale, x)
        u = remainder * inverse
        if BINARY:
            scale_sum += grad * level
        else:
            scale_sum += grad * tl.where(inside, -u, level)
        if not MASKED:  # the nearest level may be one that the grid lacks
            remainder = tl.fma(ZERO_POINT - nearest, scale, x)
            u = remainder * inverse
        if HARMONICS > 2:  # so steep that the last bit counts
            u = tl.fma(tl.fma(-u, scale, remainder), inverse, u)
        # far outside the grid float32 has no digits left for a distance, and a masked infinity would be NaN
        if not MASKED or KIND == "tanh":
            u = tl.minimum(tl.maximum(u, -0.5), 0.5)
        grad = tl.where(inside, grad, 0.0)
        if KIND == "tanh":
            factor, by_param = _tanh(u, exponent, peak, by_tanh, by_bell, NATIVE)
            param_sum += grad * by_param
            grad *= factor
        else:
            grad = _pulled_back(grad, u, KIND, STRENGTH, HARMONICS, NATIVE)
        tl.store(weight_grad_ptr + offset, tl.where(inside, grad, 0.0), mask=mask)
    at = row * splits + split
    tl.store(scale_sums_ptr + at, tl.sum(scale_sum, 1) * grad_scale, mask=exists)
    if KIND == "tanh":
        tl.store(param_sums_ptr + at, tl.sum(param_sum * scale, 1) * grad_scale, mask=exists)


@triton.jit
def _which(FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The weight that this program belongs to, by the number of each weight's first program."""
    which = 0
    for i in tl.static_range(1, COUNT):
        which += (tl.program_id(0) >= FIRST[i]).to(tl.int32)
    return which


@triton.jit
def _number(EACH: tl.constexpr, which, COUNT: tl.constexpr):
    number = EACH[0]
    for i in tl.static_range(1, COUNT):
        number = tl.where(which == i, EACH[i], number)
    return number


@triton.jit
def _pointer(each, which, COUNT: tl.constexpr):
    pointer = each[0]
    for i in tl.static_range(1, COUNT):
        if which == i:
            pointer = each[i]
    return tl.multiple_of(pointer, 16)


# fmt: off
@triton.jit
def forward_many_kernel(
    x_ptrs, scale_ptrs, floor_ptrs, value_ptr,
    COUNT: tl.constexpr, FIRST: tl.constexpr, ROWS_OF: tl.constexpr, N_OF: tl.constexpr, START: tl.constexpr,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, ZERO_POINT: tl.constexpr, FLOOR: tl.constexpr,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The values of several weights, one after the other in one buffer.

    Each weight has the number of its first program (FIRST), its number of scales (ROWS_OF), how many elements
    share one (N_OF, a multiple of 16) and where its elements begin in the buffer (START).
    """
    which = _which(FIRST, COUNT)
    forward_kernel(
        _pointer(x_ptrs, which, COUNT), _pointer(scale_ptrs, which, COUNT),
        _pointer(floor_ptrs, which, COUNT),
        value_ptr + tl.multiple_of(_number(START, which, COUNT), 16),
        _number(FIRST, which, COUNT),
        _number(ROWS_OF, which, COUNT),
        tl.multiple_of(_number(N_OF, which, COUNT), 16),
        Q_MIN, Q_MAX, ZERO_POINT, FLOOR, NATIVE, ROWS, COLUMNS,
    )


@triton.jit
def backward_many_kernel(
    grad_ptrs, x_ptrs, scale_ptrs, floor_ptrs, param_ptrs, weight_grad_ptr, scale_sums_ptr, param_sums_ptr,
    COUNT: tl.constexpr, FIRST: tl.constexpr, ROWS_OF: tl.constexpr, N_OF: tl.constexpr, START: tl.constexpr,
    SUMS: tl.constexpr, GRAD_SCALE: tl.constexpr,
    Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, ZERO_POINT: tl.constexpr, FLOOR: tl.constexpr,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MASKED: tl.constexpr, BINARY: tl.constexpr,
    KIND: tl.constexpr, STRENGTH: tl.constexpr, HARMONICS: tl.constexpr, VALUE: tl.constexpr,
):
    """Gradients of several weights, one after the other; a weight's sums begin at SUMS in their buffers."""
    which = _which(FIRST, COUNT)
    start = tl.multiple_of(_number(START, which, COUNT), 16)
    sums = _number(SUMS, which, COUNT)
    backward_kernel(
        _pointer(grad_ptrs, which, COUNT), _pointer(x_ptrs, which, COUNT), _pointer(scale_ptrs, which, COUNT),
        _pointer(floor_ptrs, which, COUNT), _pointer(param_ptrs, which, COUNT),
        weight_grad_ptr + start, scale_sums_ptr + sums, param_sums_ptr + sums, weight_grad_ptr,
        _number(FIRST, which, COUNT),
        _number(ROWS_OF, which, COUNT),
        tl.multiple_of(_number(N_OF, which, COUNT), 16),
        1,
        _number(GRAD_SCALE, which, COUNT),
        Q_MIN, Q_MAX, ZERO_POINT, FLOOR, NATIVE, ROWS, COLUMNS, SPLIT,
        LOW, HIGH, MASKED, BINARY, KIND, STRENGTH, HARMONICS, VALUE,
    )
# fmt: on


NATIVE = isinstance(forward_kernel, JITFunction)
"""Whether kernels are compiled; Triton's interpreter lacks a fused multiply-add and a GPU's instructions."""

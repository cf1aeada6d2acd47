"""Calls of the Triton kernels: what they are given, and how they are launched at little cost.

Triton looks at every argument of every launch, which takes longer than these kernels do on a small
weight; from the second call on, a launch goes straight to the compiled variant. Several weights at
once take one launch (`forward_many`, `backward_many`) with their addresses in a table on the device.
"""

import struct
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import Parameter

from stableqat.ops import kernels
from stableqat.ops.grids import Grid
from stableqat.ops.operands import TOGETHER, Weight
from stableqat.ops.surrogates import Surrogate, of_kernel

FORWARD_TILE = 2048  # elements that a program handles at a time, measured best
BACKWARD_TILE = 1024
WARPS = 4
SPLIT = 32 * BACKWARD_TILE  # elements of one scale after which its sum is spread over programs
MOST_TOGETHER = 4096  # sets of weights that are remembered


class Together(NamedTuple):
    """Several weights as one launch sees them: a function of addresses and shapes, whatever lives there.

    Attributes:
        table: See `kernels.FIELDS`.
        shapes: Number of scales, and of weights that share one, for each.
        longest: The largest number of weights that share a scale.
        elements: Length of a buffer for all weights.
        forward_programs: Programs of a forward.
        backward_programs: Programs of a backward.
        sums: Length of a buffer for all scales.
    """

    table: Tensor
    shapes: tuple[tuple[int, int], ...]
    longest: int
    elements: int
    forward_programs: int
    backward_programs: int
    sums: int


def traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for one in a graph that is being made."""
    return type(tensor) not in (Tensor, Parameter)


def forward(weight: Weight, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Fake-quantized value, bit for bit that of `reference.forward`.

    Args:
        weight: The weight.
        grid: The grid.
        dtype: Type of the value.

    Returns:
        The value, shaped like the weight.
    """
    value = torch.empty_like(weight.x, dtype=dtype)
    rows, n = weight.scale.numel(), _n(weight)

    def prepare() -> _Arguments:
        constants = _forward_constants(weight, n, grid)
        tiles = triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(n, constants["COLUMNS"])
        return tiles, (rows, n), constants

    key = (rows, n, grid, weight.scale_floor is None, weight.zero_point is None)
    _launch(kernels.forward_kernel, (*_pointers(weight)[:4], value), key, prepare)
    return value


def backward(
    grad: Tensor, weight: Weight, grid: Grid, surrogate: Surrogate, value_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of weight, scale and the surrogate's parameter, see `reference.backward`, in one pass.

    Args:
        grad: Contiguous upstream gradient, shaped like the weight.
        weight: The weight.
        grid: The grid.
        surrogate: One that the kernels support.
        value_dtype: Also write the fake-quantized value, in this type.

    Returns:
        Gradients like `x` (in its type), `scale` and `param` (float32), and the value, if asked for.
    """
    rows, n = weight.scale.numel(), _n(weight)
    splits = triton.cdiv(n, SPLIT)
    kernel = surrogate.kernel
    assert kernel is not None
    assert weight.param is not None or not kernel.learns
    weight_grad = torch.empty_like(weight.x)
    scale_sums = torch.empty((rows, splits), dtype=torch.float32, device=grad.device)
    param_sums = torch.empty_like(scale_sums) if kernel.learns else None
    value = None if value_dtype is None else torch.empty_like(weight.x, dtype=value_dtype)

    def prepare() -> _Arguments:
        constants = _backward_constants(weight, n, grid, surrogate, value is not None)
        numbers = (rows, n, splits, _grad_scale(n, grid))
        return triton.cdiv(rows, constants["ROWS"]) * splits, numbers, constants

    outputs = (
        weight_grad,
        scale_sums,
        scale_sums if param_sums is None else param_sums,
        weight_grad if value is None else value,
    )
    key = (rows, n, grid, surrogate, weight.scale_floor is None, weight.zero_point is None, value is None)
    _launch(kernels.backward_kernel, (grad, *_pointers(weight), *outputs), key, prepare)
    shape = weight.scale.shape
    scale_grad = _total(scale_sums, shape)
    return weight_grad, scale_grad, None if param_sums is None else _total(param_sums, shape), value


def join(weights: Sequence[Weight], grid: Grid) -> Together | None:
    """What `forward_many` and `backward_many` want; None if they don't take these weights.

    They take up to eight that are alike in types, aligned, and whose scales are shared by whole vectors.

    Args:
        weights: The weights.
        grid: Their grid.
    """
    if not kernels.NATIVE or torch.compiler.is_compiling():
        return None
    layout = [(w.x.dtype, w.x.shape, w.scale.dtype, w.scale.shape) for w in weights]
    contiguous = [t is None or t.is_contiguous() for weight in weights for t in weight]
    addresses = [0 if t is None else t.data_ptr() for weight in weights for t in weight]
    key = (weights[0].x.device.index, grid, all(contiguous), *layout, *addresses)
    if key in _together:
        return _together[key]
    if torch.cuda.is_current_stream_capturing():  # a table is copied from the host, which a graph cannot hold
        return None
    if len(_together) >= MOST_TOGETHER:  # parameters that move, as under sharding
        _forgotten.extend(each.table for each in _together.values() if each is not None)
        _together.clear()
    joined = _together[key] = _join(weights, grid) if all(contiguous) else None
    return joined


def forward_flat(first: Weight, together: Together, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`forward` of several weights in one launch.

    Args:
        first: The first of the weights.
        together: What `join` said of them.
        grid: Their grid.
        dtype: Type of the values.

    Returns:
        Their values in a flat buffer, one behind the other.
    """
    values = torch.empty(together.elements, dtype=dtype, device=first.x.device)

    def prepare() -> _Arguments:
        return (
            together.forward_programs,
            (),
            {"COUNT": len(together.shapes), **_forward_constants(first, together.longest, grid)},
        )

    pointers = (together.table, first.x, first.scale, values)
    key = (together.shapes, grid, first.scale_floor is None, first.zero_point is None)
    _launch(kernels.forward_many_kernel, pointers, key, prepare)
    return values


def forward_many(
    weights: Sequence[Weight], together: Together, grid: Grid, dtype: torch.dtype
) -> list[Tensor]:
    """`forward_flat`, taken apart: the values."""
    return taken_apart(forward_flat(weights[0], together, grid, dtype), [weight.x for weight in weights])


def backward_flat(
    grads: Sequence[Tensor],
    first: Weight,
    together: Together,
    grid: Grid,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of several weights in one launch.

    Args:
        grads: Contiguous, aligned upstream gradients of one type.
        first: The first of the weights.
        together: What `join` said of them.
        grid: Their grid.
        surrogate: Their surrogate.

    Returns:
        Gradients of weights, scales and parameters in flat buffers; the last is empty where none is learned.
    """
    weight_grads = torch.empty(together.elements, dtype=first.x.dtype, device=first.x.device)
    scale_sums = torch.empty(together.sums, dtype=torch.float32, device=first.x.device)
    kernel = surrogate.kernel
    assert kernel is not None
    param_sums = torch.empty(
        together.sums if kernel.learns else 0, dtype=torch.float32, device=first.x.device
    )

    def prepare() -> _Arguments:
        constants = {
            "COUNT": len(grads),
            **_backward_constants(first, together.longest, grid, surrogate, False),
        }
        return together.backward_programs, (), constants

    slots = [*grads, *[grads[0]] * (TOGETHER - len(grads))]
    outputs = (first.x, weight_grads, scale_sums, param_sums if kernel.learns else scale_sums)
    pointers = (together.table, first.scale, *slots, *outputs)
    key = (together.shapes, grid, surrogate, first.scale_floor is None, first.zero_point is None)
    _launch(kernels.backward_many_kernel, pointers, key, prepare)
    return weight_grads, scale_sums, param_sums


def backward_many(
    grads: Sequence[Tensor],
    weights: Sequence[Weight],
    together: Together,
    grid: Grid,
    surrogate: Surrogate,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """`backward_flat`, taken apart: gradients of weight, scale and parameter for each."""
    by_weight, by_scale, by_param = backward_flat(grads, weights[0], together, grid, surrogate)
    scales = [weight.scale for weight in weights]
    params = taken_apart(by_param, scales) if by_param.numel() else [None] * len(weights)
    xs = [weight.x for weight in weights]
    return list(zip(taken_apart(by_weight, xs), taken_apart(by_scale, scales), params, strict=True))


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may read the tensors in whole vectors."""
    return not any([tensor.data_ptr() & 15 for tensor in tensors])


def taken_apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat buffer, like the contiguous tensors, which lie in it one behind the other."""
    views, start = [], 0
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return views


_Arguments = tuple[int, tuple[int | float, ...], dict[str, Any]]
"""What a launch needs beside tensors: number of programs, numbers, constants by name."""

_launchers: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}
_together: dict[Hashable, Together | None] = {}
_forgotten: deque[Tensor] = deque(maxlen=2 * MOST_TOGETHER)  # tables that a captured graph may still read


def _launch(
    kernel: Any, pointers: tuple[Tensor, ...], key: Hashable, prepare: Callable[[], _Arguments]
) -> None:
    """Run a kernel; from the second time on without Triton's look at every argument.

    Args:
        kernel: A jitted kernel that takes pointers, numbers and constants in this order.
        pointers: Its tensors, on one device.
        key: All that `prepare` depends on.
        prepare: Makes the other arguments.
    """
    in_graph = traced(pointers[0])
    if in_graph or torch.compiler.is_compiling() or not kernels.NATIVE:
        programs, numbers, constants = prepare()
        launch = wrap_triton(kernel) if in_graph else kernel
        launch[(programs,)](*pointers, *numbers, **constants, num_warps=WARPS)
        return
    device = pointers[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, pointers, key, prepare)
    # a compiled variant holds for these types, numbers and constants, and for aligned tensors
    whole = aligned(pointers)
    key = (kernel, device.index, key, *[tensor.dtype for tensor in pointers])
    if whole and key in _launchers:
        launcher, rest = _launchers[key]
        launcher(*pointers, *rest)
        return
    programs, numbers, constants = prepare()
    compiled = kernel[(programs,)](*pointers, *numbers, **constants, num_warps=WARPS)
    if whole:
        names = kernel.arg_names[len(pointers) + len(numbers) :]
        _launchers[key] = compiled[(programs, 1, 1)], (*numbers, *[constants[name] for name in names])


def _join(weights: Sequence[Weight], grid: Grid) -> Together | None:
    first = weights[0]
    shapes = tuple((weight.scale.numel(), _n(weight)) for weight in weights)
    addresses = [t.data_ptr() for weight in weights for t in _pointers(weight)]
    types = [t if t is None else t.dtype for t in first]
    alike = all(
        [t if t is None else t.dtype for t in weight] == types
        and weight.x.device == first.x.device
        and all(t is None or t.dtype == first.scale.dtype for t in weight[1:])
        and n % 16 == 0
        and n <= SPLIT
        for weight, (_, n) in zip(weights, shapes, strict=True)
    )
    if not alike or not 1 < len(weights) <= TOGETHER or any(address & 15 for address in addresses):
        return None
    longest = max(n for _, n in shapes)
    rows_forward, columns = _tile(longest, FORWARD_TILE)
    rows_backward, _ = _tile(longest, BACKWARD_TILE)
    lines, start, forward, backward, sums = [], 0, 0, 0, 0
    for i, (rows, n) in enumerate(shapes):
        bits = struct.unpack("i", struct.pack("f", _grad_scale(n, grid)))[0]
        lines.append([*addresses[5 * i : 5 * i + 5], rows, n, start, forward, backward, sums, bits])
        start += rows * n
        forward += triton.cdiv(rows, rows_forward) * triton.cdiv(n, columns)
        backward += triton.cdiv(rows, rows_backward)
        sums += rows
    table = torch.tensor(lines, dtype=torch.int64, device=first.x.device)
    return Together(table, shapes, longest, start, forward, backward, sums)


def _n(weight: Weight) -> int:
    """Number of weights that share a scale."""
    return weight.x.numel() // weight.scale.numel()


def _pointers(weight: Weight) -> tuple[Tensor, ...]:
    """All tensors; `scale` stands in where there is none."""
    x, scale, scale_floor, zero_point, param = weight
    return (
        x,
        scale,
        scale if scale_floor is None else scale_floor,
        scale if zero_point is None else zero_point,
        scale if param is None else param,
    )


def _total(sums: Tensor, shape: torch.Size) -> Tensor:
    return (sums if sums.shape[1] == 1 else sums.sum(-1)).reshape(shape)


def _tile(n: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile; both are powers of two."""
    columns = min(triton.next_power_of_2(n), elements)
    return elements // columns, columns


def _grad_scale(n: int, grid: Grid) -> float:
    return 1 / sqrt(n * max(grid.q_max, 1))


def _forward_constants(weight: Weight, n: int, grid: Grid) -> dict[str, Any]:
    rows, columns = _tile(n, FORWARD_TILE)
    return {
        "Q_MIN": grid.q_min,
        "Q_MAX": grid.q_max,
        "ZERO_POINT": grid.zero_point,
        "FLOOR": weight.scale_floor is not None,
        "ZERO_POINTS": weight.zero_point is not None,
        "NATIVE": kernels.NATIVE,
        "ROWS": rows,
        "COLUMNS": columns,
    }


def _backward_constants(
    weight: Weight, n: int, grid: Grid, surrogate: Surrogate, value: bool
) -> dict[str, Any]:
    rows, columns = _tile(n, BACKWARD_TILE)
    low, high = grid.bounds(surrogate.mask)
    kernel = surrogate.kernel
    assert kernel is not None
    of_kernel(kernel, surrogate.mask)  # refuses a form that no kernel has
    strength, harmonics = (*kernel.numbers, 0.0, 0)[:2]
    if kernel.name == "fourier":
        strength = strength * sqrt(2) * pi
    return {
        **_forward_constants(weight, n, grid),
        "LOW": max(low, -3e38),
        "HIGH": min(high, 3e38),
        "MASKED": surrogate.mask != "none",
        "BINARY": grid.name == "binary",
        "KIND": kernel.name,
        "STRENGTH": strength,
        "HARMONICS": harmonics,
        "VALUE": value,
        "ROWS": rows,
        "COLUMNS": columns,
        "SPLIT": SPLIT,
    }

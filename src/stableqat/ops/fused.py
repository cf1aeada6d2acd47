"""Fake quantization by the fused kernels: tensors in, tensors out.

`forward` and `backward` serve one weight. Several weights of one kind can share a launch, because a step at
small batches waits for launches: `join` says whether they can, `forward_flat` and `backward_flat` launch into
flat buffers, and `split_values` and `split_gradients` split these.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from stableqat.ops import kernels
from stableqat.ops.grids import Grid
from stableqat.ops.launch import (
    SPLIT,
    Layout,
    backward_call,
    backward_many_call,
    forward_call,
    forward_many_call,
    launch,
    layout_of,
    pointer,
    run,
    traced,
)
from stableqat.ops.operands import TOGETHER, Operands
from stableqat.ops.surrogates import Surrogate


def forward(operands: Operands, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The fake-quantized value, bit for bit that of `reference.forward`.

    Args:
        operands: Contiguous tensors of the weight.
        grid: The grid.
        dtype: Type of the value.

    Returns:
        The value, shaped like the weight.
    """
    x, scale, floor, _ = operands
    value = torch.empty_like(x, dtype=dtype)
    call = forward_call(scale.numel(), _n(operands), grid, floor is not None)
    launch(call, x, scale, scale if floor is None else floor, value)
    return value


def backward(
    grad: Tensor,
    operands: Operands,
    grid: Grid,
    surrogate: Surrogate,
    value_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of weight, scale and the surrogate's parameter in one pass, see `reference.backward`.

    Args:
        grad: Contiguous upstream gradient, shaped like the weight.
        operands: Contiguous tensors of the weight.
        grid: The grid.
        surrogate: One that declares its kernel.
        value_dtype: Also write the fake-quantized value, in this type.

    Returns:
        Gradients like `x` (in its type), `scale` and `param` (float32; None where nothing is learned), and
        the value if it is asked for.
    """
    x, scale, floor, param = operands
    rows, n = scale.numel(), _n(operands)
    weight_grad = torch.empty_like(x)
    scale_sums = torch.empty((rows, -(-n // SPLIT)), dtype=torch.float32, device=grad.device)
    param_sums = torch.empty_like(scale_sums) if learns(surrogate) else None
    value = None if value_dtype is None else torch.empty_like(x, dtype=value_dtype)
    assert param_sums is None or param is not None
    launch(
        backward_call(rows, n, grid, surrogate, floor is not None, value is not None),
        grad,
        x,
        scale,
        scale if floor is None else floor,
        scale if param is None else param,
        weight_grad,
        scale_sums,
        scale_sums if param_sums is None else param_sums,
        weight_grad if value is None else value,
    )
    by_scale, by_param = (
        None if sums is None else (sums if sums.shape[1] == 1 else sums.sum(-1)).reshape(scale.shape)
        for sums in (scale_sums, param_sums)
    )
    assert by_scale is not None
    return weight_grad, by_scale, by_param, value


class Joined(NamedTuple):
    """Several weights that share a launch.

    Attributes:
        layout: Where each lies.
        first: The first of them.
        columns: What the kernel takes of each weight, one column for each of `x`, `scale`, `scale_floor` and
            `param`.
    """

    layout: Layout
    first: Operands
    columns: tuple[tuple[Any, ...], ...]


def join(weights: Sequence[Operands], grid: Grid) -> Joined | None:
    """What `forward_flat` and `backward_flat` take; None for weights that cannot share a launch.

    Two to eight weights can if they have the same types, are contiguous and aligned, and if each of their
    scales belongs to whole vectors.

    Args:
        weights: The weights.
        grid: Their grid.
    """
    first = weights[0]
    if not 1 < len(weights) <= TOGETHER or torch.compiler.is_compiling() or traced(first.x):
        return None
    layout = layout_of(tuple([(each.x.numel(), each.scale.numel()) for each in weights]), grid)
    device = first.x.get_device()
    if layout is None or any([each.x.get_device() != device for each in weights]):
        return None
    columns: list[tuple[Any, ...]] = []
    for tensors in zip(*weights, strict=True):
        dtype = first.scale.dtype if columns else first.x.dtype
        usable = [t.data_ptr() for t in tensors if t is not None and t.dtype == dtype and t.is_contiguous()]
        if not usable and all([tensor is None for tensor in tensors]):
            columns.append(columns[1])  # the kernel does not look at it
        elif len(usable) < len(tensors) or any([address & 15 for address in usable]):
            return None
        else:
            columns.append(tuple(usable) if kernels.NATIVE else tensors)
    return Joined(layout, first, tuple(columns))


def forward_flat(joined: Joined, dtype: torch.dtype) -> Tensor:
    """`forward` of several weights in one launch.

    Args:
        joined: The weights.
        dtype: Type of the values.

    Returns:
        Their values in a flat buffer, one after the other.
    """
    layout, (x, scale, floor, _), columns = joined
    values = torch.empty(layout.starts[-1], dtype=dtype, device=x.device)
    call = forward_many_call(layout, floor is not None)
    run(call, x.device, (x.dtype, scale.dtype, scale.dtype, dtype), (*columns[:3], pointer(values)))
    return values


def split_values(flat: Tensor, weights: Sequence[Operands]) -> Sequence[Tensor]:
    """The values of several weights, as views of a flat buffer."""
    return _unflatten_dense_tensors(flat, [each.x for each in weights])


def backward_flat(
    grads: Sequence[Tensor], joined: Joined, surrogate: Surrogate
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of several weights in one launch.

    Args:
        grads: Contiguous, aligned upstream gradients of one type.
        joined: The weights.
        surrogate: Their surrogate.

    Returns:
        Gradients of weights, scales and parameters in flat buffers; the last is empty where none is learned.
    """
    layout, (x, scale, floor, _), columns = joined
    learned = layout.sums[-1] if learns(surrogate) else 0
    weight_grads = torch.empty(layout.starts[-1], dtype=x.dtype, device=x.device)
    scale_sums = torch.empty(layout.sums[-1], dtype=torch.float32, device=x.device)
    param_sums = torch.empty(learned, dtype=torch.float32, device=x.device)
    call = backward_many_call(layout, surrogate, floor is not None)
    types = (grads[0].dtype, x.dtype, *[scale.dtype] * 3, x.dtype, torch.float32, torch.float32)
    outputs = (weight_grads, scale_sums, param_sums if learned else scale_sums)
    run(call, x.device, types, (tuple(map(pointer, grads)), *columns, *map(pointer, outputs)))
    return weight_grads, scale_sums, param_sums


def split_gradients(
    flat: tuple[Tensor, Tensor, Tensor], weights: Sequence[Operands]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Gradients of weight, scale and parameter of each of several weights, as views of flat buffers."""
    scales = [each.scale for each in weights]
    by_scale = _unflatten_dense_tensors(flat[1], scales)
    by_param = _unflatten_dense_tensors(flat[2], scales) if flat[2].numel() else [None] * len(weights)
    return list(zip(split_values(flat[0], weights), by_scale, by_param, strict=True))


def _n(operands: Operands) -> int:
    """Number of elements that share a scale."""
    return operands.x.numel() // operands.scale.numel()


def learns(surrogate: Surrogate) -> bool:
    """Whether the kernel computes the gradient of a learned parameter."""
    kernel = surrogate.kernel
    assert kernel is not None
    return kernel.learns

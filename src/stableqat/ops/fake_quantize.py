"""Fake quantization: round in the forward, a surrogate in the backward.

Every quantizer calls `fake_quantize`, or `fake_quantize_many` for several weights at once; `ops.product`
multiplies with what they compute. They save their inputs and compute codes and surrogate again in the
backward: that costs a pass over the weight and saves the memory of a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableqat.ops import reference
from stableqat.ops.dispatch import Gradients, gradients_of, gradients_of_many, value_of, values_of
from stableqat.ops.grids import Grid
from stableqat.ops.once_differentiable import once_differentiable
from stableqat.ops.operands import Operands, Spec, from_text, to_text
from stableqat.ops.surrogates import Surrogate


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    scale_floor: Tensor | None = None,
    grid: Grid,
    surrogate: Surrogate,
    surrogate_param: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize `x`, with a surrogate gradient.

    Args:
        x: Latent weight, `(out, ...)`.
        scale: Distance between levels, see `Operands`.
        scale_floor: Lower bound of the scale, see `Operands`.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        surrogate_param: The surrogate's learned parameter, see `Operands`.

    Returns:
        Values on the grid, shaped like `x`, in the autocast type if autocast is on and otherwise in the type
        of `x`; the arithmetic is float32 either way.
    """
    operands = Operands(x, scale, scale_floor, surrogate_param)
    spec = Spec(grid, surrogate, compute_dtype(x))
    if torch.compiler.is_compiling() and (text := to_text(grid, surrogate)) is not None:
        return _many_in_graph(text, spec.dtype, *operands)[0]
    return _FakeQuantize.apply(spec, *operands)


def fake_quantize_many(
    weights: Sequence[Operands],
    *,
    grid: Grid,
    surrogate: Surrogate,
    values: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """`fake_quantize` of several weights in one operation, with fewer calls and launches in both directions.

    Args:
        weights: The weights, of one type.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        values: Results that are already known, None for the others; of the known ones only gradients are
            computed. A compiled graph computes them again.

    Returns:
        The result of `fake_quantize` for each weight.
    """
    spec = Spec(grid, surrogate, compute_dtype(weights[0].x))
    tensors = [tensor for weight in weights for tensor in weight]
    if torch.compiler.is_compiling() and (text := to_text(grid, surrogate)) is not None:
        return _many_in_graph(text, spec.dtype, *tensors)
    known = [None if value is None or value.dtype != spec.dtype else value for value in values or ()]
    is_known = any(value is not None for value in known)
    return _FakeQuantizeMany.apply(spec, known if is_known else None, *tensors)


def pull_back(
    grads: Sequence[Tensor], weights: Sequence[Operands], *, grid: Grid, surrogate: Surrogate
) -> Sequence[Gradients]:
    """The backward of `fake_quantize_many` alone, for values that were made elsewhere.

    Args:
        grads: Gradients by the values.
        weights: The weights, of one type; they may have no rows.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.

    Returns:
        For each weight the gradients of `x`, `scale` and `param`.
    """
    spec = Spec(grid, surrogate, weights[0].x.dtype)
    if all(weight.x.numel() for weight in weights):
        return gradients_of_many(grads, weights, spec)
    return [
        gradients_of(grad, weight, spec)[0] if weight.x.numel() else (weight.x, weight.scale, weight.param)
        for grad, weight in zip(grads, weights, strict=True)
    ]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast computes products; None if it is off."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # the meta device has no autocast
        return None
    return torch.get_autocast_dtype(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of products and of fake-quantized weights: autocast's if it is on, otherwise the tensor's."""
    return autocast_dtype(x) or x.dtype


def quantize_codes(x: Tensor, scale: Tensor, *, grid: Grid) -> Tensor:
    """The codes behind `fake_quantize`'s value, int8, shaped like `x`."""
    grouped, scale, _ = reference.grouped(Operands(x, scale))
    return reference.codes(grouped / scale, grid).to(torch.int8).reshape(x.shape)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: float, dtype: torch.dtype) -> Tensor:
    """`s * (q - z)` in `dtype`: bit for bit the value of `fake_quantize` for a weight of that type."""
    working = reference.working_dtype(dtype)
    grouped = codes.reshape(*scale.shape, -1).to(working)
    return (grouped - zero_point).mul_(scale.to(working).unsqueeze(-1)).reshape(codes.shape).to(dtype)


# Dynamo takes a fifth of a second to trace an autograd.Function, so a call is a node of the graph, which only
# the stages after Dynamo look into; it takes tensors and plain values.
@torch.compiler.allow_in_graph
def _many_in_graph(text: str, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return _FakeQuantizeMany.apply(from_text(text, dtype), None, *tensors)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec = spec
        return value_of(Operands(*tensors), spec)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (by_weight, by_scale, by_param), _ = gradients_of(grad, Operands(*ctx.saved_tensors), ctx.spec)
        return None, by_weight, by_scale, None, by_param


class _FakeQuantizeMany(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, values: Sequence[Tensor | None] | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that was not used gets no gradient
        ctx.spec = spec
        weights = _by_weight(tensors)
        if values is None:
            return tuple(values_of(weights, spec))
        served = zip(weights, values, strict=True)
        return tuple([value_of(weight, spec) if v is None else v.detach() for weight, v in served])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients_of_many(grads, _by_weight(ctx.saved_tensors), ctx.spec)
        flat = [g for by_weight, by_scale, by_param in found for g in (by_weight, by_scale, None, by_param)]
        return (None, None, *flat)


def _by_weight(tensors: Sequence[Any]) -> list[Operands]:
    size = len(Operands._fields)
    return [Operands(*tensors[i : i + size]) for i in range(0, len(tensors), size)]

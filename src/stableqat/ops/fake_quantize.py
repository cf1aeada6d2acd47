"""The one place of forward and backward: round in the forward, a surrogate in the backward.

`fake_quantize` is what every quantizer calls; `fake_quantize_linear` is the same with the product that
follows it, `fake_quantize_many` the same for several weights at once. They save the tensors they were
given and compute codes and surrogate anew in the backward; the product needs the value as well, which
it recomputes or saves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.ops import reference
from stableqat.ops.dispatch import gradients_of, gradients_of_many, implementation, value_of, values_of
from stableqat.ops.grids import Grid
from stableqat.ops.once import once_differentiable
from stableqat.ops.operands import Weight
from stableqat.ops.spec import Spec, from_text, to_text
from stableqat.ops.surrogates import Surrogate


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    scale_floor: Tensor | None = None,
    grid: Grid,
    surrogate: Surrogate,
    surrogate_param: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize `x`, with a surrogate gradient.

    Args:
        x: Latent weight, `(out, ...)`.
        scale: Distance between levels, see `Weight`.
        zero_point: Replaces the grid's own, see `Weight`.
        scale_floor: The acting scale is never below it, see `Weight`.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        surrogate_param: The surrogate's learned parameter, see `Weight`.

    Returns:
        Values on the grid, shaped like `x`, in the autocast type where autocast is on and in
        the type of `x` otherwise; the mathematics is float32 either way.
    """
    weight = Weight(x, scale, scale_floor, zero_point, surrogate_param)
    return _FakeQuantize.apply(Spec(grid, surrogate, compute_dtype(x)), *weight)


def fake_quantize_many(
    weights: Sequence[Weight],
    *,
    grid: Grid,
    surrogate: Surrogate,
    values: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """`fake_quantize` of several weights as one operation, for fewer calls and launches on either way.

    Args:
        weights: The weights, of one type.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        values: The results, where they are known already; of these only the gradient is left to compute. A
            compiled graph does not take them.

    Returns:
        What `fake_quantize` would, for each weight.
    """
    spec = Spec(grid, surrogate, compute_dtype(weights[0].x))
    tensors = [tensor for weight in weights for tensor in weight]
    if torch.compiler.is_compiling() and (text := to_text(grid, surrogate)) is not None:
        return _many_in_graph(text, spec.dtype, *tensors)
    known = [None if value is None or value.dtype != spec.dtype else value for value in values or ()]
    is_known = any(value is not None for value in known)
    return _FakeQuantizeMany.apply(spec, known if is_known else None, *tensors)


def fake_quantize_linear(
    input: Tensor,
    weight: Weight,
    bias: Tensor | None,
    *,
    grid: Grid,
    surrogate: Surrogate,
    recompute: bool | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """`F.linear(input, fake_quantize(weight, ...), bias)` as one operation.

    Without `recompute` the fake-quantized weight is saved for the product with the incoming gradient, as
    autocast saves its copy of a full-precision weight; with it, the backward's one pass over the
    weight writes it again.

    Args:
        input: Activations, `(..., in)`.
        weight: The weight, `(out, in)`.
        bias: `(out,)` or None.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        recompute: Trade a pass over the weight for its memory; None does where the kernels run: there
            it adds a fifth to the bytes of the backward.
        value: The fake-quantized weight, if it is known already; ignored where its type is not the one
            that this call computes in.

    Returns:
        `(..., out)`, in the autocast type where autocast is on.
    """
    autocast = _autocast_dtype(weight.x)
    spec = Spec(grid, surrogate, autocast or weight.x.dtype)
    if recompute is None:
        recompute = implementation(weight.x, surrogate) == "triton"
    if value is not None and value.dtype != spec.dtype:
        value = None
    if autocast is not None and input.dtype != autocast:
        input = input.to(autocast)
    tensors = (input, bias, value, *weight)
    if torch.compiler.is_compiling() and (text := to_text(grid, surrogate)) is not None:
        return _linear_in_graph(text, spec.dtype, recompute, *tensors)
    return _FakeQuantizeLinear.apply(spec, recompute, *tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a fake-quantized weight has here: autocast's where it is on, the weight's otherwise."""
    return _autocast_dtype(x) or x.dtype


def quantize_codes(x: Tensor, scale: Tensor, *, grid: Grid) -> Tensor:
    """The codes behind `fake_quantize`'s value, int8, shaped like `x`."""
    grouped, scale, zero, _ = reference.grouped(Weight(x, scale), grid)
    return reference.codes(grouped / scale, zero, grid).to(torch.int8).reshape(x.shape)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: float, dtype: torch.dtype) -> Tensor:
    """`s * (q - z)` in `dtype`: bit for bit the value of `fake_quantize` for a weight of that type."""
    working = reference.working_dtype(dtype)
    grouped = codes.reshape(*scale.shape, -1).to(working)
    return (grouped - zero_point).mul_(scale.to(working).unsqueeze(-1)).reshape(codes.shape).to(dtype)


# Dynamo takes a fifth of a second to trace an autograd.Function, so it gets a node a call, whose inside
# only the stages after it see. A node's arguments are tensors and plain values.


@torch.compiler.allow_in_graph
def _many_in_graph(text: str, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return _FakeQuantizeMany.apply(from_text(text, dtype), None, *tensors)


@torch.compiler.allow_in_graph
def _linear_in_graph(text: str, dtype: torch.dtype, recompute: bool, *tensors: Tensor | None) -> Tensor:
    return _FakeQuantizeLinear.apply(from_text(text, dtype), recompute, *tensors)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec = spec
        return value_of(Weight(*tensors), spec)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (by_weight, by_scale, by_param), _ = gradients_of(grad, Weight(*ctx.saved_tensors), ctx.spec)
        return None, by_weight, by_scale, None, None, by_param


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
        flat = [
            g for by_weight, by_scale, by_param in found for g in (by_weight, by_scale, None, None, by_param)
        ]
        return (None, None, *flat)


class _FakeQuantizeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        recompute: bool,
        input: Tensor,
        bias: Tensor | None,
        value: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        saved = value
        if value is None:
            value = value_of(Weight(*tensors), spec)  # type: ignore[arg-type]
            saved = None if recompute else value
        ctx.save_for_backward(input, saved, *tensors)
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is not None and bias.dtype != spec.dtype:
            bias = bias.to(spec.dtype)
        return _product(input, value, bias, folds=tensors[0].requires_grad)  # type: ignore[union-attr]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, value, *tensors = ctx.saved_tensors
        weight = Weight(*tensors)
        _, _, for_input, for_bias, _, for_weight, for_scale, _, _, for_param = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        by_input = by_bias = by_weight = by_scale = by_param = None
        if for_weight or for_scale or for_param:
            upstream = rows.t() @ input.reshape(-1, input.shape[-1])
            again = value is None and for_input
            (by_weight, by_scale, by_param), made = gradients_of(upstream, weight, ctx.spec, with_value=again)
            value = made if again else value
        if for_input:
            if value is None:
                value = value_of(weight, ctx.spec)
            by_input = (rows @ value).reshape(input.shape)
        if for_bias:
            by_bias = rows.sum(0).to(ctx.bias_dtype)
        return None, None, by_input, by_bias, None, by_weight, by_scale, None, None, by_param


def _product(input: Tensor, value: Tensor, bias: Tensor | None, *, folds: bool) -> Tensor:
    """`F.linear`, bit for bit that of a plain layer, but no view, which nothing may change in place here.

    Args:
        input: `(..., in)`.
        value: `(out, in)`.
        bias: `(out,)` or None.
        folds: What a weight that learns makes `F.linear` do: rows that do not lie one behind the other
            become one matrix. The values here do not tell.
    """
    if input.ndim == 2:
        return F.linear(input, value, bias)
    shape = (*input.shape[:-1], value.shape[0])
    if input.is_contiguous():
        if bias is None:
            return F.linear(input, value)
        return torch.ops.aten._unsafe_view(F.linear(input.reshape(-1, input.shape[-1]), value, bias), shape)
    if not folds:
        return F.linear(input, value, bias)
    output = input.reshape(-1, input.shape[-1]).mm(value.t())
    return torch.ops.aten._unsafe_view(output if bias is None else output.add_(bias), shape)


def _by_weight(tensors: Sequence[Any]) -> list[Weight]:
    return [Weight(*tensors[i : i + 5]) for i in range(0, len(tensors), 5)]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast wants products in, where it is on."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return None
    return torch.get_autocast_dtype(device)

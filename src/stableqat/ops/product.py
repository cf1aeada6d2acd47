"""The product of a quantized layer: `input @ value.T + bias`, where `value` is the fake-quantized weight.

Every product goes through `product`. Where autograd knows how the value was made (by a group, or by a
quantizer with its own forward), it calls `F.linear`. Otherwise one operation fake-quantizes and multiplies.
It saves the latent weight, which is in memory anyway. For the product with the incoming gradient, it either
saves the value, as autocast saves its copy of a weight, or recomputes it during the backward's one pass over
the weight, which then moves a fifth more bytes. If the input is quantized too, the operation saves it as it
came in, as a plain layer does, and quantizes it again in the backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.ops.dispatch import gradients_of, implementation, value_of
from stableqat.ops.fake_quantize import autocast_dtype
from stableqat.ops.grids import Grid
from stableqat.ops.inputs import Activation, InputOperands, input_gradients, input_value
from stableqat.ops.once_differentiable import once_differentiable
from stableqat.ops.operands import Operands, Spec, from_text, to_text
from stableqat.ops.surrogates import Surrogate


def product(
    input: Tensor,
    weight: Operands | Tensor,
    bias: Tensor | None,
    *,
    grid: Grid | None = None,
    surrogate: Surrogate | None = None,
    recompute: bool | None = None,
    value: Tensor | None = None,
    of_input: Activation | None = None,
) -> Tensor:
    """`F.linear` with a fake-quantized weight.

    Args:
        input: Activations, `(..., in)`.
        weight: The operands of a weight `(out, in)`, or its value if autograd knows how that was made.
        bias: `(out,)` or None.
        grid: For operands: where the levels are.
        surrogate: For operands: derivative of round, with its mask.
        recompute: Recompute the value in the backward instead of saving it; None recomputes where the kernels
            run.
        value: The value of the operands, if already known; ignored if its type is not the one in which this
            call computes.
        of_input: How to quantize the activations; None leaves them as they are.

    Returns:
        `(..., out)`, in the autocast type if autocast is on.
    """
    if isinstance(weight, Tensor) and of_input is None:
        return F.linear(input, weight, bias)
    x = weight if isinstance(weight, Tensor) else weight.x
    autocast = autocast_dtype(x)
    dtype, spec = autocast or x.dtype, None
    operands: tuple[Tensor | None, ...]
    if isinstance(weight, Tensor):
        operands, recompute = (weight.to(dtype), None, None, None), False
    else:
        operands = weight
        assert grid is not None
        assert surrogate is not None
        spec = Spec(grid, surrogate, dtype)
        if recompute is None:
            recompute = implementation(x, surrogate) == "triton"
    if autocast is not None and input.dtype != autocast:
        input = input.to(autocast)
    if value is not None and value.dtype != dtype:
        value = None
    of_input_spec = None if of_input is None else Spec(of_input.grid, of_input.surrogate, input.dtype)
    if value is not None and not torch.is_grad_enabled():
        if of_input is not None and of_input_spec is not None:
            input = input_value(input, of_input.operands, of_input_spec)
        return _multiply(input, value, bias, folds=x.requires_grad)
    tensors = (input, bias, value, *operands, *(() if of_input is None else of_input.operands))
    if torch.compiler.is_compiling():
        text = "" if spec is None else to_text(spec.grid, spec.surrogate)
        of_input_text = "" if of_input is None else of_input.text
        if text is not None and of_input_text is not None:
            return _in_graph(text, of_input_text, dtype, input.dtype, recompute, *tensors)
    return _Product.apply(spec, of_input_spec, recompute, *tensors)


@torch.compiler.allow_in_graph  # a node, as in `fake_quantize`
def _in_graph(
    text: str,
    of_input: str,
    dtype: torch.dtype,
    input_dtype: torch.dtype,
    recompute: bool,
    *tensors: Tensor | None,
) -> Tensor:
    spec = from_text(text, dtype) if text else None
    return _Product.apply(spec, from_text(of_input, input_dtype) if of_input else None, recompute, *tensors)


_WEIGHT = len(Operands._fields)


class _Product(torch.autograd.Function):
    """The product; without a spec, the first of the weight's tensors is its value."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec | None,
        of_input: Spec | None,
        recompute: bool,
        input: Tensor,
        bias: Tensor | None,
        value: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        saved = value
        if spec is None:
            value = tensors[0]
        elif value is None:
            value = value_of(Operands(*tensors[:_WEIGHT]), spec)  # type: ignore[arg-type]
            saved = None if recompute else value
        ctx.save_for_backward(input, saved, *tensors)
        ctx.spec, ctx.of_input = spec, of_input
        ctx.bias_dtype = None if bias is None else bias.dtype
        if of_input is not None:
            input = input_value(input, InputOperands(*tensors[_WEIGHT:]), of_input)
        assert value is not None
        return _multiply(input, value, bias, folds=tensors[0].requires_grad)  # type: ignore[union-attr]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, value, *tensors = ctx.saved_tensors
        weight, of_input = Operands(*tensors[:_WEIGHT]), InputOperands(*tensors[_WEIGHT:])
        for_input, for_bias, _, for_weight, for_scale, _, for_param, *rest = ctx.needs_input_grad[3:]
        rows = grad.reshape(-1, grad.shape[-1])
        by_input = by_bias = by_weight = by_scale = by_param = None
        by_of_input: tuple[Tensor | None, ...] = ()
        for_input = for_input or any(rest)
        trains_weight = for_weight or for_scale or for_param
        given: Tensor | None = input
        if ctx.of_input is not None and for_input:
            # first: the pass that pulls it back through the input's quantizer writes the input's value, too
            value = _value(value, weight, ctx.spec)
            by_value = (rows @ value).reshape(input.shape)
            found, given = input_gradients(by_value, input, of_input, ctx.of_input, with_value=trains_weight)
            by_input, scale, offset, param = found
            by_of_input = (scale, None, None, offset, param)
            del by_value
        elif ctx.of_input is not None:
            given = input_value(input, of_input, ctx.of_input)
        if trains_weight:
            assert given is not None
            upstream = rows.t() @ given.reshape(-1, input.shape[-1])
            del given
            if ctx.spec is None:
                by_weight = upstream
            else:
                again = value is None and for_input
                (by_weight, by_scale, by_param), made = gradients_of(
                    upstream, weight, ctx.spec, with_value=again
                )
                value = made if again else value
        if for_input and ctx.of_input is None:
            by_input = (rows @ _value(value, weight, ctx.spec)).reshape(input.shape)
        if for_bias:
            by_bias = rows.sum(0).to(ctx.bias_dtype)
        by_of_input = by_of_input or (None,) * len(rest)
        of_weight = (by_weight, by_scale, None, by_param)
        return None, None, None, by_input, by_bias, None, *of_weight, *by_of_input


def _value(value: Tensor | None, weight: Operands, spec: Spec | None) -> Tensor:
    """The value of a weight, if it is not known; without a spec, the weight is its value."""
    if value is not None:
        return value
    return weight.x if spec is None else value_of(weight, spec)


def _multiply(input: Tensor, value: Tensor, bias: Tensor | None, *, folds: bool) -> Tensor:
    """`F.linear`, bit for bit as in a plain layer, but never a view, which could not be changed in place.

    Args:
        input: `(..., in)`.
        value: `(out, in)`.
        bias: `(out,)` or None.
        folds: Whether the weight requires a gradient, which the value does not show: then `F.linear` folds
            rows that are not adjacent in memory into one matrix.
    """
    if bias is not None and bias.dtype != value.dtype:
        bias = bias.to(value.dtype)
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

"""The one place of forward and backward: round in the forward, a surrogate in the backward.

`fake_quantize` is what every quantizer calls, `fake_quantize_linear` the same with the product that
follows it. Both save only the tensors they were given and recompute codes and surrogate in the
backward, so that QAT's memory is full precision's. The mathematics runs in one of two
implementations with the same results: fused Triton kernels on a GPU (`fused`), plain torch
everywhere else (`reference`); `implementation` says which.
"""

import os
from ast import literal_eval
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stableqat.ops import reference
from stableqat.ops.grids import Grid, GridName, Mask, make_grid
from stableqat.ops.surrogates import Constant, Fourier, Identity, Surrogate, Tanh

try:
    from stableqat.ops import fused
except ImportError:  # torch without Triton, as on a Mac
    fused = None  # type: ignore[assignment]

_WANTED = os.environ.get("STABLEQAT_KERNELS", "1") != "0"


def implementation(x: Tensor, surrogate: Surrogate) -> Literal["triton", "torch"]:
    """Which implementation serves a weight.

    Args:
        x: The weight.
        surrogate: Its surrogate.

    Returns:
        `triton` for float32, bfloat16 and float16 on a GPU with the surrogates that the kernels know; `torch`
        otherwise, and everywhere if the environment says `STABLEQAT_KERNELS=0`.
    """
    able = _WANTED and fused is not None and x.is_cuda and x.dtype != torch.float64
    return "triton" if able and fused.supports(surrogate) else "torch"


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
        scale: Distance between levels, positive: `(out, 1)`, `(out, groups)` (each group is
            a run of consecutive inputs) or `(1, 1)` for the whole tensor.
        zero_point: Replaces the grid's own, shaped like `scale`; receives no gradient.
        scale_floor: Small positive floor, shaped like `scale`: the acting scale is never below it, while
            its gradient passes to `scale` on both sides, so that it can return. NaN stays NaN.
        grid: Where the levels are.
        surrogate: Derivative of round, with its mask.
        surrogate_param: The surrogate's learned parameter (of Tanh the logit of `a`), shaped like `scale`.

    Returns:
        Values on the grid, shaped like `x`, in the autocast type where autocast is on and in
        the type of `x` otherwise; the mathematics is float32 either way.
    """
    spec = _Spec(grid, surrogate, compute_dtype(x))
    return _FakeQuantize.apply(x, scale, scale_floor, zero_point, surrogate_param, spec)


def fake_quantize_many(
    weights: Sequence[Tensor], arguments: Sequence[dict[str, Any]], values: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`fake_quantize` of several weights as one operation, for fewer calls on either way.

    Args:
        weights: Latent weights.
        arguments: Further arguments of `fake_quantize`, for each weight.
        values: The results, where they are known already; only their gradient is then to be computed.

    Returns:
        What `fake_quantize` would, for each weight.
    """
    names = ("scale", "scale_floor", "zero_point", "surrogate_param")
    tensors = [t for w, each in zip(weights, arguments, strict=True) for t in (w, *map(each.get, names))]
    autocast = _autocast_dtype(weights[0])
    specs = [
        _Spec(each["grid"], each["surrogate"], autocast or weight.dtype)
        for weight, each in zip(weights, arguments, strict=True)
    ]
    known = [v if v is None or v.dtype == s.dtype else None for v, s in zip(values, specs, strict=True)]
    return _FakeQuantizeMany.apply(specs, known, *tensors)


def fake_quantize_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    scale_floor: Tensor | None = None,
    grid: Grid,
    surrogate: Surrogate,
    surrogate_param: Tensor | None = None,
    recompute: bool | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """`F.linear(input, fake_quantize(weight, ...), bias)` as one operation.

    Without `recompute` the fake-quantized weight is saved for the product with the incoming gradient, as
    autocast saves its copy of a full-precision weight; with it, the backward's one pass over the
    weight writes it again.

    Args:
        input: Activations, `(..., in)`.
        weight: Latent weight, `(out, in)`.
        bias: `(out,)` or None.
        scale: See `fake_quantize`, as for what follows.
        zero_point: See `fake_quantize`.
        scale_floor: See `fake_quantize`.
        grid: See `fake_quantize`.
        surrogate: See `fake_quantize`.
        surrogate_param: See `fake_quantize`.
        recompute: Trade a pass over the weight for its memory; None does where the kernels run: there
            it adds a fifth to the bytes of the backward.
        value: The fake-quantized weight, if it is known already; ignored where its type is not the one
            that this call computes in.

    Returns:
        `(..., out)`, in the autocast type where autocast is on.
    """
    autocast = _autocast_dtype(weight)
    spec = _Spec(grid, surrogate, autocast or weight.dtype)
    if recompute is None:
        recompute = implementation(weight, surrogate) == "triton"
    if value is not None and value.dtype != spec.dtype:
        value = None
    if autocast is not None and input.dtype != autocast:
        input = input.to(autocast)
    tensors = (input, weight, bias, scale, scale_floor, zero_point, surrogate_param, value)
    if torch.compiler.is_compiling() and type(surrogate) in _NUMBERS:
        numbers = [repr(getattr(surrogate, name)) for name in _NUMBERS[type(surrogate)]]
        kind = type(surrogate).__name__
        return _linear_in_graph(
            *tensors, grid.name, grid.bits, kind, surrogate.mask, numbers, spec.dtype, recompute
        )
    return _FakeQuantizeLinear.apply(*tensors, spec, recompute)


def quantize_codes(x: Tensor, scale: Tensor, *, grid: Grid) -> Tensor:
    """The codes behind `fake_quantize`'s value, int8, shaped like `x`."""
    grouped, scale, _ = _grouped(x, scale, None, None)
    return reference.codes(grouped / scale, grid.zero_point, grid).to(torch.int8).reshape(x.shape)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: float, dtype: torch.dtype) -> Tensor:
    """`s * (q - z)` in `dtype`: bit for bit the value of `fake_quantize` for a weight of that type."""
    grouped, scale, _ = _grouped(codes.to(reference.working_dtype(dtype)), scale, None, None)
    return (grouped - zero_point).mul_(scale).reshape(codes.shape).to(dtype)


class _Spec(NamedTuple):
    """What a call needs beside tensors; `dtype` is the value's."""

    grid: Grid
    surrogate: Surrogate
    dtype: torch.dtype


_NUMBERS: dict[type[Surrogate], tuple[str, ...]] = {
    Identity: (),
    Constant: ("value",),
    Fourier: ("amplitude", "harmonics"),
    Tanh: ("a",),
}


@torch.compiler.allow_in_graph
def _linear_in_graph(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    scale_floor: Tensor | None,
    zero_point: Tensor | None,
    param: Tensor | None,
    value: Tensor | None,
    grid: GridName,
    bits: int,
    kind: str,
    mask: Mask,
    numbers: list[str],
    dtype: torch.dtype,
    recompute: bool,
) -> Tensor:
    """One node of Dynamo's graph: it would take a fifth of a second to trace the function itself, a layer.

    Args of such a node are tensors and plain values, so the surrogate comes as its name and numbers; as text,
    because torch 2.11 makes symbols of floats.
    """
    cls = {known.__name__: known for known in _NUMBERS}[kind]
    surrogate = cls(mask, *map(literal_eval, numbers))
    spec = _Spec(make_grid(grid, bits), surrogate, dtype)
    return _FakeQuantizeLinear.apply(
        input, weight, bias, scale, scale_floor, zero_point, param, value, spec, recompute
    )


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        scale_floor: Tensor | None,
        zero_point: Tensor | None,
        param: Tensor | None,
        spec: _Spec,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, scale_floor, zero_point, param)
        ctx.spec = spec
        return _value(x, scale, scale_floor, zero_point, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, scale_floor, zero_point, param = ctx.saved_tensors
        weight_grad, scale_grad, param_grad, _ = _gradients(
            grad, x, scale, scale_floor, zero_point, param, ctx.spec
        )
        return weight_grad, scale_grad, None, None, param_grad, None


class _FakeQuantizeMany(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, specs: list[_Spec], values: list[Tensor | None], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that was not used gets no gradient
        ctx.specs = specs
        weights = _by_weight(tensors)
        if not any(value is not None for value in values) and (together := _together(weights, specs)):
            grid, _, dtype = specs[0]
            return tuple(fused.forward_many(weights, together, grid, dtype))
        return tuple(
            [
                _value(*weight[:4], spec) if value is None else value.detach()
                for weight, value, spec in zip(weights, values, specs, strict=True)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        specs, weights = ctx.specs, _by_weight(ctx.saved_tensors)
        given = [grad.contiguous() for grad in grads if grad is not None]
        usual = len(given) == len(grads) and not any([grad.data_ptr() & 15 for grad in given])
        if usual and (together := _together(weights, specs)):
            grid, surrogate, _ = specs[0]
            found: list[Any] = fused.backward_many(given, weights, together, grid, surrogate)
        else:
            found = [
                (None, None, None) if grad is None else _gradients(grad, *weight, spec)[:3]
                for grad, weight, spec in zip(grads, weights, specs, strict=True)
            ]
        flat = [g for weight, scale, param in found for g in (weight, scale, None, None, param)]
        return (None, None, *flat)


def _by_weight(tensors: Sequence[Any]) -> "list[fused.Weight]":
    return [fused.Weight(*tensors[i : i + 5]) for i in range(0, len(tensors), 5)]


def _together(weights: "list[fused.Weight]", specs: list[_Spec]) -> "fused.Together | None":
    alike = all(spec == specs[0] for spec in specs)
    if not alike or implementation(weights[0].x, specs[0].surrogate) != "triton":
        return None
    return fused.join(weights, specs[0].grid)


class _FakeQuantizeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        scale_floor: Tensor | None,
        zero_point: Tensor | None,
        param: Tensor | None,
        value: Tensor | None,
        spec: _Spec,
        recompute: bool,
    ) -> Tensor:
        saved = value
        if value is None:
            value = _value(weight, scale, scale_floor, zero_point, spec)
            saved = None if recompute else value
        ctx.save_for_backward(input, weight, scale, scale_floor, zero_point, param, saved)
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is not None and bias.dtype != spec.dtype:
            bias = bias.to(spec.dtype)
        return F.linear(input, value, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, scale, scale_floor, zero_point, param, value = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        input_grad = weight_grad = bias_grad = scale_grad = param_grad = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            upstream = rows.t() @ input.reshape(-1, input.shape[-1])
            emit = value is None and ctx.needs_input_grad[0]
            weight_grad, scale_grad, param_grad, emitted = _gradients(
                upstream, weight, scale, scale_floor, zero_point, param, ctx.spec, emit
            )
            value = emitted if emit else value
        if ctx.needs_input_grad[0]:
            if value is None:
                value = _value(weight, scale, scale_floor, zero_point, ctx.spec)
            input_grad = (rows @ value).reshape(input.shape)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0).to(ctx.bias_dtype)
        return input_grad, weight_grad, bias_grad, scale_grad, None, None, param_grad, None, None, None


def _value(
    x: Tensor, scale: Tensor, scale_floor: Tensor | None, zero_point: Tensor | None, spec: _Spec
) -> Tensor:
    """The fake-quantized value, in `spec.dtype`."""
    if implementation(x, spec.surrogate) == "triton":
        weight = fused.Weight(x.contiguous(), scale, scale_floor, zero_point)
        return fused.forward(weight, spec.grid, spec.dtype)
    grouped, grouped_scale, zero = _grouped(x, scale, scale_floor, zero_point)
    value = reference.forward(
        grouped, grouped_scale, spec.grid.zero_point if zero is None else zero, spec.grid
    )
    # no cast where none is needed: torch 2.11 compiles an idle `.to` at the end, as it does in-place
    # steps of a forward, into a function whose gradients are all zero
    value = value.reshape(x.shape)
    return value if value.dtype == spec.dtype else value.to(spec.dtype)


def _gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    scale_floor: Tensor | None,
    zero_point: Tensor | None,
    param: Tensor | None,
    spec: _Spec,
    emit: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `x`, `scale` and `param` in their types; the value too, if `emit`."""
    if implementation(x, spec.surrogate) == "triton":
        weight = fused.Weight(x.contiguous(), scale, scale_floor, zero_point, param)
        weight_grad, scale_grad, param_grad, value = fused.backward(
            grad.contiguous(), weight, spec.grid, spec.surrogate, spec.dtype if emit else None
        )
    else:
        grouped, grouped_scale, zero = _grouped(x, scale, scale_floor, zero_point)
        weight_grad, scale_grad, param_grad = reference.backward(
            grad.reshape(grouped.shape).to(grouped.dtype),
            grouped,
            grouped_scale,
            spec.grid.zero_point if zero is None else zero,
            spec.grid,
            spec.surrogate,
            None if param is None else param.to(grouped.dtype).unsqueeze(-1),
        )
        weight_grad = weight_grad.reshape(x.shape).to(x.dtype)
        scale_grad = scale_grad.squeeze(-1)
        param_grad = None if param_grad is None else param_grad.squeeze(-1)
        value = _value(x, scale, scale_floor, zero_point, spec) if emit else None
    if param is not None and param_grad is not None:
        param_grad = param_grad.to(param.dtype)
    return weight_grad, scale_grad.to(scale.dtype), param_grad, value


def _grouped(
    x: Tensor, scale: Tensor, scale_floor: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = reference.working_dtype(x.dtype)
    zero = None if zero_point is None else zero_point.to(dtype).unsqueeze(-1)
    acting = scale if scale_floor is None else torch.maximum(scale, scale_floor)
    return x.reshape(*scale.shape, -1).to(dtype), acting.to(dtype).unsqueeze(-1), zero


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that a fake-quantized weight has here: autocast's where it is on, the weight's otherwise."""
    return _autocast_dtype(weight) or weight.dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast wants products in, where it is on."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return None
    return torch.get_autocast_dtype(device)

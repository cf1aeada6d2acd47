"""Fake quantization of activations: a scale, and an offset, per tensor or a scale per token.

`v = (x - offset) / scale`, `q = clamp(round(v), lowest, lowest + 2^bits - 1)`, and the value is
`scale * q + offset`. With one scale per tensor this is LSQ (Esser et al. 2020, arXiv 1902.08153) and, with an
offset, LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576). Without a scale, each token has the one that its largest
magnitude asks for. The backward saves the activation alone and computes the rest again. On a GPU fused
kernels serve both (`input_kernels`), elsewhere plain torch.
"""

from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableqat.ops.fake_quantize import compute_dtype
from stableqat.ops.grids import Grid
from stableqat.ops.once_differentiable import once_differentiable
from stableqat.ops.operands import Spec, from_text, to_text
from stableqat.ops.reference import acting_scale, working_dtype
from stableqat.ops.surrogates import Surrogate

try:
    from stableqat.ops import input_kernels
except ImportError:  # torch without Triton, as on a Mac
    input_kernels = None  # type: ignore[assignment]


class InputOperands(NamedTuple):
    """The tensors of a fake-quantized activation, each of one element.

    Attributes:
        scale: Distance between levels; None gives each token its own.
        scale_floor: Lower bound of the scale in use.
        lowest: The lowest code; None is 0.
        offset: The value of code 0; None is 0.
        param: The surrogate's learned parameter, see `Operands`.
    """

    scale: Tensor | None = None
    scale_floor: Tensor | None = None
    lowest: Tensor | None = None
    offset: Tensor | None = None
    param: Tensor | None = None


class Activation(NamedTuple):
    """How an activation is fake-quantized.

    Attributes:
        operands: Its tensors.
        grid: The integer grid of its width.
        surrogate: Derivative of round, with its mask.
    """

    operands: InputOperands
    grid: Grid
    surrogate: Surrogate

    @property
    def text(self) -> str | None:
        """Grid and surrogate as text, see `to_text`."""
        return to_text(self.grid, self.surrogate)


InputGradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Gradients of an activation, and of its `scale`, `offset` and `param`."""


def quantize_input(x: Tensor, activation: Activation) -> Tensor:
    """Quantize and dequantize an activation, with a surrogate gradient.

    Args:
        x: `(..., features)`.
        activation: How.

    Returns:
        Values shaped like `x`, in the autocast type if autocast is on.
    """
    dtype = compute_dtype(x)
    x = x if x.dtype == dtype else x.to(dtype)
    if torch.compiler.is_compiling() and (text := activation.text) is not None:
        return _in_graph(text, x, *activation.operands)
    spec = Spec(activation.grid, activation.surrogate, x.dtype)
    return _QuantizeInput.apply(spec, x, *activation.operands)


def input_value(x: Tensor, operands: InputOperands, spec: Spec) -> Tensor:
    """The fake-quantized activation, in its own type."""
    if input_kernels is not None and input_kernels.serve_forward(x, operands, spec):
        return input_kernels.forward(x, operands, spec)
    v, scale, low, high = _units(x, operands, spec.grid)
    # nothing in place, see `reference.forward`
    value = v.round().clamp(low, high) * scale
    if operands.offset is not None:
        value = value + operands.offset.to(value.dtype)
    return value if value.dtype == x.dtype else value.to(x.dtype)


def input_gradients(
    grad: Tensor, x: Tensor, operands: InputOperands, spec: Spec, *, with_value: bool
) -> tuple[InputGradients, Tensor | None]:
    """Gradients of an activation and of what its quantizer learns, and its value again if `with_value`.

    Activation: `grad * g(u)` within the codes. Scale: `q - v` within, the outermost code beyond. Offset: 0
    within, 1 beyond (arXiv 2004.09576, eq. 5 and 6). As for weights, `g(u)` enters neither. What is learned
    has LSQ's factor `1 / sqrt(n * max(q_max, 1))`; `n` is the number of features, not of activations, so that
    it depends neither on the batch nor on how processes divide it. A token's own scale is a constant.

    Args:
        grad: Upstream gradient, shaped like `x`.
        x: `(..., features)`.
        operands: Its tensors.
        spec: Its constants.
        with_value: Whether to return the value.
    """
    if input_kernels is not None and input_kernels.serve_backward(x, operands, spec):
        return input_kernels.backward(grad, x, operands, spec, with_value=with_value)
    value = input_value(x, operands, spec) if with_value else None
    v, scale, low, high = _units(x, operands, spec.grid)
    grad = grad.to(v.dtype)
    nearest = v.round()
    u = v - nearest
    masked = spec.surrogate.mask != "none"
    clipped = v.clamp(low, high) if masked else v
    inside = v.sub(clipped).eq_(0)  # floats, see `reference.backward`
    reached = grad * inside
    param = None if operands.param is None else operands.param.to(v.dtype)
    factor, toward_param = spec.surrogate.derivatives(u, param)
    by_scale = by_offset = by_param = None
    if operands.scale is not None:
        factor_of_learned = _learned(x.shape[-1], high)
        toward = nearest.clamp_(low, high).sub_(clipped.mul_(inside) if masked else clipped)
        by_scale = (toward.mul_(grad).sum() * factor_of_learned).to(operands.scale.dtype)
        by_scale = by_scale.reshape(operands.scale.shape)
        if operands.offset is not None:
            by_offset = ((grad - reached).sum() * factor_of_learned).to(operands.offset.dtype)
            by_offset = by_offset.reshape(operands.offset.shape)
        if toward_param is not None and operands.param is not None:
            by_param = toward_param.mul_(reached).sum() * scale * factor_of_learned
            by_param = by_param.reshape(operands.param.shape).to(operands.param.dtype)
    by_x = reached if factor is None else factor.mul_(reached)
    return (by_x.to(x.dtype), by_scale, by_offset, by_param), value


def _units(x: Tensor, operands: InputOperands, grid: Grid) -> tuple[Tensor, Tensor, Any, Any]:
    """The activation in units of the scale, the scale, and the lowest and the highest code."""
    x = x.to(working_dtype(x.dtype))
    levels = grid.q_max - grid.q_min
    if operands.scale is None:
        # by a number, a GPU would multiply with its reciprocal
        scale = (x.abs().amax(-1, keepdim=True) / x.new_full((), grid.q_max)).clamp_min(
            torch.finfo(x.dtype).tiny
        )
        return x / scale, scale, grid.q_min, grid.q_max
    scale = operands.scale
    if operands.scale_floor is not None:
        scale = acting_scale(scale, operands.scale_floor)
    scale = scale.to(x.dtype)
    if operands.offset is not None:
        x = x - operands.offset.to(x.dtype)
    if operands.lowest is None:
        return x / scale, scale, 0, levels
    lowest = operands.lowest.to(x.dtype)
    return x / scale, scale, lowest, lowest + levels


def _learned(features: int, highest: Any) -> Any:
    if isinstance(highest, Tensor):
        return (features * highest.clamp_min(1)).rsqrt()
    return 1 / sqrt(features * max(highest, 1))


@torch.compiler.allow_in_graph  # a node, as in `fake_quantize`
def _in_graph(text: str, x: Tensor, *tensors: Tensor | None) -> Tensor:
    return _QuantizeInput.apply(from_text(text, x.dtype), x, *tensors)


class _QuantizeInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, x: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.spec = spec
        return input_value(x, InputOperands(*tensors), spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        found, _ = input_gradients(grad, x, InputOperands(*tensors), ctx.spec, with_value=False)
        by_x, by_scale, by_offset, by_param = found
        return None, by_x, by_scale, None, None, by_offset, by_param

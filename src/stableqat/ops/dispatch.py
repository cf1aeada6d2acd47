"""Which implementation serves a weight: fused Triton kernels on a GPU, plain torch everywhere else.

Both give the same values bit for bit and the same gradients up to rounding. `implementation` says which one
serves a weight.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stableqat.ops import reference
from stableqat.ops.operands import Operands, Spec
from stableqat.ops.surrogates import Surrogate

try:
    from stableqat.ops import custom_ops, fused, launch
except ImportError:  # torch without Triton, as on a Mac
    custom_ops = fused = launch = None  # type: ignore[assignment]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# the kernels use NVIDIA's instructions
_WANTED = fused is not None and torch.version.hip is None and os.environ.get("STABLEQAT_KERNELS", "1") != "0"

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of a weight's `x`, `scale` and `param`, each of the shape and type of its tensor."""


def implementation(x: Tensor, surrogate: Surrogate) -> Literal["triton", "torch"]:
    """Which implementation serves a weight.

    Args:
        x: The weight.
        surrogate: Its surrogate.

    Returns:
        `triton` for float32, bfloat16 and float16 on an NVIDIA GPU (Ampere or later) with a surrogate that
        declares its kernel; `torch` otherwise, and everywhere if the environment says `STABLEQAT_KERNELS=0`.
    """
    return "triton" if kernels_serve(x) and surrogate.kernel is not None else "torch"


def kernels_serve(x: Tensor) -> bool:
    """Whether this suite's kernels take a tensor, by its type and device.

    Args:
        x: The tensor.
    """
    if not (_WANTED and x.is_cuda and x.dtype in _TYPES) or isinstance(x, DTensor):
        return False
    # Dynamo cannot ask the device; a compiler for GPUs needs one of this kind itself
    return torch.compiler.is_compiling() or _able(x.device.index)


@cache
def _able(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def value_of(operands: Operands, spec: Spec) -> Tensor:
    """The fake-quantized value, in the type of the spec."""
    if implementation(operands.x, spec.surrogate) == "triton":
        return fused.forward(_contiguous(operands), spec.grid, spec.dtype)
    x, scale, _ = reference.grouped(operands)
    value = reference.forward(x, scale, spec.grid).reshape(operands.x.shape)
    # cast only where needed: torch 2.11 compiles a forward that ends in an idle `.to`, or has in-place steps,
    # into a function whose gradients are all zero
    return value if value.dtype == spec.dtype else value.to(spec.dtype)


def gradients_of(
    grad: Tensor, operands: Operands, spec: Spec, *, with_value: bool = False
) -> tuple[Gradients, Tensor | None]:
    """Gradients of a weight, and its value again if `with_value`."""
    found: Sequence[Tensor | None]
    value: Tensor | None = None
    if implementation(operands.x, spec.surrogate) == "triton":
        value_dtype = spec.dtype if with_value else None
        grad, operands = grad.contiguous(), _contiguous(operands)
        *found, value = fused.backward(grad, operands, spec.grid, spec.surrogate, value_dtype)
    else:
        x, scale, param = reference.grouped(operands)
        upstream = grad.reshape(x.shape).to(x.dtype)
        found = reference.backward(upstream, x, scale, spec.grid, spec.surrogate, param)
        if with_value:
            value = value_of(operands, spec)
    return _like(found, operands), value


def values_of(weights: Sequence[Operands], spec: Spec) -> Sequence[Tensor]:
    """The values of several weights, in one launch if the kernels can take them together."""
    if implementation(weights[0].x, spec.surrogate) == "triton":
        if custom_ops.takes(weights, spec):
            return custom_ops.values(weights, spec)
        if joined := fused.join(weights, spec.grid):
            return fused.split_values(fused.forward_flat(joined, spec.dtype), weights)
    return [value_of(operands, spec) for operands in weights]


def gradients_of_many(
    grads: Sequence[Tensor | None], weights: Sequence[Operands], spec: Spec
) -> Sequence[Gradients]:
    """Gradients of several weights, in one launch if possible; None where no gradient comes in."""
    given = [grad.contiguous() for grad in grads if grad is not None]
    if len(given) == len(grads) and implementation(weights[0].x, spec.surrogate) == "triton":
        if custom_ops.takes(weights, spec):
            found: Any = custom_ops.gradients(given, weights, spec)
            return [_like(each, operands) for each, operands in zip(found, weights, strict=True)]
        if launch.aligned(given) and (joined := fused.join(weights, spec.grid)):
            flat = fused.backward_flat(given, joined, spec.surrogate)
            return fused.split_gradients(flat, weights)
    return [
        (None, None, None) if grad is None else gradients_of(grad, operands, spec)[0]
        for grad, operands in zip(grads, weights, strict=True)
    ]


def _contiguous(operands: Operands) -> Operands:
    """Contiguous operands: kernels find a row by its number."""
    if all([tensor is None or tensor.is_contiguous() for tensor in operands]):
        return operands
    return Operands(*[None if t is None else t.contiguous() for t in operands])  # type: ignore[arg-type]


def _like(found: Sequence[Tensor | None], operands: Operands) -> Gradients:
    """Gradients in the shapes and types of the operands."""
    own = (operands.x, operands.scale, operands.param)
    made = [
        None if grad is None or of is None else grad.reshape(of.shape).to(of.dtype)
        for grad, of in zip(found, own, strict=True)
    ]
    return made[0], made[1], made[2]

"""Custom torch operations that serve several weights in one launch, opaque to a compiler.

On its own, a compiled graph launches one kernel per weight, and at small batches a step waits for the
launches of a hundred layers. There the weights of a block are one operation, which does at run time what the
eager path does. It returns flat buffers, which the graph splits at no cost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from stableqat.ops import fused
from stableqat.ops.launch import aligned, traced
from stableqat.ops.operands import Operands, Spec, from_text, to_text

_TAGS = (
    torch.Tag.cudagraph_unsafe,  # the first call loads a kernel
    torch.Tag.needs_contiguous_strides,
)
_library = torch.library.Library("stableqat", "FRAGMENT")
_library.define("values(Tensor[] tensors, str present, str spec, ScalarType dtype) -> Tensor", tags=_TAGS)
_library.define(
    "gradients(Tensor[] grads, Tensor[] tensors, str present, str spec, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def takes(weights: Sequence[Operands], spec: Spec) -> bool:
    """Whether these weights become one operation: several of one kind, while a graph is being made."""
    if len(weights) < 2 or not traced(weights[0].x) or to_text(spec.grid, spec.surrogate) is None:
        return False
    sizes = [size for weight in weights for tensor in weight if tensor is not None for size in tensor.shape]
    return all(type(size) is int for size in sizes) and len({_present(weight) for weight in weights}) == 1


def values(weights: Sequence[Operands], spec: Spec) -> Sequence[Tensor]:
    """The values of several weights."""
    text = to_text(spec.grid, spec.surrogate)
    flat = torch.ops.stableqat.values(_tensors(weights), _present(weights[0]), text, spec.dtype)
    return fused.split_values(flat, weights)


def gradients(
    grads: Sequence[Tensor], weights: Sequence[Operands], spec: Spec
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Gradients of several weights."""
    text = to_text(spec.grid, spec.surrogate)
    flat = torch.ops.stableqat.gradients(
        list(grads), _tensors(weights), _present(weights[0]), text, spec.dtype
    )
    return fused.split_gradients(flat, weights)


def _values(tensors: list[Tensor], present: str, spec: str, dtype: torch.dtype) -> Tensor:
    grid, weights = from_text(spec, dtype).grid, _weights(tensors, present)
    if joined := fused.join(weights, grid):
        return fused.forward_flat(joined, dtype)
    return _flatten_dense_tensors([fused.forward(operands, grid, dtype) for operands in weights])


def _gradients(
    grads: list[Tensor], tensors: list[Tensor], present: str, spec: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grid, surrogate, _ = from_text(spec, dtype)
    grads, weights = [grad.contiguous() for grad in grads], _weights(tensors, present)
    if aligned(grads) and (joined := fused.join(weights, grid)):
        return fused.backward_flat(grads, joined, surrogate)
    pairs = zip(grads, weights, strict=True)
    found = [fused.backward(grad, operands, grid, surrogate)[:3] for grad, operands in pairs]
    by_weight, by_scale, by_param = zip(*found, strict=True)
    params = _flatten_dense_tensors(by_param) if fused.learns(surrogate) else by_scale[0].new_empty(0)
    return _flatten_dense_tensors(by_weight), _flatten_dense_tensors(by_scale), params


def _values_shape(tensors: list[Tensor], present: str, spec: str, dtype: torch.dtype) -> Tensor:
    weights = _weights(tensors, present)
    return weights[0].x.new_empty(_total([weight.x for weight in weights]), dtype=dtype)


def _gradients_shape(
    grads: list[Tensor], tensors: list[Tensor], present: str, spec: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(tensors, present)
    sums = _total([weight.scale for weight in weights])
    by_weight = weights[0].x.new_empty(_total([weight.x for weight in weights]))
    learned = sums if fused.learns(from_text(spec, dtype).surrogate) else 0
    scales, params = (by_weight.new_empty(n, dtype=torch.float32) for n in (sums, learned))
    return by_weight, scales, params


_library.impl("values", _values, "CompositeExplicitAutograd")
_library.impl("gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("stableqat::values", _values_shape, lib=_library)
torch.library.register_fake("stableqat::gradients", _gradients_shape, lib=_library)


def _present(operands: Operands) -> str:
    """Which of a weight's tensors it has, one digit each."""
    return "".join("0" if tensor is None else "1" for tensor in operands)


def _tensors(weights: Sequence[Operands]) -> list[Tensor]:
    return [tensor.contiguous() for weight in weights for tensor in weight if tensor is not None]


def _weights(tensors: list[Tensor], present: str) -> list[Operands]:
    left, count = iter(tensors), len(tensors) // present.count("1")
    each: Any = [[next(left) if flag == "1" else None for flag in present] for _ in range(count)]
    return [Operands(*one) for one in each]


def _total(like: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in like)

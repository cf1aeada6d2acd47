"""Several weights in one launch as operations of torch's own kind, opaque to a compiler.

A compiled graph launches a kernel a weight by itself; at small batches the launches of a hundred layers
are what a step waits for, so the weights of a block are one operation there, which does at run time what
the eager path does. Its results are flat buffers, which the graph takes apart at no cost.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from stableqat.ops import launch as fused
from stableqat.ops.grids import Grid
from stableqat.ops.operands import Weight
from stableqat.ops.spec import Spec, from_text, to_text

_TAGS = (
    torch.Tag.cudagraph_unsafe,  # of the tables, one may have to be made first
    torch.Tag.needs_contiguous_strides,
)
_library = torch.library.Library("stableqat", "FRAGMENT")
_library.define(
    "values(Tensor[] tensors, str layout, str spec, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "gradients(Tensor[] grads, Tensor[] tensors, str layout, str spec, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def takes(weights: Sequence[Weight], spec: Spec) -> bool:
    """Whether these weights become one operation: they do in a graph that is being made, if alike."""
    if not fused.traced(weights[0].x) or to_text(spec.grid, spec.surrogate) is None:
        return False
    sizes = [size for weight in weights for tensor in weight if tensor is not None for size in tensor.shape]
    return all(type(size) is int for size in sizes) and len({_present(weight) for weight in weights}) == 1


def values(weights: Sequence[Weight], spec: Spec) -> list[Tensor]:
    """The values of several weights."""
    text = to_text(spec.grid, spec.surrogate)
    flat = torch.ops.stableqat.values(_tensors(weights), _layout(weights), text, spec.dtype)
    return _taken_apart(flat, [weight.x for weight in weights])


def gradients(
    grads: Sequence[Tensor], weights: Sequence[Weight], spec: Spec
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Gradients of several weights."""
    text = to_text(spec.grid, spec.surrogate)
    by_weight, by_scale, by_param = torch.ops.stableqat.gradients(
        list(grads), _tensors(weights), _layout(weights), text, spec.dtype
    )
    scales = [weight.scale for weight in weights]
    return list(
        zip(
            _taken_apart(by_weight, [weight.x for weight in weights]),
            _taken_apart(by_scale, scales),
            _taken_apart(by_param, scales) if _learns(spec) else [None] * len(weights),
            strict=True,
        )
    )


def _values(tensors: list[Tensor], layout: str, spec: str, dtype: torch.dtype) -> Tensor:
    grid = from_text(spec, dtype).grid
    if together := _joined(tensors, layout, grid):
        return fused.forward_flat(_first(tensors, layout), together, grid, dtype)
    return _flat([fused.forward(weight, grid, dtype) for weight in _weights(tensors, layout)])


def _gradients(
    grads: list[Tensor], tensors: list[Tensor], layout: str, spec: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grid, surrogate, _ = from_text(spec, dtype)
    grads = [grad.contiguous() for grad in grads]
    if fused.aligned(grads) and (together := _joined(tensors, layout, grid)):
        return fused.backward_flat(grads, _first(tensors, layout), together, grid, surrogate)
    pairs = zip(grads, _weights(tensors, layout), strict=True)
    found = [fused.backward(grad, weight, grid, surrogate)[:3] for grad, weight in pairs]
    by_weight, by_scale, by_param = zip(*found, strict=True)
    if not _learns(from_text(spec, dtype)):
        by_param = by_scale[0].new_empty(1, 0)
    return _flat(by_weight), _flat(by_scale), _flat(by_param)


def _joined(tensors: list[Tensor], layout: str, grid: Grid) -> fused.Together | None:
    """`fused.join`, but looking at addresses only: the layout is the graph's and stays as it is."""
    key = (layout, grid, *[tensor.data_ptr() for tensor in tensors])
    if key in _known:
        return _known[key]
    together = fused.join(_weights(tensors, layout), grid)
    if together is not None:
        if len(_known) >= fused.MOST_TOGETHER:
            _known.clear()
        _known[key] = together
    return together


_known: dict[Hashable, fused.Together] = {}


def _values_shape(tensors: list[Tensor], layout: str, spec: str, dtype: torch.dtype) -> Tensor:
    weights = _weights(tensors, layout)
    return weights[0].x.new_empty(_total([weight.x for weight in weights]), dtype=dtype)


def _gradients_shape(
    grads: list[Tensor], tensors: list[Tensor], layout: str, spec: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(tensors, layout)
    sums = _total([weight.scale for weight in weights])
    by_weight = weights[0].x.new_empty(_total([weight.x for weight in weights]))
    learned = sums if _learns(from_text(spec, dtype)) else 0
    scales, params = (by_weight.new_empty(n, dtype=torch.float32) for n in (sums, learned))
    return by_weight, scales, params


_library.impl("values", _values, "CompositeExplicitAutograd")
_library.impl("gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("stableqat::values", _values_shape, lib=_library)
torch.library.register_fake("stableqat::gradients", _gradients_shape, lib=_library)


def _learns(spec: Spec) -> bool:
    kernel = spec.surrogate.kernel
    return kernel is not None and kernel.learns


def _present(weight: Weight) -> str:
    """Which of a weight's tensors there are, a digit each."""
    return "".join("0" if tensor is None else "1" for tensor in weight)


def _layout(weights: Sequence[Weight]) -> str:
    """Which tensors a weight has, and all shapes."""
    shapes = " ".join(str([*weight.x.shape, *weight.scale.shape]) for weight in weights)
    return f"{_present(weights[0])} {shapes}"


def _tensors(weights: Sequence[Weight]) -> list[Tensor]:
    return [tensor.contiguous() for weight in weights for tensor in weight if tensor is not None]


def _weights(tensors: list[Tensor], layout: str) -> list[Weight]:
    each = layout[: len(Weight._fields)].count("1")
    return [_first(tensors[start : start + each], layout) for start in range(0, len(tensors), each)]


def _first(tensors: list[Tensor], layout: str) -> Weight:
    left = iter(tensors)
    parts: Any = (next(left) if flag == "1" else None for flag in layout[: len(Weight._fields)])
    return Weight(*parts)


def _total(like: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in like)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _taken_apart(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat buffer, shaped like the tensors, which lie in it one behind the other."""
    parts = flat.split_with_sizes([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

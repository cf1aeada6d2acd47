"""Gradient clipping that takes shards as the plain tensors they are.

As Lightning clips, to the bit; but on a few hundred DTensors either of its operations keeps the host busy for
10 ms per step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from stableqat.quantizers.base import local


def clip_gradients(
    gradients: Sequence[Tensor], limit: float, *, by_norm: bool, measure: bool = False
) -> Tensor | None:
    """Clip gradients in place.

    Args:
        gradients: Plain tensors, or the shards of this process; at least one.
        limit: Largest norm of all gradients together, or largest absolute value; 0 clips nothing.
        by_norm: Scale all gradients by one factor. False cuts off each value.
        measure: Compute the norm even where clipping does not need it.

    Returns:
        The norm of all gradients before clipping; None if it was not needed.
    """
    shards = [local(gradient) for gradient in gradients]
    by_norm = by_norm and bool(limit)
    norm = _total_norm(gradients) if measure or by_norm else None
    if by_norm:
        assert norm is not None
        torch._foreach_mul_(shards, torch.clamp(limit / (norm + 1e-6), max=1.0))
    elif limit:
        torch._foreach_clamp_min_(shards, -limit)
        torch._foreach_clamp_max_(shards, limit)
    return norm


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    if not isinstance(gradients[0], DTensor):
        return norm
    squares = DTensor.from_local(norm.square(), gradients[0].device_mesh, [Partial()])
    return squares.full_tensor().sqrt()

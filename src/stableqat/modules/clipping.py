"""Gradient clipping that works on shards as plain tensors.

It clips as Lightning does, whose operations on a few hundred DTensors keep the host busy for 10 ms each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.optim import Optimizer

from stableqat.quantizers.shard import local


@torch.no_grad()
def clip_gradients(
    optimizer: Optimizer, limit: float, *, by_norm: bool, measure: bool = False
) -> Tensor | None:
    """Clip the gradients of an optimizer's parameters in place.

    Args:
        optimizer: Its gradients may be plain tensors or shards.
        limit: Largest norm of all gradients together, or largest absolute value; 0 clips nothing.
        by_norm: Scale all gradients by one factor. False cuts off each value.
        measure: Compute the norm even where clipping does not need it.

    Returns:
        The norm of all gradients before clipping; None if nobody needs it, or there are no gradients.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:  # the divergence guard has dropped the step
        return None
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

"""A backward that cannot be differentiated, and raises an error instead."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_ERROR = b"this operation of stableqat is differentiable once: its gradient has none (once_differentiable)"


def once_differentiable(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make it an error to differentiate what a backward returns.

    Torch's own decorator does this only where the incoming gradient has a graph. A gradient also depends on
    what the forward saved: without this, a Hessian-vector product would silently lose that term.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody asked for a graph
            return outputs
        made = [None if x is None else x.detach().requires_grad_() for x in outputs]
        return torch._C._functions.DelayedError(_ERROR, len(made))(*made)  # type: ignore[arg-type]

    return wrapped

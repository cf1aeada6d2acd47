"""Values on their way from the device to the host, for which nobody waits until they are read."""

from collections.abc import Callable

import torch
from torch import Tensor


def on_its_way(value: Tensor) -> Callable[[], Tensor]:
    """Start copying a value to the host, behind the work that the device has to do before.

    Args:
        value: Not changed in place before it is read.

    Returns:
        A function that waits for the copy and returns it.
    """
    copy = value.to("cpu", non_blocking=True)
    if not value.is_cuda:
        return lambda: copy
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


class Deferred:
    """An action put off until the values that it reads have arrived; at most one at a time."""

    def __init__(self) -> None:
        self._action: Callable[[], None] | None = None

    def put_off(self, action: Callable[[], None]) -> None:
        """Leave an action to `catch_up`."""
        self._action = action

    def catch_up(self) -> None:
        """Do what was put off, if anything was."""
        action, self._action = self._action, None
        if action is not None:
            action()

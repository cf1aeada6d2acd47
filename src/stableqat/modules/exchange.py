"""Gradients averaged over processes while a backward computes them, in a way that a CUDA graph can hold.

DDP copies gradients into buckets and exchanges a bucket once it is full, decided by Python in each step. Here
each gradient is exchanged where it lies, as soon as it is there: always the same kernels in the same order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

_OWN = 2**20  # bytes from which a gradient is a product's, of which nobody else has a view


class GradientExchange:
    """Takes the exchange of gradients over from DDP, from `start` to `stop`.

    Args:
        model: The model as DDP wraps it.
        parameters: Those whose gradients are averaged.
    """

    def __init__(self, model: DistributedDataParallel, parameters: Iterable[nn.Parameter]) -> None:
        self.model, self.parameters = model, list(parameters)
        self._handles: list[Any] = []
        self._under_way: list[Any] | None = None

    def start(self) -> None:
        """Average gradients from the next backward on, and let DDP leave them alone."""
        self.model.require_backward_grad_sync = False
        self._handles = [parameter.register_hook(self._average) for parameter in self.parameters]

    def stop(self) -> None:
        """Give the exchange back to DDP."""
        self.model.require_backward_grad_sync = True
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Let a backward go on while gradients travel; they have arrived at the end."""
        self._under_way = []
        try:
            yield
            for work in self._under_way:
                work.wait()
        finally:
            self._under_way = None

    def agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        votes = torch.full((), float(yes), device=self.parameters[0].device)
        distributed.all_reduce(votes, distributed.ReduceOp.MIN)
        return bool(votes > 0)

    def _average(self, gradient: Tensor) -> Tensor:
        own = gradient.contiguous()
        if own is gradient and own.nbytes < _OWN:
            own = own.clone()
        work = distributed.all_reduce(own, distributed.ReduceOp.AVG, async_op=True)
        assert work is not None
        if self._under_way is None:
            work.wait()
        else:
            self._under_way.append(work)
        return own

"""Evaluation on several devices: each process takes every n-th window, image or request.

A process that torchrun starts finds its rank in the environment; in training it has the trainer's. Processes
that share a sharded model do not divide the work: they evaluate the same together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from stableqat.errors import UserError

# the others wait while the first process downloads tasks or encodes texts, longer than NCCL's 10 minutes
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Share:
    """A process's rank among the processes that divide the work."""

    rank: int = 0
    count: int = 1

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Tensor) -> None:
        """Set a tensor to the first process's, in place."""
        if self.count > 1:
            dist.broadcast(value, 0)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Collect a tensor from each process."""
        gathered = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go ahead and fill caches for the others."""
        if self.rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.rank:
                self.barrier()


@contextmanager
def processes(device: str | None) -> Iterator[tuple[Share, torch.device]]:
    """Join the processes that torchrun started, if it did, each on its own device.

    Args:
        device: Device, such as cpu or cuda:1; None takes a GPU if there is one.

    Yields:
        The process's share of the work, and its device.

    Raises:
        UserError: If there is no such device.
    """
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local)
    if count == 1:
        yield Share(), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Share(dist.get_rank(), count), chosen
    finally:
        dist.destroy_process_group()


def choose_device(asked: str | None, local: int = 0) -> torch.device:
    """Find a device that computes; a GPU becomes the current one.

    Args:
        asked: Device, such as cpu or cuda:1; None takes a GPU if there is one.
        local: This process's number on its machine, for a GPU without a number.

    Raises:
        UserError: If there is no such device.
    """
    gpus = torch.cuda.device_count()
    try:
        chosen = torch.device(asked or ("cuda" if gpus else "cpu"))
        if chosen.type != "cuda":
            torch.zeros(1, device=chosen).item()
    except (RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(f"device: {asked} computes nothing here; take cpu, cuda or cuda:1") from error
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= gpus:
            raise UserError(
                f"device: there is no {chosen}, PyTorch sees {gpus} GPUs here; take another or cpu"
            )
        torch.cuda.set_device(chosen)
    return chosen

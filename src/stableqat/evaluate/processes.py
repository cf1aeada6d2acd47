"""Evaluation on several devices: each process takes every n-th window, image or request.

Started by torchrun, a process finds its place in the environment; inside a training it is the trainer's. A
model that is sharded over the processes is no matter for it: they evaluate the same together.
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

# the others wait while the first process downloads tasks or encodes texts; NCCL's own 10 minutes end that
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Share:
    """A process's place among those that divide the work."""

    rank: int = 0
    count: int = 1

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        """The tensors of all processes."""
        gathered = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes ahead, to fill caches that the others find."""
        if self.rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.rank:
                self.barrier()


@contextmanager
def processes(device: str | None) -> Iterator[tuple[Share, torch.device]]:
    """Join the processes that torchrun started, if it did, each on a device of its own.

    Args:
        device: Device, such as cpu or cuda:1; None takes a GPU where there is one.

    Yields:
        The process's share of the work, and its device.

    Raises:
        UserError: If there is no such device.
    """
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Share(), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Share(dist.get_rank(), count), chosen
    finally:
        dist.destroy_process_group()


def _device(asked: str | None, local: int) -> torch.device:
    gpus = torch.cuda.device_count()
    try:
        chosen = torch.device(asked or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device: {asked} is none that PyTorch knows; take cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=chosen).item()
        except (RuntimeError, ImportError, NotImplementedError) as error:
            raise UserError(f"device: {asked} computes nothing here; take cpu, cuda or cuda:1") from error
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= gpus:
            raise UserError(
                f"device: there is no {chosen}, PyTorch sees {gpus} GPUs here; take another or cpu"
            )
    return chosen

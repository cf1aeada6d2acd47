"""Places for runs: shares of GPUs, or of the cores if there is no GPU."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stableqat.errors import check_range


class Slots:
    """Hands out places.

    Args:
        gpus: Names of the GPUs, as in CUDA_VISIBLE_DEVICES; empty for a CPU.
        workers: Runs at a time, spread evenly over the GPUs.

    Attributes:
        CPU: Stands for the place of a run without a GPU.

    Raises:
        UserError: If there is no place at all.
    """

    CPU = ""

    def __init__(self, gpus: Sequence[str], workers: int) -> None:
        check_range("workers", workers, 1)
        names = list(gpus) or [self.CPU]
        self.workers = workers
        self.sizes = {name: len(range(i, workers, len(names))) for i, name in enumerate(names)}
        self.free = dict(self.sizes)

    def take(self, gpus: int) -> list[str] | None:
        """A place for a run; None if none is free.

        Args:
            gpus: How many GPUs the run needs; it does not share them if it needs several.

        Returns:
            The names of its GPUs, each once for every share of it that the run takes.
        """
        by_room = sorted((name for name in self.free if self.free[name] > 0), key=lambda n: -self.free[n])
        if gpus > 1 and self.CPU not in self.free:
            whole = [name for name in by_room if self.free[name] == self.sizes[name]][:gpus]
            taken = [name for name in whole for _ in range(self.sizes[name])] if len(whole) == gpus else None
        else:
            taken = by_room[:1] or None
        for name in taken or ():
            self.free[name] -= 1
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """Free a place again."""
        for name in taken:
            self.free[name] += 1

    def resize(self, size: int) -> None:
        """Let each GPU have this many runs; those that run now stay.

        Args:
            size: Places of a GPU.
        """
        for name, before in self.sizes.items():
            self.sizes[name] = size
            self.free[name] += size - before


def memory_of(gpu: str) -> tuple[float, float] | None:
    """Used and total memory of a GPU in MiB; None if the driver does not tell.

    Args:
        gpu: Its name, as in CUDA_VISIBLE_DEVICES.
    """
    numbers = _query("memory.used,memory.total", "--id", gpu)
    try:
        used, total = map(float, numbers[0].split(","))
    except (IndexError, ValueError):
        return None
    return used, total


def mps_runs() -> bool:
    """Whether CUDA's Multi-Process Service runs here; processes that share a GPU use it by themselves."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def visible_gpus() -> list[str]:
    """The GPUs that runs may use, named as in CUDA_VISIBLE_DEVICES, found without starting CUDA or torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    return _query("index")


def _query(what: str, *options: str) -> list[str]:
    """Lines that the driver's tool prints of GPUs; none without a driver."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", *options]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.splitlines()

"""Places for runs: shares of GPUs, or of the cores if there is no GPU."""

import os
import subprocess
from collections.abc import Sequence

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
        by_room = sorted((name for name in self.free if self.free[name]), key=lambda name: -self.free[name])
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


def visible_gpus() -> list[str]:
    """The GPUs that runs may use, named as in CUDA_VISIBLE_DEVICES, found without starting CUDA or torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, no GPU
        return []
    return listed.split()

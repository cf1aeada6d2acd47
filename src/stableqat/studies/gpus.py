"""Places for runs: shares of GPUs, or of the cores where there is none."""

import os
import subprocess
from collections.abc import Sequence

from stableqat.errors import UserError


class Slots:
    """Hands out places.

    Args:
        gpus: Names of the GPUs, as CUDA_VISIBLE_DEVICES has them; none of them for a CPU.
        workers: Runs at a time, spread evenly over the GPUs.

    Attributes:
        CPU: Stands for the place of a run without a GPU.

    Raises:
        UserError: If there is no place at all.
    """

    CPU = ""

    def __init__(self, gpus: Sequence[str], workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers: {workers} must be 1 or more")
        names = list(gpus) or [self.CPU]
        self.workers = workers
        self.sizes = {name: len(range(i, workers, len(names))) for i, name in enumerate(names)}
        self.free = dict(self.sizes)

    def take(self, gpus: int) -> list[str] | None:
        """A place for a run, None where none is free.

        Args:
            gpus: How many GPUs the run needs; several it gets for itself alone.

        Returns:
            The names of its GPUs, each as often as it takes a share of it.
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
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES has them; asked without starting CUDA, or torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, no GPU
        return []
    return listed.split()

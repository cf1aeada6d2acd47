"""How many runs share a GPU: one more for as long as they train more together, tried with a sweep's own runs.

A small model leaves a GPU idle between its kernels, which other runs can fill; a large one does not. The
first runs begin alone. Once they have logged their speed, each GPU gets one more, until together they are not
faster by a twentieth, or the next would not fit into memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from stableqat.events import read_run
from stableqat.studies.gpus import Slots, memory_of, mps_runs
from stableqat.studies.job import Job

GAIN = 1.05  # what one more run must bring
MOST = 8
_ROOM = 0.95  # of a GPU's memory
_ENTRIES = 2  # of a run's log after a change; the time of the first may lie before it

Speeds = dict[str, list[float]]
"""Entries of a run's log by unit, such as tokens_per_s."""


def logged_speeds(folder: Path) -> Speeds:
    """What a run has logged of its speed.

    Args:
        folder: The run's folder.
    """
    scalars = read_run(folder, ("perf/tokens_per_s", "perf/images_per_s")).scalars
    return {tag.removeprefix("perf/"): list(series.values()) for tag, series in scalars.items()}


class Sharing:
    """Lets runs share GPUs for as long as that is faster.

    Args:
        slots: Places, one on each GPU.
        say: Prints a line.
        speeds_of: Reads what a run has logged of its speed.
        memory: Used and total memory of a GPU in MiB; None if unknown.
    """

    def __init__(
        self,
        slots: Slots,
        say: Callable[[str], None],
        *,
        speeds_of: Callable[[Path], Speeds] = logged_speeds,
        memory: Callable[[str], tuple[float, float] | None] = memory_of,
    ) -> None:
        self.slots, self.say, self.speeds_of, self.memory = slots, say, speeds_of, memory
        self.runs = 1
        self.settled = False
        self._together: float | None = None  # with one run less
        self._entries: dict[Path, int] = {}  # before the last change

    def look(self, running: Sequence[Job]) -> None:
        """See whether runs are faster together, once they have logged enough.

        Args:
            running: The jobs that run now.
        """
        if self.settled:
            return
        for gpu in self.slots.sizes:
            sharing = [job for job in running if job.place == [gpu] and job.point.verb == "fit"]
            if len(sharing) == self.runs and (speed := self._speed(sharing)):
                self._decide(gpu, *speed)
                self._entries = {
                    job.point.folder: _count(self.speeds_of(job.point.folder)) for job in running
                }
                return

    def _speed(self, jobs: Sequence[Job]) -> tuple[float, str] | None:
        """What runs do together, and the unit; None if one has not logged enough, or their units differ."""
        total, units = 0.0, set()
        for job in jobs:
            speeds = self.speeds_of(job.point.folder)
            if len(speeds) != 1:
                return None
            [(unit, entries)] = speeds.items()
            if len(entries) < self._entries.get(job.point.folder, 0) + _ENTRIES:
                return None
            units.add(unit)
            total += entries[-1]
        return (total, units.pop()) if len(units) == 1 else None

    def _decide(self, gpu: str, together: float, unit: str) -> None:
        rate = f"{together:,.0f} {unit.replace('_per_', '/')}"
        if self._together is not None and together < GAIN * self._together:
            self._settle(
                self.runs - 1, f"{self.runs} do {rate} together, {self._together:,.0f} with one less"
            )
        elif self.runs == MOST:
            self._settle(self.runs, f"{rate}, the most that is tried")
        elif not self._fits(gpu):
            self._settle(self.runs, f"{rate}, no room for another")
        else:
            self._together = together
            self._resize(self.runs + 1)

    def _fits(self, gpu: str) -> bool:
        memory = self.memory(gpu)
        return memory is not None and memory[0] / self.runs * (self.runs + 1) < _ROOM * memory[1]

    def _resize(self, runs: int) -> None:
        self.slots.resize(runs)
        self.runs = runs

    def _settle(self, runs: int, why: str) -> None:
        self.settled = True
        self._resize(runs)
        at_once = ", at once by CUDA MPS" if runs > 1 and mps_runs() else ""
        self.say(f"runs per GPU: {runs}{at_once} ({why})")


def _count(speeds: Speeds) -> int:
    return max(map(len, speeds.values()), default=0)

"""A queue of points that knows which waits for which, and the processes that work on it.

A point that begins from its study's start run waits for it; points of other studies do not. Of those that can
start, start runs come first, because others wait for them, and then those that take longest by the durations
seen so far, so that no long run is left over at the end.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait

from stableqat.errors import UserError
from stableqat.studies.gpus import Slots
from stableqat.studies.job import Job, Main, start_server
from stableqat.studies.record import ENDED, FINAL
from stableqat.studies.sharing import Sharing

LOOK = 5.0  # seconds between looks at how fast runs are
PATIENCE = 60.0  # seconds that runs have to write their checkpoints when the sweep is stopped


class Pool:
    """Runs jobs where slots have room, `threads` threads each; `sharing` may make room for more."""

    def __init__(
        self,
        jobs: list[Job],
        *,
        slots: Slots,
        threads: int,
        main: Main,
        preload: Sequence[str],
        sharing: Sharing | None = None,
    ):
        self.jobs = jobs
        self.sharing = sharing
        self.slots = slots
        self.threads = threads
        self.main = main
        self.preload = preload
        self.start_jobs = {job.point.folder: job for job in jobs if job.point.start is None}
        self.signals: list[int] = []
        self.stop_at = float("inf")

    def run(self, tell: Callable[[Job], None]) -> int | None:
        """Work until nothing is left, and return the signal that stopped it early, if any.

        Args:
            tell: Called with each job that ends, here or in another sweep, or cannot start.
        """
        waiting = [job for job in self.jobs if job.record.status not in FINAL]
        running: list[Job] = []
        asked: list[Job] = []
        looked = time.monotonic()
        with self._signals_noted():
            try:
                while waiting or running:
                    while not self.signals and (job := self._next(waiting)):
                        waiting.remove(job)
                        if job.record.status in ENDED:
                            tell(job)
                            continue
                        try:
                            job.start(self.main, self.threads)
                        except OSError as error:
                            self.slots.give_back(job.place)
                            job.give_up(error)
                            tell(job)
                        else:
                            running.append(job)
                    elsewhere = [job for job in waiting if job.record.status == "elsewhere"]
                    if not running and (self.signals or not elsewhere):
                        break
                    if self.signals:
                        kill = len(self.signals) > 1 or time.monotonic() > self.stop_at
                        for job in running if kill else [j for j in running if j not in asked]:
                            job.signal(signal.SIGKILL if kill else signal.SIGTERM)
                            asked.append(job)
                    if self.sharing is not None and time.monotonic() > looked + LOOK:
                        self.sharing.look(running)
                        looked = time.monotonic()
                    if running:
                        wait([job.process.sentinel for job in running if job.process], timeout=1)
                    else:
                        time.sleep(1)
                    for job in [j for j in running if j.process and j.process.exitcode is not None]:
                        running.remove(job)
                        self.slots.give_back(job.place)
                        try:
                            job.finish(stopped=job in asked)
                        except (OSError, UserError) as error:
                            job.give_up(error)
                        tell(job)
            finally:
                for job in running:
                    job.signal(signal.SIGKILL)
        if self.signals:
            return self.signals[0]
        for job in waiting:
            assert job.point.start is not None
            job.record.status = "failed"
            job.record.error = f"not started: {job.point.start.folder} {self._start_of(job).record.status}"
            tell(job)
        return None

    def _next(self, waiting: list[Job]) -> Job | None:
        """A job that has its claim and its place, or that ended in another sweep; None if there is none."""
        ready = [j for j in waiting if j.point.start is None or self._start_of(j).record.status == "done"]
        needed = {job.point.start.folder for job in waiting if job.point.start}
        kinds = {kind: expected_seconds(job, self.jobs) for kind, job in {j.kind: j for j in ready}.items()}
        ready.sort(key=lambda job: (job.point.folder in needed, kinds[job.kind]), reverse=True)
        for job in ready:
            place = self.slots.take(job.gpus)
            if place is None:
                return None
            try:
                if job.take() and job.record.status not in ENDED:
                    job.place = place
                    return job
            except (OSError, UserError) as error:
                if isinstance(error, UserError) and not any(other.process for other in self.jobs):
                    raise  # once, because no run ends because of it
                job.give_up(error)
            self.slots.give_back(place)
            if job.record.status in ENDED:
                return job
        return None

    def _start_of(self, job: Job) -> Job:
        assert job.point.start is not None
        return self.start_jobs[job.point.start.folder]

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(number: int, _: object) -> None:
            self.signals.append(number)
            self.stop_at = min(self.stop_at, time.monotonic() + PATIENCE)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        start_server(self.preload)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def expected_seconds(job: Job, jobs: list[Job]) -> float:
    """Mean duration of the study's finished points of the same kind; infinite if there are none."""
    seconds = [j.record.seconds for j in jobs if j.record.status == "done" and j.kind == job.kind]
    return sum(seconds) / len(seconds) if seconds else float("inf")

"""What a sweep shows while it works: a live table on a terminal, a line per point anywhere."""

import math
import shlex
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from stableqat.studies.job import Job
from stableqat.studies.pool import expected_seconds
from stableqat.studies.record import FINAL
from stableqat.terminal import clock

STATES = ("done", "diverged", "failed", "running", "elsewhere", "waiting")


class Board:
    """Shows the jobs of a sweep."""

    def __init__(self, jobs: list[Job], workers: int):
        self.jobs = jobs
        self.workers = workers
        self.console = Console()
        self.began = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Print what there is to do and, on a terminal, keep the table on the screen."""
        to_do = [job for job in self.jobs if job.record.status not in FINAL]
        resumed = sum(job.resume for job in to_do)
        parts = [f"{len(self.jobs) - len(to_do)} done before"]
        parts += [f"{resumed} resume from a checkpoint"] if resumed else []
        parts += [f"{len(to_do) - resumed} begin"]
        self.say(f"{len(self.jobs)} points: {', '.join(parts)}; {self.workers} at a time")
        for logs in {job.replaced.parent for job in to_do if job.begins_anew}:
            self.say(f"remains of earlier attempts are moved to {logs}")
        for folder in dict.fromkeys(job.point.folder.parent for job in self.jobs):
            self.say(f"follow: tensorboard --logdir {shlex.quote(str(folder))}")
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, get_renderable=self.table, transient=True):
            yield

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, job: Job) -> None:
        """Print how a job ended."""
        ended = sum(j.record.status not in ("waiting", "running", "elsewhere") for j in self.jobs)
        text = f"[{ended}/{len(self.jobs)}] {job.point.study}/{job.point.name}: {job.record.status}"
        if job.record.status == "failed":
            text += f": {job.record.error}"
        self.say(f"{text} ({clock(job.record.seconds)})")

    def summary(self, stopped_by: int | None) -> None:
        """Print the outcome of all jobs, and the logs of those that failed."""
        failed = [job for job in self.jobs if job.record.status == "failed"]
        for job in failed:
            self.say(f"failed: {job.point.folder / 'log.txt'}: {job.record.error}")
        counts = Counter(job.record.status for job in self.jobs)
        text = ", ".join(f"{counts[state]} {state}" for state in counts)
        self.say(f"{text} in {clock(time.monotonic() - self.began)}")
        if failed:
            self.say("the same command retries failed points")
        if stopped_by:
            self.say(f"stopped by {signal.Signals(stopped_by).name}: the same command resumes from here")

    def table(self) -> Table:
        """The live table: a row per study, and the time."""
        table = Table.grid(padding=(0, 2))
        for study in dict.fromkeys(job.point.study for job in self.jobs):
            jobs = [job for job in self.jobs if job.point.study == study]
            counts = Counter(job.record.status for job in jobs)
            bar = ProgressBar(total=len(jobs), completed=sum(counts[state] for state in STATES[:3]), width=24)
            table.add_row(study, bar, "  ".join(f"{counts[s]} {s}" for s in STATES if counts[s]))
        left = self.seconds_left()
        elapsed = f"{clock(time.monotonic() - self.began)} elapsed"
        table.add_row("", elapsed, f"about {clock(left)} left" if math.isfinite(left) else "")
        return table

    def seconds_left(self) -> float:
        """An estimate from the durations seen so far; infinite if there are none."""
        seen = [job.record.seconds for job in self.jobs if job.record.status in FINAL]
        if not seen:
            return math.inf
        left = 0.0
        for job in self.jobs:
            if job.record.status in ("waiting", "running", "elsewhere"):
                spent = time.monotonic() - job.began if job.record.status == "running" else 0.0
                expected = expected_seconds(job, self.jobs)
                left += max(0.0, (expected if math.isfinite(expected) else sum(seen) / len(seen)) - spent)
        return left / self.workers

"""The terminal, as the verbs write to it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


WAIT = 2.0  # seconds until a bar appears


def quiet_libraries(*, progress: bool = False) -> None:
    """Silence tokenizers and datasets, whose errors our own messages replace; call it before their import.

    Args:
        progress: Leave the bars of datasets, and of models that are downloaded or loaded.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    if not progress:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows it as well


def plain(text: str) -> str:
    """A text of unknown origin on one line; what would steer a terminal is written as an escape."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def clock(seconds: float) -> str:
    """A time as minutes and seconds, 3:07, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """A number of bytes, in powers of ten: 12 kB, 0.3 MB, 1.6 GB."""
    if count < 1e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def terminal(*, stderr: bool = False) -> "Console":
    """A console that prints lines as they are: unwrapped, without markup.

    Args:
        stderr: Prints to stderr, for progress; results go to stdout.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(total: float | None, done: int = 0) -> Iterator[Callable[[float, str], None]]:
    """Show a bar on a terminal, on stderr, if the work takes longer than a moment.

    Args:
        total: The number at which the bar is full; None if unknown.
        done: The number at which it starts.

    Yields:
        A function that moves the bar to a number and sets its text.
    """
    if not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes the first
        yield lambda now, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = TextColumn("{task.description}", markup=False)
    columns = (texts, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("", total=total, completed=done)
    timer = Timer(WAIT, bar.start)
    timer.start()
    try:
        yield lambda now, text: bar.update(task, completed=now, description=text)
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()

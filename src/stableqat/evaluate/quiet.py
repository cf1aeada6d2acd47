"""Silence for libraries that report progress, unless somebody watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is written to stderr, where that is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield

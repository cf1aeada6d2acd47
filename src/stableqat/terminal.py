"""The terminal, as the verbs write to it."""

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def plain(text: str) -> str:
    """Return a text as one line that steers no terminal: a file's name or content can hold anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def terminal(*, stderr: bool = False) -> "Console":
    """A console that prints lines as they are: unwrapped, brackets and numbers included.

    Args:
        stderr: For progress; results go to stdout.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """A name of unknown origin, as a run's folder or event file has it, on one line and without commands.

    Control characters (the escapes of terminals among them) and those that turn the direction of what follows
    are written as escapes.
    """
    return "".join(
        each if unicodedata.category(each) not in ("Cc", "Cf", "Zl", "Zp", "Cs") else ascii(each)[1:-1]
        for each in text
    )

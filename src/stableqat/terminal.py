"""The terminal, as the verbs write to it."""

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

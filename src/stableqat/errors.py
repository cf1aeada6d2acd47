"""`UserError`, which says what is wrong with the user's input and what to do, and words that messages share.

The command line prints it as one line on stderr and exits with 2; any other exception is a fault of the
program and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf

LISTED = 12  # names that fit into a message
LARGEST = float.fromhex("0x1.fffffep127")  # of float32


class UserError(ValueError):
    """A mistake in a user's configuration, file or argument.

    The message is one line: what is wrong (with the key, file or layer) and what to do.
    """


def check_range(
    key: str, value: float | None, least: float, most: float = inf, *, below: float = inf, null: bool = False
) -> None:
    """Refuse a number outside of a range; NaN is outside of every range.

    Args:
        key: The setting, as the user writes it.
        value: The number.
        least: The smallest value.
        most: The largest value.
        below: The value must be smaller, unless this is infinite.
        null: Whether None is allowed too.

    Raises:
        UserError: Naming the key, the range and the number.
    """
    if value is None and null:
        return
    if value is not None and least <= value <= most and (value < below or below == inf):
        return
    end = f" and below {below}" if below < inf else f" and at most {most:g}" if most < inf else ""
    raise UserError(f"{key}: must be at least {least}{end}{' or null' if null else ''}, not {value}")


def check_known(key: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of the known ones.

    Args:
        key: The setting, as the user writes it.
        value: Its value.
        known: The values that exist.

    Raises:
        UserError: Naming the key, the value and the known ones.
    """
    names = list(known)
    if value not in names:
        raise UserError(f"{key}: {value!r} is unknown; choose one of {', '.join(names)}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 layer, 2,000 layers."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The remedy for an unknown name, whatever the case of its letters.

    Args:
        name: What the user wrote.
        known: The names that exist.
        otherwise: What to say if none of them is similar; None lists them all.

    Returns:
        The end of a message, without the semicolon before it.
    """
    names = list(known)
    if near := nearest(name, names):
        return f"did you mean {near}?"
    return otherwise or f"choose one of {', '.join(names)}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to a name, whatever the case of its letters; None if none is similar.

    Args:
        name: What the user wrote.
        known: The names that exist.
        cutoff: How similar they must be, from 0 to 1.
    """
    spelt = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), spelt, 1, cutoff)
    return spelt[near[0]] if near else None


def first_line(error: BaseException) -> str:
    """The first line of the message of a library's exception."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def one_line(error: BaseException) -> str:
    """The message of a library's exception as one line, cut at 200 characters."""
    return " ".join(str(error).split())[:200]

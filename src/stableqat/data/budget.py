"""A number of tokens, as a user writes it: 300000, 20_000_000, 20M, 1.5B."""

import re

from stableqat.errors import UserError

_SCALE = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmbg]?)")


def token_count(tokens: int | str, key: str = "tokens") -> int:
    """Return the number that `tokens` says.

    Args:
        tokens: a whole number, or how a user writes one; K, M and B (or G) are powers of 1000.
        key: what the setting is called, for the message.

    Raises:
        UserError: it says no number, or none of at least 1.
    """
    match = _WRITTEN.fullmatch(str(tokens).strip().replace("_", "").lower())
    number = round(float(match[1]) * _SCALE[match[2]]) if match else 0
    if number < 1:
        raise UserError(f"{key}: must be a number such as 300000, 20M or 1.5B, not {tokens}")
    return number

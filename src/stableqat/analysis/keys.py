"""Keys of the YAML files that people write for studies, and what a wrong one may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stableqat.errors import UserError


def check_keys(path: str | Path, where: str, tree: dict[str, Any], known: Iterable[str]) -> None:
    """Refuses a key of a block that is not known, with the nearest that is."""
    for key in tree:
        if key not in (names := tuple(known)):
            raise unknown(path, f"{where}.{key}" if where else key, key, names)


def unknown(path: str | Path, where: str, key: str, known: Iterable[str], also: str = "") -> UserError:
    """What to say of a key that is not known."""
    names = list(known)
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}{also}"
    return UserError(f"{path}: unknown key {where}: {hint}")

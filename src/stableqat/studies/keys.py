"""Keys of the YAML files that people write for studies, and what a wrong one may have meant."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.trust import walk


def check_keys(path: str | Path, where: str, tree: dict[str, Any], known: Iterable[str]) -> None:
    """Refuses a key of a block that is not known, with the nearest that is."""
    for key in tree:
        if key not in (names := tuple(known)):
            raise unknown(path, f"{where}.{key}" if where else key, key, names)


def check_interpolations(path: str | Path, tree: Any) -> None:
    """Refuses resolvers, such as `${oc.env:NAME}`: a study reads nothing but itself."""
    for key, value in walk(tree, str(path)):
        while isinstance(value, str) and "${" in value:
            if resolver := re.search(r"\$\{[^{}]*:", value):
                raise UserError(
                    f"{path}: {key.strip('.')}: {resolver[0]}...}} would read more than this file: the "
                    "environment; write the value itself, or ${KEY} of another one here"
                )
            simpler = re.sub(r"\$\{[^{}]*\}", "_", value)  # from the inside out: a name may be made of others
            value = simpler if simpler != value else None


def unknown(path: str | Path, where: str, key: str, known: Iterable[str], also: str = "") -> UserError:
    """What to say of a key that is not known."""
    names = list(known)
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}{also}"
    return UserError(f"{path}: unknown key {where}: {hint}")

"""Names of arms: in what the hyper-parameters of one arm depart from those of most others.

In a study that varies one factor at a time nearly every arm shares nearly every setting, so a name that
listed them would hide the one that matters: "StableQAT amplitude 0.1", "STE optimizer SGD". Where
no value is the most common, as in a factorial study, all arms name theirs, and bits are always named.
"""

from collections import Counter
from typing import Any

from stableqat.studies.study import short

COLUMNS = ("method", "bits", "grid", "mask")
NAMED = "named"  # the name in the study, where hyper-parameters don't tell arms apart
UNSET = "unset"  # a run of an earlier version, or an argument that only some arms log


def differing(arms: list[dict[str, Any]]) -> list[str]:
    """Keys of which the arms that have them have several values."""
    keys = dict.fromkeys(key for arm in arms for key in arm)
    return [key for key in keys if len({str(arm[key]) for arm in arms if key in arm}) > 1]


def most_common(arms: list[dict[str, Any]]) -> dict[str, str]:
    """The value of each key, as text, that most arms have, of the methods that know it."""
    usual = {}
    for key in {key for arm in arms for key in arm} - {"method", NAMED}:
        methods = {arm.get("method") for arm in arms if key in arm}
        counts = Counter(_text(arm, key) for arm in arms if arm.get("method") in methods)
        (value, count), *others = counts.most_common(2)
        if not others or (count > others[0][1] and key != "bits"):
            usual[key] = value
    return usual


def departures(arm: dict[str, Any], like: list[dict[str, Any]], usual: dict[str, str]) -> list[str]:
    """What the name of an arm says after its method.

    Args:
        arm: Hyper-parameters of the arm.
        like: Those of the arms of the same method, this one among them.
        usual: What need not be said.
    """
    keys = {key for other in like for key in other} - {"method"}
    usual = usual | {NAMED: UNSET}
    texts = []
    for key in sorted(keys, key=lambda k: (COLUMNS.index(k) if k in COLUMNS else len(COLUMNS), k)):
        value = _text(arm, key)
        if value != usual.get(key):
            texts.append({"bits": f"{value}-bit", "grid": value}.get(key, f"{key} {value}"))
    return texts


def _text(arm: dict[str, Any], key: str) -> str:
    return short(arm[key]) if key in arm else UNSET

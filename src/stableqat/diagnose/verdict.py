"""What measurements say in plain words: per layer and width, which rounding is enough, or that it needs QAT.

The rises of the loss here are those beyond the slope, `f(w + d) - f(w) - <g, d>`, beside `<d, F d> / 2`. The
slope along a rounding error is as often below 0 as above, and depends on the rows that are drawn; where the
rise is small, it would be most of what is measured. The score of a setting is the larger of both: a few rows
can make a rise too small by luck, and the curvature does not see a wall further away.
"""

from collections.abc import Iterator
from typing import Any

METHODS = {"rtn": "RTN", "gptq": "GPTQ"}  # by key, as pictures and sentences name them
NEEDS = "needs QAT"
VERDICTS = (*(f"{name} is enough" for name in METHODS.values()), NEEDS)
Record = dict[str, Any]


def rows(measured: Record, tolerance: float) -> list[dict[str, Any]]:
    """The table: a row per layer and width.

    Args:
        measured: What `measure` returns.
        tolerance: Rise of the loss that is accepted of the whole model; a layer's share is that of its
            weights.
    """
    total = sum(layer["weights"] for layer in measured["layers"])
    return [
        _row(layer, bits, setting, tolerance * layer["weights"] / total)
        for layer in measured["layers"]
        for bits, setting in layer["settings"].items()
    ]


def _row(layer: Record, bits: str, setting: Record, accepted: float) -> dict[str, Any]:
    width = layer["width"]
    row: dict[str, Any] = {"layer": layer["name"], "block": layer["block"], "weights": layer["weights"]}
    row |= {"bits": int(bits), "step / width": setting["step"] / width if width else None}
    for method in METHODS:
        own = setting[method]
        row[f"{method} predicted"] = own["curvature"] / 2
        row[f"{method} actual"] = own["rise"] - own["slope"]
        row[f"{method} score"] = max(row[f"{method} predicted"], row[f"{method} actual"])
    enough = [*(row[f"{method} score"] <= accepted for method in METHODS), True]
    return row | {"verdict": VERDICTS[enough.index(True)]}


def summary(measured: Record, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per width: what rounding all layers does to the loss, and what each alone adds up to."""
    found = []
    for bits, losses in measured["model"].items():
        own = [row for row in table if row["bits"] == int(bits)]
        line: dict[str, Any] = {"bits": int(bits)}
        for method in METHODS:
            line[f"{method} actual"] = losses[method] - measured["loss"]
            line[f"{method} sum of layers"] = sum(row[f"{method} actual"] for row in own)
            line[f"{method} predicted"] = sum(row[f"{method} predicted"] for row in own)
        for verdict in VERDICTS:
            line[verdict] = sum(row["verdict"] == verdict for row in own)
        found.append(line)
    return found


def in_words(table: list[dict[str, Any]]) -> Iterator[str]:
    """A sentence per width."""
    for bits in dict.fromkeys(row["bits"] for row in table):
        own = [row for row in table if row["bits"] == bits]
        told = []
        for verdict in VERDICTS:
            found = [row for row in own if row["verdict"] == verdict]
            if found:
                share = "all layers" if len(found) == len(own) else f"{len(found)} of {len(own)} layers"
                told.append(f"{verdict} for {share}" if verdict != NEEDS else f"QAT is needed for {share}")
        if verdict == NEEDS and found:
            told[-1] += f", most for {max(found, key=lambda row: row['gptq score'])['layer']}"
        yield f"{bits} bits: {'; '.join(told)}"

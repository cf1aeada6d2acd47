"""Which arms a table marks as the best of a column: the best of their group and all that tie with it.

Quantized arms of one group (bit width and family) are compared with the one of the smallest mean, paired by
seed, by the same tests as `differences`: an arm ties unless Holm's p within the column is below 0.05 and the
difference is not equivalent. That takes two seeds; with one, nothing is marked. Recovered and usable octaves
are not marked: the former has a reference of its own for each grid, and the latter may be a lower bound.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stableqat.analysis.statistics import holm, paired, verdict
from stableqat.studies.study import short

if TYPE_CHECKING:
    from stableqat.analysis.comparison import ArmSummary


def find_best(arms: Sequence["ArmSummary"], margin: float) -> dict[str, set[str]]:
    """The labels to mark, by column.

    Args:
        arms: The quantized arms of a study.
        margin: The difference in nats that does not matter.
    """
    best: dict[str, set[str]] = {}
    for group in dict.fromkeys(arm.group for arm in arms):
        columns: dict[str, dict[str, Mapping[Any, float]]] = {}
        for arm in arms:
            if arm.group == group and _learns(arm):
                for key, by_seed in _by_seed(arm).items():
                    if len(by_seed) > 1:
                        columns.setdefault(key, {})[arm.label] = by_seed
        for key, values in columns.items():
            best.setdefault(key, set()).update(_tied(values, 0.0 if key.startswith("top-1") else margin))
    return best


def _learns(arm: "ArmSummary") -> bool:
    """Whether the arm's loss is below the cap somewhere; what collapses everywhere is not sensitive."""
    return not all(cell.lost for cell in arm.cells.values())


def _by_seed(arm: "ArmSummary") -> dict[str, Mapping[Any, float]]:
    """The arm's values, by column and seed, smaller ones being better."""
    assert arm.selected is not None
    assert arm.sensitivity is not None
    found: dict[str, Mapping[Any, float]] = {}
    for lr, cell in arm.cells.items():
        if not cell.lost:
            found[f"lr {short(lr)}"] = cell.capped
    cell = arm.cells[arm.selected.lr]
    seeds = [run.hparams.get("seed") for run in cell.runs]
    figures = {
        "reported loss": arm.selected.by_seed,
        "perplexity": arm.selected.by_seed,  # its exp
        "top-1": {seed: -value for seed, value in zip(seeds, cell.top1, strict=False)},
        "lr sensitivity": arm.sensitivity.by_seed if len(arm.cells) > 1 else {},
        "worst loss": arm.sensitivity.worst_by_seed,
    }
    for key, value in arm.figures.items():
        by_seed = figures.get(key.partition(",")[0])  # without the half of validation
        if value is not None and by_seed is not None:
            found[key] = by_seed
    return found


def _tied(values: Mapping[str, Mapping[Any, float]], margin: float) -> set[str]:
    """The label of the smallest mean, and those not shown to be larger; none if there is one arm only."""
    if len(values) < 2:
        return set()
    least = min(values, key=lambda label: statistics.fmean(values[label].values()))
    pairs = {
        label: paired([each[seed] - values[least][seed] for seed in each if seed in values[least]], margin)
        for label, each in values.items()
        if label != least
    }
    tested = {label: sample for label, sample in pairs.items() if sample.p is not None}
    adjusted = holm([sample.p for sample in tested.values() if sample.p is not None])
    worse = {
        label
        for (label, sample), p in zip(tested.items(), adjusted, strict=True)
        if verdict(sample.mean, p, sample.p_equivalence) == "higher"
    }
    return set(values) - worse

"""Every quantized arm against the baseline of its group (bit width and family), paired by seed.

    compare: {baseline: {method: STE, grid: integer}, margin: 0.01, cap: 4.5}    # in study.yaml

There are four quantities, each a family of its own for Holm's correction: the loss (all arms x learning rates
of the study), the reported loss (each arm at its selected learning rate), LR sensitivity and the worst loss
(all arms). Losses count up to the cap of their batches and diverged runs as it, so a collapse weighs what it
costs and no pair is dropped because of it; a seed that only one side has is left out and counted. If both
sides of every pair are equal, there is nothing to test and nothing that counts in a family: either both
compute the same, or both are at the cap. Full precision is not an arm here, because it is no finding that it
wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.analysis.statistics import Paired, holm, paired, verdict
from stableqat.errors import UserError
from stableqat.studies.plan import STUDY_FILE, Plan

if TYPE_CHECKING:
    from stableqat.analysis.comparison import ArmSummary

QUANTITIES = ("loss", "reported loss", "lr sensitivity", "worst loss")


@dataclass(frozen=True, kw_only=True)
class Difference(Paired):
    """An arm minus its baseline: below 0 the arm is better.

    Attributes:
        arm: Label of the arm.
        baseline: Label of the baseline.
        quantity: "loss", "reported loss", "lr sensitivity" or "worst loss".
        lr: Learning rate of a loss; None for the other quantities.
        verdict: "lower", "higher", "equivalent" or "inconclusive" as tested; "identical" if both sides of
            every pair are equal, or "capped" if they are the cap; "-" if there was nothing to test.
        unpaired: Number of seeds that one side lacks.
        p_holm: The p-value after Holm's correction within the quantity's family.
    """

    arm: str
    baseline: str
    quantity: str
    lr: float | None
    verdict: str
    unpaired: int
    p_holm: float | None = None


def find_differences(
    folder: Path, plan: Plan, lrs: Sequence[float], arms: Sequence["ArmSummary"]
) -> list[Difference]:
    """All differences of a study, the arms in the order of its table.

    Args:
        folder: Folder of the study.
        plan: What the study fixes in advance.
        lrs: Its learning rates.
        arms: Its quantized arms.

    Raises:
        UserError: If the study's `compare.baseline` selects no arm, or several of one group.
    """
    found: list[Difference] = []
    for baseline in _baselines(folder, plan.baseline, arms):
        theirs = _quantities(baseline, lrs)
        for arm in arms:
            if arm is not baseline and arm.group == baseline.group:
                for (quantity, lr), ours in _quantities(arm, lrs).items():
                    pair = ours, theirs[quantity, lr]
                    if all(pair):
                        figures = _tested(*pair, plan.margin, _at_cap(arm, quantity, ours))
                        figures |= {"arm": arm.label, "baseline": baseline.label}
                        found.append(Difference(quantity=quantity, lr=lr, **figures))
    for quantity in QUANTITIES:
        family = [i for i, each in enumerate(found) if each.quantity == quantity and each.p is not None]
        adjusted = holm([p for i in family if (p := found[i].p) is not None])
        for i, p in zip(family, adjusted, strict=True):
            word = verdict(found[i].mean, p, found[i].p_equivalence)
            found[i] = replace(found[i], p_holm=p, verdict=word)
    return found


def _baselines(
    folder: Path, wanted: dict[str, Any] | None, arms: Sequence["ArmSummary"]
) -> list["ArmSummary"]:
    """The arm of each group that the others are compared to."""
    chosen = {"method": "STE"} if wanted is None else wanted
    found: dict[Any, ArmSummary] = {}
    for arm in arms:
        if all(key in arm.hparams and arm.hparams[key] == value for key, value in chosen.items()):
            first = found.setdefault(arm.group, arm)
            if first is not arm and wanted is not None:
                raise UserError(
                    f"{folder / STUDY_FILE}: compare.baseline selects both {first.label} and {arm.label}:"
                    " add a hyper-parameter in which they differ"
                )
    if not found and wanted is not None:
        labels = ", ".join(arm.label for arm in arms)
        raise UserError(f"{folder / STUDY_FILE}: compare.baseline {wanted} selects no arm of {labels}")
    return list(found.values())


def _quantities(arm: "ArmSummary", lrs: Sequence[float]) -> dict[tuple[str, float | None], dict[Any, float]]:
    """What is compared of an arm: by quantity and learning rate, seed to value."""
    assert arm.sensitivity is not None
    assert arm.selected is not None
    found: dict[tuple[str, float | None], dict[Any, float]] = {
        ("loss", lr): arm.cells[lr].capped if lr in arm.cells else {} for lr in lrs
    }
    found["reported loss", None] = arm.selected.by_seed
    found["lr sensitivity", None] = arm.sensitivity.by_seed
    found["worst loss", None] = arm.sensitivity.worst_by_seed
    return found


def _at_cap(arm: "ArmSummary", quantity: str, values: Mapping[Any, float]) -> set[Any]:
    """The seeds whose value says only that the arm's losses are at the cap; a curve may be flat below it."""
    assert arm.cap is not None
    assert arm.sensitivity is not None
    if quantity == "lr sensitivity":
        worst = arm.sensitivity.worst_by_seed
        return {seed for seed, value in values.items() if value == 0 and worst[seed] == arm.cap.loss}
    assert arm.selected is not None
    cap = arm.selected.cap if quantity == "reported loss" else arm.cap.loss
    return {seed for seed, value in values.items() if value == cap}


def _tested(
    ours: Mapping[Any, float], theirs: Mapping[Any, float], margin: float, at_cap: set[Any]
) -> dict[str, Any]:
    """The figures of a difference between values by seed; `at_cap` are the seeds of which ours is the cap."""
    shared = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    sample, word = paired([our - their for our, their in shared], margin), "-"
    if sample.mean == 0 and sample.n > 1 and all(our == their for our, their in shared):
        sample = replace(sample, p=None, p_equivalence=None)
        word = "capped" if at_cap >= ours.keys() & theirs.keys() else "identical"
    return asdict(sample) | {"verdict": word, "unpaired": len(ours.keys() ^ theirs.keys())}

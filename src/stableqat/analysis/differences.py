"""Every quantized arm against the baseline of its group (bit width and family), paired by seed.

    compare: {baseline: {method: STE, grid: integer}, margin: 0.01, cap: 4.5}    # in study.yaml

Three quantities, each a family of its own for Holm's correction: the loss (all arms x learning rates of
the study), lr sensitivity and the worst loss (all arms). Losses count up to the cap and diverged runs as
the cap, so a collapse weighs what it costs and no pair is dropped for it; a seed that only one
side has is left out and counted. Where every pair is the same number there is nothing to test, and nothing
that would count in a family: either both sides compute the same, or both are at the cap. Full precision is no
arm here: that it wins is no finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.analysis.statistics import holm, paired, verdict
from stableqat.errors import UserError
from stableqat.studies.plan import STUDY_FILE, Plan

if TYPE_CHECKING:
    from stableqat.analysis.comparison import ArmSummary

QUANTITIES = ("loss", "lr sensitivity", "worst loss")


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline: below 0 the arm is better.

    Attributes:
        arm: Label of the arm.
        baseline: Label of the baseline.
        quantity: "loss", "lr sensitivity" or "worst loss".
        lr: Learning rate of a loss, None for the others.
        n: Number of pairs.
        mean: Mean difference in nats, None without pairs or where a loss has no cap.
        low: Lower end of the 95% t interval, None with fewer than two pairs.
        high: Its upper end.
        p: Two-sided p-value of the paired t test; None where nothing was tested.
        p_holm: The same after Holm's correction within the quantity's family.
        verdict: "lower", "higher", "equivalent" or "inconclusive" as tested; "identical" where every pair is
            the same number, "capped" where that is the cap; "-" where there was nothing to test.
        p_equivalence: P-value of the test that the difference lies within the margin.
        unpaired: Number of seeds that one side lacks.
    """

    arm: str
    baseline: str
    quantity: str
    lr: float | None
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    verdict: str
    p_equivalence: float | None = None
    unpaired: int = 0


def find_differences(
    folder: Path, plan: Plan, lrs: Sequence[float], arms: Sequence["ArmSummary"]
) -> list[Difference]:
    """All differences of a study, the arms in the order of its table.

    Args:
        folder: Folder of the study.
        plan: What the study fixes beforehand.
        lrs: Its learning rates.
        arms: Its quantized arms.

    Raises:
        UserError: The study's `compare.baseline` selects no arm, or several of one group.
    """
    found: list[Difference] = []
    for baseline in _baselines(folder, plan.baseline, arms):
        theirs = _quantities(baseline, lrs)
        for arm in arms:
            if arm is not baseline and arm.group == baseline.group:
                for (quantity, lr), ours in _quantities(arm, lrs).items():
                    pair = ours, theirs[quantity, lr]
                    if all(pair):
                        assert arm.cap is not None
                        unchanged = 0.0 if quantity == "lr sensitivity" else arm.cap.loss
                        tested = _difference(*pair, plan.margin, unchanged)
                        found.append(Difference(arm.label, baseline.label, quantity, lr, **tested))
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
    """The arm of each group that the others are compared with."""
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
        raise UserError(
            f"{folder / STUDY_FILE}: compare.baseline {wanted} selects none of the arms: {labels}"
        )
    return list(found.values())


def _quantities(arm: "ArmSummary", lrs: Sequence[float]) -> dict[tuple[str, float | None], dict[Any, float]]:
    """What is compared of an arm: seed to value, by quantity and learning rate."""
    assert arm.sensitivity is not None
    found: dict[tuple[str, float | None], dict[Any, float]] = {
        ("loss", lr): arm.cells[lr].capped if lr in arm.cells else {} for lr in lrs
    }
    found["lr sensitivity", None] = arm.sensitivity.by_seed
    found["worst loss", None] = arm.sensitivity.worst_by_seed
    return found


def _difference(
    ours: Mapping[Any, float], theirs: Mapping[Any, float], margin: float, unchanged: float
) -> dict[str, Any]:
    """The figures of a difference between values by seed; `unchanged` is the value of what is capped."""
    shared = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    sample, word = paired([our - their for our, their in shared], margin), "-"
    if sample.mean == 0 and sample.n > 1 and all(our == their for our, their in shared):
        sample = replace(sample, p=None, p_equivalence=None)
        word = "capped" if all(our == unchanged for our, _ in shared) else "identical"
    unpaired = len(ours.keys() ^ theirs.keys())
    return asdict(sample) | {"p_holm": None, "verdict": word, "unpaired": unpaired}

"""Every quantized arm against the baseline of its group (bit width and family), paired by seed.

    compare: {baseline: {method: STE, grid: integer}, margin: 0.01, cap: 4.5}    # in study.yaml

Three quantities, each a family of its own for Holm's correction: the loss (all arms x learning rates of
the study), lr sensitivity and the worst loss (all arms). Losses count up to the cap and diverged runs as
the cap, so a collapse weighs what it costs and no pair is dropped for it; a seed that only one
side has is left out and counted. Where every pair is the same number there is nothing to test, and nothing
that would count in a family: either both sides compute the same, or both are at the cap. Full precision is no
arm here: that it wins is no finding.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from stableqat.analysis.statistics import holm, paired, verdict
from stableqat.errors import UserError
from stableqat.studies.plan import STUDY_FILE

if TYPE_CHECKING:
    from stableqat.analysis.caps import Group
    from stableqat.analysis.comparison import Arm, Comparison


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


def baselines(comparison: "Comparison") -> dict["Group", "Arm"]:
    """The arm that others of its group are compared with, by group.

    Raises:
        UserError: The study's `compare.baseline` selects no arm, or several of one bit width.
    """
    wanted = comparison.plan.baseline
    found: dict[Group, Arm] = {}
    for arm in comparison.quantized:
        chosen = {"method": "STE"} if wanted is None else wanted
        if any(key not in arm.hparams or arm.hparams[key] != value for key, value in chosen.items()):
            continue
        first = found.setdefault(arm.group, arm)
        if first is not arm and wanted is not None:
            raise UserError(
                f"{comparison.folder / STUDY_FILE}: compare.baseline selects both {comparison.label(first)}"
                f" and {comparison.label(arm)}: add a hyper-parameter in which they differ"
            )
    if not found and wanted is not None:
        raise UserError(
            f"{comparison.folder / STUDY_FILE}: compare.baseline {wanted} selects none of the arms:"
            f" {', '.join(map(comparison.label, comparison.quantized))}"
        )
    return found


def differences(comparison: "Comparison") -> list[Difference]:
    """All differences of a study, the arms in the order of its table."""
    found: list[Difference] = []
    for group, baseline in baselines(comparison).items():
        for arm in comparison.quantized:
            if arm is baseline or arm.group != group:
                continue
            for lr in comparison.lrs:
                ours, theirs = comparison.losses(arm, lr), comparison.losses(baseline, lr)
                found += _difference(comparison, arm, baseline, "loss", lr, ours, theirs)
            for quantity, by_seed in (
                ("lr sensitivity", comparison.sensitivities),
                ("worst loss", comparison.worsts),
            ):
                found += _difference(
                    comparison, arm, baseline, quantity, None, by_seed(arm), by_seed(baseline)
                )
    for quantity in ("loss", "lr sensitivity", "worst loss"):
        family = [i for i, d in enumerate(found) if d.quantity == quantity and d.p is not None]
        adjusted = holm([p for i in family if (p := found[i].p) is not None])
        for i, p in zip(family, adjusted, strict=True):
            word = verdict(found[i].mean, p, found[i].p_equivalence)
            found[i] = replace(found[i], p_holm=p, verdict=word)
    return found


def _difference(
    comparison: "Comparison",
    arm: "Arm",
    baseline: "Arm",
    quantity: str,
    lr: float | None,
    ours: dict[Any, float],
    theirs: dict[Any, float],
) -> list[Difference]:
    """One difference; none where a side has no runs at all."""
    if not ours or not theirs:
        return []
    shared = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    sample, word = paired([our - their for our, their in shared], comparison.plan.margin), "-"
    if sample.mean == 0 and sample.n > 1 and all(our == their for our, their in shared):
        sample = replace(sample, p=None, p_equivalence=None)
        nothing = 0.0 if quantity == "lr sensitivity" else comparison.cap(arm).loss
        word = "capped" if all(our == nothing for our, _ in shared) else "identical"
    return [
        Difference(
            comparison.label(arm),
            comparison.label(baseline),
            quantity,
            lr,
            **asdict(sample),
            p_holm=None,
            verdict=word,
            unpaired=len(ours.keys() ^ theirs.keys()),
        )
    ]

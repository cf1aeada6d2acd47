"""Caps: the largest loss that counts, so that a collapse weighs what it costs and no more.

The cap of a study is its file's `compare.cap`. Without one, each group of arms (one bit width of one family
of models) has its own: the smallest loss that any of its arms has before it learns, which is PTQ's on the
arm's grid if the study measured it, otherwise that of the first training batch. It is never less than a
finished run's loss at its arm's best learning rate: a cap below that would make good arms equal.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stableqat.analysis.arms import LOSS, Arm, Group


@dataclass(frozen=True)
class Cap:
    """A cap.

    Attributes:
        loss: The largest loss that counts, in nats; infinite if nothing gives one.
        source: Where it comes from.
    """

    loss: float
    source: str


def find_caps(
    fits: Sequence[Arm], ptq: Mapping[str, float | None], planned: float | None
) -> dict[Group, Cap]:
    """The cap of each group; full precision, beside quantized arms, has the largest of its family.

    Args:
        fits: The arms that train.
        ptq: Label to the loss after rounding as the arm does at its first step.
        planned: The study's own cap.
    """
    groups = dict.fromkeys(
        arm.group for arm in sorted(fits, key=lambda arm: arm.hparams.get("method") == "FP")
    )
    if planned is not None:
        return dict.fromkeys(groups, Cap(planned, "the study's"))
    found: dict[Group, Cap] = {}
    for group in groups:
        arms = [arm for arm in fits if arm.group == group]
        beside = [cap for other, cap in found.items() if other.images == group.images]
        if group.bits is None and beside:
            before = max(beside, key=_loss)
        else:
            known = [cap for arm in arms if (cap := _before(arm, ptq[arm.label]))]
            before = min(known, key=_loss, default=Cap(math.inf, "no run says its initial loss"))
        floors = [
            Cap(loss, f"the largest of {arm.label} at its best learning rate")
            for arm in arms
            if (loss := _at_best(arm)) is not None
        ]
        found[group] = max([before, *floors], key=_loss)
    return found


def _loss(cap: Cap) -> float:
    return cap.loss


def _before(arm: Arm, ptq: float | None) -> Cap | None:
    """The arm's loss before it learns."""
    if ptq is not None:
        return Cap(ptq, f"PTQ, {arm.label}'s grid")
    logged = (run.last.get("hp/initial_loss", math.nan) for run in arm.runs)
    first = min(filter(math.isfinite, logged), default=None)
    return None if first is None else Cap(first, f"first training batch, {arm.label}")


def _at_best(arm: Arm) -> float | None:
    """The largest loss at the arm's best learning rate, of those at which no run diverged."""
    by_lr = ([run for run in arm.runs if run.hparams["lr"] == lr] for lr in arm.lrs)
    ended = [[run.last[LOSS] for run in runs] for runs in by_lr if not any(run.diverged for run in runs)]
    return max(min(ended, key=statistics.fmean)) if ended else None

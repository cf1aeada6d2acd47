"""Caps: the largest loss that counts, so that a collapse weighs what it costs and no more.

The cap of a study is the `compare.cap` of its file. Without one, each group of arms (one bit width of one
family of models) has its own: the smallest loss that any of its arms has before it learns. That is PTQ's on
the arm's grid if the study measured it, and otherwise that of the first training batch. The cap is never
below the loss of a finished run at its arm's best learning rate: it would make good arms equal.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from stableqat.analysis.arms import LOSS, Arm, Group


@dataclass(frozen=True)
class Cap:
    """A cap.

    Attributes:
        loss: The largest loss that counts, in nats; infinite if nothing gives one.
        source: Where the cap comes from.
    """

    loss: float
    source: str


def find_caps(
    fits: Sequence[Arm], ptq: Mapping[str, float | None], planned: float | None
) -> dict[Group, Cap]:
    """The cap of each group; full precision gets the largest cap of its family's quantized groups, if any.

    Args:
        fits: The arms that train.
        ptq: Label to the loss of PTQ on the arm's own grid and scale, if measured.
        planned: The study's own cap.
    """
    groups = dict.fromkeys(arm.group for arm in sorted(fits, key=lambda arm: arm.method == "FP"))
    if planned is not None:
        return dict.fromkeys(groups, Cap(planned, "the study's"))
    found: dict[Group, Cap] = {}
    loss = attrgetter("loss")
    for group in groups:
        arms = [arm for arm in fits if arm.group == group]
        beside = [cap for other, cap in found.items() if other.images == group.images]
        if group.bits is None and beside:
            before = max(beside, key=loss)
        else:
            known = [cap for arm in arms if (cap := _before(arm, ptq[arm.label]))]
            before = min(known, key=loss, default=Cap(math.inf, "no run says its initial loss"))
        floors = [cap for arm in arms if (cap := _at_best(arm))]
        found[group] = max([before, *floors], key=loss)
    return found


def _before(arm: Arm, ptq: float | None) -> Cap | None:
    """The loss of the arm before it learns."""
    if ptq is not None:
        return Cap(ptq, f"PTQ, {arm.label}'s grid")
    logged = (run.last.get("hp/initial_loss", math.nan) for run in arm.runs)
    first = min(filter(math.isfinite, logged), default=None)
    return None if first is None else Cap(first, f"first training batch, {arm.label}")


def _at_best(arm: Arm) -> Cap | None:
    """The largest loss at the best of the arm's learning rates at which no run diverged."""
    by_lr = ([run for run in arm.runs if run.hparams["lr"] == lr] for lr in arm.lrs)
    ended = [[run.last[LOSS] for run in runs] for runs in by_lr if not any(run.diverged for run in runs)]
    if not ended:
        return None
    return Cap(max(min(ended, key=statistics.fmean)), f"the largest of {arm.label} at its best learning rate")

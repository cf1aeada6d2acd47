"""Caps: the largest loss that counts, so that a collapse weighs what it costs and no more.

The cap of a study is the `compare.cap` of its file, and losses above it count as it. Without one, each group
of arms (one bit width of one family of models) has its own, and nothing but a diverged run counts as it: the
smallest loss that any of its arms has before it learns, or, if runs end higher and have not diverged, the
number just above the highest of them. So arms that did not diverge keep their differences, no run gains by
diverging, and a loss equals such a cap only if its run diverged. The loss before learning is PTQ's on the
arm's grid if the study measured it, and otherwise that of the first training batch.

A cap belongs to the batches that it caps: all of validation, or one of its halves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from stableqat.analysis.arms import Arm, Group


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
    fits: Sequence[Arm], ptq: Mapping[str, float | None], planned: float | None, tag: str
) -> dict[Group, Cap]:
    """The cap of each group; full precision gets the largest cap of its family's quantized groups, if any.

    Args:
        fits: The arms that train.
        ptq: Label to the loss of PTQ on the arm's own grid and scale, of the same batches, if measured.
        planned: The study's own cap.
        tag: The tag of the losses to cap, which says of which batches they are.
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
        above = [cap for arm in arms if (cap := _above(arm, tag))]
        found[group] = max([before, *above], key=loss)
    return found


def _before(arm: Arm, ptq: float | None) -> Cap | None:
    """The loss of the arm before it learns."""
    if ptq is not None:
        return Cap(ptq, f"PTQ, {arm.label}'s grid")
    logged = (run.last.get("hp/initial_loss", math.nan) for run in arm.runs)
    first = min(filter(math.isfinite, logged), default=None)
    return None if first is None else Cap(first, f"first training batch, {arm.label}")


def _above(arm: Arm, tag: str) -> Cap | None:
    """The number just above the losses of the arm's runs that did not diverge."""
    ended = [run.last[tag] for run in arm.runs if not run.diverged]
    source = f"just above the highest loss of a run that did not diverge, {arm.label}"
    return Cap(math.nextafter(max(ended), math.inf), source) if ended else None

"""Caps: the largest loss that counts, so that a collapse weighs what it costs and no more.

The cap of a study is its file's `compare.cap`. Without one, each group of arms (one bit width of one family
of models) has its own: the smallest loss that any of its arms has before it learns, which is PTQ's on the
arm's grid where the study measured it, otherwise that of the first training batch. It is never less than a
finished run's loss at its arm's best learning rate: a cap below that would make good arms equal.
"""

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stableqat.analysis.comparison import Arm, Comparison


@dataclass(frozen=True)
class Group:
    """Arms that can be compared: of one bit width (None is full precision) and of one family of models."""

    bits: int | None
    images: bool

    @property
    def name(self) -> str:
        """What a title or a sentence calls it."""
        width = "full precision" if self.bits is None else f"{self.bits} bit{'s' * (self.bits != 1)}"
        return width + ", images" * self.images


@dataclass(frozen=True)
class Cap:
    """A cap.

    Attributes:
        loss: The largest loss that counts, in nats; infinite where nothing gives one.
        source: Where it comes from.
    """

    loss: float
    source: str


def caps(comparison: "Comparison") -> dict[Group, Cap]:
    """The cap of each group; full precision, beside quantized arms, has the largest of its family."""
    groups = dict.fromkeys(arm.group for arm in [*comparison.quantized, *comparison.fits])
    if comparison.plan.cap is not None:
        return dict.fromkeys(groups, Cap(comparison.plan.cap, "the study's"))
    found: dict[Group, Cap] = {}
    for group in groups:
        arms = [arm for arm in comparison.fits if arm.group == group]
        beside = [cap for other, cap in found.items() if other.images == group.images]
        if group.bits is None and beside:
            before = max(beside, key=_loss)
        else:
            known = [cap for arm in arms if (cap := _before(comparison, arm))]
            before = min(known, key=_loss, default=Cap(math.inf, "no run says its initial loss"))
        floors = [
            Cap(loss, f"the largest of {comparison.label(arm)} at its best learning rate")
            for arm in arms
            if (loss := _at_best(arm)) is not None
        ]
        found[group] = max([before, *floors], key=_loss)
    return found


def _loss(cap: Cap) -> float:
    return cap.loss


def _before(comparison: "Comparison", arm: "Arm") -> Cap | None:
    """The arm's loss before it learns."""
    if (ptq := comparison.ptq(arm)) is not None:
        return Cap(ptq, f"PTQ, {comparison.label(arm)}'s grid")
    logged = (run.last("hp/initial_loss") for run in arm.runs)
    first = min((loss for loss in logged if loss is not None and math.isfinite(loss)), default=None)
    return None if first is None else Cap(first, f"first training batch, {comparison.label(arm)}")


def _at_best(arm: "Arm") -> float | None:
    """The largest loss at the arm's best learning rate, of those at which no run diverged."""
    lrs = {run.hparams["lr"] for run in arm.runs}
    ended = [losses for lr in lrs if (losses := arm.finals("val/loss", lr))]
    return max(min(ended, key=statistics.fmean)) if ended else None

"""LR sensitivity, the worst loss and the usable learning rates: how a loss depends on the learning rate.

LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322) is the mean over the learning rates of
min(loss, cap) - best, and the worst loss is the largest min(loss, cap). Both are computed by seed and then
averaged. They depend on the grid of learning rates, so only seeds with all of them count. If the best
learning rate is the smallest of the grid, LR sensitivity says only what larger ones cost.

The band of usable learning rates is the range around the best one with a loss at most 0.05 nats above its
own. Its width is in octaves (factors of 2), read off a monotone cubic (PCHIP) through the losses over
log2(lr). A loss at the cap is never usable. If an arm's curve merely shifts, its band moves and stays as
wide. A band that reaches an end of the grid is open there: its true width is at least what is given.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.05


@dataclass(frozen=True)
class Band:
    """A band of learning rates.

    Attributes:
        low: The smallest learning rate of the band.
        high: The largest one.
        open: Whether the grid ends before the band does, on either side.
    """

    low: float
    high: float
    open: bool

    @property
    def octaves(self) -> float:
        """Its width in factors of 2."""
        return math.log2(self.high / self.low)


@dataclass(frozen=True)
class Sensitivity:
    """How an arm's loss depends on the learning rate.

    Attributes:
        by_seed: Seed to LR sensitivity, for seeds with all learning rates; empty if there is only one.
        worst_by_seed: Seed to the worst loss, for the same seeds.
        band: The usable learning rates; None if a seed never gets below the cap.
    """

    by_seed: dict[Any, float]
    worst_by_seed: dict[Any, float]
    band: Band | None

    @property
    def mean(self) -> float | None:
        """Mean LR sensitivity over the seeds; None if no seed has all learning rates."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def worst(self) -> float | None:
        """Mean of the worst losses over the seeds; None if no seed has all learning rates."""
        return statistics.fmean(self.worst_by_seed.values()) if self.worst_by_seed else None


def sensitivity(lrs: Sequence[float], losses: Sequence[Mapping[Any, float]], cap: float) -> Sensitivity:
    """LR sensitivity, worst loss and band of one arm.

    Args:
        lrs: The grid of learning rates, ascending.
        losses: For each of them, seed to min(loss, cap).
        cap: The cap.
    """
    rows = {seed: [each.get(seed, math.nan) for each in losses] for seed in losses[0]}
    rows = {seed: row for seed, row in rows.items() if all(map(math.isfinite, row))}
    bands = [find_band(lrs, row, cap) for row in rows.values()] if len(lrs) > 1 else []
    return Sensitivity(
        {seed: statistics.fmean(row) - min(row) for seed, row in rows.items()} if len(lrs) > 1 else {},
        {seed: max(row) for seed, row in rows.items()},
        _mean([band for band in bands if band]) if bands and all(bands) else None,
    )


def find_band(lrs: Sequence[float], losses: Sequence[float], cap: float) -> Band | None:
    """The band around the smallest loss; None if that loss is the cap.

    Args:
        lrs: Two or more learning rates, ascending.
        losses: The loss at each, up to the cap.
        cap: The cap.
    """
    from scipy.interpolate import PchipInterpolator

    places = [math.log2(lr) for lr in lrs]
    best = min(range(len(lrs)), key=lambda i: losses[i])
    if losses[best] >= cap:
        return None
    limit = min(losses[best] + TOLERANCE, cap)
    low = next((i for i in range(best, -1, -1) if losses[i] >= limit), None)
    high = next((i for i in range(best, len(lrs)) if losses[i] >= limit), None)
    roots = PchipInterpolator(places, losses).solve(limit, extrapolate=False)
    ends = [
        places[0],
        places[-1],
    ]  # without a root, the curve touches the limit where it is flat, on the grid
    if low is not None:
        ends[0] = max((root for root in roots if places[low] <= root <= places[best]), default=places[low])
    if high is not None:
        ends[1] = min((root for root in roots if places[best] <= root <= places[high]), default=places[high])
    return Band(float(2 ** ends[0]), float(2 ** ends[1]), low is None or high is None)


def _mean(bands: Sequence[Band]) -> Band:
    """The mean band over seeds, of its ends as exponents; open if one of the bands is."""
    low = 2 ** (sum(math.log2(each.low) for each in bands) / len(bands))
    high = 2 ** (sum(math.log2(each.high) for each in bands) / len(bands))
    return Band(low, high, any(each.open for each in bands))

"""The band of usable learning rates: where an arm's loss stays near its best.

LR sensitivity averages over whatever grid a study took; where the best is the grid's smallest, it says what
larger learning rates cost and nothing else. The band is the stretch of learning rates around the best whose
loss is at most 0.05 nats above it, in octaves (factors of 2), read off a monotone cubic (PCHIP) through the
losses over log2(lr). What is at the cap is never usable. An arm that is merely shifted has a band as wide as
before, elsewhere. A band that reaches an end of the grid is open there: it is at least as wide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.05


@dataclass(frozen=True)
class Band:
    """A band of learning rates.

    Attributes:
        low: Its smallest learning rate.
        high: Its largest.
        open: Whether the grid ends before it does, on either side.
    """

    low: float
    high: float
    open: bool

    @property
    def octaves(self) -> float:
        """Its width in factors of 2."""
        return math.log2(self.high / self.low)


def band(lrs: Sequence[float], losses: Sequence[float], cap: float) -> Band | None:
    """The band around the smallest loss; None where that is the cap.

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
    ends = [places[0], places[-1]]  # no root: the curve reaches the limit at a grid point, and is flat there
    if low is not None:
        ends[0] = max((root for root in roots if places[low] <= root <= places[best]), default=places[low])
    if high is not None:
        ends[1] = min((root for root in roots if places[best] <= root <= places[high]), default=places[high])
    return Band(float(2 ** ends[0]), float(2 ** ends[1]), low is None or high is None)


def mean(bands: Sequence[Band]) -> Band:
    """The mean over seeds, of the ends as exponents; open where one of them is."""
    low, high = (
        2 ** (sum(math.log2(end) for end in ends) / len(bands))
        for ends in zip(*((each.low, each.high) for each in bands), strict=True)
    )
    return Band(low, high, any(each.open for each in bands))

"""Differences of paired runs: Student's t interval and test, equivalence, and Holm's correction.

Two arms are compared run by run: with the same learning rate and the same seed, and so the same start and the
same order of the data. The n differences are treated as a sample of a normal distribution. With few seeds,
everything rests on this assumption; a bootstrap of so few would be narrower, not safer. Differences that are
all the same number leave nothing to estimate: their interval is that number. Equivalence is shown by two
one-sided tests (TOST, Schuirmann 1987), at 5% if the 90% interval lies within +-margin. Holm (1979) keeps the
chance of any false finding in a family of tests at 5%.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """The result of a sample of paired differences.

    Attributes:
        n: Number of pairs.
        mean: Mean difference; None without pairs, or if a difference is not finite.
        low: Lower end of the 95% t interval; None with fewer than two pairs.
        high: Upper end of the interval.
        p: Two-sided p-value of the paired t test of no difference; None if nothing was tested.
        p_equivalence: The larger p-value of the two one-sided tests against +-margin.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_equivalence: float | None = None


def paired(differences: Sequence[float], margin: float) -> Paired:
    """Interval, t test and equivalence of the mean of paired differences.

    Args:
        differences: One number per pair.
        margin: Half the width of the band around 0 in which a difference does not matter; with 0, only
            differences that are all exactly 0 are equivalent.
    """
    from scipy.special import stdtr, stdtrit  # the t distribution; importing scipy.stats takes a second

    n = len(differences)
    if n == 0 or not all(map(math.isfinite, differences)):
        return Paired(n)
    mean = statistics.fmean(differences)
    if n == 1:
        return Paired(n, mean)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Paired(n, mean, mean, mean, float(mean == 0), float(abs(mean) > margin))
    degrees = n - 1
    half = stdtrit(degrees, 1 - LEVEL / 2) * error
    p = 2 * stdtr(degrees, -abs(mean) / error)
    nearer = (margin - abs(mean)) / error  # to the bound that is harder to rule out, with the larger p-value
    return Paired(n, mean, mean - half, mean + half, float(p), float(stdtr(degrees, -nearer)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in their order: ascending, p(i) * (m - i), never falling."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def verdict(mean: float | None, p_holm: float | None, p_equivalence: float | None) -> str:
    """One word for a comparison; "-" if there was nothing to test.

    Equivalence comes first: a difference that is shown to lie within the margin does not matter, as was said
    in advance, however certain its sign is.
    """
    if mean is None or p_holm is None or p_equivalence is None:
        return "-"
    if p_equivalence < LEVEL:
        return "equivalent"
    if p_holm < LEVEL:
        return "lower" if mean < 0 else "higher"
    return "inconclusive"

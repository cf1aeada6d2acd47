"""A mixture: which row of which source is the i-th of an epoch, a pure function of (seed, epoch, i).

The sources take turns in a fixed pattern that repeats: among the first p rows, source s has its share w_s * p
to within one row (Tijdeman's bound for the chairman assignment problem, Discrete Math. 32, 1980). Each source
is visited in its own permutations; if an epoch needs more rows than a source has, the source starts over with
a new one. Nothing is copied: an epoch is an array of indices into the sources laid end to end.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np


def permutation(size: int, seed: int, visit: int, source: int = 0) -> np.ndarray:
    """The order in which visit number `visit` goes through the `size` rows of a source.

    It sorts raw Philox output, whose stream NumPy guarantees, so the order does not depend on versions.
    """
    key = np.array([seed, source << 32 | visit], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def interleaving(shares: Sequence[int], length: int) -> np.ndarray:
    """The source of each of the first `length` rows of a mixture, always within one row of every share.

    Row j of source s must come between the first p at which w_s * p - j >= e and the one after the last at
    which w_s * p - j <= 1 - e, with e = 1 / (2n - 2). Earliest deadline first meets all these windows.
    """
    total, sources = sum(shares), range(len(shares))
    if len(shares) == 1:
        return np.zeros(length, np.int16)
    parts = 2 * len(shares) - 2
    taken = [0] * len(shares)

    def opens(s: int) -> int:
        return -(-(taken[s] * parts + 1) * total // (shares[s] * parts))

    def closes(s: int) -> int:
        return (taken[s] * parts + parts - 1) * total // (shares[s] * parts) + 1

    opening, closing = [opens(s) for s in sources], [closes(s) for s in sources]
    pattern = np.empty(length, np.int16)
    for p in range(length):
        source = min((closing[s], s) for s in sources if opening[s] <= p + 1)[1]
        pattern[p] = source
        taken[source] += 1
        opening[source], closing[source] = opens(source), closes(source)
    return pattern


class Mixture:
    """What an epoch takes from each source, and in which order.

    Args:
        rows: Number of rows of each source.
        ratios: Ratios of the rows that an epoch takes from each source.
        size: Rows of an epoch; None takes as many as possible without visiting a row twice.
    """

    def __init__(self, rows: Sequence[int], ratios: Sequence[float] = (1,), size: int | None = None):
        assert len(rows) == len(ratios)
        exact = [Fraction(str(ratio)) for ratio in ratios]  # 0.67 means 67/100, not the nearest double
        whole = [int(ratio * math.lcm(*(r.denominator for r in exact))) for ratio in exact]
        self.shares = [share // math.gcd(*whole) for share in whole]
        self.rows = list(rows)
        self._starts = [sum(rows[:source]) for source in range(len(rows))]
        self.size = self._without_repetition() if size is None else size

    def _without_repetition(self) -> int:
        """The number of rows of the longest epoch in which no source starts over."""
        period = sum(self.shares)
        rounds = min(rows // share for rows, share in zip(self.rows, self.shares, strict=True))
        left = [rows - rounds * share for rows, share in zip(self.rows, self.shares, strict=True)]
        # By this row, some source has used up what is left of it.
        enough = min(-(-(n + 2) * period // share) for n, share in zip(left, self.shares, strict=True))
        pattern = interleaving(self.shares, min(period, enough))
        ends = [np.flatnonzero(pattern == s)[n : n + 1] for s, n in enumerate(left)]
        return rounds * period + int(min(end[0] for end in ends if len(end)))

    @cached_property
    def _pattern(self) -> np.ndarray:
        return interleaving(self.shares, min(sum(self.shares), self.size))

    @cached_property
    def counts(self) -> list[int]:
        """The number of rows that an epoch takes from each source."""
        rounds, rest = divmod(self.size, sum(self.shares))
        begun = np.bincount(self._pattern[:rest], minlength=len(self.rows))
        return [rounds * share + int(n) for share, n in zip(self.shares, begun, strict=True)]

    def first(self, size: int) -> "Mixture":
        """A mixture whose epochs visit only the first rows of each source, `size` in all."""
        some = Mixture(self.rows, self.shares, size)
        some.rows = [min(rows, count) for rows, count in zip(self.rows, some.counts, strict=True)]
        return some

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, as indices into all sources laid end to end."""
        sources = np.resize(self._pattern, self.size)
        order = np.empty(self.size, np.int64)
        for source, (start, rows, count) in enumerate(zip(self._starts, self.rows, self.counts, strict=True)):
            visits = -(-count // rows) if count else 1
            drawn = [permutation(rows, seed, epoch * visits + visit, source) for visit in range(visits)]
            order[sources == source] = start + np.concatenate(drawn)[:count]
        return order

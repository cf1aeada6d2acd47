"""Curves over steps: the mean of several seeds, and fewer points of many.

Seeds log at the same steps, but a run that diverges ends early. A mean that silently went on with the
others would look better the more runs diverge, so what all runs share and what the survivors show
are kept apart.
"""

import math
import statistics

from stableqat.analysis.events import Run

FEWEST_POINTS = 8


def average(runs: list[Run], tag: str) -> tuple[dict[int, float], dict[int, float]]:
    """Mean over runs at every step that all runs which get there have logged.

    Args:
        runs: Runs that differ in their seed.
        tag: What to average; values that are not finite count as not logged.

    Returns:
        Step to mean while all runs go on, and from the last of those steps on for the longer ones.
    """
    series = [finite(run.scalars.get(tag, {})) for run in runs]
    together: dict[int, float] = {}
    survivors: dict[int, float] = {}
    for step in sorted({step for each in series for step in each}):
        going = [each for each in series if each and max(each) >= step]
        if all(step in each for each in going):
            mean = statistics.fmean(each[step] for each in going)
            (together if len(going) == len(series) else survivors)[step] = mean
    if together and survivors:
        last = max(together)
        survivors = {last: together[last]} | survivors
    return together, survivors


def finite(series: dict[int, float]) -> dict[int, float]:
    """The finite values of a series."""
    return {step: value for step, value in series.items() if math.isfinite(value)}


def thinned(runs: list[Run], tag: str, points: int) -> list[dict[int, float]]:
    """At most so many points of each run, at steps that the runs share.

    Evenly spread over all steps of the runs. Each run keeps its own first and last point, too, and where it
    ends in values that are not finite, both sides of that.

    Args:
        runs: Runs whose means shall still be computable, those of one arm.
        tag: What to thin.
        points: Most points to keep, at least 8.
    """
    assert points >= FEWEST_POINTS
    series = [run.scalars.get(tag, {}) for run in runs]
    steps = sorted({step for each in series for step in each})
    if len(steps) > points:
        spread = points - 4  # the others are for a run's own ends
        steps = [steps[round(i * (len(steps) - 1) / (spread - 1))] for i in range(spread)]
    return [{s: each[s] for s in sorted(_ends(each) | (set(steps) & each.keys()))} for each in series]


def _ends(series: dict[int, float]) -> set[int]:
    good = finite(series)
    after = [step for step in series if not good or step > max(good)]
    return {end(part) for part in (series, good, after) if part for end in (min, max)}

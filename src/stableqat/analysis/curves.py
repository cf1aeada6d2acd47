"""Curves over steps: the mean of several seeds.

Seeds log at the same steps, but a run that diverges ends early. A mean that silently went on with the
others would look better the more runs diverge, so what all runs share and what the survivors show
are kept apart.
"""

import math
import statistics

from stableqat.events import Run


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

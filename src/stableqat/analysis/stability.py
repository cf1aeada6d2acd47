"""How calm training was: loss spikes, the gradient's norm, and what the quantizers did.

A spike is a logged training loss that exceeds the median of the 50 logged before it by more than 7 robust
standard deviations (1.4826 times the median absolute deviation) and by more than 0.1 nats; the first 10
losses have too few before them. This adapts the spike score of OLMo 2 (arXiv 2501.00656: 7 standard
deviations off a rolling mean) to runs that log hundreds of losses instead of a hundred thousand: one spike in
a short window moves a mean and a standard deviation, but not a median, and the floor keeps the last decimals
of a flat curve from counting. A lasting jump counts until the median catches up. Losses and norms that are
not finite belong to the divergence rate.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stableqat.analysis.arms import Result

TRAIN_LOSS, GRAD_NORM = "train/loss", "train/grad_norm"
WINDOW, FEWEST, SIGMAS, FLOOR = 50, 10, 7, 0.1
QUANTILES = {"grad norm median": 0.5, "grad norm 95%": 0.95, "grad norm 99%": 0.99}
# These are moving averages, or distances from the start, so they are read at the end of a run.
ENDS = {each: f"quant/{each.replace(' ', '_')}" for each in ("oscillation", "scale drift", "grad cosine")}
FLIP_RATE = "quant/flip_rate"
FIGURES = ("spikes per 1000", *QUANTILES, "flip rate", *ENDS)


def spikes(losses: Iterable[float]) -> tuple[int, int]:
    """The number of spikes, and of losses that could have been one."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    found = 0
    for i in range(FEWEST, len(finite)):
        before = finite[max(0, i - WINDOW) : i]
        rise = finite[i] - (median := statistics.median(before))
        if rise > FLOOR:  # rare, and the deviations take longest
            found += rise > SIGMAS * 1.4826 * statistics.median(abs(loss - median) for loss in before)
    return found, max(0, len(finite) - FEWEST)


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least this share of the finite values does not exceed."""
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[max(0, math.ceil(share * len(finite)) - 1)] if finite else None


def stability(runs: Sequence["Result"]) -> dict[str, float]:
    """The figures that the runs' event files allow, by name, without those that were not logged.

    Spikes and gradient norms are pooled over all runs, value by value. The quantizers' figures are means over
    the runs that did not diverge.
    """
    figures: dict[str, float | None] = {}
    counts = [spikes(run.scalars.get(TRAIN_LOSS, {}).values()) for run in runs]
    judged = sum(number for _, number in counts)
    figures["spikes per 1000"] = 1000 * sum(n for n, _ in counts) / judged if judged else None
    norms = [value for run in runs for value in run.scalars.get(GRAD_NORM, {}).values()]
    figures |= {name: quantile(norms, share) for name, share in QUANTILES.items()}
    calm = [run for run in runs if not run.diverged]
    rates = [statistics.fmean(run.scalars[FLIP_RATE].values()) for run in calm if run.scalars.get(FLIP_RATE)]
    figures["flip rate"] = statistics.fmean(rates) if rates else None
    for name, tag in ENDS.items():
        ends = [run.last[tag] for run in calm if tag in run.last]
        figures[name] = statistics.fmean(ends) if ends else None
    return {name: value for name, value in figures.items() if value is not None}

"""The initial scale and offset of an activation: those of least squared error over all calibration batches.

Batches are counted, not kept: a histogram over the 65,536 values of bfloat16 holds every activation to three
digits, whatever their range, and counts of several processes add up exactly. The trade-off: values that
bfloat16 cannot tell apart count as one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BINS = 1 << 16

_CHUNK = 1 << 24  # activations that are counted at once
_SCALES = 128  # from clipping nearly everything to clipping nothing
_ENDS = 32  # for each end of the range, in each round
_ROUNDS = 3
_REFINEMENTS = 8


@torch.no_grad()
def count_values(x: Tensor) -> Tensor:
    """How often each bfloat16 value occurs.

    Args:
        x: Activations of any shape.

    Returns:
        int64 counts, `(65536,)`, by the bits of the value.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for part in x.detach().flatten().split(_CHUNK):
        bits = part.to(torch.bfloat16).view(torch.int16).to(torch.int32) & (BINS - 1)
        counts += torch.bincount(bits, minlength=BINS)
    return counts


def counted_values(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The values that occur, in float64, and how often each does.

    Args:
        counts: What `count_values` returns, or a sum of such.
    """
    counts = counts.cpu()
    bits = counts.nonzero().flatten()
    values = torch.where(bits < BINS // 2, bits, bits - BINS).to(torch.int16).view(torch.bfloat16)
    return values.double(), counts[bits].double()


def least_scale(values: Tensor, counts: Tensor, low: int, high: int) -> tuple[float, float]:
    """The scale of least squared error for codes from `low` to `high`, and this error.

    Args:
        values: Values that occur, finite and not all zero.
        counts: How often each does.
        low: Lowest code.
        high: Highest code.
    """
    best, least = 0.0, float("inf")
    for scale in _scales(values, counts, low, high):
        if (error := _error(values, counts, scale, 0.0, low, high)) < least:
            best, least = scale, error
    for _ in range(_REFINEMENTS):
        codes = (values / best).round_().clamp_(low, high)
        norm = (counts * codes * codes).sum().item()
        fitted = (counts * codes * values).sum().item() / norm if norm else 0.0
        if fitted <= 0 or (error := _error(values, counts, fitted, 0.0, low, high)) >= least:
            break
        best, least = fitted, error
    return best, least


def least_scale_and_offset(values: Tensor, counts: Tensor, levels: int) -> tuple[float, float]:
    """The scale and the offset of least squared error for codes from 0 to `levels - 1`.

    The ends of the range move in turn, from that of all values and from those that need no offset.

    Args:
        values: Values that occur, finite and not all equal.
        counts: How often each does.
        levels: Number of codes.
    """
    top = levels - 1
    starts = [(values.min().item(), values.max().item())]
    for low in (0, -levels // 2):
        scale, _ = least_scale(values, counts, low, low + top)
        starts.append((scale * low, scale * (low + top)))

    def error(lower: float, upper: float) -> float:
        return _error(values, counts, (upper - lower) / top, lower, 0, top)

    lower, upper = min(starts, key=lambda ends: error(*ends))
    least, middle = error(lower, upper), _median(values, counts)
    for _ in range(_ROUNDS):
        for share in torch.logspace(-2, 0, _ENDS, dtype=torch.float64).tolist():
            end = middle + (values.min().item() - middle) * share
            if end < upper and (found := error(end, upper)) < least:
                lower, least = end, found
            end = middle + (values.max().item() - middle) * share
            if end > lower and (found := error(lower, end)) < least:
                upper, least = end, found
    scale, offset, total = (upper - lower) / top, lower, counts.sum()
    for _ in range(_REFINEMENTS):  # the line through values over codes
        codes = ((values - offset) / scale).round_().clamp_(0, top)
        mean_code, mean = (counts * codes).sum() / total, (counts * values).sum() / total
        spread = (counts * (codes - mean_code).square()).sum()
        slope = ((counts * (codes - mean_code) * (values - mean)).sum() / spread).item()
        start = (mean - slope * mean_code).item()
        if not slope > 0 or (found := _error(values, counts, slope, start, 0, top)) >= least:
            break
        scale, offset, least = slope, start, found
    return scale, offset


def _scales(values: Tensor, counts: Tensor, low: int, high: int) -> Iterator[float]:
    reach = max(values.max().item() / high, values.min().item() / low if low else 0.0)
    rms = ((counts * values.square()).sum() / counts.sum()).sqrt().item()
    least = min(0.5 * rms / max(high, -low), reach)
    for share in torch.linspace(0, 1, _SCALES, dtype=torch.float64).tolist():
        yield least * (reach / least) ** share


def _error(values: Tensor, counts: Tensor, scale: float, offset: float, low: int, high: int) -> float:
    found = ((values - offset) / scale).round_().clamp_(low, high).mul_(scale).add_(offset).sub_(values)
    return found.square_().mul_(counts).sum().item()


def _median(values: Tensor, counts: Tensor) -> float:
    order = values.argsort()
    half = torch.searchsorted(counts[order].cumsum(0), counts.sum() / 2)
    return values[order][half].item()

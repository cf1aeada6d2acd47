"""Cross-entropy of rows of logits with its gradient, on a GPU in one pass over memory and in place.

Plain operations write float32 logits, their log-softmax and its gradient, each twice as large as bfloat16
logits. Here a program reads a row, and writes the gradient of the row's loss in its place. The arithmetic is
float32.
"""

import torch
from torch import Tensor

from stableqat.ops.dispatch import kernels_serve

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without Triton, as on a Mac
    triton = None

IGNORED = -100
_COLUMNS = 4096  # logits that a program handles at a time
_WARPS = 8


def fused_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The cross-entropy of each row, and the gradient of their sum by the logits.

    Args:
        logits: `(rows, vocab)` on a GPU, contiguous; the gradient overwrites them.
        labels: `(rows,)` entries of the vocabulary; -100 is ignored.

    Returns:
        Losses `(rows,)` in float32, 0 where the label is ignored and NaN where it is no entry; and the
        gradient in the logits' memory and type. None where no kernel serves the logits, which stay as they
        are.
    """
    if triton is None or not kernels_serve(logits) or not logits.is_contiguous():
        return None
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device(logits.device):
            _kernel[(rows,)](logits, labels, losses, vocab, IGNORED, _COLUMNS, num_warps=_WARPS)
    return losses, logits.detach()


if triton is not None:

    @triton.jit
    def _kernel(
        logits_ptr, labels_ptr, losses_ptr, vocab, IGNORED: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        """One program per row: the sum of exponentials lane by lane, then the gradient."""
        row = tl.program_id(0)
        label = tl.load(labels_ptr + row)
        counts = label != IGNORED
        logits_ptr += row.to(tl.int64) * vocab
        known = (label >= 0) & (label < vocab)
        chosen = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        column = tl.arange(0, COLUMNS)
        peaks = tl.full([COLUMNS], -3e38, tl.float32)
        sums = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, vocab, COLUMNS):
            x = tl.load(logits_ptr + start + column, mask=start + column < vocab, other=float("-inf"))
            x = x.to(tl.float32)
            higher = tl.maximum(peaks, x)
            sums = sums * tl.exp(peaks - higher) + tl.exp(x - higher)
            peaks = higher
        peak = tl.max(peaks, 0)
        normalizer = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))
        tl.store(losses_ptr + row, tl.where(counts, normalizer - chosen, 0.0))
        tl.debug_barrier()  # every thread has read the label's logit
        for start in range(0, vocab, COLUMNS):
            at = start + column
            x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - normalizer) - (at == label).to(tl.float32)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits_ptr + at, gradient, mask=at < vocab)

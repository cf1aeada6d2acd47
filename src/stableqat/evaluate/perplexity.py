"""Perplexity of a text: exp of the summed negative log-likelihood over the number of scored tokens.

Blocks, as in GPTQ's figures for WikiText: the tokens are cut into non-overlapping blocks, each is scored
without what came before, all its tokens but the first; the tail that fills no block is left out. Strided: a
window of the same length moves by `stride` tokens and scores those that no earlier window has, so that each
has at least block_size - stride tokens before it (the first window apart); all tokens of the text but the
first are scored, once. Losses of tokens are computed in float32 and summed in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from math import exp, inf
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from stableqat.data.text_rows import PackedRows, TokenRows
from stableqat.errors import UserError
from stableqat.evaluate.processes import Share


@dataclass(frozen=True)
class Windows:
    """What is scored, a window after the other.

    Attributes:
        count: Number of windows.
        window: Tokens of a window, and from which of them on they are scored.
        how: The definition in words.
    """

    count: int
    window: Callable[[int], tuple[np.ndarray, int]]
    how: str


def blocks(rows: TokenRows, block_size: int, count: int | None = None) -> Windows:
    """Non-overlapping blocks.

    Args:
        rows: Rows of `block_size` tokens.
        block_size: Their length, for the record.
        count: Take the first so many; None takes all.
    """
    how = f"non-overlapping blocks of {block_size} tokens, all but the first of each"
    return Windows(min(count or len(rows), len(rows)), lambda index: (rows.row(index), 1), how)


def strided(rows: TokenRows, block_size: int, stride: int) -> Windows:
    """Overlapping windows.

    Args:
        rows: Rows over one run of tokens.
        block_size: Tokens of a window.
        stride: Tokens by which it moves.

    Raises:
        UserError: If tokens would be left out, or the rows are those of several sources.
    """
    if not 0 < stride < block_size:
        raise UserError(f"stride: must be from 1 to block_size - 1 ({block_size - 1}), not {stride}")
    if not isinstance(rows, PackedRows):
        raise UserError("stride: needs one text, and the run's data is a mixture; name one with --data")

    def window(index: int) -> tuple[np.ndarray, int]:
        start = index * stride
        stop = min(start + block_size, rows.num_tokens)
        return rows.tokens(start, stop), block_size - stride if index else 1

    count = 1 + max(0, -(-(rows.num_tokens - block_size) // stride))
    how = f"windows of {block_size} tokens at every {stride}th, each token but the text's first once"
    return Windows(count, window, how)


@torch.no_grad()
def perplexity(
    model: Any, windows: Windows, *, batch_size: int, device: torch.device, share: Share
) -> dict[str, Any]:
    """Score windows with a causal language model.

    Args:
        model: Model of transformers, in evaluation mode.
        windows: What to score.
        batch_size: Windows a forward.
        device: Where the model is.
        share: This process's share of the windows.

    Returns:
        `loss` in nats, `perplexity`, number of scored `tokens` and of `windows`, and `how`.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    mine = range(share.rank, windows.count, share.count)
    for batch, first in _batches(windows, mine, batch_size):
        tokens = torch.from_numpy(batch.astype(np.int64)).to(device)
        logits = model(input_ids=tokens, use_cache=False).logits
        for row, target, start in zip(
            logits, tokens, first, strict=True
        ):  # one at a time: float32 logits are large
            losses = F.cross_entropy(row[start - 1 : -1].float(), target[start:], reduction="none")
            sums += torch.stack((losses.double().sum(), sums.new_tensor(len(losses))))
    nll, count = share.total(sums).tolist()
    loss = nll / count
    return {
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else inf,
        "tokens": int(count),
        "windows": windows.count,
        "how": windows.how,
    }


def _batches(windows: Windows, indices: range, batch_size: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Windows of equal length in batches; only the last of a text is shorter."""
    read = (windows.window(index) for index in indices)
    for _, alike in groupby(read, key=lambda window: len(window[0])):
        while chunk := list(islice(alike, batch_size)):
            yield np.stack([tokens for tokens, _ in chunk]), [first for _, first in chunk]

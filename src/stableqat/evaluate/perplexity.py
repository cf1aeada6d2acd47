"""Perplexity of a text: exp of the summed negative log-likelihood over the number of scored tokens.

Blocks, as in GPTQ's figures for WikiText: the tokens are cut into non-overlapping blocks. Each block is
scored by itself, all its tokens but the first; a tail that does not fill a block is left out. Strided: a
window of the same length moves by `stride` tokens and scores those that no earlier window has scored, so each
(except in the first window) has at least block_size - stride tokens before it; every token of the text but
the first is scored once. Token losses are computed in float32 and summed in float64.
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
    """What to score, window by window.

    Attributes:
        count: Number of windows.
        window: Returns the tokens of a window and the index of the first one to score.
        how: The definition in words.
    """

    count: int
    window: Callable[[int], tuple[np.ndarray, int]]
    how: str


def blocks(rows: TokenRows, block_size: int, count: int | None = None) -> Windows:
    """Make a window of each row.

    Args:
        rows: Rows of `block_size` tokens.
        block_size: Tokens per row, for the record.
        count: Number of rows, the first ones; None takes all.
    """
    how = f"non-overlapping blocks of {block_size} tokens, all but the first of each"
    return Windows(min(count or len(rows), len(rows)), lambda index: (rows.row(index), 1), how)


def strided(rows: TokenRows, block_size: int, stride: int) -> Windows:
    """Make windows that overlap.

    Args:
        rows: Rows of one sequence of tokens.
        block_size: Tokens per window.
        stride: Tokens by which the window moves.

    Raises:
        UserError: If `stride` would leave tokens out, or the rows are a mixture of sources.
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
        batch_size: Windows per forward pass.
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
        # one at a time, because float32 logits are large
        for row, target, start in zip(logits, tokens, first, strict=True):
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
    """Batch windows of equal length; only the last of a text is shorter."""
    read = (windows.window(index) for index in indices)
    for _, alike in groupby(read, key=lambda window: len(window[0])):
        while chunk := list(islice(alike, batch_size)):
            yield np.stack([tokens for tokens, _ in chunk]), [first for _, first in chunk]

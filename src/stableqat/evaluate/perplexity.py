"""Perplexity of a text: exp of the summed negative log-likelihood over the number of scored tokens.

Only tokens with a label count: all of a text, and what the assistant writes of a conversation. Blocks, as in
GPTQ's figures for WikiText: the tokens are cut into non-overlapping blocks. Each block is
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

from stableqat.data.text_rows import IGNORED, PackedRows, TokenRows, stacked
from stableqat.errors import UserError
from stableqat.evaluate.processes import Share


@dataclass(frozen=True)
class Windows:
    """What to score, window by window.

    Attributes:
        count: Number of windows.
        window: Returns the tokens of a window, labels for those to score, and positions if they restart.
        how: The definition in words.
    """

    count: int
    window: Callable[[int], dict[str, np.ndarray]]
    how: str


def blocks(rows: TokenRows, block_size: int, count: int | None = None) -> Windows:
    """Make a window of each row.

    Args:
        rows: Rows of `block_size` tokens.
        block_size: Tokens per row, for the record.
        count: Number of rows, the first ones; None takes all.
    """
    how = f"non-overlapping blocks of {block_size} tokens, all but the first of each"
    if rows.hold_conversations:
        how = f"conversations in rows of {block_size} tokens, those that have labels"
    return Windows(min(count or len(rows), len(rows)), rows.sample, how)


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
        kind = "conversations" if rows.hold_conversations else "a mixture"
        raise UserError(f"stride: needs one text, and the data is {kind}; name one with --data")

    def window(index: int) -> dict[str, np.ndarray]:
        start = index * stride
        tokens = rows.tokens(start, min(start + block_size, rows.num_tokens))
        labels = tokens.copy()
        labels[: block_size - stride if index else 1] = IGNORED
        return {"input_ids": tokens, "labels": labels}

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
    for batch in _batches(windows, mine, batch_size):
        labels = batch.pop("labels").to(device)
        logits = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
        # one at a time, because float32 logits are large
        for row, asked in zip(logits, labels[:, 1:], strict=True):
            losses = F.cross_entropy(row[:-1].float(), asked, ignore_index=IGNORED, reduction="none")
            sums += torch.stack((losses.double().sum(), (asked != IGNORED).sum()))
    nll, count = share.total(sums).tolist()
    loss = nll / count
    return {
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else inf,
        "tokens": int(count),
        "windows": windows.count,
        "how": windows.how,
    }


def _batches(windows: Windows, indices: range, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batch windows of equal length; only the last of a text is shorter."""
    read = (windows.window(index) for index in indices)
    for _, alike in groupby(read, key=lambda window: len(window["input_ids"])):
        while chunk := list(islice(alike, batch_size)):
            yield stacked(chunk)

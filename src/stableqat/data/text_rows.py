"""Rows of tokens: windows of `block_size` over one flat run of tokens that stays on disk.

Memory use is constant, another block_size needs no new tokenization, and the rows in sequence are the
documents in sequence, without the tail of a split that does not fill a row. Attention crosses document
boundaries, as in GPT-3's pretraining.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stableqat.data.order import PAD, Key

if TYPE_CHECKING:
    from datasets import Dataset


#: The label of a token that the model need not predict.
IGNORED = -100


class TokenRows:
    """Turns keys into a batch; a subclass provides the rows.

    Attributes:
        hold_conversations: Whether rows hold whole conversations, not parts of one run of tokens.
    """

    hold_conversations = False

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One row: `input_ids`, `labels`, and `position_ids` where documents must not see others."""
        raise NotImplementedError

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        samples = [self.sample(max(index, 0)) for *_, index in keys]
        batch = stacked(samples)
        batch["labels"][torch.tensor([index == PAD for *_, index in keys])] = IGNORED
        return batch


def stacked(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows as a batch; if one has positions, all have."""
    if any("position_ids" in sample for sample in samples):
        samples = [{"position_ids": np.arange(len(each["input_ids"])), **each} for each in samples]
    stack = partial(np.stack, dtype=np.int64, casting="unsafe")
    return {key: torch.from_numpy(stack([sample[key] for sample in samples])) for key in samples[0]}


class PackedRows(TokenRows):
    """Rows of `block_size` tokens over a data set's `input_ids`, read from its memory map.

    Args:
        documents: Data set with a column `input_ids`.
        block_size: Tokens per row.
    """

    def __init__(self, documents: "Dataset", block_size: int):
        self.documents, self.block_size = documents, block_size
        column = documents.data.column("input_ids")
        self.chunks = [chunk.flatten().to_numpy() for chunk in column.chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)
        self.num_tokens = int(self.ends[-1]) if self.chunks else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (self.documents, self.block_size)

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    @property
    def lack(self) -> str:
        """Why there is no row, and what to do."""
        return (
            f"{self.num_tokens} tokens, less than one row of block_size {self.block_size}: lower block_size "
            "or give more text"
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat run."""
        pieces = []
        chunk = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = int(self.ends[chunk]) - len(self.chunks[chunk])
            pieces.append(self.chunks[chunk][start - first : stop - first])
            start, chunk = int(self.ends[chunk]), chunk + 1
        return np.concatenate(pieces)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One row, of which each token has a label."""
        tokens = self.tokens(index * self.block_size, (index + 1) * self.block_size)
        return {"input_ids": tokens, "labels": tokens}


class MixedRows(TokenRows):
    """The rows of several sources, laid end to end.

    Args:
        parts: The rows of each source.
        spread: Space the rows of each source evenly instead, so that any first part of the whole holds each
            source's share.
    """

    def __init__(self, parts: Sequence[TokenRows], *, spread: bool = False):
        self.parts = list(parts)
        self.hold_conversations = all(part.hold_conversations for part in parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.order: np.ndarray | None = None
        if spread:
            places = [(np.arange(len(part)) + 0.5) / len(part) for part in parts]
            self.order = np.argsort(np.concatenate(places), kind="stable")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """One row."""
        if self.order is not None:
            index = int(self.order[index])
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].sample(index - int(self.starts[part]))

"""Rows of whole conversations: tokens, the labels among them, and where each conversation begins.

Conversations that are longer than a row are cut. With packing, each goes to the fullest row that still takes
it, the longest first (best-fit decreasing); rows follow one another in the order of their first
conversations, and what is in a row depends on the lengths alone. The rest of a row is padding without
labels. The first token of a conversation has no label either, so packed and unpacked rows ask for the same.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from stableqat.data.chat import Records
from stableqat.data.text_rows import IGNORED, TokenRows
from stableqat.errors import counted

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

LossOn = Literal["assistant", "all"]
KEPT = 0.99  # share of the conversations that rows should hold whole
_CUT = 0.03  # share whose cutting is a warning
_STEP = 32  # tokens in which rows grow


class _Lists:
    """A column of lists of numbers, read from its memory map."""

    def __init__(self, column: Any):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        offsets = self._offsets[chunk]
        at = index - int(self._ends[chunk]) + len(offsets) - 1
        return self._values[chunk][offsets[at] : offsets[at + 1]]

    def flat(self) -> np.ndarray:
        """The numbers of all lists."""
        parts = zip(self._values, self._offsets, strict=True)
        return np.concatenate([np.empty(0, np.int32), *(v[o[0] : o[-1]] for v, o in parts)])


class ConversationRows(TokenRows):
    """Rows of `block_size` tokens that hold whole conversations.

    Args:
        conversations: Data set with the columns `input_ids` and `spans`.
        block_size: Tokens per row.
        padding: The token that fills a row.
        loss_on: Which tokens have labels.
        packing: Put several conversations in a row.
        attend_across: Let the conversations of a row see those before them; otherwise positions restart with
            each, which tells transformers to keep them apart.

    Attributes:
        cut: Number of conversations that are longer than a row.
        unlabelled: Number of conversations that are left out, as no label is in their part of a row.
    """

    hold_conversations = True

    def __init__(
        self,
        conversations: "Dataset",
        block_size: int,
        padding: int,
        *,
        loss_on: LossOn = "assistant",
        packing: bool = True,
        attend_across: bool = False,
    ):
        self.conversations, self.block_size, self.padding = conversations, block_size, padding
        self.loss_on, self.packing, self.attend_across = loss_on, packing, attend_across
        self._tokens = _Lists(conversations.data.column("input_ids"))
        self._spans = _Lists(conversations.data.column("spans"))
        taken = np.minimum(self._tokens.lengths, block_size)
        labelled = self._labelled(taken) if loss_on == "assistant" else taken > 1
        self.cut = int((self._tokens.lengths > block_size).sum())
        self.unlabelled = int((~labelled).sum())
        kept = np.flatnonzero(labelled)
        rows = best_fit(taken[kept], block_size) if packing else np.arange(len(kept))
        self._kept = kept[np.argsort(rows, kind="stable")]
        self._starts = np.cumsum([0, *np.bincount(rows)]) if len(kept) else np.zeros(1, np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        how: dict[str, Any] = {
            "loss_on": self.loss_on,
            "packing": self.packing,
            "attend_across": self.attend_across,
        }
        return partial(ConversationRows, **how), (self.conversations, self.block_size, self.padding)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each conversation, before it is cut."""
        return self._tokens.lengths

    @property
    def lack(self) -> str:
        """Why there is no row, and what to do."""
        fitting = rows_for(self.lengths) if self.cut else 0
        remedy = f"raise block_size to {fitting}, or " if fitting > self.block_size else ""
        return f"no label within block_size {self.block_size}: {remedy}give more conversations"

    def _labelled(self, taken: np.ndarray) -> np.ndarray:
        """Whether any token that a row takes of a conversation, but the first, has a label."""
        starts, stops = self._spans.flat().reshape(-1, 2).T
        owner = np.repeat(np.arange(len(taken)), self._spans.lengths // 2)
        inside = np.minimum(stops, taken[owner]) > np.maximum(starts, 1)
        return np.bincount(owner[inside], minlength=len(taken)) > 0

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """The tokens and labels of one row, and the positions if they restart."""
        size = self.block_size
        tokens, labels = np.full(size, self.padding, np.int32), np.full(size, IGNORED, np.int32)
        positions, place = np.arange(size), 0
        for number in self._kept[self._starts[index] : self._starts[index + 1]]:
            run = self._tokens[number][:size]
            spans = self._spans[number].tolist() if self.loss_on == "assistant" else [0, len(run)]
            tokens[place : place + len(run)] = run
            for start, stop in zip(spans[::2], spans[1::2], strict=True):
                asked = slice(max(start, 1), stop)
                labels[place : place + len(run)][asked] = run[asked]
            positions[place:] = np.arange(size - place)
            place += len(run)
        positions[place:] = np.arange(size - place)
        sample = {"input_ids": tokens, "labels": labels}
        apart = self.packing and not self.attend_across
        return sample | ({"position_ids": positions} if apart else {})


@rank_zero_only
def report(source: str, records: Records, rows: Sequence[ConversationRows]) -> None:
    """Log what a source holds, and what the rows of its splits leave out."""
    number, first = sum(len(each.conversations) for each in rows), rows[0]
    on = "the assistant's tokens" if first.loss_on == "assistant" else "all tokens"
    log.info("data: %s, %s, loss on %s", records.words, counted(number, "conversation"), on)
    cut = sum(each.cut for each in rows)
    if cut > _CUT * number:
        fitting = rows_for(np.concatenate([each.lengths for each in rows]))
        log.warning(
            "data: %d of %s longer than block_size %d, and cut; block_size %d keeps %.0f%% of them whole, if "
            "the model has as many positions",
            *(cut, counted(number, "conversation"), first.block_size, fitting, 100 * KEPT),
        )
    elif cut:
        log.info(
            "data: %s longer than block_size %d, and cut", counted(cut, "conversation"), first.block_size
        )
    if lost := sum(each.unlabelled for each in rows):
        log.warning("data: %s left out of %s: no label in a row", counted(lost, "conversation"), source)


def rows_for(lengths: np.ndarray) -> int:
    """The tokens of a row that holds nearly every conversation whole, a share of `KEPT`.

    Args:
        lengths: Tokens of each conversation, at least one.
    """
    longest = int(np.quantile(lengths, KEPT, method="higher"))
    return -(-longest // _STEP) * _STEP


def lengths_of(conversations: "Dataset") -> np.ndarray:
    """The tokens of each conversation of a data set with the column `input_ids`."""
    return _Lists(conversations.data.column("input_ids")).lengths


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of each run of tokens, rows numbered in the order of their first runs.

    Args:
        lengths: Tokens of each run, from 1 to `size`.
        size: Tokens of a row.
    """
    found = np.empty(len(lengths), np.int64)
    free: list[list[int]] = [[] for _ in range(size)]  # rows by the tokens that they still take
    sizes, rows = 0, 0  # bit n: a row takes n tokens
    for run in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[run])
        if fitting := sizes >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            row = free[left].pop()
            if not free[left]:
                sizes ^= 1 << left
        else:
            left, row, rows = size, rows, rows + 1
        if left > length:
            free[left - length].append(row)
            sizes |= 1 << left - length
        found[run] = row
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]

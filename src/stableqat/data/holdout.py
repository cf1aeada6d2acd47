"""Which samples validate if a source has no validation split: one rule for documents, one for images.

A document is held out if the hash of its text, as a number in [0, 1), is below the wanted share. Nothing else
counts: a raw folder, the set that `data tokenize` makes of it, a sample of it and a mixture of them validate
on the same documents, equal documents stay on one side, and a smaller share is a subset of a larger one. The
price: the share is met on average, not exactly. If no hash of a few documents is below it, the document with
the lowest one is held out. Of a single document the end is. Images are held out evenly from each class.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from stableqat.errors import UserError

_HASHES = 2**63


def document_hash(text: str) -> int:
    """A hash of 63 bits that depends only on the text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hash_cutoff(share: float, hashes: Iterable[int] = (), source: str = "") -> int:
    """The number below which the hashes of held-out documents lie.

    Args:
        share: Share of the documents to hold out, on average.
        hashes: Hashes of documents that must not all fall on one side; read until both sides have one.
        source: The user's name for these documents.

    Raises:
        UserError: If all these documents are one and the same.
    """
    cutoff = int(share * _HASHES)
    lowest, highest = _HASHES, -1
    for number in hashes:
        lowest, highest = min(lowest, number), max(highest, number)
        if lowest < cutoff <= highest:
            return cutoff
    if lowest == highest:
        raise UserError(
            f"{source} is a single document, of which no part is held out: put it into a folder "
            "as train.txt beside a validation.txt (or .jsonl, .parquet), or give a document per line as jsonl"
        )
    return cutoff if highest < 0 else min(max(cutoff, lowest + 1), highest)


def cut(text: str, share: float) -> tuple[str, str]:
    """A single document as what trains and what validates: its end, from a line's start.

    Args:
        text: The document.
        share: Share of its characters that validates, at least.
    """
    place = int(len(text) * (1 - share))
    place = text.rfind("\n", 0, place) + 1 or place
    return text[:place], text[place:]


@dataclass(frozen=True)
class HeldOut:
    """Which documents of a train split do not train.

    Args:
        cutoff: Documents with a hash below it validate.
        listed: Sorted hashes of the documents of other splits, which do not train as well.
        end: Share of each document's end that validates, where the train split is a single one.
    """

    cutoff: int
    listed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    end: float = 0

    def parts(self, text: str) -> list[tuple[str, str]]:
        """What becomes of a document of the train split: splits and texts; nothing if it is left out."""
        split = self.split(document_hash(text))
        if split == "train" and self.end:
            return [
                each for each in zip(("train", "validation"), cut(text, self.end), strict=True) if each[1]
            ]
        return [] if split is None else [(split, text)]

    def split(self, number: int) -> Literal["train", "validation"] | None:
        """The split that a document of the train split goes to, by its hash; None leaves it out."""
        if len(self.listed):
            place = self.listed.searchsorted(number)
            if place < len(self.listed) and self.listed[place] == number:
                return None
        return "validation" if number < self.cutoff else "train"


def check_share(validation_fraction: float) -> None:
    """Refuse a share of the samples that holds out none or all."""
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction: must lie between 0 and 1, not {validation_fraction}")


def held_out_images(labels: np.ndarray, fraction: float) -> np.ndarray:
    """A mask of the held-out images: in each class, in order, every (1/fraction)-th one.

    Args:
        labels: Class of each image, shape (n,).
        fraction: Share of each class to hold out, in (0, 1).
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    # The small excess keeps products such as 5 * 0.2 on the right side of the integer.
    return np.floor((rank + 1) * fraction + 1e-9) > np.floor(rank * fraction + 1e-9)

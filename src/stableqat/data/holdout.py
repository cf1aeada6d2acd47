"""Which samples validate where a source has no validation split: one rule for documents, one for images.

A document is held out if the hash of its text, as a number in [0, 1), lies below the wanted share. The rule
looks at nothing else: a raw folder, the set that `data tokenize` makes of it, a sample of it and a mixture
of them validate on the same documents, equal documents stay on one side, and a smaller share is part of a
larger one. The price: the share is met on average, not exactly. Of few documents, where none falls below it,
the lowest hash is held out. Images are held out evenly from each class.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from stableqat.errors import UserError

_HASHES = 2**63


def document_hash(text: str) -> int:
    """Return 63 bits that depend on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def hash_cutoff(share: float, hashes: Iterable[int] = (), source: str = "") -> int:
    """Return the number below which the hashes of held-out documents lie.

    Args:
        share: of the documents, held out on average.
        hashes: of documents that must not all fall on one side; read only until both sides have one.
        source: what the user calls these documents.

    Raises:
        UserError: all of these documents are one and the same.
    """
    cutoff = int(share * _HASHES)
    lowest, highest = _HASHES, -1
    for number in hashes:
        lowest, highest = min(lowest, number), max(highest, number)
        if lowest < cutoff <= highest:
            return cutoff
    if lowest == highest:
        raise UserError(
            f"{source} is a single document, and validation takes whole ones: "
            "put it in a folder beside a validation file"
        )
    return cutoff if highest < 0 else min(max(cutoff, lowest + 1), highest)


@dataclass(frozen=True)
class HeldOut:
    """Which documents of a train split do not train.

    Args:
        cutoff: documents whose hash lies below it validate.
        listed: sorted hashes of the documents of other splits, which do not train a second time.
    """

    cutoff: int
    listed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def split(self, number: int) -> Literal["train", "validation"] | None:
        """Return the split that a document of the train split goes to by its hash; None leaves it out."""
        if len(self.listed):
            place = self.listed.searchsorted(number)
            if place < len(self.listed) and self.listed[place] == number:
                return None
        return "validation" if number < self.cutoff else "train"


def check_share(validation_fraction: float) -> None:
    """Raise UserError for a share of the samples that holds out none or all."""
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction: must lie between 0 and 1, not {validation_fraction}")


def held_out_images(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Return a mask of the held-out images: in each class, in order, every (1/fraction)-th.

    Args:
        labels: class of each image, shape (n,).
        fraction: share of each class to hold out, in (0, 1).
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    # The small excess keeps 5 * 0.2 and the like on the side of the integer that they mean.
    return np.floor((rank + 1) * fraction + 1e-9) > np.floor(rank * fraction + 1e-9)

"""Images and labels by key: the rows of an image split.

Every random choice of an augmentation is drawn from (seed, epoch, image), so that a run sees the same pixels
with any number of workers and wherever it resumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stableqat.data.image_file import look, read
from stableqat.data.order import PAD, Key, sample_rng

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

#: Headers of a split that are read before training, in a second or two.
_LOOKED_AT = 20_000


@dataclass(frozen=True)
class ImageReader:
    """Opens some of a data set's images by index, upright and in RGB.

    Args:
        rows: data set whose image column is not decoded.
        column: the image column.
        chosen: the rows that make this split.
        source: what the user called the data set, for messages.
    """

    rows: "Dataset"
    column: str
    chosen: np.ndarray
    source: str

    def __call__(self, index: int) -> "Image":
        """Return one image, decoded.

        Raises:
            UserError: it cannot be read or is of an unsupported kind; names the file, or the row.
        """
        return read(*self._record(int(self.chosen[index])))

    def look(self) -> None:
        """Read the headers of images that are files of their own, of very many only every k-th.

        Raises:
            UserError: one of them is of an unsupported kind; names the file.
        """
        for row in self.chosen[:: len(self.chosen) // _LOOKED_AT + 1].tolist():
            source, where = self._record(row)
            if isinstance(source, bytes):
                return
            look(source, where)

    def _record(self, row: int) -> tuple[bytes | str, str]:
        """Return the bytes or the path of a row's image, and its name for messages."""
        record = self.rows[row][self.column] or {}
        content, path = record.get("bytes"), record.get("path")
        if isinstance(path, str) and not content:
            return path, path
        return content or b"", f"{self.source} row {row}"


@dataclass(frozen=True)
class ImageRows:
    """Images and labels by key.

    Args:
        read: index -> image.
        labels: class of each image, shape (n,).
        transform: image -> tensor of shape (channels, height, width); may draw from the global generators.
    """

    read: Callable[[int], Any]
    labels: np.ndarray
    transform: Callable[[Any], torch.Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        images, labels = [], []
        for seed, epoch, index in keys:
            image = self.read(max(index, 0))
            with sample_rng(seed, epoch, max(index, 0)):
                images.append(self.transform(image))
            labels.append(-100 if index == PAD else int(self.labels[index]))
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

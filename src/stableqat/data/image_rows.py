"""Images and labels by key: the rows of an image split.

Every random choice of an augmentation is drawn from (seed, epoch, image), so that a run sees the same pixels
with any number of workers, wherever it resumes.
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

#: How many headers of a split are read before training, which takes a second or two.
_LOOKED_AT = 20_000


@dataclass(frozen=True)
class ImageReader:
    """Opens some images of a data set by index, upright and in RGB.

    Args:
        rows: Data set whose image column is not decoded.
        column: The image column.
        chosen: The rows of this split.
        source: The user's name for the data set, for messages.
    """

    rows: "Dataset"
    column: str
    chosen: np.ndarray
    source: str

    def __call__(self, index: int) -> "Image":
        """One image, decoded.

        Raises:
            UserError: If it cannot be read or is of an unsupported kind; names the file or the row.
        """
        return read(*self._record(int(self.chosen[index])))

    def look(self) -> None:
        """Read the headers of images that are separate files; if there are very many, only of every k-th.

        Raises:
            UserError: If one of them is of an unsupported kind; names the file.
        """
        for row in self.chosen[:: len(self.chosen) // _LOOKED_AT + 1].tolist():
            source, where = self._record(row)
            if isinstance(source, bytes):
                return
            look(source, where)

    def _record(self, row: int) -> tuple[bytes | str, str]:
        """The bytes or the path of a row's image, and its name for messages."""
        record = self.rows[row][self.column] or {}
        content, path = record.get("bytes"), record.get("path")
        if isinstance(path, str) and not content:
            return path, path
        return content or b"", f"{self.source} row {row}"


@dataclass(frozen=True)
class ImageRows:
    """Images and labels by key.

    Args:
        read: Gives the image of an index.
        labels: Class of each image, shape (n,).
        transform: Makes a tensor of shape (channels, height, width) from an image; may draw from the global
            generators.
    """

    read: Callable[[int], Any]
    labels: np.ndarray
    transform: Callable[[Any], torch.Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        images, labels = [], []
        with sample_rng() as begin:
            for seed, epoch, index in keys:
                image = self.read(max(index, 0))
                begin(seed, epoch, max(index, 0))
                images.append(self.transform(image))
                labels.append(-100 if index == PAD else int(self.labels[index]))
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

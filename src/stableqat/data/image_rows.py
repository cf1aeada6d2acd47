"""Images and labels by key: the rows of an image split.

Every random choice of an augmentation is drawn from (seed, epoch, image), so that a run sees the same pixels
with any number of workers, wherever it resumes.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stableqat.data.image_cache import ImageCache
from stableqat.data.image_file import look, read
from stableqat.data.order import PAD, Key, sample_rng
from stableqat.errors import UserError

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
        cache: Keeps decoded images; None keeps none.
    """

    rows: "Dataset"
    column: str
    chosen: np.ndarray
    source: str
    cache: ImageCache | None = None

    def __call__(self, index: int) -> "Image":
        """One image, decoded.

        Raises:
            UserError: If it cannot be read or is of an unsupported kind; names the file or the row.
        """
        from PIL.Image import fromarray

        if self.cache is not None and (pixels := self.cache.get(index)) is not None:
            return fromarray(pixels)
        image = read(*self._record(int(self.chosen[index])))
        if self.cache is not None and image.size == self.cache.size:
            self.cache.put(index, np.asarray(image))
        return image

    def with_cache(self) -> "ImageReader":
        """One that keeps what it decodes, if all images are few and as small as the first."""
        with suppress(UserError):  # whoever asks for that image is told
            if len(self.chosen) and ImageCache.fits(len(self.chosen), size := self(0).size):
                return replace(self, cache=ImageCache(len(self.chosen), size))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a process that is not forked receives: shared memory does not travel."""
        return self.__dict__ | {"cache": None}

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
        transform: Writes an image into its place in a batch; may draw from the global generators.
        shape: Channels, height and width of what it writes.
    """

    read: Callable[[int], Any]
    labels: np.ndarray
    transform: Callable[[Any, torch.Tensor], None]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        pixels = torch.empty(len(keys), *self.shape)
        labels = []
        with sample_rng() as begin:
            for place, (seed, epoch, index) in zip(pixels, keys, strict=True):
                image = self.read(max(index, 0))
                begin(seed, epoch, max(index, 0))
                self.transform(image, place)
                labels.append(-100 if index == PAD else int(self.labels[index]))
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}

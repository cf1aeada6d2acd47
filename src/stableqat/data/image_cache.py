"""Decoded images of a small data set, kept in memory that the loader's processes share.

An image of CIFAR-10 takes longer to decode than to crop and resize, and comes back every epoch. The memory is
anonymous and inherited by forked workers, so it needs no room in /dev/shm.
"""

import mmap

import numpy as np

#: The most bytes of pixels that a split keeps.
LIMIT = 512 << 20


class ImageCache:
    """Pixels by index, filled by whichever process decodes an image first.

    Args:
        count: The number of images.
        size: Width and height of those that are kept; an image of another size is decoded each time.
    """

    def __init__(self, count: int, size: tuple[int, int]):
        self.size, (width, height) = size, size
        shape = count, height, width, 3
        self._pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self._known = np.frombuffer(mmap.mmap(-1, count), np.uint8)

    @staticmethod
    def fits(count: int, size: tuple[int, int]) -> bool:
        """Whether so many images of this width and height are within the limit."""
        return count * size[0] * size[1] * 3 <= LIMIT

    def get(self, index: int) -> np.ndarray | None:
        """An image's pixels, shape (height, width, 3), or None if no process has decoded it."""
        return self._pixels[index] if self._known[index] else None

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keeps an image's pixels, shape (height, width, 3)."""
        self._pixels[index] = pixels
        self._known[index] = 1

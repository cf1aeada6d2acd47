"""timm's transforms, written straight into a batch, under every Pillow.

At its strongest, timm's `PosterizeIncreasing`, which is part of DeiT's `rand-m9-mstd0.5-inc1`, keeps no bit
of a pixel. Pillow made such an image black; Pillow 13 raises an error, thousands of images into a run. Here
one bit stays.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image


class TimmTransform:
    """A transform of timm whose result lies in the place that a batch has for it.

    The values are the transform's own. An image's steps from bytes to normalised numbers would fill fresh
    memory four times, which takes as long as cropping it.

    Args:
        transform: What `timm.data.create_transform` made: steps on the image, `MaybeToTensor`, `Normalize`,
            and steps that change the tensor in place.
    """

    def __init__(self, transform: Any):
        steps = list(keep_a_bit(transform).transforms)
        at = next(i for i, step in enumerate(steps) if type(step).__name__ == "MaybeToTensor")
        self.on_image, normalize, self.on_tensor = steps[:at], steps[at + 1], steps[at + 2 :]
        self.mean, self.std = (
            torch.as_tensor(each).view(-1, 1, 1) for each in (normalize.mean, normalize.std)
        )

    def __call__(self, image: "Image", out: torch.Tensor) -> None:
        """Transforms an image into `out`, shape (channels, height, width)."""
        for step in self.on_image:
            image = step(image)
        out.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        out.div_(255).sub_(self.mean).div_(self.std)
        for step in self.on_tensor:
            step(out)


def keep_a_bit(transform: Any) -> Any:
    """Let the policies of a transform posterize to one bit at least, in place.

    Args:
        transform: What `timm.data.create_transform` made.
    """
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Any) -> Iterator[Any]:
    for each in getattr(transform, "transforms", ()):
        yield from getattr(each, "ops", ())
        for chosen in getattr(each, "policy", ()):
            yield from chosen


def _posterize(image: "Image", bits_to_keep: int, **_: Any) -> "Image":
    from PIL import ImageOps

    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))

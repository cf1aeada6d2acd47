"""timm's augmentation policies under every Pillow.

At its strongest, timm's `PosterizeIncreasing`, which is part of DeiT's `rand-m9-mstd0.5-inc1`, keeps no bit
of a pixel. Pillow made such an image black; Pillow 13 raises an error, thousands of images into a run. Here
one bit stays.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


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

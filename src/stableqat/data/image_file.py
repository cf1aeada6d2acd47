"""One image file, upright and in 8-bit RGB: the same pixels for training, validation and evaluation.

Only a fixed list of formats is opened: for some others, such as EPS, Pillow starts a program that interprets
the file. The file defines the black and white of deeper pixels: 16-bit grey ends at 65535, 12-bit grey at
4095, and floating point lies in [0, 1]; an image without a defined white is refused. The orientation that a
camera records is applied. Transparency and colour profiles are dropped, as in timm and torchvision, and only
the first frame of an animation counts.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from stableqat.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
#: Longest side over shortest: the resize of a longer strip would fill the memory.
_MAX_RATIO = 1000
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
#: Modes whose white Pillow knows, each with the mode that it passes through on the way to RGB.
_KNOWN = dict.fromkeys(("1", "L", "LA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB")
_KNOWN |= {"P": "RGBA", "PA": "RGBA", "La": "LA"}


def look(source: bytes | str, where: str) -> None:
    """Read an image's header only.

    Args:
        source: Encoded bytes, or a path.
        where: The image's name, for messages.

    Raises:
        UserError: If its format, size or pixels are not supported.
    """
    with _opened(source, where):
        pass


def read(source: bytes | str, where: str) -> "Image":
    """An image in RGB, upright.

    Args:
        source: Encoded bytes, or a path.
        where: The image's name, for messages.

    Raises:
        UserError: If it cannot be read, or its pixels have no defined white.
    """
    with _opened(source, where) as image:
        image.load()  # this rotates a TIFF, and reads the metadata at the end of a PNG
        return _upright(_rgb(image, where), _orientation(image))


@contextmanager
def _opened(source: bytes | str, where: str) -> Iterator["Image"]:
    import PIL.Image

    if isinstance(source, str) and not os.path.isfile(source):  # a parquet file may name anything
        raise UserError(f"{where} is not a file: repair or remove it")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with PIL.Image.open(file, "r", FORMATS) as image:
            width, height = image.size
            if max(width, height) > _MAX_RATIO * min(width, height):
                raise UserError(f"{where} is a strip of {width} x {height} pixels: crop or remove it")
            if image.mode not in _KNOWN and _white(image) is None:
                raise UserError(
                    f"{where} has pixels without a defined white (Pillow's mode {image.mode}): "
                    "convert it to 8 or 16 bits, or remove it"
                )
            yield image
    except UserError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{where} has too many pixels to be safe: scale it down or remove it") from error
    except PIL.UnidentifiedImageError as error:
        fault = f"{where} is not a readable image (PNG, JPEG, WebP, BMP, TIFF or GIF)"
        raise UserError(f"{fault}: convert, repair or remove it") from error
    except Exception as error:  # every decoder raises errors of its own on damaged files
        raise UserError(f"{where} is not a readable image: repair or remove it") from error


def _white(image: "Image") -> float | None:
    """The value of white in an image of deep grey pixels; None if the file defines none."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        return 2.0 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    if image.mode == "I" and image.format == "PNG":  # how Pillow before 11.3 opens 16 bits
        return 65535
    return 1 if image.mode == "F" else None


def _rgb(image: "Image", where: str) -> "Image":
    import PIL.Image

    if (white := _white(image)) is None:
        return image.convert(_KNOWN[image.mode]).convert("RGB")
    grey = np.asarray(image).astype(np.float64) / white
    if not (grey.min() >= 0 and grey.max() <= 1):  # NaN neither
        raise UserError(
            f"{where} has values from {grey.min():g} to {grey.max():g}, but pixels in floating point must "
            "lie in [0, 1]: scale it, or remove it"
        )
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    return PIL.Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")


def _orientation(image: "Image") -> int:
    """How the camera was held (1 to 8); 1 if the file does not say."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to refuse sound pixels
        return 1


def _upright(image: "Image", orientation: Any) -> "Image":
    from PIL.Image import Transpose

    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"]  # for orientations from 2 on
    turns += ["ROTATE_270", "TRANSVERSE", "ROTATE_90"]
    turn = dict(enumerate(turns, 2)).get(orientation)
    return image if turn is None else image.transpose(Transpose[turn])

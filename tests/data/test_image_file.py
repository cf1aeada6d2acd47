"""Pictures of every kind of pixel are read as what they show, or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stableqat.data import ImageDataModule
from stableqat.data.image_file import look, read
from stableqat.errors import UserError

GREYS = np.array([[0, 0.25, 0.5, 1]], np.float32)
RGB = np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 200], [255, 255, 255]]], np.uint8)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels, bits, **tags):
    """A TIFF of one strip, little-endian, written by hand: Pillow writes few of these."""
    height, width = pixels[0]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    entries |= {279: len(pixels[1])} | {int(tag[1:]): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(struct.pack("<HHIHH", t, 3, 1, v, 0) for t, v in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + pixels[1]


def png(width, height, depth, colour, rows):
    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


SIXTEEN = np.array([[0, 16384, 32768, 65535]], np.uint16)
TWELVE = bytes([0x00, 0x04, 0x00, 0x80, 0x0F, 0xFF])  # 0, 1024, 2048, 4095
DEEP_GREY = {
    "16-bit PNG": png(4, 1, 16, 0, b"\0" + SIXTEEN.astype(">u2").tobytes()),
    "16-bit TIFF": encoded(Image.fromarray(SIXTEEN), "tiff"),
    "16-bit TIFF, compressed": encoded(Image.fromarray(SIXTEEN), "tiff", compression="tiff_lzw"),
    "16-bit TIFF, white is zero": tiff(((1, 4), (65535 - SIXTEEN).tobytes()), 16, _262=0),
    "12-bit TIFF": tiff(((1, 4), TWELVE), 12),
    "float TIFF": encoded(Image.fromarray(GREYS), "tiff"),
    "float TIFF, white is zero": tiff(((1, 4), (1 - GREYS).tobytes()), 32, _262=0, _339=3),
}


@pytest.mark.parametrize("case", DEEP_GREY)
def test_deep_grey_keeps_its_greys(case):
    pixels = np.asarray(read(DEEP_GREY[case], "it"))
    assert pixels.shape == (1, 4, 3)
    assert np.abs(pixels / 255 - GREYS[..., None]).max() <= 1 / 255


def test_big_endian_sixteen_bits():
    grey = Image.frombytes("I;16B", (4, 1), SIXTEEN.astype(">u2").tobytes())
    assert np.asarray(read(encoded(grey, "tiff"), "it"))[0, :, 0].tolist() == [0, 64, 128, 255]


RGB16 = (RGB.astype(np.uint16) * 257).astype(">u2")
COLOURS = {
    "RGB": (encoded(Image.fromarray(RGB), "png"), 0),
    "16-bit RGB PNG": (png(4, 1, 16, 2, b"\0" + RGB16.tobytes()), 0),
    "transparency": (
        encoded(Image.fromarray(np.dstack([RGB, [[0, 1, 128, 255]]]).astype(np.uint8)), "png"),
        0,
    ),
    "palette": (encoded(Image.fromarray(RGB).quantize(4), "png"), 0),
    "palette with transparency": (
        encoded(Image.fromarray(RGB).quantize(4), "png", transparency=b"\0\1\2\3"),
        0,
    ),
    "lossless WebP": (encoded(Image.fromarray(RGB), "webp", lossless=True), 0),
    "GIF": (encoded(Image.fromarray(RGB).quantize(4), "gif"), 0),
    "BMP": (encoded(Image.fromarray(RGB), "bmp"), 0),
    "CMYK TIFF": (encoded(Image.fromarray(RGB).convert("CMYK"), "tiff"), 1),
    "YCbCr TIFF": (encoded(Image.fromarray(RGB).convert("YCbCr"), "tiff", compression="tiff_lzw"), 3),
    "LAB TIFF": (encoded(Image.fromarray(RGB).convert("LAB"), "tiff"), 20),
}


@pytest.mark.parametrize("case", COLOURS)
@pytest.mark.filterwarnings("error")
def test_colours_are_kept(case):
    content, tolerance = COLOURS[case]
    pixels = np.asarray(read(content, "it")).astype(int)
    assert np.abs(pixels - RGB).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_shallow_grey_is_kept(mode):
    grey = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert np.asarray(read(encoded(grey, "png"), "it")).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_upright(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the left upper corner
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    held = Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns)))
    pixels = np.asarray(read(encoded(held, kind, exif=exif), "it"))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() < 60


def test_damaged_notes_of_a_camera_cost_no_picture():
    content = encoded(Image.fromarray(RGB), "png", exif=b"Exif\0\0nonsense")
    assert np.asarray(read(content, "it")).shape == RGB.shape


def forbidden(monkeypatch):
    import subprocess

    def started(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
FLOAT = np.array([[0.5, 1.5]], np.float32)
REFUSED = {
    "EPS": (EPS, r"it is not a readable image \(PNG, JPEG, WebP, BMP, TIFF or GIF\)"),
    "PPM": (b"P6 1 1 255 abc", r"it is not a readable image \(PNG,"),
    "nothing": (b"", r"it is not a readable image \(PNG,"),
    "a bomb": (png(60000, 60000, 8, 2, b"\0"), r"it has too many pixels to be safe: scale it down"),
    "a strip": (png(1, 2000, 8, 0, b"\0\0" * 2000), r"it is a strip of 1 x 2000 pixels"),
    "32-bit whole numbers": (
        encoded(Image.fromarray(np.array([[7]], np.int32)), "tiff"),
        r"it has pixels without a defined white \(Pillow's mode I\): convert it to 8 or 16 bits",
    ),
    "signed 16 bits": (tiff(((1, 1), b"\1\1"), 16, _339=2), r"it has pixels without a defined white"),
}
REFUSED_PIXELS = {
    "cut short": (
        encoded(Image.effect_noise((64, 64), 9), "png")[:900],
        r"it is not a readable image:",
    ),
    "beyond one": (
        encoded(Image.fromarray(FLOAT), "tiff"),
        r"it has values from 0.5 to 1.5, but pixels in",
    ),
    "no number": (encoded(Image.fromarray(FLOAT * np.nan), "tiff"), r"it has values from nan to nan"),
    "beyond white": (encoded(Image.fromarray(-FLOAT), "tiff"), r"it has values from -1.5 to -0.5"),
}


@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_PIXELS])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_right_is_refused(case, monkeypatch):
    forbidden(monkeypatch)
    content, says = {**REFUSED, **REFUSED_PIXELS}[case]
    for do in (look, read) if case in REFUSED else (read,):
        with pytest.raises(UserError, match=f"^{says}") as caught:
            do(content, "it")
        assert "\n" not in str(caught.value)


def test_every_reader_of_pixels_sees_the_same(tmp_path, monkeypatch):
    """Training, validation and the test split (prediction, evaluation), from files and from parquet."""
    import datasets

    forbidden(monkeypatch)
    content = encoded(Image.fromarray(np.full((8, 8), 32768, np.uint16)), "png")
    for split in ("train", "validation", "test"):
        for label in ("a", "b"):
            (tmp_path / "files" / split / label).mkdir(parents=True)
            (tmp_path / "files" / split / label / "0.png").write_bytes(content)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": [{"bytes": content, "path": None}] * 2, "label": [0, 1]}
        (tmp_path / "rows").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows" / f"{split}.parquet")
    options = {"image_size": 8, "crop_pct": 1.0, "augment": False, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    for source in ("files", "rows"):
        data = ImageDataModule(
            str(tmp_path / source), batch_size=2, cache_dir=str(tmp_path / "cache"), **options
        )
        data.prepare_data()
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
            pixels = next(iter(loader))["pixel_values"]
            assert pixels.shape == (2, 3, 8, 8)
            assert (pixels - 0.5).abs().max() < 0.01


def test_a_file_that_is_no_picture_ends_before_the_first_batch(tmp_path, monkeypatch):
    forbidden(monkeypatch)
    for label in ("a", "b"):
        (tmp_path / "files" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "files" / label / f"{number}.png").write_bytes(encoded(Image.fromarray(RGB), "png"))
    (tmp_path / "files" / "b" / "7.png").write_bytes(EPS)
    data = ImageDataModule(str(tmp_path / "files"), image_size=8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"files/b/7.png is not a readable image"):
        data.prepare_data()

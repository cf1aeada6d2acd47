"""What can be wrong with one data file: damage found before it is read, or explained after reading failed.

Empty and truncated files are found first: a .zst says where its blocks end and a parquet file ends in a magic
word, so neither needs decompressing. Content that would crash the reader of JSON is searched for before
reading, a broken line only after reading has failed.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from stableqat.errors import UserError, first_line

_COMPRESSIONS = {".zst", ".gz", ".bz2", ".xz"}
#: Levels of JSON; pyarrow's reader crashes at about ten thousand.
_DEEPEST = 200
_NULL_RECORD = re.compile(rb"(?m)^\s*null")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def file_format(path: Path) -> str:
    """The suffix that names a file's format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """A stream of the decompressed content of a file with this name."""
    suffix = Path(name).suffix.lower()
    if suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(stream, "rb"), 1 << 20)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[suffix](stream, "rb") if suffix in openers else stream


def check(file: Path, formats: dict[str, str]) -> None:
    """Refuse a file of another format, an empty one, or one that was cut short.

    Raises:
        UserError: Naming the file.
    """
    suffix, known = file_format(file), ", ".join(sorted(formats))
    if suffix not in formats:
        raise UserError(f"{file}: cannot read {suffix or 'a file without suffix'}, only {known}")
    if "::" in str(file):  # fsspec reads it as a chain of addresses
        raise UserError(f"{file}: cannot read a path with :: in it; rename it")
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty: fill or remove it")
    if file.suffix.lower() == ".zst" and not _zst_is_whole(file):
        raise UserError(f"{file} is cut short or not zstandard: download or compress it again")
    if suffix == ".parquet":
        with file.open("rb") as stream:
            head = stream.read(4)
            stream.seek(max(size - 4, 0))
            if head != b"PAR1" or stream.read(4) != b"PAR1":
                raise UserError(f"{file} is cut short or not parquet: download or write it again")


def _zst_is_whole(file: Path) -> bool:
    """Whether a zstandard file ends where its frames and block headers say (RFC 8878)."""
    size = file.stat().st_size
    with file.open("rb") as stream:

        def number(width: int) -> int:
            return int.from_bytes(stream.read(width), "little")

        while stream.tell() < size:
            magic = number(4)
            if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
                stream.seek(number(4), 1)
                continue
            if magic != 0xFD2FB528:
                return False
            flags = number(1)
            single_segment, checksum = flags >> 5 & 1, flags >> 2 & 1
            content_size = (single_segment, 2, 4, 8)[flags >> 6]
            dictionary = (0, 1, 2, 4)[flags & 3]
            stream.seek((1 - single_segment) + dictionary + content_size, 1)
            last = False
            while not last:
                if stream.tell() + 3 > size:
                    return False
                block = number(3)
                last, kind = bool(block & 1), block >> 1 & 3
                stream.seek(1 if kind == 1 else block >> 3, 1)
            stream.seek(4 * checksum, 1)
        return stream.tell() == size


def find_crash(path: Path) -> str | None:
    """What in a JSON file would crash its C++ reader: a record `null`, or deep nesting; None if nothing."""
    import numpy as np

    depth, is_list = 0, None
    try:
        with path.open("rb") as file, decompressed(file, path.name) as stream:
            while lines := stream.readlines(1 << 20):  # no JSON string contains a line break
                text = b"".join(lines)
                is_list = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") if is_list is None else is_list
                if not is_list and _NULL_RECORD.search(text):
                    return f"{path} holds a line that is null: make it a JSON object or remove it"
                outside = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
                marks = np.frombuffer(b"".join(outside).translate(None, _NO_BRACKETS), np.uint8)
                if len(marks):
                    heights = np.cumsum(np.where(np.isin(marks, list(b"[{")), 1, -1), dtype=np.int64) + depth
                    if heights.max() > _DEEPEST:
                        return f"{path} nests more than {_DEEPEST} levels deep: write documents as plain text"
                    depth = max(int(heights[-1]), 0)
    except Exception:  # any other damage is reported when it is read
        return None
    return None


def find_damage(path: Path, builder: str) -> str | None:
    """What is wrong with a file that could not be read; None if nothing is found."""
    if builder == "parquet":
        import pyarrow

        try:
            if not pyarrow.parquet.ParquetFile(path).read().num_rows:
                return f"{path} holds no rows: remove it"
        except (pyarrow.ArrowException, OSError) as error:
            return f"{path} cannot be read as parquet ({first_line(error)}): repair or remove it"
        return None
    if builder == "webdataset":
        try:
            with tarfile.open(path) as archive:
                names = archive.getnames()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            return (
                f"{path} is cut short or not a tar archive ({first_line(error)}): download or write it again"
            )
        return None if names else f"{path} holds no files: remove it"
    if builder == "imagefolder":  # each image is checked when it is opened
        return None
    line_number = 0
    try:
        with path.open("rb") as file, decompressed(file, path.name) as stream:
            # A file that begins with a bracket holds one list; its lines are not documents.
            if builder == "json" and (first := stream.read(1)) != b"[":
                lines = enumerate(iter(stream.readline, b""), 1)
                for line_number, line in lines:
                    text = (first + line if line_number == 1 else line).strip()
                    # json accepts halves of surrogate pairs, escaped and as bytes
                    if text and not isinstance(fields := json.loads(text.decode()), dict):
                        return f"{path} line {line_number} is not a JSON object: repair it"
                    if text:
                        json.dumps(fields, ensure_ascii=False).encode()
            elif builder == "json":
                json.loads(first + stream.read())
            else:
                stream.read().decode()
    except json.JSONDecodeError as error:
        return f"{path} line {line_number or error.lineno} is not valid JSON ({error.msg}): repair it"
    except UnicodeDecodeError as error:
        where = f"{path} line {line_number}" if line_number else path
        return f"{where} is not UTF-8 at byte {error.start}: convert it"
    except UnicodeEncodeError:
        return f"{path} line {line_number} holds half of a surrogate pair, which is not text: repair it"
    except Exception as error:  # each decompressor raises errors of its own
        if path.suffix.lower() in _COMPRESSIONS:
            return f"{path} cannot be decompressed ({first_line(error)}): download or compress it again"
        if isinstance(error, OSError):
            return f"{path} cannot be read ({error.strerror}): repair or remove it"
        raise
    return None

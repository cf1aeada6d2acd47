"""From a name to splits: a local file, a folder, or a data set of the hub, read by `datasets`.

What can be wrong with files is told apart here. Absent, empty and cut-short files are found before anything
is read: a .zst says where its blocks end and a parquet file ends in a magic word, so neither needs
decompressing. A line that is no JSON object is looked for only after reading has failed.
"""

import bz2
import errno
import gzip
import io
import json
import logging
import lzma
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

#: File suffix -> the `datasets` builder that reads it.
TEXT_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
IMAGE_FORMATS = {
    ".parquet": "parquet",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"), "imagefolder"),
}
_COMPRESSIONS = {".zst", ".gz", ".bz2", ".xz"}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Levels of JSON; pyarrow's reader crashes at some ten thousand.
_DEEPEST = 200
_NULL_RECORD = re.compile(rb"(?m)^\s*null")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LISTED = 12  # names that a line can hold
#: Columns of chats, and of pairs of a request and its answer.
_CHATS: list[tuple[str, ...]] = [("messages",), ("conversations",), ("conversation",), ("dialog",), ("chat",)]
_CHATS += [
    (request, answer)
    for request in ("prompt", "instruction", "question", "query", "input")
    for answer in ("completion", "response", "output", "answer", "chosen")
]


def file_format(path: Path) -> str:
    """Return the suffix that names a file's format, a compression's suffix left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _split(path: Path) -> str | None:
    """Return the split that a path inside a folder names: a folder in full, a data file by how it starts.

    Single images take it from their folders alone, because they, and their classes' folders, may be called
    anything.
    """
    for folder in path.parts[:-1]:
        if split := SPLITS.get(folder.lower()):
            return split
    if IMAGE_FORMATS.get(file_format(path)) == "imagefolder":
        return None
    match = _SPLIT_NAME.match(path.name.lower())
    return SPLITS[match[1]] if match else None


def local_files(source: str, formats: dict[str, str]) -> tuple[str, dict[str, list[Path]]] | None:
    """Return the builder and the files a split of a local source, or None for the name of a hub data set.

    Args:
        source: path of a file or a folder, or a hub name.
        formats: file suffix -> builder.

    Raises:
        UserError: nothing there, no file of these formats, several formats, an empty or cut-short file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        splits = {"train": [path]}
    elif path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if file_format(p) in formats]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if lost := next((p for p in found if p.is_symlink() and not p.exists()), None):
            raise UserError(f"{lost} is a link to nothing: repair or remove it")
        found = [p for p in found if p.is_file()]
        splits = {}
        for file in found:
            splits.setdefault(_split(file.relative_to(path)) or "", []).append(file)
        unnamed = splits.pop("", [])
        if not splits:
            splits = {"train": unnamed}
        elif unnamed:
            log.info("%s: %d files belong to no split and are left out", source, len(unnamed))
        if not found:
            raise UserError(f"no data file in {source}: expected {', '.join(sorted(formats))}")
        if "train" not in splits:
            raise UserError(f"no training file in {source}: name files train*, validation*, test*")
    elif _HUB_NAME.fullmatch(source) and not source.startswith(".") and file_format(path) not in formats:
        return None
    else:
        raise UserError(f"no such data file or folder: {source}")

    files = [file for some in splits.values() for file in some]
    for file in files:
        _check(file, formats)
    builders = {formats[file_format(file)] for file in files}
    if len(builders) > 1:
        names = ", ".join(sorted({file_format(file) for file in files}))
        raise UserError(f"{source} mixes file formats ({names}): keep one format a folder")
    return builders.pop(), splits


def _check(file: Path, formats: dict[str, str]) -> None:
    """Raise UserError for a file of another format, an empty one, or one that was cut short."""
    suffix = file_format(file)
    if suffix not in formats:
        raise UserError(
            f"{file}: cannot read {suffix or 'a file without suffix'}; take {', '.join(sorted(formats))}"
        )
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty")
    if file.suffix.lower() == ".zst" and not _zst_is_whole(file):
        raise UserError(f"{file} is cut short or not zstandard: fetch or compress it again")
    if suffix == ".parquet":
        with file.open("rb") as stream:
            head = stream.read(4)
            stream.seek(max(size - 4, 0))
            if head != b"PAR1" or stream.read(4) != b"PAR1":
                raise UserError(f"{file} is cut short or not parquet: fetch or write it again")


def _zst_is_whole(file: Path) -> bool:
    """Walk a zstandard file's frames and block headers (RFC 8878): does it end where it should?"""
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


def load_splits(
    source: str, name: str | None, *, formats: dict[str, str], cache_dir: str | None, **options: Any
) -> dict[str, "Dataset"]:
    """Return the splits of a source, prepared by `datasets` and mapped from its cache.

    Args:
        source: path of a file or a folder, or a hub name.
        name: configuration of a hub data set.
        formats: file suffix -> builder.
        cache_dir: where `datasets` keeps prepared data; None takes its own default.
        **options: builder name -> that builder's arguments.

    Raises:
        UserError: the source can't be found, reached or read; names the file, and the line of broken JSON.
    """
    import datasets

    local = local_files(source, formats)
    if local is None:
        try:
            with caching(cache_dir):
                found = datasets.load_dataset(source, name, cache_dir=cache_dir)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{source} is neither a local file or folder nor a data set that the hub gives: {reason}"
            ) from error
        splits = {SPLITS[key]: rows for key, rows in found.items() if key in SPLITS}
        if "train" not in splits:
            raise UserError(
                f"{source} has no train split (it has {', '.join(found)}): choose another data set"
            )
        return splits

    kind, files = local
    paths = [path for some in files.values() for path in some]
    try:
        with caching(cache_dir):
            builder = datasets.load_dataset_builder(
                kind,
                data_files={split: [str(path) for path in some] for split, some in files.items()},
                cache_dir=cache_dir,
                **options.get(kind, {}),
            )
            if kind == "json" and not Path(builder.cache_dir).is_dir():
                for path in paths:
                    if crash := _crash(path):
                        raise UserError(crash)
            builder.download_and_prepare()
            return dict(builder.as_dataset())
    except UserError:
        raise
    except Exception as error:  # every reader and decompressor raises errors of its own
        if fault := find_fault(source, formats):
            raise UserError(fault) from error
        if not isinstance(
            error, (datasets.exceptions.DatasetsError, ValueError, StopIteration, RecursionError)
        ):
            raise
        reason = (str(error.__cause__ or error).strip() or "no rows").splitlines()[0]
        if reason.startswith("Couldn't cast"):
            raise UserError(
                f"the documents of {source} differ in their columns: give all the same, or read them with "
                "stableqat data tokenize, which needs no others than the text"
            ) from error
        reason = "it holds no rows" if "corresponds to no data" in reason else reason
        raise UserError(f"{source} can't be read as {kind}: {reason}") from error


@contextmanager
def caching(
    cache_dir: str | Path | None, remedy: str = "set data.cache_dir to another folder"
) -> Iterator[None]:
    """Tell a cache folder that can't be written in one line.

    Args:
        cache_dir: the folder; None means the default one of `datasets`.
        remedy: how to take another one.

    Raises:
        UserError: instead of the system's error.
    """
    try:
        yield
    except Exception as error:  # `datasets` wraps some in errors of its own
        from datasets.config import HF_DATASETS_CACHE

        folder = Path(cache_dir or HF_DATASETS_CACHE).expanduser()
        found: BaseException | None = error
        while found is not None and not _says(found, folder):
            found = found.__cause__ or found.__context__
        if found is None or isinstance(error, UserError):
            raise
        where = cache_dir or f"{HF_DATASETS_CACHE} (below $HF_HOME)"
        why = os.strerror(getattr(found, "errno", None) or errno.ENOSPC)
        raise UserError(
            f"the cache folder {where} can't be written ({why}): make room there, or {remedy}"
        ) from error


def _says(error: BaseException, folder: Path) -> bool:
    """Whether an error is the system's, of writing in or making a folder."""
    if not isinstance(error, OSError):
        return False
    if error.errno is None:  # of `datasets`
        return "Not enough disk space" in str(error)
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    folder, path = Path(os.path.abspath(folder)), Path(os.path.abspath(os.fsdecode(error.filename)))
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _crash(path: Path) -> str | None:
    """Return what in a JSON file would crash the C++ that reads it: a record `null`, or endless nesting."""
    import numpy as np

    depth, is_list = 0, None
    try:
        with path.open("rb") as file, decompressed(file, path.name) as stream:
            while lines := stream.readlines(1 << 20):  # no string of JSON holds a line's end
                text = b"".join(lines)
                is_list = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") if is_list is None else is_list
                if not is_list and _NULL_RECORD.search(text):
                    return f"{path} holds a line that is null: it must be a JSON object"
                outside = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
                marks = np.frombuffer(b"".join(outside).translate(None, _NO_BRACKETS), np.uint8)
                if len(marks):
                    heights = np.cumsum(np.where(np.isin(marks, list(b"[{")), 1, -1), dtype=np.int64) + depth
                    if heights.max() > _DEEPEST:
                        return f"{path} nests more than {_DEEPEST} levels deep: write documents as plain text"
                    depth = max(int(heights[-1]), 0)
    except Exception:  # what else is wrong with it is told when it is read
        return None
    return None


def _listed(names: Collection[str]) -> str:
    few = list(names)[:_LISTED]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")


def wrong_column(where: str, column: str, columns: dict[str, bool]) -> UserError:
    """Return the error of a text column that is missing or holds something else than text.

    Args:
        where: the file or the source.
        column: the text column that was wanted.
        columns: each column, and whether it holds text.
    """
    texts = _listed([name for name, is_text in columns.items() if is_text])
    if chat := next((chat for chat in _CHATS if columns.keys() >= set(chat)), None):
        kind = f"{'chats' if len(chat) == 1 else 'pairs'} (in {' and '.join(chat)})"
        return UserError(
            f"{where} holds {kind}, which are not supported yet: write each as one text, and set text_column "
            f"to its column (columns of text: {texts or 'none'})"
        )
    remedy = f"set text_column to a column of text ({texts})" if texts else "it has no column of text"
    if column not in columns:
        return UserError(f"{where} has no column {column} (it has {_listed(columns)}): {remedy}")
    return UserError(f"column {column} of {where} holds not only strings: {remedy}")


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """Return a stream that reads what a file of that name holds, decompressed."""
    suffix = Path(name).suffix.lower()
    if suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(stream, "rb"), 1 << 20)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[suffix](stream, "rb") if suffix in openers else stream


def find_fault(source: str, formats: dict[str, str]) -> str | None:
    """Return what is wrong with the first broken file of a source, or None where nothing is found."""
    if (local := local_files(source, formats)) is None:
        return None
    faults = (_fault(path, local[0]) for paths in local[1].values() for path in paths)
    return next((fault for fault in faults if fault), None)


def _fault(path: Path, builder: str) -> str | None:
    """Return what is wrong with a file that could not be read, or None where nothing is found."""
    if builder == "parquet":
        import pyarrow

        try:
            if not pyarrow.parquet.ParquetFile(path).read().num_rows:
                return f"{path} holds no rows: give more, or remove it"
        except (pyarrow.ArrowException, OSError) as error:
            return f"{path} can't be read as parquet: {str(error).splitlines()[0]}"
        return None
    if builder == "imagefolder":  # each picture is looked at when it is opened
        return None
    line_number = 0
    try:
        with path.open("rb") as file, decompressed(file, path.name) as stream:
            # A file that opens with a bracket holds one list; its lines are no documents of their own.
            if builder == "json" and (first := stream.read(1)) != b"[":
                lines = enumerate(iter(stream.readline, b""), 1)
                for line_number, line in lines:
                    text = (first + line if line_number == 1 else line).strip()
                    # JSON's own decoder lets halves of surrogate pairs pass, written out and as bytes
                    if text and not isinstance(fields := json.loads(text.decode()), dict):
                        return f"{path} line {line_number} is not a JSON object"
                    if text:
                        json.dumps(fields, ensure_ascii=False).encode()
            elif builder == "json":
                json.loads(first + stream.read())
            else:
                stream.read().decode()
    except json.JSONDecodeError as error:
        return f"{path} line {line_number or error.lineno} is not valid JSON: {error.msg}"
    except UnicodeDecodeError as error:
        return f"{path} {f'line {line_number} ' if line_number else ''}is not UTF-8 at byte {error.start}"
    except UnicodeEncodeError:
        return f"{path} line {line_number} holds half of a surrogate pair, which is no text: repair it"
    except Exception as error:  # each decompressor raises errors of its own
        if path.suffix.lower() in _COMPRESSIONS:
            return f"{path} can't be decompressed: {error}"
        if isinstance(error, OSError):
            return f"{path} can't be read: {error.strerror}"
        raise
    return None

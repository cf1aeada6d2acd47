"""A corpus of raw text: its files, in a local folder or on the Hub, and their documents from any place on.

Files are streamed, JSON lines by line and parquet by row group, so that memory does not grow with the corpus
and files of the Hub are never stored on this disk. The place of a document is (file, record): after a stop,
reading resumes there.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stableqat.data.damage import decompressed, file_format
from stableqat.data.source import SPLITS, TEXT_FORMATS, local_files, not_found, wrong_column
from stableqat.errors import UserError, first_line

_HUB_FILE = re.compile(r"hf://datasets/[^@]+@([^/]+)/(.+)")

#: A line of JSON, not parsed yet, or a row.
Record = bytes | dict[str, Any]


@dataclass(frozen=True, order=True)
class CorpusFile:
    """A file of a corpus.

    Args:
        name: Path inside the corpus.
        path: Local path, or address on the Hub.
        size: Size in bytes.
    """

    name: str
    path: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus by split, sorted by name, and the commit of the Hub (None for local files)."""

    splits: dict[str, list[CorpusFile]]
    revision: str | None


def find_corpus(
    source: str, formats: dict[str, str], *, name: str | None = None, revision: str | None = None
) -> Corpus:
    """The files of a local file or folder, or of a data set of the Hub.

    Args:
        source: Path or Hub name.
        formats: File suffix to format.
        name: Configuration of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.

    Raises:
        UserError: If the source is missing, out of reach, of another format, broken or truncated.
    """
    local = local_files(source, formats)
    if local is None:
        return _hub_corpus(source, formats, name, revision)
    if name or revision:
        raise UserError(f"{source} is local: leave out name and revision, which are for the Hub")
    path = Path(source).expanduser()
    root = path if path.is_dir() else path.parent
    splits = {
        split: sorted(
            CorpusFile(file.relative_to(root).as_posix(), str(file), file.stat().st_size) for file in files
        )
        for split, files in local[1].items()
    }
    return Corpus(splits, None)


def _hub_corpus(source: str, formats: dict[str, str], name: str | None, revision: str | None) -> Corpus:
    import datasets
    from fsspec.core import url_to_fs

    splits: dict[str, list[CorpusFile]] = {}
    commit = None
    try:
        builder = datasets.load_dataset_builder(source, name, revision=revision)
        for key, addresses in (builder.config.data_files or {}).items():
            if split := SPLITS.get(str(key)):
                for address in addresses:
                    inside = address
                    if match := _HUB_FILE.fullmatch(address):
                        commit, inside = match[1], match[2]
                    system, path = url_to_fs(address)
                    size = system.info(path)["size"]
                    splits.setdefault(split, []).append(CorpusFile(inside, address, size))
    except Exception as error:  # the Hub's client raises errors of several libraries
        raise not_found(source, error) from error
    if "train" not in splits:
        raise UserError(f"{source} has no files of a train split: choose another data set or name")
    for file in (file for files in splits.values() for file in files):
        if file_format(Path(file.name)) not in formats:
            raise UserError(f"{source}: cannot read {file.name}, only {', '.join(sorted(formats))}")
    return Corpus({split: sorted(files) for split, files in splits.items()}, commit)


def read(file: CorpusFile, start: int = 0, *, column: str | None = None) -> Iterator[Record]:
    """Yield the records of a file, from number `start` on.

    Args:
        file: The file.
        start: Number of records to skip; blank lines count.
        column: The only column wanted, if the format can leave out the others.

    Raises:
        UserError: If the file cannot be read.
    """
    from fsspec.core import url_to_fs

    readers: dict[str, Callable[..., Iterator[Record]]] = {"json": _lines, "parquet": _rows, "text": _whole}
    reader = readers[TEXT_FORMATS[file_format(Path(file.name))]]
    try:
        system, path = url_to_fs(file.path)
        with system.open(path, "rb") as stream:
            yield from reader(stream, file.name, start, column)
    except UserError:
        raise
    except Exception as error:  # each decompressor, reader and network client raises errors of its own
        raise UserError(f"{file.path} cannot be read ({first_line(error)}): repair or remove it") from error


def _lines(stream: BinaryIO, name: str, start: int, column: str | None) -> Iterator[Record]:
    with decompressed(stream, name) as lines:
        for number, line in enumerate(iter(lines.readline, b"")):
            if number == 0 and line.startswith(b"["):
                raise UserError(f"{name} holds one JSON list: write it as JSON lines, one document per line")
            if number >= start:
                yield line


def _rows(stream: BinaryIO, name: str, start: int, column: str | None) -> Iterator[Record]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    wanted = [column] if column in file.schema_arrow.names else None
    first = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if first + size > start:
            skip = max(start - first, 0)
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=wanted):
                yield from batch.slice(min(skip, len(batch))).to_pylist()
                skip = max(skip - len(batch), 0)
        first += size


def _whole(stream: BinaryIO, name: str, start: int, column: str | None) -> Iterator[Record]:
    if start == 0:
        with decompressed(stream, name) as content:
            yield {"text": content.read().decode()}


def document(record: Record, column: str, name: str, number: int) -> tuple[dict[str, Any], str]:
    """The fields of a record and its text, which is "" for a blank line and an empty document.

    Args:
        record: The record.
        column: The column that holds the text.
        name: The file's name, for messages.
        number: The record's number in the file.

    Raises:
        UserError: If the record is not a JSON object (names the file and the line), lacks the column, or
            holds something other than text in it.
    """
    fields: Any = record
    if isinstance(record, bytes):
        try:
            fields = json.loads(record) if record.strip() else {}
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
            raise UserError(f"{name} line {number + 1} is not valid JSON ({error}): repair it") from error
        if not isinstance(fields, dict):
            raise UserError(f"{name} line {number + 1} is not a JSON object: repair it")
    if fields and not (column in fields and isinstance(fields[column], str | None)):
        raise wrong_column(name, column, {key: isinstance(value, str) for key, value in fields.items()})
    return fields, fields.get(column) or ""


def texts(file: CorpusFile, column: str) -> Iterator[str]:
    """Yield the texts of a file's documents, without empty ones."""
    for number, record in enumerate(read(file, column=column)):
        if text := document(record, column, file.name, number)[1]:
            yield text

"""A raw corpus: its files, in a local folder or on the Hub, and their documents from any place on.

Files are streamed, JSON lines by line and parquet by row group, so that memory does not grow with the corpus
and files of the Hub are never stored on this disk. The place of a document is (file, record): after a stop,
reading resumes there.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stableqat.data.chat import Format, Records, conversations_in, recognise
from stableqat.data.damage import decompressed, file_format
from stableqat.data.source import SPLITS, TEXT_FORMATS, listed, local_files, not_found, wrong_column
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


def read(file: CorpusFile, start: int = 0, *, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yield a file's records from number `start` on.

    Args:
        file: The file.
        start: Records to skip; blank lines count.
        columns: Those wanted, where the format can leave out others; none takes all.

    Raises:
        UserError: If the file cannot be read.
    """
    from fsspec.core import url_to_fs

    readers: dict[str, Callable[..., Iterator[Record]]] = {"json": _lines, "parquet": _rows, "text": _whole}
    reader = readers[TEXT_FORMATS[file_format(Path(file.name))]]
    try:
        system, path = url_to_fs(file.path)
        with system.open(path, "rb") as stream:
            yield from reader(stream, file.name, start, columns)
    except UserError:
        raise
    except Exception as error:  # each decompressor, reader and network client raises errors of its own
        raise UserError(f"{file.path} cannot be read ({first_line(error)}): repair or remove it") from error


def _lines(stream: BinaryIO, name: str, start: int, columns: Sequence[str]) -> Iterator[Record]:
    with decompressed(stream, name) as lines:
        for number, line in enumerate(iter(lines.readline, b"")):
            if number == 0 and line.startswith(b"["):
                raise UserError(f"{name} holds one JSON list: write it as JSON lines, one document per line")
            if number >= start:
                yield line


def _rows(stream: BinaryIO, name: str, start: int, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    wanted = [name for name in columns if name in file.schema_arrow.names] or None
    first = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if first + size > start:
            skip = max(start - first, 0)
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=wanted):
                yield from batch.slice(min(skip, len(batch))).to_pylist()
                skip = max(skip - len(batch), 0)
        first += size


def _whole(stream: BinaryIO, name: str, start: int, columns: Sequence[str]) -> Iterator[Record]:
    if start == 0:
        with decompressed(stream, name) as content:
            yield {"text": content.read().decode()}


def document(record: Record, records: Records, name: str, number: int) -> tuple[dict[str, Any], str]:
    """A record's fields and its document; that of a blank line or an empty text is "".

    Args:
        record: The record.
        records: What the records of the corpus are.
        name: The file's name, for messages.
        number: The record's number in the file.

    Raises:
        UserError: If it is not a JSON object (names the file and the line), or another kind of record.
    """
    fields = _fields(record, name, number)
    texts = {key: isinstance(value, str) for key, value in fields.items()}
    if fields and records.are_conversations:
        if lost := [column for column in records.columns if column not in fields]:
            raise UserError(
                f"{name} row {number + 1} has no column {lost[0]} (it has {listed(fields)}), and others hold "
                f"{records.words}: keep one format per source"
            )
        try:
            return fields, records.document(fields)
        except ValueError as error:
            raise UserError(f"{name} row {number + 1}: {error}") from error
    column = records.text_column
    if fields and not (column in fields and isinstance(fields[column], str | None)):
        raise wrong_column(name, column, texts)
    return fields, fields.get(column) or ""


def _fields(record: Record, name: str, number: int) -> dict[str, Any]:
    if not isinstance(record, bytes):
        return record
    try:
        fields = json.loads(record) if record.strip() else {}
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise UserError(f"{name} line {number + 1} is not valid JSON ({error}): repair it") from error
    if not isinstance(fields, dict):
        raise UserError(f"{name} line {number + 1} is not a JSON object: repair it")
    return fields


def documents(file: CorpusFile, records: Records) -> Iterator[str]:
    """Yield a file's documents, without empty ones."""
    for number, record in enumerate(read(file, columns=records.all_columns)):
        if text := document(record, records, file.name, number)[1]:
            yield text


def find_records(files: Iterable[CorpusFile], text_column: str, asked: Format | None) -> Records:
    """Tell by the first record of a corpus what its records are; one without a text tells nothing.

    Args:
        files: Of the corpus.
        text_column: The column of texts.
        asked: The format, if the user names it.

    Raises:
        UserError: If no format fits, or several do.
    """
    for file in files:
        for number, record in enumerate(read(file)):
            fields = _fields(record, file.name, number)
            given = {key: isinstance(value, str) for key, value in fields.items() if value is not None}
            if given.get(text_column) or (fields and text_column not in fields) or conversations_in(given):
                return recognise(file.name, given, text_column, asked)
            if text_column in given:
                raise wrong_column(file.name, text_column, given)
    return Records("text", text_column)


def find_record(source: str, split: str, index: int) -> str | None:
    """The file and the number in it of a split's record, None if the files do not tell.

    Args:
        source: A file or folder, or a hub name.
        split: Its split.
        index: The record's number in the split, blank lines not counted.
    """
    if (local := local_files(source, TEXT_FORMATS, training=False)) is None:
        return None
    for path in local[1].get(split, ()):
        with suppress(UserError):
            for number, record in enumerate(read(CorpusFile(path.name, str(path), 0))):
                if not isinstance(record, bytes) or record.strip():
                    if index == 0:
                        return f"{path} row {number + 1}"
                    index -= 1
            continue
        return None
    return None

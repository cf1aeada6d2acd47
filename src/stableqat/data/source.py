"""From a name to splits: a local file, a folder, or a data set of the Hub, read by `datasets`.

Anything wrong with them, or with the cache of `datasets`, becomes a one-line error.
"""

import errno
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.data.damage import check, file_format, find_crash, find_damage
from stableqat.errors import LISTED, UserError, first_line
from stableqat.files import as_it_stands, only_local

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

#: File suffix -> the `datasets` builder that reads it.
TEXT_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
IMAGE_FORMATS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"), "imagefolder"),
}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
_SPLIT_OF_SHARD = re.compile(rf"(?:.*[^a-z])?{_SPLIT_NAME.pattern}")  # imagenet1k-train-0000.tar
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Columns of chats, and of pairs of a request and an answer, under names other than the known ones.
_CHATS: list[tuple[str, ...]] = [("messages",), ("conversations",), ("conversation",), ("dialog",), ("chat",)]
_CHATS += [
    (request, answer)
    for request in ("prompt", "instruction", "question", "query", "input")
    for answer in ("completion", "response", "output", "answer", "chosen")
]


def _split(path: Path) -> str | None:
    """The split that a path inside a folder names: by the whole name of a folder, or the start of a file's.

    Single images take it only from folders, because image files may have any name; shards of a WebDataset
    also from the middle of theirs.
    """
    for folder in path.parts[:-1]:
        if split := SPLITS.get(folder.lower()):
            return split
    kind = IMAGE_FORMATS.get(file_format(path))
    if kind == "imagefolder":
        return None
    match = (_SPLIT_OF_SHARD if kind == "webdataset" else _SPLIT_NAME).match(path.name.lower())
    return SPLITS[match[1]] if match else None


def local_files(
    source: str, formats: dict[str, str], *, training: bool = True
) -> tuple[str, dict[str, list[Path]]] | None:
    """The builder and the files per split of a local source; None for the name of a Hub data set.

    Args:
        source: Path of a file or a folder, or a Hub name.
        formats: File suffix to builder.
        training: Whether a folder that names splits must name train among them.

    Raises:
        UserError: If there is no file of these formats, a mixture of formats, or an empty or truncated file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        splits = {"train": [path]}
    elif path.is_dir():
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            raise UserError(f"{source} is a model folder, not data: name a model with model.init_from")
        splits = {}
        for file in sorted(p for p in path.rglob("*") if file_format(p) in formats):
            inside = file.relative_to(path)
            if any(part.startswith((".", "__MACOSX")) for part in inside.parts):
                continue
            if file.is_symlink() and not file.exists():
                raise UserError(f"{file} is a broken link: repair or remove it")
            if file.is_file():
                splits.setdefault(_split(inside) or "", []).append(file)
        if not splits:
            raise UserError(f"no data file in {source}: expected {', '.join(sorted(formats))}")
        unnamed = splits.pop("", [])
        if not splits:
            splits = {"train": unnamed}
        elif unnamed:
            log.info("%s: leaving out %d files whose names say no split", source, len(unnamed))
        if training and "train" not in splits:
            raise UserError(f"no training file in {source}: name files train*, validation*, test*")
    elif _HUB_NAME.fullmatch(source) and not only_local(source) and file_format(path) not in formats:
        return None
    else:
        raise UserError(f"no such data file or folder: {source}{as_it_stands(source)}")

    files = [file for some in splits.values() for file in some]
    for file in files:
        check(file, formats)
    builders = {formats[file_format(file)] for file in files}
    if len(builders) > 1:
        names = ", ".join(sorted({file_format(file) for file in files}))
        raise UserError(f"{source} mixes file formats ({names}): keep one format per folder")
    return builders.pop(), splits


def load_splits(
    source: str,
    name: str | None,
    *,
    formats: dict[str, str],
    cache_dir: str | None,
    training: bool = True,
    **options: Any,
) -> dict[str, "Dataset"]:
    """The splits of a source, prepared by `datasets` and mapped from its cache.

    Args:
        source: Path of a file or a folder, or a Hub name.
        name: Configuration of a Hub data set.
        formats: File suffix to builder.
        cache_dir: Where `datasets` caches prepared data; None takes its default.
        training: Whether train must be among the splits.
        **options: Arguments of builders, by the name of the builder.

    Raises:
        UserError: If the source is not found, out of reach or not readable; names the file, and the line of
            broken JSON.
    """
    import datasets

    local = local_files(source, formats, training=training)
    if local is None:
        try:
            with caching(cache_dir):
                found = datasets.load_dataset(source, name, cache_dir=cache_dir)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise not_found(source, error) from error
        splits = {SPLITS[key]: rows for key, rows in found.items() if key in SPLITS}
        if not splits or (training and "train" not in splits):
            wanted = "train split" if training else "train, validation or test split"
            raise UserError(f"{source} has no {wanted} (it has {', '.join(found)}): choose another data set")
        return splits

    kind, files = local
    paths = [path for some in files.values() for path in some]
    try:
        with caching(cache_dir):
            builder = datasets.load_dataset_builder(
                kind,
                data_files={split: [escape(str(path)) for path in some] for split, some in files.items()},
                cache_dir=cache_dir,
                **options.get(kind, {}),
            )
            if kind == "json" and not Path(builder.cache_dir).is_dir():
                for path in paths:
                    if crash := find_crash(path):
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
        reason = first_line(error.__cause__ or error)
        if reason.startswith("Couldn't cast"):
            raise UserError(
                f"the documents of {source} differ in their columns: give all the same, or read them with "
                "stableqat data tokenize, which needs only the text"
            ) from error
        if "corresponds to no data" in reason or reason == "StopIteration":
            reason = "it holds no rows"
        raise UserError(f"{source} cannot be read as {kind} ({reason}): repair it") from error


def not_found(source: str, error: Exception) -> UserError:
    """The error for a source that is not on the Hub either, with the reason."""
    return UserError(f"{source} is not found locally or on the Hub ({first_line(error)}): check its name")


@contextmanager
def caching(
    cache_dir: str | Path | None, remedy: str = "set data.cache_dir to another folder"
) -> Iterator[None]:
    """Report in one line that a cache folder cannot be written.

    Args:
        cache_dir: The folder; None means the default of `datasets`.
        remedy: How to choose another one.

    Raises:
        UserError: In place of the system's error.
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
        fault = f"the cache folder {where} cannot be written ({why})"
        raise UserError(f"{fault}: make room there, or {remedy}") from error


def _says(error: BaseException, folder: Path) -> bool:
    """Whether the system raised an error because it could not write in, or create, a folder."""
    if not isinstance(error, OSError):
        return False
    if error.errno is None:  # of `datasets`
        return "Not enough disk space" in str(error)
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    folder, path = Path(os.path.abspath(folder)), Path(os.path.abspath(os.fsdecode(error.filename)))
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def listed(names: Collection[str]) -> str:
    """The first names and how many more there are."""
    few = list(names)[:LISTED]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")


def wrong_column(where: str, column: str, columns: dict[str, bool]) -> UserError:
    """The error for a text column that is missing or holds something other than text.

    Args:
        where: The file or the source.
        column: The name of the text column.
        columns: Each column, and whether it holds text.
    """
    texts = listed([name for name, is_text in columns.items() if is_text])
    if chat := next((chat for chat in _CHATS if columns.keys() >= set(chat)), None):
        kind = f"{'chats' if len(chat) == 1 else 'pairs'} (in {' and '.join(chat)})"
        return UserError(
            f"{where} holds {kind}, not texts: give messages, prompt and completion, or instruction and "
            f"output, or set text_column to a column of text ({texts or 'none'})"
        )
    remedy = f"set text_column to a column of text ({texts})" if texts else "it has no column of text"
    if column not in columns:
        return UserError(f"{where} has no column {column} (it has {listed(columns)}): {remedy}")
    return UserError(f"column {column} of {where} holds more than strings: {remedy}")


def find_fault(source: str, formats: dict[str, str]) -> str | None:
    """What is wrong with the first broken file of a source; None if nothing is found."""
    if (local := local_files(source, formats, training=False)) is None:
        return None
    faults = (find_damage(path, local[0]) for paths in local[1].values() for path in paths)
    return next((fault for fault in faults if fault), None)

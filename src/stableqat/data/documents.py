"""The documents of one raw source, texts or conversations: read, split and tokenized once.

`datasets` caches what it reads and tokenizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stableqat.data.chat import BadRecordError, Format, Records, numbered, recognise
from stableqat.data.encoder import Encoder, token_features
from stableqat.data.holdout import HeldOut, cut, document_hash, hash_cutoff
from stableqat.data.prepare.corpus import find_record
from stableqat.data.source import TEXT_FORMATS, caching, find_fault, load_splits
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

#: Types of a column that holds text.
_TEXT = ("string", "large_string", "string_view")
_BATCH = 1000  # documents


def _tokenize(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    records: Records,
    encoder: Encoder,
    held_out: HeldOut,
    split: str | None,
) -> dict[str, list[Any]]:
    """The tokens of the documents of a split, or of all documents for None, without empty ones.

    The arguments are plain data, so that `datasets` can tell whether its cache is still valid.
    """
    with numbered(indices):
        texts = records.documents(batch)
    kept = [
        index
        for index, text in enumerate(texts)
        if text and (not split or held_out.split(document_hash(text)) == split)
    ]
    with numbered([indices[index] for index in kept]):
        return encoder.columns([texts[index] for index in kept])


def _cut(row: dict[str, str | None], *, column: str, share: float, end: bool) -> dict[str, str]:
    """Return the end of a document or what comes before it; the arguments are plain data, as above."""
    return {column: cut(row[column] or "", share)[end]}


@dataclass
class Documents:
    """The documents of one source, by split.

    Args:
        source: A file or folder, or a hub name.
        name: Configuration of a hub data set.
        text_column: The column that holds the text.
        validation_fraction: Share of the documents held out, whole, where there is no validation split.
        cache_dir: Folder of prepared data; None takes the default folder of `datasets`.
        format: What the records are; None tells by their columns.
        training: There must be a train split.
    """

    source: str
    name: str | None
    text_column: str
    validation_fraction: float
    cache_dir: str | None
    format: Format | None = None
    training: bool = True

    @cached_property
    def splits(self) -> dict[str, "Dataset"]:
        """The splits of the source, reduced to the columns that make documents."""
        splits = {
            split: rows.select_columns(self.records.read_from(rows.column_names))
            for split, rows in self._loaded.items()
        }
        if not self.training or "validation" in splits:
            return splits
        alone = len(splits["train"]) == 1 and splits["train"].column_names == [self.text_column]
        return self._cut(splits) if alone else splits

    def _cut(self, splits: dict[str, "Dataset"]) -> dict[str, "Dataset"]:
        """Let the end of a single text validate: its share of the characters, from a line's start."""
        options = {"column": self.text_column, "share": self.validation_fraction}
        with self._reading("train"):
            ends = {
                split: splits["train"].map(_cut, fn_kwargs={**options, "end": split == "validation"})
                for split in ("train", "validation")
            }
        return splits | ends

    @cached_property
    def _loaded(self) -> dict[str, "Dataset"]:
        return load_splits(
            self.source,
            self.name,
            formats=TEXT_FORMATS,
            cache_dir=self.cache_dir,
            training=self.training,
            text={"sample_by": "document"},
        )

    @cached_property
    def records(self) -> Records:
        """What the records of the source are, in all splits."""
        found: dict[Records, str] = {}
        for split, rows in self._loaded.items():
            kinds = {key: getattr(feature, "dtype", "") for key, feature in rows.features.items()}
            if self.format in (None, "text") and kinds.get(self.text_column) == "null":
                raise self._empty()
            texts = {key: kind in _TEXT for key, kind in kinds.items()}
            found.setdefault(recognise(self.source, texts, self.text_column, self.format), split)
        if len(found) > 1:
            kinds_of = " and ".join(f"{records.words} ({split})" for records, split in found.items())
            raise UserError(f"{self.source} mixes {kinds_of}: keep one format per source")
        return next(iter(found))

    def _empty(self) -> UserError:
        return UserError(f"column {self.text_column} of {self.source} is empty: give documents")

    @contextmanager
    def _reading(self, split: str) -> Iterator[None]:
        """Report what is wrong with the documents, or with the cache, in one line."""
        try:
            with caching(self.cache_dir):
                yield
        except UnicodeDecodeError as error:  # the reader of JSON does not check text
            if fault := find_fault(self.source, TEXT_FORMATS):
                raise UserError(fault) from error
            raise
        except BadRecordError as error:
            place = find_record(self.source, split, error.index)
            where = place or f"{self.source} ({split}) row {error.index + 1}"
            raise UserError(f"{where}: {error.reason}") from error

    def _texts(self, step: int = 1) -> Iterator[str]:
        """Yield every `step`-th document of the train split."""
        train = self.splits["train"]
        chosen = range(0, len(train), step)
        with self._reading("train"):
            for first, batch in enumerate(train.select(chosen).iter(batch_size=_BATCH)):
                with numbered(chosen[first * _BATCH :]):
                    yield from filter(None, self.records.documents(batch))

    @cached_property
    def held_out(self) -> HeldOut:
        """Which documents of the train split validate: none if the source has a validation split."""
        if "validation" in self.splits:
            return HeldOut(0)
        if next(self._texts(), None) is None:
            raise self._empty()
        return HeldOut(hash_cutoff(self.validation_fraction, map(document_hash, self._texts()), self.source))

    @property
    def fingerprint(self) -> str:
        """A text that identifies the training documents."""
        return f"{self.splits['train']._fingerprint} {self.held_out.cutoff}"

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """Yield about `max_bytes` of training documents, taken evenly from the whole split."""
        for text in self._texts(-(-self.splits["train"].data.nbytes // max_bytes) or 1):
            if self.held_out.split(document_hash(text)) == "train":
                yield text

    def encoded(self, encoder: Encoder, split: str, part: str | None = None) -> "Dataset":
        """The tokens of a split's documents, in a column `input_ids`; of conversations, also `spans`.

        Args:
            encoder: Makes them.
            split: A split of the source.
            part: Train or validation, of a train split that is divided; None takes all documents.
        """
        chosen = {"held_out": self.held_out if part else HeldOut(0), "split": part}
        with self._reading(split):
            return self.splits[split].map(
                _tokenize,
                batched=True,
                with_indices=True,
                remove_columns=self.splits[split].column_names,
                features=token_features(conversations=self.records.are_conversations),
                fn_kwargs={"records": self.records, "encoder": encoder, **chosen},
                desc=f"Tokenizing {part or split}",
            )

    def tokenized(self, encoder: Encoder) -> dict[str, "Dataset"]:
        """The tokens of each split's documents; see `encoded`."""
        whole = {split: self.encoded(encoder, split) for split in self.splits if split == "test"}
        if "validation" in self.splits:
            return {split: self.encoded(encoder, split) for split in self.splits}
        return {part: self.encoded(encoder, "train", part) for part in ("train", "validation")} | whole

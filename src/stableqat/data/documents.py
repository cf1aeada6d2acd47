"""The documents of one source of raw text: read, split into train and validation, and tokenized once.

`datasets` caches what it reads and tokenizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stableqat.data.encoder import DocumentEncoder
from stableqat.data.holdout import HeldOut, document_hash, hash_cutoff
from stableqat.data.source import TEXT_FORMATS, caching, find_fault, load_splits, wrong_column
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

#: Types of a column that holds text.
_TEXT = ("string", "large_string", "string_view")


def _tokenize(
    texts: list[str | None], *, encoder: DocumentEncoder, held_out: HeldOut, split: str | None
) -> dict[str, list[Any]]:
    """The tokens of the documents of a split, or of all documents for None, without empty ones.

    The arguments are plain data, so that `datasets` can tell whether its cache is still valid.
    """
    kept = (text for text in texts if text and (not split or held_out.split(document_hash(text)) == split))
    return {"input_ids": encoder(kept)}


@dataclass
class Documents:
    """The documents of one source, by split.

    Args:
        source: A file or folder, or a Hub name.
        name: Configuration of a Hub data set.
        text_column: The column that holds the text.
        validation_fraction: Share of the documents to hold out, whole, if there is no validation split.
        cache_dir: Folder for prepared data; None takes the default folder of `datasets`.
        training: Whether there must be a train split.
    """

    source: str
    name: str | None
    text_column: str
    validation_fraction: float
    cache_dir: str | None
    training: bool = True

    @cached_property
    def splits(self) -> dict[str, "Dataset"]:
        """The splits of the source, reduced to the text column."""
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "training": self.training}
        options["text"] = {"sample_by": "document"}
        splits = load_splits(self.source, self.name, formats=TEXT_FORMATS, **options)
        for rows in splits.values():
            texts = {key: getattr(feature, "dtype", "") in _TEXT for key, feature in rows.features.items()}
            if not texts.get(self.text_column):
                if getattr(rows.features.get(self.text_column), "dtype", "") == "null":
                    raise self._empty()
                raise wrong_column(self.source, self.text_column, texts)
        return {split: rows.select_columns(self.text_column) for split, rows in splits.items()}

    def _empty(self) -> UserError:
        return UserError(f"column {self.text_column} of {self.source} is empty: give documents")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Report in one line what is wrong with the documents or the cache."""
        try:
            with caching(self.cache_dir):
                yield
        except UnicodeDecodeError as error:  # the reader of JSON does not check text
            if fault := find_fault(self.source, TEXT_FORMATS):
                raise UserError(fault) from error
            raise

    def _texts(self, step: int = 1) -> Iterator[str]:
        """Yield every `step`-th document of the train split."""
        train = self.splits["train"]
        with self._reading():
            for batch in train.select(range(0, len(train), step)).iter(batch_size=1000):
                yield from filter(None, batch[self.text_column])

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

    def tokenized(self, encoder: DocumentEncoder) -> dict[str, "Dataset"]:
        """The tokens of each split's documents, in a column `input_ids`."""
        from datasets import Features, List, Value

        own = "validation" in self.splits
        origins = {"train": "train", "validation": "train"} | {split: split for split in self.splits}
        tokens = {}
        with self._reading():
            for split, origin in origins.items():
                chosen = {"held_out": self.held_out, "split": None if own or split == "test" else split}
                tokens[split] = self.splits[origin].map(
                    _tokenize,
                    input_columns=self.text_column,
                    batched=True,
                    remove_columns=self.text_column,
                    features=Features({"input_ids": List(Value("int32"))}),
                    fn_kwargs={"encoder": encoder, **chosen},
                    desc=f"Tokenizing {split}",
                )
        return tokens

"""The documents of one source of raw text: read, split into train and validation, tokenized once.

Where a source has no validation split, the documents of the lowest hashes are held out, whole, so that equal
documents stay on one side. `datasets` keeps what was read, hashed and tokenized in its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stableqat.data.corpus import document_hash
from stableqat.data.source import TEXT_FORMATS, caching, find_fault, load_splits, wrong_column
from stableqat.data.tokenizer import encode_batch
from stableqat.errors import UserError

#: What columns of text are called.
_TEXT = ("string", "large_string", "string_view")

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


def _hash_documents(texts: list[str | None]) -> dict[str, list[int]]:
    return {"hash": [document_hash(text) for text in texts if text]}


@lru_cache(maxsize=1)
def _backend(tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _is_held_out(text: str, cutoff: int) -> bool:
    return document_hash(text) <= cutoff


def _tokenize(
    texts: list[str | None], *, tokenizer: str, eos: int, cutoff: int | None, held_out: bool
) -> dict[str, list[list[int]]]:
    """Return the tokens of each document of one side of the cutoff, EOS appended; empty documents drop out.

    The arguments are plain data, so that `datasets` can tell from them whether its cache still holds.
    """
    kept = [text for text in texts if text and (cutoff is None or _is_held_out(text, cutoff) == held_out)]
    return {"input_ids": [[*tokens, eos] for tokens in encode_batch(_backend(tokenizer), kept)]}


class Documents:
    """The documents of one source, by split.

    Args:
        source: a file or folder, or a hub name.
        name: configuration of a hub data set.
        text_column: the column that holds the text.
        validation_fraction: share of the documents held out, whole, where there is no validation split.
        cache_dir: where prepared data is kept; None takes the default folder of `datasets`.
        training: there must be a train split.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None,
        text_column: str,
        validation_fraction: float,
        cache_dir: str | None,
        training: bool = True,
    ):
        self.source, self.name, self.text_column = source, name, text_column
        self.validation_fraction, self.cache_dir, self.training = validation_fraction, cache_dir, training

    @cached_property
    def splits(self) -> dict[str, "Dataset"]:
        """The splits of the source, reduced to the text column."""
        splits = load_splits(
            self.source,
            self.name,
            formats=TEXT_FORMATS,
            cache_dir=self.cache_dir,
            training=self.training,
            text={"sample_by": "document"},
        )
        for rows in splits.values():
            texts = {key: getattr(feature, "dtype", "") in _TEXT for key, feature in rows.features.items()}
            if not texts.get(self.text_column):
                if getattr(rows.features.get(self.text_column), "dtype", "") == "null":
                    raise UserError(f"column {self.text_column} of {self.source} is empty: give documents")
                raise wrong_column(self.source, self.text_column, texts)
        return {split: rows.select_columns(self.text_column) for split, rows in splits.items()}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell what is wrong with the documents, or with the cache, in one line."""
        try:
            with caching(self.cache_dir):
                yield
        except UnicodeDecodeError as error:  # JSON's reader looks at no text
            if fault := find_fault(self.source, TEXT_FORMATS):
                raise UserError(fault) from error
            raise

    @cached_property
    def cutoff(self) -> int | None:
        """The largest hash of a held-out document, or None where the source has a validation split."""
        if "validation" in self.splits:
            return None
        train = self.splits["train"]
        with self._reading():
            hashed = train.map(
                _hash_documents,
                input_columns=self.text_column,
                batched=True,
                remove_columns=self.text_column,
                desc="Hashing documents",
            )
        if not len(hashed):
            raise UserError(f"column {self.text_column} of {self.source} is empty: give documents")
        hashes = hashed.with_format("numpy")["hash"][:]
        if len(hashes) < 2:
            raise UserError(
                f"{self.source} is a single document, and validation takes whole ones: "
                "put it in a folder beside a validation file"
            )
        count = max(1, round(self.validation_fraction * len(hashes)))
        return int(np.partition(hashes, count - 1)[count - 1])

    @property
    def fingerprint(self) -> str:
        """What decides the training documents."""
        return f"{self.splits['train']._fingerprint} {self.cutoff}"

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """Yield training documents, about `max_bytes` of them, taken evenly from the whole split."""
        train = self.splits["train"]
        step = -(-train.data.nbytes // max_bytes) or 1
        with self._reading():
            for batch in train.select(range(0, len(train), step)).iter(batch_size=1000):
                for text in batch[self.text_column]:
                    if text and (self.cutoff is None or not _is_held_out(text, self.cutoff)):
                        yield text

    def tokenized(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, "Dataset"]:
        """Return the tokens of each split's documents, in a column `input_ids`."""
        from datasets import Features, List, Value

        def tokens(split: str, origin: str) -> "Dataset":
            return self.splits[origin].map(
                _tokenize,
                input_columns=self.text_column,
                batched=True,
                remove_columns=self.text_column,
                features=Features({"input_ids": List(Value("int32"))}),
                fn_kwargs={
                    "tokenizer": tokenizer.backend_tokenizer.to_str(),
                    "eos": tokenizer.eos_token_id,
                    "cutoff": self.cutoff if origin == "train" else None,
                    "held_out": split != origin,
                },
                desc=f"Tokenizing {split}",
            )

        origins = {"train": "train", "validation": "train"} | {split: split for split in self.splits}
        with self._reading():
            return {split: tokens(split, origin) for split, origin in origins.items()}

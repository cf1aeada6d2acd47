"""Text for language models: documents, tokenised once, joined by EOS, cut into rows of `block_size` tokens.

The rows are windows on one flat run of tokens that stays on disk: memory stays flat, a change of block_size
tokenises nothing again, and the concatenation of the rows is the concatenation of the documents, less the
tail of a split that doesn't fill a row. Rows attend across document borders, as in GPT-3's
pretraining.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stableqat.data.base import DataModule, Rows
from stableqat.data.corpus import document_hash
from stableqat.data.embedded import cache_root, embedded_text
from stableqat.data.order import PAD, Key
from stableqat.data.prepared import prepared_manifest, prepared_splits
from stableqat.data.source import TEXT_FORMATS, load_splits, local_files
from stableqat.data.tokenizer import (
    BPE_MIN_VOCAB,
    EOS,
    check_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

#: More text than this hardly moves a BPE's merges.
_BPE_MAX_BYTES = 100_000_000


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
    encodings = _backend(tokenizer).encode_batch_fast(kept, add_special_tokens=False)
    return {"input_ids": [[*encoding.ids, eos] for encoding in encodings]}


class PackedRows:
    """Rows of `block_size` tokens over a data set's `input_ids`, read from its memory map.

    Args:
        documents: data set with a column `input_ids`.
        block_size: tokens a row.
    """

    def __init__(self, documents: "Dataset", block_size: int):
        self.documents, self.block_size = documents, block_size
        column = documents.data.column("input_ids")
        self.chunks = [chunk.flatten().to_numpy() for chunk in column.chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)
        self.num_tokens = int(self.ends[-1]) if self.chunks else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (self.documents, self.block_size)

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the flat run."""
        pieces = []
        chunk = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = int(self.ends[chunk]) - len(self.chunks[chunk])
            pieces.append(self.chunks[chunk][start - first : stop - first])
            start, chunk = int(self.ends[chunk]), chunk + 1
        return np.concatenate(pieces)

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]:
        starts = [max(index, 0) * self.block_size for *_, index in keys]
        rows = np.stack([self.tokens(start, start + self.block_size) for start in starts])
        input_ids = torch.from_numpy(rows.astype(np.int64))
        labels = input_ids.clone()
        labels[torch.tensor([index == PAD for *_, index in keys])] = -100
        return {"input_ids": input_ids, "labels": labels}


class TextDataModule(DataModule):
    """Rows of tokens for language models: `input_ids` and (unshifted) `labels`, (batch, block_size).

    Args:
        source: a file or folder of jsonl, json, parquet or txt (.zst, .gz, .bz2, .xz too), or a hub name;
            null takes the embedded text. In a folder, files whose names start with train, validation (valid,
            val, dev) or test, or folders named so, make the splits. A txt file is one document. A folder that
            `data tokenize` wrote is read as it is, with its tokenizer and any block_size.
        name: configuration of a hub data set.
        tokenizer: a hub name, a folder or a tokenizer.json; null trains a byte-level BPE on the train split.
        vocab_size: entries of that BPE; not used with a tokenizer.
        text_column: the column that holds the text.
        block_size: tokens a row; the last incomplete row of a split is dropped.
        batch_size: rows a step and process.
        validation_fraction: share of the documents held out, whole, where the source has no validation split.
        num_workers: processes that load batches ahead; 0 loads in the training process.
        seed: decides the order; null takes the run's seed (seed_everything).
        cache_dir: where prepared data and trained tokenizers are kept; null takes the default folders of
            `datasets` and of stableqat ($STABLEQAT_CACHE).

    Raises:
        UserError: a value out of range, a missing, empty or cut-short file.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        name: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        text_column: str = "text",
        block_size: int = 128,
        batch_size: int = 16,
        validation_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ):
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if block_size < 2:
            raise UserError(
                f"block_size {block_size} must be at least 2: a token is predicted from those before it"
            )
        if tokenizer is None and vocab_size < BPE_MIN_VOCAB:
            raise UserError(f"vocab_size {vocab_size} must be at least {BPE_MIN_VOCAB}: 256 bytes and EOS")
        if not 0 < validation_fraction < 1:
            raise UserError(f"validation_fraction {validation_fraction} must lie between 0 and 1")
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        self._prepared = prepared_manifest(source) if source is not None else None
        if source is not None and self._prepared is None:
            local_files(source, TEXT_FORMATS)
        if self._prepared is not None and tokenizer is None:
            tokenizer = f"{source}/tokenizer"
        self.source = source
        self.name = name
        self.tokenizer_source = tokenizer
        self.text_column = text_column if source is not None else "text"
        self.block_size = block_size
        self.validation_fraction = validation_fraction
        self.cache_dir = cache_dir
        self._bpe_size = vocab_size

    @cached_property
    def _documents(self) -> dict[str, "Dataset"]:
        """The splits of the source, reduced to the text column."""
        from datasets import Value

        source = self.source if self.source is not None else str(embedded_text())
        splits = load_splits(
            source, self.name, formats=TEXT_FORMATS, cache_dir=self.cache_dir, text={"sample_by": "document"}
        )
        for rows in splits.values():
            if (feature := rows.features.get(self.text_column)) is None:
                columns = ", ".join(rows.column_names)
                raise UserError(
                    f"{source} has no column {self.text_column} (it has {columns}): set text_column"
                )
            if feature not in (Value("string"), Value("large_string")):
                raise UserError(
                    f"column {self.text_column} of {source} holds not only strings: set text_column"
                )
        return {split: rows.select_columns(self.text_column) for split, rows in splits.items()}

    @cached_property
    def _cutoff(self) -> int | None:
        """The largest hash of a held-out document, or None where the source has a validation split."""
        if "validation" in self._documents:
            return None
        train = self._documents["train"]
        hashed = train.map(
            _hash_documents,
            input_columns=self.text_column,
            batched=True,
            remove_columns=self.text_column,
            desc="Hashing documents",
        )
        hashes = hashed.with_format("numpy")["hash"][:]
        if len(hashes) < 2:
            raise UserError(
                f"{self.source} is a single document, and validation takes whole ones: "
                "put it in a folder beside a validation file"
            )
        count = max(1, round(self.validation_fraction * len(hashes)))
        return int(np.partition(hashes, count - 1)[count - 1])

    def _training_texts(self) -> Iterator[str]:
        """Yield the training documents, up to what a BPE can use, taken evenly from the whole split."""
        train = self._documents["train"]
        step = -(-train.data.nbytes // _BPE_MAX_BYTES) or 1
        for batch in train.select(range(0, len(train), step)).iter(batch_size=1000):
            for text in batch[self.text_column]:
                if text and (self._cutoff is None or not _is_held_out(text, self._cutoff)):
                    yield text

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer: the one named, or the BPE, trained on first use and cached."""
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source)
        what = f"{self._documents['train']._fingerprint} {self._cutoff} {self.text_column} {EOS}"
        digest = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
        root = Path(self.cache_dir).expanduser() if self.cache_dir else cache_root()
        folder = root / "tokenizers" / f"bpe-{self._bpe_size}-{digest}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                train_bpe(self._training_texts(), self._bpe_size).save_pretrained(made)
                try:
                    os.rename(made, folder)
                except OSError:  # another process was first
                    assert folder.is_dir()
        return load_tokenizer(str(folder))

    @property
    def vocab_size(self) -> int:
        """Embedding rows that the tokens need: those asked of the BPE, or the named tokenizer's entries."""
        return self._bpe_size if self.tokenizer_source is None else len(self.tokenizer)

    @property
    def eos_token_id(self) -> int:
        """The token that ends each document."""
        return self.tokenizer.eos_token_id

    def load(self) -> dict[str, Rows]:
        """Return the splits as rows of tokens.

        Raises:
            UserError: a split has fewer tokens than one row.
        """
        from datasets import Features, List, Value

        def tokenized(split: str, origin: str) -> "Dataset":
            return self._documents[origin].map(
                _tokenize,
                input_columns=self.text_column,
                batched=True,
                remove_columns=self.text_column,
                features=Features({"input_ids": List(Value("int32"))}),
                fn_kwargs={
                    "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
                    "eos": self.eos_token_id,
                    "cutoff": self._cutoff if origin == "train" else None,
                    "held_out": split != origin,
                },
                desc=f"Tokenizing {split}",
            )

        if self._prepared is not None and self.source is not None:
            if tokenizer_hash(self.tokenizer) != self._prepared["tokenizer_sha256"]:
                raise UserError(
                    f"{self.source} was made with another tokenizer than {self.tokenizer_source}: "
                    f"leave tokenizer away, or tokenize again"
                )
            tokens = prepared_splits(self.source, self._prepared)
        else:
            origins = {"train": "train", "validation": "train"} | {split: split for split in self._documents}
            tokens = {split: tokenized(split, origin) for split, origin in origins.items()}
        rows = {split: PackedRows(run, self.block_size) for split, run in tokens.items()}
        for split, packed in rows.items():
            if not len(packed):
                raise UserError(
                    f"the {split} split of {self.source or 'the embedded text'} has only {packed.num_tokens} "
                    f"tokens, no row of block_size {self.block_size}: lower block_size or give more text"
                )
        return dict(rows)

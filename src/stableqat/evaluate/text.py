"""Texts to score: the validation data of a run, or any source that the text data module takes.

Documents follow one another in one run of tokens. As in training each is encoded by itself and ended by EOS;
published WikiText-2 figures join its rows by blank lines and encode the whole as one text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stableqat.data import TextDataModule
from stableqat.data.documents import Documents
from stableqat.data.encoder import DocumentEncoder
from stableqat.data.prepared import check_content, prepared_manifest, prepared_splits
from stableqat.data.text_rows import PackedRows, TokenRows
from stableqat.data.tokenizer import tokenizer_hash
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Join = Literal["eos", "blank-line"]
Split = Literal["train", "validation", "test"]
DOCUMENTS = 4096  # encoded at once: all tokens of a text as Python's integers would take ten times the memory


@dataclass(frozen=True)
class Text:
    """Rows of tokens, and what they are.

    Attributes:
        rows: Non-overlapping rows.
        split: Split of the source; all where it has none.
        documents: How documents follow one another.
    """

    rows: TokenRows
    split: str
    documents: str


def run_text(datamodule: TextDataModule, split: Split | None) -> Text:
    """The rows that a run validates on.

    Raises:
        UserError: If the run's data has no such split.
    """
    found = split or "validation"
    splits = datamodule.splits
    if found not in splits:
        raise UserError(f"split: the run's data has no {found} (it has {', '.join(splits)})")
    rows = splits[found]
    assert isinstance(rows, TokenRows)
    return Text(rows, found, "each ended by EOS")


def read_text(
    source: str,
    tokenizer: Any,
    *,
    block_size: int,
    name: str | None = None,
    text_column: str = "text",
    split: Split | None = None,
    documents: Join = "eos",
) -> Text:
    """Read a source and encode it.

    Args:
        source: File, folder, tokenized set or hub name.
        tokenizer: Encodes it; must be that of a tokenized set.
        block_size: Tokens a row.
        name: Configuration of a hub data set.
        text_column: Column that holds the text.
        split: Split to take; None takes test or validation, or all of a source that has neither.
        documents: How documents are joined.

    Raises:
        UserError: If there is no such source, split or column, or the text fills no row.
    """
    check_content(source)
    if manifest := prepared_manifest(source):
        if tokenizer_hash(tokenizer) != manifest["tokenizer_sha256"]:
            raise UserError(
                f"data: {source} was made with another tokenizer than the model's; tokenize it again"
            )
        if documents != "eos":
            raise UserError(f"documents: {source} is tokenized already; give its text for {documents}")
        splits = prepared_splits(source, manifest)
        found = _pick(source, split, list(splits))
        tokens, how = splits[found], "each ended by EOS"
    else:
        texts = Documents(
            source,
            name=name,
            text_column=text_column,
            validation_fraction=0.05,
            cache_dir=None,
            training=False,
        ).splits
        found = _pick(source, split, list(texts))
        column = (text or "" for batch in texts[found].iter(1000) for text in batch[text_column])
        if documents == "eos":
            tokens, how = _documents(column, tokenizer), "each ended by EOS"
        else:
            tokens, how = _joined(column, tokenizer), "joined by blank lines, encoded as one text"
        if "validation" not in texts and "test" not in texts:
            found = "all"
    rows = PackedRows(tokens, block_size)
    if not len(rows):
        raise UserError(
            f"data: {source} ({found}) has {rows.num_tokens} tokens, no block of {block_size}; "
            "lower block_size"
        )
    return Text(rows, found, how)


def _pick(source: str, split: Split | None, splits: list[str]) -> str:
    if split is None:
        return next(each for each in ("test", "validation", "train") if each in splits)
    if split not in splits:
        raise UserError(f"split: {source} has no {split} (it has {', '.join(splits)})")
    return split


def _documents(texts: Iterator[str], tokenizer: Any) -> "Dataset":
    encode, given, rows = DocumentEncoder.of(tokenizer), filter(None, texts), []
    while batch := list(islice(given, DOCUMENTS)):
        rows.append(np.concatenate(encode(batch)))
    return _dataset(rows)


def _joined(texts: Iterator[str], tokenizer: Any) -> "Dataset":
    return _dataset([np.array(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], np.int32)])


def _dataset(rows: list[np.ndarray]) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int32"))}))

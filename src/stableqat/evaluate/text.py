"""Texts to score: a run's validation data, or any source that the text data module takes.

Documents follow one another in one sequence of tokens. By default each is encoded by itself and ends with
EOS, as in training; published WikiText-2 figures join its rows by blank lines and encode the whole as one
text.
"""

from collections.abc import Collection, Iterator
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
DOCUMENTS = 4096  # per batch: a whole text's tokens as Python integers would take ten times the memory


@dataclass(frozen=True)
class Text:
    """Rows of tokens, and what they are.

    Attributes:
        rows: Non-overlapping rows.
        split: Split of the source; all if it has none.
        documents: How documents are joined, in words.
    """

    rows: TokenRows
    split: str
    documents: str


def run_text(datamodule: TextDataModule, split: Split | None) -> Text:
    """Return the rows of a run's split, by default those that it validates on.

    Raises:
        UserError: If the run's data has no such split.
    """
    splits = datamodule.splits
    found = pick_split("the run's data", split or "validation", splits)
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
        source: File, folder, tokenized set or Hub name.
        tokenizer: The model's tokenizer; a tokenized set must have been made with it.
        block_size: Tokens per row.
        name: Configuration of a data set on the Hub.
        text_column: Column that holds the text.
        split: Split to use; None takes test, else validation, else everything.
        documents: How to join documents.

    Raises:
        UserError: If there is no such source, split or column, or the text does not fill a row.
    """
    check_content(source)
    if manifest := prepared_manifest(source):
        if tokenizer_hash(tokenizer) != manifest["tokenizer_sha256"]:
            raise UserError(
                f"data: {source} was made with another tokenizer than the model's; tokenize it again"
            )
        if documents != "eos":
            raise UserError(f"documents: {source} is tokenized already; name its text for {documents}")
        splits = prepared_splits(source, manifest)
        found = pick_split(source, split, splits)
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
        found = pick_split(source, split, texts)
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


def pick_split(source: str, split: str | None, splits: Collection[str]) -> str:
    """The split to evaluate: the one asked for, or the first of test, validation and train.

    Args:
        source: The data, for the message.
        split: The user's choice.
        splits: The splits that the data has.

    Raises:
        UserError: If the data has no such split.
    """
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

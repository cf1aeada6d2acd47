"""Texts to score: a run's validation data, or any source that the text data module takes.

Documents follow one another in one sequence of tokens. By default each is encoded by itself and ends with
EOS, as in training; published WikiText-2 figures join its rows by blank lines and encode the whole as one
text. Conversations are rendered by the model's chat template, and lie in rows as in training.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stableqat.data import TextDataModule
from stableqat.data.conversation_rows import ConversationRows
from stableqat.data.documents import Documents
from stableqat.data.encoder import ConversationEncoder, DocumentEncoder
from stableqat.data.prepared import check_content, made_with_another, prepared_manifest, prepared_splits
from stableqat.data.text_rows import PackedRows, TokenRows
from stableqat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Join = Literal["eos", "blank-line"]
Split = Literal["train", "validation", "test"]
_ENDED = "each ended by EOS"
_RENDERED = "rendered by the chat template; the assistant's tokens count"
DOCUMENTS = 4096  # per batch: a whole text's tokens as Python integers would take ten times the memory
FEW_DOCUMENTS = 16  # per batch, where a part of the text is enough


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
    return Text(rows, found, _RENDERED if rows.hold_conversations else _ENDED)


def read_text(
    source: str,
    tokenizer: Any,
    *,
    block_size: int,
    name: str | None = None,
    text_column: str = "text",
    split: Split | None = None,
    documents: Join = "eos",
    drawn: int | None = None,
    seed: int = 0,
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
        drawn: Read only as much as fills this many rows, of documents in random order that `eos` joins; of a
            tokenized set and of conversations everything is there anyway.
        seed: Of the order.

    Raises:
        UserError: If there is no such source, split or column, or the text does not fill a row.
    """
    check_content(source)
    if manifest := prepared_manifest(source):
        if other := made_with_another(manifest, tokenizer):
            raise UserError(
                f"data: {source} was made with another {other} than the model's; tokenize it again"
            )
        if documents != "eos":
            raise UserError(f"documents: {source} is tokenized already; name its text for {documents}")
        splits = prepared_splits(source, manifest)
        found = pick_split(source, split, splits)
        tokens, conversations = splits[found], "spans" in splits[found].features
    else:
        raw = Documents(
            source,
            name=name,
            text_column=text_column,
            validation_fraction=0.05,
            cache_dir=None,
            training=False,
        )
        found, conversations = pick_split(source, split, raw.splits), raw.records.are_conversations
        if conversations and documents != "eos":
            raise UserError(f"documents: {source} holds {raw.records.words}; leave {documents} out")
        given = raw.splits[found] if drawn is None else raw.splits[found].shuffle(seed, keep_in_memory=True)
        column = (text or "" for batch in given.iter(1000) for text in batch.get(text_column, ()))
        if conversations:
            tokens = raw.encoded(ConversationEncoder.of(tokenizer, raw.records), found)
        elif documents == "eos":
            tokens = _documents(column, tokenizer, None if drawn is None else drawn * block_size)
        else:
            tokens = _joined(column, tokenizer)
        if "validation" not in raw.splits and "test" not in raw.splits:
            found = "all"
    if conversations:
        rows: TokenRows = ConversationRows(tokens, block_size, tokenizer.eos_token_id)
        lack, how = f"no label in rows of {block_size}; raise", _RENDERED
    else:
        rows = packed = PackedRows(tokens, block_size)
        lack = f"{packed.num_tokens} tokens, no block of {block_size}; lower"
        how = _ENDED if documents == "eos" else "joined by blank lines, encoded as one text"
    if not len(rows):
        raise UserError(f"data: {source} ({found}) has {lack} block_size")
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


def _documents(texts: Iterator[str], tokenizer: Any, most: int | None) -> "Dataset":
    encode, given, rows, left = DocumentEncoder.of(tokenizer), filter(None, texts), [], most or inf
    while left > 0 and (batch := list(islice(given, DOCUMENTS if most is None else FEW_DOCUMENTS))):
        rows.append(np.concatenate(encode(batch)))
        left -= len(rows[-1])
    return _dataset(rows)


def _joined(texts: Iterator[str], tokenizer: Any) -> "Dataset":
    return _dataset([np.array(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], np.int32)])


def _dataset(rows: list[np.ndarray]) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int32"))}))

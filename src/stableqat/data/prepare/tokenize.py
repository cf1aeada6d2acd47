"""A tokenized set: documents become rows of tokens in memory-mapped Arrow files.

The tokens of a split's documents, in the order of the files, form one run that is cut into rows of
`block_size`; a tail that does not fill a row is dropped. Conversations stay whole, and go into rows when they
are read. The result depends only on the input and the tokenizer, not on the number of processes or on
interruptions.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stableqat.data.chat import Records
from stableqat.data.encoder import ConversationEncoder, DocumentEncoder, Encoder, token_features
from stableqat.data.holdout import HeldOut, document_hash, hash_cutoff
from stableqat.data.prepare.corpus import CorpusFile, Record, documents, read
from stableqat.data.prepare.encode import Batch, Work, encode_all
from stableqat.data.prepare.output import Output, Shards
from stableqat.data.prepared import SAMPLE, check_content, read_field, read_manifest
from stableqat.data.tokenizer import (
    BPE_MIN_VOCAB,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    template_hash,
    tokenizer_hash,
    train_bpe,
)
from stableqat.errors import UserError
from stableqat.files import whole_folder
from stableqat.terminal import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: More text than this hardly changes a BPE's merges.
_BPE_CHARACTERS = 100_000_000
#: Shards are cut at this many tokens; a kill loses no more work than that.
_SHARD_TOKENS = 64_000_000
#: Tokens in a record batch of a shard.
_WRITTEN_TOKENS = 1_000_000
#: What the manifest of the set keeps from that of the sample.
_ORIGIN = ("source", "revision", "licence", "seed")
#: About how many characters a process gets at a time.
_BATCH_CHARACTERS = 500_000


def write_tokens(
    output: Output,
    files: dict[str, list[CorpusFile]],
    records: Records,
    sampled: dict[str, Any],
    num_proc: int,
) -> dict[str, dict[str, Any]]:
    """Write the tokenized set that the output's request asks for.

    Args:
        output: Where it goes.
        files: Of each split of the input.
        records: What the records of the input are.
        sampled: Manifest of the input, if it is a sample.
        num_proc: Processes that tokenize.

    Returns:
        The numbers of each split.

    Raises:
        UserError: If the input cannot be read, or a split does not fill a row.
    """
    request = output.request
    source, tokenizer, block_size = request["input"], request["tokenizer"], request["block_size"]
    fraction = request["validation_fraction"]
    check_content(source)
    held_out = _held_out(files, records, fraction, source)
    chosen = _tokenizer(output, tokenizer, _training_texts(files["train"], records, held_out))
    rows: _Rows | _Conversations
    if records.are_conversations:
        encoder: Encoder = ConversationEncoder.of(chosen, records)
        rows, what = _Conversations(output), "documents"
    else:
        encoder = DocumentEncoder.of(chosen)
        rows, what = _Rows(output, block_size), "rows"
    _run(Work(encoder, records, held_out), files, rows, num_proc, sampled)
    splits = rows.splits()
    for split in ("train", "validation"):
        if not splits.get(split, {}).get(what):
            output.discard()
            lack = f"fills no row of block_size {block_size}" if what == "rows" else "holds no conversation"
            raise UserError(
                f"the {split} split of {source} {lack}: "
                f"give more documents{'' if fraction is None else ' or a larger validation_fraction'}"
            )
    output.finish(
        {
            "tokenizer": tokenizer,
            "tokenizer_sha256": tokenizer_hash(chosen),
            "vocab_size": len(chosen),
            "eos_token_id": chosen.eos_token_id,
            "block_size": block_size,
            "validation": _validation(fraction, held_out),
            "sample": {key: sampled[key] for key in _ORIGIN if key in sampled},
            **({"chat_template_sha256": template_hash(chosen)} if records.are_conversations else {}),
            "splits": splits,
        }
    )
    return splits


def _validation(fraction: float | None, held_out: HeldOut) -> str:
    if fraction is None:
        return "the input's own"
    return f"{fraction} of {'the only document, its end' if held_out.end else 'the hashes'}, held out"


def read_sample(folder: Path) -> dict[str, Any]:
    """The manifest of a sample; an empty mapping for any other input."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] != SAMPLE:
        return {}
    read_field(folder, manifest, str, "text_column")
    for split in read_field(folder, manifest, dict, "splits"):
        read_field(folder, manifest, int, "splits", split, "characters")
    return manifest


def bpe_size(tokenizer: str) -> int | None:
    """N of train:N; None for the name of a tokenizer."""
    if not tokenizer.startswith("train:"):
        check_tokenizer(tokenizer)
        return None
    size = tokenizer.removeprefix("train:")
    if not size.isdecimal() or int(size) < BPE_MIN_VOCAB:
        raise UserError(f"tokenizer: {tokenizer} must name at least {BPE_MIN_VOCAB} entries (train:8192)")
    return int(size)


def _held_out(
    splits: dict[str, list[CorpusFile]], records: Records, fraction: float | None, source: str
) -> HeldOut:
    """Hash the documents outside of train; only these 8 bytes per document grow with the input."""

    def hashes(*names: str) -> Iterator[int]:
        files = (file for name in names for file in splits.get(name, ()))
        return (document_hash(text) for file in files for text in documents(file, records))

    others = np.unique(np.fromiter(hashes("validation", "test"), np.int64))
    if fraction is None:
        return HeldOut(0, others)
    if not records.are_conversations and len(list(islice(hashes("train"), 2))) == 1:
        return HeldOut(0, others, end=fraction)
    return HeldOut(hash_cutoff(fraction, hashes("train"), source), others)


def _training_texts(files: list[CorpusFile], records: Records, held_out: HeldOut) -> Iterator[str]:
    """Yield training documents, an equal share from each file, as many as a BPE can use."""
    for file in files:
        left = _BPE_CHARACTERS // len(files)
        for text in documents(file, records):
            for split, part in held_out.parts(text):
                if split == "train":
                    yield part
                    left -= len(part)
            if left <= 0:
                break


def _tokenizer(output: Output, name: str, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer, saved in the output's folder `tokenizer`."""
    folder = output.part / "tokenizer"
    if not folder.is_dir():
        size = bpe_size(name)
        made = load_tokenizer(name) if size is None else train_bpe(texts, size)
        with whole_folder(folder) as part:
            save_tokenizer(made, part)
    return load_tokenizer(str(folder))


def _batches(
    splits: dict[str, list[CorpusFile]], records: Records, place: dict[str, Any] | None
) -> Iterator[Batch]:
    """Yield the records of all files, starting at a place; a batch never spans files."""
    files = [(split, file) for split in ("validation", "test", "train") for file in splits.get(split, ())]
    at, first = (place["file"], place["record"]) if place else (0, 0)
    for number in range(at, len(files)):
        split, file = files[number]
        some: list[Record] = []
        size = 0
        for record in read(file, first, columns=records.all_columns):
            some.append(record)
            size += _size(record, records)
            if size >= _BATCH_CHARACTERS:
                yield Batch(split, number, file.name, first, some)
                first, some, size = first + len(some), [], 0
        if some:
            yield Batch(split, number, file.name, first, some)
        first = 0


def _size(record: Record, records: Records) -> int:
    """About how many characters a record has."""
    if isinstance(record, bytes):
        return len(record)
    texts = (record.get(column) for column in records.all_columns)
    return sum(len(text if isinstance(text, str) else json.dumps(text)) for text in texts if text is not None)


class _ArrowFile:
    """A shard in Arrow's stream format, with the schema that `datasets` writes: lists of int32.

    Args:
        path: Where it goes.
        columns: Its columns.
        length: Of each list; -1 for any.
    """

    def __init__(self, path: Path, columns: Sequence[str], length: int = -1):
        import pyarrow

        kind = {"feature": {"dtype": "int32", "_type": "Value"}, "length": length, "_type": "List"}
        about = json.dumps({"info": {"features": dict.fromkeys(columns, kind)}})
        row = pyarrow.list_(pyarrow.int32(), length)
        self.schema = pyarrow.schema(dict.fromkeys(columns, row), metadata={"huggingface": about})
        self.writer = pyarrow.ipc.new_stream(str(path), self.schema)

    def write(self, *columns: Any) -> None:
        import pyarrow

        self.writer.write_batch(pyarrow.record_batch(list(columns), schema=self.schema))

    def close(self) -> None:
        self.writer.close()


class _Rows:
    """Cuts the run of a split's tokens into rows and writes them to shards."""

    def __init__(self, output: Output, block_size: int):
        self.block_size = block_size
        self.shards = Shards(output, ".arrow", lambda path: _ArrowFile(path, ["input_ids"], block_size))
        tails = self.shards.place["tails"] if self.shards.place else {}
        self.pending = {split: [np.array(tail, np.int32)] for split, tail in tails.items()}

    def add(self, split: str, columns: dict[str, list[np.ndarray]]) -> None:
        pending = self.pending.setdefault(split, [])
        pending.append(np.concatenate(columns["input_ids"]))
        if sum(map(len, pending)) >= _WRITTEN_TOKENS:
            self._write(split)

    def _write(self, split: str) -> None:
        import pyarrow

        run = np.concatenate(self.pending[split])
        whole = len(run) // self.block_size * self.block_size
        self.pending[split] = [run[whole:]]
        if whole:
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(run[:whole]), self.block_size)
            self.shards[split].write(rows)
            self.shards.count(split, rows=whole // self.block_size, tokens=whole)

    def cut(self, place: dict[str, int]) -> None:
        for split in self.pending:
            self._write(split)
        tails = {split: pending[0].tolist() for split, pending in self.pending.items()}
        self.shards.cut({**place, "tails": tails})

    def splits(self) -> dict[str, dict[str, Any]]:
        """The shards and numbers of each split, with the number of tokens at its end that fill no row."""
        tails = self.shards.place["tails"]
        return {
            split: {**about, "tail_tokens": len(tails.get(split, ()))}
            for split, about in self.shards.splits().items()
        }


class _Conversations:
    """Writes whole conversations to shards, each with the spans of its tokens that the assistant writes."""

    def __init__(self, output: Output):
        columns = list(token_features(conversations=True))
        self.shards = Shards(output, ".arrow", lambda path: _ArrowFile(path, columns))

    def add(self, split: str, columns: dict[str, list[np.ndarray]]) -> None:
        import pyarrow

        lists = {name: pyarrow.array(runs, pyarrow.list_(pyarrow.int32())) for name, runs in columns.items()}
        self.shards[split].write(*lists.values())
        labelled = sum(int(np.diff(spans.reshape(-1, 2)).sum()) for spans in columns["spans"])
        self.shards.count(split, tokens=sum(map(len, columns["input_ids"])), assistant_tokens=labelled)

    def cut(self, place: dict[str, int]) -> None:
        self.shards.cut(place)

    def splits(self) -> dict[str, dict[str, Any]]:
        """The shards and numbers of each split."""
        return self.shards.splits()


def _run(
    work: Work,
    splits: dict[str, list[CorpusFile]],
    rows: _Rows | _Conversations,
    num_proc: int,
    sampled: dict[str, Any],
) -> None:
    """Tokenize what the last cut does not hold yet."""
    shards = rows.shards
    total = sum(split["characters"] for split in sampled.get("splits", {}).values()) or None
    done = sum(split.get("characters", 0) for split in shards.splits().values())
    with progress(total, done) as show:
        fresh, end = 0, shards.place or {"file": 0, "record": 0}
        for batch, encoded in encode_all(work, _batches(splits, work.records, shards.place), num_proc):
            for split, columns in encoded.columns.items():
                rows.add(split, columns)
                fresh += sum(map(len, columns["input_ids"]))
            for split, counts in encoded.counts.items():
                shards.count(split, **counts)
                done += counts.get("characters", 0)
            show(done, f"{done / 1e6:.0f}M characters")
            end = {"file": batch.file, "record": batch.first + len(batch.records)}
            if fresh >= _SHARD_TOKENS:
                rows.cut(end)
                fresh = 0
        if shards.place is None or end != {key: shards.place[key] for key in end}:
            rows.cut(end)

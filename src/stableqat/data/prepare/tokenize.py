"""`stableqat data tokenize`: documents become rows of tokens in memory-mapped Arrow files.

Documents are tokenized without special tokens, each is ended by EOS, and the run of a split's documents, in
the order of the files, is cut into rows of `block_size` tokens. The rows, one after another, are that run but
for its tail that fills no row. The result depends on the input and the tokenizer, not on the number of
processes, and on nothing that happened on the way.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableqat.data.corpus import (
    CORPUS_FORMATS,
    CorpusFile,
    Record,
    document_hash,
    find_corpus,
    hash_cutoff,
    parse,
    read,
    text_of,
)
from stableqat.data.prepare.encode import Batch, HeldOut, Work, encode_all
from stableqat.data.prepare.output import Output, Shards, read_field, read_manifest
from stableqat.data.prepared import KIND, SAMPLE, check_content
from stableqat.data.tokenizer import (
    BPE_MIN_VOCAB,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    tokenizer_json,
    train_bpe,
)
from stableqat.errors import UserError
from stableqat.terminal import plain, terminal

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

#: More text than this hardly moves a BPE's merges.
_BPE_CHARACTERS = 100_000_000
#: Shards are cut at this many tokens; so much work can be lost by a kill.
_SHARD_TOKENS = 64_000_000
#: A record batch of a shard.
_WRITTEN_TOKENS = 1_000_000
#: Characters, about, that a process is handed at a time.
_BATCH_CHARACTERS = 500_000


def tokenize(
    *,
    input: str,
    tokenizer: str,
    block_size: int,
    out: str,
    num_proc: int = 2,
    validation_fraction: float = 0.01,
    text_column: str | None = None,
) -> int:
    """Turns documents into rows of tokens, in memory-mapped Arrow files that fit and validate read.

    Killed and called again, it goes on, and ends with the same bytes. Validation documents come from the
    files whose names say so, or are held out by their hashes; a training document with the text of one of
    them is left out.

    Args:
        input: Folder of documents, such as one that `data sample` wrote: jsonl, parquet or txt, compressed or
            not.
        tokenizer: Hub name, folder or tokenizer.json; train:8192 trains a byte-level BPE of 8192 entries on
            the training documents. It is saved in the folder tokenizer of the set.
        block_size: Tokens a row.
        out: New folder for train-*.arrow, validation-*.arrow, tokenizer/ and manifest.json.
        num_proc: Processes that tokenize.
        validation_fraction: Share of the documents held out where the input has no validation files.
        text_column: Column that holds the text; if not given, what the input's manifest says, or text.

    Returns:
        0
    """
    if block_size < 2:
        raise UserError(f"block_size: must be at least 2, not {block_size}")
    if num_proc < 1:
        raise UserError(f"num_proc: must be at least 1, not {num_proc}")
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction: must lie between 0 and 1, not {validation_fraction}")
    _bpe_size(tokenizer)
    if not Path(input).expanduser().exists():
        raise UserError(f"no such data file or folder: {input} (a data set of the hub is sampled first)")
    corpus = find_corpus(input, CORPUS_FORMATS)
    sampled = _sampled(Path(input).expanduser())
    column = text_column or sampled.get("text_column", "text")
    own = "validation" in corpus.splits
    request = {
        "input": input,
        "tokenizer": tokenizer,
        "block_size": block_size,
        "text_column": column,
        "validation_fraction": None if own else validation_fraction,
        "files": {split: [[f.name, f.size] for f in files] for split, files in corpus.splits.items()},
    }
    with Output(out, KIND, request) as output:
        if output.done:
            terminal().print(plain(f"{out} holds this set already"))
            return 0
        check_content(input)
        held_out = _held_out(corpus.splits, column, None if own else validation_fraction)
        chosen = _tokenizer(output, tokenizer, _training_texts(corpus.splits["train"], column, held_out))
        work = Work(tokenizer_json(chosen), chosen.eos_token_id, column, held_out)
        rows = _Rows(output, block_size)
        _run(work, corpus.splits, rows, num_proc, sampled)
        splits = rows.splits()
        for split in ("train", "validation"):
            if not splits.get(split, {}).get("rows"):
                output.discard()
                raise UserError(
                    f"the {split} split of {input} fills no row of block_size {block_size}: "
                    f"give more documents{'' if own else ' or a larger validation_fraction'}"
                )
        origin = {key: sampled[key] for key in ("source", "revision", "licence", "seed") if key in sampled}
        output.finish(
            {
                "tokenizer": tokenizer,
                "tokenizer_sha256": tokenizer_hash(chosen),
                "vocab_size": len(chosen),
                "eos_token_id": chosen.eos_token_id,
                "block_size": block_size,
                "validation": "the input's own" if own else f"{validation_fraction} of the hashes, held out",
                "sample": origin,
                "splits": splits,
            }
        )
    for split, about in splits.items():
        terminal().print(
            f"{split}: {about['documents']} documents, {about['rows']} rows, {about['tokens']} tokens"
        )
    terminal().print(
        plain(f"written to {out}; next: stableqat fit ... --data.source {out} --data.block_size {block_size}")
    )
    return 0


def _sampled(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sample, nothing for other input."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] != SAMPLE:
        return {}
    read_field(folder, manifest, str, "text_column")
    for split in read_field(folder, manifest, dict, "splits"):
        read_field(folder, manifest, int, "splits", split, "characters")
    return manifest


def _bpe_size(tokenizer: str) -> int | None:
    """Return N of train:N, or None for the name of a tokenizer."""
    if not tokenizer.startswith("train:"):
        check_tokenizer(tokenizer)
        return None
    size = tokenizer.removeprefix("train:")
    if not size.isdecimal() or int(size) < BPE_MIN_VOCAB:
        raise UserError(
            f"tokenizer: {tokenizer} must name at least {BPE_MIN_VOCAB} entries, such as train:8192"
        )
    return int(size)


def _held_out(splits: dict[str, list[CorpusFile]], column: str, fraction: float | None) -> HeldOut:
    """Hash the documents outside of train; 8 bytes for each are the one thing that grows with the input."""
    import numpy as np

    others = [file for split in ("validation", "test") for file in splits.get(split, ())]
    hashes = (document_hash(text) for file in others for text in _texts(file, column))
    return HeldOut(0 if fraction is None else hash_cutoff(fraction), np.unique(np.fromiter(hashes, np.int64)))


def _texts(file: CorpusFile, column: str) -> Iterator[str]:
    for number, record in enumerate(read(file, column=column)):
        if text := text_of(parse(record, file.name, number), column, file.name):
            yield text


def _training_texts(files: list[CorpusFile], column: str, held_out: HeldOut) -> Iterator[str]:
    """Yield the training documents, up to what a BPE can use, an equal share from each file."""
    for file in files:
        left = _BPE_CHARACTERS // len(files)
        for text in _texts(file, column):
            if document_hash(text) not in held_out:
                yield text
                left -= len(text)
            if left <= 0:
                break


def _tokenizer(output: Output, name: str, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Return the tokenizer, which lies in the output's folder `tokenizer` from then on."""
    folder = output.part / "tokenizer"
    if not folder.is_dir():
        size = _bpe_size(name)
        made = load_tokenizer(name) if size is None else train_bpe(texts, size)
        save_tokenizer(made, output.part / ".tokenizer")
        os.replace(output.part / ".tokenizer", folder)
    return load_tokenizer(str(folder))


def _batches(
    splits: dict[str, list[CorpusFile]], column: str, place: dict[str, Any] | None
) -> Iterator[Batch]:
    """Yield the records of all files, from a place on; a batch never spans files."""
    files = [(split, file) for split in ("validation", "test", "train") for file in splits.get(split, ())]
    at, first = (place["file"], place["record"]) if place else (0, 0)
    for number in range(at, len(files)):
        split, file = files[number]
        records: list[Record] = []
        size = 0
        for record in read(file, first, column=column):
            records.append(record)
            text = record if isinstance(record, bytes) else record.get(column)
            size += len(text) if isinstance(text, bytes | str) else 0
            if size >= _BATCH_CHARACTERS:
                yield Batch(split, number, file.name, first, records)
                first, records, size = first + len(records), [], 0
        if records:
            yield Batch(split, number, file.name, first, records)
        first = 0


class _ArrowFile:
    """A shard: rows of tokens in Arrow's stream format, with the schema that `datasets` writes."""

    def __init__(self, path: Path, block_size: int):
        import pyarrow

        self.block_size = block_size
        kind = {"feature": {"dtype": "int32", "_type": "Value"}, "length": block_size, "_type": "List"}
        about = json.dumps({"info": {"features": {"input_ids": kind}}})
        row = pyarrow.list_(pyarrow.int32(), block_size)
        self.schema = pyarrow.schema({"input_ids": row}, metadata={"huggingface": about})
        self.writer = pyarrow.ipc.new_stream(str(path), self.schema)

    def write(self, tokens: "np.ndarray") -> None:
        import pyarrow

        rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens), self.block_size)
        self.writer.write_batch(pyarrow.record_batch([rows], schema=self.schema))

    def close(self) -> None:
        self.writer.close()


class _Rows:
    """Cuts the run of each split's tokens into rows and writes them to shards."""

    def __init__(self, output: Output, block_size: int):
        import numpy as np

        self.block_size = block_size
        self.shards = Shards(output, ".arrow", lambda path: _ArrowFile(path, block_size))
        tails = self.shards.place["tails"] if self.shards.place else {}
        self.pending = {split: [np.array(tail, np.int32)] for split, tail in tails.items()}

    def add(self, split: str, tokens: bytes) -> None:
        import numpy as np

        pending = self.pending.setdefault(split, [])
        pending.append(np.frombuffer(tokens, np.int32))
        if sum(map(len, pending)) >= _WRITTEN_TOKENS:
            self._write(split)

    def _write(self, split: str) -> None:
        import numpy as np

        run = np.concatenate(self.pending[split])
        whole = len(run) // self.block_size * self.block_size
        self.pending[split] = [run[whole:]]
        if whole:
            self.shards[split].write(run[:whole])
            self.shards.count(split, rows=whole // self.block_size, tokens=whole)

    def cut(self, place: dict[str, int]) -> None:
        for split in self.pending:
            self._write(split)
        tails = {split: pending[0].tolist() for split, pending in self.pending.items()}
        self.shards.cut({**place, "tails": tails})

    def splits(self) -> dict[str, dict[str, Any]]:
        """Return each split's shards and numbers, with the tokens at its end that fill no row."""
        tails = self.shards.place["tails"]
        return {
            split: {**about, "tail_tokens": len(tails.get(split, ()))}
            for split, about in self.shards.splits().items()
        }


def _run(
    work: Work, splits: dict[str, list[CorpusFile]], rows: _Rows, num_proc: int, sampled: dict[str, Any]
) -> None:
    """Tokenize all that the last cut doesn't hold yet."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shards = rows.shards
    total = sum(split["characters"] for split in sampled.get("splits", {}).values()) or None
    done = sum(split.get("characters", 0) for split in shards.splits().values())
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total, completed=done)
        fresh, end = 0, shards.place or {"file": 0, "record": 0}
        for batch, encoded in encode_all(work, _batches(splits, work.column, shards.place), num_proc):
            for split, tokens in encoded.tokens.items():
                rows.add(split, tokens)
                fresh += len(tokens) // 4
            for split, counts in encoded.counts.items():
                shards.count(split, **counts)
                done += counts.get("characters", 0)
            bar.update(task, completed=done, description=f"{done / 1e6:.0f}M characters")
            end = {"file": batch.file, "record": batch.first + len(batch.records)}
            if fresh >= _SHARD_TOKENS:
                rows.cut(end)
                fresh = 0
        if shards.place is None or end != {key: shards.place[key] for key in end}:
            rows.cut(end)

"""`stableqat data sample` and `stableqat data tokenize`: arguments in, a folder and a few lines out."""

from pathlib import Path
from typing import Any, Literal

from stableqat.data.budget import Budget
from stableqat.data.chat import Format
from stableqat.errors import UserError, check_range
from stableqat.terminal import plain, terminal


def sample(
    *,
    source: str,
    layout: Literal["slimpajama", "fineweb-edu", "text"],
    tokens: str,
    out: str,
    seed: int = 0,
    name: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
) -> int:
    """Draws whole documents from a corpus until they hold enough tokens, and keeps all their fields.

    After a kill, the same command resumes and ends with the same bytes. The validation split of the source
    is sampled up to 1% of the tokens; if there is none, the documents with the lowest 1% of hashes are held
    out, the same ones for every seed. No validation document is a training document.

    Args:
        source: Folder or file, or the name of a data set on the Hub, which is streamed.
        layout: Slimpajama (.jsonl.zst in chunk folders), fineweb-edu (parquet), or text: jsonl, parquet or
            txt, compressed or not.
        tokens: Training tokens to draw, such as 300000, 20M or 1.5B, counted as characters / 4; or all.
        out: New folder for train-*.jsonl.zst, validation-*.jsonl.zst and manifest.json.
        seed: Decides which documents are drawn.
        name: Configuration of a data set on the Hub, such as sample-10BT of FineWeb-Edu.
        revision: Branch, tag or commit of a data set on the Hub; the sample records the commit and stays
            with it.
        text_column: Column that holds the text.

    Returns:
        0
    """
    budget = None if tokens == "all" else Budget(tokens)
    check_range("seed", seed, 0)
    from stableqat.data.prepare.output import Output
    from stableqat.data.prepare.sample import write_sample
    from stableqat.data.prepared import SAMPLE

    request = {"source": source, "layout": layout, "tokens": tokens, "seed": seed}
    request |= {"name": name, "revision": revision, "text_column": text_column}
    with Output(out, SAMPLE, request) as output:
        if output.done:
            terminal().print(plain(f"{out} already holds this sample"))
            return 0
        splits = write_sample(output, budget)
    for split, about in splits.items():
        terminal().print(f"{split}: {about['documents']} documents, about {about['estimated_tokens']} tokens")
    terminal().print(plain(f"written to {out}; next: stableqat data tokenize --input {out}"))
    return 0


def tokenize(
    *,
    input: str,
    tokenizer: str,
    block_size: int,
    out: str,
    num_proc: int = 2,
    validation_fraction: float = 0.05,
    text_column: str | None = None,
    format: Format | None = None,
) -> int:
    """Turns documents into rows of tokens, in memory-mapped Arrow files that `fit` and `validate` read.

    Conversations stay whole, with the places of the assistant's tokens; they need a tokenizer with a chat
    template, and fill rows of any block_size when they are read.

    After a kill, the same command resumes and ends with the same bytes. Validation documents come from the
    files whose names say so, or are held out by their hashes; a training document with the same text as one
    of them is left out.

    Args:
        input: Folder of documents, such as one that `data sample` wrote: jsonl, parquet or txt, compressed or
            not.
        tokenizer: Hub name, folder or tokenizer.json; train:8192 trains a byte-level BPE of 8192 entries on
            the training documents. It is saved in the folder tokenizer of the set.
        block_size: Tokens per row.
        out: New folder for train-*.arrow, validation-*.arrow, tokenizer/ and manifest.json.
        num_proc: Processes that tokenize.
        validation_fraction: Share of the documents held out where the input has no validation files; of a
            single document, its end.
        text_column: Column that holds the text; default: what the input's manifest says, or text.
        format: What the records are: text, messages, prompt (and completion), or instruction (input and
            output). Default: what their columns say.

    Returns:
        0
    """
    check_range("block_size", block_size, 2)
    check_range("num_proc", num_proc, 1)
    from stableqat.data.holdout import check_share
    from stableqat.data.prepare.corpus import find_corpus, find_records
    from stableqat.data.prepare.output import Output
    from stableqat.data.prepare.tokenize import bpe_size, read_sample, write_tokens
    from stableqat.data.prepared import TOKENIZED
    from stableqat.data.source import TEXT_FORMATS

    check_share(validation_fraction)
    bpe_size(tokenizer)
    folder = Path(input).expanduser()
    if not folder.exists():
        raise UserError(f"no such data file or folder: {input} (draw a sample from a Hub data set first)")
    corpus, sampled = find_corpus(input, TEXT_FORMATS), read_sample(folder)
    column = text_column or sampled.get("text_column", "text")
    records = find_records(corpus.splits["train"], column, format)
    if records.are_conversations and bpe_size(tokenizer):
        raise UserError(f"tokenizer: {records.words} train no tokenizer: name that of a model")
    request: dict[str, Any] = {
        "input": input,
        "tokenizer": tokenizer,
        "block_size": block_size,
        "text_column": column,
        **({"format": records.format} if records.are_conversations else {}),
        "validation_fraction": None if "validation" in corpus.splits else validation_fraction,
        "files": {split: [[f.name, f.size] for f in files] for split, files in corpus.splits.items()},
    }
    with Output(out, TOKENIZED, request) as output:
        if output.done:
            terminal().print(plain(f"{out} already holds this set"))
            return 0
        splits = write_tokens(output, corpus.splits, records, sampled, num_proc)
    for split, about in splits.items():
        rows = f"{about['rows']} rows, " if "rows" in about else ""
        assistant = f", {about['assistant_tokens']} of the assistant" if "assistant_tokens" in about else ""
        terminal().print(
            f"{split}: {about['documents']} documents, {rows}{about['tokens']} tokens{assistant}"
        )
    terminal().print(
        plain(f"written to {out}; next: stableqat fit ... --data.source {out} --data.block_size {block_size}")
    )
    return 0

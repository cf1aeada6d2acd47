"""`stableqat data sample`: documents drawn from a corpus until there are N tokens of them.

Each folder of the corpus (a chunk of SlimPajama, a crawl of FineWeb-Edu) gives a share in proportion to its
bytes. In a folder the files come in an order that the seed shuffles, and a round over them takes those
documents whose hash, with the seed, falls into one of four equal parts; further rounds take the other parts.
So a sample spreads over four times as many files as could hold it, at the price of reading four times its
text, and is a pure function of the corpus and the seed. All documents have the same chance, but for one
thing: the file at which a folder's share is full is left at that document, which favours its beginning.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from stableqat.data.budget import token_count
from stableqat.data.corpus import (
    CORPUS_FORMATS,
    Corpus,
    CorpusFile,
    document_hash,
    find_corpus,
    hash_cutoff,
    parse,
    read,
    text_of,
)
from stableqat.data.prepare.output import Output, Shards
from stableqat.data.prepared import SAMPLE
from stableqat.errors import UserError
from stableqat.terminal import plain, terminal

#: English text, byte-level BPE: a little less than tokenizers of 32k entries and more need.
CHARACTERS_PER_TOKEN = 4
#: Validation documents, as a share of the training documents' tokens.
VALIDATION_SHARE = 0.01
#: Parts that the documents of a file are divided into by their hashes.
_PARTS = 4
#: Shards are cut at this many characters; so much work can be lost by a kill.
_SHARD_CHARACTERS = 64_000_000

_LAYOUTS: dict[str, tuple[dict[str, str], str]] = {
    "slimpajama": (
        {".jsonl": "json"},
        "SlimPajama gathers texts under the licences of its parts: Common Crawl's terms of use, C4 ODC-By, "
        "GitHub MIT, BSD or Apache, books, arXiv, Wikipedia CC BY-SA, StackExchange CC BY-SA",
    ),
    "fineweb-edu": ({".parquet": "parquet"}, "FineWeb-Edu: ODC-By 1.0, and Common Crawl's terms of use"),
    "text": (CORPUS_FORMATS, "not known to this program"),
}


@dataclass
class Place:
    """How far a draw has come; enough to go on with it.

    Args:
        taken: characters drawn.
        lap: 0 fills each folder's share, 1 fills up from the first folder that has documents left.
        folder: the folder drawn from.
        cursors: for each folder, the part of the documents, the file and the record that come next.
    """

    taken: int = 0
    lap: int = 0
    folder: int = 0
    cursors: list[list[int]] = field(default_factory=list)


class _JsonLines:
    def __init__(self, path: Path):
        import zstandard

        self.file: IO[bytes] = path.open("wb")
        self.stream = zstandard.ZstdCompressor(level=3).stream_writer(self.file)

    def write(self, line: bytes) -> None:
        self.stream.write(line)

    def close(self) -> None:
        self.stream.close()  # the file, too


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
    """Draws whole documents from a corpus until they hold so many tokens, and keeps all their fields.

    Killed and called again, it goes on, and ends with the same bytes. A source's own validation split is
    sampled by 1% of the tokens; from one that has none, the documents of the lowest 1% of hashes are held
    out, the same ones whatever the seed. No validation document is a training document.

    Args:
        source: Folder or file, or the name of a data set on the hub, which is streamed.
        layout: slimpajama (.jsonl.zst in chunk folders), fineweb-edu (parquet), or text: jsonl, parquet or
            txt, compressed or not.
        tokens: Training tokens to draw, such as 300000, 20M or 1.5B, counted as characters / 4; or all.
        out: New folder for train-*.jsonl.zst, validation-*.jsonl.zst and manifest.json.
        seed: Decides which documents are drawn.
        name: Configuration of a data set on the hub, such as sample-10BT of FineWeb-Edu.
        revision: Branch, tag or commit of a data set on the hub; the commit is recorded and kept to.
        text_column: Column that holds the text.

    Returns:
        0
    """
    goal = math.inf if tokens == "all" else float(token_count(tokens) * CHARACTERS_PER_TOKEN)
    if seed < 0:
        raise UserError(f"seed: must be 0 or more, not {seed}")
    formats, licence = _LAYOUTS[layout]
    request = {"source": source, "layout": layout, "tokens": tokens, "seed": seed}
    request |= {"name": name, "revision": revision, "text_column": text_column}
    with Output(out, SAMPLE, request) as output:
        if output.done:
            terminal().print(plain(f"{out} holds this sample already"))
            return 0
        corpus = _corpus(output, source, formats, name, revision)
        drawn = _draw_all(output, corpus, goal, seed, text_column)
        splits = drawn.splits()
        characters = splits.get("train", {}).get("characters", 0)
        if characters == 0 or characters < goal < math.inf:
            output.discard()
            raise UserError(
                f"{source} holds only about {characters // CHARACTERS_PER_TOKEN} training tokens, fewer than "
                f"{tokens}: ask for fewer, or for --tokens all"
            )
        for about in splits.values():
            about["estimated_tokens"] = about["characters"] // CHARACTERS_PER_TOKEN
        own = "validation" in corpus.splits
        output.finish(
            {
                "source": source,
                "layout": layout,
                "revision": corpus.revision,
                "licence": licence,
                "seed": seed,
                "text_column": text_column,
                "token_estimate": f"characters / {CHARACTERS_PER_TOKEN}",
                "validation": "from the source's own" if own else "held out by the hash of the text",
                "files": drawn.place["files"],
                "splits": splits,
            }
        )
    for split, about in splits.items():
        terminal().print(f"{split}: {about['documents']} documents, about {about['estimated_tokens']} tokens")
    terminal().print(plain(f"written to {out}; next: stableqat data tokenize --input {out}"))
    return 0


def _corpus(
    output: Output, source: str, formats: dict[str, str], name: str | None, revision: str | None
) -> Corpus:
    """Return the files of the source, on the hub those of the commit that the sample was begun with."""
    saved = output.load(".corpus.json")
    if saved:
        splits = {split: [CorpusFile(*file) for file in files] for split, files in saved["splits"].items()}
        known = Corpus(splits, saved["revision"])
        if known.revision is not None:
            return known
    corpus = find_corpus(source, formats, name=name, revision=revision)
    if saved and known != corpus:
        raise UserError(f"the files of {source} have changed: delete {output.part} to begin again")
    files = {split: [list(asdict(file).values()) for file in files] for split, files in corpus.splits.items()}
    output.save(".corpus.json", {"revision": corpus.revision, "splits": files})
    return corpus


def _draw_all(output: Output, corpus: Corpus, goal: float, seed: int, column: str) -> Shards[_JsonLines]:
    """Write the documents of both splits, from where the last cut ended."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shards = Shards(output, ".jsonl.zst", _JsonLines)
    if shards.place and shards.place["done"]:
        return shards
    saved = shards.place or {"validation": {}, "train": {}, "files": []}
    places = {split: Place(**saved[split]) for split in ("validation", "train")}
    sources = dict.fromkeys(saved["files"])
    held_out = set(_written_hashes(shards, column)) if "validation" in corpus.splits else None

    def cut(done: bool = False) -> None:
        about = {split: asdict(place) for split, place in places.items()}
        shards.cut({**about, "files": sorted(sources), "done": done})

    def write(split: str, fields: dict[str, Any], text: str, file: CorpusFile) -> None:
        shards[split].write(_as_line(fields))
        shards.count(split, documents=1, characters=len(text))
        sources[file.name] = None
        if shards.counted("characters") >= _SHARD_CHARACTERS:
            cut()

    parts = 1 if goal == math.inf else _PARTS
    if held_out is not None:
        place = places["validation"]
        files = corpus.splits["validation"]
        for fields, text, number, file in draw(files, VALIDATION_SHARE * goal, parts, seed, column, place):
            place.taken += len(text)
            held_out.add(number)
            write("validation", fields, text, file)
    place, cutoff = places["train"], hash_cutoff(VALIDATION_SHARE)
    columns = "{task.description}", BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn()
    console = Console(stderr=True)
    total, shown = (None if goal == math.inf else goal), 0
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        for fields, text, number, file in draw(corpus.splits["train"], goal, parts, seed, column, place):
            if held_out is None and number < cutoff:
                write("validation", fields, text, file)
            elif held_out is None or number not in held_out:
                place.taken += len(text)
                write("train", fields, text, file)
            if place.taken - shown > 100_000:
                shown = place.taken
                bar.update(task, completed=shown, description=f"{shown / 4e6:.1f}M tokens")
    cut(done=True)
    return shards


def _written_hashes(shards: Shards[_JsonLines], column: str) -> Iterator[int]:
    """Yield the hashes of the validation documents that an earlier, killed call wrote."""
    for shard in shards.shards:
        if shard["split"] == "validation":
            path = shards.output.part / shard["file"]
            for number, record in enumerate(read(CorpusFile(path.name, str(path), 0))):
                yield document_hash(text_of(parse(record, path.name, number), column, path.name))


def _as_line(fields: dict[str, Any]) -> bytes:
    try:
        line = json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name and UTF-8 can't hold
        line = json.dumps(fields, default=str).encode()
    return line + b"\n"


def draw(
    files: list[CorpusFile], goal: float, parts: int, seed: int, column: str, place: Place
) -> Iterator[tuple[dict[str, Any], str, int, CorpusFile]]:
    """Yield documents until `place.taken`, which the caller counts up, reaches the goal or there are no more.

    Args:
        files: of one split.
        goal: characters.
        parts: into which the documents are divided by hash; each file is read as often.
        seed: decides the order of files and the parts.
        column: that holds the text.
        place: where to go on; moved past each document before it is yielded.

    Yields:
        The document's fields, its text, the hash of the text, and its file.
    """
    by_folder: dict[str, list[CorpusFile]] = {}
    for file in files:
        by_folder.setdefault(str(PurePosixPath(file.name).parent), []).append(file)
    folders = [sorted(some, key=lambda file: _hash(seed, file.name)) for _, some in sorted(by_folder.items())]
    sizes = [sum(file.size for file in some) for some in folders]
    place.cursors = place.cursors or [[0, 0, 0] for _ in folders]
    for lap in range(place.lap, 2):
        for number in range(place.folder, len(folders)):
            place.lap, place.folder = lap, number
            # What one folder draws too much, or lacks, the next one makes good.
            share = sum(sizes[: number + 1]) / sum(sizes) if lap == 0 else 1
            if place.taken < goal * share:
                for document in _of_folder(folders[number], parts, seed, column, place.cursors[number]):
                    yield document
                    if place.taken >= goal * share:
                        break
        place.folder = 0


def _of_folder(
    files: list[CorpusFile], parts: int, seed: int, column: str, cursor: list[int]
) -> Iterator[tuple[dict[str, Any], str, int, CorpusFile]]:
    while cursor[0] < parts:
        while cursor[1] < len(files):
            file = files[cursor[1]]
            for record in read(file, cursor[2]):
                fields = parse(record, file.name, cursor[2])
                cursor[2] += 1
                if text := text_of(fields, column, file.name):
                    number = document_hash(text)
                    if _hash(seed, number) % parts == cursor[0]:
                        yield fields, text, number, file
            cursor[1:] = cursor[1] + 1, 0
        cursor[:] = cursor[0] + 1, 0, 0


def _hash(seed: int, what: str | int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {what}".encode(), digest_size=8).digest(), "big")

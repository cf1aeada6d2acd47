"""A sample: documents drawn from a corpus until a budget of tokens is met.

Each folder of the corpus (a chunk of SlimPajama, a crawl of FineWeb-Edu) contributes in proportion to its
bytes. Within a folder the seed shuffles the files, and a round over them takes the documents whose hash, with
the seed, falls into one of four equal parts; further rounds take the other parts. So a sample spreads over
four times as many files as could hold it, at the price of reading four times its text, and is a pure function
of the corpus and the seed. All documents have the same chance, with one exception: drawing stops in the
middle of the file that completes a folder's share, which favours the beginning of that file.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from stableqat.data.budget import CHARACTERS_PER_TOKEN, Budget
from stableqat.data.chat import Records
from stableqat.data.holdout import HeldOut, document_hash, hash_cutoff
from stableqat.data.prepare.corpus import Corpus, CorpusFile, document, documents, find_corpus, read
from stableqat.data.prepare.output import Output, Shards
from stableqat.data.source import TEXT_FORMATS
from stableqat.errors import UserError
from stableqat.terminal import progress

#: Tokens of the validation documents, as a share of those of the training documents.
VALIDATION_SHARE = 0.01
#: Number of parts into which hashes divide the documents of a file.
_PARTS = 4
#: Shards are cut at this many characters; a kill loses no more work than that.
_SHARD_CHARACTERS = 64_000_000

_LAYOUTS: dict[str, tuple[dict[str, str], str]] = {
    "slimpajama": (
        {".jsonl": "json"},
        "SlimPajama gathers texts under the licences of its parts: Common Crawl's terms of use, C4 ODC-By, "
        "GitHub MIT, BSD or Apache, books, arXiv, Wikipedia CC BY-SA, StackExchange CC BY-SA",
    ),
    "fineweb-edu": ({".parquet": "parquet"}, "FineWeb-Edu: ODC-By 1.0, and Common Crawl's terms of use"),
    "text": (TEXT_FORMATS, "not known to this program"),
}


@dataclass
class Place:
    """How far a draw has come; enough to resume it.

    Args:
        taken: Characters drawn.
        lap: 0 fills each folder's share, 1 fills up from the first folder that has documents left.
        folder: The folder to draw from.
        cursors: For each folder, the part of the documents, the file and the record that come next.
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
        self.stream.close()  # this also closes the file


def write_sample(output: Output, budget: Budget | None) -> dict[str, dict[str, Any]]:
    """Draw the documents that the output's request asks for.

    Args:
        output: Where they go.
        budget: Training tokens; None draws all documents.

    Returns:
        The numbers of each split.

    Raises:
        UserError: If the source cannot be read or holds too little.
    """
    request = output.request
    source, seed, column = request["source"], request["seed"], request["text_column"]
    formats, licence = _LAYOUTS[request["layout"]]
    corpus = _corpus(output, source, formats, request["name"], request["revision"])
    goal = budget.characters if budget else math.inf
    drawn = _draw_all(output, corpus, goal, seed, column)
    splits = drawn.splits()
    characters = splits.get("train", {}).get("characters", 0)
    if budget and characters < goal:
        output.discard()
        there = characters // CHARACTERS_PER_TOKEN
        raise budget.more_than(f"{source} holds, about {there}", "draw --tokens all")
    if characters == 0:
        output.discard()
        raise UserError(f"{source} has no training documents: give more text")
    for about in splits.values():
        about["estimated_tokens"] = about["characters"] // CHARACTERS_PER_TOKEN
    own = "validation" in corpus.splits
    output.finish(
        {
            "source": source,
            "layout": request["layout"],
            "revision": corpus.revision,
            "licence": licence,
            "seed": seed,
            "text_column": column,
            "token_estimate": f"characters / {CHARACTERS_PER_TOKEN}",
            "validation": "from the source's own" if own else "held out by the hash of the text",
            "files": drawn.place["files"],
            "splits": splits,
        }
    )
    return splits


def _corpus(
    output: Output, source: str, formats: dict[str, str], name: str | None, revision: str | None
) -> Corpus:
    """The files of the source; on the Hub, those of the commit with which the sample was begun."""
    saved = output.load(".corpus.json")
    if saved:
        splits = {split: [CorpusFile(*file) for file in files] for split, files in saved["splits"].items()}
        known = Corpus(splits, saved["revision"])
        if known.revision is not None:
            return known
    corpus = find_corpus(source, formats, name=name, revision=revision)
    if saved and known != corpus:
        raise UserError(f"the files of {source} have changed: delete {output.part} to start again")
    files = {split: [list(asdict(file).values()) for file in files] for split, files in corpus.splits.items()}
    output.save(".corpus.json", {"revision": corpus.revision, "splits": files})
    return corpus


def _draw_all(output: Output, corpus: Corpus, goal: float, seed: int, column: str) -> Shards:
    """Write the documents of both splits, starting where the last cut ended."""
    shards = Shards(output, ".jsonl.zst", _JsonLines)
    if shards.place and shards.place["done"]:
        return shards
    saved = shards.place or {"validation": {}, "train": {}, "files": []}
    places = {split: Place(**saved[split]) for split in ("validation", "train")}
    sources = dict.fromkeys(saved["files"])

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
    held_out = HeldOut(hash_cutoff(VALIDATION_SHARE))
    if "validation" in corpus.splits:
        listed = list(_written_hashes(shards, column))
        place = places["validation"]
        files = corpus.splits["validation"]
        for fields, text, number, file in draw(files, VALIDATION_SHARE * goal, parts, seed, column, place):
            place.taken += len(text)
            listed.append(number)
            write("validation", fields, text, file)
        held_out = HeldOut(0, np.unique(np.array(listed, np.int64)))
    place = places["train"]
    shown = 0
    with progress(None if goal == math.inf else goal, 0) as show:
        for fields, text, number, file in draw(corpus.splits["train"], goal, parts, seed, column, place):
            if (split := held_out.split(number)) is not None:
                place.taken += len(text) if split == "train" else 0
                write(split, fields, text, file)
            if place.taken - shown > 100_000:
                shown = place.taken
                show(shown, f"{shown / CHARACTERS_PER_TOKEN / 1e6:.1f}M tokens")
    cut(done=True)
    return shards


def _written_hashes(shards: Shards, column: str) -> Iterator[int]:
    """Yield the hashes of the validation documents that an earlier, killed call wrote."""
    for shard in shards.shards:
        if shard["split"] == "validation":
            path = shards.output.part / shard["file"]
            file = CorpusFile(path.name, str(path), 0)
            yield from map(document_hash, documents(file, Records("text", column)))


def _as_line(fields: dict[str, Any]) -> bytes:
    try:
        line = json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can hold it, UTF-8 cannot
        line = json.dumps(fields, default=str).encode()
    return line + b"\n"


def draw(
    files: list[CorpusFile], goal: float, parts: int, seed: int, column: str, place: Place
) -> Iterator[tuple[dict[str, Any], str, int, CorpusFile]]:
    """Yield documents until `place.taken`, which the caller counts, reaches the goal or none are left.

    Args:
        files: The files of one split.
        goal: The number of characters to draw.
        parts: Number of parts into which hashes divide the documents; each file is read once per part.
        seed: Decides the order of files and the parts.
        column: The column that holds the text.
        place: Where to resume; it moves past each document before that is yielded.

    Yields:
        The fields of a document, its text, the hash of the text, and its file.
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
            # The next folder makes up for what this one draws too much or lacks.
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
                fields, text = document(record, Records("text", column), file.name, cursor[2])
                cursor[2] += 1
                if text:
                    number = document_hash(text)
                    if _hash(seed, number) % parts == cursor[0]:
                        yield fields, text, number, file
            cursor[1:] = cursor[1] + 1, 0
        cursor[:] = cursor[0] + 1, 0, 0


def _hash(seed: int, what: str | int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {what}".encode(), digest_size=8).digest(), "big")

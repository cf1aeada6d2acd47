"""Batches of raw documents become tokens in processes of their own, in the order of the input.

They parse and hash as well as tokenize, so that the process that reads and writes keeps many of them busy. At
most a few batches are in flight, so that memory doesn't grow with the input.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stableqat.data.corpus import Record, document_hash, parse, text_of
from stableqat.data.tokenizer import encode_batch
from stableqat.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class HeldOut:
    """Which training documents are none: those of low hashes, and those that another split has, too."""

    cutoff: int
    listed: "np.ndarray"

    def __contains__(self, number: int) -> bool:
        return number < self.cutoff or self.is_listed(number)

    def is_listed(self, number: int) -> bool:
        """Whether another split has a document of that hash."""
        place = self.listed.searchsorted(number)
        return bool(place < len(self.listed) and self.listed[place] == number)


@dataclass(frozen=True)
class Batch:
    """Records of one file, from number `first` on."""

    split: str
    file: int
    name: str
    first: int
    records: list[Record]


@dataclass
class Encoded:
    """A batch's tokens by split, as bytes of int32, and what was counted."""

    tokens: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a process must know, once."""

    tokenizer: str
    eos: int
    column: str
    held_out: HeldOut

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    def encode(self, batch: Batch) -> Encoded:
        """Parse a batch's records, share them out to the splits and tokenize them."""
        import numpy as np

        texts: dict[str, list[str]] = {}
        left_out = 0
        for number, record in enumerate(batch.records, batch.first):
            text = text_of(parse(record, batch.name, number), self.column, batch.name)
            if not text:
                continue
            mark = document_hash(text) if batch.split == "train" else None
            if mark is not None and self.held_out.is_listed(mark):
                left_out += 1
                continue
            split = "validation" if mark is not None and mark < self.held_out.cutoff else batch.split
            # JSON can name half of a surrogate pair, which no tokenizer takes
            texts.setdefault(split, []).append(text.encode("utf-8", "replace").decode())
        encoded = Encoded()
        for split, some in texts.items():
            encoded_texts = encode_batch(self._backend, some)
            tokens = [np.array([*ids, self.eos], np.int32) for ids in encoded_texts]
            encoded.tokens[split] = np.concatenate(tokens).tobytes()
            encoded.counts[split] = {"documents": len(some), "characters": sum(map(len, some))}
        if left_out:
            encoded.counts.setdefault("train", {})["left_out"] = left_out
        return encoded


_work: Work


def _start(work: Work) -> None:
    """Prepare a process: it takes its work once, and ends with its parent, however that ends."""
    import multiprocessing
    from multiprocessing.connection import wait

    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C; a process that is started meanwhile never sees it, and ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode(batch: Batch) -> Encoded:
    return _work.encode(batch)


def encode_all(work: Work, batches: Iterator[Batch], num_proc: int) -> Iterator[tuple[Batch, Encoded]]:
    """Yield each batch with its tokens, in order; few batches are in flight, so memory stays flat."""
    if num_proc == 1:
        for batch in batches:
            yield batch, work.encode(batch)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=(work,))
    flying: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            with _uninterrupted():  # it may start a process
                flying.append((batch, pool.submit(_encode, batch)))
            if len(flying) > 2 * num_proc + 1:
                batch, future = flying.popleft()
                yield batch, future.result()
        for batch, future in flying:
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was ended (for memory?): the same command goes on; lower num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)

"""Batches of raw documents become tokens in worker processes, in the order of the input.

Workers also parse and hash, so that one process that reads and writes keeps many of them busy. Only a few
batches are in flight, so that memory does not grow with the input.
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

import numpy as np

from stableqat.data.chat import BadRecordError, Records
from stableqat.data.encoder import Encoder
from stableqat.data.holdout import HeldOut
from stableqat.data.prepare.corpus import Record, document
from stableqat.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Records of one file, starting with number `first`."""

    split: str
    file: int
    name: str
    first: int
    records: list[Record]


@dataclass
class Encoded:
    """A batch's columns by split, lists of int32, and counts of what became of those."""

    columns: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What each process receives, once."""

    encoder: Encoder
    records: Records
    held_out: HeldOut

    def encode(self, batch: Batch) -> Encoded:
        """Parse a batch's records, assign them to splits and tokenize them."""
        texts: dict[str, list[str]] = {}
        numbers: dict[str, list[int]] = {}
        left_out = 0
        for number, record in enumerate(batch.records, batch.first):
            if text := document(record, self.records, batch.name, number)[1]:
                parts = self.held_out.parts(text) if batch.split == "train" else [(batch.split, text)]
                left_out += not parts
                for split, part in parts:
                    texts.setdefault(split, []).append(part)
                    numbers.setdefault(split, []).append(number)
        encoded = Encoded()
        for split, some in texts.items():
            try:
                encoded.columns[split] = self.encoder.columns(some)
            except BadRecordError as error:
                row = numbers[split][error.index] + 1
                raise UserError(f"{batch.name} row {row}: {error.reason}") from error
            if not self.records.are_conversations:  # one run of tokens is handed over faster
                encoded.columns[split] = {k: [np.concatenate(v)] for k, v in encoded.columns[split].items()}
            encoded.counts[split] = {"documents": len(some), "characters": sum(map(len, some))}
        if left_out:
            encoded.counts.setdefault("train", {})["left_out"] = left_out
        return encoded


_work: Work


def _start(work: Work) -> None:
    """Prepare a process: it receives its work once, and ends with its parent, however that ends."""
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
    """Hold back Ctrl-C; a process that starts inside never sees it, and ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode(batch: Batch) -> Encoded:
    return _work.encode(batch)


def encode_all(work: Work, batches: Iterator[Batch], num_proc: int) -> Iterator[tuple[Batch, Encoded]]:
    """Yield each batch with its tokens, in order; few batches are in flight, so memory use is constant."""
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
        remedy = "lower num_proc and repeat the command; it resumes"
        raise UserError(f"a worker process died (out of memory?): {remedy}") from error
    finally:
        pool.shutdown(cancel_futures=True)

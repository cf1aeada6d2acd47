"""The order of samples: a pure function of (seed, position), divided among processes, resumed exactly.

Training is one endless stream. Epoch e visits the samples in an order drawn from (seed, e); a step takes the
next batch_size * world_size of them, and process r takes every world_size-th, starting with the r-th, so that
any number of processes sees the same samples per step. An iterator continues after the last batch handed out,
across Lightning's epochs and across a resume: the whole state is (epoch, samples consumed by all processes).
So a run resumes with the very next samples on any number of processes. If the number of samples per step is
unchanged, its steps are those of an uninterrupted run. Otherwise only the order is, except for the samples at
the end of an epoch that do not fill a step. Evaluation visits every sample once; a process that runs out of
batches gets a padding batch, because sharded forwards are collectives.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, SequentialSampler

from stableqat.data.mixture import Mixture
from stableqat.errors import UserError

#: The index of a padding row, whose labels are all ignored.
PAD = -1

#: The key of a sample: the seed and the epoch, which decide its augmentation, and its index.
Key = tuple[int, int, int]

#: What the training stream is drawn from, in the user's words.
_ORIGIN = {
    "seed": "data seed",
    "size": "number of training samples per epoch",
    "shares": "ratio of sources",
    "rows": "number of samples of each source",
    "repeats": "number of repeats of an image",
}


@contextmanager
def sample_rng() -> Iterator[Callable[[int, int, int], None]]:
    """Give a function that seeds the CPU generators of Python, NumPy and torch for the sample of a key.

    They are restored afterwards, once for a whole batch, as that takes as long as augmenting a small image.
    """

    def begin(seed: int, epoch: int, index: int) -> None:
        words = np.random.SeedSequence([seed, epoch, index]).generate_state(4)
        random.seed(words.tobytes())
        np.random.seed(words)
        torch.default_generator.manual_seed(int(words.view(np.uint64)[0]) >> 1)

    with isolate_rng(include_cuda=False):
        yield begin


# Lightning's overfit_batches replaces any sampler that is not a SequentialSampler with one that does not know
# keys; and these two do visit their positions in sequence.
class TrainingOrder(SequentialSampler):
    """One process's share of the endless training stream, in batches of keys; an iterator yields one epoch.

    Args:
        mixture: The samples of an epoch; the last incomplete global batch is dropped.
        batch_size: Samples per step and process.
        seed: Decides the order.
        rank: The rank of this process among those that read different data.
        world_size: The number of such processes.
        repeats: How often a sample comes in a row, each time as of an epoch of its own, which decides its
            augmentation (Hoffer et al., arXiv:1901.09335). An epoch stays as long, and visits fewer samples.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ):
        self.mixture, self.size, self.repeats = mixture, mixture.size, repeats
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.global_batch = batch_size * world_size
        assert 0 < self.global_batch <= self.size
        assert 0 <= rank < world_size
        self.position = (0, 0)

    def __len__(self) -> int:
        return self.size // self.global_batch

    def start_of_batch(self, position: tuple[int, int]) -> tuple[int, int]:
        """Where the batch at `position` starts: there, or at the start of the next epoch."""
        epoch, consumed = position
        return position if consumed + self.global_batch <= self.size else (epoch + 1, 0)

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]
        position, keys, keys_epoch = self.position, np.empty((0, 2), np.int64), -1
        for _ in range(len(self)):
            epoch, start = self.start_of_batch(position)
            if epoch != keys_epoch:
                keys, keys_epoch = self._keys(epoch), epoch
            stop = start + self.global_batch
            position = (epoch, stop)
            mine = keys[start + self.rank : stop : self.world_size].tolist()
            yield [(self.seed, of_epoch, index) for of_epoch, index in mine]

    def _keys(self, epoch: int) -> np.ndarray:
        """Of each sample of an epoch, the epoch that decides its augmentation, and its index: (size, 2)."""
        visits, places = np.divmod(epoch * self.size + np.arange(self.size), self.size * self.repeats)
        places, repeat = np.divmod(places, self.repeats)
        order = np.concatenate(
            [
                self.mixture.order(self.seed, int(visit))[places[visits == visit]]
                for visit in np.unique(visits)
            ]
        )
        return np.stack([visits * self.repeats + repeat, order], 1)

    def advance(self) -> None:
        """Count one global batch as consumed."""
        epoch, start = self.start_of_batch(self.position)
        self.position = (epoch, start + self.global_batch)


class EvaluationOrder(SequentialSampler):
    """One process's share of all samples, each once and in order, with as many batches on every process.

    Args:
        size: Number of samples.
        batch_size: Samples per batch and process.
        rank: The rank of this process among those that read different data.
        world_size: The number of such processes.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.size, self.rank, self.world_size = size, rank, world_size
        self.global_batch = batch_size * world_size

    def __len__(self) -> int:
        return -(-self.size // self.global_batch)

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]
        for start in range(0, self.size, self.global_batch):
            stop = min(start + self.global_batch, self.size)
            yield [(0, 0, i) for i in range(start + self.rank, stop, self.world_size)] or [(0, 0, PAD)]


class Loader(DataLoader):
    """A DataLoader that reports a user's error, or the death of a worker, in one line."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            *_, line = str(error).strip().splitlines()
            # Its traceback ends in a frame of torch that holds it: the cycle would keep the workers alive.
            cause = error.with_traceback(None)
            raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from cause
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError("a data loader worker died (out of memory?): lower data.num_workers") from error


class TrainingLoader(Loader):
    """A loader over a `TrainingOrder` that saves and restores its place in the stream.

    Only batches that were handed out count: not those that workers have prefetched, nor the last one if
    `unfinished` says that its training step was cut short.

    Args:
        dataset: Maps a list of keys to a batch.
        order: The stream of lists of keys.
        unfinished: Tells whether the step on the last batch handed out is unfinished.
        **kwargs: Arguments of DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        order: TrainingOrder,
        *,
        unfinished: Callable[[], bool] = lambda: False,
        **kwargs: Any,
    ):
        super().__init__(dataset, batch_size=None, sampler=order, **kwargs)
        self.order = order
        self.unfinished = unfinished
        self._previous = order.position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self._previous = self.order.position
            self.order.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, in samples of all processes, and what the stream is drawn from."""
        epoch, consumed = self._previous if self.unfinished() else self.order.position
        place = {"epoch": epoch, "consumed": consumed, "global_batch": self.order.global_batch}
        return {**place, **self._origin()}

    def _origin(self) -> dict[str, Any]:
        seed, mixture = self.order.seed, self.order.mixture
        origin = {"seed": seed, "size": mixture.size, "shares": mixture.shares, "rows": mixture.rows}
        return {**origin, "repeats": self.order.repeats}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: If the state was saved with other samples, another mixture of them, or another seed.
        """
        for key, own in self._origin().items():
            before = 1 if key == "repeats" else own  # stableqat 0.1 saved only seed and size
            if (saved := state.get(key, before)) != own:
                was, now = (":".join(map(str, v)) if isinstance(v, list) else v for v in (saved, own))
                causes = "data settings differ"
                if key in ("size", "rows"):
                    causes = f"{causes}, the data changed, or an earlier stableqat held out other samples"
                raise UserError(
                    f"cannot resume: the checkpoint's {_ORIGIN[key]} is {was}, this run's is {now} ({causes})"
                    "; resume with the same settings and data, or start a new run from its weights: "
                    "model.init_from RUN"
                )
        self.order.position = self._previous = (state["epoch"], state["consumed"])

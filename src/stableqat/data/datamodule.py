"""The base of both data modules: loaders over one order of samples, a resumable place in it, and the seed.

A subclass loads its splits; each is a dataset that maps a list of (seed, epoch, index) keys to a batch.
Lightning restores a loader's own state only if it resumes within an epoch, so the state of the data module
also holds the place in the training stream.
"""

import os
import weakref
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import LambdaCallback

from stableqat.data.mixture import Mixture
from stableqat.data.order import EvaluationOrder, Key, Loader, TrainingLoader, TrainingOrder
from stableqat.errors import UserError, check_range


class Rows(Protocol):
    """A split: its number of samples, and batches by their keys."""

    def __len__(self) -> int: ...

    def __getitem__(self, keys: list[Key]) -> dict[str, torch.Tensor]: ...


class DataModule(LightningDataModule, ABC):
    """Serves the splits that a subclass loads.

    Args:
        batch_size: Samples per step and process.
        num_workers: Processes that load batches in advance; 0 loads in the training process.
        seed: Decides the order and the augmentation; null takes the run's seed (seed_everything).
        eval_batch_size: Samples per batch and process of an evaluation; null takes `batch_size`.
        repeats: How often a sample comes in a row.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int | None = None,
        eval_batch_size: int | None = None,
        repeats: int = 1,
    ):
        super().__init__()
        check_range("batch_size", batch_size, 1)
        check_range("num_workers", num_workers, 0)
        check_range("eval_batch_size", eval_batch_size, 1, null=True)
        check_range("seed", seed, 0, below=2**63, null=True)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.repeats = repeats
        self.num_workers = num_workers
        self.seed = seed
        self._train_loader: TrainingLoader | None = None
        self._place: dict[str, Any] = {}

    @abstractmethod
    def load(self) -> dict[str, Rows]:
        """The splits: `train`, `validation`, and `test` if there is one."""

    @cached_property
    def splits(self) -> dict[str, Rows]:
        """The splits, prepared or read from the cache on first use."""
        return self.load()

    @property
    def mixture(self) -> Mixture:
        """How an epoch draws from the train split: each sample once."""
        return Mixture([len(self.splits["train"])])

    @property
    def run_seed(self) -> int:
        """The seed in use: the argument, or that of Lightning's seed_everything, or 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    def describe(self) -> dict[str, Any]:
        """What a run takes of the data, for its record."""
        return {"batch_size": self.batch_size}

    def prepare_data(self) -> None:
        """Fill the caches, on one process per machine."""
        self.splits  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Open the splits, on every process; a new fit starts at the beginning of the training stream."""
        self.splits  # noqa: B018
        if stage in (None, "fit"):
            self._train_loader, self._place = None, {}
            if self.trainer is not None:
                recount = LambdaCallback(on_train_start=lambda *_: self._recount())
                self.trainer.callbacks.insert(0, recount)  # type: ignore[attr-defined]  # before any saves

    def _share(self) -> dict[str, int]:
        """This process's rank among those that read different data, unlike tensor-parallel ones."""
        strategy = getattr(self.trainer, "strategy", None)
        share = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return {"rank": share["rank"], "world_size": share["num_replicas"]}

    def _loader_options(self) -> dict[str, Any]:
        strategy = getattr(self.trainer, "strategy", None)
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": strategy is not None and strategy.root_device.type == "cuda",
            # A loader draws a base seed at every start; with its own generator it leaves torch's alone.
            "generator": torch.Generator(),
        }

    def _step_unfinished(self) -> bool:
        if self.trainer is None:
            return False
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready > progress.processed  # type: ignore[attr-defined]

    def train_dataloader(self) -> TrainingLoader:
        """The loader of the training stream, at the restored place.

        Raises:
            UserError: If there are fewer samples than one step of all processes takes, or the checkpoint is
                of other data.
        """
        rows, mixture = self.splits["train"], self.mixture
        share = self._share()
        step, size = self.batch_size * share["world_size"], mixture.size
        if size < step:
            numbers = f"{size} samples, fewer than the {step} of one step"
            processes = f"batch_size x {share['world_size']} processes"
            raise UserError(f"the train split has {numbers} ({processes}): lower batch_size or add data")
        if overfit := getattr(self.trainer, "overfit_batches", 0):
            few = overfit * step if isinstance(overfit, int) else max(step, int(overfit * size))
            mixture = mixture.first(min(size, few))
        order = TrainingOrder(mixture, self.batch_size, seed=self.run_seed, repeats=self.repeats, **share)
        # A weak reference: workers take seconds to end if a cycle of references keeps their loader alive.
        module, options = weakref.proxy(self), self._loader_options()
        loader = TrainingLoader(rows, order, unfinished=lambda: module._step_unfinished(), **options)
        if place := self.state_dict():
            loader.load_state_dict(place)
        self._train_loader = loader
        return loader

    def _evaluation_loader(self, split: str) -> Loader:
        rows = self.splits[split]
        order = EvaluationOrder(len(rows), self.eval_batch_size, **self._share())
        return Loader(rows, batch_size=None, sampler=order, **self._loader_options())  # type: ignore[arg-type]

    def val_dataloader(self) -> Loader:
        """The loader of the validation split."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Loader:
        """The loader of the test split, or of the validation split if there is none."""
        return self._evaluation_loader("test" if "test" in self.splits else "validation")

    def predict_dataloader(self) -> Loader:
        """The loader that testing uses; the labels of padding rows are all -100."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream, for the checkpoint."""
        return self._train_loader.state_dict() if self._train_loader is not None else self._place

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Pass a checkpoint's place in the training stream to the training loader.

        Sharded strategies restore late: the loader already exists if the schedule asked for the run's length.
        """
        self._place = state_dict
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)

    def _recount(self) -> None:
        """Convert the number of batches of an earlier run, of another size, to batches of this run.

        Lightning ends an epoch, accumulates gradients and validates by the number of finished batches.
        """
        place, self._place = self._place, {}
        assert self._train_loader is not None
        saved, now = place.get("global_batch"), self._train_loader.order.global_batch
        if self.trainer is None or saved in (None, now):
            return
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        count: Any
        for count in (progress.total, progress.current):
            done = -(-count.processed * saved // now)
            if count is progress.current and progress.is_last_batch:  # the epoch is over, whatever is left
                done = int(self.trainer.num_training_batches)
            more = done - count.processed
            for stage in ("ready", "started", "processed", "completed"):
                setattr(count, stage, getattr(count, stage) + more)

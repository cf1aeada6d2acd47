"""Checkpoints of a run: the best by validation loss, the last, to resume from, and the one before the last.

Each is written beside its place (`*.partial`), flushed to disk and moved, so that it is either whole or
absent; none is written while the divergence guard is suspicious. When a new checkpoint replaces the last one,
the old one becomes `previous.ckpt`, from which `--ckpt_path last` resumes if the new one is damaged. The
price is disk space: three checkpoints per run, four while one is written.
"""

import logging
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from stableqat.callbacks.divergence import DivergenceGuard
from stableqat.callbacks.interruption import between_steps
from stableqat.checkpoints.names import BEST, LAST, PARTIAL, SUFFIX
from stableqat.checkpoints.write import (
    NotWrittenError,
    StreamedCheckpointIO,
    keep_previous,
    on_disk,
    put,
    tidy,
)
from stableqat.errors import check_range
from stableqat.files import remove

logger = logging.getLogger(__name__)


class _GuardedCheckpoint(ModelCheckpoint):
    enabled: bool

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            tidy(Path(self.dirpath) / f"{self.filename}{SUFFIX}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if between_steps(trainer):
            super().on_train_batch_end(trainer, *args)

    # The guard waits for the step's loss, so it is asked only when a checkpoint is due.

    def _save_topk_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        if not _suspicious(trainer):
            super()._save_topk_checkpoint(trainer, *args)

    def _save_last_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        if not _suspicious(trainer):
            super()._save_last_checkpoint(trainer, *args)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # one process of several cannot save alone
        can_save = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if isinstance(exception, NotWrittenError) or not can_save or _suspicious(trainer):
            return
        if not between_steps(trainer):
            return  # accumulated gradients would be lost; the previous checkpoint is complete
        try:
            super().on_exception(trainer, pl_module, exception)
        except NotWrittenError as error:  # the exception itself matters more
            logger.warning("%s", error)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # a gradient that is not finite spoils the weights while the loss is still finite
        healthy = all(guard.check_parameters(trainer, trainer.lightning_module) for guard in _guards(trainer))
        if not healthy or not self.enabled:
            return
        path, partial = Path(filepath), Path(filepath + PARTIAL)
        if trainer.is_global_zero:
            remove(partial)
        problem = trainer.strategy.broadcast(self._write(trainer, partial))
        if problem is None and trainer.is_global_zero:
            problem = on_disk(self._put, trainer, partial, path)
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            if trainer.is_global_zero:
                remove(partial)
            raise NotWrittenError(
                f"{path}: step {trainer.global_step} cannot be saved ({problem}); earlier checkpoints are "
                "unchanged: make room, and resume with --ckpt_path last"
            )
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for each in trainer.loggers:
                each.after_save_checkpoint(proxy(self))

    def _write(self, trainer: L.Trainer, partial: Path) -> str | None:
        problem = on_disk(trainer.save_checkpoint, partial, self.save_weights_only)
        if problem is not None:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait
        return problem

    def _put(self, trainer: L.Trainer, partial: Path, path: Path) -> None:
        put(partial, path)


class BestCheckpoint(_GuardedCheckpoint):
    """Keep `checkpoints/best.ckpt`, the state with the best metric.

    Args:
        monitor: Metric to watch.
        mode: min or max.
        enabled: False writes nothing, for short runs of which a study needs only the curves.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", enabled: bool = True) -> None:
        self.enabled = enabled
        super().__init__(
            filename=BEST.removesuffix(SUFFIX),
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the trainer, which knows from what the run resumes."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Find the best checkpoint in the run's folder, even if the folder has another name now."""
        folder, resumed = Path(str(self.dirpath)), Path(str(self._trainer.ckpt_path))
        score = state_dict.get("best_model_score")
        if resumed.parent.resolve() == folder.resolve() and isinstance(score, Tensor) and score.numel() == 1:
            best = str(folder / f"{self.filename}{SUFFIX}")
            self.best_model_path = self.kth_best_model_path = best
            self.best_model_score = self.kth_value = score
            self.best_k_models = {best: score}


class LastCheckpoint(_GuardedCheckpoint):
    """Keep `checkpoints/last.ckpt`: save after each validation, at the end, and when the run is interrupted.

    The checkpoint before it stays as `checkpoints/previous.ckpt`.

    Args:
        every_n_train_steps: Save every so many steps instead of after validations.
        enabled: False writes nothing; such a run starts over after an interruption.
    """

    def __init__(self, every_n_train_steps: int | None = None, enabled: bool = True) -> None:
        check_range("last.every_n_train_steps", every_n_train_steps, 1, null=True)
        self.enabled = enabled
        super().__init__(
            filename=LAST.removesuffix(SUFFIX),
            save_on_exception=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state: Lightning would remove the checkpoint that it names as the last one."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state, unless it is saved already or saving is off."""
        if not _suspicious(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def _put(self, trainer: L.Trainer, partial: Path, path: Path) -> None:
        """Keep the last checkpoint as the previous one, unless it may be damaged."""
        known = [Path(each).resolve() for each in (self._last_checkpoint_saved, trainer.ckpt_path) if each]
        if path.exists() and path.resolve() in known:
            keep_previous(path)
        super()._put(trainer, partial, path)


def forget_paths_elsewhere(checkpoint: dict[str, Any]) -> None:
    """Drop paths that lead elsewhere from the states of `ModelCheckpoint`s, which remove files.

    Args:
        checkpoint: The checkpoint to resume from, changed in place.
    """
    paths = {"best_model_path": "", "kth_best_model_path": "", "last_model_path": "", "best_k_models": {}}
    states = checkpoint.get("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if isinstance(state, dict) and "best_model_path" in state:
            named = [*(state.get("best_k_models") or {}), *(state.get(key) or "" for key in paths)]
            if any("://" in str(path) or ".." in Path(str(path)).parts for path in named):
                state.update(paths)


def _guards(trainer: L.Trainer) -> list[DivergenceGuard]:
    return [c for c in trainer.callbacks if isinstance(c, DivergenceGuard)]  # type: ignore[attr-defined]


def _suspicious(trainer: L.Trainer) -> bool:
    return any(guard.suspicious for guard in _guards(trainer))

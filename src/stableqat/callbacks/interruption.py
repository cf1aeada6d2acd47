"""Ends a run in order on SIGTERM or SIGUSR1, with which a scheduler claims its machines.

The run finishes its step, writes a checkpoint and exits with code 143. Lightning's own handlers communicate
between processes as soon as a signal arrives, which breaks a step that communicates, too; under SLURM they
save in the middle of a step, into the working folder. Here a handler only sets a flag. Processes exchange
their flags in each step and read them in the next, for which nobody waits, and all stop after the same step.
A validation that is due or has begun runs when the run resumes; Lightning would skip it. Validations wait for
the end of a step, so a checkpoint after one never holds half a step.
"""

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fit_loop import RestartStage
from torch import Tensor

from stableqat.callbacks.arrival import on_its_way

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM


class Interruption(L.Callback):
    """Stop all processes of a run at the same step once one of them receives a signal.

    In its last validation a run continues to its end, and between epochs to the first step of the next.
    """

    def __init__(self) -> None:
        self._unvalidated = False
        self._signalled = self._agreed = False
        self._exchanged: Callable[[], Tensor] | None = None
        self._seen_step = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers, which Lightning resets at the end; run the validation that a resume skips."""
        self._listen()
        self._seen_step = trainer.global_step
        _resume_epoch(trainer)
        loop = trainer.fit_loop.epoch_loop
        vars(loop)["_should_check_val_fx"] = partial(_validation_is_due, trainer)
        # Lightning's own broadcast makes the host wait for the device in every step
        vars(loop)["_broadcast_sigterm_tensor"] = lambda: None
        if self._unvalidated:
            loop._batches_that_stepped = trainer.global_step - 1  # the step at which it is logged
            loop.val_loop.restarting = False
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Compare flags before a step changes weights."""
        self._compare(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop at the end of an optimizer step, as a checkpoint holds no accumulated gradients."""
        fit = trainer.fit_loop
        assert fit._data_fetcher is not None
        self._unvalidated = fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        step, self._seen_step = self._seen_step, trainer.global_step
        if step != trainer.global_step:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Compare flags, as a validation may take longer than a scheduler waits."""
        if not trainer.sanity_checking:
            self._compare(trainer)
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note for the next checkpoint that the validation is done."""
        self._unvalidated = False

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is still due."""
        return {"unvalidated": self._unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._unvalidated = state_dict["unvalidated"]

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._flag)

    def _flag(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _compare(self, trainer: L.Trainer) -> None:
        """Read the flags that processes exchanged before, and exchange them again."""
        if trainer.world_size == 1:
            return
        if self._exchanged is not None:
            self._agreed = bool(self._exchanged() > 0)
        flag = torch.full((), float(self._signalled), device=trainer.strategy.root_device)
        self._exchanged = on_its_way(trainer.strategy.reduce(flag, reduce_op="sum"))

    def _stop(self, trainer: L.Trainer) -> None:
        agreed = self._agreed or (self._signalled and trainer.world_size == 1)  # alone: no need to wait
        # Lightning cannot resume from its counters between epochs, and the next step ends soon
        between = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if agreed and not between and trainer.global_step != trainer.max_steps:
            # Lightning ends the run at its next opportunity
            trainer._signal_connector.received_sigterm = True


def between_steps(trainer: L.Trainer) -> bool:
    """Whether no gradient is accumulated for the next step."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    last = current.processed == trainer.num_training_batches  # Lightning steps with what it has
    return last or current.processed % trainer.accumulate_grad_batches == 0


def _validation_is_due(trainer: L.Trainer, fetcher: Any) -> bool:
    """Apply Lightning's rule for any batch of a step at the step's end."""
    loop = trainer.fit_loop.epoch_loop
    if loop._should_accumulate():
        return False
    if type(loop)._should_check_val_fx(loop, fetcher):
        return True
    interval = trainer.val_check_batch
    if not loop._should_check_val_epoch() or interval is None or interval == float("inf"):
        return False
    done = (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx) + 1
    before = done - 1 - loop.batch_idx % trainer.accumulate_grad_batches
    return done // interval > before // interval


def _resume_epoch(trainer: L.Trainer) -> None:
    """Correct Lightning's counters where it resumes in an epoch that it counts as finished."""
    fit = trainer.fit_loop
    epochs = fit.epoch_progress
    if not fit.is_resuming or trainer.current_epoch != epochs.current.ready:
        return
    if fit.restarted_mid_epoch:  # saved at its last step: the next one begins
        fit.reset_restart_stage()
    elif trainer.max_steps == -1:
        return  # saved after it
    elif fit.epoch_loop._num_ready_batches_reached():  # the run had ended with it
        fit.epoch_loop.restarting = False
    else:  # the run had ended in its middle
        count: Any
        for count in (epochs.total, epochs.current):
            count.processed -= 1
            count.completed -= 1
        fit._restart_stage = RestartStage.RESTARTED_MID_EPOCH

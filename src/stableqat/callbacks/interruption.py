"""SIGTERM and SIGUSR1, from a scheduler that wants its machines back, end a run in order.

The step in hand is finished, a checkpoint written, and the command ends with exit code 143. Lightning's own
handlers communicate between processes at whatever moment a signal comes, which breaks a step that is
communicating as well, and under SLURM they save in the middle of a step, into the working folder. Here a
handler only takes a note; processes compare their notes before a step changes weights, and all stop after
the same one. A validation that was due or begun is made anew when the run resumes; Lightning would leave it
out. Validations wait for the end of a step: what is saved after one holds no half of it.
"""

import signal
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import RestartStage

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM


class Interruption(L.Callback):
    """Stop all processes of a run at the same step once one of them is told to.

    In its last validation a run goes on to its end, and after an epoch to the first step of the next.
    """

    def __init__(self) -> None:
        self._unvalidated = False
        self._noted = self._agreed = False
        self._seen_step = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; Lightning sets what was before when the run ends. Make up for what a resume leaves out."""
        self._listen()
        self._seen_step = trainer.global_step
        _resume_epoch(trainer)
        loop = trainer.fit_loop.epoch_loop
        vars(loop)["_should_check_val_fx"] = partial(_validation_is_due, trainer)
        # Lightning asks the first process at every step, and the host waits for the device to answer
        vars(loop)["_broadcast_sigterm_tensor"] = _nothing
        if self._unvalidated:
            loop._batches_that_stepped = trainer.global_step - 1  # the step it is logged at
            loop.val_loop.restarting = False
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Compare notes where the guard has waited for the device anyway."""
        self._compare(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop where a step has ended: gradients that are being accumulated are not saved."""
        fit = trainer.fit_loop
        assert fit._data_fetcher is not None
        self._unvalidated = fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
        step, self._seen_step = self._seen_step, trainer.global_step
        if step != trainer.global_step:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Compare notes: a validation may take longer than a scheduler waits."""
        if not trainer.sanity_checking:
            self._compare(trainer)
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """It is done, and the checkpoint to come says so."""
        self._unvalidated = False

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is still to be made."""
        return {"unvalidated": self._unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._unvalidated = state_dict["unvalidated"]

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def _compare(self, trainer: L.Trainer) -> None:
        self._agreed = trainer.strategy.reduce_boolean_decision(self._noted, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        agreed = self._agreed or (self._noted and trainer.world_size == 1)  # alone, there is no need to wait
        # between epochs Lightning's counters are not what it resumes from; the next step is soon done
        between = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if agreed and not between and trainer.global_step != trainer.max_steps:
            # Lightning ends the run at its next opportunity
            trainer._signal_connector.received_sigterm = True


def between_steps(trainer: L.Trainer) -> bool:
    """Whether no gradient has been gathered for a step that is still to come."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    last = current.processed == trainer.num_training_batches  # Lightning steps with what there is
    return last or current.processed % trainer.accumulate_grad_batches == 0


def _validation_is_due(trainer: L.Trainer, fetcher: Any) -> bool:
    """As Lightning has it, but at the end of a step, for any of its batches."""
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
    """Mend where Lightning goes on in an epoch that it has counted as over."""
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


def _nothing() -> None:
    """The notes say as much."""

"""What goes wrong: callbacks that the tests of faults add by `--trainer.callbacks+=faults.NAME`."""

import os
import random
import signal
import threading
from typing import Any

import lightning as L
import torch

PLACES = ("fsync", "link", "replace")  # what the writing of a checkpoint calls, in this order


class Doom(L.Callback):
    """Kills its process (SIGKILL) at a random moment: at any time, or while it writes a checkpoint.

    Args:
        seed: Decides the moment.
        seconds: The latest moment after training has begun, for one at any time.
        place: Call of the writing at which to kill; None leaves that to chance, too.
        call: Which one of its kind.
    """

    def __init__(self, seed: int = 0, seconds: float = 0.4, place: str | None = None, call: int = 1) -> None:
        self.chance = random.Random(seed)
        self.seconds = seconds
        self.place = place
        self.call = call

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.place is None and self.chance.random() < 0.5:
            threading.Timer(self.chance.uniform(0, self.seconds), _die).start()
            return
        place, calls = self.place or self.chance.choice(("write", *PLACES)), self.chance.randint(0, 4)
        remaining = iter(range(self.call - 1 if self.place else calls))

        def count(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(remaining, None) is None:
                    if place == "write":  # in the middle of a file
                        args[1].write(b"half of it" * 1000)
                        args[1].flush()
                    _die()
                return real(*args, **kwargs)

            return call

        if place == "write":
            torch.save = count(torch.save)
        else:
            setattr(os, place, count(getattr(os, place)))


class Poison(L.Callback):
    """Makes the loss of one step NaN.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            real = pl_module.training_step

            def once(*args: Any) -> torch.Tensor:
                del vars(pl_module)["training_step"]
                return real(*args) * torch.nan

            vars(pl_module)["training_step"] = once


class FullDisk(L.Callback):
    """No file may grow beyond a size from a step on, as on a full disk.

    Args:
        step: The step.
        size: Bytes.
    """

    def __init__(self, step: int, size: int = 300_000) -> None:
        self.step = step
        self.size = size

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        import resource

        if trainer.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Signal(L.Callback):
    """A signal comes: at a step, during validation, or to one process of several at any time.

    Args:
        step: Optimizer steps that are done then.
        number: The signal.
        when: train or validation.
        ranks: Processes that get it, each when it pleases.
    """

    def __init__(
        self, step: int, number: int = int(signal.SIGTERM), when: str = "train", ranks: str = "0"
    ) -> None:
        self.step = step
        self.number = number
        self.when = when
        self.ranks = ranks

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.when == "train" and trainer.global_step == self.step - 1:
            self._send(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.when == "validation" and trainer.global_step == self.step:
            self._send(trainer)

    def _send(self, trainer: L.Trainer) -> None:
        if str(trainer.global_rank) in self.ranks:
            threading.Timer(0.02 * trainer.global_rank, os.kill, (os.getpid(), self.number)).start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

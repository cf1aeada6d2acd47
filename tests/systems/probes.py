"""Callbacks that the tests of runs add by `--trainer.callbacks+=probes.NAME`."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stableqat.layers.linear import QuantLinear


class Probe(L.Callback):
    """Saves what processes must agree on: first weights and gradients, every loss, norms after clipping.

    Args:
        path: File to save to.
        keep_at: Step at which the last checkpoint is copied beside it, before the next one replaces it.
    """

    def __init__(self, path: str, keep_at: int = 8) -> None:
        self.path = Path(path)
        self.keep_at = keep_at
        self.seen: dict[str, Any] = {"gradients": {}, "losses": [], "clipped_norms": [], "types": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        self.seen["sharded"] = all(isinstance(p, DTensor) for p in named.values())
        self.seen["weights"] = {name: _whole(p) for name, p in named.items()}
        layer = next(m for m in pl_module.modules() if isinstance(m, QuantLinear))
        types = self.seen["types"]
        layer.register_forward_hook(lambda layer, x, y: types.append(f"{layer.weight.dtype} {y.dtype}"))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if not self.seen["gradients"]:
            grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            self.seen["gradients"] = {name: _whole(grad) for name, grad in grads.items()}

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [_whole(p.grad) for p in parameters if p.grad is not None]
        if grads:
            self.seen["clipped_norms"].append(torch.stack([grad.norm() for grad in grads]).norm().item())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen["losses"].append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
        if trainer.global_step == self.keep_at:
            folder = Path(trainer.log_dir)  # all ranks take part
            if trainer.is_global_zero:
                shutil.copy(folder / "checkpoints" / "last.ckpt", self.path.with_suffix(".ckpt"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)


class Cut(L.Callback):
    """Ends the process at a step: kill (SIGKILL) or terminate (SIGTERM) after it, raise in the middle of it.

    Args:
        step: Optimizer steps that are done then.
        how: kill, terminate or raise.
    """

    def __init__(self, step: int, how: str = "kill") -> None:
        self.step = step
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self.step and self.how != "raise":
            trainer.logger.experiment.flush()  # the step that the checkpoint ended with was logged after it
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGTERM)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self.step and self.how == "raise":
            raise RuntimeError("cut")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Collectives(L.Callback):
    """Counts what Python asks of other processes in each step; gradients go by themselves.

    Args:
        path: File that the first process saves a list of counts to, one a step.
    """

    NAMES = ("all_reduce", "broadcast", "barrier", "all_gather", "broadcast_object_list")

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.counts: list[dict[str, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.counts:  # not before: what is measured of the start is no part of a step
            for name in self.NAMES:
                setattr(torch.distributed, name, self._counting(name, getattr(torch.distributed, name)))
        self.counts.append({})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(self.counts, self.path)

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[-1][name] = self.counts[-1].get(name, 0) + 1
            return function(*args, **kwargs)

        return counted


class Ranks(L.Callback):
    """Saves the quantizers of inputs of every process, first and last, and their first gradients.

    Args:
        path: File that the first process saves to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seen: dict[str, list[Any]] = {"begun": [], "gradients": [], "ended": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gather("begun", dict(_of_inputs(pl_module)))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
        if not self.seen["gradients"]:
            gradients = {name: p.grad for name, p in _of_inputs(pl_module) if p.grad is not None}
            self._gather("gradients", gradients)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gather("ended", dict(_of_inputs(pl_module)))
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)

    def _gather(self, when: str, tensors: dict[str, Tensor]) -> None:
        own = {name: _whole(tensor) for name, tensor in tensors.items()}
        every: list[Any] = [own]
        if torch.distributed.is_initialized():
            every = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, own)
        self.seen[when] = every


def _of_inputs(module: L.LightningModule) -> Any:
    places = (".input_quantizer.", ".attention_quantizer.")
    return ((name, p) for name, p in module.named_parameters() if any(place in name for place in places))

"""How fast a run trains, which share of the GPUs' peak that is, and whether it waits for data.

Model FLOPs utilisation (MFU, Chowdhery et al. 2022, arXiv 2204.02311) is the model's arithmetic over what the
device could do in the same time. The model's arithmetic is three times that of the unquantized model's
forward, with its matrix products and the whole square of attention, counted once on the meta device;
quantizers, recomputation and optimizers do not count. Nothing here waits for the device: steps are timed from
log entry to log entry, without validations, checkpoints and the first step.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_WRITE_EVERY = 5.0  # seconds

# Dense 16-bit matrix products in FLOP/s by device name, from NVIDIA's data sheets. Lightning's table has
# twice that for some devices, which only sparse matrices reach.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


class Throughput(L.Callback):
    """Log `perf/tokens_per_s` (or `perf/images_per_s`), `perf/step_ms` and `perf/loader_wait`.

    Tokens and images are those of all processes; `perf/loader_wait` is the share of time spent waiting for
    data. On a GPU, `perf/peak_memory_gb` is the most that PyTorch has allocated on the first GPU, and
    `perf/mfu` the model FLOPs utilisation under 16-bit autocast, if the device's peak is known.

    Args:
        enabled: False measures nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._flops_of_row: float | None = None
        self._since: float | None = None
        self._fetching = 0.0
        self._seen_step = 0
        self._warm = False
        self._written = 0.0
        self._clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock at the first batch."""
        self.enabled = self.enabled and bool(trainer.loggers)
        self._since, self._warm, self._seen_step = None, False, trainer.global_step
        self._clear()
        loop = trainer.fit_loop.epoch_loop
        kind = type(loop)

        def before() -> None:
            self._fetching = time.perf_counter()
            if self._since is None:
                self._since = self._fetching
            kind._on_before_fetch(loop)

        def after() -> None:
            kind._on_after_fetch(loop)
            self._waited += time.perf_counter() - self._fetching

        vars(loop).update(_on_before_fetch=before, _on_after_fetch=after)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock until the next batch is fetched."""
        self._since = None

    def on_save_checkpoint(self, *_: Any) -> None:
        """Stop the clock, as for a validation."""
        self._since = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count a batch, and log when the trainer does."""
        if not self.enabled:
            return
        stepped, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        now = time.perf_counter()
        assert self._since is not None
        self._seconds += now - self._since
        self._since = now
        inputs = batch[_input_key(pl_module, batch)]
        self._rows += len(inputs)
        self._items += len(inputs) if inputs.is_floating_point() else inputs.numel()
        self._steps += stepped
        if stepped and not self._warm:
            self._warm = True
            self._clear()
        elif stepped and _is_logged(trainer):
            if trainer.is_global_zero:
                self._log(trainer, pl_module, batch)
            self._clear()

    def _log(self, trainer: L.Trainer, pl_module: Any, batch: dict[str, Tensor]) -> None:
        unit = "images" if batch[_input_key(pl_module, batch)].is_floating_point() else "tokens"
        metrics = {
            f"perf/{unit}_per_s": self._items * trainer.world_size / self._seconds,
            "perf/step_ms": 1000 * self._seconds / self._steps,
            "perf/loader_wait": self._waited / self._seconds,
        }
        device = trainer.strategy.root_device
        if device.type == "cuda":
            metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if peak := peak_flops(device, str(trainer.precision)):
            if self._flops_of_row is None:
                self._flops_of_row = training_flops(pl_module, batch)
                self._since = None  # counting takes a second that is not training
            metrics["perf/mfu"] = self._flops_of_row * self._rows / self._seconds / peak
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if time.perf_counter() > self._written + _WRITE_EVERY:  # a follower sees it, by itself after minutes
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
            self._written = time.perf_counter()

    def _clear(self) -> None:
        self._seconds = self._waited = 0.0
        self._rows = self._items = self._steps = 0


@contextmanager
def untimed(trainer: L.Trainer) -> Iterator[None]:
    """Exclude a callback's work within a step from the times."""
    began = time.perf_counter()
    yield
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput) and callback._since is not None:
            callback._since += time.perf_counter() - began


def _is_logged(trainer: L.Trainer) -> bool:
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return a device's peak FLOP/s in 16-bit matrix products; None if unknown, or for another precision."""
    if device.type != "cuda" or not precision.startswith(("16", "bf16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def training_flops(pl_module: Any, batch: dict[str, Tensor]) -> float:
    """Count the FLOPs of the unquantized model's forward and backward per row of a batch."""
    inputs = batch[_input_key(pl_module, batch)]
    with torch.random.fork_rng([]), torch.device("meta"), torch.no_grad():
        model = pl_module.build_model()
        # transformers looks at the values of a real row
        with FakeTensorMode(allow_non_fake_inputs=True):
            row = torch.empty((1, *inputs.shape[1:]), dtype=inputs.dtype)
            return 3.0 * measure_flops(model, lambda: model(row))


def _input_key(pl_module: Any, batch: dict[str, Tensor]) -> str:
    """Return the key of the model's input in a batch; transformers' name if the module does not say."""
    return getattr(pl_module, "input_key", "input_ids" if "input_ids" in batch else "pixel_values")

"""Sets the scales of a run's input quantizers from training batches, before anything is measured."""

import logging
from collections.abc import Iterator
from typing import Any

import lightning as L

from stableqat.errors import UserError, check_range, counted
from stableqat.evaluate.isolation import isolated
from stableqat.layers.calibration import calibrate_inputs

logger = logging.getLogger(__name__)


class CalibrateInputs(L.Callback):
    """Calibrate before the first step or the validation of a start; a checkpoint brings its own scales.

    All processes take the same scales. The place in the training data and the random states stay as they
    were. The modules of this suite add the callback.

    Args:
        batches: Number of training batches of each process.
    """

    def __init__(self, batches: int) -> None:
        check_range("model.calibration_batches", batches, 1)
        self.batches = batches

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate a run that trains.

        Raises:
            UserError: As `calibrate_inputs`.
        """
        self._calibrate(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate a run that only validates, as `on_fit_start` does."""
        if trainer.state.fn == "validate":
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return
        model: Any = pl_module.model
        with trainer.precision_plugin.forward_context(), isolated(model):
            done = calibrate_inputs(
                model, self._batches(trainer, pl_module), lambda batch: pl_module.predict_step(batch, 0)
            )
        if done and trainer.is_global_zero:
            logger.info("activations: %s calibrated", counted(done, "quantizer"))

    def _batches(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Any]:
        loader: Any = trainer.fit_loop._data_source.dataloader()
        place = loader.state_dict() if hasattr(loader, "load_state_dict") else None
        number = 0
        for number, batch in zip(range(1, self.batches + 1), loader, strict=False):  # noqa: B007
            converted = trainer.precision_plugin.convert_input(batch)
            yield trainer.strategy.batch_to_device(pl_module._on_before_batch_transfer(converted))
        if place is not None:
            loader.load_state_dict(place)
        if not number:
            raise UserError("model.calibration_batches: the training data has no batch to calibrate on")

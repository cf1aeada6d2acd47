"""QAT for any LightningModule, by one callback.

The module's layers are swapped after its `configure_model`, before the optimizer exists and before a
checkpoint is loaded, so that runs resume. The callback adds `HoldWeights`, after the callbacks that swap
weights, and `FollowTraining`.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.distributed.tensor import DTensor

from stableqat.api import (
    Calibration,
    calibrate,
    check_calibration,
    prepare_and_report,
    refuse_another,
    was_converted,
)
from stableqat.callbacks.follow import FollowTraining
from stableqat.callbacks.hold import HoldWeights
from stableqat.callbacks.record import keep_report
from stableqat.callbacks.refused import left_out
from stableqat.errors import UserError
from stableqat.evaluate.isolation import isolated
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import Quantizer
from stableqat.quantizers.factory import NamedSpec, make_factory
from stableqat.quantizers.inputs import InputQuantizer, InputQuantizerSpec
from stableqat.surgery import HEADS, SurgeryReport


class PrepareQAT(L.Callback):
    """Quantize the linear layers of a module, see `stableqat.prepare`.

    Its `configure_optimizers` should use `stableqat.parameter_groups(self, lr)`; an optimizer of
    `self.parameters()` works as well, but gives the scales ten times the learning rate.

    Args:
        quantizer: A method by name, a factory that makes the quantizer of one weight, or a mapping of these
            by layer pattern.
        skip: Linear layers that stay in full precision: shell patterns over names or parts of names.
        input_quantizer: Makes the quantizer of a quantized layer's input, see `stableqat.prepare`.
        calibration: Sets the scales of input quantizers before the first step of a run that does not resume:
            inputs of the module's forward, batch by batch, or a function that is given the module and runs it
            on all batches. It changes no random states.
        example_inputs: Inputs of the module's forward; None waits for the first forward of it or its parts.
        options: Options of the quantizer, such as `bits=2`.
    """

    def __init__(
        self,
        quantizer: NamedSpec = "stableqat",
        skip: str | Sequence[str] = HEADS,
        *,
        input_quantizer: InputQuantizerSpec | None = None,
        calibration: Calibration | None = None,
        example_inputs: Any = None,
        **options: Any,
    ) -> None:
        check_calibration(input_quantizer, calibration)
        self.input_quantizer, self.calibration = input_quantizer, calibration
        self.quantizer, self.options, self.example_inputs = quantizer, options, example_inputs
        self.report: SurgeryReport | None = None
        self.checked = False
        self.skip = [skip] if isinstance(skip, str) else skip

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the module as soon as it is built, unless it is prepared already.

        A converted module is prepared again for training only.

        Raises:
            UserError: If a callback copies the module before it has quantizers.
        """
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit":
            self._check_averaging(callbacks)
        for brought in (HoldWeights, FollowTraining):
            if not any(isinstance(callback, brought) for callback in callbacks):
                callbacks.append(brought())
        if quantized_layers(pl_module):
            refuse_another(
                pl_module, make_factory(self.quantizer, self.options), self.skip, self.input_quantizer
            )
            return
        if stage != "fit" and was_converted(pl_module):
            return
        configure = pl_module.configure_model

        def configure_and_prepare() -> None:
            vars(pl_module).pop("configure_model", None)  # only once
            configure()  # the module's own, or that of an earlier PrepareQAT
            if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
                raise UserError(
                    "PrepareQAT: configure_model shards the model; call stableqat.prepare there, before "
                    "fully_shard, and leave the callback out"
                )
            self.report = prepare_and_report(
                pl_module,
                self.quantizer,
                self.skip,
                input_quantizer=self.input_quantizer,
                example_inputs=self.example_inputs,
                **self.options,
            )

        vars(pl_module)["configure_model"] = configure_and_prepare

    def _check_averaging(self, callbacks: list[L.Callback]) -> None:
        for place, callback in enumerate(callbacks):
            name = type(callback).__name__
            too_early = isinstance(callback, WeightAveraging) and place < callbacks.index(self)
            if too_early or isinstance(callback, StochasticWeightAveraging):
                remedy = (
                    "take WeightAveraging or EMAWeightAveraging, after PrepareQAT, or call stableqat.prepare"
                )
                if too_early:
                    remedy = "put it after PrepareQAT in the trainer's callbacks"
                raise UserError(
                    f"PrepareQAT: {name} copies the module before its layers are quantized; {remedy}"
                )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Restore a module that was not built."""
        vars(pl_module).pop("configure_model", None)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the surgery report, calibrate, and refuse an optimizer without the scales.

        Those would never train.
        """
        keep_report(self.report, trainer)
        if self.calibration is not None and trainer.ckpt_path is None:
            self._calibrate(trainer, pl_module, self.calibration)
        quantizers = [
            module for module in pl_module.modules() if isinstance(module, Quantizer | InputQuantizer)
        ]
        lost = left_out(trainer, (named for each in quantizers for named in each.named_parameters()))
        if lost:
            raise UserError(
                f"PrepareQAT: {len(lost)} learned parameters of quantizers are in no optimizer; pass "
                "stableqat.parameter_groups(self, lr) to it in configure_optimizers"
            )

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule, calibration: Calibration) -> None:
        if not callable(calibration):
            calibration = map(trainer.strategy.batch_to_device, calibration)
        with trainer.precision_plugin.forward_context(), isolated(pl_module):
            calibrate(pl_module, calibration)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a weight that `training_step` reads without its layer, which no trial forward can see.

        Its gradient bypasses the quantizer, whose scale gets none.
        """
        if self.checked:
            return
        self.checked = True
        for name, layer in quantized_layers(pl_module).items():
            scale = layer.weight_quantizer.scale
            if layer.latent.grad is not None and scale.requires_grad and scale.grad is None:
                raise UserError(
                    f"layer {name}: its weight is used without calling the layer, with latent values; call "
                    f"the layer, or add {name.split('.')[-1]} to skip"
                )

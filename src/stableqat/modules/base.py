"""What all training systems share: from a plain model to one that trains, its optimizer, its checkpoints.

`__init__` builds and checks the architecture on the meta device, so that a wrong setting fails before data is
prepared. `configure_model` builds it for real, loads the full-precision start, assembles the model that
trains and shards it. Where a state dict follows, it computes neither start nor scales.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from stableqat.callbacks.calibrate import CalibrateInputs
from stableqat.callbacks.checkpoint import forget_paths_elsewhere
from stableqat.callbacks.follow import FollowTraining
from stableqat.callbacks.hold import HoldWeights
from stableqat.callbacks.position import StepPosition
from stableqat.callbacks.refused import check_trainer, left_out
from stableqat.checkpoints.read import read_checkpoint
from stableqat.errors import LARGEST, UserError, check_range
from stableqat.kinds import deployed_bytes, describe
from stableqat.layers.attention import describe_attention, find_attentions, quantize_attention
from stableqat.layers.latent import store_weights
from stableqat.layers.linear import quantized_layers, undeployed
from stableqat.layers.trial import Calls, check_calls, show_weights
from stableqat.modules.compiled import compile_blocks, compiles
from stableqat.modules.hyperparameters import rebuild, save_plain_hyperparameters
from stableqat.modules.metrics import Evaluation
from stableqat.modules.parallel import checkpoint_activations, shard, states_by_name
from stableqat.modules.schedule import end_with_run, place
from stableqat.modules.start import Start, load_start, state_dict_follows, will_be_loaded
from stableqat.modules.start_quantizers import take_quantizers
from stableqat.modules.teacher import Distillation, Teacher
from stableqat.modules.training import Training
from stableqat.ops import compute_dtype
from stableqat.parameters import parameter_groups
from stableqat.quantizers import QuantizerSpec
from stableqat.quantizers.inputs import InputQuantizerSpec
from stableqat.surgery import SurgeryReport, check_skip, quantize_linears

logger = logging.getLogger(__name__)


class QATModule(Training, Evaluation, ABC):
    """Base of the training systems; knows no method by name.

    Attributes:
        family: What the model reads.
        input_key: The model's input in a batch.
        heads: Default of `skip`.
        attention_has: An attribute by which an attention module is known.

    Args:
        quantizer: Makes the quantizer of one weight; or a mapping from layer patterns to such, of which the
            first match wins, None leaving a layer as it is. None trains in full precision, without surgery.
        input_quantizer: Makes the quantizer of a quantized layer's input, or a mapping as above. None leaves
            inputs as they are.
        attention_quantizer: Makes the quantizers of what attention multiplies: query, key, probabilities and
            value; or a mapping as above, over `LAYER.query` and so on. None leaves them as they are.
        calibration_batches: Training batches of each process that set the scales of inputs before the first
            step.
        skip: Linear layers that stay in full precision: shell patterns over names or parts of them.
        init_from: Full-precision start: a run folder or checkpoint of this suite, a local model
            folder or weight file, or a hub name. None starts from random weights.
        init_quantizers: weights sets scales from the start's latent weights; start takes the quantizers of
            the run or checkpoint that init_from names, so that training starts with the loss that it
            deploys. A layer with another grid or granularity starts from the start's deployed values.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the scheduler from the optimizer; it steps with the optimizer.
        scale_lr_multiplier: Learning rate of the quantizers' parameters as a share of `lr`.
        weight_lr_multiplier: Learning rate of the weights as a share of `lr`; matches smaller gradients.
        factor_lr_multiplier: Learning rate of low-rank factors (LRQAT) as a share of `lr`.
        compile_model: Compile each transformer block with `torch.compile`, for training. None tries to on a
            GPU.
        graphed: Replay each step's forward and backward as CUDA graphs, without launching their kernels one
            by one. None tries it on a single GPU and keeps it where it is faster.
        recompute: Recompute fake-quantized weights in the backward instead of saving them; None decides per
            layer, see `QuantLinear`.
        activation_checkpointing: Save the input of each transformer block only, and compute the block again
            in the backward: a third more work for a fraction of the activations' memory.
        teacher: Distillation from a full-precision model; None trains on the data alone.
    """

    family: ClassVar[Literal["text", "images"]]
    input_key: ClassVar[str]
    heads: ClassVar[Sequence[str]] = ()
    attention_has: ClassVar[str]

    def __init__(
        self,
        *,
        quantizer: QuantizerSpec | None = None,
        input_quantizer: InputQuantizerSpec | None = None,
        attention_quantizer: InputQuantizerSpec | None = None,
        calibration_batches: int = 8,
        skip: Sequence[str] = (),
        init_from: str | None = None,
        init_quantizers: Literal["weights", "start"] = "weights",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        scale_lr_multiplier: float = 0.1,
        weight_lr_multiplier: float = 1.0,
        factor_lr_multiplier: float = 1.0,
        compile_model: bool | None = None,
        graphed: bool | None = None,
        recompute: bool | None = None,
        activation_checkpointing: bool = False,
        teacher: Distillation | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        check_range("scale_lr_multiplier", scale_lr_multiplier, 0, LARGEST)
        check_range("weight_lr_multiplier", weight_lr_multiplier, 0, LARGEST)
        check_range("factor_lr_multiplier", factor_lr_multiplier, 0, LARGEST)
        check_range("calibration_batches", calibration_batches, 1)
        if input_quantizer is not None and quantizer is None:
            raise UserError(
                "model.input_quantizer: inputs are quantized where weights are, and model.quantizer is null; "
                "name one, or leave this out"
            )
        self.quantizer = quantizer
        self.input_quantizer = input_quantizer
        self.attention_quantizer = attention_quantizer
        self.calibration_batches = calibration_batches
        self.skip = skip
        if init_quantizers not in ("weights", "start"):
            raise UserError(f"init_quantizers: must be weights or start, not {init_quantizers}")
        self.init_from = init_from
        self.init_quantizers = init_quantizers
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.scale_lr_multiplier = scale_lr_multiplier
        self.weight_lr_multiplier = weight_lr_multiplier
        self.factor_lr_multiplier = factor_lr_multiplier
        self.compile_model = compile_model
        self.graphed = graphed
        self.recompute = recompute
        self.activation_checkpointing = activation_checkpointing
        self.distillation = None if teacher is None else teacher.of(init_from)
        self.teacher: Any = None  # a `Teacher`, which is no module: nothing saves, shards or optimizes it
        self.model: nn.Module | None = None
        self.surgery: SurgeryReport | None = None
        self.calls: Calls | None = None  # how the architecture uses its quantized layers
        self._scheduled_steps: int | None = None

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The architecture with random weights, on the current default device."""

    @abstractmethod
    def load_pretrained(self, source: str) -> nn.Module:
        """The architecture with the weights of a foreign folder or file, or of the hub."""

    @abstractmethod
    def check_pretrained(self, source: str) -> None:
        """Refuse a source that `load_pretrained` cannot find, without loading its weights."""

    @abstractmethod
    def example_batch(self, rows: int, *, tokens: int = 64, seed: int = 0) -> dict[str, Tensor]:
        """A random batch of the shapes that the model takes, on the CPU.

        Args:
            rows: Rows of tokens, or images.
            tokens: Tokens per row of text, at most as many as the model has positions.
            seed: Another seed is another batch.
        """

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The repeated blocks: units of sharding and of activation checkpointing."""

    @abstractmethod
    def load_teacher(self, settings: Distillation) -> Teacher:
        """The frozen model that `settings` names, with what a student's loss asks of it."""

    def fit_state(self, model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Change a start's weights where it was made for another task than the model.

        Args:
            model: The architecture, on any device.
            state: Full-precision weights by name.
            source: Where they come from, for messages.
        """
        return state

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Learning rates of parameters as shares of their group's, by name, where they are not 1."""
        return {}

    def adapt(self, model: nn.Module) -> None:
        """Change what a family needs in the model after its layers are swapped, before it is sharded."""

    @abstractmethod
    def chance(self) -> float | None:
        """The validation loss of a guess, which a trained start stays under; None if its head is new."""

    def resolved(self) -> dict[str, Any]:
        """Hyper-parameters that rebuild the architecture, and name the teacher, without the start."""
        return {} if self.distillation is None else {"teacher": asdict(self.distillation)}

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Refuse data that does not fit the model, as far as is known before data is prepared."""

    def check_architecture(self, quantizer: QuantizerSpec | None) -> None:
        """Build, quantize and try the model on the meta device, so that a wrong setting fails at once."""
        with torch.device("meta"):
            model = self.build_model()
        if quantizer is not None:
            check_skip(model, self.skip, optional=self.heads)
            report = quantize_linears(model, quantizer, self.skip, input_quantizer=self.input_quantizer)
            if not report.swapped:
                report.check()
        self._quantize_attention(model)
        if quantizer is not None or self.attention_quantizer is not None:
            self.calls = check_calls(model)

    def setup(self, stage: str) -> None:
        """Make the checks that the command line makes before data is prepared; load the teacher."""
        super().setup(stage)
        check_trainer(self.trainer)
        if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
            self.check_data(datamodule)
        if stage == "fit" and self.distillation is not None and self.teacher is None:
            self.teacher = self.load_teacher(self.distillation)
            self.teacher.check(self)

    def configure_model(self) -> None:
        """Build, load, assemble and shard the model; does nothing the second time."""
        if self.model is not None:
            return
        follows = will_be_loaded()
        start = None if follows or self.init_from is None else Start(self.init_from)
        model = self.build_model() if start is None else load_start(self, start)
        takes = self.init_quantizers == "start" and not follows
        self.surgery = self.assemble(model, self.quantizer, initialize=not (follows or takes))
        if takes:
            take_quantizers(model, start)
        store_weights(model)
        if self.device_mesh is not None:
            shard(model, self.blocks(model), self.device_mesh, self._type_of_gathered_codes(model))
        self.model = model

    def _type_of_gathered_codes(self, model: nn.Module) -> torch.dtype | None:
        if getattr(self.trainer.strategy, "gather", "weights") == "weights":
            return None
        with self.trainer.precision_plugin.forward_context():
            return compute_dtype(next(model.parameters()))

    def assemble(
        self, model: nn.Module, quantizer: QuantizerSpec | None, *, initialize: bool = True
    ) -> SurgeryReport | None:
        """Turn a plain model into the one that trains, in place; only sharding comes after it.

        Args:
            model: What `build_model` makes, with its weights.
            quantizer: Makes the quantizer of one weight; None trains in full precision.
            initialize: Set the scales from the weights. False leaves them to a state dict.

        Returns:
            What is quantized; None in full precision.
        """
        report = None
        if quantizer is not None:
            recompute = self.recompute
            if recompute is None and self.activation_checkpointing:
                recompute = True  # a value made for the whole block lies outside its checkpoint
            report = quantize_linears(
                model,
                quantizer,
                self.skip,
                input_quantizer=self.input_quantizer,
                initialize=initialize,
                recompute=recompute,
            )
            report.check()
            if self.calls is None:  # the model cannot run on the meta device
                check_calls(model)
            else:
                show_weights(model, self.calls)
                self.calls.tell()
        self._quantize_attention(model)
        self.adapt(model)
        if self._compiles():
            compile_blocks(self.blocks(model), required=bool(self.compile_model))
        if self.activation_checkpointing:
            checkpoint_activations(self.blocks(model))
        return report

    def _quantize_attention(self, model: nn.Module) -> None:
        if self.attention_quantizer is not None:
            attentions = find_attentions(model, self.blocks(model), self.attention_has)
            quantize_attention(attentions, self.attention_quantizer)

    def _compiles(self) -> bool:
        if self.compile_model is None and (trainer := self._trainer) is not None:
            return compiles(trainer.strategy.root_device)
        return bool(self.compile_model)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | int | None = None,
        *,
        strict: bool = True,
        **changes: Any,
    ) -> Any:
        """Rebuild a module from its checkpoint alone; `changes` replace saved arguments of its class."""
        path = Path(checkpoint_path)
        read = read_checkpoint(path)
        with state_dict_follows():
            module = rebuild(cls, path, read, **changes)
            module.configure_model()
        module.on_load_checkpoint(read)
        module.load_state_dict(read["state_dict"], strict=strict)
        return module if map_location is None else module.to(map_location)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ignore paths to other folders."""
        forget_paths_elsewhere(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint self-contained: it needs no `init_from`, and names its optimizer states."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].update(self.resolved(), init_from=None)
        if states := checkpoint.get("optimizer_states"):
            states_by_name(self, self.trainer.optimizers, states)

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler, from the parameters that exist after surgery."""
        assert self.model is not None
        optimizer = self.optimizer(parameter_groups(self.model, lr_factors=self.lr_factors(self.model)))
        multipliers = {
            "weights": self.weight_lr_multiplier,
            "scales": self.scale_lr_multiplier,
            "factors": self.factor_lr_multiplier,
        }
        for group in optimizer.param_groups:
            group["lr"] *= multipliers.get(group["kind"], 1.0) * group["lr_factor"]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._scheduled_steps = end_with_run(scheduler, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the schedule for this run's steps; check that the optimizer has every trainable parameter."""
        super().on_train_start()
        assert self.model is not None
        for config in self.trainer.lr_scheduler_configs:
            place(config.scheduler, self._scheduled_steps)
        if paths := {layer.implementation for layer in quantized_layers(self.model).values()}:
            logger.info("weights are fake-quantized by %s", " and ".join(sorted(paths)))
        if layer := undeployed(self.model):
            logger.warning(
                "%s is evaluated on other weights than its quantizer deploys: override `quantize`, too, or "
                "no loss is that of an exported file",
                layer,
            )
        lost = left_out(self.trainer, self.named_parameters())
        assert not lost, f"trainable parameters outside the optimizer: {lost}"

    def configure_callbacks(self) -> list[L.Callback]:
        """The callbacks that these modules need in every trainer."""
        plain = self.input_quantizer is None and self.attention_quantizer is None
        calibrates = [] if plain else [CalibrateInputs(self.calibration_batches)]
        return [*calibrates, HoldWeights(), StepPosition(), FollowTraining()]

    @property
    def seed(self) -> int:
        """The run's seed, which Lightning's `seed_everything` leaves in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def describe(self) -> dict[str, str | int | float]:
        """Flat settings of the run for TensorBoard's HParams and for tables."""
        assert self.model is not None
        method = {**describe(self.model, self.surgery), **describe_attention(self.model)}
        keys = ["scale_lr_multiplier", "weight_lr_multiplier"]
        if any(group["kind"] == "factors" for group in parameter_groups(self.model)):
            keys.append("factor_lr_multiplier")
        multipliers = {key: getattr(self, key) for key in keys}
        share = {"quantized_share": round(self.surgery.quantized_share, 4)} if self.surgery else {}
        size = {"deployed_mb": round(deployed_bytes(self.model) / 1e6, 6)}
        taught = {} if self.distillation is None else self.distillation.describe()
        return {**method, **share, **size, **multipliers, **taught, "seed": self.seed}

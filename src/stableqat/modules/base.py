"""What every training system shares: surgery, parameter groups, optimizer, exact resume, checkpoints.

Order of events: the architecture is built and checked on the meta device in `__init__` (a wrong
setting fails before data is prepared); `configure_model` builds it for real, loads the
full-precision start, swaps the linear layers and sets their scales from the loaded weights,
then shards. Where a state dict follows, neither start nor initialisation is computed.
Randomness inside a step (dropout, mixup, stochastic quantizers) is a function of (seed, epoch,
batch, rank), so that a resumed run repeats the uninterrupted one.
"""

import inspect
import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from stableqat.checkpoints.read import read_checkpoint
from stableqat.errors import UserError, check_range
from stableqat.layers.hold import hold_weights, release_weights
from stableqat.layers.linear import quantized_layers
from stableqat.layers.trial import Calls, check_calls, show_weights
from stableqat.modules.callbacks import check_callbacks
from stableqat.modules.schedule import check_end, place
from stableqat.modules.start import load_start
from stableqat.parameters import parameter_groups
from stableqat.quantizers import QuantizerFactory
from stableqat.quantizers.base import local
from stableqat.surgery import SurgeryReport, quantize_linears
from stableqat.trust import arguments, check_plain, find_class

logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max

_STATE_DICT_FOLLOWS: ContextVar[bool] = ContextVar("state_dict_follows", default=False)


@contextmanager
def state_dict_follows(follows: bool = True) -> Iterator[None]:
    """Inside, `configure_model` neither loads a start nor initialises scales: a checkpoint will."""
    token = _STATE_DICT_FOLLOWS.set(follows)
    try:
        yield
    finally:
        _STATE_DICT_FOLLOWS.reset(token)


class QATModule(L.LightningModule, ABC):
    """Base of the training systems; knows no method by name.

    Attributes:
        family: What the model reads, text or images.
        input_key: Key of a batch that holds the model's input.

    Args:
        quantizer: Makes the quantizer of one weight; None trains in full precision, with no
            surgery at all.
        skip: Linear layers that stay in full precision: shell patterns over names or parts of them.
        init_from: Full-precision start: a run folder or checkpoint of this suite, a local model
            folder or file, or a hub name. None starts from random weights.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the scheduler from the optimizer, stepped every optimizer step.
        scale_lr_multiplier: Learning rate of the quantizers' parameters as a share of `lr`.
        weight_lr_multiplier: Learning rate of the weights as a share of `lr`; a control for methods whose
            gradients are smaller.
        compile_model: Compile the inner model with `torch.compile`.
        recompute: Recompute fake-quantized weights in the backward instead of saving them, see `QuantLinear`.
        activation_checkpointing: Save the input of each block only, and compute the block again in the
            backward.
    """

    family: ClassVar[Literal["text", "images"]]
    input_key: ClassVar[str]

    def __init__(
        self,
        *,
        quantizer: QuantizerFactory | None = None,
        skip: Sequence[str] = (),
        init_from: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        scale_lr_multiplier: float = 0.1,
        weight_lr_multiplier: float = 1.0,
        compile_model: bool = False,
        recompute: bool | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, multiplier in (("scale", scale_lr_multiplier), ("weight", weight_lr_multiplier)):
            check_range(f"{name}_lr_multiplier", multiplier, 0, LARGEST)
        self.quantizer = quantizer
        self.skip = skip
        self.init_from = init_from
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.scale_lr_multiplier = scale_lr_multiplier
        self.weight_lr_multiplier = weight_lr_multiplier
        self.compile_model = compile_model
        self.recompute = recompute
        self.activation_checkpointing = activation_checkpointing
        self.model: nn.Module | None = None
        self.surgery: SurgeryReport | None = None
        self.calls: Calls | None = None  # how the architecture uses its quantized layers
        self._scheduled_steps: int | None = None

    # -- architecture ---------------------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The architecture with random weights, on the current default device."""

    @abstractmethod
    def load_pretrained(self, source: str) -> nn.Module:
        """The architecture with the weights of a local folder or file that is not ours, or of the hub."""

    @abstractmethod
    def check_pretrained(self, source: str) -> None:
        """Refuse a source that `load_pretrained` cannot find, without loading its weights."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The training loss of a batch, a scalar; logs nothing and needs no trainer."""

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

    def fit_state(self, model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Change a start's weights where it was made for another task than the model.

        Args:
            model: The architecture, on any device.
            state: Full-precision weights by name.
            source: Where they come from, for messages.
        """
        return state

    def adapt(self, model: nn.Module) -> None:
        """What a family changes in the model once its layers are swapped, before it is sharded."""

    def resolved(self) -> dict[str, Any]:
        """Hyper-parameters that rebuild the architecture without the source it came from."""
        return {}

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Refuse data that the model cannot take, by what is known before data is prepared.

        Raises:
            UserError: Naming both settings.
        """

    def save_plain_hyperparameters(self) -> None:
        """Save hyper-parameters as plain values, so that a checkpoint loads without pickled code.

        To be called last in a subclass's `__init__`. The command line hands them over plain; from
        Python, classes and `functools.partial`s of classes become `class_path` and `init_args`.
        """
        self.save_hyperparameters(logger=False)
        if "_class_path" not in self.hparams:
            plain = {
                key: _plain(value)
                for key, value in self.hparams.items()
                if not callable(value) or _named(value)
            }
            self.hparams.clear()
            self.hparams.update(plain)
            self.hparams["_class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
            self.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"

    def check_architecture(self) -> None:
        """Build, swap and try on the meta device: a setting that cannot work fails here, in no time."""
        with torch.device("meta"):
            model = self.build_model()
        if self.quantizer is not None:
            report = quantize_linears(model, self.quantizer, self.skip)
            if not report.swapped:
                raise UserError(
                    f"skip: {', '.join(self.skip)} leaves none of the {len(report.skipped)} linear layers to "
                    "quantize; skip fewer, or train in full precision with quantizer: null"
                )
            # the default may name layers of other models of the family
            usual = inspect.signature(type(self)).parameters["skip"].default
            if lost := [pattern for pattern in report.unmatched if pattern not in usual]:
                raise UserError(f"skip: {lost[0]} matches no linear layer; correct it or leave it out")
            self.calls = check_calls(model)

    def setup(self, stage: str) -> None:
        """Make the checks that the command line makes before data is prepared."""
        self.check_trainer(self.trainer)
        if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
            self.check_data(datamodule)

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Refuse callbacks that do not fit, and half-precision masters: they round scales and tables."""
        if isinstance(trainer.precision_plugin, HalfPrecision):
            precision = trainer.precision
            mixed = precision.replace("true", "mixed")
            raise UserError(f"trainer.precision: {precision} would round weights and scales; take {mixed}")
        check_callbacks(trainer)

    @staticmethod
    def check_schedule(scheduler: object, trainer: L.Trainer) -> None:
        """Refuse a schedule of no steps, one that ends with an endless run, one that fails beyond its end."""
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(
                "lr_scheduler: ReduceLROnPlateau follows a metric, and rates here follow the step, so that "
                "runs compare and resume; take stableqat.modules.CosineWarmup, or another schedule of torch's"
            )
        epochs = trainer.max_epochs
        if epochs is None and any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            epochs = -1  # what Lightning takes once it begins
        if getattr(scheduler, "total_steps", 0) is None and epochs == trainer.max_steps == -1:
            raise UserError(
                "total_steps: the schedule ends with the run, and nothing says after how many steps that is; "
                "set it, or trainer.max_steps or trainer.max_epochs"
            )
        check_end(scheduler, trainer.max_steps)

    def configure_model(self) -> None:
        """Build, load, swap, initialise, shard; calling it again changes nothing."""
        if self.model is not None:
            return
        follows = _STATE_DICT_FOLLOWS.get()
        fresh = follows or self.init_from is None
        model = self.build_model() if fresh else load_start(self, self.init_from)  # type: ignore[arg-type]
        self.surgery = self.assemble(model, self.quantizer, initialize=not follows)
        if self.device_mesh is not None:
            _shard(model, self.blocks(model), self.device_mesh)
        self.model = model

    def assemble(
        self, model: nn.Module, quantizer: QuantizerFactory | None, *, initialize: bool = True
    ) -> SurgeryReport | None:
        """Turn a plain model into the one that trains, in place; only sharding comes after it.

        Args:
            model: What `build_model` makes, with its weights.
            quantizer: Makes the quantizer of one weight; None trains in full precision.
            initialize: Set the scales from the weights. False leaves them to a state dict.

        Returns:
            What is quantized; None in full precision.

        Raises:
            UserError: If the model cannot be quantized.
        """
        report = None
        if quantizer is not None:
            recompute = self.recompute
            if recompute is None and self.activation_checkpointing:
                recompute = True  # a value made for the whole block lies outside its checkpoint
            report = quantize_linears(model, quantizer, self.skip, initialize=initialize, recompute=recompute)
            report.check()
            if self.calls is None:  # the trial on the meta device told nothing
                check_calls(model)
            else:
                show_weights(model, self.calls)
                self.calls.tell()
        self.adapt(model)
        if self.activation_checkpointing:
            _checkpoint(self.blocks(model))
        if self.compile_model:
            model.compile()
        return report

    @classmethod
    def of_checkpoint(cls, path: Path, read: dict[str, Any], **changes: Any) -> "QATModule":
        """The module of a checkpoint, not yet configured; hyper-parameters are data, see `stableqat.trust`.

        Args:
            path: Checkpoint file or folder, for messages.
            read: What `read_checkpoint` made of it.
            changes: Arguments that replace the checkpoint's, as they are.

        Raises:
            UserError: If it is of no such class, or a hyper-parameter is unknown, of another type, or names a
                class that is not trusted.
        """
        found, values = cls.saved_arguments(path, read, replaced=changes)
        made = arguments(found, values, f"{path}: hyper_parameters")
        known = inspect.signature(found).parameters
        try:
            return found(**made, **{key: value for key, value in changes.items() if key in known})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def saved_arguments(
        cls, path: Path, read: dict[str, Any], *, replaced: Iterable[str] = ()
    ) -> tuple[type["QATModule"], dict[str, Any]]:
        """The class of a checkpoint's module, and its hyper-parameters as the plain values that they are.

        Args:
            path: Checkpoint file or folder, for messages.
            read: What `read_checkpoint` made of it.
            replaced: Arguments to leave out.

        Raises:
            UserError: As `of_checkpoint`.
        """
        where = f"{path}: hyper_parameters"
        values = dict(read[cls.CHECKPOINT_HYPER_PARAMS_KEY])
        named = values.pop("_class_path", f"{cls.__module__}.{cls.__qualname__}")
        values.pop("_instantiator", None)  # Lightning's way: a function to import
        found = find_class(named, [cls], f"{where}._class_path")
        known = inspect.signature(found).parameters
        for key in values.keys() - known.keys():  # settings of another version, left out
            check_plain(values[key], f"{where}.{key}")
        return found, {key: value for key, value in values.items() if key in known and key not in replaced}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | int | None = None,
        *,
        strict: bool = True,
        **changes: Any,
    ) -> Any:
        """Rebuild a module from a checkpoint alone, on the CPU or another device.

        Args:
            checkpoint_path: Checkpoint file or folder.
            map_location: The device; None is the CPU.
            strict: Whether the state dict must be complete.
            changes: Arguments of the class that replace the checkpoint's.

        Raises:
            UserError: As `of_checkpoint`, or if the file is damaged.
        """
        path = Path(checkpoint_path)
        read = read_checkpoint(path)
        with state_dict_follows():
            module = cls.of_checkpoint(path, read, **changes)
            module.configure_model()
        module.on_load_checkpoint(read)
        module.load_state_dict(read["state_dict"], strict=strict)
        return module if map_location is None else module.to(map_location)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take no path that leads elsewhere: a `ModelCheckpoint` removes the file that it replaces."""
        states = checkpoint.get("callbacks")
        for state in states.values() if isinstance(states, dict) else ():
            paths = {
                "best_model_path": "",
                "kth_best_model_path": "",
                "last_model_path": "",
                "best_k_models": {},
            }
            if isinstance(state, dict) and "best_model_path" in state:
                named = [*(state.get("best_k_models") or {}), *(state.get(key) or "" for key in paths)]
                if any("://" in str(path) or ".." in Path(str(path)).parts for path in named):
                    state.update(paths)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint enough by itself: no way back to `init_from`, optimizer states under names.

        PyTorch numbers parameters as the optimizer has them, FSDP2 as the model does; by name, any number
        of processes resumes what another saved.
        """
        hyper_parameters = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hyper_parameters.update(self.resolved(), init_from=None)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        states = checkpoint.get("optimizer_states", [])
        for number, (optimizer, state) in enumerate(zip(self.trainer.optimizers, states, strict=True)):
            if 0 in state.get("state", ()):
                order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
                states[number] = _by_name(state, order)

    # -- optimization ---------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `stableqat.parameter_groups`; a subclass may divide parameters differently."""
        assert self.model is not None
        return parameter_groups(self.model)

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler, from the parameters that exist after surgery."""
        optimizer = self.optimizer(self.parameter_groups())
        # a fused one would undo a loss scale inside its step: too late for clipping and for the guard
        vars(optimizer)["_step_supports_amp_scaling"] = False
        multipliers = {"weights": self.weight_lr_multiplier, "scales": self.scale_lr_multiplier}
        for group in optimizer.param_groups:
            group["lr"] *= multipliers.get(group["name"], 1.0)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self.check_schedule(scheduler, self.trainer)
        if hasattr(scheduler, "total_steps"):
            steps = self.trainer.estimated_stepping_batches
            if scheduler.total_steps is None:
                self._scheduled_steps = int(steps)
                vars(scheduler)["total_steps"] = self._scheduled_steps
            check_end(scheduler, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Every trainable parameter is in the optimizer, or training would silently do nothing.

        The schedule is this run's: a checkpoint's rate, and its end, are those of the steps planned then.
        """
        assert self.model is not None
        for config in self.trainer.lr_scheduler_configs:
            if self._scheduled_steps is not None:
                vars(config.scheduler)["total_steps"] = self._scheduled_steps
            place(config.scheduler)
        if paths := {layer.implementation for layer in quantized_layers(self.model).values()}:
            logger.info("weights are fake-quantized by %s", " and ".join(sorted(paths)))
        optimized = {id(p) for o in self.trainer.optimizers for g in o.param_groups for p in g["params"]}
        lost = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in optimized]
        assert not lost, f"trainable parameters outside the optimizer: {lost}"

    # -- work that is done once while weights stay as they are ----------------------------------

    def hold_weights(self) -> None:
        """Compute fake-quantized weights once, for steps to come with weights as they are."""
        assert self.model is not None
        with self.trainer.precision_plugin.forward_context():
            hold_weights(self.model)

    def release_weights(self) -> None:
        """Weights are about to change: forget what was held."""
        assert self.model is not None
        release_weights(self.model)

    def on_validation_epoch_start(self) -> None:
        """Evaluation leaves weights as they are, from here on: a callback may just have averaged them."""
        self.release_weights()
        self.hold_weights()

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def on_predict_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def on_validation_end(self) -> None:
        """Back to shards: FSDP2 keeps the root's parameters gathered for a backward that does not follow."""
        self.release_weights()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def on_test_end(self) -> None:
        """As in validation."""
        self.release_weights()

    def on_predict_end(self) -> None:
        """As in validation."""
        self.release_weights()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, after which nothing that was computed from the old weights may be used."""
        super().optimizer_step(*args, **kwargs)
        self.release_weights()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient's norm before clipping, where the step is logged, and clip.

        As Lightning does, but shards are taken as the plain tensors that they are: on a few hundred DTensors
        either operation keeps the host busy for 10 ms.
        """
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:  # the guard has dropped the step
            return
        limit, by_norm = gradient_clip_val or 0.0, gradient_clip_algorithm in (None, "norm")
        shards = [local(grad) for grad in grads]
        logged = self.trainer._logger_connector.should_update_logs
        if logged or (limit and by_norm):
            norm = _total_norm(grads)
        if logged:
            self.log("train/grad_norm", norm)
        if limit and by_norm:
            torch._foreach_mul_(shards, torch.clamp(limit / (norm + 1e-6), max=1.0))
        elif limit:
            torch._foreach_clamp_min_(shards, -limit)
            torch._foreach_clamp_max_(shards, limit)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Log the loss, and return what is differentiated."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    # -- exact resume ---------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """The run's seed, which Lightning's `seed_everything` leaves in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Derive the step's randomness from its position, count no step twice, hold accumulated weights."""
        if self.trainer.accumulate_grad_batches > 1:
            self.hold_weights()
        # a step that an exception cut short is saved as begun, and Lightning counts it as done on resume
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.trainer.global_step
        batches = loop.batch_progress.total
        batches.ready, batches.started = batches.processed + 1, batches.processed  # type: ignore[attr-defined]
        position = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        state = int(np.random.SeedSequence(position).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)

    # -- record ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, str | int | float]:
        """Flat hyper-parameters of the run for TensorBoard's HParams and for tables."""
        assert self.model is not None
        layers = list(quantized_layers(self.model).values())
        method = layers[0].weight_quantizer.describe() if layers else {"method": "FP"}
        multipliers = {
            "scale_lr_multiplier": self.scale_lr_multiplier,
            "weight_lr_multiplier": self.weight_lr_multiplier,
        }
        share = {"quantized_share": round(self.surgery.quantized_share, 4)} if self.surgery else {}
        return {**method, **share, **multipliers, "seed": self.seed}

    def log_evaluation(self, stage: str, metrics: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Log an evaluation, and the losses of its halves outside the progress bar."""
        halves = {key: loss for key, loss in losses.items() if key not in metrics}
        for values, shown in ((metrics, True), (halves, False)):
            named = {f"{stage}/{key}": value for key, value in values.items()}
            self.log_dict(named, prog_bar=shown, sync_dist=True)


def _total_norm(grads: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm([local(grad) for grad in grads])
    if not isinstance(grads[0], DTensor):
        return norm
    squares = DTensor.from_local(norm.square(), grads[0].device_mesh, [Partial()])
    return squares.full_tensor().sqrt()


def _checkpoint(blocks: Iterable[nn.Module]) -> None:
    """Only the forward is computed again, not the hooks around it: FSDP2 has gathered the block by then."""
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


def _shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: Any) -> None:
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy: tensor parallelism is not supported; take --trainer.strategy fsdp2"
        )
    for block in blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def _by_name(state: dict[str, Any], order: list[str]) -> dict[str, Any]:
    states = {order[number]: value for number, value in state["state"].items()}
    groups = [{**group, "params": [order[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"state": states, "param_groups": groups}


def _named(value: Callable[..., Any]) -> bool:
    target = value.func if isinstance(value, partial) else value
    plain = not isinstance(value, partial) or not value.args
    return isinstance(target, type) and "<locals>" not in target.__qualname__ and plain


def _plain(value: Any) -> Any:
    if isinstance(value, partial):
        return {**_plain(value.func), "init_args": {k: _plain(v) for k, v in value.keywords.items()}}
    if isinstance(value, type):
        return {"class_path": f"{value.__module__}.{value.__qualname__}"}
    if is_dataclass(value):
        return asdict(value)  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return list(value)
    return value

"""Lightning's own callbacks that do not work with a model built in `configure_model`.

Most look at parameters, or copy them, before they exist, and then silently do nothing.
"""

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from stableqat.errors import UserError

UNFIT: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "copies the module before its model is built, and averages nothing; take "
    "WeightAveraging or EMAWeightAveraging",
    ModelPruning: "picks weights before the model is built; prune the start, and set model.init_from to it",
    BackboneFinetuning: "freezes a backbone before the model is built; remove it",
    LearningRateFinder: "tries rates of a module's `lr`, but here the optimizer has it; compare a few with "
    "stableqat sweep, and set model.optimizer.lr",
    BatchSizeFinder: "tries other batch sizes, which the order of a run's rows depends on; set "
    "data.batch_size",
}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse callbacks that would do nothing or fail later, and half-precision weights.

    Raises:
        UserError: Naming the trainer's setting.
    """
    if isinstance(trainer.precision_plugin, HalfPrecision):
        precision = trainer.precision
        mixed = precision.replace("true", "mixed")
        raise UserError(f"trainer.precision: {precision} would round weights and scales; take {mixed}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for unfit, reason in UNFIT.items():
            if isinstance(callback, unfit):
                raise UserError(f"trainer.callbacks: {name} {reason}")
        averages = isinstance(callback, WeightAveraging) and getattr(callback, "decay", 0) is not None
        if averages and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"trainer.callbacks: {name} cannot average sharded weights; take --trainer.strategy ddp"
            )


def left_out(trainer: L.Trainer, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Return the names of trainable parameters that are in no optimizer and would silently stay the same."""
    optimized = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    return [name for name, p in named if p.requires_grad and id(p) not in optimized]

"""Callbacks of Lightning's that a model built in `configure_model` does not go with.

Most look at parameters, or copy them, before there are any, and then silently do nothing.
"""

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from stableqat.errors import UserError

UNFIT: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "copies the module before its model is built and averages nothing; take "
    "WeightAveraging or EMAWeightAveraging",
    ModelPruning: "picks its weights before the model is built; prune the start, and name it with "
    "model.init_from",
    BackboneFinetuning: "freezes a backbone before the model is built; leave it out",
    LearningRateFinder: "tries rates on a module's `lr`, and here the optimizer has it; compare a few with "
    "stableqat sweep, and set model.optimizer.lr",
    BatchSizeFinder: "trains on batches of other sizes, and a run's order of rows depends on theirs; set "
    "data.batch_size",
}


def check_callbacks(trainer: L.Trainer) -> None:
    """Refuse callbacks that would do nothing, or fail once training has begun."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for unfit, reason in UNFIT.items():
            if isinstance(callback, unfit):
                raise UserError(f"trainer.callbacks: {name} {reason}")
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"trainer.callbacks: {name} averages no sharded weights; take --trainer.strategy ddp"
            )

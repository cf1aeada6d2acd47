"""One training step: the loss of a batch, launched kernel by kernel or replayed; clipping its gradient."""

from abc import abstractmethod
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stableqat.errors import UserError
from stableqat.modules.clipping import clip_gradients
from stableqat.modules.graphed import Batch, GraphedLoss, why_not_graphed


class Training(L.LightningModule):
    """What a training system does with a batch.

    Attributes:
        model: The model that trains.
        graphed: Replay forward and backward as CUDA graphs; None decides by their time.
    """

    model: nn.Module | None
    graphed: bool | None
    _graphed_loss: GraphedLoss | None = None

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch, a scalar; logs nothing and needs no trainer."""

    def augment(self, batch: Batch) -> Batch:
        """Change a batch at random, as training does before the loss."""
        return batch

    def share(self, batch: Batch) -> Tensor | float:
        """What a batch counts in the mean over processes, relative to the mean process's."""
        return 1.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log the loss, and return what is differentiated."""
        compute = self._graphed_loss or self.loss
        loss = compute(self.augment(batch)) * self.share(batch)
        # not for Lightning's bar, which waits for the loss of every step
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def setup(self, stage: str) -> None:
        """Refuse graphs where steps cannot be replayed.

        Raises:
            UserError: If the settings ask for them.
        """
        if stage == "fit" and self.graphed and (reason := why_not_graphed(self.trainer, self)):
            raise UserError(f"model.graphed: {reason}; remove it")

    def on_train_start(self) -> None:
        """Replay the steps to come if the settings allow it; the first one shows whether they can be."""
        assert self.model is not None
        module = self.trainer.strategy.model
        wrapped = module if isinstance(module, DistributedDataParallel) else None
        wanted = self.graphed is not False if wrapped is None else bool(self.graphed)
        if not wanted or why_not_graphed(self.trainer, self) is not None:
            return
        self._graphed_loss = GraphedLoss(
            self.model,
            self.loss,
            always=bool(self.graphed),
            wrapped=wrapped,
            accumulates=self.trainer.fit_loop.epoch_loop._should_accumulate,
        )

    def on_train_end(self) -> None:
        """Free the graphs' memory."""
        if self._graphed_loss is not None:
            self._graphed_loss.end()
        self._graphed_loss = None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient; log its norm before clipping where the step is logged."""
        logged = self.trainer._logger_connector.should_update_logs
        by_norm = gradient_clip_algorithm in (None, "norm")
        norm = clip_gradients(optimizer, gradient_clip_val or 0.0, by_norm=by_norm, measure=logged)
        if logged and norm is not None:
            self.log("train/grad_norm", norm)

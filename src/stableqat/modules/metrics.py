"""What an evaluation measures: the mean loss, whole and in two halves, and a family's own metrics.

A setting chosen by a loss looks better on the data that chose it. With one half for the choice and the other
for the report, a comparison of best learning rates stays fair. Batches with even numbers are one half, those
with odd numbers the other, so every arm of a study has the same halves.
"""

from abc import abstractmethod

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class MeanLoss(Metric):
    """Sums of losses and their counts in float64, over batches and processes."""

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("totals", "counts"):
            self.add_state(name, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor, batch_idx: int) -> None:
        """Add a batch.

        Args:
            total: Sum of its losses.
            count: Number of its losses.
            batch_idx: Number of the batch, which decides its half.
        """
        self.totals[batch_idx % 2] += total
        self.counts[batch_idx % 2] += count

    def compute(self) -> dict[str, Tensor]:
        """The mean `loss`, and `loss_even` and `loss_odd` where both halves have data."""
        losses = {"loss": (self.totals.sum() / self.counts.sum()).float()}
        if self.counts.all():
            even, odd = (self.totals / self.counts).float()
            losses |= {"loss_even": even, "loss_odd": odd}
        return losses


def accuracies(classes: int) -> dict[str, Metric]:
    """Top-1, and top-5 where there are more than five classes: with fewer it is always 1.

    Args:
        classes: How many classes there are.
    """
    sizes = (1, 5) if classes > 5 else (1,)
    return {
        f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro", ignore_index=-100) for k in sizes
    }


class Evaluation(L.LightningModule):
    """Validation and test alike: sums over all batches and processes, logged at the end.

    Attributes:
        val_loss: The loss, updated by `validation_step`.
    """

    val_loss: MeanLoss

    @abstractmethod
    def measured(self, loss: Tensor) -> dict[str, Tensor]:
        """The metrics of all batches beside the loss.

        Args:
            loss: The mean loss.
        """

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log loss and metrics of the whole validation."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and metrics of the whole test."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        losses = self.val_loss.compute()
        metrics = {"loss": losses["loss"], **self.measured(losses["loss"])}
        halves = {key: loss for key, loss in losses.items() if key not in metrics}
        for values, in_progress_bar in ((metrics, True), (halves, False)):
            named = {f"{stage}/{key}": value for key, value in values.items()}
            self.log_dict(named, prog_bar=in_progress_bar, sync_dist=True)
        self.reset_metrics()

    def reset_metrics(self) -> None:
        """Forget what the metrics have seen."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

"""The mean loss of an evaluation, whole and in two halves.

A setting that is chosen by a loss looks better on the data that chose it. With a half for the choice and a
half for the report, a comparison of best learning rates stays fair. Batches of even number are one
half, those of odd number the other, so every arm of a study has the same halves.
"""

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Sums of losses and of their numbers in float64, over batches and processes."""

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
            count: How many they are.
            batch_idx: Its number, which says its half.
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


def log_evaluation(
    module: L.LightningModule, stage: str, metrics: dict[str, Tensor], losses: dict[str, Tensor]
) -> None:
    """Log an evaluation, and the losses of its halves outside the progress bar.

    Args:
        module: What was evaluated.
        stage: val or test.
        metrics: Values by name.
        losses: What `MeanLoss` computed.
    """
    halves = {key: loss for key, loss in losses.items() if key not in metrics}
    for values, shown in ((metrics, True), (halves, False)):
        named = {f"{stage}/{key}": value for key, value in values.items()}
        module.log_dict(named, prog_bar=shown, sync_dist=True)

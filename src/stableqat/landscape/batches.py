"""The loss of a run's validation rows at the weights that its model has now, batch by batch."""

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.landscape.space import Losses
from stableqat.modules import QATModule

IGNORED = -100  # a label that is not scored
Batches = list[dict[str, Tensor]]


def validation_batches(datamodule: Any, count: int, device: torch.device) -> Batches:
    """The first batches of a data module's validation split, on a device.

    Args:
        datamodule: A data module of this suite.
        count: How many.
        device: Where the model is.

    Raises:
        UserError: If there is no validation data.
    """
    datamodule.prepare_data()
    datamodule.setup("validate")
    found = list(islice(datamodule.val_dataloader(), count))
    if not found:
        raise UserError("batches: the run's data has no validation rows to measure losses on")
    return [{key: value.to(device) for key, value in batch.items()} for batch in found]


def losses_of(module: QATModule, batches: Batches, *, bf16: bool = False) -> Losses:
    """A module's validation losses as functions of its weights.

    Args:
        module: The module, in evaluation mode.
        batches: Its data.
        bf16: Compute in bfloat16 autocast.

    Returns:
        A function per batch; their mean is the mean over all tokens or images, as a validation has it.
    """
    counts = torch.stack([_scored(module, batch) for batch in batches]).double()
    shares = (counts * (counts > 0).sum() / counts.sum()).tolist()
    return [partial(_loss, module, *each, bf16) for each in zip(batches, shares, strict=True) if each[1]]


def _scored(module: QATModule, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    return ((labels[:, 1:] if module.family == "text" else labels) != IGNORED).sum()


def _loss(module: QATModule, batch: dict[str, Tensor], share: float, bf16: bool) -> Tensor:
    device = batch["labels"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        if module.family == "text":
            return module.loss(batch) * share
        # without mixup and label smoothing
        logits = module(batch[module.input_key]).float()
        return F.cross_entropy(logits, batch["labels"], ignore_index=IGNORED) * share

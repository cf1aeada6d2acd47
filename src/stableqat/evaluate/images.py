"""Top-1, top-5 and the confusion matrix of a vision transformer on any image source.

Images are resized and centre-cropped as in validation. A source without validation and test splits is used in
full; of a run's own images, the share of each class that the run held out.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from stableqat.data import ImageDataModule
from stableqat.data.order import EvaluationOrder
from stableqat.errors import UserError
from stableqat.evaluate.processes import Share
from stableqat.evaluate.text import pick_split
from stableqat.modules.metrics import MeanLoss, accuracies
from stableqat.modules.vit import image_size


class EvaluationImages(ImageDataModule):
    """Images that are not trained on: splits stay as they are."""

    training = False


@torch.no_grad()
def classify(
    model: nn.Module,
    datamodule: ImageDataModule,
    *,
    split: str | None,
    rows: int | None = None,
    batch_size: int,
    device: torch.device,
    share: Share,
) -> dict[str, Any]:
    """Classify a split.

    Args:
        model: Vision transformer of timm, in evaluation mode.
        datamodule: Its images.
        split: Split to use; None takes test, else validation, else everything.
        rows: Number of images, the first ones; None takes all.
        batch_size: Images per forward pass.
        device: Where the model is.
        share: This process's share of the images.

    Returns:
        `top1`, `top5` of more than five classes, `loss` in nats, number of `images`, the `split`, names of
        `classes`, and `confusion`, with one row per true class and one column per predicted class.

    Raises:
        UserError: If images or classes do not fit the model, or there is no such split.
    """
    check_images(model, datamodule)
    splits = datamodule.splits
    found = pick_split("the data", split, splits)
    images, classes = splits[found], datamodule.num_classes
    count = len(images) if rows is None else min(rows, len(images))
    ranked = accuracies(classes)
    metrics = {**ranked, "confusion": MulticlassConfusionMatrix(classes, ignore_index=-100)}
    loss = MeanLoss().to(device)
    for metric in metrics.values():
        metric.to(device)
    for keys in EvaluationOrder(count, batch_size, rank=share.rank, world_size=share.count):
        batch = images[keys]
        labels = batch["labels"].to(device)
        logits = model(batch["pixel_values"].to(device)).float()
        losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        loss.update(losses.double().sum(), (labels != -100).sum(), 0)
        for metric in metrics.values():
            metric.update(logits, labels)
    values = {name: metric.compute() for name, metric in metrics.items()}
    return {
        **{name: values[name].item() for name in ranked},
        "loss": loss.compute()["loss"].item(),
        "images": int(values["confusion"].sum()),
        "split": part_of(found if splits.keys() - {"train"} else "all", count, len(images)),
        "classes": datamodule.class_names,
        "confusion": values["confusion"].tolist(),
    }


def part_of(split: str, rows: int, there: int) -> str:
    """A split in words, with how much of it."""
    return split if rows == there else f"{split} (the first {rows} of {there} rows, as in training)"


def channels(model: Any, otherwise: int = 3) -> int:
    """How many channels of an image a timm model takes; `otherwise` if it does not say."""
    embedding: Any = getattr(model, "patch_embed", None)
    patches = getattr(embedding, "proj", None)
    if isinstance(patches, torch.nn.Linear):
        return int(patches.in_features // math.prod(embedding.patch_size))
    return getattr(patches, "in_channels", otherwise)


def check_images(model: Any, datamodule: ImageDataModule) -> None:
    """Refuse images or classes that do not fit a model.

    Args:
        model: Vision transformer of timm.
        datamodule: Its images.

    Raises:
        UserError: Naming what differs.
    """
    given = datamodule.image_size, datamodule.in_chans
    taken = image_size(model) or given[0], channels(model, given[1])
    if taken != given:
        raise UserError(
            f"data: images of {given[0]} pixels and {given[1]} channels, the model takes {taken[0]} and "
            f"{taken[1]}"
        )
    if datamodule.num_classes != model.num_classes:
        raise UserError(f"data: has {datamodule.num_classes} classes, the model {model.num_classes}")

"""The likeliest classes of images, with a vision transformer and its own preprocessing."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from stableqat.data import ImageDataModule
from stableqat.data.image import PREPROCESSING
from stableqat.data.image_file import read
from stableqat.errors import UserError
from stableqat.evaluate.images import channels
from stableqat.evaluate.model import Model

logger = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels


def name_classes(
    model: Model, files: Sequence[str], *, top_k: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Classify images, in their order.

    Args:
        model: Vision transformer on the device, in evaluation mode.
        files: Image files.
        top_k: Number of classes per image, the likeliest first.
        batch_size: Images per forward pass.
        device: Where the model is.

    Returns:
        An iterator over each `image` with its `classes` and their `probabilities`.

    Raises:
        UserError: If the model takes other channels than images have, or, on the way, an image cannot be
            read.
    """
    names, transform = class_names(model), _transform(model)

    @torch.no_grad()
    def answers() -> Iterator[dict[str, Any]]:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            pixels = torch.stack([transform(read(file, file)) for file in batch])
            chances = model.network(pixels.to(device)).float().softmax(-1)
            found = chances.topk(min(top_k, len(names)))
            for file, most, labels in zip(batch, found.values, found.indices, strict=True):
                classes = [names[label] for label in labels.tolist()]
                yield {"image": file, "classes": classes, "probabilities": most.tolist()}

    return answers()


def _transform(model: Model) -> Callable[[Any], torch.Tensor]:
    """From an image in RGB to what the model takes."""
    from timm.data import create_transform

    if "mean" not in model.images:
        logger.warning("%s: does not say how to prepare images; ImageNet's usual way is taken", model.source)
    settings = {**PREPROCESSING, **model.images}
    size, taken = settings.pop("image_size") or 224, channels(model.network)
    if taken not in MODES or taken != len(settings["mean"]):
        raise UserError(
            f"images: {model.source} takes {taken} channels, and has no mean and std for an image"
        )
    ready: Any = create_transform((taken, size, size), **settings)
    return lambda image: ready(image.convert(MODES[taken]))


def class_names(model: Model) -> list[str]:
    """The names of a model's classes: from its run's data or timm's configuration, else their numbers."""
    network: Any = model.network
    names: Any = None
    if model.run is None:
        names = _of_timm(network)
    else:
        with suppress(UserError, OSError):  # the data may be gone
            datamodule = model.run.data()
            names = datamodule.class_names if isinstance(datamodule, ImageDataModule) else None
    if isinstance(names, list | tuple) and len(names) == network.num_classes:
        return [str(name) for name in names]
    logger.warning("%s: the names of its classes are unknown, so they are numbers", model.source)
    return [str(label) for label in range(network.num_classes)]


def _of_timm(network: Any) -> Any:
    config = network.pretrained_cfg
    if (names := config.get("label_names")) is not None:
        described = config.get("label_descriptions") or {}
        return [described.get(name, name) for name in names] if isinstance(described, dict) else names
    if str(config.get("tag")).endswith("in1k") and network.num_classes == 1000:
        from timm.data import ImageNetInfo

        return [ImageNetInfo("imagenet-1k").index_to_description(label) for label in range(1000)]
    return None

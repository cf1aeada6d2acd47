"""What to round: a model as a training system, with what belongs to it and the data that calibrates it."""

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stableqat.data.tokenizer import load_tokenizer
from stableqat.errors import UserError, counted
from stableqat.evaluate.images import EvaluationImages, check_images
from stableqat.evaluate.model import is_run
from stableqat.evaluate.text import pick_split, read_text
from stableqat.modules import LlamaModule, QATModule, ViTModule
from stableqat.modules.hyperparameters import FULL_ACTIVATIONS, ONLY_FOR_TRAINING, rebuild
from stableqat.modules.vit import image_size
from stableqat.modules.vit_config import architecture, preprocessing
from stableqat.ptq.stream import Batch
from stableqat.quantizers import QuantizerFactory
from stableqat.runs import open_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to round.

    Attributes:
        module: The training system, configured and in evaluation mode.
        tokenizer: A language model's tokenizer.
        images: How images are resized and normalised, as arguments of `ImageDataModule`.
        data: Settings of the data module for the run that is written; None for text without any.
    """

    module: QATModule
    tokenizer: Any = None
    images: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None


def find_subject(source: str, quantizer: QuantizerFactory, skip: Sequence[str], data: str | None) -> Subject:
    """Load a model and what belongs to it.

    Args:
        source: Run, checkpoint, transformers or timm folder, or Hub name of a language model.
        quantizer: Makes the quantizer of each weight.
        skip: Layers to leave alone; none for the run's, or the heads.
        data: What calibrates it.

    Raises:
        UserError: If there is no such model, or it cannot be quantized that way.
    """
    options: dict[str, Any] = {"quantizer": quantizer} | ({"skip": list(skip)} if skip else {})
    if is_run(source):
        run = open_run(source)
        start = {**ONLY_FOR_TRAINING, **FULL_ACTIVATIONS, "init_from": str(run.checkpoint), **options}
        saved = run.content[QATModule.CHECKPOINT_HYPER_PARAMS_KEY]
        if found := [key for key in FULL_ACTIVATIONS if saved.get(key) is not None]:
            logger.warning("%s: only weights are rounded; left out: %s", source, ", ".join(found))
        module = _configured(rebuild(QATModule, run.checkpoint, run.content, **start))
        if module.family == "text":
            return Subject(module, run.load_tokenizer(module, None), data=run.settings("data") or None)
        images = {**(run.preprocessing or {}), "image_size": image_size(module.model) or run.image_size}
        return Subject(module, images=images, data=run.settings("data") or None)
    if (made := _timm_config(source)) is not None:
        name, arguments, classes = made
        module = _configured(
            ViTModule(model_name=name, model_args=arguments, num_classes=classes, init_from=source, **options)
        )
        images = preprocessing(source, name)
        arguments = {"source": data or source, **images}  # without a source, images would be the digits
        settings = {"class_path": "stableqat.data.ImageDataModule", "init_args": arguments}
        return Subject(module, images=images, data=settings)
    tokenizer = load_tokenizer(source)
    return Subject(_configured(LlamaModule(init_from=source, **options)), tokenizer)


def _configured(module: QATModule) -> QATModule:
    module.configure_model()
    return module.eval()


def _timm_config(source: str) -> tuple[str, dict[str, Any], int] | None:
    """Architecture, arguments and number of classes of a folder of timm's; None for any other source."""
    file = Path(source).expanduser() / "config.json"
    try:
        keys = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); copy it again") from error
    found = architecture(source) if isinstance(keys, dict) and "architecture" in keys else None
    return None if found is None else (*found, int(keys.get("num_classes", 1000)))


def calibration_batches(
    subject: Subject,
    source: str,
    *,
    text_column: str,
    samples: int,
    block_size: int | None,
    batch_size: int,
    seed: int,
    most_tokens: int = 2048,
) -> list[Batch]:
    """Draw rows of text or images, the same on every machine.

    Args:
        subject: The model.
        source: Text or images; its training split is taken, or all of it.
        text_column: Column that holds the text.
        samples: Number of rows.
        block_size: Tokens per row of text; None takes what the model takes, at most `most_tokens`.
        batch_size: Rows per batch.
        seed: Another seed draws other rows.
        most_tokens: Of a row of text whose block size is None.

    Raises:
        UserError: If there is no such source, it does not fit the model, or has too few rows.
    """
    if subject.module.family == "text":
        rows: Any = read_text(
            source,
            subject.tokenizer,
            block_size=_tokens(subject.module, block_size, most_tokens),
            text_column=text_column,
            split="train",
            drawn=samples,
            seed=seed,
        ).rows
    else:
        images = EvaluationImages(source, augment=False, **subject.images)
        check_images(subject.module.model, images)
        splits = images.splits
        rows = splits[pick_split(source, "train" if "train" in splits else None, splits)]
    if len(rows) < samples:
        raise UserError(
            f"data: {source} has {counted(len(rows), 'row')}, fewer than the {samples} to draw; take more "
            "data, or lower samples"
        )
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    parts = [drawn[at : at + batch_size] for at in range(0, samples, batch_size)]
    return [rows[[(seed, 0, index) for index in part]] for part in parts]


def _tokens(module: QATModule, asked: int | None, most: int) -> int:
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", most)
    if asked is not None and asked > limit:
        raise UserError(f"block_size: {asked} tokens, but the model takes {limit}; lower it")
    return asked or min(most, limit)


def fingerprint(module: QATModule, batches: Sequence[Batch]) -> int:
    """A number that changes with the weights and with the calibration data."""
    tensors = [*module.state_dict().values(), *(tensor for batch in batches for tensor in batch.values())]
    number = 0
    for tensor in tensors:
        number = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), number)
    return number

"""What to round: a model as a training system, with what belongs to it and the data that calibrates it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stableqat.data.tokenizer import load_tokenizer
from stableqat.errors import UserError, counted
from stableqat.evaluate.images import EvaluationImages
from stableqat.evaluate.model import is_run
from stableqat.evaluate.text import pick_split, read_text
from stableqat.modules import LlamaModule, QATModule, ViTModule
from stableqat.modules.hyperparameters import ONLY_FOR_TRAINING, rebuild
from stableqat.modules.vit_config import architecture, preprocessing
from stableqat.ptq.calibration import Batch
from stableqat.quantizers import QuantizerFactory
from stableqat.runs import open_run


@dataclass(frozen=True)
class Subject:
    """A model to round.

    Attributes:
        module: The training system, quantized and not yet configured.
        tokenizer: A language model's tokenizer.
        images: How images are resized and normalised, as arguments of `ImageDataModule`.
        data: Settings of the run's data, for the run that is written; None for others.
    """

    module: QATModule
    tokenizer: Any = None
    images: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None


def find_subject(source: str, quantizer: QuantizerFactory, skip: Sequence[str] | None) -> Subject:
    """Find a model and what belongs to it.

    Args:
        source: Run, checkpoint, transformers or timm folder, or Hub name.
        quantizer: Makes the quantizer of each weight.
        skip: Layers to leave alone; None takes the run's, or the heads.

    Raises:
        UserError: If there is no such model.
    """
    options: dict[str, Any] = {"quantizer": quantizer} | ({} if skip is None else {"skip": list(skip)})
    if is_run(source):
        run = open_run(source)
        start = {**ONLY_FOR_TRAINING, "init_from": str(run.checkpoint), **options}
        module = rebuild(QATModule, run.checkpoint, run.content, **start)
        tokenizer = run.load_tokenizer(module, None) if module.family == "text" else None
        return Subject(module, tokenizer, run.preprocessing or {}, run.settings("data") or None)
    if (made := _timm_config(source)) is not None:
        name, arguments, classes = made
        module = ViTModule(
            model_name=name, model_args=arguments, num_classes=classes, init_from=source, **options
        )
        return Subject(module, images=preprocessing(source, name))
    return Subject(LlamaModule(init_from=source, **options), load_tokenizer(source))


def _timm_config(source: str) -> tuple[str, dict[str, Any], int] | None:
    """Architecture, arguments and number of classes of a folder of timm's; None for any other source."""
    file = Path(source).expanduser() / "config.json"
    keys = json.loads(file.read_text()) if file.is_file() else {}
    found = architecture(source) if isinstance(keys, dict) and "architecture" in keys else None
    return None if found is None else (*found, int(keys.get("num_classes", 1000)))


def calibration_batches(
    subject: Subject, source: str, *, samples: int, block_size: int, batch_size: int, seed: int
) -> list[Batch]:
    """Draw rows of text or images, the same on every machine.

    Args:
        subject: The model.
        source: Text or images; its training split is taken, or all of it.
        samples: Number of rows.
        block_size: Tokens per row of text.
        batch_size: Rows per batch.
        seed: Another seed draws other rows.

    Returns:
        Batches with labels.

    Raises:
        UserError: If there is no such source, or it has too few rows.
    """
    if subject.module.family == "text":
        rows: Any = read_text(source, subject.tokenizer, block_size=block_size, split="train").rows
    else:
        splits = EvaluationImages(source, **subject.images).splits
        rows = splits[pick_split(source, "train" if "train" in splits else None, splits)]
    if len(rows) < samples:
        raise UserError(
            f"data: {source} has {counted(len(rows), 'row')}, fewer than samples {samples}; lower it, or "
            "take more data"
        )
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    parts = [drawn[at : at + batch_size] for at in range(0, samples, batch_size)]
    return [rows[[(seed, 0, index) for index in part]] for part in parts]

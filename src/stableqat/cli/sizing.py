"""What a configuration leaves open, chosen for the model, its data and the machine, as `modules.sizing` says.

A null learning rate of `SizedAdamW`, null rows, batch size and loader processes of the data, and an auto
precision and interval of validations are filled in, and each is reported. What the user gives stays.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from stableqat.construct import find_class
from stableqat.data import ImageDataModule, TextDataModule
from stableqat.data.budget import CHARACTERS_PER_TOKEN
from stableqat.data.conversation_rows import KEPT
from stableqat.data.prepared import prepared_manifest
from stableqat.data.source import TEXT_FORMATS, local_files
from stableqat.errors import UserError
from stableqat.modules import QATModule
from stableqat.modules.sizing import CPU_MEMORY, LONGEST, Size, rows_of_step
from stableqat.quantizers.options import width_of

MOST_WORKERS = 16  # of a process
VALIDATIONS = 5  # of a run
VALIDATED_ROWS = 8  # at least, of a small source
SHORTEST = 32  # tokens of a row that a small source makes
_ARCHITECTURE = ("config", "init_from", "model_name", "num_classes", "model_args")


def choose(settings: Namespace) -> list[str]:
    """Fill in what the settings leave open.

    Args:
        settings: The verb's settings, filled from the model's start; changed in place.

    Returns:
        One line per setting that was chosen.
    """
    trainer, model = settings.trainer, settings.model.get("init_args") or Namespace()
    data = settings.data.get("init_args") or Namespace()
    lines = []
    if trainer.precision == "auto":
        trainer.precision = "bf16-mixed" if _has_bfloat16(trainer) else "32-true"
        lines.append(f"trainer.precision: {trainer.precision}, for this device")
    optimizer = (model.get("optimizer") or Namespace()).get("init_args") or Namespace()
    asks = {key: data.get(key, 0) is None for key in ("block_size", "batch_size")}
    if data.get("num_workers", 0) is None:
        data.num_workers, line = _workers(trainer)
        lines.append(line)
    asks["lr"] = optimizer.get("lr", 0) is None
    if any(asks.values()):
        module = _module(settings.model)
        train, validation = _tokens(data) if "block_size" in data else (None, None)
        if asks["block_size"]:
            lines.append(_choose_rows(settings.data, module, validation))
        size = Size.of(module, data.get("block_size") or 1)
        if asks["batch_size"]:
            lines += _choose_batch(settings, data, size, train)
        if asks["lr"]:
            bits = _fewest_bits(model.get("quantizer"))
            optimizer.lr = size.learning_rate(bits, module.family)
            how = "full precision" if bits is None else f"{bits} bits"
            lines.append(f"model.optimizer.lr: {optimizer.lr:g}, for {how} at width {size.width}")
    if trainer.val_check_interval == "auto":
        lines.append(_choose_validations(trainer))
    return lines


def _module(model: Namespace) -> Any:
    """The training system without a quantizer, for its architecture."""
    given = {key: model.init_args[key] for key in _ARCHITECTURE if key in model.init_args}
    return find_class(model.class_path, [QATModule], "model")(**given)


def _tokens(data: Namespace) -> tuple[int | None, int | None]:
    """About how many tokens a local raw text trains and validates on; None if that is unknown."""
    source = data.get("source")
    if not isinstance(source, str) or prepared_manifest(source) is not None:
        return None, None
    if (local := local_files(source, TEXT_FORMATS)) is None:
        return None, None
    sizes = {split: sum(Path(file).stat().st_size for file in files) for split, files in local[1].items()}
    train = sizes["train"] // CHARACTERS_PER_TOKEN
    if "validation" in sizes:
        return train, sizes["validation"] // CHARACTERS_PER_TOKEN
    held_out = int(train * data.validation_fraction)
    return train - held_out, held_out


def _choose_rows(settings: Namespace, module: Any, validation: int | None) -> str:
    data, positions = settings.init_args, module.config.max_position_embeddings
    rows = most = min(positions, LONGEST)
    while validation is not None and rows >= 2 * SHORTEST and validation < VALIDATED_ROWS * rows:
        rows //= 2
    why = ", fewer as the source is small" if rows < most else ""
    if rows < most and (fitting := _rows_for_conversations(settings)) is not None and fitting > rows:
        rows = min(fitting, most)
        why = f", which hold {KEPT:.0%} of the conversations whole" if rows == fitting else ""
    data.block_size = rows
    return f"data.block_size: {rows} of the model's {positions} positions{why}"


def _rows_for_conversations(data: Namespace) -> int | None:
    if not data.class_path.endswith(TextDataModule.__name__):
        return None
    return TextDataModule(**{**data.init_args.as_dict(), "block_size": SHORTEST}).rows_for_conversations()


def _choose_batch(settings: Namespace, data: Namespace, size: Size, train: int | None) -> list[str]:
    trainer, tokens = settings.trainer, data.get("block_size")
    available = train // tokens if tokens and train is not None else None
    if tokens is None and settings.data.class_path.endswith(ImageDataModule.__name__):
        available = len(ImageDataModule(**data.as_dict()).splits["train"])
    rows = rows_of_step(tokens, available)
    processes = _processes(trainer)
    own = max(1, rows // (processes * trainer.accumulate_grad_batches))
    memory = _memory(trainer)
    parts = size.parts(own, memory, mixed="16" in str(trainer.precision))
    data.batch_size = -(-own // parts)
    trainer.accumulate_grad_batches *= parts
    accumulated = trainer.accumulate_grad_batches
    step = data.batch_size * accumulated * processes
    what = f"{step} images" if tokens is None else f"{step} rows, {step * tokens:,} tokens"
    also = f", trainer.accumulate_grad_batches {accumulated}" if parts > 1 else ""
    also += f", on {processes} processes" if processes > 1 else ""
    return [f"data.batch_size: {data.batch_size}{also}: a step takes {what}"]


def _choose_validations(trainer: Namespace) -> str:
    if trainer.max_steps > 0:
        steps = max(1, trainer.max_steps // VALIDATIONS)
        trainer.val_check_interval = steps * trainer.accumulate_grad_batches
        trainer.check_val_every_n_epoch = None
        return f"trainer.val_check_interval: every {steps} steps"
    trainer.check_val_every_n_epoch = 1
    trainer.val_check_interval = 1 / VALIDATIONS if trainer.max_epochs == 1 else 1.0
    return f"trainer.val_check_interval: {trainer.val_check_interval:g} of an epoch"


def _fewest_bits(quantizer: Any) -> int | None:
    """The fewest bits that a quantizer, or one of a mapping, gives a weight; None in full precision."""
    if quantizer is None:
        return None
    named = quantizer.as_dict() if isinstance(quantizer, Namespace) else dict(quantizer)
    kinds = [named] if "class_path" in named else list(named.values())
    kinds = [each.as_dict() if isinstance(each, Namespace) else each for each in kinds]
    bits = []
    for options in [each.get("init_args") or {} for each in kinds if isinstance(each, dict)]:
        with suppress(UserError):  # the quantizer itself reports options that do not fit together
            bits.append(width_of(*(options.get(key) for key in ("bits", "levels", "grid"))))
    return min(bits, default=None)


def _on_gpu(trainer: Namespace) -> bool:
    return trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _has_bfloat16(trainer: Namespace) -> bool:
    return _on_gpu(trainer) and torch.cuda.is_bf16_supported(including_emulation=False)


def _memory(trainer: Namespace) -> float:
    return torch.cuda.get_device_properties(0).total_memory if _on_gpu(trainer) else CPU_MEMORY


def _workers(trainer: Namespace) -> tuple[int, str]:
    """Loader processes of each training process, which share the machine's cores; none if a CPU trains."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = _processes(trainer) // trainer.num_nodes
    workers = min(MOST_WORKERS, max(0, cores // own - 1)) if _on_gpu(trainer) else 0
    why = f"of {cores} cores for {own} processes" if _on_gpu(trainer) else "as the CPU trains"
    return workers, f"data.num_workers: {workers}, {why}"


def _processes(trainer: Namespace) -> int:
    """How many processes the trainer will start, or be one of."""
    asked = trainer.devices
    if isinstance(asked, list):
        devices = len(asked)
    elif str(asked) in ("auto", "-1"):
        devices = torch.cuda.device_count() if _on_gpu(trainer) else 1
    else:
        devices = len(str(asked).strip(",").split(",")) if "," in str(asked) else int(asked)
    return devices * trainer.num_nodes

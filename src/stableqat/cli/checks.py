"""Settings that are refused before data is prepared.

Lightning finds many of these mistakes after hours of tokenising, or not at all.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from stableqat.construct import arguments, find_class
from stableqat.errors import LARGEST, UserError, check_range, did_you_mean, first_line
from stableqat.modules import QATModule
from stableqat.modules.schedule import check_schedule
from stableqat.trust import walk, words

GPU = ("gpu", "cuda")
AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
}


def check_groups(settings: Namespace, keys: Iterable[str]) -> None:
    """Blocks of settings must be mappings; jsonargparse accepts anything."""
    for key in keys:
        if not isinstance(settings.get(key), Namespace):
            raise UserError(f"{key}: must be a mapping of settings, not {settings.get(key)}")


def check_types(settings: Namespace) -> None:
    """What is read back from a run must be of its type: jsonargparse takes null for every type."""
    for key, base in (("model", QATModule), ("data", L.LightningDataModule)):
        spec = settings[key].as_dict()
        found = find_class(spec["class_path"], [base], key)
        if key == "model" or found.__module__.startswith("stableqat."):  # other data is not read back
            arguments(found, spec["init_args"], key)


def check_seed(seed: int | bool) -> None:
    """The seed must have 32 bits, as NumPy's generators want it."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: must be from 0 to 2^32 - 1, not {seed}")


def check_trainer(trainer: Namespace) -> None:
    """Strategy, accelerator and devices must exist, and counts must be in range."""
    for key, least in AT_LEAST.items():
        if trainer[key] is not None:
            check_range(f"trainer.{key}", trainer[key], least)
    if trainer.val_check_interval == 0:
        raise UserError(
            "trainer.val_check_interval: must be above 0; --trainer.limit_val_batches 0 skips validation"
        )
    strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    if (strategy.startswith("fsdp") and strategy != "fsdp2") or strategy.endswith(".FSDPStrategy"):
        raise UserError(
            f"trainer.strategy: {strategy} (FSDP1) cannot clip gradient norms, and its mixed precision "
            "rounds weights and scales before they are quantized; use --trainer.strategy fsdp2"
        )
    if isinstance(trainer.strategy, str):
        _check_name("trainer.strategy", strategy, ["auto", *StrategyRegistry.available_strategies()])
    for each in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        place = each.get("init_args") if isinstance(each, Namespace) else None
        if place is not None and "save_dir" in place and not place.save_dir:
            raise UserError(
                "trainer.logger.save_dir: missing; name the folder of all runs, such as lightning_logs"
            )
    if trainer.logger is False and not trainer.fast_dev_run:
        raise UserError(
            "trainer.logger: the run's folder is the logger's, so it cannot be off; to try out settings, add "
            "--trainer.fast_dev_run true"
        )
    accelerator = trainer.accelerator
    if not isinstance(accelerator, str):
        return
    _check_name(
        "trainer.accelerator", accelerator, ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    )
    gpus = torch.cuda.device_count()
    if accelerator in GPU and not gpus and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise UserError(f"trainer.accelerator: {accelerator}, but PyTorch sees no GPU; use cpu or auto")
    asked = trainer.devices
    number = int(asked) if isinstance(asked, int) or (isinstance(asked, str) and asked.isdigit()) else 0
    if accelerator in GPU or (accelerator == "auto" and gpus):
        available, what = gpus, "GPUs"
    else:
        available, what = os.cpu_count() or 1, "CPU cores"
    if number > available:
        raise UserError(
            f"trainer.devices: {number} processes, but this machine has {available} {what}; ask for fewer"
        )


def check_tasks(settings: Namespace, arguments: Sequence[str]) -> None:
    """Task files name Python that is run: only the command line, not a file, lets `Evaluate` read them.

    Args:
        settings: The verb's settings.
        arguments: The command line.

    Raises:
        UserError: Naming the key.
    """
    said = {(key.rpartition(".")[2], value) for key, value in words(arguments) if isinstance(value, str)}
    values = settings.as_dict()
    blocks = {"evaluate": values["evaluate"], "trainer": {"callbacks": values["trainer"]["callbacks"]}}
    for key, value in walk(blocks, "fit"):
        last = key.rpartition(".")[2]
        if last not in ("tasks", "tasks_path") or not isinstance(value, str) or (last, value) in said:
            continue
        files = [value] if last == "tasks_path" else filter(_is_file, map(str.strip, value.split(",")))
        if file := next(iter(files), None):
            flag = key.strip(".").replace(".init_args", "")
            raise UserError(
                f"{flag}: task files name Python that is run, so a configuration or a study cannot name "
                f"{file}; if you trust it, add --{flag} {value}"
            )


def _is_file(task: str) -> bool:
    """Whether a task is a file, or may be one when it is read."""
    path = Path(task)
    return path.is_file() or path.name != task or path.suffix in (".yaml", ".yml")


def check_optimizer(model: QATModule, trainer: L.Trainer) -> None:
    """Build optimizer and scheduler for one parameter: training builds them late, from factories."""
    try:
        optimizer = model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model.optimizer: {first_line(error)}; correct this setting") from error
    for key, value in optimizer.defaults.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not abs(number) <= LARGEST:
                raise UserError(f"model.optimizer.{key}: must be at most {LARGEST:g}, not {number}")
    for group in ("scale", "weight"):
        multiplier = getattr(model, f"{group}_lr_multiplier")
        if not optimizer.defaults["lr"] * multiplier <= LARGEST:
            raise UserError(
                f"model.{group}_lr_multiplier: {multiplier} makes the learning rate infinite; lower it"
            )
    if model.lr_scheduler is None:
        return
    try:
        check_schedule(model.lr_scheduler(optimizer), trainer)
    except UserError as error:
        group = "model" if str(error).startswith("lr_scheduler") else "model.lr_scheduler"
        raise UserError(f"{group}.{error}") from error
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"model.lr_scheduler: {first_line(error)}; correct this setting") from error


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    raise UserError(f"{key}: {name} is unknown; {did_you_mean(name, known)}")

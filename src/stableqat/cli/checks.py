"""What can be refused before data is prepared: settings of the trainer, run folders and checkpoints.

Lightning finds many mistakes late, after hours of tokenising perhaps, or not at all: it resumes
from nothing where there is no checkpoint, and lets a checkpoint's settings replace the configuration's.
"""

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from stableqat.checkpoints.names import BEST, CHECKPOINTS, CONFIG, LAST, is_sharded, last_checkpoints
from stableqat.checkpoints.read import check_sums, read_checkpoint, read_rest
from stableqat.errors import UserError, check_range, did_you_mean, first_line
from stableqat.modules import QATModule
from stableqat.modules.base import LARGEST
from stableqat.modules.schedule import check_schedule
from stableqat.trust import walk, words

logger = logging.getLogger(__name__)

GPU = ("gpu", "cuda")
_NUMBERED = (CSVLogger, TensorBoardLogger)  # a folder for each run
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
    """Blocks of settings must be mappings: jsonargparse takes anything."""
    for key in keys:
        if not isinstance(settings.get(key), Namespace):
            raise UserError(f"{key}: must be a mapping of settings, not {settings.get(key)}")


def check_seed(seed: int | bool) -> None:
    """NumPy's generators take 32 bits."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: must be from 0 to 2^32 - 1, not {seed}")


def check_trainer(trainer: Namespace) -> None:
    """Strategy, accelerator and devices must exist; counts that Lightning divides by must not be 0."""
    for key, least in AT_LEAST.items():
        if trainer[key] is not None:
            check_range(f"trainer.{key}", trainer[key], least)
    if trainer.val_check_interval == 0:
        raise UserError(
            "trainer.val_check_interval: must be above 0; --trainer.limit_val_batches 0 leaves validation out"
        )
    strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    if (strategy.startswith("fsdp") and strategy != "fsdp2") or strategy.endswith(".FSDPStrategy"):
        raise UserError(
            f"trainer.strategy: {strategy} (FSDP1) cannot clip gradient norms, and its mixed precision "
            "rounds weights and scales before they are quantized; take --trainer.strategy fsdp2"
        )
    if isinstance(trainer.strategy, str):
        _check_name("trainer.strategy", strategy, ["auto", *StrategyRegistry.available_strategies()])
    for each in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        place = each.get("init_args") if isinstance(each, Namespace) else None
        if place is not None and "save_dir" in place and not place.save_dir:
            raise UserError(
                "trainer.logger.save_dir: missing; name the folder of all runs, as lightning_logs"
            )
    if trainer.logger is False and not trainer.fast_dev_run:
        raise UserError(
            "trainer.logger: a run is kept in its logger's folder; leave the logger on, or try settings with "
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
        raise UserError(f"trainer.accelerator: {accelerator}, but PyTorch sees no GPU here; take cpu or auto")
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
    """Task files name Python that is run: only the user's word, which no file is, lets `Evaluate` read them.

    Args:
        settings: Of the verb.
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
                f"{flag}: task files name Python that is run, and only the command line, not a configuration "
                f"or a study, may name {file}; if you trust it, add --{flag} {value}"
            )


def _is_file(task: str) -> bool:
    """Whether a task is a file, or may be one by the time that it is read."""
    path = Path(task)
    return path.is_file() or path.name != task or path.suffix in (".yaml", ".yml")


def check_optimizer(model: QATModule, trainer: L.Trainer) -> None:
    """Optimizer and scheduler are made late, by factories: try them on a parameter now."""
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
                f"model.{group}_lr_multiplier: {multiplier} makes an infinite learning rate; lower it"
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


def find_resumed(settings: Namespace) -> str | None:
    """The checkpoint behind `ckpt_path`; `last` and `best` are those of the run's folder.

    If the last one is damaged, or missing, the one before it is taken, and said so.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = settings.get("ckpt_path")
    if path is None:
        return None
    if path != "last":
        path = Path(path) if path != "best" else _run_folder(settings) / CHECKPOINTS / BEST
        _check_resumed(path, settings.trainer.strategy)
        return str(path)
    last = _run_folder(settings) / CHECKPOINTS / LAST
    found = last_checkpoints(_run_folder(settings))
    previous = next((each for each in found if each != last), None)
    try:
        _check_resumed(last, settings.trainer.strategy)
    except UserError as error:
        if previous is None or (last in found and not isinstance(error, _DamagedError)):
            raise
        _check_resumed(previous, settings.trainer.strategy)
        logger.warning("%s; going on from the one before it, %s", str(error).partition("; ")[0], previous)
        return str(previous)
    return str(last)


class _DamagedError(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


def _check_resumed(path: Path, strategy: str | Namespace) -> None:
    if not path.exists():
        raise UserError(f"ckpt_path: {path} does not exist; name a checkpoint, or leave it out to start anew")
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"ckpt_path: {path} is no checkpoint; name the one that is meant, or last")
    try:
        check_sums(path)
        checkpoint = read_rest(path) if path.is_dir() else read_checkpoint(path)
    except UserError as error:
        raise _DamagedError(f"ckpt_path: {error}") from error
    if "pytorch-lightning_version" not in checkpoint:
        raise UserError(
            f"ckpt_path: {path} is not the checkpoint of a run; start from it with model.init_from"
        )
    kind = strategy if isinstance(strategy, str) else strategy.class_path
    if path.is_dir() and not kind.lower().endswith(("fsdp2", "fsdp2strategy")):
        raise UserError(
            f"ckpt_path: {path} is sharded, which --trainer.strategy fsdp2 resumes; for {kind} make one file "
            f"of it: stableqat consolidate {path}"
        )


def differences(configured: Namespace, saved: Namespace) -> list[tuple[str, Any, Any]]:
    """Settings in which the configuration and a checkpoint's model differ: (key, configured, saved).

    A checkpoint holds the architecture in full, a transformers config for example; it is compared by
    what the configuration names of it, and not at all where a model folder or `init_from` brought it.
    """
    mine, other = dict(vars(configured.as_flat())), dict(vars(saved.as_flat()))
    start = mine.pop("init_args.init_from", None)
    other.pop("init_args.init_from", None)
    if (teacher := "init_args.teacher.source") in mine and mine[teacher] is None:
        mine[teacher] = start  # by default, and what the checkpoint names
    brought = start is not None
    for key, block in list(other.items()):
        if isinstance(block, dict) and isinstance(named := mine.get(key), dict):
            del mine[key], other[key]
            mine |= {f"{key}.{k}": named[k] for k in named if k in block}
            other |= {f"{key}.{k}": block[k] for k in named if k in block}
        elif isinstance(block, dict) and (brought or isinstance(mine.get(key), str)):
            mine[key] = block
    pairs = {key: (mine.get(key), other.get(key)) for key in sorted(mine.keys() | other.keys())}
    return [
        (f"model.{key.replace('init_args.', '')}", a, b)
        for key, (a, b) in pairs.items()
        if _plain(a) != _plain(b)
    ]


def check_run_folder(log_dir: str, ckpt_path: str | None) -> None:
    """The run's folder must be writable, and new unless the run resumes from a checkpoint inside it."""
    folder = Path(log_dir)
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"trainer.logger.save_dir: {folder} cannot be written ({existing}: {error.strerror}); "
            "choose another folder"
        ) from error
    resumes = ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents
    if (folder / CONFIG).exists() and not resumes:
        started = bool(last_checkpoints(folder))
        raise UserError(
            f"{folder}: holds a run already; choose another --trainer.logger.version, or "
            + (
                "resume it with --ckpt_path last"
                if started
                else "remove it (it has no checkpoint to resume from)"
            )
        )


@contextmanager
def claimed(trainer: L.Trainer, settings: Namespace) -> Iterator[None]:
    """Inside, the run's folder is this process's alone; the operating system frees it, however the run ends.

    A number that another run has taken since it was chosen is replaced by the next one. What is still empty
    at the end is removed.

    Args:
        trainer: The trainer.
        settings: Of the verb.

    Raises:
        UserError: If another process is writing the run, or has written one meanwhile.
    """
    loggers: list[Any] = [each for each in trainer.loggers if isinstance(each, _NUMBERED)][:1]
    if not (loggers and trainer.is_global_zero):
        yield
        return
    [own] = loggers
    asked = settings.trainer.logger
    asked = asked[0] if isinstance(asked, list) else asked
    numbered = not isinstance(asked, Namespace) or asked.get("init_args.version") is None
    made = [each for each in Path(own.log_dir).absolute().parents if not each.exists()]
    while True:
        folder = Path(own.log_dir)
        try:
            folder.mkdir(parents=True, exist_ok=not numbered)
            break
        except FileExistsError:
            own._version = None
    lock = folder / ".lock"
    try:
        with _locked(lock) as held:
            if not held:
                raise UserError(
                    f"{folder}: another process is writing this run; wait until it ends, or choose another "
                    "--trainer.logger.version"
                )
            check_run_folder(str(folder), settings.ckpt_path)
            yield
    finally:
        for empty in (folder, *made):
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether a lock is this process's, and not that of one that forked it; its file goes with it."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # a file system without locks protects nobody
                yield error.errno not in (errno.EACCES, errno.EAGAIN)
                return
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # its holder has just removed it
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    raise UserError(f"{key}: {name} is unknown; {did_you_mean(name, known)}")


def _run_folder(settings: Namespace) -> Path:
    logging_to = settings.trainer.logger
    args = logging_to.get("init_args") if isinstance(logging_to, Namespace) else None
    if args is None or args.get("version") is None:
        raise UserError(
            "ckpt_path: last and best need --trainer.logger.version, the run's folder; or name the file"
        )
    version = args.version if isinstance(args.version, str) else f"version_{args.version}"
    return Path(args.save_dir) / (args.name or "") / version


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""A trained model from where it was left: its checkpoint, its data, what it started from.

A run gives its best checkpoint, a checkpoint itself. What a checkpoint does not hold, the data and the start,
comes from the `config.yaml` of the run's folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stableqat import data
from stableqat.checkpoints.names import find_checkpoint
from stableqat.checkpoints.read import check_sums, read_checkpoint
from stableqat.data.tokenizer import clash, load_tokenizer, token_rows
from stableqat.errors import UserError
from stableqat.modules import QATModule
from stableqat.modules.base import state_dict_follows
from stableqat.trust import arguments, read_settings

TOKENIZER = "tokenizer"  # of a language model's run, a folder beside its config.yaml
# of a run's settings what only training needs
TRAINING = {"compile_model": False, "activation_checkpointing": False, "lean_loss": False, "teacher": None}


def find_trained(source: str) -> Path:
    """The checkpoint file of a run folder, its best one, or of a path.

    Raises:
        UserError: If there is none, or it is sharded.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source}: there is no such run or checkpoint")
    best = path / "checkpoints" / "best.ckpt"
    found = best if best.exists() else find_checkpoint(str(path))
    if found is None:
        raise UserError(f"{source}: neither a run folder nor a checkpoint (.ckpt) of this suite")
    if found.is_dir():
        raise UserError(f"{found} is sharded; make one file of it first: stableqat consolidate")
    return found


def open_trained(source: str) -> tuple[Path, dict[str, Any], QATModule]:
    """The checkpoint of a source, what is in it, and its module, in evaluation mode, on the CPU.

    Args:
        source: Run folder or checkpoint.

    Raises:
        UserError: As `find_trained`, or if it is damaged, or of something else.
    """
    path = find_trained(source)
    check_sums(path)
    read = read_checkpoint(path)
    with ours(path):
        with state_dict_follows():
            module = _built(path, read)
        _check_numbers(path, module.state_dict(), read["state_dict"])
        module.load_state_dict(read["state_dict"])  # mapped: optimizer states stay on the disk
    return path, read, module.eval()


def _check_numbers(path: Path, own: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse integers and complex numbers for weights, which torch would cast without a word."""
    for key, tensor in own.items():
        if key in state and tensor.is_floating_point() != state[key].is_floating_point():
            raise UserError(f"{path}: {key} holds {state[key].dtype}, not {tensor.dtype}; take another one")


@contextmanager
def ours(path: Path) -> Iterator[None]:
    """Say in one line that a checkpoint is not what its settings and this version make of it."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged, or written by another version: {first}") from error


def load_untrained(path: Path, read: dict[str, Any], start: str, *, quantized: bool) -> QATModule:
    """What a run started from: full precision, or rounded to nearest as before its first step.

    Args:
        path: Checkpoint file of the run.
        read: What `read_checkpoint` made of it.
        start: The run's `init_from`.
        quantized: Whether the run's quantizers are set on the start's weights.

    Raises:
        UserError: If the start is not to be had.
    """
    changes = {"init_from": start} | ({} if quantized else {"quantizer": None})
    return _built(path, read, **changes).eval()


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def start_of(checkpoint: Path) -> str | None:
    """The `init_from` of the run that a checkpoint lies in."""
    found = _settings(checkpoint, "model").get("init_args", {}).get("init_from")
    return None if found is None else str(found)


def tokenizer_of(checkpoint: Path) -> str | None:
    """Where the tokenizer is that a checkpoint was trained with: kept in its run, or as its run names it.

    Returns:
        Its folder, file or hub name; None if nobody knows.

    Raises:
        UserError: If the run has none: it was imported from files without it.
    """
    run = run_of(checkpoint)
    if run is None:
        return None
    if (run / TOKENIZER).is_dir():
        return str(run / TOKENIZER)
    settings = _settings(checkpoint, "data")
    if not settings:
        raise UserError(f"{run} has no tokenizer")
    named = settings["init_args"].get("tokenizer")
    if not isinstance(named, str | None):
        raise UserError(f"{run}/config.yaml: data.tokenizer: must be text or null; damaged, or changed")
    return named


def load_tokenizer_of(checkpoint: Path, model: Any, given: str | None) -> Any:
    """The tokenizer to use with a run's language model.

    Args:
        checkpoint: Checkpoint of the run.
        model: The language model.
        given: The one that the user asks for; None takes the run's.

    Raises:
        UserError: If there is none, or it cannot be the model's.
    """
    try:
        own = _own_tokenizer(checkpoint)
    except UserError:
        if given is None:
            raise
        own = None
    found = own if given is None else load_tokenizer(given)
    check_vocabulary(found, model.config, given or str(checkpoint))
    if own is not None and (reason := clash(found, own)):
        raise UserError(f"tokenizer: {given} cannot be that of {checkpoint}: {reason}; leave it out")
    return found


def check_vocabulary(tokenizer: Any, config: Any, source: str) -> None:
    """Refuse a tokenizer with more entries than a model's embedding has rows.

    Raises:
        UserError: Naming both numbers.
    """
    if (rows := token_rows(tokenizer)) > config.vocab_size:
        raise UserError(
            f"tokenizer: that of {source} has {rows} entries, more than the model's {config.vocab_size}; "
            "take the one that the model was trained with"
        )


def _own_tokenizer(checkpoint: Path) -> Any:
    if (named := tokenizer_of(checkpoint)) is not None:
        return load_tokenizer(named)
    datamodule, why_not = data_of(checkpoint)
    if not hasattr(datamodule, "tokenizer"):
        why_not = why_not or "its data is not text"
        raise UserError(f"{checkpoint}: has no tokenizer ({why_not}); name one with --tokenizer")
    return datamodule.tokenizer


def data_of(checkpoint: Path, **changes: Any) -> tuple[Any, str]:
    """The data module that a run's configuration names, or None and why there is none.

    Args:
        checkpoint: Checkpoint of the run.
        changes: Arguments of the data module that replace the run's.
    """
    run = run_of(checkpoint)
    if run is None:
        return None, "the checkpoint lies in no run folder"
    settings = _settings(checkpoint, "data")
    home, _, name = str(settings.get("class_path")).rpartition(".")
    if not (home.split(".")[0] == "stableqat" and name in data.__all__):
        return None, "the run's data is none of this suite's"
    cls = getattr(data, name)
    kept = arguments(cls, settings["init_args"], f"{run / 'config.yaml'}: data")
    try:
        if cls is data.TextDataModule:
            changes = {"tokenizer": tokenizer_of(checkpoint), **changes}
        return cls(**{**kept, "num_workers": 0, **changes}), ""
    except UserError as error:
        return None, f"the run's data is not to be had ({error})"


def validated_rows(read: dict[str, Any]) -> int | None:
    """Of how many rows, the first of the validation split, a run's last loss is; None if it does not say.

    Args:
        read: What `read_checkpoint` made of its checkpoint.
    """
    record = read.get("callbacks", {}).get("RunRecord")
    rows = record.get("validation_rows") if isinstance(record, dict) else None
    return rows if isinstance(rows, int) and rows > 0 else None


def images_of(checkpoint: Path) -> dict[str, Any] | None:
    """How the run that a checkpoint lies in resizes and normalises images; None if it has none."""
    kept = image_arguments_of(checkpoint)
    return None if kept is None else data.ImageDataModule.evaluation_settings(kept)


def image_arguments_of(checkpoint: Path) -> dict[str, Any] | None:
    """The arguments of the images of the run that a checkpoint lies in; None if it has none."""
    settings = _settings(checkpoint, "data")
    if not str(settings.get("class_path")).endswith("ImageDataModule"):
        return None
    return arguments(data.ImageDataModule, settings["init_args"], f"{run_of(checkpoint)}/config.yaml: data")


def image_size_of(checkpoint: Path) -> int | None:
    """The size of the images of the run that a checkpoint lies in, where its configuration names it."""
    return (_settings(checkpoint, "data").get("init_args") or {}).get("image_size")


def _built(path: Path, read: dict[str, Any], **changes: Any) -> QATModule:
    """The module of a checkpoint, from its hyper-parameters but for what only training needs."""
    module = QATModule.of_checkpoint(path, read, **(TRAINING | changes))
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in module.build_model().parameters())
    held = sum(tensor.numel() for tensor in read["state_dict"].values())
    if described > 2 * held:  # before memory is taken for it
        raise UserError(
            f"{path}: its settings describe {described:,} parameters, and it holds {held:,}; take another one"
        )
    module.configure_model()
    return module


def _settings(checkpoint: Path, part: str) -> dict[str, Any]:
    """A part of the configuration of the run that a checkpoint lies in: plain values, `init_args` among them.

    Raises:
        UserError: If the file is none of a run.
    """
    run = run_of(checkpoint)
    if run is None:
        return {}
    settings = read_settings(run / "config.yaml")
    found = settings.get(part) or {}
    if not (isinstance(found, dict) and isinstance(found.get("init_args") or {}, dict)):
        raise UserError(f"{run / 'config.yaml'}: {part}: must be a mapping of settings; damaged, or changed")
    return found and {**found, "init_args": found.get("init_args") or {}}

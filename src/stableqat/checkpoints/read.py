"""Start from anything: resolve `init_from` and load its full-precision weights.

Accepted, in this order: a run folder of this suite (its last checkpoint), a checkpoint of this suite, one
file or sharded, then whatever the family reads itself: a local model folder or file, a hub name. Of a
checkpoint that was trained with quantizers the latent weights are taken, and said so. Files are read with
`weights_only`: nothing in them is executed.
"""

import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from stableqat.checkpoints.sharded import REST, damaged_parts, is_sharded, read_whole
from stableqat.errors import UserError
from stableqat.trust import check_settings

if TYPE_CHECKING:
    from stableqat.modules.base import QATModule

logger = logging.getLogger(__name__)

_REST = {"hyper_parameters": dict, "callbacks": dict, "global_step": int}
_KINDS = {dict: "a mapping", int: "a whole number"}


def load_start(module: "QATModule", source: str) -> nn.Module:
    """Build a module's architecture with the weights of `source`.

    Args:
        module: The training system; it knows how to build its architecture and its family's formats.
        source: Run folder, checkpoint, local model folder or file, or hub name.

    Returns:
        The model in float32, not yet quantized.

    Raises:
        UserError: If the source is missing, damaged or of another architecture.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return module.load_pretrained(source)
    model = module.build_model()
    state = read_checkpoint(checkpoint)["state_dict"]
    weights = _latent(state)
    if len(weights) < len(state):
        logger.warning("init_from: %s was trained with quantizers; its latent weights are taken", source)
    load_weights(model, module.fit_state(model, weights, source), source)
    return model


def check_start(module: "QATModule", source: str) -> None:
    """Refuse a source that `load_start` would refuse, by names and shapes alone.

    Raises:
        UserError: As `load_start`.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        module.check_pretrained(source)
        return
    with torch.device("meta"):
        model = module.build_model()
    check_sums(checkpoint)
    state = _latent(read_checkpoint(checkpoint)["state_dict"])
    compare_weights(model, module.fit_state(model, state, source), source)


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint, a file or a folder of shards, behind a run folder or path; None if it is not ours.

    Raises:
        UserError: If a run folder has no checkpoint.
    """
    path = Path(source)
    if (path.is_file() and path.suffix == ".ckpt") or is_sharded(path):
        return path
    if path.is_dir() and ((path / "config.yaml").is_file() or (path / "checkpoints").is_dir()):
        if found := last_checkpoints(path):
            return found[0]
        if (path / "checkpoints" / "best.ckpt").exists():
            raise UserError(f"{source}: the run holds no checkpoints/last.ckpt; name its best.ckpt itself")
        raise UserError(f"{source}: the run holds no checkpoints/last.ckpt or best.ckpt; let it train first")
    if path.suffix == ".ckpt":
        raise UserError(
            f"init_from: there is no checkpoint {source}; name a run folder, a checkpoint or a model"
        )
    return None


def last_checkpoints(run: Path) -> list[Path]:
    """The last checkpoint of a run's folder and the one before it, as far as they exist."""
    names = ("last.ckpt", "previous.ckpt")
    return [path for name in names if (path := run / "checkpoints" / name).exists()]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this suite, tensors and plain values only; of a sharded one not the optimizer.

    Raises:
        UserError: If the file is cut short, or holds something else.
    """
    if is_sharded(path):
        checkpoint = read_rest(path)
        with _reading(path):
            checkpoint.update(read_whole(path, only="state_dict"))
    else:
        with _reading(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_rest(path, checkpoint)
    _check_weights(path, checkpoint)
    return checkpoint


def read_rest(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside weights and optimizers.

    Raises:
        UserError: As `read_checkpoint`.
    """
    with _reading(folder):
        checkpoint = torch.load(folder / REST, map_location="cpu", weights_only=True)
    _check_rest(folder, checkpoint)
    return checkpoint


def read_consolidated(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as the one file would have it.

    Raises:
        UserError: As `read_checkpoint`.
    """
    checkpoint = read_rest(folder)
    with _reading(folder):
        whole = read_whole(folder)
    _check_weights(folder, whole)
    checkpoint["state_dict"] = whole.pop("state_dict")
    checkpoint["optimizer_states"] = [{"state": {}, **whole[key]} for key in sorted(whole)]
    return checkpoint


def check_sums(path: Path) -> None:
    """Compare a checkpoint with the checksums in it, which torch does not: it reads all, a second a gigabyte.

    Raises:
        UserError: If they differ.
    """
    with _reading(path):
        if is_sharded(path):
            bad = next(damaged_parts(path), REST if _first_bad(path / REST) else None)
        else:
            bad = _first_bad(path)
    if bad is not None:
        raise UserError(f"{path}: damaged ({bad} is not what was written); take another one")


def _first_bad(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _check_weights(path: Path, checkpoint: object) -> None:
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of this suite (it has no state_dict)")
    state = checkpoint["state_dict"]
    if not (isinstance(state, dict) and all(isinstance(each, Tensor) for each in state.values())):
        raise UserError(f"{path}: not a checkpoint of this suite (its state_dict holds more than tensors)")


def _check_rest(path: Path, checkpoint: object) -> None:
    """What Lightning and this suite take for granted, in a file that anybody may have written."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint of this suite (it holds no mapping)")
    for key, kind in _REST.items():
        value = checkpoint.setdefault(key, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {key}: must be {_KINDS[kind]}, not {str(value)[:60]}; take another one")
    check_settings(checkpoint["hyper_parameters"], f"{path}: hyper_parameters")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # no Exception itself; it holds one a process
            cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RuntimeError | EOFError | zipfile.BadZipFile | OSError | ValueError | KeyError):
            raise UserError(
                f"{path}: not a readable checkpoint (cut short or damaged); take another one"
            ) from error
        if isinstance(cause, UnpicklingError):
            raise UserError(f"{path}: holds more than tensors and plain values; refused") from error
        raise


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a state dict into a model, exactly.

    Raises:
        UserError: As `compare_weights`.
    """
    compare_weights(model, state, source)
    model.load_state_dict(state, strict=False)


def compare_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes of a model and a state dict.

    Raises:
        UserError: Naming the first difference, if the file is of another architecture.
    """
    own = model.state_dict()
    tied = _tied(model)
    differences = [f"{k} has shape {tuple(state[k].shape)}, the model {tuple(own[k].shape)}"
                   for k in own if k in state and state[k].shape != own[k].shape]  # fmt: skip
    differences += [
        f"{k} is missing in the file" for k in own if k not in state and not tied.get(k, set()) & set(state)
    ]
    differences += [f"{k} is not in the model" for k in state if k not in own]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{source}: weights of another architecture: {differences[0]}{more}; check the model's settings"
        )


def _latent(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model."): v for k, v in state.items() if ".weight_quantizer." not in k}


def _tied(model: nn.Module) -> dict[str, set[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() for name in group if len(group) > 1}

"""The names of a run's files, and how to find its checkpoints; imports neither torch nor Lightning.

    config.yaml                   the run's settings, with which it resumes
    tokenizer/                    of a language model
    checkpoints/last.ckpt         what the run resumes from: a file, or a folder of shards
    checkpoints/previous.ckpt     the one before last
    checkpoints/best.ckpt         the one with the lowest validation loss

A checkpoint is written as NAME.ckpt.partial and moved; a folder that it replaces is NAME.ckpt.old meanwhile.
"""

from pathlib import Path

from stableqat.errors import UserError

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
LOCK = ".lock"  # held by the process that writes the run
CHECKPOINTS = "checkpoints"
SUFFIX = ".ckpt"
LAST, PREVIOUS, BEST = f"last{SUFFIX}", f"previous{SUFFIX}", f"best{SUFFIX}"
PARTIAL, OLD = ".partial", ".old"
INDEX = ".metadata"  # of a sharded checkpoint: which file holds which part of which tensor
REST = "meta.pt"  # and what is not sharded


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint, whole or not."""
    return path.is_dir() and ((path / INDEX).is_file() or (path / REST).is_file())


def consolidated(folder: Path) -> Path:
    """The file beside a sharded checkpoint into which `stableqat consolidate` merges it."""
    return folder.with_name(f"{folder.stem}.consolidated{SUFFIX}")


def last_checkpoints(run: Path) -> list[Path]:
    """The last checkpoint of a run's folder and the one before it, as far as they exist."""
    return [path for name in (LAST, PREVIOUS) if (path := run / CHECKPOINTS / name).exists()]


def find_checkpoint(source: str, key: str | None = None) -> Path | None:
    """The checkpoint, a file or a folder of shards, that a run folder or path names; None for anything else.

    Args:
        source: Run folder, of which the last checkpoint is taken, or checkpoint.
        key: The setting that names it, for messages.

    Raises:
        UserError: If a run folder has no checkpoint, or there is no file of this name.
    """
    path, where = Path(source), "" if key is None else f"{key}: "
    if (path.is_file() and path.suffix == SUFFIX) or is_sharded(path):
        return path
    if path.is_dir() and ((path / CONFIG).is_file() or (path / CHECKPOINTS).is_dir()):
        if found := last_checkpoints(path):
            return found[0]
        if (path / CHECKPOINTS / BEST).exists():
            raise UserError(f"{where}{source}: the run holds no {CHECKPOINTS}/{LAST}; name its {BEST} itself")
        raise UserError(
            f"{where}{source}: the run holds no {CHECKPOINTS}/{LAST} or {BEST}; let it train first"
        )
    if path.suffix == SUFFIX:
        raise UserError(f"{where}there is no checkpoint {source}; name a run folder, a checkpoint or a model")
    return None

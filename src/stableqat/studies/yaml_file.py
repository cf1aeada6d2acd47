"""Read the YAML files that users write for studies, as plain data, and name every mistake in them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stableqat.errors import UserError, did_you_mean, first_line
from stableqat.trust import walk


def load_yaml(path: str | Path, resolve: str | None = None) -> dict[str, Any]:
    """Read a YAML file as plain data.

    Args:
        path: The file.
        resolve: The key of the block in which to replace interpolations by the values of the keys that they
            name; "" means the whole file, None leaves all of them as they are.

    Raises:
        UserError: If the file cannot be read, holds no mapping, or an interpolation is wrong.
    """
    try:
        config = OmegaConf.load(path)
        tree: Any = OmegaConf.to_container(config)
        if not isinstance(tree, dict):
            raise UserError(f"{path}: must hold a mapping of keys to values, not a list")
        if resolve is not None:
            _check_interpolations(path, tree)
        if resolve == "":
            tree = OmegaConf.to_container(config, resolve=True)
        elif resolve is not None and resolve in tree:
            block: Any = OmegaConf.select(config, resolve)
            is_block = OmegaConf.is_config(block)
            tree[resolve] = OmegaConf.to_container(block, resolve=True) if is_block else block
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise UserError(f"{path}: {reason}: name a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}: correct the key {error.full_key}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a YAML text file") from error
    return {str(key): value for key, value in tree.items()}


def check_keys(path: str | Path, where: str, tree: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse an unknown key of a block, and name the nearest known one."""
    names = tuple(known)
    for key in tree:
        if key not in names:
            raise unknown(path, f"{where}.{key}" if where else key, key, names)


def unknown(path: str | Path, where: str, key: str, known: Iterable[str], also: str = "") -> UserError:
    """The error for an unknown key."""
    names = list(known)
    hint = did_you_mean(key, names, f"known here: {', '.join(names)}{also}")
    return UserError(f"{path}: unknown key {where}: {hint}")


def _check_interpolations(path: str | Path, tree: Any) -> None:
    """Refuse resolvers such as `${oc.env:NAME}`: a study reads nothing but its own file."""
    for key, value in walk(tree, str(path)):
        while isinstance(value, str) and "${" in value:
            if resolver := re.search(r"\$\{[^{}]*:", value):
                raise UserError(
                    f"{path}: {key.strip('.')}: {resolver[0]}...}} would read the environment, not this file:"
                    " write the value itself, or ${KEY} of another key of this file"
                )
            simpler = re.sub(r"\$\{[^{}]*\}", "_", value)  # from the inside out: names may be nested
            value = simpler if simpler != value else None

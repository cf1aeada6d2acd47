"""Which model to measure: the architecture in a configuration file, without its training settings.

A name stands for `configs/*/NAME.yaml`, in the current folder or shipped. A file that names no class is an
overlay on the `base.yaml` beside it, setting by setting, as for `stableqat fit`.
"""

import glob
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stableqat.construct import arguments, find_class
from stableqat.errors import UserError, did_you_mean
from stableqat.shipped import SHIPPED, find_config

if TYPE_CHECKING:
    from stableqat.modules import QATModule

_TRAINING = {
    "quantizer",
    "init_from",
    "init_quantizers",
    "optimizer",
    "lr_scheduler",
    "scale_lr_multiplier",
    "weight_lr_multiplier",
    "factor_lr_multiplier",
    "compile_model",
    "graphed",
    "recompute",
    "teacher",
}


@dataclass(frozen=True)
class Architecture:
    """A model to build.

    Attributes:
        name: Its name in tables and files.
        source: Its configuration file.
        class_path: Import path of its module's class, or the bare name of one of this suite's.
        init_args: Arguments of the class that describe the model.
    """

    name: str
    source: Path
    class_path: str
    init_args: dict[str, Any]

    def module(self, **options: Any) -> "QATModule":
        """Make the training system around the model, in full precision by default.

        Args:
            options: Further arguments of the class, which need not be plain values.

        Raises:
            UserError: If the class is not a training system, or the arguments do not fit it.
        """
        from stableqat.modules import QATModule

        named = self.class_path if "." in self.class_path else f"stableqat.modules.{self.class_path}"
        where = f"model: {self.source}: model"
        cls = find_class(named, [QATModule], where)
        return cls(**arguments(cls, self.init_args, where), **options)


def read_architecture(model: str) -> Architecture:
    """Find and read a model's configuration.

    Args:
        model: A name, or the path of a YAML file.

    Raises:
        UserError: If there is no such model, or the file does not describe one.
    """
    source = _find(model)
    settings = _model_settings(source)
    base = source.with_name("base.yaml")
    if "class_path" not in settings and base.is_file():
        under = _model_settings(base)
        settings = {**under, "init_args": {**_mapping(under, base), **_mapping(settings, source)}}
    if not isinstance(settings.get("class_path"), str):
        raise UserError(
            f"model: {source} has no model.class_path and no base.yaml beside it; name a model's file"
        )
    init_args = {key: value for key, value in _mapping(settings, source).items() if key not in _TRAINING}
    return Architecture(source.stem, source, settings["class_path"], init_args)


def _find(model: str) -> Path:
    if "/" in model or model.endswith((".yaml", ".yml")):
        try:
            return find_config(model)
        except UserError as error:
            raise UserError(f"model: {error}") from error
    roots = [root for root in (Path("configs"), SHIPPED) if root.is_dir()]
    for root in roots:
        found = sorted(root.glob(f"*/{glob.escape(model)}.yaml"))
        if len(found) > 1:
            raise UserError(f"model: {model} may be {' or '.join(map(str, found))}; give the path")
        if found:
            return found[0]
    # a name that both families have is not a model's
    families = Counter(path.stem for root in roots[:1] for path in sorted(root.glob("*/*.yaml")))
    models = [name for name, number in families.items() if number == 1]
    raise UserError(f"model: {model} is unknown; {did_you_mean(model, models)}")


def _model_settings(source: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(source.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"model: {source} cannot be read as YAML: {' '.join(str(error).split())}") from error
    settings = content.get("model") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"model: {source} has no model section; name a model's configuration")
    return settings


def _mapping(settings: dict[str, Any], source: Path) -> dict[str, Any]:
    init_args = settings.get("init_args") or {}
    if not isinstance(init_args, dict):
        raise UserError(f"model: {source}: model.init_args must be a mapping of settings")
    return init_args

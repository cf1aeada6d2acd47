"""Study files: a grid of runs written down once, expanded into ordinary command lines.

    name: demo                                 # runs land in <logs>/demo/<point>; default: the file's name
    logs: lightning_logs                       # default
    vars: {steps: 200}                         # anything, for interpolation: ${vars.steps}
    configs: [base.yaml, demo.yaml]            # of every run
    args: {trainer.max_steps: "${vars.steps}"} # of every run
    runs_per_gpu: 8                            # default: found by the sweep
    start: {args: {trainer.max_steps: 400}}    # optional: one run that all others begin from;
                                               # {study: NAME, ...} puts it into NAME's folder, to share it
    compare: {baseline: {method: STE}, margin: 0.01, cap: 4.5}  # optional: what `stableqat compare` tests
    validate:                                  # optional: measured, not trained
      ptq: {configs: [ste.yaml]}
    grid:
      arm:
        fp:                                    # nothing on top of the base: full precision
        ste: {configs: [ste.yaml]}
        ste-stretched: {configs: [ste.yaml], args: {model.quantizer.grid: stretched}}
      bits: 2
      lr: [3e-4, 1e-3]
      seed: [0, 1]
      model.scale_lr_multiplier: [0.1, 1]      # any argument can be an axis

A point is the base, its arm, and a value of each axis. An arm that sets an argument itself is not repeated
over that axis. Axes of a quantizer (`bits`, `model.quantizer...`, `model.input_quantizer...`) do not repeat
an arm without it, or with a mapping in its place, and only these axes repeat the `validate` arms. File names
are relative to the current folder, as on a command line; shipped configurations have names, such as
llama/base.
"""

import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.shipped import find_config
from stableqat.studies.plan import QUANTIZER, SHORT_AXES, Plan, check_baseline, plan_of
from stableqat.studies.yaml_file import check_keys, load_yaml, unknown
from stableqat.trust import QUANTIZERS

INIT_FROM = "model.init_from"
START = "start"
_QUANTIZERS = tuple(f"model.{key}" for key in QUANTIZERS)
_KEYS = ("name", "logs", "vars", "configs", "args", "runs_per_gpu", START, "validate", "grid", "compare")


@dataclass(frozen=True)
class ConfigFile:
    """A config file and its values under flat dotted keys, read once."""

    path: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Overlay:
    """Config files and arguments that are laid over those before them."""

    configs: tuple[ConfigFile, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)

    def __add__(self, other: "Overlay") -> "Overlay":
        return Overlay(self.configs + other.configs, self.args | other.args)

    def settings(self) -> dict[str, Any]:
        """The resulting values, by flat keys in their short form (without `init_args`)."""
        settings: dict[str, Any] = {}
        for layer in (*(file.values for file in self.configs), self.args):
            for long_key, value in layer.items():
                key = long_key.replace(".init_args.", ".")
                # A scalar (such as null) replaces a whole block, and a block replaces a scalar.
                over = [k for k in settings if k.startswith(f"{key}.") or key.startswith(f"{k}.")]
                settings = {k: v for k, v in settings.items() if k not in over} | {key: value}
        return settings

    @property
    def quantized(self) -> bool:
        """Whether a config file or an argument names a quantizer of weights."""
        return self.names(QUANTIZER)

    def names(self, quantizer: str) -> bool:
        """Whether a config file or an argument names a quantizer, or a mapping of such."""
        return any(f"{k}.".startswith(f"{quantizer}.") and v is not None for k, v in self.settings().items())


@dataclass(frozen=True)
class Point:
    """One run of a study: its arm, its folder and the command line that makes it."""

    study: str
    arm: str
    name: str
    folder: Path
    verb: str
    overlay: Overlay
    start: "Point | None" = None

    @property
    def argv(self) -> list[str]:
        """All arguments of the `stableqat` command."""
        argv = [self.verb]
        for file in self.overlay.configs:
            argv += ["-c", file.path]
        place = {"save_dir": str(self.folder.parent.parent), "name": self.study, "version": self.name}
        for key, value in (self.overlay.args | {f"trainer.logger.{k}": v for k, v in place.items()}).items():
            argv += [f"--{key}={short(value)}"] if short(value)[:1] == "-" else [f"--{key}", short(value)]
        return argv

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(["stableqat", *self.argv])

    def settings(self) -> dict[str, Any]:
        """Everything that decides the outcome of the run, to notice if it changes after the run was made.

        The values in config files count; their names, comments and folder do not. The settings of a point
        that begins from the start run include those of the start run.
        """
        values = {"verb": self.verb} | self.overlay.settings()
        if self.start:
            values.pop(INIT_FROM)
            values |= {f"{START}.{key}": value for key, value in self.start.settings().items()}
        # as read back from a file; NaN becomes text, because it equals nothing
        return json.loads(json.dumps(values), parse_constant=lambda x: x if x == "NaN" else float(x))


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: Its name, and that of its folder.
        folder: Where its runs go.
        points: Its points, the start run first.
        runs_per_gpu: How many of its runs share a GPU; None lets the sweep find out.
        plan: What its comparison tests.
        text: The content of the study file.
    """

    name: str
    folder: Path
    points: tuple[Point, ...]
    runs_per_gpu: int | None
    plan: Plan
    text: str


def read_study(path: str | Path) -> Study:
    """Read a study file and expand it.

    Raises:
        UserError: If a key is unknown or missing, an axis is empty, a value is of the wrong kind, a config
            file cannot be read, two points have one name, or the comparison is impossible; names the file
            and the key.
    """
    tree = load_yaml(path, resolve="")
    check_keys(path, "", tree, _KEYS)
    name = _name(path, "name", tree.get("name", Path(path).stem))
    logs = tree.get("logs", "lightning_logs")
    if not isinstance(logs, str) or not logs:
        raise UserError(f"{path}: logs: {logs!r} must be the name of a folder, as lightning_logs")
    folder = Path(logs) / name
    base = _overlay(path, "", {key: tree[key] for key in ("configs", "args") if key in tree})
    grid = _mapping(path, "grid", tree.get("grid"))
    arms = _mapping(path, "grid.arm", grid.pop("arm", None))
    if not arms:
        raise UserError(f"{path}: the grid is empty: name at least one run under grid.arm")
    axes = _axes(path, grid)
    points = []
    start = None
    if START in tree:
        content = _mapping(path, START, tree[START])
        home = _name(path, f"{START}.study", content.pop("study", name))
        at = folder.parent / home / START
        start = Point(home, START, START, at, "fit", base + _overlay(path, START, content))
        points.append(start)
        base += Overlay(args={INIT_FROM: str(start.folder)})

    validate = _mapping(path, "validate", tree.get("validate"))
    quantizer_axes = [axis for axis in axes if axis.quantizer is not None]
    for verb, section, arms_, axes_ in (
        ("validate", "validate", validate, quantizer_axes),
        ("fit", "grid.arm", arms, axes),
    ):
        for arm_name, content in arms_.items():
            where = f"{section}.{arm_name}"
            own = _overlay(path, where, content)
            arm = base + own
            begins = start if start and arm.args[INIT_FROM] == str(start.folder) else None
            free = [axis for axis in axes_ if axis.argument not in own.args and axis.varies(arm)]
            for values in itertools.product(*(axis.values for axis in free)):
                parts = [axis.label(value) for axis, value in zip(free, values, strict=True)]
                point = _name(path, where, "-".join([arm_name, *parts]))
                choice = {axis.argument: value for axis, value in zip(free, values, strict=True)}
                overlay = arm + Overlay(args=choice)
                points.append(Point(name, arm_name, point, folder / point, verb, overlay, begins))

    names = [point.name for point in points]
    for twice in {n for n in names if names.count(n) > 1}:
        raise UserError(f"{path}: two points are named {twice}: rename an arm or drop a repeated value")
    runs_per_gpu = tree.get("runs_per_gpu")
    if runs_per_gpu is not None and (not isinstance(runs_per_gpu, int) or runs_per_gpu < 1):
        raise UserError(f"{path}: runs_per_gpu: {runs_per_gpu!r} must be a whole number, 1 or more")
    plan = plan_of(path, tree.get("compare"))
    quantized = [point for point in points if point.verb == "fit" and point.overlay.quantized]
    check_baseline(path, plan, {point.name: point.overlay.settings() for point in quantized})
    return Study(name, folder, tuple(points), runs_per_gpu, plan, Path(path).read_text())


@dataclass(frozen=True)
class _Axis:
    argument: str
    prefix: str
    values: list[Any]

    @property
    def quantizer(self) -> str | None:
        """The setting that names the quantizer to which the argument belongs."""
        return next((each for each in _QUANTIZERS if self.argument.startswith(f"{each}.")), None)

    def varies(self, arm: Overlay) -> bool:
        """Whether the argument exists in an arm, which a quantizer's does not without it or in a mapping."""
        if self.quantizer is None:
            return True
        return arm.names(self.quantizer) and not isinstance(arm.settings().get(self.quantizer), dict)

    def label(self, value: Any) -> str:
        """What a value adds to the name of a point; of a path, its last part."""
        if isinstance(value, str) and "/" in value:
            return Path(value).name
        return self.prefix + short(value)


def _axes(path: str | Path, grid: dict[str, Any]) -> list[_Axis]:
    axes: list[_Axis] = []
    for key, content in grid.items():
        where = f"grid.{key}"
        if key not in SHORT_AXES and "." not in key:
            raise unknown(path, where, key, ("arm", *SHORT_AXES), " and arguments, as model.quantizer.grid")
        values = content if isinstance(content, list) else [content]
        if not values:
            raise UserError(f"{path}: {where} is empty: give at least one value")
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key == "lr" and not (number and 0 < value < float("inf")):
                raise UserError(f"{path}: {where}: {value!r} must be a learning rate above 0, as 1e-3")
            if key in ("bits", "seed") and not (number and isinstance(value, int) and value >= 0):
                raise UserError(f"{path}: {where}: {value!r} must be a whole number, 0 or more")
            if isinstance(value, dict | list):
                raise UserError(f"{path}: {where}: {value!r} cannot be a value of an axis: make it an arm")
        argument = _argument(path, where, SHORT_AXES.get(key, key))
        if argument in (axis.argument for axis in axes):
            raise UserError(f"{path}: {where} is the same axis as another key of the grid: keep one")
        prefix = {"bits": "b", "seed": "s"}.get(key, argument.rsplit(".", 1)[-1])
        axes.append(_Axis(argument, prefix, values))
    return axes


def _overlay(path: str | Path, where: str, content: Any) -> Overlay:
    tree = _mapping(path, where, content)
    check_keys(path, where, tree, ("configs", "args"))
    dot = f"{where}." if where else ""
    names = tree.get("configs") or []
    configs = []
    for file in names if isinstance(names, list) else [names]:
        try:
            configs.append(ConfigFile(file, _flatten(load_yaml(find_config(str(file))))))
        except UserError as error:
            raise UserError(f"{path}: {dot}configs: {error}") from error
    args = _flatten(_mapping(path, f"{dot}args", tree.get("args")))
    return Overlay(tuple(configs), {_argument(path, f"{dot}args", key): value for key, value in args.items()})


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and not _maps_quantizers(f"{prefix}{key}", value):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _maps_quantizers(key: str, value: dict[str, Any]) -> bool:
    """Whether a setting is a mapping from layer patterns to quantizers, which stays whole."""
    inside = any(isinstance(each, dict) and "class_path" in each for each in value.values())
    return key.replace(".init_args.", ".") in _QUANTIZERS and (
        inside or any(set("*?[") & set(k) for k in value)
    )


def _mapping(path: str | Path, where: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {where}: {value!r} must be a mapping of names to values")
    return {str(key): content for key, content in (value or {}).items()}


def _name(path: str | Path, where: str, value: Any) -> str:
    if not re.fullmatch(r"\w[\w.+=-]*", str(value), re.ASCII):
        raise UserError(f"{path}: {where}: {value!r} names a folder: use letters, digits and _ . + = -")
    return str(value)


def _argument(path: str | Path, where: str, key: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_][\w.]*", key, re.ASCII):
        raise UserError(f"{path}: {where}: {key!r} is not an argument: write it as trainer.max_steps")
    if key == "allow":
        raise UserError(f"{path}: {where}: allow is only for the command line: stableqat sweep --allow NAME")
    if key.startswith("trainer.logger.") or key == "ckpt_path":
        raise UserError(f"{path}: {where}: {key} is set by the sweep: remove it (see name and logs)")
    return key.replace(".init_args.", ".")


def short(value: Any) -> str:
    """A value as a user types it on a command line: 0.001 becomes 1e-3, 0.1 stays 0.1."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:.0f}".replace("inf", ".inf").replace("nan", ".nan")
    if not isinstance(value, float):
        return value if isinstance(value, str) else json.dumps(value)
    if value == 0 or 0.1 <= abs(value) < 1000:
        return repr(value).removesuffix(".0")
    digits = next(d for d in range(17) if float(f"{value:.{d}e}") == value)
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"

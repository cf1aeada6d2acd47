"""What a study fixes beforehand about its comparison: the block `compare` of its file.

    compare: {baseline: {method: STE, grid: integer}, margin: 0.01, cap: 4.5}

`read_study` checks it against the arms before anything runs. `stableqat compare` reads it from the copy of
the study file that lies with the runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.studies.yaml_file import check_keys, load_yaml, unknown

STUDY_FILE = "study.yaml"
SHORT_AXES = {"bits": "model.quantizer.bits", "lr": "model.optimizer.lr", "seed": "seed_everything"}
QUANTIZER = "model.quantizer"
# What runs log of themselves, beside the settings of their surrogates.
LOGGED = (
    *("method", "bits", "grid", "mask", "scale_init", "granularity", "quantizers"),
    *("input_quantizer", "input_bits", "input_surrogate", "input_mask", "widths", "attention"),
    *("dampening", "freezing", "quantized_share", "deployed_mb", "a", "amplitude", "harmonics", "value"),
    *("rank", "alpha", "factor_lr_multiplier", "scale_lr_multiplier", "weight_lr_multiplier"),
    *("optimizer", "weight_decay", "warmup_steps"),
    *("gradient_clip_val", "max_steps", "batch_size", "tokens_per_step", "training_tokens", "named"),
)


@dataclass(frozen=True)
class Plan:
    """What a study fixes beforehand.

    Attributes:
        baseline: Hyper-parameters that select the baseline; None takes the first STE arm.
        margin: Margin of equivalence in nats; 0 if the study names none.
        cap: Cap of the losses in nats; None leaves it to the arms, see `analysis.caps`.
    """

    baseline: dict[str, Any] | None = None
    margin: float = 0.0
    cap: float | None = None


def read_plan(folder: Path) -> Plan:
    """Reads the plan from the study file that lies with the runs; without one there is none.

    Raises:
        UserError: The file can't be read, or a key or a value of the plan is wrong.
    """
    path = folder / STUDY_FILE
    return plan_of(path, load_yaml(path, resolve="compare").get("compare")) if path.exists() else Plan()


def plan_of(path: str | Path, content: Any) -> Plan:
    """Makes the plan of a study file's block `compare`.

    Raises:
        UserError: A key or a value is wrong; names the file and the key.
    """
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: compare must be a mapping with baseline, margin and cap")
    plan = {str(key): value for key, value in (content or {}).items()}
    check_keys(path, "compare", plan, [field.name for field in fields(Plan)])
    for key, value in plan.items():
        if key == "baseline":
            if not isinstance(value, dict | None):
                raise UserError(f"{path}: compare.baseline: {value!r} must be a mapping, as {{method: STE}}")
            for name, each in (value or {}).items():
                if isinstance(each, dict | list):
                    raise UserError(
                        f"{path}: compare.baseline.{name}: {each!r} must be one value, as runs log it"
                    )
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"{path}: compare.{key}: {value!r} must be a number of nats, 0 or more")
    return Plan(**plan)


def check_baseline(path: str | Path, plan: Plan, runs: Mapping[str, dict[str, Any]]) -> None:
    """Refuses a baseline that selects no arm of the study, or two arms that are compared with each other.

    Args:
        path: The study file.
        plan: Its plan.
        runs: Name to settings (flat keys) of its quantized runs; what they leave to defaults may be anything.

    Raises:
        UserError: An unknown key, or values that no arm has, or that two arms of one bit width have.
    """
    if plan.baseline is None or not runs:
        return
    quantizers = {name: _quantizer(settings) for name, settings in runs.items()}
    known = {key.rsplit(".", 1)[-1] for settings in runs.values() for key in settings} | set(LOGGED)
    ours = all(
        each.get("class_path", "stableqat.").split(".")[0] in ("stableqat", each.get("method"))
        for each in quantizers.values()
    )
    for key in plan.baseline:
        if ours and key not in known:  # the surrogate of a foreign method may log more
            raise unknown(path, f"compare.baseline.{key}", key, LOGGED)
    wanted = plan.baseline.items()
    if not any(all(own.get(key) in (None, value) for key, value in wanted) for own in quantizers.values()):
        methods = ", ".join(dict.fromkeys(own["method"] for own in quantizers.values() if "method" in own))
        raise UserError(
            f"{path}: compare.baseline {plan.baseline} selects none of the quantized arms (their methods:"
            f" {methods}): correct it, or add the arm"
        )
    selected: dict[Any, tuple[str, str]] = {}
    for name, own in quantizers.items():
        if all(key in own and own[key] == value for key, value in wanted):
            group = own.get("bits", own.get("class_path")), runs[name].get("model.class_path")
            first, arm = selected.setdefault(group, (name, arm_of(runs[name])))
            if arm != arm_of(runs[name]):
                raise UserError(
                    f"{path}: compare.baseline {plan.baseline} selects two arms, those of {first} and {name}:"
                    " add a hyper-parameter in which they differ"
                )


def arm_of(settings: Mapping[str, Any]) -> str:
    """What the runs of one arm share, as text: all settings but the learning rate and the seed."""
    own = (SHORT_AXES["lr"], SHORT_AXES["seed"])
    return json.dumps(sorted(pair for pair in settings.items() if pair[0] not in own))


def _quantizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's quantizer, in the words of the run's record."""
    start = f"{QUANTIZER}."
    own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
    name = settings.get(QUANTIZER, own.get("class_path"))
    return own | ({"method": name.rsplit(".", 1)[-1], "class_path": name} if isinstance(name, str) else {})

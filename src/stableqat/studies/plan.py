"""What a study file fixes beforehand about its comparison: its block `compare`.

    compare: {baseline: {method: STE, grid: integer}, margin: 0.01, cap: 4.5}

A sweep checks it before anything runs, as far as the study file says what its arms are; `stableqat compare`
reads it from the copy that lies with the runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.studies.keys import check_keys, unknown

# What runs log of themselves, beside the settings of their surrogates.
LOGGED = (
    *("method", "bits", "grid", "mask", "scale_init", "granularity", "quantized_share"),
    *("a", "amplitude", "harmonics", "value"),
    *("scale_lr_multiplier", "weight_lr_multiplier", "optimizer", "weight_decay", "warmup_steps"),
    *("gradient_clip_val", "max_steps", "batch_size", "tokens_per_step", "training_tokens", "named"),
)


@dataclass(frozen=True)
class Plan:
    """What a study fixed beforehand.

    Attributes:
        baseline: Hyper-parameters that select the baseline; None takes the first STE arm.
        margin: Margin of equivalence in nats; 0 where the study names none.
        cap: Cap of the losses in nats; None leaves it to the arms, see `Comparison.caps`.
    """

    baseline: dict[str, Any] | None = None
    margin: float = 0.0
    cap: float | None = None


def plan_of(path: str | Path, content: Any) -> Plan:
    """The plan in a study file's `compare`.

    Raises:
        UserError: A key or a value is wrong; names the file and the key.
    """
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: compare must be a mapping with baseline, margin and cap")
    plan = {str(key): value for key, value in (content or {}).items()}
    check_keys(path, "compare", plan, [field.name for field in fields(Plan)])
    baseline = plan.get("baseline")
    if not isinstance(baseline, dict | None):
        raise UserError(f"{path}: compare.baseline: {baseline!r} must be a mapping, as {{method: STE}}")
    for key, value in (baseline or {}).items():
        if isinstance(value, dict | list):
            raise UserError(f"{path}: compare.baseline.{key}: {value!r} must be one value, as runs log it")
    for key in plan.keys() - {"baseline"}:
        value = plan[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"{path}: compare.{key}: {value!r} must be a number of nats, 0 or more")
    return Plan(**plan)


def check_baseline(path: str | Path, plan: Plan, arms: Iterable[dict[str, Any]]) -> None:
    """Refuses a baseline that none of a study's arms can be.

    Args:
        path: The study file.
        plan: Its plan.
        arms: Settings of its quantized arms, as flat keys; what an arm leaves to defaults may be anything.

    Raises:
        UserError: An unknown key, a method that no arm has, or values that no arm has.
    """
    settings = list(arms)
    if not plan.baseline or not settings:
        return
    known = [_quantizer(arm) for arm in settings]
    names = {key.rsplit(".", 1)[-1] for arm in settings for key in arm} | set(LOGGED)
    ours = all(
        arm.get("class_path", "stableqat.").split(".")[0] in ("stableqat", arm.get("method")) for arm in known
    )
    for key in plan.baseline:
        if ours and key not in names:  # the surrogate of someone else's method may log more
            raise unknown(path, f"compare.baseline.{key}", key, LOGGED)
    if not any(all(arm.get(key) in (None, value) for key, value in plan.baseline.items()) for arm in known):
        methods = ", ".join(dict.fromkeys(arm["method"] for arm in known if "method" in arm))
        raise UserError(
            f"{path}: compare.baseline {plan.baseline} selects none of the quantized arms (their methods:"
            f" {methods}): correct it, or add the arm"
        )


def _quantizer(arm: dict[str, Any]) -> dict[str, Any]:
    """What an arm's settings say of its quantizer, in the words of the record of a run."""
    prefix = "model.quantizer"
    own = {
        key.removeprefix(f"{prefix}."): value for key, value in arm.items() if key.startswith(f"{prefix}.")
    }
    name = arm.get(prefix, own.get("class_path"))
    return own | ({"method": name.rsplit(".", 1)[-1], "class_path": name} if isinstance(name, str) else {})

"""The arms of a study: which runs belong together, and what they are called.

An arm is all runs that differ only in learning rate and seed. If hyper-parameters do not tell the arms of a
study apart, the names of its runs do. The label of an arm is its method and the hyper-parameters in which it
differs from most other arms, such as "StableQAT amplitude 0.1" or "STE optimizer SGD": in a study that varies
one factor at a time, a list of all settings would hide the one that matters. If no value of a hyper-parameter
is the most common one, all arms name theirs; bits are named wherever they differ.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.events import Run
from stableqat.studies.plan import arm_of
from stableqat.studies.record import Record
from stableqat.studies.study import START, short
from stableqat.terminal import plain

log = logging.getLogger(__name__)

LOSS, TOP1 = "val/loss", "val/top1"
COLUMNS = ("method", "bits", "grid", "mask")
KINDS = ("fp", "ptq", "fit")
NAMED = "named"  # the name in the study, if hyper-parameters do not tell arms apart
ATTENTION = "attention"  # quantized where weights need not be
SIZE = "deployed_mb"  # of the packed weights
UNSET = "unset"  # a run of an earlier version, or an argument that only some arms log


@dataclass(frozen=True)
class Group:
    """Arms that can be compared: of one bit width (None is full precision) and one family of models."""

    bits: int | None
    images: bool

    @property
    def name(self) -> str:
        """The group's name in titles and sentences."""
        width = "full precision" if self.bits is None else f"{self.bits} bit{'s' * (self.bits != 1)}"
        return width + ", images" * self.images


@dataclass(frozen=True)
class Result:
    """What a comparison takes from a run.

    Attributes:
        folder: Folder of the run.
        hparams: Its hyper-parameters.
        scalars: Tag to {step: value}.
        last: Tag to the value of the last step.
        diverged: Whether the run ended as diverged, or its last loss is not finite.
    """

    folder: Path
    hparams: dict[str, Any]
    scalars: dict[str, dict[int, float]]
    last: dict[str, float]
    diverged: bool

    @classmethod
    def of(cls, run: Run) -> "Result":
        """The result of a run."""
        last = {tag: series[max(series)] for tag, series in run.scalars.items() if series}
        diverged = last.get("hp/diverged") == 1 or not math.isfinite(last.get(LOSS, 0.0))
        return cls(run.folder, run.hparams, run.scalars, last, diverged)

    @property
    def kind(self) -> str:
        """The kind of arm that the run belongs to."""
        full_precision = self.hparams.get("method") == "FP"
        if self.hparams.get("subcommand") == "validate":
            return "fp" if full_precision else "ptq"
        return "fp" if full_precision and self.folder.name == START else "fit"

    @property
    def shared(self) -> dict[str, Any]:
        """The hyper-parameters that the runs of an arm share."""
        own = ("lr", "seed", "subcommand", "quantized_share", SIZE)
        return {key: value for key, value in self.hparams.items() if key not in own}

    @property
    def arm(self) -> tuple[Any, ...]:
        """A key that all runs of the arm share."""
        shared = sorted((key, str(value)) for key, value in self.shared.items())
        return (self.kind, self.folder.name == START, *shared)


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in learning rate and seed.

    Attributes:
        kind: "fp" (measured or `start`), "ptq" (measured after rounding) or "fit".
        hparams: The hyper-parameters that the runs share.
        runs: The runs.
        images: Whether its models classify images.
        departures: What its label says after the method.
        label: Its short name.
    """

    kind: str
    hparams: dict[str, Any]
    runs: list[Result]
    images: bool
    departures: tuple[str, ...] = ()
    label: str = ""

    @property
    def group(self) -> Group:
        """The group of the arm."""
        return Group(self.hparams.get("bits"), self.images)

    @property
    def method(self) -> str:
        """The name of the arm's method."""
        return str(self.hparams.get("method"))

    @property
    def megabytes(self) -> float | None:
        """What its packed weights take; None in runs of earlier versions."""
        return next((run.hparams[SIZE] for run in self.runs if SIZE in run.hparams), None)

    @property
    def lrs(self) -> list[float]:
        """The learning rates of the arm."""
        return sorted({run.hparams["lr"] for run in self.runs})


def usable(result: Result) -> bool:
    """Whether a run can be compared; if not, log the reason."""
    steps, max_steps = result.last.get("hp/steps"), result.hparams.get("max_steps", -1)
    reason = None
    if not result.hparams:
        reason = "it logged no hyper-parameters"
    elif "lr" not in result.hparams and result.kind == "fit":
        reason = "its hyper-parameters name no lr"
    elif result.diverged:
        reason = None
    elif LOSS not in result.last:
        reason = f"it logged no {LOSS}"
    elif result.hparams.get("subcommand") != "validate" and steps is not None:
        if steps < max_steps:
            reason = f"it is unfinished: step {steps:.0f} of {max_steps:.0f}"
        elif result.last.get("hp/finished") == 0:
            reason = f"it is unfinished: it was cut at step {steps:.0f}"
    if reason:
        log.warning("%s is left out: %s", plain(str(result.folder)), reason)
    return reason is None


def find_arms(results: Sequence[Result]) -> list[Arm]:
    """The arms of a study: full precision, PTQ and training, the plain arm of a method before its variants.

    Raises:
        UserError: If two runs of one arm share the learning rate and the seed.
    """
    alike: dict[Any, list[Result]] = {}
    for result in _told_apart(results):
        alike.setdefault(result.arm, []).append(result)
    tagged = {key: {tag for run in runs for tag in run.scalars} for key, runs in alike.items()}
    validated = {TOP1 in tags for tags in tagged.values() if LOSS in tags}
    arms = []
    for key, runs in alike.items():  # one that diverged before its first validation is like the others
        arms.append(Arm(runs[0].kind, runs[0].shared, runs, TOP1 in tagged[key] or validated == {True}))
    usual = most_common(arms)
    arms = [replace(arm, departures=_departures(arm, arms, usual)) for arm in arms]
    arms = [replace(arm, label=_label(arm, arms)) for arm in arms]
    return sorted(
        arms,
        key=lambda arm: (
            KINDS.index(arm.kind),
            arm.hparams.get("method") != "FP",
            "" if arm.kind == "ptq" else arm.method,
            str(arm.hparams.get("bits")),
            len(arm.departures),
            arm.label,
        ),
    )


def most_common(arms: Sequence[Arm]) -> dict[str, str]:
    """The hyper-parameters that labels leave out, with the value, as text, that most arms have.

    Only arms whose method knows a hyper-parameter count; arms that train override those of PTQ.
    """
    usual = {}
    for kind in ("ptq", "fit"):
        settings = [arm.hparams for arm in arms if arm.kind == kind]
        for key in {key for each in settings for key in each} - {"method", NAMED}:
            methods = {each.get("method") for each in settings if key in each}
            counts = Counter(_text(each, key) for each in settings if each.get("method") in methods)
            (value, count), *others = counts.most_common(2)
            if not others or (count > others[0][1] and key != "bits"):
                usual[key] = value
    return dict(sorted(usual.items()))


def find_columns(arms: Sequence[Arm]) -> list[str]:
    """Hyper-parameters worth a column: the usual ones and those in which arms differ."""
    settings = [arm.hparams for arm in arms if arm.kind != "fp"]
    keys = dict.fromkeys(key for each in settings for key in each)
    differ = [key for key in keys if len({str(each[key]) for each in settings if key in each}) > 1]
    return list(dict.fromkeys([*COLUMNS, *differ]))


def _departures(arm: Arm, arms: list[Arm], usual: dict[str, str]) -> tuple[str, ...]:
    """What sets an arm apart from most others, in words."""
    always = [NAMED, ATTENTION] if arm.method == "FP" else [NAMED]  # full precision means no attention's
    usual = usual | dict.fromkeys(always, UNSET)
    like = [other.hparams for other in arms if (other.kind, other.method) == (arm.kind, arm.method)]
    keys = sorted({key for each in like for key in each} - {"method"})
    keys.sort(key=lambda key: COLUMNS.index(key) if key in COLUMNS else len(COLUMNS))
    texts = {key: _text(arm.hparams, key) for key in keys}
    return tuple(
        {"bits": f"{text}-bit", "grid": text}.get(key, f"{key} {text}")
        for key, text in texts.items()
        if text != usual.get(key)
    )


def _label(arm: Arm, arms: list[Arm]) -> str:
    if arm.kind == "fp":
        where = START if arm.runs[0].folder.name == START else arm.hparams.get(NAMED, "validate")
        return " ".join([f"FP ({where})", *(each for each in arm.departures if each.startswith(ATTENTION))])
    name = arm.method
    if arm.kind == "ptq":
        alike = sum(other.kind == "ptq" and other.departures == arm.departures for other in arms)
        name = "PTQ" if alike == 1 else f"PTQ {name}"
    return " ".join([name, *arm.departures])


def _text(hparams: dict[str, Any], key: str) -> str:
    return short(hparams[key]) if key in hparams else UNSET


def _told_apart(results: Sequence[Result]) -> list[Result]:
    """The runs, named where hyper-parameters do not tell the arms of a study apart.

    That is where two runs also share the learning rate and the seed, or where a sweep varied more than these.
    The name is that of the run without them: the arm in the study file, and other axes.
    """
    alike: dict[Any, list[Result]] = {}
    for result in results:
        alike.setdefault(result.arm, []).append(result)
    told: list[Result] = []
    for group in alike.values():
        if _twice(group) or len({settings for run in group if (settings := _settings(run))}) > 1:
            group = [replace(run, hparams=run.hparams | {NAMED: _name(run)}) for run in group]
            for name in {run.hparams[NAMED] for run in group}:
                if both := _twice([run for run in group if run.hparams[NAMED] == name]):
                    names = plain(f"{both[0].folder} and {both[1].folder}")
                    raise UserError(f"{names} share all hyper-parameters and the seed; move one of them away")
        told += group
    return told


def _twice(runs: list[Result]) -> tuple[Result, Result] | None:
    """The first two runs that share the learning rate and the seed; None if no two do."""
    found: dict[Any, Result] = {}
    for run in runs:
        place = run.hparams.get("lr"), run.hparams.get("seed")
        if place[1] is not None and (other := found.setdefault(place, run)) is not run:
            return other, run
    return None


def _settings(run: Result) -> str:
    """What a sweep set for the run besides learning rate and seed; empty if no sweep made it."""
    record = Record.read(run.folder)
    return arm_of(record.settings) if record else ""


def _name(run: Result) -> str:
    lr, seed = (re.escape(short(run.hparams.get(key))) for key in ("lr", "seed"))
    return plain(re.sub(rf"-(lr{lr}|s{seed})(?=-|$)", "", run.folder.name))

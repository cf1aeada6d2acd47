"""The arms of a study, and their losses over learning rates.

An arm is all runs that differ in learning rate and seed only; where hyper-parameters don't tell the arms of
a study apart, the names of its runs do. A loss is the validation loss at the end of a run, in nats; a
diverged run counts as the cap, see `caps`. LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322) is the
mean over the learning rates of min(loss, cap) - best, the worst loss the largest min(loss, cap); both are
computed seed by seed and averaged, and since they depend on the grid of learning rates, only seeds count that
have all of it. An arm's learning rate is selected on the even batches of validation and its loss reported on
the odd ones, because the smallest of several noisy losses flatters.
"""

import json
import logging
import math
import re
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stableqat.analysis.band import Band, band, mean
from stableqat.analysis.caps import Cap, Group, caps
from stableqat.analysis.differences import Difference, differences
from stableqat.analysis.labels import COLUMNS, NAMED, departures, differing, most_common
from stableqat.errors import UserError
from stableqat.events import Run
from stableqat.studies.plan import SHORT_AXES, Plan, read_plan
from stableqat.studies.record import Record
from stableqat.studies.study import START, short
from stableqat.terminal import printable

log = logging.getLogger(__name__)

LOSS, EVEN, ODD = "val/loss", "val/loss_even", "val/loss_odd"
TOP1 = "val/top1"
# Rounding to nearest is the same for two arms that share these.
FORWARD = ("bits", "grid", "scale_init", "granularity")


@dataclass
class Cell:
    """Runs of one arm at one learning rate: seeds."""

    losses: list[float]
    diverged: int

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds, None for a single one or without a cap."""
        known = len(self.losses) > 1 and all(map(math.isfinite, self.losses))
        return statistics.stdev(self.losses) if known else None


@dataclass(frozen=True)
class Selected:
    """An arm's learning rate as selected on one half of validation, and its loss on the other.

    Attributes:
        lr: The learning rate.
        loss: Mean over the seeds of the loss reported for it.
        edge: "lower" or "upper" where it is the arm's smallest or largest, so that the best may lie beyond.
    """

    lr: float
    loss: float
    edge: str


@dataclass
class Arm:
    """Runs that differ in learning rate and seed only.

    Attributes:
        kind: "fp" (measured or `start`), "ptq" (measured after rounding) or "fit".
        hparams: What the runs share.
        runs: The runs.
        images: Whether its models classify images.
    """

    kind: str
    hparams: dict[str, Any]
    runs: list[Run]
    images: bool = False

    @property
    def group(self) -> Group:
        """The group that it belongs to."""
        return Group(self.hparams.get("bits"), self.images)

    def at(self, lr: float | None) -> list[Run]:
        """The runs of one learning rate, or all."""
        return [run for run in self.runs if lr is None or run.hparams["lr"] == lr]

    def logged(self, tag: str) -> bool:
        """Whether any of its runs logged a tag."""
        return any(tag in run.scalars for run in self.runs)

    def finals(self, tag: str, lr: float | None = None) -> list[float]:
        """Final values of a tag in the runs (of one learning rate); none where one of these diverged."""
        runs = self.at(lr)
        values = [value for run in runs if (value := run.last(tag)) is not None]
        return [] if any(map(diverged, runs)) else values

    def mean(self, tag: str, lr: float | None = None) -> float | None:
        """Their mean; that of the survivors alone would flatter."""
        values = self.finals(tag, lr)
        return statistics.fmean(values) if values else None


class Comparison:
    """All arms of one study.

    Args:
        folder: Folder of the study.
        runs: Its finished runs.

    Raises:
        UserError: Two runs of one arm share the learning rate and the seed.
    """

    def __init__(self, folder: Path, runs: list[Run]):
        self.folder = folder
        self.name = printable(folder.resolve().name)
        groups: dict[tuple[Any, ...], Arm] = {}
        for run in _told_apart(runs):
            groups.setdefault(_key(run), Arm(_kind(run), _shared(run), [])).runs.append(run)
        self.arms = list(groups.values())
        validated = {arm.logged(TOP1) for arm in self.arms if arm.logged(LOSS)}
        for arm in self.arms:  # one that diverged before its first validation is like the others
            arm.images = arm.logged(TOP1) or validated == {True}
        order = {"fp": 0, "ptq": 1, "fit": 2}
        self.arms = sorted(
            self.arms,
            key=lambda a: (
                order[a.kind],
                a.hparams.get("method") != "FP",
                "" if a.kind == "ptq" else str(a.hparams.get("method")),
                str(a.hparams.get("bits")),
                len(self._departures(a)),  # the plain arm of a method before its variants
                self.label(a),
            ),
        )
        self.fits = [arm for arm in self.arms if arm.kind == "fit"]
        self.quantized = [arm for arm in self.fits if arm.hparams.get("method") != "FP"]
        self.ptqs = [arm for arm in self.arms if arm.kind == "ptq"]

    def named(self, folder: Path) -> str | None:
        """What tells a run's arm apart beside its hyper-parameters, if anything has to."""
        runs = (run for arm in self.arms for run in arm.runs)
        return next((run.hparams.get(NAMED) for run in runs if run.folder == folder), None)

    @cached_property
    def lrs(self) -> list[float]:
        """The grid of learning rates."""
        return sorted({run.hparams["lr"] for arm in self.fits for run in arm.runs})

    @cached_property
    def plan(self) -> Plan:
        """What the study file fixed beforehand."""
        return read_plan(self.folder)

    @cached_property
    def differences(self) -> list[Difference]:
        """Every arm against the baseline, paired by seed."""
        return differences(self)

    @cached_property
    def selection(self) -> tuple[str, str]:
        """The tags that a learning rate is selected on, and reported on."""
        finished = [run for arm in self.fits for run in arm.runs if not diverged(run)]
        halves = all(run.last(tag) is not None for run in finished for tag in (EVEN, ODD))
        return (EVEN, ODD) if halves and finished else (LOSS, LOSS)

    @property
    def full_precision(self) -> float | None:
        """Loss of the weights that QAT begins from, before rounding."""
        return self._full_precision(LOSS, self.arms[0].images)

    def _full_precision(self, tag: str, images: bool) -> float | None:
        references = [arm for arm in self.arms if arm.kind == "fp" and arm.images == images]
        references.sort(key=lambda arm: arm.runs[0].hparams.get("subcommand") != "validate")
        return references[0].mean(tag) if references else None

    def ptq(self, arm: Arm, tag: str = LOSS) -> float | None:
        """Loss after rounding those weights as the arm does at its first step."""
        for other in self.ptqs:
            same = all(other.hparams.get(key) == arm.hparams.get(key) for key in FORWARD)
            if same and other.images == arm.images:
                return other.mean(tag)
        return None

    @cached_property
    def caps(self) -> dict[Group, Cap]:
        """The cap of each group."""
        return caps(self)

    def cap(self, arm: Arm) -> Cap:
        """The cap of an arm's losses."""
        return self.caps[arm.group]

    def cell(self, arm: Arm, lr: float) -> Cell | None:
        """The arm's runs at one learning rate, as they ended."""
        runs = arm.at(lr)
        losses = [self.cap(arm).loss if diverged(run) else _final(run, LOSS) for run in runs]
        return Cell(losses, sum(map(diverged, runs))) if runs else None

    def losses(self, arm: Arm, lr: float, tag: str = LOSS) -> dict[Any, float]:
        """Seed to min(loss, cap) at one learning rate; runs that don't say their seed are averaged."""
        cap = self.cap(arm).loss
        values: dict[Any, list[float]] = {}
        for run in arm.at(lr):
            loss = cap if diverged(run) else min(_final(run, tag), cap)
            values.setdefault(run.hparams.get("seed"), []).append(loss)
        return {seed: statistics.fmean(repeats) for seed, repeats in values.items()}

    def sensitivities(self, arm: Arm) -> dict[Any, float]:
        """Seed to LR sensitivity."""
        return {seed: statistics.fmean(row) - min(row) for seed, row in self._complete(arm).items()}

    def band(self, arm: Arm) -> Band | None:
        """The usable learning rates, the mean over the seeds; None where one never gets below the cap."""
        rows = self._complete(arm).values() if len(self.lrs) > 1 else ()
        bands = [band(self.lrs, row, self.cap(arm).loss) for row in rows]
        return mean([each for each in bands if each]) if bands and all(bands) else None

    def worsts(self, arm: Arm) -> dict[Any, float]:
        """Seed to the largest loss."""
        return {seed: max(row) for seed, row in self._complete(arm).items()}

    def _complete(self, arm: Arm) -> dict[Any, list[float]]:
        """Seed to the losses over the grid of learning rates, for the seeds that have it all."""
        cells = [self.losses(arm, lr) for lr in self.lrs]
        seeds = [seed for seed in cells[0] if all(seed in cell for cell in cells)]
        rows = {seed: [cell[seed] for cell in cells] for seed in seeds}
        return {seed: row for seed, row in rows.items() if all(map(math.isfinite, row))}

    def selected(self, arm: Arm) -> Selected:
        """The arm's best learning rate, and what its loss is there."""
        on, reported = self.selection
        lrs = sorted({run.hparams["lr"] for run in arm.runs})
        means = {lr: statistics.fmean(self.losses(arm, lr, on).values()) for lr in lrs}
        best = min(lrs, key=lambda lr: means[lr])
        loss = statistics.fmean(self.losses(arm, best, reported).values())
        edges = {lrs[0]: "lower", lrs[-1]: "upper"} if len(lrs) > 1 else {}
        return Selected(best, loss, edges.get(best, ""))

    def recovered(self, arm: Arm) -> float | None:
        """Share of the loss by rounding that training wins back."""
        tag = self.selection[1]
        ptq, full = self.ptq(arm, tag), self._full_precision(tag, arm.images)
        if ptq is None or full is None or ptq <= full:
            return None
        return (ptq - self.selected(arm).loss) / (ptq - full)

    @cached_property
    def columns(self) -> list[str]:
        """Hyper-parameters worth a column: the usual ones, and those in which arms differ."""
        settings = [arm.hparams for arm in self.arms if arm.kind != "fp"]
        return [*COLUMNS, *(key for key in differing(settings) if key not in COLUMNS)]

    @cached_property
    def usual(self) -> dict[str, str]:
        """Hyper-parameters that labels leave out, because more arms have these values than any other."""
        kinds = ([arm.hparams for arm in self.arms if arm.kind == kind] for kind in ("ptq", "fit"))
        ptq, fit = map(most_common, kinds)
        return dict(sorted((ptq | fit).items()))

    def label(self, arm: Arm) -> str:
        """A short name: the method, and every hyper-parameter in which it departs from the usual."""
        if arm.kind == "fp":
            return f"FP ({START if arm.runs[0].folder.name == START else arm.hparams.get(NAMED, 'validate')})"
        name, own = str(arm.hparams.get("method")), self._departures(arm)
        if arm.kind == "ptq":
            alike = sum(other.kind == "ptq" and self._departures(other) == own for other in self.arms)
            name = "PTQ" if alike == 1 else f"PTQ {name}"
        return " ".join([name, *own])

    def _departures(self, arm: Arm) -> list[str]:
        method = arm.hparams.get("method")
        like = [a.hparams for a in self.arms if a.kind == arm.kind and a.hparams.get("method") == method]
        return departures(arm.hparams, like, self.usual)

    def sensitivity(self, arm: Arm) -> float | None:
        """LR sensitivity, the mean over the seeds; None where a learning rate is missing."""
        return _mean(self.sensitivities(arm))

    def worst(self, arm: Arm) -> float | None:
        """The worst loss, the mean over the seeds; None where a learning rate is missing."""
        return _mean(self.worsts(arm))


def _mean(by_seed: dict[Any, float]) -> float | None:
    return statistics.fmean(by_seed.values()) if by_seed else None


def diverged(run: Run) -> bool:
    """Whether the run was ended as diverged, or its last loss is not finite."""
    loss = run.last(LOSS)
    return run.last("hp/diverged") == 1 or (loss is not None and not math.isfinite(loss))


def usable(run: Run) -> bool:
    """Whether a run can be compared; says why not."""
    steps, max_steps = run.last("hp/steps"), run.hparams.get("max_steps", -1)
    reason = None
    if not run.hparams:
        reason = "it logged no hyper-parameters"
    elif "lr" not in run.hparams and _kind(run) == "fit":
        reason = "its hyper-parameters name no lr"
    elif diverged(run):
        reason = None
    elif run.last(LOSS) is None:
        reason = f"it logged no {LOSS}"
    elif run.hparams.get("subcommand") != "validate" and steps is not None:
        if steps < max_steps:
            reason = f"it is unfinished: step {steps:.0f} of {max_steps:.0f}"
        elif run.last("hp/finished") == 0:
            reason = f"it is unfinished: it was cut at step {steps:.0f}"
    if reason:
        log.warning("%s is left out: %s", printable(str(run.folder)), reason)
    return reason is None


def _told_apart(runs: list[Run]) -> list[Run]:
    """The runs, named where hyper-parameters don't tell the arms of a study apart.

    That is where two runs share the learning rate and the seed as well, or where a sweep set more than these
    differently. The name is that of the run without them: the arm in the study file, and other axes.
    """
    alike: dict[Any, list[Run]] = {}
    for run in runs:
        alike.setdefault(_key(run), []).append(run)
    told: list[Run] = []
    for group in alike.values():
        if _twice(group) or len({settings for run in group if (settings := _settings(run))}) > 1:
            group = [replace(run, hparams=run.hparams | {NAMED: _name(run)}) for run in group]
            for name in {run.hparams[NAMED] for run in group}:
                if both := _twice([run for run in group if run.hparams[NAMED] == name]):
                    names = printable(f"{both[0].folder} and {both[1].folder}")
                    raise UserError(
                        f"{names} share all hyper-parameters and the seed, so they are neither two arms"
                        " nor two seeds: move one of them away"
                    )
        told += group
    return told


def _twice(runs: list[Run]) -> tuple[Run, Run] | None:
    """Two runs of one learning rate and seed."""
    found: dict[Any, Run] = {}
    for run in runs:
        place = run.hparams.get("lr"), run.hparams.get("seed")
        if place[1] is not None and (other := found.setdefault(place, run)) is not run:
            return other, run
    return None


def _settings(run: Run) -> str:
    """What the sweep that made the run set beside learning rate and seed; empty where none did."""
    record = Record.read(run.folder)
    if record is None:
        return ""
    own = {SHORT_AXES["lr"], SHORT_AXES["seed"]}
    return json.dumps(sorted(pair for pair in record.settings.items() if pair[0] not in own))


def _name(run: Run) -> str:
    lr, seed = (re.escape(short(run.hparams.get(key))) for key in ("lr", "seed"))
    return printable(re.sub(rf"-(lr{lr}|s{seed})(?=-|$)", "", run.folder.name))


def _shared(run: Run) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.hparams.items()
        if key not in ("lr", "seed", "subcommand", "quantized_share")
    }


def _key(run: Run) -> tuple[Any, ...]:
    shared = sorted((key, str(value)) for key, value in _shared(run).items())
    return (_kind(run), run.folder.name == START, *shared)


def _final(run: Run, tag: str) -> float:
    loss = run.last(tag)
    assert loss is not None, "left out by `usable`, or not selected on"
    return loss


def _kind(run: Run) -> str:
    full_precision = run.hparams.get("method") == "FP"
    if run.hparams.get("subcommand") == "validate":
        return "fp" if full_precision else "ptq"
    return "fp" if full_precision and run.folder.name == START else "fit"

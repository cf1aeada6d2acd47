"""The figures of a study: arms, their losses over learning rates, and how stable they are.

An arm is all runs that differ in learning rate and seed only. A loss is the validation loss at the
end of a run, in nats; a diverged run counts as the cap. The cap is the smallest loss that any quantized
arm has before it learns: PTQ's on the arm's grid where the study measured it, otherwise that of
the first training batch. LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322) is the mean
over the learning rates of min(loss, cap) - best; it depends on the grid of learning rates, so it is
given only to arms that have all of the study's. Recovered is the share of the loss that rounding
alone costs (PTQ - full precision) that the best learning rate wins back.
"""

import logging
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stableqat.analysis.events import Run
from stableqat.analysis.study import START, short

log = logging.getLogger(__name__)

LOSS = "val/loss"
# Rounding to nearest is the same for two arms that share these.
FORWARD = ("bits", "grid", "scale_init", "granularity")
COLUMNS = ("method", "bits", "grid", "mask")


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
        """Sample standard deviation over the seeds, None for a single one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass
class Arm:
    """Runs that differ in learning rate and seed only.

    Attributes:
        kind: "fp" (measured or `start`), "ptq" (measured after rounding) or "fit".
        hparams: What the runs share.
        runs: The runs.
    """

    kind: str
    hparams: dict[str, Any]
    runs: list[Run]

    def finals(self, tag: str, lr: float | None = None) -> list[float]:
        """Final values of a tag in the runs (of one learning rate) that did not diverge."""
        runs = [run for run in self.runs if lr is None or run.hparams["lr"] == lr]
        return [value for run in runs if not diverged(run) and (value := run.last(tag)) is not None]

    def mean(self, tag: str, lr: float | None = None) -> float | None:
        """Their mean."""
        values = self.finals(tag, lr)
        return statistics.fmean(values) if values else None


class Comparison:
    """All arms of one study.

    Args:
        folder: Folder of the study.
        runs: Its finished runs.
    """

    def __init__(self, folder: Path, runs: list[Run]):
        self.folder = folder
        groups: dict[tuple[Any, ...], Arm] = {}
        for run in runs:
            kind = _kind(run)
            shared = {k: v for k, v in run.hparams.items() if k not in ("lr", "seed", "subcommand")}
            key = (kind, run.folder.name == START, *sorted((k, str(v)) for k, v in shared.items()))
            groups.setdefault(key, Arm(kind, shared, [])).runs.append(run)
        order = {"fp": 0, "ptq": 1, "fit": 2}
        self.arms = sorted(
            groups.values(),
            key=lambda a: (
                order[a.kind],
                a.hparams.get("method") != "FP",
                [str(a.hparams.get(c)) for c in COLUMNS],
            ),
        )
        self.fits = [arm for arm in self.arms if arm.kind == "fit"]
        self.ptqs = [arm for arm in self.arms if arm.kind == "ptq"]

    @cached_property
    def lrs(self) -> list[float]:
        """The grid of learning rates."""
        return sorted({run.hparams["lr"] for arm in self.fits for run in arm.runs})

    @cached_property
    def full_precision(self) -> float | None:
        """Loss of the weights that QAT begins from, before rounding."""
        references = [arm for arm in self.arms if arm.kind == "fp"]
        references.sort(key=lambda arm: arm.runs[0].hparams.get("subcommand") != "validate")
        return references[0].mean(LOSS) if references else None

    def ptq(self, arm: Arm) -> float | None:
        """Loss after rounding those weights as the arm does at its first step."""
        for other in self.ptqs:
            if all(other.hparams.get(key) == arm.hparams.get(key) for key in FORWARD):
                return other.mean(LOSS)
        return None

    @cached_property
    def cap(self) -> tuple[float, str]:
        """The cap of the losses, and where it comes from."""
        caps = []
        quantized = [arm for arm in self.fits if arm.hparams.get("method") != "FP"]
        for arm in quantized or self.fits:
            ptq = self.ptq(arm)
            first = [
                v for run in arm.runs if (v := run.last("hp/initial_loss")) is not None and math.isfinite(v)
            ]
            if ptq is not None:
                caps.append((ptq, f"PTQ, {self.label(arm)}'s grid"))
            elif first:
                caps.append((min(first), f"first training batch, {self.label(arm)}"))
        return min(caps, default=(math.inf, "no run says its initial loss"))

    def cell(self, arm: Arm, lr: float) -> Cell | None:
        """The arm's runs at one learning rate."""
        runs = [run for run in arm.runs if run.hparams["lr"] == lr]
        losses = [self.cap[0] if diverged(run) else _final(run) for run in runs]
        return Cell(losses, sum(map(diverged, runs))) if runs else None

    def best(self, arm: Arm) -> tuple[float, float]:
        """The smallest mean loss, and its learning rate."""
        return min((cell.mean, lr) for lr in self.lrs if (cell := self.cell(arm, lr)))

    def worst(self, arm: Arm) -> float:
        """The largest mean loss."""
        return max(cell.mean for lr in self.lrs if (cell := self.cell(arm, lr)))

    def sensitivity(self, arm: Arm) -> float | None:
        """LR sensitivity; None where a learning rate is missing."""
        cells = [self.cell(arm, lr) for lr in self.lrs]
        capped = [statistics.fmean(min(x, self.cap[0]) for x in cell.losses) for cell in cells if cell]
        return statistics.fmean(capped) - min(capped) if len(capped) == len(cells) else None

    def recovered(self, arm: Arm) -> float | None:
        """Share of the loss by rounding that training wins back."""
        ptq, full = self.ptq(arm), self.full_precision
        if ptq is None or full is None or ptq <= full:
            return None
        return (ptq - self.best(arm)[0]) / (ptq - full)

    @cached_property
    def columns(self) -> list[str]:
        """Hyper-parameters worth a column: the usual ones, and those in which arms differ."""
        arms = [arm for arm in self.arms if arm.kind != "fp"]
        keys = dict.fromkeys(key for arm in arms for key in arm.hparams)
        return [*COLUMNS, *(key for key in keys if key not in COLUMNS and _differs(key, arms))]

    def label(self, arm: Arm) -> str:
        """A short name: the method, and what else tells the arm from those of the same method."""
        if arm.kind == "fp":
            return f"FP ({START if arm.runs[0].folder.name == START else 'validate'})"
        if arm.kind == "ptq":
            same, name = self.ptqs, "PTQ"
        else:
            name = str(arm.hparams.get("method"))
            same = [other for other in self.fits if other.hparams.get("method") == arm.hparams.get("method")]
        parts = [key for key in self.columns if key != "method" and _differs(key, same)]
        texts = (short(arm.hparams[key]) for key in parts if key in arm.hparams)
        return " ".join([name, *texts])


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
    elif run.hparams.get("subcommand") != "validate" and steps is not None and steps < max_steps:
        reason = f"it is unfinished: step {steps:.0f} of {max_steps:.0f}"
    if reason:
        log.warning("%s is left out: %s", run.folder, reason)
    return reason is None


def _final(run: Run) -> float:
    loss = run.last(LOSS)
    assert loss is not None, "left out by `usable`"
    return loss


def _kind(run: Run) -> str:
    full_precision = run.hparams.get("method") == "FP"
    if run.hparams.get("subcommand") == "validate":
        return "fp" if full_precision else "ptq"
    return "fp" if full_precision and run.folder.name == START else "fit"


def _differs(key: str, arms: list[Arm]) -> bool:
    return len({str(arm.hparams[key]) for arm in arms if key in arm.hparams}) > 1

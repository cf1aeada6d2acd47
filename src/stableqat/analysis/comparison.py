"""The comparison of a study's arms: all its figures, computed once.

`read_summaries` turns folders of event files into one `Summary` per study, which tables, pictures, the report
and the published copy only render. A loss is the validation loss at the end of a run, in nats; a diverged run
counts as the cap of the same batches, see `caps`. An arm's learning rate is selected on the even batches of
validation and its loss is reported on the odd ones, because the smallest of several noisy losses flatters.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableqat.analysis.arms import (
    ATTENTION,
    LOSS,
    TOP1,
    Arm,
    Group,
    Result,
    find_arms,
    find_columns,
    most_common,
    usable,
)
from stableqat.analysis.best import find_best
from stableqat.analysis.caps import Cap, find_caps
from stableqat.analysis.differences import Difference, find_differences
from stableqat.analysis.sensitivity import Sensitivity, sensitivity
from stableqat.analysis.stability import stability
from stableqat.errors import UserError
from stableqat.events import COMPARED, find_runs, read_run
from stableqat.studies.plan import Plan, read_plan
from stableqat.studies.study import short
from stableqat.terminal import plain

log = logging.getLogger(__name__)

EVEN, ODD = "val/loss_even", "val/loss_odd"
PERPLEXITY = "val/perplexity"
ODD_HALF, ALL = ", odd batches", ", all batches"
# Rounding to nearest is the same for two arms that share these.
FORWARD = (
    "bits",
    "grid",
    "scale_init",
    "granularity",
    "quantizers",
    "input_quantizer",
    "input_bits",
    ATTENTION,
)


@dataclass(frozen=True)
class Cell:
    """Runs of one arm at one learning rate: seeds.

    Attributes:
        runs: The runs.
        losses: Their final losses; that of a diverged run is the cap.
        capped: Seed to min(loss, cap); runs without a logged seed are averaged.
        top1: Their top-1; empty if one of them diverged.
        diverged: How many of them diverged.
        above: How many others ended above the cap.
        stability: How calm they were, see `stability`.
    """

    runs: list[Result]
    losses: list[float]
    capped: dict[Any, float]
    top1: list[float]
    diverged: int
    above: int
    stability: dict[str, float]

    @property
    def lost(self) -> bool:
        """Whether all its runs count as the cap."""
        return self.diverged + self.above == len(self.runs)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single seed or without a cap."""
        known = len(self.losses) > 1 and all(map(math.isfinite, self.losses))
        return statistics.stdev(self.losses) if known else None


@dataclass(frozen=True)
class Selected:
    """An arm's learning rate as selected on one half of validation, and its loss on the other.

    Attributes:
        lr: The learning rate.
        losses: The reported loss of each run; that of a diverged run is the cap.
        by_seed: Seed to min(loss, cap), which tests compare.
        cap: The cap of these losses.
        edge: "lower" or "upper" if it is the arm's smallest or largest, so that the best may lie beyond.
    """

    lr: float
    losses: list[float]
    by_seed: dict[Any, float]
    cap: float
    edge: str

    @property
    def loss(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.losses)


@dataclass(frozen=True, kw_only=True)
class ArmSummary(Arm):
    """An arm with all its figures.

    Attributes:
        loss: Mean loss over all its runs; None if one diverged.
        top1: Mean top-1 over all its runs; None if one diverged.
        calm: How calm each run was, see `stability`.
        figures: The figures in its row of the tables, by column.
        cells: For an arm that trains, learning rate to its runs.
        cap: For an arm that trains, the cap of its losses of all batches.
        ptq: For an arm that trains, the loss of PTQ on its own grid and scale, if measured.
        selected: For an arm that trains, its best learning rate.
        sensitivity: For an arm that trains, how its loss depends on the learning rate.
    """

    loss: float | None
    top1: float | None
    calm: list[dict[str, float]]
    figures: dict[str, Any]
    cells: dict[float, Cell]
    cap: Cap | None = None
    ptq: float | None = None
    selected: Selected | None = None
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Summary:
    """The comparison of one study.

    Attributes:
        folder: Folder of the study.
        name: Its name.
        plan: What the study file fixes in advance.
        arms: All arms, full precision and PTQ first.
        lrs: The grid of learning rates.
        selected_on: The tag that learning rates are selected on.
        reported_on: The tag of the loss that is reported.
        full_precision: Loss of the weights that QAT starts from, before rounding.
        caps: The cap of each group of arms, of losses of all batches.
        differences: Every quantized arm against the baseline, paired by seed.
        columns: Hyper-parameters worth a column.
        usual: Hyper-parameters that labels leave out, with the value that most arms have.
        rows: The table: column to value for each arm, without the columns that are empty in all rows.
        best: Column to the labels of the arms that are the best of their group, or tie with it.
    """

    folder: Path
    name: str
    plan: Plan
    arms: list[ArmSummary]
    lrs: list[float]
    selected_on: str
    reported_on: str
    full_precision: float | None
    caps: dict[Group, Cap]
    differences: list[Difference]
    columns: list[str]
    usual: dict[str, str]
    rows: list[dict[str, Any]]
    best: dict[str, set[str]]

    @property
    def fits(self) -> list[ArmSummary]:
        """The arms that train."""
        return [arm for arm in self.arms if arm.kind == "fit"]

    @property
    def quantized(self) -> list[ArmSummary]:
        """The arms that train and quantize."""
        return [arm for arm in self.fits if arm.method != "FP"]


def read_summaries(folders: Sequence[Path]) -> list[Summary]:
    """Compare the runs in and under the folders, study by study.

    Raises:
        UserError: If a folder has no event files, or no run that can be compared.
    """
    summaries: dict[Path, Summary] = {}
    for folder in folders:
        studies: dict[Path, list[Result]] = {}
        paths = find_runs(folder)
        for path in paths:
            run = read_run(path, COMPARED)
            for problem in run.problems:
                log.warning("%s", problem)
            if usable(result := Result.of(run)):
                studies.setdefault(path.parent, []).append(result)
        if not paths:
            raise UserError(f"{folder}: no event files in or under this folder: name the folder of a study")
        if not studies:
            raise UserError(f"{folder}: none of its runs can be compared (see the warnings)")
        summaries |= {study: summarize(study, results) for study, results in studies.items()}
    return list(summaries.values())


def summarize(folder: Path, results: Sequence[Result]) -> Summary:
    """Compare the arms of one study.

    Args:
        folder: Folder of the study.
        results: Its runs that can be compared.

    Raises:
        UserError: If the study's plan does not fit its runs, or two runs are the same.
    """
    arms = find_arms(results)
    columns, usual = find_columns(arms), most_common(arms)
    plan = read_plan(folder)
    fits = [arm for arm in arms if arm.kind == "fit"]
    lrs = sorted({lr for arm in fits for lr in arm.lrs})
    finished = [run for arm in fits for run in arm.runs if not run.diverged]
    halves = finished and all(tag in run.last for run in finished for tag in (EVEN, ODD))
    tags = (EVEN, ODD) if halves else (LOSS, LOSS)
    ptqs = {arm.label: _ptq(arm, arms) for arm in fits}
    caps = {
        tag: find_caps(fits, {label: _mean(runs, tag) for label, runs in ptqs.items()}, plan.cap, tag)
        for tag in (LOSS, *tags)
    }
    measured = []
    for arm in arms:
        if arm.kind == "fit":
            references = _full_precision(arms, arm.images), ptqs[arm.label]
            own = {tag: of_groups[arm.group] for tag, of_groups in caps.items()}
            measured.append(_trained(arm, lrs, own, tags, references))
        else:
            measured.append(_summary(arm, _figures(tags, _mean(arm.runs, tags[1]), arm.runs, arm), {}))
    quantized = [arm for arm in measured if arm.kind == "fit" and arm.method != "FP"]
    return Summary(
        folder,
        plain(folder.resolve().name),
        plan,
        measured,
        lrs,
        *tags,
        _mean(_full_precision(arms, arms[0].images), LOSS),
        caps[LOSS],
        find_differences(folder, plan, lrs, quantized),
        columns,
        usual,
        _rows(measured, columns, lrs),
        find_best(quantized, plan.margin),
    )


def _summary(arm: Arm, figures: dict[str, Any], cells: dict[float, Cell], **others: Any) -> ArmSummary:
    loss, top1 = _mean(arm.runs, LOSS), _mean(arm.runs, TOP1)
    calm = [stability([run]) for run in arm.runs]
    return ArmSummary(**vars(arm), loss=loss, top1=top1, calm=calm, figures=figures, cells=cells, **others)


def _trained(
    arm: Arm,
    lrs: list[float],
    caps: Mapping[str, Cap],
    tags: tuple[str, str],
    references: tuple[list[Result], list[Result]],
) -> ArmSummary:
    """The figures of an arm that trains.

    Args:
        arm: The arm.
        lrs: The study's learning rates.
        caps: The caps of the arm's losses, by tag.
        tags: What a learning rate is selected on, and reported on.
        references: Runs of full precision, and of PTQ as the arm rounds.
    """
    at = {lr: [run for run in arm.runs if run.hparams["lr"] == lr] for lr in lrs}
    all_, selecting, reporting = (caps[tag].loss for tag in (LOSS, *tags))
    cells = {lr: _cell(runs, all_) for lr, runs in at.items() if runs}
    on = {lr: statistics.fmean(_capped(at[lr], tags[0], selecting).values()) for lr in cells}
    best = min(cells, key=lambda lr: on[lr])
    edges = {min(cells): "lower", max(cells): "upper"} if len(cells) > 1 else {}
    reported = _losses(at[best], tags[1], reporting), _capped(at[best], tags[1], reporting), reporting
    selected = Selected(best, *reported, edges.get(best, ""))
    over_lrs = sensitivity(lrs, [cells[lr].capped if lr in cells else {} for lr in lrs], all_)
    full, ptq = (_mean(runs, tags[1]) for runs in references)
    recovered = None
    if ptq is not None and full is not None and ptq > full:
        recovered = (ptq - selected.loss) / (ptq - full)
    lost = sum(run.diverged for run in arm.runs)
    figures = _figures(tags, selected.loss, at[best], arm)
    figures |= {"selected lr": best, "edge": selected.edge, "recovered": recovered}
    figures |= {"lr sensitivity": over_lrs.mean, "usable octaves": over_lrs.band}
    figures |= {"worst loss": over_lrs.worst, "diverged": lost, "divergence rate": lost / len(arm.runs)}
    figures |= stability(arm.runs)
    others = {"cap": caps[LOSS], "ptq": _mean(references[1], LOSS), "selected": selected}
    return _summary(arm, figures, cells, sensitivity=over_lrs, **others)


def _cell(runs: list[Result], cap: float) -> Cell:
    losses, capped = _losses(runs, LOSS, cap), _capped(runs, LOSS, cap)
    lost, above = sum(run.diverged for run in runs), sum(loss > cap for loss in losses)
    return Cell(runs, losses, capped, _finals(runs, TOP1), lost, above, stability(runs))


def _losses(runs: Sequence[Result], tag: str, cap: float) -> list[float]:
    """The loss of each run as it ended; that of a diverged run is the cap."""
    return [cap if run.diverged else run.last[tag] for run in runs]


def _capped(runs: Sequence[Result], tag: str, cap: float) -> dict[Any, float]:
    """Seed to min(loss, cap)."""
    values: dict[Any, list[float]] = {}
    for run, loss in zip(runs, _losses(runs, tag, cap), strict=True):
        values.setdefault(run.hparams.get("seed"), []).append(min(loss, cap))
    return {seed: statistics.fmean(repeats) for seed, repeats in values.items()}


def _figures(tags: tuple[str, str], loss: float | None, runs: list[Result], arm: Arm) -> dict[str, Any]:
    """The figures of an arm in the order of the columns; only an arm that trains has the empty ones.

    They hold the reported loss, the perplexity of the same batches, and top-1, which is logged only of all.
    """
    part = ODD_HALF if tags[0] != tags[1] else ""
    logged = any(PERPLEXITY in run.scalars for run in arm.runs)
    losses = _finals(runs, tags[1]) if logged else []
    perplexity = statistics.fmean(map(math.exp, losses)) if losses else None
    figures: dict[str, Any] = dict.fromkeys(("selected lr", "edge"))
    figures |= {"reported loss" + part: loss, "perplexity" + part: perplexity}
    figures["top-1" + ALL * bool(part)] = _mean(runs, TOP1)
    figures |= dict.fromkeys(("recovered", "lr sensitivity", "usable octaves", "worst loss"))
    figures |= {"diverged": None, "divergence rate": None, "runs": len(arm.runs)}
    return figures | {"deployed MB": arm.megabytes}


def _finals(runs: Sequence[Result], tag: str) -> list[float]:
    """Final values of a tag; empty if one of the runs diverged: the survivors alone would flatter."""
    return [] if any(run.diverged for run in runs) else [run.last[tag] for run in runs if tag in run.last]


def _mean(runs: Sequence[Result], tag: str) -> float | None:
    values = _finals(runs, tag)
    return statistics.fmean(values) if values else None


def _ptq(arm: Arm, arms: list[Arm]) -> list[Result]:
    """The runs that round as the arm does at its first step."""
    for other in arms:
        same = all(other.hparams.get(key) == arm.hparams.get(key) for key in FORWARD)
        if other.kind == "ptq" and same and other.images == arm.images:
            return other.runs
    return []


def _full_precision(arms: list[Arm], images: bool) -> list[Result]:
    """The runs of the weights that QAT starts from: as measured or, without that, as trained."""
    whole = [arm for arm in arms if arm.kind == "fp" and ATTENTION not in arm.hparams]
    references = [arm.runs for arm in whole if arm.images == images]
    return min(references, key=lambda runs: runs[0].hparams.get("subcommand") != "validate", default=[])


def _rows(arms: list[ArmSummary], columns: list[str], lrs: list[float]) -> list[dict[str, Any]]:
    """A row for each arm: its label, hyper-parameters, a `Cell` for each learning rate, and its figures."""
    table = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.label} | {key: arm.hparams.get(key) for key in columns}
        if arm.kind != "fit":
            row |= {"method": arm.label if arm.kind == "fp" else "PTQ", "mask": None}
        row |= {f"lr {short(lr)}": arm.cells.get(lr) for lr in lrs}
        table.append(row | arm.figures)
    keys = dict.fromkeys(key for row in table for key in row)
    filled = [key for key in keys if any(row.get(key) is not None for row in table)]
    return [{key: row.get(key) for key in filled} for row in table]

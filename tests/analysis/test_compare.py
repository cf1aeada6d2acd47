"""The figures of a comparison, computed by hand here, and what becomes of runs that can't be compared."""

import csv
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from stableqat.analysis.arms import Comparison, usable
from stableqat.analysis.compare import compare, markdown, rows
from stableqat.analysis.events import Run, read_run
from stableqat.errors import UserError

STE = {"method": "STE", "bits": 2, "grid": "standard", "mask": "hard", "scale_init": "mse"}
STE |= {"granularity": "channel", "max_steps": 10, "subcommand": "fit"}
PTQ = STE | {"subcommand": "validate"}
FP = {"method": "FP", "max_steps": 10, "subcommand": "fit"}
STABLE = STE | {"method": "StableQAT", "mask": "soft", "amplitude": 0.25}
STRETCHED = STE | {"method": "ParetoQ", "grid": "stretched"}


def made(hparams: dict[str, Any], loss: float | None, name: str = "run", **scalars: float) -> Run:
    tags = {"val/loss": loss} | {f"hp/{key}": value for key, value in scalars.items()}
    series = {tag: {10: value} for tag, value in tags.items() if value is not None}
    return Run(Path("demo", name), {"seed": 0} | hparams, series)


def log_run(
    folder: Path, hparams: dict[str, Any], series: dict[str, dict[int, float]], second: int = 1
) -> Path:
    """Logs a run as Lightning does; returns its event file, begun at `second`."""
    before = set(folder.glob("events*"))
    logger = TensorBoardLogger(folder.parent, folder.name, "", default_hp_metric=False)
    logger.log_hyperparams({"seed": 0} | hparams, {"hp/val_loss": math.nan})
    for tag, values in series.items():
        for step, value in values.items():
            logger.log_metrics({tag: value}, step)
    logger.experiment.close()
    (file,) = set(folder.glob("events*")) - before
    return file.rename(folder / f"events.out.tfevents.{second}.host.0.0")


def study(folder: Path) -> Path:
    """Two arms over three learning rates, with both references: the figures below follow from these."""
    runs = {
        "start": (FP, 2.0, 0),
        "ptq": (PTQ, 6.0, 0),
        "ste-1e-3-s0": (STE | {"lr": 1e-3}, 3.0, 0),
        "ste-1e-3-s1": (STE | {"lr": 1e-3, "seed": 1}, 3.5, 0),
        "ste-1e-2-s0": (STE | {"lr": 1e-2}, 4.0, 0),
        "ste-1e-2-s1": (STE | {"lr": 1e-2, "seed": 1}, 4.0, 0),
        "ste-0.1-s0": (STE | {"lr": 0.1}, 3.0, 1),  # ended before its loss had time to explode
        "ste-0.1-s1": (STE | {"lr": 0.1, "seed": 1}, 7.0, 0),
        "stable-1e-3": (STABLE | {"lr": 1e-3}, 3.0, 0),
        "stable-1e-2": (STABLE | {"lr": 1e-2}, 2.5, 0),
        "stable-0.1": (STABLE | {"lr": 0.1}, math.nan, 0),  # says so itself
    }
    for name, (hparams, loss, ended) in runs.items():
        series = {"val/loss": {5: 9.0, 10: loss}, "hp/diverged": {10: ended}, "hp/steps": {10: 10}}
        log_run(folder / name, {"lr": 1e-3} | hparams, series | {"hp/initial_loss": {1: 6.5}})
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("logs") / "demo")


def test_figures_of_a_study(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert compare([str(demo)], out=str(out)) == 0

    with open(out / "compare.csv") as file:
        table = list(csv.DictReader(file))
    fp, ptq, ste, stable = table  # references at the top
    assert [row["method"] for row in table] == ["FP (start)", "PTQ", "STE", "StableQAT"]
    assert (fp["best loss"], fp["recovered"], fp["diverged"]) == ("2.0", "", "")
    assert (ptq["best loss"], ptq["bits"], ptq["grid"], ptq["mask"]) == ("6.0", "2", "standard", "")

    def cell(row: dict[str, str], lr: str) -> list[str]:
        return [row[f"lr {lr} {part}"] for part in ("mean", "std", "n", "diverged")]

    assert cell(ste, "1e-3") == ["3.25", repr(math.sqrt(0.125)), "2", "0"]
    assert cell(ste, "1e-2") == ["4.0", "0.0", "2", "0"]
    assert cell(ste, "0.1") == ["6.5", repr(math.sqrt(0.5)), "2", "1"]  # the cap and 7
    assert cell(stable, "0.1") == ["6.0", "", "1", "1"]
    assert cell(ptq, "1e-3") == ["", "", "", ""]
    for row, lr, best, recovered, sensitivity, worst in (
        (ste, "0.001", 3.25, 2.75 / 4, (3.25 + 4 + 6) / 3 - 3.25, 6.5),
        (stable, "0.01", 2.5, 3.5 / 4, (3 + 2.5 + 6) / 3 - 2.5, 6.0),
    ):
        assert row["best lr"] == lr
        assert float(row["best loss"]) == best
        assert float(row["recovered"]) == recovered
        assert float(row["lr sensitivity"]) == pytest.approx(sensitivity, rel=1e-12)
        assert float(row["worst loss"]) == worst
        assert row["diverged"] == "1"
    assert (ste["runs"], stable["runs"]) == ("6", "3")
    # Arms differ in the amplitude, which STE does not have; other columns would all be equal.
    assert "scale_init" not in ste

    text = (out / "compare.md").read_text()
    assert "3.2500 +- 0.3536 (2)" in text
    assert "6.5000 +- 0.7071 (2), 1 diverged" in text
    assert "| 69% " in text
    assert "Cap: 6 (PTQ, STE's grid)" in text
    assert text.endswith(f"\n\ntensorboard --logdir {os.path.relpath(demo)}\n")
    shown = capsys.readouterr().out
    assert f"tensorboard --logdir {os.path.relpath(demo)}" in shown
    assert "6.5000 +- 0.7071 (2), 1 diverged" in shown

    picture = (out / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000
    assert {file.name for file in out.iterdir()} == {"compare.md", "compare.csv", "compare.png"}

    with pytest.raises(UserError, match=r"out: .* exists already"):
        compare([str(demo)], out=str(out))
    assert (out / "compare.png").read_bytes() == picture


def test_without_out_the_files_of_an_earlier_call_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        log_run(Path("logs", name, "ste"), STE | {"lr": 1e-3}, {"val/loss": {10: 3.0}, "val/top1": {10: 0.5}})
    for _ in range(2):
        assert compare(["logs"]) == 0
    text = Path("logs/compare.md").read_text()
    assert text.index("## a\n") < text.index("## b\n")
    assert "50.0%" in text
    assert text.endswith("tensorboard --logdir logs\n")
    assert sorted(path.name for path in Path("logs").iterdir()) == [
        "a",
        "b",
        "compare.csv",
        "compare.md",
        "compare.png",
    ]


@pytest.mark.parametrize(
    ("key", "other"),
    [("bits", 4), ("grid", "stretched"), ("scale_init", "max"), ("granularity", "tensor")],
)
def test_ptq_counts_for_arms_that_round_alike(key: str, other: object) -> None:
    runs = [
        made(FP, 2.0, "start"),
        made(PTQ | {key: other}, 4.0),
        made(STE | {"lr": 1e-3}, 3.0, initial_loss=8.0),
        made(STE | {"lr": 1e-2}, 3.0, initial_loss=7.0, diverged=1),
    ]
    comparison = Comparison(Path("demo"), runs)
    (arm,) = comparison.fits
    assert comparison.ptq(arm) is None
    assert comparison.recovered(arm) is None
    assert comparison.cap == (7.0, "first training batch, STE")
    assert comparison.worst(arm) == 7.0

    comparison = Comparison(Path("demo"), [*runs, made(PTQ | {"mask": "soft"}, 5.0)])  # a mask rounds nothing
    (arm,) = comparison.fits
    assert comparison.ptq(arm) == 5.0
    assert comparison.recovered(arm) == 2 / 3
    assert comparison.cap[0] == 5.0


def test_the_cap_is_the_smallest_of_the_arms() -> None:
    runs = [
        made(PTQ, 6.0),
        made(STE | {"lr": 1e-3}, 3.0),
        made(STRETCHED | {"lr": 1e-3}, 3.0, initial_loss=5.5),
        made(FP | {"lr": 1e-3}, 2.0, initial_loss=2.5),  # full precision trained on is no bound
    ]
    assert Comparison(Path("demo"), runs).cap == (5.5, "first training batch, ParetoQ")


def test_lr_sensitivity_needs_every_learning_rate() -> None:
    runs = [made(STE | {"lr": lr}, loss, initial_loss=9.0) for lr, loss in ((1e-3, 3.0), (1e-2, 5.0))]
    runs.append(made(STABLE | {"lr": 1e-3}, 2.0, initial_loss=9.0))
    ste, stable = Comparison(Path("demo"), runs).fits
    comparison = Comparison(Path("demo"), runs)
    assert comparison.sensitivity(ste) == 1.0
    assert comparison.sensitivity(stable) is None
    assert "| - " in markdown(comparison).splitlines()[-3]


def test_full_precision_as_measured_counts_before_the_start_runs() -> None:
    measured = made(FP | {"subcommand": "validate"}, 2.25, "fp")
    runs = [made(FP, 2.0, "start"), measured, made(STE | {"lr": 1e-3}, 3.0)]
    comparison = Comparison(Path("demo"), runs)
    assert comparison.full_precision == 2.25
    assert [row["method"] for row in rows(comparison)] == ["FP (start)", "FP (validate)", "STE"]


def test_what_arms_differ_in_is_a_column_and_part_of_their_name() -> None:
    runs = [made(STE | {"lr": 1e-3, "scale_lr_multiplier": m}, 3.0, initial_loss=9.0) for m in (0.1, 1)]
    comparison = Comparison(Path("demo"), runs)
    assert comparison.columns == ["method", "bits", "grid", "mask", "scale_lr_multiplier"]
    assert [comparison.label(arm) for arm in comparison.fits] == ["STE 0.1", "STE 1"]


def test_a_loss_of_zero_is_a_loss() -> None:
    (arm,) = (comparison := Comparison(Path("demo"), [made(STE | {"lr": 1e-3}, 0.0)])).fits
    assert comparison.best(arm) == (0.0, 1e-3)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (made(STE | {"lr": 1e-3}, 3.0, "half", steps=5), "it is unfinished: step 5 of 10"),
        (made(STE | {"lr": 1e-3}, None, "half"), "it logged no val/loss"),
        (made(STE, 3.0, "half"), "its hyper-parameters name no lr"),
        (Run(Path("demo/half"), {}, {"val/loss": {1: 3.0}}), "it logged no hyper-parameters"),
        (made(STE | {"lr": 1e-3}, None, "half", steps=5, diverged=1), None),
        (made(STE | {"lr": 1e-3}, 3.0, "half", steps=10), None),
        (made(PTQ, 3.0, "half", steps=0), None),
    ],
)
def test_runs_that_cannot_be_compared(run: Run, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    assert usable(run) == (reason is None)
    assert caplog.messages == ([f"demo/half is left out: {reason}"] if reason else [])


def test_unfinished_and_broken_runs_are_named_and_the_others_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "demo"
    log_run(folder / "good", STE | {"lr": 1e-3}, {"val/loss": {10: 3.0}})
    log_run(folder / "half", STE | {"lr": 1e-2}, {"val/loss": {5: 3.0}, "hp/steps": {5: 5}})
    broken = log_run(folder / "broken", STE | {"lr": 0.1}, {"val/loss": {10: 3.0}})
    broken.write_bytes(broken.read_bytes()[:30])
    log_run(folder / ".hidden", STE | {"lr": 1}, {"val/loss": {10: 1.0}})
    with caplog.at_level(logging.WARNING):
        assert compare([str(folder)]) == 0
    assert [message.split(": ")[0].split(" ")[0] for message in caplog.messages] == [
        str(broken),
        str(folder / "broken"),
        str(folder / "half"),
    ]
    with open(folder / "compare.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["runs"], row["lr 1e-3 mean"]) == ("1", "3.0")


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event files in or under this folder"):
        compare([str(tmp_path)])
    log_run(tmp_path / "half", STE | {"lr": 1e-3}, {"val/loss": {5: 3.0}, "hp/steps": {5: 5}})
    with pytest.raises(UserError, match="none of its runs can be compared"):
        compare([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_the_last_word_on_a_step_counts(tmp_path: Path) -> None:
    """A run was cut after step 6, resumed from step 4, and names sort otherwise than times."""
    folder = tmp_path / "run"
    cut = {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}
    log_run(folder, STE | {"lr": 1e-3}, {"val/loss": cut, "hp/initial_loss": {1: 6.0}}, second=9)
    log_run(folder, STE | {"lr": 1e-2}, {"val/loss": {6: 3.5, 7: 3.25}, "val/top1": {6: 0.5}}, second=10)
    run = read_run(folder)
    assert run.scalars.pop("hp/val_loss").keys() == {0}
    assert run.scalars == {
        "val/loss": {2: 5.0, 4: 4.0, 6: 3.5, 7: 3.25},  # what was logged of step 8 is no longer true
        "hp/initial_loss": {1: 6.0},
        "val/top1": {6: 0.5},
    }
    assert run.last("val/loss") == 3.25
    assert run.last("val/top5") is None
    assert run.hparams["lr"] == 1e-2
    assert (run.hparams["bits"], run.hparams["method"]) == (2, "STE")
    assert isinstance(run.hparams["bits"], int)


def test_a_damaged_file_costs_only_what_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log_run(folder, STE, {"val/loss": {2: 5.0, 4: 4.0}})
    whole = log_run(folder, STE, {"val/loss": {6: 3.0, 8: 2.0}}, second=2)
    whole.write_bytes(whole.read_bytes()[:-5])
    run = read_run(folder)
    assert run.scalars["val/loss"] == {2: 5.0, 4: 4.0, 6: 3.0}
    (problem,) = run.problems
    assert problem.startswith(f"{whole}: cut short or damaged at byte ")

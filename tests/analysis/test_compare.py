"""The figures of a comparison, computed by hand here, and what becomes of runs that can't be compared."""

import csv
import itertools
import json
import logging
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from synthetic import summary_of
from tensorboard.plugins.core import core_plugin

from stableqat import quantizers
from stableqat.analysis import panels, plot
from stableqat.analysis.arms import Group, Result, usable
from stableqat.analysis.caps import Cap
from stableqat.analysis.command import compare, publish
from stableqat.analysis.comparison import read_summaries
from stableqat.analysis.notes import notes
from stableqat.analysis.style import LOOKS, look_of, styles_of
from stableqat.analysis.tables import as_json, markdown, write_page
from stableqat.errors import UserError
from stableqat.events import COMPARED, Run, read_run
from stableqat.files import hidden_folder
from stableqat.studies.record import Record
from stableqat.studies.study import short

STE = {"method": "STE", "bits": 2, "grid": "standard", "mask": "hard", "scale_init": "mse"}
STE |= {"granularity": "channel", "max_steps": 10, "subcommand": "fit"}
PTQ = STE | {"subcommand": "validate"}
FP = {"method": "FP", "max_steps": 10, "subcommand": "fit"}
STABLE = STE | {"method": "StableQAT", "mask": "soft", "amplitude": 0.25}
STRETCHED = STE | {"method": "ParetoQ", "grid": "stretched"}
EPOCHS = STE | {"lr": 1e-3, "max_steps": -1}


FILES = {"compare.csv", "compare.html", "compare.json", "compare.md", "compare.png"}


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
    assert [row["arm"] for row in table] == ["FP (start)", "PTQ", "STE", "StableQAT mask soft"]
    assert (fp["reported loss"], fp["recovered"], fp["diverged"]) == ("2.0", "", "")
    assert (ptq["reported loss"], ptq["bits"], ptq["grid"], ptq["mask"]) == ("6.0", "2", "standard", "")

    def cell(row: dict[str, str], lr: str) -> list[str]:
        return [row[f"lr {lr} {part}"] for part in ("mean", "std", "n", "diverged")]

    assert cell(ste, "1e-3") == ["3.25", repr(math.sqrt(0.125)), "2", "0"]
    assert cell(ste, "1e-2") == ["4.0", "0.0", "2", "0"]
    cap = math.nextafter(7, 8)
    assert cell(ste, "0.1") == [repr((7 + cap) / 2), repr(statistics.stdev([7, cap])), "2", "1"]
    assert cell(stable, "0.1") == [repr(cap), "", "1", "1"]
    assert cell(ptq, "1e-3") == ["", "", "", ""]
    # By seed; what diverged counts as no better than what ended at 7.
    by_seed = ((3 + 4 + 7) / 3 - 3, (3.5 + 4 + 7) / 3 - 3.5)
    for row, lr, edge, best, recovered, sensitivity, worst in (
        (ste, "0.001", "lower", 3.25, 2.75 / 4, sum(by_seed) / 2, 7.0),
        (stable, "0.01", "", 2.5, 3.5 / 4, (3 + 2.5 + 7) / 3 - 2.5, 7.0),
    ):
        assert (row["selected lr"], row["edge"]) == (lr, edge)
        assert float(row["reported loss"]) == best
        assert float(row["recovered"]) == recovered
        assert float(row["lr sensitivity"]) == pytest.approx(sensitivity, rel=1e-12)
        assert float(row["worst loss"]) == pytest.approx(worst, rel=1e-12)
        assert row["diverged"] == "1"
    assert (ste["runs"], stable["runs"]) == ("6", "3")
    assert (ste["divergence rate"], stable["divergence rate"]) == (repr(1 / 6), repr(1 / 3))
    # Arms differ in the amplitude, which STE does not have; other columns would all be equal.
    assert "scale_init" not in ste

    text = (out / "compare.md").read_text()
    assert "3.2500 +- 0.3536 (2)" in text
    assert "7.0000 +- 0.0000 (2), 1 diverged" in text
    assert "| 69% " in text
    assert "Cap: 7 (just above the highest loss of a run that did not diverge, STE)" in text
    assert "| 1e-3 (lower edge) | 3.2500 " in text
    assert "so the best may lie beyond: STE (1e-3, lower)." in text
    assert "not all runs logged its two halves" in text
    assert "perplexity" not in text
    assert "Differences: not tested" in text  # only one seed is on both sides
    assert text.endswith(f"\n\ntensorboard --logdir {os.path.relpath(demo)}\n")
    shown = capsys.readouterr().out
    assert f"tensorboard --logdir {os.path.relpath(demo)}" in shown
    assert "7.0000 +- 0.0000 (2), 1 diverged" in shown

    picture = (out / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000
    assert {file.name for file in out.iterdir()} >= FILES
    assert not [file for file in out.iterdir() if file.name.startswith(".")]

    with pytest.raises(UserError, match=r"out: .* exists already"):
        compare([str(demo)], out=str(out))
    assert (out / "compare.png").read_bytes() == picture


KILLED = """
import os, signal, sys
from stableqat.analysis import command, publish, report
def end(*_): os.kill(os.getpid(), signal.SIGKILL)
report.write = publish._write_overlay = end
verb = {"compare": command.compare, "publish": command.publish}[sys.argv[1]]
verb([sys.argv[2]], out=sys.argv[3])
"""


@pytest.mark.parametrize("verb", ["compare", "publish"])
def test_what_a_killed_command_left_is_in_no_ones_way(demo: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, verb, str(demo), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob(".*.part"))
    command = {"compare": compare, "publish": publish}[verb]
    assert command([str(demo)], out=str(out)) == 0
    assert not list(tmp_path.rglob(".*"))
    assert (out / {"compare": "compare.html", "publish": "demo/overlay"}[verb]).exists()


def test_what_another_command_makes_now_is_left_alone(tmp_path: Path) -> None:
    with hidden_folder(tmp_path, ".compare-") as one, hidden_folder(tmp_path, ".compare-") as other:
        assert one.is_dir()
        assert other.is_dir()
    assert not list(tmp_path.iterdir())


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
    names = {path.name for path in Path("logs").iterdir()}
    assert {"a", "b"} | FILES <= names
    assert {Path(name).suffix for name in names - {"a", "b"}} == {".csv", ".html", ".json", ".md", ".png"}


@pytest.mark.parametrize(
    ("key", "other"),
    [
        *(("bits", 4), ("grid", "stretched"), ("scale_init", "max"), ("granularity", "tensor")),
        ("quantizers", "*down_proj: STE 4-bit integer; *: STE 2-bit integer"),
        *(("input_bits", 8), ("input_quantizer", "LSQ"), ("attention", "key, value: PerToken 8 ste none")),
    ],
)
def test_ptq_counts_for_arms_that_round_alike(key: str, other: object) -> None:
    runs = [
        made(FP, 2.0, "start"),
        made(PTQ | {key: other}, 4.0),
        made(STE | {"lr": 1e-3}, 3.0, initial_loss=8.0),
        made(STE | {"lr": 1e-2}, 3.0, initial_loss=7.0, diverged=1),
    ]
    comparison = summary_of(runs)
    (arm,) = comparison.fits
    assert arm.ptq is None
    assert arm.figures["recovered"] is None
    assert arm.cap == Cap(7.0, "first training batch, STE")
    assert arm.sensitivity.worst == 7.0

    comparison = summary_of([*runs, made(PTQ | {"mask": "soft"}, 5.0)])  # a mask rounds nothing
    (arm,) = comparison.fits
    assert arm.ptq == 5.0
    assert arm.figures["recovered"] == 2 / 3
    assert arm.cap.loss == 5.0


def test_the_cap_is_the_smallest_of_the_arms() -> None:
    runs = [
        made(PTQ, 6.0),
        made(STE | {"lr": 1e-3}, 3.0),
        made(STRETCHED | {"lr": 1e-3}, 3.0, initial_loss=5.5),
        made(FP | {"lr": 1e-3}, 2.0, initial_loss=2.5),  # full precision trained on is no bound
    ]
    comparison = summary_of(runs)
    caps = [arm.cap for arm in comparison.fits]
    assert caps == [Cap(5.5, "first training batch, ParetoQ stretched")] * 3


@pytest.mark.parametrize("quality", ["val/perplexity", "val/top1"])
@pytest.mark.parametrize("ptq", [True, False])
def test_each_bit_width_has_its_own_cap(tmp_path: Path, quality: str, ptq: bool) -> None:
    """Rounding to 4 bits costs less than training at 2 bits can win back, which is no cap for 2 bits."""
    before = {2: 0.9, 4: 0.158}
    losses = {(2, "STE"): 0.384, (2, "StableQAT"): 0.286, (4, "STE"): 0.144, (4, "StableQAT"): 0.142}
    folder = tmp_path / "demo"
    for (bits, method), loss in losses.items():
        for lr, seed in ((1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)):
            series = {"val/loss": {10: loss + 50 * (lr - 1e-3) + seed / 1000}, quality: {10: 0.5}}
            series |= {} if ptq else {"hp/initial_loss": {1: before[bits]}}
            settings = STE | {"method": method, "bits": bits, "lr": lr, "seed": seed}
            log_run(folder / f"{method}-b{bits}-lr{lr}-s{seed}", settings, series)
    for bits, loss in before.items() if ptq else ():
        log_run(folder / f"ptq-b{bits}", PTQ | {"bits": bits}, {"val/loss": {0: loss}, quality: {0: 0.4}})
    log_run(folder / "fp", FP | {"lr": 1e-3}, {"val/loss": {10: 0.1}, quality: {10: 0.9}})

    (comparison,) = read_summaries([folder])
    images = quality == "val/top1"
    caps = {group: round(cap.loss, 6) for group, cap in comparison.caps.items()}
    assert caps == {Group(2, images): 0.9, Group(4, images): 0.595, Group(None, images): 0.9}
    assert "Caps: 0.9 (" in notes(comparison)
    found = {(d.arm, d.lr): d for d in comparison.differences if d.quantity == "loss"}
    two, four = found["StableQAT 2-bit", 1e-3], found["StableQAT 4-bit", 1e-3]
    assert (two.baseline, round(two.mean or 0, 6), two.verdict) == ("STE 2-bit", -0.098, "lower")
    assert (four.baseline, round(four.mean or 0, 6)) == ("STE 4-bit", -0.002)
    worse = found["StableQAT 4-bit", 1e-2]  # both are worse than rounding, and differ
    assert (round(worse.mean or 0, 6), worse.verdict) == (-0.002, "lower")

    drawn = panels.losses(comparison, styles_of(comparison.fits))
    assert len(drawn) == 2 * (1 + images)  # a panel each, and one of top-1 beside it
    axes = Figure().subplots()
    drawn[0](axes)
    heights = {round(float(y), 4) for line in axes.lines for y in line.get_ydata()}  # type: ignore[union-attr]
    assert {0.3845, 0.2865, 0.8345, 0.7365, 0.9} <= heights
    assert axes.get_title() == ("2 bits, images" if images else "2 bits")


def test_a_cap_erases_nothing_between_runs_that_did_not_diverge() -> None:
    """STE trains to above where it began: its curve is no flat line at a cap that it makes itself."""
    lrs = (1e-4, 1e-3, 1e-2)
    losses = {"STE": (7.11, 6.32, 5.74), "LSQ": (5.6, 5.5, 5.55), "DSQ": (5.6, 5.5, None)}
    runs = [
        made(STE | {"method": method, "lr": lr}, loss, initial_loss=5.65, diverged=loss is None)
        for method, by_lr in losses.items()
        for lr, loss in zip(lrs, by_lr, strict=True)
    ]
    comparison = summary_of(runs)
    sensitivities = {arm.label: round(arm.sensitivity.mean, 4) for arm in comparison.fits}
    assert sensitivities == {"STE": 0.65, "LSQ": 0.05, "DSQ": round((5.6 + 5.5 + 7.11) / 3 - 5.5, 4)}
    worst = {arm.label: arm.sensitivity.worst for arm in comparison.fits}
    assert worst["LSQ"] < worst["STE"] < worst["DSQ"] == comparison.fits[0].cap.loss
    found = {(each.arm, each.lr): each.mean for each in comparison.differences if each.quantity == "loss"}
    assert found["LSQ", 1e-4] == pytest.approx(5.6 - 7.11)
    assert "above the cap" not in write_page(comparison).conclusions[0]


def test_images_and_text_in_one_folder_have_caps_and_baselines_of_their_own() -> None:
    text, images = {"lr": 1e-3}, {"lr": 1e-3, "patch": 4}
    runs = [made(STE | text, 3.0, initial_loss=8.0), made(STABLE | text, 2.5)]
    runs += [made(STE | images, 0.3, initial_loss=2.3), made(STABLE | images, 0.2)]
    for run in runs[2:]:
        run.scalars["val/top1"] = {10: 0.5}
    runs.append(made(FP | text | {"subcommand": "validate"}, 2.0))
    comparison = summary_of(runs)
    assert {group.images: cap.loss for group, cap in comparison.caps.items()} == {False: 8.0, True: 2.3}
    assert [arm.figures["recovered"] for arm in comparison.fits] == [None] * 4
    found = [round(d.mean or 0, 3) for d in comparison.differences if d.quantity == "loss"]
    assert sorted(found) == [-0.5, -0.1]


def test_learning_rates_have_a_table_of_their_own_where_there_are_several() -> None:
    runs = [made(STE | {"lr": lr}, loss) for lr, loss in ((1e-3, 3.0), (1e-2, 5.0))]
    [reached, by_rate] = write_page(summary_of([*runs, made(PTQ, 6.0)])).tables[:2]
    assert not [key for key in reached.lines[0] if key.startswith("lr 1")]
    assert [line[0] for line in reached.lines] == ["arm", "PTQ", "STE"]
    assert by_rate.lines == [["arm", "lr 1e-3", "lr 1e-2"], ["STE", "3.0000", "5.0000"]]
    assert "lr 1e-3" in write_page(summary_of(runs[:1])).tables[0].lines[0]


def test_lr_sensitivity_needs_every_learning_rate() -> None:
    runs = [made(STE | {"lr": lr}, loss, initial_loss=9.0) for lr, loss in ((1e-3, 3.0), (1e-2, 5.0))]
    runs.append(made(STABLE | {"lr": 1e-3}, 2.0, initial_loss=9.0))
    ste, stable = summary_of(runs).fits
    comparison = summary_of(runs)
    assert ste.sensitivity.mean == 1.0
    assert stable.sensitivity.mean is None
    assert stable.sensitivity.worst is None  # a worst of fewer learning rates would flatter
    lines = markdown(write_page(comparison)).splitlines()
    row, _ = (line for line in lines if line.startswith("| StableQAT"))
    assert row.count("| - ") == 3


def test_a_seed_without_every_learning_rate_has_no_lr_sensitivity() -> None:
    losses = {(0, 1e-3): 3.0, (0, 1e-2): 5.0, (1, 1e-3): 3.0, (1, 1e-2): 4.0, (2, 1e-3): 1.0}
    runs = [made(STE | {"seed": s, "lr": lr}, x, initial_loss=9.0) for (s, lr), x in losses.items()]
    (arm,) = summary_of(runs).fits
    assert arm.sensitivity.by_seed == {0: 1.0, 1: 0.5}
    assert arm.sensitivity.mean == 0.75
    assert arm.sensitivity.worst_by_seed == {0: 5.0, 1: 4.0}


def test_full_precision_as_measured_counts_before_the_start_runs() -> None:
    measured = made(FP | {"subcommand": "validate"}, 2.25, "fp")
    runs = [made(FP, 2.0, "start"), measured, made(STE | {"lr": 1e-3}, 3.0)]
    comparison = summary_of(runs)
    assert comparison.full_precision == 2.25
    assert [row["arm"] for row in comparison.rows] == ["FP (start)", "FP (validate)", "STE"]


def test_what_arms_differ_in_is_a_column_and_part_of_their_name() -> None:
    runs = [made(STE | {"lr": 1e-3, "scale_lr_multiplier": m}, 3.0, initial_loss=9.0) for m in (0.1, 1)]
    comparison = summary_of(runs)
    assert comparison.columns == ["method", "bits", "grid", "mask", "scale_lr_multiplier"]
    # Neither value is more common than the other, so both are named.
    names = ["STE scale_lr_multiplier 0.1", "STE scale_lr_multiplier 1"]
    assert [arm.label for arm in comparison.fits] == names


def test_names_of_one_factor_arms_say_the_factor() -> None:
    common = {"optimizer": "AdamW", "scale_lr_multiplier": 0.1, "warmup_steps": 0, "gradient_clip_val": 1.0}
    ste, stable = STE | common, STABLE | common | {"mask": "hard", "harmonics": 1}
    old = {key: value for key, value in ste.items() if key != "warmup_steps"}
    arms = [
        (stable, "StableQAT"),
        (stable | {"amplitude": 0.05}, "StableQAT amplitude 5e-2"),
        (stable | {"amplitude": 0.1}, "StableQAT amplitude 0.1"),
        (stable | {"harmonics": 2}, "StableQAT harmonics 2"),
        (stable | {"grid": "stretched"}, "StableQAT stretched"),
        (ste, "STE"),
        (old, "STE warmup_steps unset"),  # logged by an earlier version
        (ste | {"gradient_clip_val": 0.0}, "STE gradient_clip_val 0"),
        (ste | {"mask": "none"}, "STE mask none"),
        (
            ste | {"optimizer": "SGD", "weight_lr_multiplier": 0.3},
            "STE optimizer SGD weight_lr_multiplier 0.3",
        ),
        (ste | {"scale_lr_multiplier": 0.0}, "STE scale_lr_multiplier 0"),
        (STRETCHED | common, "ParetoQ stretched"),
        (FP | common, "FP"),
    ]
    runs = [made(hparams | {"lr": lr}, 3.0) for hparams, _ in arms for lr in (1e-3, 1e-2)]
    comparison = summary_of(runs)
    names = [arm.label for arm in comparison.fits]
    assert sorted(names) == sorted(name for _, name in arms)
    assert [name for name in names if " " not in name] == ["FP", "STE", "StableQAT"]
    assert names.index("STE") < names.index("STE mask none")  # the plain arm first
    settings = notes(comparison).splitlines()[-1]
    assert "grid standard, harmonics 1, mask hard" in settings


def test_full_precision_with_quantized_attention_is_never_shown_as_plain() -> None:
    attention = {"attention": "key, value: PerToken 8 ste none"}
    measured = FP | {"subcommand": "validate"}
    runs = [
        made(FP, 2.0, "start"),
        made(measured, 2.0, "fp"),
        made(measured | attention, 2.1, "cache"),
        made(FP | attention | {"lr": 1e-3}, 2.1, "trained"),
        made(STE | {"lr": 1e-3}, 3.0, "ste"),
    ]
    summary = summary_of(runs)
    said = " attention key, value: PerToken 8 ste none"
    labels = {"FP (start)", "FP (validate)", f"FP (validate){said}", f"FP{said}", "STE"}
    assert {arm.label for arm in summary.arms} == labels
    assert summary_of([runs[0], *runs[2:]]).full_precision == 2.0  # not what attention's widths cost


def test_bits_are_named_wherever_they_differ() -> None:
    runs = [made(STE | {"lr": 1e-3, "bits": b, "grid": g}, 3.0) for b, g in ((3, "a"), (4, "a"), (3, "b"))]
    comparison = summary_of(runs)
    assert [arm.label for arm in comparison.fits] == ["STE 3-bit", "STE 3-bit b", "STE 4-bit"]


def smoothed(lrs: dict[str, float]) -> list[Run]:
    """Arms of two seeds that differ in nothing that is a hyper-parameter, as a sweep names their runs."""
    return [
        made(STE | {"lr": lr, "seed": seed}, loss + seed, f"{arm}-b2-lr{short(lr)}-s{seed}", initial_loss=9.0)
        for (arm, lr), loss in zip(lrs.items(), (3.0, 5.0), strict=True)
        for seed in (0, 1)
    ]


def test_arms_that_differ_in_no_hyper_parameter_are_told_apart_by_name() -> None:
    runs = [
        *smoothed({"ste": 1e-3, "ste-smooth": 1e-3}),
        made(STRETCHED | {"lr": 1e-3, "method": "STE"}, 4.0),
    ]
    comparison = summary_of(runs)
    names = ["STE named ste-b2", "STE named ste-smooth-b2", "STE stretched"]
    assert sorted(arm.label for arm in comparison.fits) == names
    plain, smooth = (next(a for a in comparison.fits if a.label == name) for name in names[:2])
    assert plain.cells[1e-3].capped == {0: 3.0, 1: 4.0}
    assert smooth.cells[1e-3].capped == {0: 5.0, 1: 6.0}


def test_arms_of_other_learning_rates_are_told_apart_by_what_the_sweep_set(tmp_path: Path) -> None:
    runs = [
        replace(run, folder=tmp_path / run.folder.name) for run in smoothed({"ste": 1e-3, "smooth": 1e-2})
    ]
    for run in runs:
        lr, smoothing = run.hparams["lr"], 0.9 * run.folder.name.startswith("smooth")
        settings = {"model.optimizer.lr": lr, "seed_everything": run.hparams["seed"], "smoothing": smoothing}
        run.folder.mkdir()
        Record("done", settings).write(run.folder)
    comparison = summary_of(runs, tmp_path)
    assert [arm.label for arm in comparison.fits] == ["STE named smooth-b2", "STE named ste-b2"]
    for run in runs:
        settings = (record := Record.read(run.folder)).settings | {"smoothing": 0}  # type: ignore[union-attr]
        replace(record, settings=settings).write(run.folder)  # type: ignore[type-var]
    comparison = summary_of(runs, tmp_path)
    assert [arm.label for arm in comparison.fits] == ["STE"]  # learning rate and seed alone


def test_a_run_that_was_made_twice_is_no_second_seed() -> None:
    runs = [made(STE | {"lr": 1e-3}, 3.0, name) for name in ("ste-lr1e-3", "ste-lr1e-3-s0")]
    with pytest.raises(UserError, match=r"demo/ste-lr1e-3 and demo/ste-lr1e-3-s0 share all .*; move one"):
        summary_of(runs)


def test_ptq_of_two_methods_that_differ_in_nothing_else_is_named_by_them() -> None:
    runs = [made(PTQ | {"method": "LSQ"}, 5.0), made(PTQ, 6.0), made(PTQ | {"grid": "stretched"}, 4.0)]
    comparison = summary_of([*runs, made(STE | {"lr": 1e-3}, 3.0)])
    labels = [arm.label for arm in comparison.arms if arm.kind == "ptq"]
    assert sorted(labels) == ["PTQ LSQ", "PTQ STE", "PTQ stretched"]


def test_what_has_no_cap_is_not_averaged_over_survivors(caplog: pytest.LogCaptureFixture) -> None:
    runs = [made(STE | {"lr": 1e-3, "seed": seed}, 3.0, initial_loss=9.0, diverged=seed) for seed in (0, 1)]
    runs += [made(STABLE | {"lr": 1e-3, "seed": seed}, 4.0) for seed in (0, 1)]
    for run, top1 in zip(runs, (0.5, 0.1, 0.25, 0.75), strict=True):
        run.scalars["val/top1"] = {10: top1}
    comparison = summary_of(runs)
    assert [row["top-1"] for row in comparison.rows] == [None, 0.5]
    assert "Top-1: mean over seeds at the selected lr; - where one of them diverged." in notes(comparison)
    assert "one of them diverged" not in notes(summary_of(runs[2:]))
    drawn = Figure().subplots()
    panels.losses(comparison, styles_of(comparison.fits))[1](drawn)
    assert [list(line.get_ydata()) for line in drawn.lines] == [[], [50.0]]


def test_a_study_in_which_all_diverged_is_drawn(tmp_path: Path) -> None:
    log_run(tmp_path / "demo" / "ste", STE | {"lr": 1e-3}, {"hp/diverged": {1: 1.0}})
    assert compare([str(tmp_path / "demo")]) == 0
    assert "| STE | diverged |" in (tmp_path / "demo" / "compare.md").read_text()


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_run(tmp_path / "demo" / "ste", STE | {"lr": 1e-3}, {"val/loss": {10: 3.0}})
    monkeypatch.chdir(tmp_path / "demo")
    assert compare(["."]) == 0
    assert Path("compare.md").read_text().startswith("## demo\n")


def test_a_loss_of_zero_is_a_loss() -> None:
    (arm,) = summary_of([made(STE | {"lr": 1e-3}, 0.0)]).fits
    assert (arm.selected.lr, arm.selected.loss) == (1e-3, 0.0)
    assert arm.selected.edge == ""  # nothing was selected from


def halves(hparams: dict[str, Any], even: float, odd: float, **scalars: float) -> Run:
    run = made(hparams, (even + odd) / 2, **scalars)
    run.scalars |= {"val/loss_even": {10: even}, "val/loss_odd": {10: odd}}
    return run


def test_the_learning_rate_is_selected_on_one_half_and_reported_on_the_other() -> None:
    """On the odd half, and on all, 1e-2 is best; on the even half it is 3e-3, of two seeds' mean."""
    runs = [
        halves(STE | {"lr": 1e-3}, 3.0, 3.5, initial_loss=9.0),
        halves(STE | {"lr": 3e-3}, 2.5, 4.0),
        halves(STE | {"lr": 3e-3, "seed": 1}, 2.0, 5.0),
        halves(STE | {"lr": 1e-2}, 2.4, 1.0),
        made(STE | {"lr": 0.1}, None, diverged=1),
    ]
    comparison = summary_of([*runs, halves(FP | {"subcommand": "validate"}, 1.0, 1.5)])
    (arm,) = comparison.fits
    assert arm.selected.lr == 3e-3
    assert arm.selected.loss == 4.5
    assert "of the odd ones" in notes(comparison)
    assert "perplexity, odd batches" not in comparison.rows[1]  # not of text
    for run in runs:
        run.scalars["val/perplexity"] = {10: 1e6}  # of all batches
    perplexity = summary_of(runs).rows[0]["perplexity, odd batches"]
    assert perplexity == pytest.approx((math.exp(4) + math.exp(5)) / 2)
    for run in runs:
        run.scalars["val/top1"] = {10: 0.25}
    assert summary_of(runs).rows[0]["top-1, all batches"] == 0.25
    assert [row["reported loss, odd batches"] for row in comparison.rows] == [1.5, 4.5]

    del runs[0].scalars["val/loss_odd"]
    comparison = summary_of(runs)
    assert (comparison.selected_on, comparison.reported_on) == ("val/loss", "val/loss")
    assert comparison.fits[0].selected.lr == 1e-2
    assert "flatters" in notes(comparison)


def test_each_half_of_validation_has_a_cap_of_its_own() -> None:
    """The odd batches are harder: rounding costs less on all of them than every arm does on these."""
    runs = [halves(PTQ, 5.63, 5.68), halves(FP | {"subcommand": "validate"}, 4.0, 4.1)]
    for method, odd in (("STE", 5.67), ("LSQ", 5.66), ("StableQAT", 5.665)):
        arm = STE | {"method": method}
        runs += [halves(arm | {"lr": 1e-3}, 5.6, odd), halves(arm | {"lr": 1e-2}, 5.62, 5.7)]
    runs.append(made(STE | {"method": "DSQ", "lr": 1e-3}, None, diverged=1))
    for run in runs:
        run.scalars["val/perplexity"] = {10: 1.0}
    comparison = summary_of(runs)
    rows = {row["arm"]: row for row in comparison.rows}
    reported = {label: rows[label]["reported loss, odd batches"] for label in rows}
    assert reported["STE"] == 5.67
    assert reported["DSQ"] == math.nextafter(5.7, 6)  # the cap of the odd batches
    assert rows["STE"]["recovered"] == pytest.approx(0.01 / 1.58)
    assert rows["STE"]["perplexity, odd batches"] == pytest.approx(math.exp(5.67))
    said = write_page(comparison).conclusions[0]
    assert "The lowest loss seen is 5.6600 nats, of LSQ" in said


def test_losses_above_the_cap_of_a_study_are_reported_counted_and_marked(tmp_path: Path) -> None:
    losses = {"STE": (3.0, 3.2, 9.0), "LSQ": (4.75, 5.0, 6.0)}
    runs = [
        made(STE | {"method": method, "lr": lr, "seed": seed}, loss + seed / 100)
        for method, by_lr in losses.items()
        for lr, loss in zip((1e-4, 1e-3, 1e-2), by_lr, strict=True)
        for seed in (0, 1)
    ]
    (tmp_path / "study.yaml").write_text("compare: {cap: 4.5}\n")
    comparison = summary_of(runs, tmp_path)
    page = write_page(comparison)
    assert {row["arm"]: row["reported loss"] for row in comparison.rows}["LSQ"] == pytest.approx(4.755)
    above = (
        "8 of 12 runs ended above the cap (LSQ 6 of 6 and STE 2 of 6); tests count them as the cap, 4.5 nats."
    )
    assert above in page.conclusions[0]
    assert "worst loss and differences: 8." in page.notes
    assert "lr sensitivity" not in {column for column, best in comparison.best.items() if "LSQ" in best}

    axes = Figure().subplots()
    panels.losses(comparison, styles_of(comparison.fits))[0](axes)
    marks = [line for line in axes.lines if line.get_marker() == "^" and line.get_markerfacecolor() == "none"]
    assert [(len(line.get_xdata()), set(line.get_ydata())) for line in marks if len(line.get_xdata())] == [
        (1, {5.995})
    ] * 2
    assert "beyond the edge" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("best", "edge"), [(0, "lower"), (1, ""), (2, "upper")])
def test_a_best_learning_rate_at_the_edge_is_flagged(best: int, edge: str) -> None:
    """At the edge of what the arm ran at, even where other arms went further."""
    lrs = (1e-3, 1e-2, 0.1)
    runs = [made(STE | {"lr": lr}, 3.0 - (i == best), initial_loss=9.0) for i, lr in enumerate(lrs)]
    runs += [made(STABLE | {"lr": lr}, 3.0) for lr in (1e-4, *lrs, 1)]
    comparison = summary_of(runs)
    selected = comparison.fits[0].selected
    assert (selected.lr, selected.edge) == (lrs[best], edge)


@pytest.mark.parametrize(
    ("best", "cells"),
    [
        (0, ["1e-3 (lower edge)", "0.6667 (upward)"]),
        (1, ["1e-2", "0.6667"]),
        (2, ["0.1 (upper edge)", "0.6667 (downward)"]),
    ],
)
def test_a_table_says_where_lr_sensitivity_looks_one_way(best: int, cells: list[str]) -> None:
    runs = [
        made(STE | {"lr": lr}, 3.0 - (i == best), initial_loss=9.0) for i, lr in enumerate((1e-3, 1e-2, 0.1))
    ]
    head, _, line = markdown(write_page(summary_of(runs))).split("\n\n")[2].splitlines()
    row = dict(zip((c.strip() for c in head.split("|")), (c.strip() for c in line.split("|")), strict=True))
    assert [row["selected lr"], row["lr sensitivity"]] == cells


def octaves(*losses: float | None, cap: float = 9.0) -> str:
    """The cell of an arm's usable learning rates over octaves from 1e-3 on."""
    runs = [
        made(STE | {"lr": 1e-3 * 2**i}, loss, initial_loss=cap, diverged=loss is None)
        for i, loss in enumerate(losses)
    ]
    head, _, line = markdown(write_page(summary_of(runs))).split("\n\n")[2].splitlines()
    row = dict(zip(head.split("|"), line.split("|"), strict=True))
    return next((value.strip() for key, value in row.items() if "usable" in key), "-")


def test_the_band_of_usable_learning_rates() -> None:
    """Through three points in equal steps it is a parabola, here 2 + x^2 / 10, which is 2.05 at sqrt(1/2)."""
    assert octaves(2.1, 2.0, 2.1) == "1.41 (1.2e-3 to 3.3e-3)"
    assert octaves(2.5, 2.1, 2.0, 2.1, 2.5) == "1.33 (2.5e-3 to 6.3e-3)"  # steeper at 2.1, so lower between
    assert octaves(2.0, 2.01, 2.5) == ">= 1.23 (1e-3 to 2.4e-3)"  # the best is at the lower edge
    assert octaves(2.0, 2.5, 2.0, 2.5) == ">= 0.05 (1e-3 to 1e-3)"  # around the first of equal bests only
    assert octaves(2.0, 2.0) == ">= 1.00 (1e-3 to 2e-3)"
    assert octaves(2.0, 2.02, None, cap=2.03) == ">= 2.00 (1e-3 to 4e-3)"  # ends where runs diverge
    assert octaves(None, None) == "-"


def test_a_diverged_run_counts_as_the_cap_in_the_selection() -> None:
    runs = [halves(STE | {"lr": 1e-3}, 3.0, 3.5, initial_loss=4.0), halves(STE | {"lr": 1e-2}, 2.0, 2.5)]
    runs.append(made(STE | {"lr": 1e-2, "seed": 1}, 1.0, diverged=1))
    (arm,) = summary_of(runs).fits
    selected = arm.selected  # (2 + 4) / 2 is no better than 3: the first of equals
    assert (selected.lr, selected.loss, selected.edge) == (1e-3, 3.5, "lower")


def test_runs_without_any_cap_give_null_and_not_nan() -> None:
    runs = [made(STE | {"lr": lr, "seed": s}, 3.0, diverged=lr > 0.1) for lr in (1e-2, 1) for s in (0, 1)]
    runs += [made(STABLE | {"lr": lr, "seed": s}, 3.0, diverged=lr > 0.1) for lr in (1e-2, 1) for s in (0, 1)]
    comparison = summary_of(runs)
    (study,) = json.loads(as_json([write_page(comparison)]), parse_constant=pytest.fail)["studies"]
    assert [(cap["bits"], cap["loss"]) for cap in study["caps"]] == [(2, None)]
    assert study["arms"][0]["cells"][1]["mean"] is None
    assert study["arms"][0]["figures"]["lr sensitivity"] is None
    assert [(d["lr"], d["n"], d["mean"], d["verdict"]) for d in study["differences"]] == [
        (1e-2, 2, 0.0, "identical"),
        (1, 2, None, "-"),
        (None, 2, 0.0, "identical"),
    ]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (made(STE | {"lr": 1e-3}, 3.0, "half", steps=5), "it is unfinished: step 5 of 10"),
        (made(STE | {"lr": 1e-3}, None, "half"), "it logged no val/loss"),
        (made(STE, 3.0, "half"), "its hyper-parameters name no lr"),
        (Run(Path("demo/half"), {}, {"val/loss": {1: 3.0}}), "it logged no hyper-parameters"),
        (made(STE | {"lr": 1e-3}, None, "half", steps=5, diverged=1), None),
        (made(STE | {"lr": 1e-3}, 3.0, "half", steps=10), None),
        (made(PTQ, 3.0, "half", steps=0, finished=0), None),
        (made(EPOCHS, 3.0, "half", steps=5, finished=0), "it is unfinished: it was cut at step 5"),
        (made(EPOCHS, 3.0, "half", steps=5, finished=1), None),
        (made(EPOCHS, 3.0, "half", steps=5), None),  # logged by an earlier version
    ],
)
def test_runs_that_cannot_be_compared(run: Run, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    assert usable(Result.of(run)) == (reason is None)
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


@pytest.mark.parametrize("seconds", list(itertools.permutations((1, 2, 3))))
def test_a_clock_that_was_set_back_changes_no_run(tmp_path: Path, seconds: tuple[int, int, int]) -> None:
    """Three sessions, each from a step that the one before has reached; what the second said was cut."""
    sessions = [{2: 5.0, 4: 4.0, 6: 9.0}, {5: 9.0, 7: 9.0, 8: 9.0}, {8: 2.5, 10: 2.0}]
    for second, series, lr in zip(seconds, sessions, (1e-3, 2e-3, 4e-3), strict=True):
        done = {"hp/steps": {max(series): max(series)}, "hp/finished": {max(series): float(10 in series)}}
        log_run(tmp_path / "run", STE | {"lr": lr}, {"val/loss": series} | done, second)
    run = read_run(tmp_path / "run")
    assert run.scalars["val/loss"] == {2: 5.0, 4: 4.0, 5: 9.0, 7: 9.0, 8: 2.5, 10: 2.0}
    assert run.hparams["lr"] == 4e-3
    assert usable(Result.of(run))


def test_a_run_that_resumed_from_an_earlier_checkpoint_than_before_is_told_by_its_clock(
    tmp_path: Path,
) -> None:
    for second, series in enumerate(({1: 5.0, 6: 4.0}, {5: 9.0, 9: 9.0}, {3: 3.0, 7: 2.0})):
        log_run(tmp_path / "run", STE | {"lr": 1e-3}, {"val/loss": series}, second)
    assert read_run(tmp_path / "run").scalars["val/loss"] == {1: 5.0, 3: 3.0, 7: 2.0}


def test_files_of_one_second_are_read_in_the_order_of_their_count(tmp_path: Path) -> None:
    for count in (9, 10):
        file = log_run(tmp_path / "run", STE, {"val/loss": {10: count}})
        file.rename(file.with_name(f"events.out.tfevents.1.host.7.{count}"))
    assert read_run(tmp_path / "run").last("val/loss") == 10


def test_a_trained_run_that_was_validated_again_stays_what_it_is(tmp_path: Path) -> None:
    folder, series = tmp_path / "run", {"val/loss": {5: 4.0, 10: 3.0}, "hp/diverged": {10: 0.0}}
    log_run(folder, STE | {"lr": 1e-3}, series)
    before = read_run(folder)
    log_run(folder, PTQ, {"val/loss": {0: 8.0}, "hp/diverged": {0: 0.0}}, second=2)
    assert str(read_run(folder)) == str(before)  # NaN, too

    log_run(tmp_path / "ptq", PTQ, {"val/loss": {0: 8.0}})
    log_run(tmp_path / "ptq", PTQ, {"val/loss": {0: 7.0}}, second=2)
    assert read_run(tmp_path / "ptq").scalars["val/loss"] == {0: 7.0}  # of validations the last


def test_a_comparison_reads_means_over_layers_and_not_the_layers(tmp_path: Path) -> None:
    tags = ["quant/flip_rate", "quant/grad_cosine", "train/loss", "train/grad_norm", "val/loss_even"]
    layers = ["quant/model.layers.0.q_proj/flip_rate", "quant/head/grad_cosine", "quant/share_of_code_0"]
    log_run(tmp_path / "run", STE | {"lr": 1e-3}, {tag: {1: 0.5} for tag in tags + layers})
    read = read_run(tmp_path / "run", COMPARED).scalars
    assert {tag for tag in read if not tag.startswith("hp/")} == set(tags)


def test_columns_are_what_was_logged() -> None:
    run = made(STE | {"lr": 1e-3}, 3.0)
    run.scalars |= {"train/grad_norm": {1: 2.5, 2: 0.5}, "quant/grad_cosine": {1: 0.25, 2: 0.75}}
    comparison = summary_of([run])
    text = markdown(write_page(comparison))
    (header, _, line) = text.split("### Training\n\n")[1].splitlines()[:3]
    columns = ["arm", "divergence rate", "grad norm median", "grad norm 95%", "grad norm 99%", "grad cosine"]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == columns
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["STE", "0%", "0.5", "2.5", "2.5", "0.75"]
    assert "spikes" not in text.split("Validation loss")[0]
    assert "### Training" not in markdown(write_page(summary_of([made(STE | {"lr": 1e-3}, 3.0)])))


@pytest.mark.parametrize("name", ["$x_{", "a $\\frac$ b|", "{}%s^_\\$$"])
def test_names_are_written_as_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every file that compare makes; matplotlib and Markdown have words of their own for such signs."""
    monkeypatch.chdir(tmp_path)
    folder = Path(f"logs {name.replace('/', '')}")
    for arm in ("ste", name):
        for lr, seed in ((1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)):
            series = {"val/loss": {10: 3.0 + seed / 10}, "train/loss": {1: 4.0, 10: 3.0}}
            settings = STE | {"lr": lr, "seed": seed, "note": arm}
            log_run(folder / f"{len(arm)}-{arm}-{lr}-{seed}", settings, series)
    log_run(folder / f"ptq-{name}", PTQ, {"val/loss": {10: 4.0}})
    assert compare([str(folder)]) == 0
    (drawn,) = read_summaries([folder])
    figure = plot._figure([drawn], styles_of(drawn.fits), panels.losses, (3, 2), columns=1)
    assert figure is not None
    legend = figure.legends[0].get_texts()
    assert {f"STE note {name}".replace("$", r"\$")} <= {text.get_text() for text in legend}
    (header, _, *lines) = (folder / "compare.md").read_text().split("\n\n")[2].splitlines()
    assert {line.replace(r"\|", "").count("|") for line in lines} == {header.count("|")}


def test_no_escape_of_a_foreign_event_file_or_folder_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt\r\n"
    folder = tmp_path / f"logs{evil.strip()}"
    for seed, note in ((0, evil), (1, evil), (0, "b"), (1, "b")):
        series = {"val/loss": {10: 3.0}}
        log_run(
            folder / f"r{evil.strip()}{seed}{note == 'b'}",
            STE | {"lr": 1e-3, "seed": seed, evil: note},
            series,
        )
    log_run(folder / f"half{evil.strip()}", STE | {"lr": 1e-3}, {"val/loss": {5: 3.0}, "hp/steps": {5: 5}})
    assert compare([str(folder)]) == 0
    shown = capsys.readouterr()
    made = [(folder / f"compare.{kind}").read_text() for kind in ("md", "csv", "json", "html")]
    for text in (shown.out.split("written to")[0], *caplog.messages, *made):
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert r"\x1b]0;owned" in shown.out


@pytest.mark.parametrize(
    ("folders", "command"),
    [
        (["logs/a"], "tensorboard --logdir logs/a"),
        (["logs/a", "logs/b c"], "tensorboard --logdir logs"),
        (["logs/b c"], "tensorboard --logdir 'logs/b c'"),
        (["logs/a", "other/d"], "tensorboard --logdir_spec a:logs/a,d:other/d"),
        (["other/d", "other/c"], "tensorboard --logdir_spec d:other/d,c:other/c"),
    ],
)
def test_the_last_line_of_a_report_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*folders, "other/published/study"]:
        log_run(Path(name, "ste"), STE | {"lr": 1e-3}, {"val/loss": {10: 3.0}})
    assert compare(folders, out="out") == 0
    assert Path("out/compare.md").read_text().endswith(f"\n\n{command}\n")
    assert f"<code>{escape(command)}</code></p></footer>" in Path("out/compare.html").read_text()
    parser = ArgumentParser()
    core_plugin.CorePluginLoader().define_flags(parser)
    assert parser.parse_args(shlex.split(command)[1:])  # ends the test where a flag or a word is unknown


def test_a_method_has_one_colour_and_one_marker_in_every_picture() -> None:
    """Whatever stands beside it, in a study or in a benchmark; line styles tell its arms apart."""
    (alone,) = styles_of(summary_of([made(STABLE | {"lr": 1e-3}, 3.0)]).fits).values()
    arms = (FP, STE, STRETCHED, STABLE, *(STABLE | {"amplitude": i / 100} for i in range(1, 24)))
    beside = styles_of(summary_of([made(arm | {"lr": 1e-3}, 3.0) for arm in arms]).fits)
    stable = [style for label, style in beside.items() if label.startswith("StableQAT")]
    assert {(style["color"], style["marker"]) for style in [alone, *stable]} == {look_of("StableQAT")}
    assert len({(str(style["linestyle"]), style["fillstyle"]) for style in stable}) == len(stable) == 24
    assert beside["FP"]["color"] == "black"
    for looks in zip(*map(look_of, [*LOOKS, "Mine"]), strict=True):
        assert len(set(looks)) == len(looks) == 12
    assert set(LOOKS) >= {name for name in quantizers.__all__ if not name.startswith("Quantize")} | {"FP"}


def test_a_damaged_file_costs_only_what_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log_run(folder, STE, {"val/loss": {2: 5.0, 4: 4.0}})
    whole = log_run(folder, STE, {"val/loss": {6: 3.0, 8: 2.0}}, second=2)
    whole.write_bytes(whole.read_bytes()[:-5])
    run = read_run(folder)
    assert run.scalars["val/loss"] == {2: 5.0, 4: 4.0, 6: 3.0}
    (problem,) = run.problems
    assert problem.startswith(f"{whole}: cut short or damaged at byte ")


def test_a_last_row_of_panels_has_no_empty_frames() -> None:
    comparisons = [summary_of([made(STE | {"lr": 1e-3}, 3.0)])]
    panels: list[plot.Panel] = [lambda axes: axes.plot([0, 1])] * 4
    figure = plot._figure(comparisons, styles_of(comparisons[0].fits), lambda *_: panels, (3, 2), columns=3)
    assert figure is not None
    assert [axes.get_visible() for axes in figure.axes] == [True] * 4 + [False] * 2

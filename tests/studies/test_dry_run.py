"""What `sweep --dry_run true` lists is what a sweep would run, and it makes nothing."""

import re
import shlex
from pathlib import Path

import pytest
from standin import run

from stableqat.studies import command
from stableqat.studies.command import sweep
from stableqat.studies.study import _KEYS, read_study

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"
BASE = """
data: {class_path: stableqat.data.TextDataModule, init_args: {batch_size: 4, block_size: 32}}
model: {optimizer: {class_path: AdamW, init_args: {lr: 1e-2}}}
trainer: {max_steps: 10}
"""
STUDY = """
configs: [base.yaml]
start: {args: {trainer.max_steps: 100}}
validate: {ptq: {configs: [ste.yaml]}}
grid: {arm: {fp: , ste: {configs: [ste.yaml]}}, bits: [2, 4], lr: [1e-3, 1e-2], seed: 0}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "visible_gpus", list)
    Path("base.yaml").write_text(BASE)
    Path("ste.yaml").write_text("model: {quantizer: {class_path: STE, init_args: {bits: 8}}}\n")
    Path("demo.yaml").write_text(STUDY)


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert sweep(["demo.yaml"], dry_run=True) == 0
    return capsys.readouterr().out.splitlines()


def test_every_point_and_its_command_is_listed_and_nothing_made(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    lines = listed(capsys)
    assert sorted(Path().rglob("*")) == before
    points = read_study("demo.yaml").points
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("  stableqat ")]
    assert commands == [point.argv for point in points]
    assert lines[0] == "demo: 9 points, in lightning_logs/demo"
    assert "ste-b4-lr1e-3-s0: arm ste, bits 4, lr 1e-3, seed 0, to run" in lines
    steps = 100 + 6 * 10
    tokens = steps * 4 * 32
    assert lines[-1] == f"To run: 9 of 9 points (7 of them train), {steps} steps, {tokens:,} tokens."


def test_what_is_done_costs_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    Path("demo.yaml").write_text("grid: {arm: {a: {args: {act: finish}}, b: {args: {act: refuse}}}}")
    assert run("demo.yaml") == 1
    capsys.readouterr()
    lines = listed(capsys)
    assert "a: arm a, done" in lines
    assert "b: arm b, to run" in lines
    assert lines[-1].startswith("To run: 1 of 2 points (1 of them train), steps open, tokens open. As fin")
    assert lines[-1].endswith(" hours of one worker.")


@pytest.mark.parametrize(
    ("setting", "tokens"),
    [
        ("trainer.devices: 2", "5,120 tokens"),
        ("trainer.accumulate_grad_batches: 3", "7,680 tokens"),
        ("trainer.devices: auto", "tokens open"),
        ("data.batch_size: null", "tokens open"),
        ("data.class_path: stableqat.data.ImageDataModule", "80 images"),
    ],
)
def test_tokens_follow_from_the_settings_or_stay_open(
    capsys: pytest.CaptureFixture[str], setting: str, tokens: str
) -> None:
    grid = "grid: {arm: {a: , b: }, lr: 0.1}"
    Path("demo.yaml").write_text(f"configs: [base.yaml]\nargs: {{{setting}}}\n{grid}\n")
    assert listed(capsys)[-1] == f"To run: 2 of 2 points (2 of them train), 20 steps, {tokens}."


def test_the_page_describes_every_key_of_a_study_file() -> None:
    rows = {row.split(".")[0] for row in re.findall(r"^\| `([\w.<>]+)` \|", PAGE.read_text(), re.MULTILINE)}
    assert rows >= set(_KEYS)

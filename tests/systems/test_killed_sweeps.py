"""Sweeps of real runs, killed at random moments or two at once, end with the table of an undisturbed one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stableqat.analysis.comparison import read_summaries
from stableqat.analysis.tables import markdown, write_page

ROOT = Path(__file__).parents[2]
STUDY = """
name: {name}
logs: {logs}
configs: [configs/llama/base.yaml, configs/llama/debug.yaml]
args:
  trainer: {{max_steps: 24, val_check_interval: 12, accelerator: cpu}}
  {saves}
start: {{args: {{trainer.max_steps: 8, last.enabled: true}}}}
grid:
  arm:
    ste: {{configs: configs/llama/ste.yaml}}
    stableqat: {{configs: configs/llama/stableqat.yaml}}
  lr: 1.0e-3
"""


def begin(folder: Path, name: str, saves: str = "last.every_n_train_steps: 4") -> subprocess.Popen:
    study = folder / f"{name}.yaml"
    study.write_text(STUDY.format(name=name, logs=folder, saves=saves))
    code = "from stableqat.cli.main import entry; entry()"
    return subprocess.Popen([sys.executable, "-c", code, "sweep", str(study)], cwd=ROOT)


def table(folder: Path) -> str:
    return markdown(write_page(read_summaries([folder])[0])).replace(folder.name, "study")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    assert begin(folder, "whole").wait() == 0
    return folder, table(folder / "whole")


def test_a_sweep_killed_in_its_start_and_in_its_last_run_ends_with_the_same_table(undisturbed):
    folder, expected = undisturbed
    moments = random.Random(0)
    for begun in (1, 3):
        killed = begin(folder, "killed")
        while len(list((folder / "killed").glob("*/log.txt"))) < begun:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        assert killed.poll() is None, "it was done before it was killed"
        killed.kill()
        killed.wait()
    assert begin(folder, "killed").wait() == 0
    assert table(folder / "killed") == expected


@pytest.mark.slow
def test_two_sweeps_at_once_run_each_point_once(undisturbed):
    folder, expected = undisturbed
    assert [sweep.wait() for sweep in (begin(folder, "shared"), begin(folder, "shared"))] == [0, 0]
    assert table(folder / "shared") == expected
    for log in (folder / "shared").glob("*/log.txt"):
        assert log.read_text().count("$ stableqat") == 1
    records = [json.loads(file.read_text()) for file in (folder / "shared").glob("*/sweep.json")]
    assert [record["status"] for record in records] == ["done"] * 3


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_is_not_done_even_without_checkpoints(undisturbed):
    """Lightning ends it in order, and there is nothing to go on from: it begins anew."""
    folder, expected = undisturbed
    stopped = begin(folder, "stopped", "last.enabled: false")
    while not list((folder / "stopped").glob("ste-*/events*")):
        time.sleep(0.05)
    stopped.terminate()
    assert stopped.wait() == 128 + signal.SIGTERM
    records = [json.loads(file.read_text())["status"] for file in (folder / "stopped").glob("*/sweep.json")]
    assert "cut" in records
    assert begin(folder, "stopped", "last.enabled: false").wait() == 0
    assert table(folder / "stopped") == expected

"""One command starts all processes of a machine: Lightning calls its command line again for the others."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

from stableqat.cli.lightning import QATCommand
from stableqat.cli.main import main
from stableqat.events import read_run

RUN = ["fit", "-c", "configs/vit/base.yaml", "-c", "configs/vit/debug.yaml", "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize("given", ["the command line", "a function call"])
def test_other_processes_get_the_whole_command(given, monkeypatch):
    """A study calls the function; its points are commands all the same."""
    seen = []
    monkeypatch.setattr(QATCommand, "_run_subcommand", lambda *_: seen.append(_basic_subprocess_cmd()))
    line = (
        ["/bin/stableqat", *RUN] if given == "the command line" else ["/bin/stableqat", "sweep", "study.yaml"]
    )
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # a console script has none
    assert main(None if given == "the command line" else RUN) == 0
    assert seen == [[sys.executable, "/bin/stableqat", *RUN]]
    assert sys.argv == line


@pytest.mark.slow  # both processes import everything anew
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_from_one_command(strategy, tmp_path):
    command = [Path(sys.executable).with_name("stableqat"), *RUN, "--trainer.strategy", strategy]
    command += f"--trainer.devices 2 --trainer.max_steps 2 --trainer.logger.save_dir {tmp_path}".split()
    done = subprocess.run(
        [*command, "--trainer.logger.version", "run"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert read_run(tmp_path / "vit" / "run").last("hp/steps") == 2


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all_with_one_line(tmp_path):
    """The first prepares the data while the others wait."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": ')
    command = [Path(sys.executable).with_name("stableqat"), "fit", "-c", "configs/llama/base.yaml"]
    command += ["-c", "configs/llama/ddp.yaml", "--data.source", tmp_path, "--trainer.accelerator", "cpu"]
    command += f"--trainer.devices 2 --trainer.logger.save_dir {tmp_path}".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("stableqat:") for line in done.stderr.splitlines()) == 1

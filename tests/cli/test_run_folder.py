"""A run's folder belongs to one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stableqat.cli.main import main

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(at):
    """A process that writes a run, as far as others see; killed at the end."""
    started = []

    def hold(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, f"{folder}/.lock"], **pipes)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_another_process_writes_is_refused(resumed, run, held, capsys):
    flags = ["--ckpt_path", "last"] if resumed else []
    version = "done" if resumed else "begun"
    argv = [
        "fit",
        "-c",
        "llama.yaml",
        "--trainer.logger.version",
        version,
        "--trainer.max_steps",
        "2",
        *flags,
    ]
    before = sorted(Path("logs/llama").rglob("*"))
    holder = held(f"logs/llama/{version}")
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"logs/llama/{version}: another process is writing this run" in error
    assert [p for p in sorted(Path("logs/llama").rglob("*")) if p.name not in (".lock", version)] == [
        p for p in before if p.name != version
    ]
    holder.kill()  # however it ends, the lock ends with it
    holder.wait()
    assert main(["validate", *argv[1:5], "--trainer.fast_dev_run", "true"]) == 0
    Path(f"logs/llama/{version}/.lock").unlink()


def test_two_runs_without_a_version_take_two(at, monkeypatch):
    """The second chose its number before the first had made its folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    other = at / "logs" / "twins" / "version_0"
    real = TensorBoardLogger._get_next_version
    chosen = []

    def late(self):
        chosen.append(real(self))
        if len(chosen) == 1:
            other.mkdir(parents=True)
            (other / "config.yaml").write_text("theirs: true\n")
        return chosen[-1]

    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", late)
    monkeypatch.setattr("stableqat.cli.lightning.check_run_folder", lambda *_: None)  # it came too early
    assert main(["fit", "-c", "llama.yaml", "--trainer.logger.name", "twins"]) == 0
    assert chosen == [0, 1]
    assert os.listdir(other) == ["config.yaml"]
    files = {p.name for p in (at / "logs/twins/version_1").iterdir()}
    assert {"config.yaml", "checkpoints"} <= files
    assert ".lock" not in files


def test_a_run_that_never_began_leaves_no_folder(at, capsys):
    argv = [
        "fit",
        "-c",
        "llama.yaml",
        "--data.source",
        "none.jsonl",
        "--trainer.logger.save_dir",
        "nowhere/yet",
    ]
    assert main(argv) == 2
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("value", ["null", ""])
def test_a_run_needs_a_place(value, at, capsys):
    assert main(["fit", "-c", "llama.yaml", f"--trainer.logger.save_dir={value}"]) == 2
    assert "trainer.logger.save_dir: missing" in capsys.readouterr().err
    assert not Path("None").exists()


@pytest.mark.parametrize("argv", [["compare", "logs"], ["sweep", "llama.yaml"], ["fit", "-c", "llama.yaml"]])
def test_ctrl_c_is_one_line(argv, at, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stableqat.cli.main._dispatch", interrupted)
    assert main(argv) == 130
    assert capsys.readouterr().err == "stableqat: interrupted\n"


def test_a_configuration_is_written_whole_or_not_at_all(at, monkeypatch, capsys):
    """A full disk must not leave a folder that looks like a run with no settings."""
    import errno

    from stableqat.cli.lightning import Parser

    def full(self, config, path, **_):
        Path(path).write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Parser, "save", full)
    assert main(["fit", "-c", "llama.yaml", "--trainer.logger.version", "unwritten"]) == 2
    assert "the disk refuses to write" in capsys.readouterr().err
    assert not list(Path("logs/llama/unwritten").rglob("*config.yaml*"))

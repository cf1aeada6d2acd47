"""Verbs, exit codes and what reaches stderr."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.modules import LlamaModule


def llama(verb, name, *flags):
    return [verb, "-c", "llama.yaml", "--trainer.logger.version", name, *flags]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stableqat {version('stableqat')}\n"


def test_a_run_is_a_folder(run, at):
    names = {path.name for path in (at / run).iterdir()}
    assert {"config.yaml", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert (at / run / "checkpoints/last.ckpt").stat().st_size


def test_news_begin_with_the_run(run, at, capsys):  # one before has made the tokenizer
    assert main(llama("fit", "news")) == 0
    err = capsys.readouterr().err
    assert err.startswith("stableqat: 7 linear layers quantized, ")
    assert "litlogger" not in err


def test_a_progress_bar_of_the_users_own_replaces_the_suites(at, capsys):
    flags = ["--trainer.enable_progress_bar", "true", "--trainer.callbacks+=TQDMProgressBar"]
    assert main(llama("fit", "bar-own", *flags)) == 0
    out, err = capsys.readouterr()
    assert "Epoch 0" in out + err


def test_a_start_is_evaluated(run, at, capsys):
    assert main(llama("test", "test", "--model.init_from", run)) == 0
    assert "loss" in capsys.readouterr().out


def test_a_run_may_log_nothing(at):
    steps = ["--trainer.max_steps", "3", "--trainer.log_every_n_steps", "0"]
    assert main(llama("fit", "silent", *steps)) == 0


def test_a_checkpoint_is_evaluated_as_what_it_is(run, at, capsys):
    checkpoint = f"{run}/checkpoints/last.ckpt"
    assert main(llama("validate", "other", "--ckpt_path", checkpoint, "--model.quantizer.bits", "4")) == 0
    said = "stableqat: model.quantizer.bits: 2 from the checkpoint replaces 4 from the configuration"
    assert said in capsys.readouterr().err.splitlines()


def test_a_cut_run_is_resumed_by_the_same_command(at):
    assert main(llama("fit", "resumed")) == 0
    config = (at / "logs/llama/resumed/config.yaml").read_text()
    assert main(llama("fit", "resumed", "--ckpt_path", "last", "--trainer.max_steps", "3")) == 0
    last = torch.load(at / "logs/llama/resumed/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert (at / "logs/llama/resumed/config.yaml").read_text() == config


def test_a_trial_leaves_nothing(at):
    before = set(at.iterdir())
    assert main(llama("fit", "trial", "--trainer.fast_dev_run", "true")) == 0
    assert set(at.iterdir()) - before <= {at / "cache"}  # the first test to run fills it
    assert not (at / "logs/llama/trial").exists()


def test_a_diverged_run_is_a_result(at, capsys):
    assert main(llama("fit", "diverged", "--model.optimizer.lr", "1e30", "--trainer.max_steps", "3")) == 0
    assert "stableqat: diverged at step " in capsys.readouterr().err


def test_debug_shows_the_traceback(at):
    with pytest.raises(UserError, match="bits"):
        main(["fit", "-c", "llama.yaml", "--debug", "--model.quantizer.bits", "0"])


@pytest.mark.parametrize("fault", [ValueError("`width` is odd"), KeyError("loss")])
def test_a_fault_of_the_program_keeps_its_traceback(fault, at, monkeypatch):
    def step(self, batch, batch_idx):
        raise fault

    monkeypatch.setattr(LlamaModule, "training_step", step)
    with pytest.raises(type(fault)) as caught:
        main(llama("fit", f"fault-{type(fault).__name__}"))
    assert caught.value is fault


def test_a_setting_that_lightning_refuses_late_is_refused_by_name(at, capsys):
    steps = ["--trainer.val_check_interval", "1000000", "--trainer.max_steps", "2"]
    assert main(llama("fit", "late", *steps)) == 2
    assert "stableqat: trainer.val_check_interval: " in capsys.readouterr().err.splitlines()[-1]
    folder = at / "logs/llama/late"
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.yaml").touch()  # of a run that was killed before it saved
    assert main(llama("fit", "late")) == 2
    assert "remove it (it has no checkpoint to resume from)" in capsys.readouterr().err


def test_a_metric_that_is_never_logged_is_refused_by_name(at, capsys):
    steps = [
        "--trainer.val_check_interval",
        "1",
        "--trainer.max_steps",
        "2",
        "--best.monitor",
        "val/accuracy",
    ]
    assert main(llama("fit", "monitor", *steps)) == 2
    assert "val/accuracy" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_itself(at):
    wrong = ["--model.quantizer.bits", "0"]
    command = [
        sys.executable,
        "-c",
        "from stableqat.cli.main import entry; entry()",
        "fit",
        "-c",
        "llama.yaml",
        *wrong,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert "bits: must be a whole number from 1 to 8, not 0" in done.stderr

"""What a run says of itself: at its start, on its way and at its end; and what a failed start leaves."""

from pathlib import Path

import pytest

from stableqat.cli import progress
from stableqat.cli.main import main


def fit(name, *flags):
    flags = (*flags, "--trainer.enable_progress_bar", "true")
    return main(["fit", "-c", "llama.yaml", "--trainer.logger.version", name, *flags])


def test_a_run_says_what_it_is_and_what_comes_next(at, capsys):
    assert fit("told", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2") == 0
    lines = [line.removeprefix("stableqat: ") for line in capsys.readouterr().err.splitlines()]
    begin = lines.index("run: logs/llama/told")
    assert begin < next(number for number, line in enumerate(lines) if line.startswith("start: "))
    assert lines[begin + 1] == "follow: tensorboard --logdir logs/llama"
    assert lines[begin + 2].startswith(
        "trains: 18.7k parameters, quantized by StableQAT, 2 bits, integer grid"
    )
    assert lines[begin + 3] == "plan: 3 steps of 32 tokens, 96 in all"
    [start, end] = [line for line in lines if "validation loss: " in line]
    assert end.startswith(start.removeprefix("start: "))
    assert end.endswith(" now")
    [best] = [line for line in lines if line.startswith("best: val/loss ")]
    assert Path(best.rpartition(", ")[2]).name == "best.ckpt"
    kept = list(Path("logs/llama/told/checkpoints").iterdir())
    assert len(kept) == 3
    megabytes = sum(file.stat().st_size for file in kept) / 1e6
    assert f"disk: {megabytes:.1f} MB in 3 checkpoints" in lines
    commands = ["stableqat evaluate logs/llama/told"]
    commands += ["stableqat export logs/llama/told --format gguf --out out/told"]
    assert [line.removeprefix("next: ") for line in lines if line.startswith("next: ")] == commands


@pytest.mark.parametrize(
    ("flags", "format"),
    [
        (["--model.input_quantizer", "stableqat.quantizers.inputs.PerToken"], "onnx"),
        (["--model.cache_bits", "8"], None),
    ],
)
def test_a_run_is_told_of_the_format_that_holds_it(flags, format, at, capsys):
    if format is not None:
        flags = [*flags, "--model.input_quantizer.bits", "8"]
    assert fit(f"held-{format}", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2", *flags) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "next: stableqat export" in line]
    assert [line.split(" --format ")[1].split()[0] for line in told] == ([] if format is None else [format])


def test_a_run_that_keeps_no_checkpoint_names_none(at, capsys):
    flags = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    assert fit("kept-none", *flags, "--best.enabled", "false", "--last.enabled", "false") == 0
    err = capsys.readouterr().err
    assert " now\n" in err
    assert not [line for line in ("best: ", "checkpoint: ", "next: ") if line in err]


def test_a_log_gets_a_line_every_so_often_with_the_steps_of_the_whole_run(at, capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", -1.0)
    assert fit("lines", "--trainer.max_steps", "3", "--trainer.max_epochs", "-1") == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("stableqat: step ")]
    assert [line.split()[2] for line in lines] == ["1", "2", "3"]
    assert all(" of 3" in line and "train/loss " in line for line in lines)
    assert " left: " in lines[1]
    assert "Epoch" not in out + err


def test_a_terminal_gets_one_bar_for_the_whole_run(at, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    assert fit("bar", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2") == 0
    err = capsys.readouterr().err
    assert "step 3 of 3" in err
    assert "stableqat: step" not in err
    assert "Epoch" not in err


@pytest.mark.parametrize("began", [False, True])
def test_only_a_run_that_has_begun_leaves_a_folder(began, at, monkeypatch):
    from stableqat.modules import LlamaModule

    def fails(self, batch, batch_idx):
        if self.trainer.global_step == began:
            raise RuntimeError("the device is gone")
        return real(self, batch, batch_idx)

    real = LlamaModule.training_step
    monkeypatch.setattr(LlamaModule, "training_step", fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(
            ["fit", "-c", "llama.yaml", "--trainer.logger.name", f"fails-{began}", "--trainer.max_steps", "2"]
        )
    assert Path(f"logs/fails-{began}").exists() == began
    if began:
        assert list(Path("logs/fails-True/version_0").glob("events.*"))


def test_a_failed_start_takes_only_what_it_has_made(at):
    folder = Path("logs/llama/prepared")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    flags = ["--trainer.logger.version", "prepared", "--data.batch_size", "100000"]
    assert main(["fit", "-c", "llama.yaml", *flags]) == 2
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]

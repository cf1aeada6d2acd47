"""Runs that quantize inputs and attention: killed and resumed bit for bit, and in calibrating processes."""

from pathlib import Path

import forked
import pytest
import torch
from test_kill import checkpoint, differing, trace
from test_processes import PROCESSES
from test_processes import arguments as divided

INPUTS = [
    *["--model.quantizer.bits", "4", "--model.input_quantizer", "stableqat.quantizers.inputs.LSQPlus"],
    *["--model.input_quantizer.bits", "4", "--model.input_quantizer.surrogate", "dsq"],
    *["--model.attention_quantizer", "stableqat.quantizers.inputs.LSQ"],
    *["--model.attention_quantizer.bits", "4", "--model.calibration_batches", "3"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_a_killed_run_is_the_one_that_was_not(family, folder):
    """Killed after the 7th step, it resumes from the 6th."""

    def run(version):
        configs = [
            part for name in ("base", "debug", "dsq") for part in ("-c", f"configs/{family}/{name}.yaml")
        ]
        return [
            *["fit", *configs, *INPUTS],
            *["--trainer.max_steps", "8", "--trainer.val_check_interval", "4"],
            *["--trainer.accelerator", "cpu"],
            *["--last.every_n_train_steps", "3", "--model.lr_scheduler", "null"],
            *["--model.optimizer.lr", "1e-2", "--trainer.logger.save_dir", str(folder)],
            *["--trainer.logger.name", family, "--trainer.logger.version", version],
        ]

    forked.succeed(run("whole"), folder / "log")
    cut = [
        "--trainer.callbacks+=probes.Cut",
        *["--trainer.callbacks.step", "7", "--trainer.callbacks.how", "kill"],
    ]
    assert forked.command(run("cut") + cut, folder / "log") == [-9]
    forked.succeed([*run("cut"), "--ckpt_path", "last"], folder / "log")
    whole, resumed = folder / family / "whole", folder / family / "cut"
    assert "calibrated" not in (folder / "log").read_text()
    assert trace(resumed) == trace(whole)
    assert not list(differing(checkpoint(whole), checkpoint(resumed)))
    for place, own in (("input", {"offset", "a_logit"}), ("attention", {"lowest"})):
        state = [name for name in checkpoint(whole)["state_dict"] if f".{place}_quantizer." in name]
        assert {name.rsplit(".", 1)[1] for name in state} == {"scale", "scale_floor", *own}


def probed(family: str, strategy: str, folder: Path) -> dict:
    result = folder / f"{family}-{strategy}.pt"
    flags = {"trainer__max_steps": 2, "trainer__val_check_interval": 2}
    argv = divided(family, folder, f"{strategy}-divided", strategy, **flags) + INPUTS
    argv += ["--trainer.callbacks+=probes.Ranks", "--trainer.callbacks.path", str(result)]
    forked.succeed(argv, folder / "log", PROCESSES[strategy])
    return torch.load(result, weights_only=True)


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_processes_take_the_scales_of_all_their_data(family, folder):
    """Those that one process takes on the same rows; each has the same before and after training."""
    one = probed(family, "auto", folder)
    for strategy in ("ddp", "fsdp2"):
        two = probed(family, strategy, folder)
        for when in ("begun", "ended"):
            first, second = two[when]
            assert first.keys() == second.keys() == one[when][0].keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
        for name, value in one["begun"][0].items():
            torch.testing.assert_close(two["begun"][0][name], value, rtol=0.02, atol=0.005)
        for name, gradient in one["gradients"][0].items():
            torch.testing.assert_close(two["gradients"][0][name], gradient, rtol=0.1, atol=1e-3)

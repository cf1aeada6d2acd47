"""Methods with a schedule, a penalty, a step or chance of their own: killed and resumed, and in shards.

The methods are not of this package, so every process has to be allowed to import them.
"""

from pathlib import Path

import forked
import pytest
import torch
import yaml
from test_kill import checkpoint, differing, trace
from test_processes import PROCESSES
from test_processes import arguments as divided

STEPS, PARTS = 8, 2


def quantizer(name, **options):
    return {"class_path": f"strangers.{name}", "init_args": {"bits": 2, **options}}


OURS = {
    "class_path": "stableqat.quantizers.StableQAT",
    "init_args": {"bits": 2, "dampening": 5.0, "freezing": 0.005},
}
METHODS = {
    "*q_proj": quantizer("Hardening"),
    "*k_proj": quantizer("Stochastic"),
    "*o_proj": quantizer("LowRank", rank=4),
    "*up_proj": quantizer("Freezing", threshold=0.05),
    "*gate_proj": OURS,
    "*": quantizer("Dampened", strength=10.0),
}


def write(path: Path, methods: dict) -> list[str]:
    path.write_text(yaml.safe_dump({"model": {"init_args": {"quantizer": methods}}}, sort_keys=False))
    return ["-c", str(path), "--allow", "strangers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clocked")


def arguments(folder: Path, version: str) -> list[str]:
    configs = [part for name in ("base", "debug") for part in ("-c", f"configs/llama/{name}.yaml")]
    return [
        *["fit", *configs, *write(folder / "methods.yaml", METHODS)],
        *f"--trainer.max_steps {STEPS} --trainer.accumulate_grad_batches {PARTS}".split(),
        *["--trainer.limit_train_batches", "10", "--trainer.val_check_interval", "4"],
        *["--trainer.accelerator", "cpu"],
        *["--last.every_n_train_steps", "3", "--model.optimizer.lr", "2e-2", "--model.lr_scheduler", "null"],
        *["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", "llama"],
        *["--trainer.logger.version", version],
    ]


@pytest.mark.parametrize("how", [pytest.param("kill", marks=pytest.mark.slow), "terminate"])
def test_a_run_with_a_clock_resumes_bit_for_bit(how, folder):
    """Cut short after the 5th step: killed, it resumes from the 3rd, told to stop it ends the 6th."""
    log, whole = folder / "log", folder / "llama" / "whole"
    if not whole.exists():
        forked.succeed(arguments(folder, "whole"), log)
    run, cut = arguments(folder, how), folder / "llama" / how
    stop = [
        "--trainer.callbacks+=probes.Cut",
        *f"--trainer.callbacks.step 5 --trainer.callbacks.how {how}".split(),
    ]
    assert forked.command([*run, *stop], log) == [-9 if how == "kill" else 143], log.read_text()[-2000:]
    assert checkpoint(cut)["global_step"] == (3 if how == "kill" else 6)
    forked.succeed([*run, "--ckpt_path", "last"], log)
    assert trace(cut) == trace(whole)
    assert list(trace(whole)["train/loss"]) == list(range(STEPS))
    for part in ("state_dict", "optimizer_states"):
        assert not list(differing(checkpoint(whole)[part], checkpoint(cut)[part]))

    # otherwise the comparison would prove little
    state = checkpoint(whole)["state_dict"]
    for name, is_frozen in ((".frozen", lambda x: x <= 1), (".freezing.frequency", lambda x: x > 1)):
        found = torch.cat([value.flatten() for key, value in state.items() if key.endswith(name)])
        assert 0 < is_frozen(found).sum() < found.numel()


def test_a_clock_acts_on_shards(folder):
    """Penalties, clipped with the loss, and steps of a method's own, on two processes' rows as on one's."""
    acting = {
        "*self_attn*": quantizer("Dampened", strength=100.0),
        "*gate_proj": {**OURS, "init_args": {"bits": 2, "dampening": 100.0, "freezing": 0.0}},
        "*": quantizer("Freezing", threshold=-1.0),
    }
    plain = {"*": {**quantizer(""), "class_path": "stableqat.quantizers.STE"}}
    flags = {"trainer__max_steps": 4, "trainer__val_check_interval": 100, "model__lr_scheduler": "null"}
    flags |= {"model__optimizer": "torch.optim.SGD", "model__optimizer__lr": 1.0}
    states = []
    for version, strategy, methods in (
        ("plain", "auto", plain),
        ("one", "auto", acting),
        ("two", "fsdp2", acting),
    ):
        argv = divided("llama", folder, version, strategy, **flags)
        argv += write(folder / f"{version}.yaml", methods)
        forked.succeed(argv, folder / "log", PROCESSES[strategy])
        states.append(checkpoint(folder / "llama" / version)["state_dict"])
    plain, one, two = states
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        if name.endswith("proj.weight"):
            assert (plain[name] - value).abs().max() > 1e-3

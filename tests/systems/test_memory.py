"""What saves memory changes no result under DDP and FSDP2.

Lean loss, checkpointed layers, a quantized tied head, a teacher beside the model.
"""

from functools import cache

import forked
import pytest
import torch
from test_processes import PROCESSES, arguments, probe

STEPS = 3
STRATEGIES = ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves behind, by its name; the head is quantized, and tied to the embedding."""
    folder = tmp_path_factory.mktemp("memory")

    @cache
    def made(strategy: str, version: str, *flags: str) -> dict:
        result = folder / f"{strategy}-{version}.pt"
        argv = arguments("llama", folder, f"{strategy}-{version}", strategy, trainer__max_steps=STEPS)
        argv += ["--trainer.val_check_interval", str(STEPS), "--model.skip", "[]", *flags, *probe(result)]
        forked.succeed(argv, folder / "log", PROCESSES[strategy])
        return torch.load(result, weights_only=True) | {"folder": folder / "llama" / f"{strategy}-{version}"}

    return made


def agree(one, two, tolerance=2e-6):
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=tolerance)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-2)


LEAN = ("--model.lean_loss", "true", "--model.activation_checkpointing", "true")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lean_and_checkpointed_processes_train_as_one_plain_one(strategy, run):
    found = run(strategy, "lean", *LEAN)
    assert found["sharded"] == (strategy == "fsdp2")
    agree(run("auto", "plain"), found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_process_has_the_teacher(strategy, run):
    start = run("auto", "plain")["folder"]
    taught = ("--model.teacher.source", str(start), "--model.teacher.hidden_weight", "0.5")
    one, two = run("auto", "taught", *taught), run(strategy, "taught", *taught, *LEAN)
    agree(one, two, 1e-3)  # the teacher's bfloat16 rounds other batch sizes otherwise
    assert one["losses"][0] != run("auto", "plain")["losses"][0]
    states = [
        torch.load(each["folder"] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for each in (one, two)
    ]
    assert states[0].keys() == states[1].keys()


def test_a_taught_run_resumes_by_its_own_command(run):
    """The checkpoint names the teacher where the command says the start."""
    start = run("auto", "plain")["folder"]
    flags = ("--model.init_from", str(start), "--model.teacher.weight", "0.5")
    folder = run("auto", "interrupted", *flags)["folder"]
    longer = arguments("llama", folder.parents[1], folder.name, "auto", trainer__max_steps=STEPS + 1)
    longer += ["--model.skip", "[]", *flags, "--ckpt_path", "last"]
    forked.succeed(longer, folder / "log")
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS + 1

"""Sharded checkpoints: they resume on any number of processes, and become the one file bit for bit."""

import errno
import os
import shlex
import shutil
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_kill import differing
from test_processes import arguments

from stableqat.checkpoints.read import check_sums, read_checkpoint
from stableqat.checkpoints.sharded import read_index
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.modules import LlamaModule

STEPS = 6
PROCESSES = {"auto": 1, "fsdp2": 2, "sharded": 2}


class Runs:
    """Runs under FSDP2, whose checkpoints are folders where `sharded` is said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.said: dict[str, str] = {}
        self.done = cache(self._done)

    def argv(self, kind: str, version: str, steps: int = STEPS) -> list[str]:
        flags = {"trainer__max_steps": steps, "trainer__val_check_interval": 3}
        found = arguments("llama", self.folder, version, "auto" if kind == "auto" else "fsdp2", **flags)
        if kind == "sharded":
            at = found.index("--trainer.strategy")
            sharded = "--trainer.strategy.save_distributed_checkpoint true"
            found[at : at + 2] = f"--trainer.strategy stableqat.modules.FSDP2Strategy {sharded}".split()
        return found

    def run(self, kind: str, version: str, *extra: str, steps: int = STEPS) -> list[int]:
        return forked.command([*self.argv(kind, version, steps), *extra], self.log, PROCESSES[kind])

    def succeed(self, kind: str, version: str, *extra: str, steps: int = STEPS) -> Path:
        forked.succeed([*self.argv(kind, version, steps), *extra], self.log, PROCESSES[kind])
        return self.at(version)

    def at(self, version: str) -> Path:
        return self.folder / "llama" / version / "checkpoints" / "last.ckpt"

    def _done(self, kind: str) -> Path:
        made = self.succeed(kind, kind)
        self.said[kind] = self.log.read_text()
        return made

    def copy(self, version: str) -> Path:
        """A copy of the sharded run."""
        shutil.copytree(self.done("sharded").parents[1], self.at(version).parents[1])
        return self.at(version)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def consolidated(runs):
    file = runs.folder / "one.ckpt"
    assert main(["consolidate", str(runs.done("sharded")), "--out", str(file)]) == 0
    return file


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_consolidated_file_is_the_one_the_run_would_have_written(runs, consolidated):
    one, made = load(runs.done("fsdp2")), load(consolidated)
    assert runs.done("sharded").is_dir()
    assert not list(differing(one, made))
    assert list(one["state_dict"]) == list(made["state_dict"])
    assert one["optimizer_states"][0]["state"]
    assert not list(runs.folder.glob("*.partial"))


def test_the_commands_that_the_run_names_take_its_shards(runs):
    kept = runs.copy("next").parent
    done = str(runs.done("sharded").parents[1])
    said = runs.said["sharded"].replace(done, str(kept.parent)).splitlines()
    commands = [shlex.split(line.partition("next: stableqat ")[2]) for line in said if "next: " in line]
    assert [command[0] for command in commands] == ["consolidate", "evaluate", "export"]
    assert main(commands[0]) == main(commands[1]) == 0
    assert commands[2][1] == commands[1][1] == str(kept / "best.consolidated.ckpt")


def test_it_starts_another_run(runs, consolidated, capsys):
    expected = load(consolidated)["state_dict"]
    for source in (consolidated, runs.done("sharded"), runs.done("sharded").parents[1]):
        module = LlamaModule(init_from=str(source), config=load(consolidated)["hyper_parameters"]["config"])
        module.configure_model()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    loaded = LlamaModule.load_from_checkpoint(consolidated)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_shards_resume(runs, consolidated):
    """As FSDP2's own file does, and, consolidated, one process with it."""
    runs.copy("resumed")
    straight = load(runs.succeed("fsdp2", "straight", steps=9))
    resumed = runs.succeed("sharded", "resumed", "--ckpt_path", "last", steps=9)
    assert resumed.is_dir()
    check_sums(resumed)
    file = runs.folder / "resumed.ckpt"
    assert main(["consolidate", str(resumed), "--out", str(file)]) == 0
    assert not list(differing(straight, load(file)))
    alone = runs.succeed("auto", "alone", "--ckpt_path", str(consolidated), steps=9)
    assert load(alone)["global_step"] == 9
    names = sorted(path.name for path in resumed.parent.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_shards_of_two_processes_resume_in_one_file_on_two(runs):
    """The strategy's own setting may change between runs."""
    runs.copy("changed")
    changed = runs.succeed("fsdp2", "changed", "--ckpt_path", "last", steps=9)
    assert changed.is_file()
    assert (changed.parent / "previous.ckpt").is_dir()
    assert load(changed)["global_step"] == 9


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("sharded", marks=pytest.mark.slow)])
def test_an_optimizer_that_keeps_nothing_resumes(kind, runs):
    """Plain SGD: no states, but a learning rate that its schedule has moved."""
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-2"]
    sgd += [
        "--model.lr_scheduler",
        "torch.optim.lr_scheduler.ExponentialLR",
        "--model.lr_scheduler.gamma",
        "0.5",
    ]
    whole = runs.succeed(kind, f"{kind}-sgd", *sgd)
    runs.succeed(kind, f"{kind}-sgd-cut", *sgd, steps=3)
    resumed = runs.succeed(kind, f"{kind}-sgd-cut", *sgd, "--ckpt_path", "last")
    if kind == "sharded":
        for path in (whole, resumed):
            assert main(["consolidate", str(path), "--out", f"{path}.whole"]) == 0
        whole, resumed = Path(f"{whole}.whole"), Path(f"{resumed}.whole")
    assert not load(whole)["optimizer_states"][0]["state"]
    assert not list(differing(load(whole), load(resumed)))


def flip(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "a file cut short": lambda folder: (folder / "__0_0.distcp").write_bytes(b"0" * 99),
    "a missing file": lambda folder: (folder / "__1_0.distcp").unlink(),
    "a missing index": lambda folder: (folder / ".metadata").unlink(),
    "an index cut short": lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"),
    "no rest": lambda folder: (folder / "meta.pt").unlink(),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(case, runs, tmp_path, capsys):
    broken = tmp_path / "last.ckpt"
    shutil.copytree(runs.done("sharded"), broken)
    check_sums(broken)
    DAMAGE[case](broken)
    with pytest.raises(UserError, match="damaged"):
        check_sums(broken)
    assert main(["consolidate", str(broken), "--out", str(tmp_path / "out.ckpt")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def test_damaged_shards_give_way_to_the_checkpoint_before(runs):
    flip(runs.copy("damaged"))
    runs.succeed("sharded", "damaged", "--ckpt_path", "last")
    assert "resuming from the one before it" in runs.log.read_text()
    made = runs.folder / "damaged.ckpt"
    assert main(["consolidate", str(runs.at("damaged")), "--out", str(made)]) == 0
    assert not list(differing(load(runs.done("fsdp2")), load(made)))


def test_nothing_in_the_index_is_executed(runs, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    broken = tmp_path / "last.ckpt"
    shutil.copytree(runs.done("sharded"), broken)
    (broken / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="names"):
        read_index(broken)
    with pytest.raises(UserError, match="refused"):
        check_sums(broken)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("entries", "refusal"),
    [
        ({"state_dict": {"kept": Path("a")}}, "holds more than tensors and plain values; refused"),
        (
            {"model": {"weight": torch.ones(2)}},
            "not a checkpoint of this suite (it has no state_dict of tensors alone)",
        ),
    ],
    ids=["a path", "no state_dict"],
)
def test_a_folder_of_something_else_is_refused_in_one_line(entries, refusal, tmp_path, capsys):
    folder = tmp_path / "last.ckpt"
    dcp.save(entries, checkpoint_id=folder, no_dist=True)
    torch.save({}, folder / "meta.pt")
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert str(error.value) == f"{folder}: {refusal}"
    assert main(["consolidate", str(folder), "--out", str(tmp_path / "out.ckpt")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"stableqat: {error.value}"
    assert not (tmp_path / "out.ckpt").exists()


def test_a_full_disk_leaves_no_file(runs, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "one.ckpt"
    assert main(["consolidate", str(runs.done("sharded")), "--out", str(out)]) == 2
    assert f"{out} cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_done_is_said_in_one_line(runs, consolidated, capsys):
    sharded = str(runs.done("sharded"))
    refusals = {
        ("consolidate", str(consolidated)): "not a sharded checkpoint",
        ("consolidate", sharded, "--out", str(consolidated)): "exists already; name a new file",
        (*runs.argv("auto", "new"), "--ckpt_path", sharded): f"stableqat consolidate {sharded}",
        (*runs.argv("sharded", "new"), "--model.quantizer.bits", "3", "--ckpt_path", sharded): (
            "ckpt_path: model.quantizer.bits is 2 in the checkpoint, 3 in the configuration"
        ),
    }
    for argv, refusal in refusals.items():
        assert main(list(argv)) == 2
        assert refusal in capsys.readouterr().err.splitlines()[-1]

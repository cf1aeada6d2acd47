"""A GPU is shared by as many runs as train more together."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from stableqat.studies import sharing
from stableqat.studies.gpus import Slots
from stableqat.studies.sharing import Sharing, logged_speeds


class Machine:
    """Two GPUs whose runs share what a GPU can do."""

    def __init__(self, most, *, memory=(10, 100), unit="tokens_per_s"):
        self.most, self.unit, self.said = most, unit, []
        self.slots = Slots(["0", "1"], 2)
        self.running, self.logged = [], {}
        self.sharing = Sharing(
            self.slots,
            self.said.append,
            speeds_of=lambda folder: {unit: self.logged[folder]} if self.logged[folder] else {},
            memory=lambda gpu: memory and (memory[0] * self.on(gpu), memory[1]),
        )

    def on(self, gpu):
        return sum(job.place == [gpu] for job in self.running)

    def fill(self):
        while place := self.slots.take(1):
            folder = Path(f"run{len(self.logged)}")
            point = SimpleNamespace(folder=folder, verb="fit")
            self.running.append(SimpleNamespace(place=place, point=point))
            self.logged[folder] = []

    def end(self, job):
        self.running.remove(job)
        self.slots.give_back(job.place)

    def log(self):
        for job in self.running:
            together = self.on(job.place[0])
            self.logged[job.point.folder].append(self.most(together) / together)

    def settle(self, looks=60):
        for _ in range(looks):
            self.fill()
            self.log()
            self.sharing.look(self.running)
        self.fill()
        return self.slots.sizes["0"]


def test_runs_that_fill_a_gpu_stay_alone():
    machine = Machine(lambda runs: 100 + runs)
    assert machine.settle() == 1
    assert machine.said == ["runs per GPU: 1 (2 do 102 tokens/s together, 101 with one less)"]
    while len(machine.running) > 2:  # those of the trial end in peace, and have no successors
        machine.end(machine.running[-1])
        machine.fill()
    assert [machine.on("0"), machine.on("1")] == [1, 1]


def test_small_runs_share_until_the_next_brings_nothing():
    machine = Machine(lambda runs: 100 * min(runs, 3), unit="images_per_s")
    assert machine.settle() == 3
    assert machine.said == ["runs per GPU: 3 (4 do 300 images/s together, 300 with one less)"]


def test_memory_and_a_limit_end_the_trial():
    assert Machine(lambda runs: 100 * runs, memory=(30, 100)).settle() == 3
    assert Machine(lambda runs: 100 * runs, memory=None).settle() == 1
    assert Machine(lambda runs: 100 * runs).settle(200) == sharing.MOST


def test_nothing_is_decided_on_few_entries_or_entries_of_before():
    machine = Machine(lambda runs: 100 * runs)
    machine.fill()
    machine.log()
    machine.sharing.look(machine.running)
    assert machine.sharing.runs == 1
    machine.log()
    machine.sharing.look(machine.running)
    assert machine.sharing.runs == 2
    machine.fill()
    machine.log()
    machine.sharing.look(machine.running)
    assert machine.sharing.runs == 2


@pytest.mark.parametrize("there", [True, False])
def test_mps_is_said_where_it_runs(there, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if there:
        (tmp_path / "control").touch()
    machine = Machine(lambda runs: 100 * min(runs, 2))
    machine.settle()
    assert machine.said[0].startswith(
        "runs per GPU: 2, at once by CUDA MPS (" if there else "runs per GPU: 2 ("
    )


def test_speeds_are_read_while_a_run_logs(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    for step, value in ((10, 5.0), (20, 7.0)):
        writer.add_scalar("perf/tokens_per_s", value, step)
        writer.add_scalar("perf/step_ms", value, step)
    writer.flush()
    assert logged_speeds(tmp_path) == {"tokens_per_s": [5.0, 7.0]}

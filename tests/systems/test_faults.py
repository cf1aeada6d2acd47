"""Kills, signals, a full disk, damaged files, a NaN: the run goes on as if nothing had been, or says why not.

Every process is real, and so is every file. What a disturbed run must equal is one run of the same command
that nothing disturbed: each loss that it logs, and its last checkpoint, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
from test_kill import checkpoint, differing, trace

from stableqat.checkpoints.read import check_sums, read_checkpoint
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.events import read_run

STEPS, VALIDATE, SAVE, EPOCH = 40, 8, 3, 24  # all meet at step 24


def arguments(folder: Path, version: str, processes: int = 1) -> list[str]:
    configs = [f"configs/llama/{name}.yaml" for name in ("base", "debug", "dsq")]
    return [
        "fit",
        *[part for config in configs for part in ("-c", config)],
        *f"--trainer.max_steps {STEPS} --trainer.limit_train_batches {EPOCH}".split(),
        *["--trainer.accelerator", "cpu"],
        *f"--trainer.val_check_interval {VALIDATE} --last.every_n_train_steps {SAVE}".split(),
        *["--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"],
        *f"--trainer.limit_val_batches 3 --trainer.strategy {'ddp' if processes > 1 else 'auto'}".split(),
        *f"--trainer.devices {processes} --data.batch_size {4 // processes}".split(),
        *f"--trainer.logger.save_dir {folder} --trainer.logger.name runs".split(),
        *["--model.config.attention_dropout", "0.2", "--trainer.logger.version", version],
        *["--data.source", json.dumps({str(source): 1 for source in sources(folder)})],
        *["--data.cache_dir", str(folder / "cache")],
    ]


def sources(folder: Path) -> list[Path]:
    """Two corpora, mixed 1:1."""
    files = [folder / "books.jsonl", folder / "web.jsonl"]
    for file in files:
        if not file.exists():
            words = random.Random(file.stem)
            texts = [" ".join(str(words.randrange(50)) for _ in range(90)) for _ in range(200)]
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def fault(name: str, **settings) -> list[str]:
    return [
        f"--trainer.callbacks+=faults.{name}",
        *[part for key, value in settings.items() for part in (f"--trainer.callbacks.{key}", str(value))],
    ]


class Place:
    """A folder of runs with its log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.whole = cache(self._whole)

    def run(self, version: str, *extra: str, processes: int = 1) -> list[int]:
        return forked.command([*arguments(self.folder, version, processes), *extra], self.log, processes)

    def resume(self, version: str, *extra: str, processes: int = 1) -> None:
        argv = [*arguments(self.folder, version, processes), *extra, "--ckpt_path", "last"]
        forked.succeed(argv, self.log, processes)

    def said(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("stableqat: ")]

    def at(self, version: str) -> Path:
        return self.folder / "runs" / version

    def names(self, version: str) -> list[str]:
        return sorted(path.name for path in (self.at(version) / "checkpoints").iterdir())

    def _whole(self, processes: int) -> Path:
        assert self.run(f"whole-{processes}", processes=processes) == [0] * processes
        return self.at(f"whole-{processes}")

    def assert_undisturbed(self, version: str, processes: int = 1) -> None:
        whole, other = self.whole(processes), self.at(version)
        different = list(differing(checkpoint(whole), checkpoint(other)))
        # one that a kill cut is counted again when it is made anew; its losses are compared below
        assert not [each for each in different if "val_loop.batch_progress/total/" not in each]
        expected, found = trace(whole), trace(other)
        assert found["val/loss"] == expected["val/loss"]
        assert {step: expected["train/loss"][step] for step in found["train/loss"]} == found["train/loss"]
        # a step is logged after the checkpoint that it ends with; a kill between them loses the entry
        missing = expected["train/loss"].keys() - found["train/loss"].keys()
        assert all((step + 1) % SAVE == 0 for step in missing)
        assert self.names(version) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 20])
def test_kills(number, place):
    """At any time of a run's life, many of them in the middle of writing a checkpoint."""
    kills, versions, finished = 0, iter(range(100)), []
    version = f"killed-{number}-{next(versions)}"
    while kills < number:
        resume = ["--ckpt_path", "last"] if (place.at(version) / "checkpoints" / "last.ckpt").exists() else []
        if not resume:
            shutil.rmtree(place.at(version), ignore_errors=True)
        [code] = place.run(version, *resume, *fault("Doom", seed=kills))
        assert code in (0, -signal.SIGKILL), place.log.read_text()
        kills += code != 0
        if code == 0:
            finished.append(version)
            version = f"killed-{number}-{next(versions)}"
    place.resume(version)
    for each in [*finished, version]:
        place.assert_undisturbed(each)


def test_a_resume_from_the_last_step_of_an_epoch(place):
    stop = ["--trainer.callbacks+=probes.Cut", "--trainer.callbacks.step", str(EPOCH + 1)]
    assert place.run("epoch", *stop) == [-signal.SIGKILL]
    assert checkpoint(place.at("epoch"))["global_step"] == EPOCH
    place.resume("epoch")
    place.assert_undisturbed("epoch")


SIGNALS = {
    "SIGTERM": {"step": 7},
    "SIGUSR1": {"step": 7, "number": int(signal.SIGUSR1)},
    "before a validation": {"step": VALIDATE},
    "in a validation": {"step": VALIDATE, "when": "validation"},
    "between epochs": {"step": EPOCH},
}


@pytest.mark.parametrize(
    "case", [case if "in a" in case else pytest.param(case, marks=pytest.mark.slow) for case in SIGNALS]
)
def test_a_signal_saves_and_ends_with_143(case, place):
    version = case.replace(" ", "-")
    assert place.run(version, *fault("Signal", **SIGNALS[case])) == [143]
    assert checkpoint(place.at(version))["global_step"] in (SIGNALS[case]["step"], SIGNALS[case]["step"] + 1)
    assert "stopped at step" in place.said()[-1]
    place.resume(version)
    place.assert_undisturbed(version)


def test_ctrl_c_ends_with_130(place):
    assert place.run("ctrl-c", *fault("Signal", step=7, number=int(signal.SIGINT))) == [130]
    assert place.said()[-1] == "stableqat: interrupted"
    assert "Traceback" not in place.log.read_text()
    place.resume("ctrl-c")
    place.assert_undisturbed("ctrl-c")


@pytest.mark.parametrize("ranks", [pytest.param("01", marks=pytest.mark.slow), "1"])
def test_all_processes_stop_at_one_step(ranks, place):
    """Whichever gets the signal, and whenever."""
    version = f"signal-to-{ranks}"
    assert place.run(version, *fault("Signal", step=10, ranks=ranks), processes=2) == [143, 143]
    place.resume(version, processes=2)
    place.assert_undisturbed(version, processes=2)


def test_throughput_is_that_of_all_processes(place):
    for processes in (1, 2):
        scalars = read_run(place.whole(processes), ("perf/",)).scalars
        speeds, times = scalars["perf/tokens_per_s"], scalars["perf/step_ms"]
        assert len(speeds) == STEPS - 1
        for step, speed in speeds.items():
            assert speed * times[step] / 1000 == pytest.approx(4 * 32, rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(processes, place):
    version = f"full-{processes}"
    codes = place.run(version, *fault("FullDisk", step=10), processes=processes)
    assert codes == [2] * processes
    line = place.said()[-1]
    assert f"{version}/checkpoints/last.ckpt: step 12 cannot be saved (File too large)" in line
    assert "Traceback" not in place.log.read_text()
    assert checkpoint(place.at(version))["global_step"] == 9
    assert place.names(version) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    place.resume(version, processes=processes)
    place.assert_undisturbed(version, processes)


def test_a_disk_that_is_really_full(place):
    """Event files do not fit either."""
    disk = place.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    small = Place(disk)
    small.log = place.log
    try:
        (disk / "ballast").write_bytes(bytes(9_500_000))
        assert small.run("run") == [2]
        assert "No space left on device" in small.said()[-1]
        assert "Traceback" not in small.log.read_text()
        assert not list(disk.rglob("*.partial"))
        step = checkpoint(small.at("run"))["global_step"]
        assert step > 0
        (disk / "ballast").unlink()
        small.resume("run")
        shutil.copytree(small.at("run"), place.at("small"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert not list(differing(checkpoint(place.whole(1)), checkpoint(place.at("small"))))


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "with a flipped bit": lambda content: (
        content[:300_000] + bytes([content[300_000] ^ 1]) + content[300_001:]
    ),
    "missing": None,
}


@pytest.fixture
def cut(place, request):
    """A run killed after 10 steps, with checkpoints of steps 9 and 6."""
    version = "".join(c if c.isalnum() else "-" for c in request.node.name)
    source = place.at("cut")
    if not source.exists():
        stop = ["--trainer.callbacks+=probes.Cut", "--trainer.callbacks.step", "10"]
        assert place.run("cut", *stop) == [-signal.SIGKILL]
    shutil.copytree(source, place.at(version))
    return version


@pytest.mark.parametrize(
    "case", ["cut short", *(pytest.param(case, marks=pytest.mark.slow) for case in list(DAMAGE)[1:])]
)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(case, place, cut):
    last = place.at(cut) / "checkpoints" / "last.ckpt"
    previous = last.with_name("previous.ckpt")
    if DAMAGE[case] is None:
        last.unlink()
    else:
        last.write_bytes(DAMAGE[case](last.read_bytes()))
    good = previous.read_bytes()
    # killed again when the next last one (the best one comes first) takes its place, it has the good one
    assert place.run(cut, "--ckpt_path", "last", *fault("Doom", place="replace", call=2)) == [-signal.SIGKILL]
    assert torch.load(previous, weights_only=True)["global_step"] == 6
    assert previous.read_bytes() == good
    place.resume(cut)
    told = [line for line in place.said() if "resuming from the one before it" in line]
    assert len(told) <= 1
    place.assert_undisturbed(cut)


def test_what_is_said_of_a_damaged_checkpoint(place, cut, capsys):
    checkpoints = place.at(cut) / "checkpoints"
    (checkpoints / "last.ckpt").write_bytes(b"nothing")
    place.resume(cut)
    assert place.said()[0] == (
        f"stableqat: ckpt_path: {checkpoints}/last.ckpt: not a readable checkpoint (cut short or damaged); "
        f"resuming from the one before it, {checkpoints}/previous.ckpt"
    )


def test_a_damaged_checkpoint_that_is_named_is_refused(place, cut, capsys):
    named = place.at(cut) / "checkpoints" / "last.ckpt"
    named.write_bytes(DAMAGE["with a flipped bit"](named.read_bytes()))
    assert main([*arguments(place.folder, cut), "--ckpt_path", str(named)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"stableqat: ckpt_path: {named}: damaged (")
    assert main([*arguments(place.folder, "new"), "--model.init_from", str(named)]) == 2
    assert f"{named}: damaged" in capsys.readouterr().err


def test_no_flipped_bit_passes(place, tmp_path):
    """torch itself compares no checksums."""
    content = (place.whole(1) / "checkpoints" / "last.ckpt").read_bytes()
    expected = torch.load(place.whole(1) / "checkpoints" / "last.ckpt", weights_only=True)
    chance, file, unnoticed = random.Random(0), tmp_path / "flipped.ckpt", 0
    for _ in range(60):
        at = chance.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
        try:
            check_sums(file)
            read = read_checkpoint(file)
        except UserError:
            continue
        unnoticed += 1  # padding between the parts
        assert not list(differing(expected, read))
    assert unnoticed < 30


def test_a_nan_stops_the_run_and_a_resume_repeats_or_passes_it(place):
    nan = fault("Poison", step=10)
    assert place.run("nan", *nan) == [0]
    assert any("diverged at step 10: the loss is nan" in line for line in place.said())
    for _ in range(2):
        assert checkpoint(place.at("nan"))["global_step"] == 9
        assert read_run(place.at("nan")).last("hp/diverged") == 1
        place.resume("nan", *nan)
    assert any("diverged at step 10: the loss is nan" in line for line in place.said())
    place.resume("nan")  # a fault of the machine does not come again
    assert read_run(place.at("nan")).last("hp/diverged") == 0
    assert trace(place.at("nan"))["train/loss"] == trace(place.whole(1))["train/loss"]
    assert not list(differing(checkpoint(place.whole(1)), checkpoint(place.at("nan"))))

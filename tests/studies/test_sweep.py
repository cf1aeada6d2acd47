"""The sweep with stand-ins for runs: what is started, in which order, and what is left after a cut."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from standin import run

from stableqat.errors import UserError
from stableqat.studies.claim import Claim
from stableqat.studies.gpus import Slots, visible_gpus
from stableqat.studies.job import Job

FOLDER = Path("lightning_logs/demo")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(arms: dict[str, str], extra: str = "") -> str:
    """A study of arms that end as `act` says."""
    lines = [f"    {name}: {{args: {{act: {act}}}}}" for name, act in arms.items()]
    Path("demo.yaml").write_text("\n".join([extra, "grid:", "  arm:", *lines, ""]))
    return "demo.yaml"


def calls() -> list[str]:
    return (FOLDER / "calls.txt").read_text().splitlines()


def calls_of(point: str) -> list[str]:
    return [call.split(" ", 1)[1] for call in calls() if call.split(" ")[0] == point]


def record(point: str) -> dict:
    return json.loads((FOLDER / point / "sweep.json").read_text())


def statuses() -> dict[str, str]:
    return {file.parent.name: record(file.parent.name)["status"] for file in FOLDER.glob("*/sweep.json")}


def begin(path: str) -> subprocess.Popen:
    """Starts a sweep in a process of its own."""
    code = f"import sys, standin; sys.exit(standin.run({path!r}, workers=2))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )


def wait_for(*lines: str) -> None:
    end = time.monotonic() + 300
    while not ((FOLDER / "calls.txt").exists() and set(lines) <= set(calls())):
        assert time.monotonic() < end, "the runs did not come as far"
        time.sleep(0.02)


def test_a_run_starts_its_own_processes_as_the_command_does() -> None:
    """Loader workers in a sweep that import everything anew cost a run more than its training."""
    assert run(write({"arm": "processes"})) == 0
    told = f"starts processes by {multiprocessing.get_start_method()}"
    assert calls_of("arm") == ["began", told, "finished"]


def test_every_way_to_end_costs_its_own_point_alone(capfd: pytest.CaptureFixture[str]) -> None:
    ways = ("refuse", "raise", "kill", "diverge", "finish")
    path = write({act: act for act in ways})
    assert run(path) == 1
    assert statuses() == {
        "refuse": "failed",
        "raise": "failed",
        "kill": "failed",
        "diverge": "diverged",
        "finish": "done",
    }
    assert record("refuse")["error"] == "data.file: there is no file words.txt"
    assert record("raise")["error"] == "RuntimeError: shapes differ"
    assert record("kill")["error"] == "killed by SIGKILL"
    shown = capfd.readouterr().out
    assert f"failed: {FOLDER / 'raise' / 'log.txt'}: RuntimeError: shapes differ" in shown
    assert "working as told" not in shown  # that is in the point's log

    log = (FOLDER / "raise" / "log.txt").read_text()
    command = (FOLDER / "raise" / "command.sh").read_text()
    assert command == (
        "stableqat fit --act raise --trainer.logger.save_dir lightning_logs"
        " --trainer.logger.name demo --trainer.logger.version raise\n"
    )
    assert log.startswith(f"$ {command}")
    assert "working as told: raise" in log
    assert "Traceback" in log

    # The next call tries again what failed, and only that; what the first attempt left is kept.
    assert run(path) == 1
    began = Counter(call.split()[0] for call in calls() if call.endswith("began"))
    assert began == {"refuse": 2, "raise": 2, "kill": 2, "diverge": 1, "finish": 1}
    assert (FOLDER.parent / ".replaced" / "demo" / "raise.1" / "log.txt").read_text() == log


def test_done_points_are_not_run_again() -> None:
    path = write({"a": "finish", "b": "diverge"})
    assert run(path) == 0
    before = calls()
    assert run(path) == 0
    assert calls() == before
    assert run(write({"a": "finish", "b": "diverge", "c": "finish"})) == 0
    assert calls() == [*before, "c began", "c finished"]


def test_a_run_knows_that_a_study_wrote_its_command_line() -> None:
    """What it names is then no word of the user's."""
    assert run(write({"a": "words"})) == 0
    assert "study 1" in calls_of("a")
    assert "STABLEQAT_STUDY" not in os.environ


def test_points_wait_for_the_start_run() -> None:
    assert run(write({"a": "finish", "b": "finish"}, "start: {}")) == 0
    assert calls()[:2] == ["start began", "start finished"]
    assert sorted(calls()[2:]) == ["a began", "a finished", "b began", "b finished"]


def test_a_failed_start_run_fails_only_what_begins_from_it() -> None:
    Path("demo.yaml").write_text(
        "start: {args: {act: refuse}}\ngrid: {arm: {a: , b: {args: {model.init_from: elsewhere}}}}"
    )
    assert run("demo.yaml") == 1
    assert statuses() == {"start": "failed", "b": "done"}
    assert sorted(calls()) == ["b began", "b finished", "start began"]


def test_why_points_were_not_started_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(write({"a": "finish"}, "start: {args: {act: refuse}}")) == 1
    shown = capfd.readouterr().out
    assert f"demo/a: failed: not started: {FOLDER / 'start'} failed" in shown
    assert f"\nfollow: tensorboard --logdir {FOLDER}\n" in shown


def test_a_killed_sweep_goes_on_where_it_stopped() -> None:
    path = write({"saved": "hang-saved", "unsaved": "hang", "later": "finish"})
    killed = begin(path)
    try:
        wait_for("saved hangs", "unsaved hangs")
    finally:
        killed.kill()
        killed.communicate()
    assert statuses() == {"saved": "running", "unsaved": "running"}

    (FOLDER / "go").touch()
    assert run(path) == 0
    assert set(statuses().values()) == {"done"}
    expected = {
        "saved": ["began", "hangs", "resumed from last", "finished"],
        "unsaved": ["began", "hangs", "began", "finished"],
        "later": ["began", "finished"],
    }
    assert {name: calls_of(name) for name in expected} == expected
    assert (FOLDER / "saved" / "log.txt").read_text().count("$ stableqat") == 2  # one folder, both attempts


def test_sweeps_on_one_folder_divide_its_points() -> None:
    path = write({f"p{i}": "place" if i % 2 else "finish" for i in range(12)}, "start: {}")
    sweeps = [begin(path) for _ in range(3)]
    shown = [sweep.communicate(timeout=300)[0].decode() for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0, 0]
    assert Counter(call for call in calls() if call.endswith("began")) == {
        f"{name} began": 1 for name in ("start", *(f"p{i}" for i in range(12)))
    }
    assert set(statuses().values()) == {"done"}
    assert all("13 done in" in text for text in shown)  # each knows of all


def test_another_sweep_takes_over_from_a_killed_one() -> None:
    path = write({"saved": "hang-saved", "later": "finish"})
    killed = begin(path)
    wait_for("saved hangs", "later finished")
    other = begin(path)
    time.sleep(2)
    assert calls_of("saved") == ["began", "hangs"]
    (FOLDER / "go").touch()
    killed.kill()
    killed.communicate()
    other.communicate(timeout=300)
    assert other.returncode == 0
    assert calls_of("saved") == ["began", "hangs", "resumed from last", "finished"]


def test_a_failure_elsewhere_is_not_tried_again_at_once() -> None:
    path = write({"a": "hang-refuse"})
    first = begin(path)
    wait_for("a hangs")
    second = begin(path)
    time.sleep(1.5)
    (FOLDER / "go").touch()
    assert [sweep.wait(timeout=300) for sweep in (first, second)] == [1, 1]
    assert calls_of("a") == ["began", "hangs"]


def test_runs_are_spread_over_the_gpus() -> None:
    path = write({f"p{i}": "place" for i in range(8)}, "runs_per_gpu: 2")
    assert run(path, workers=None, gpus=("3", "5")) == 0
    assert Counter(call.split(" ", 1)[1] for call in calls() if " on " in call) == {"on 3": 4, "on 5": 4}


def test_the_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5a")
    assert visible_gpus() == ["2", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []  # without nvidia-smi
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0; echo 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == ["0", "1"]


def test_a_run_of_several_gpus_has_them_for_itself() -> None:
    slots = Slots(["0", "1", "2"], 6)
    small = slots.take(1)
    large = slots.take(2)
    assert (small, large) == (["0"], ["1", "1", "2", "2"])
    assert slots.take(2) is None
    assert slots.take(1) == ["0"]
    assert slots.take(1) is None
    slots.give_back(large)
    assert slots.take(2) == ["1", "1", "2", "2"]
    path = write({"a": "place"}, "args: {trainer.devices: 3}")
    with pytest.raises(UserError, match=r"trainer\.devices: a run needs 3 GPUs, but there are 2"):
        run(path, gpus=("0", "1"))
    assert run(path, gpus=("0", "1", "2")) == 0
    assert calls_of("a")[1] == "on 0,1,2"


def test_studies_share_a_start_run() -> None:
    first = write({"a": "finish"}, "start: {study: common, args: {x: 1}}")
    Path("other.yaml").write_text("start: {study: common, args: {x: 1}}\ngrid: {arm: {b: }}")
    assert run(first, "other.yaml") == 0
    common = Path("lightning_logs/common")
    assert (common / "calls.txt").read_text().splitlines() == ["start began", "start finished"]
    assert (FOLDER / "study.yaml").read_text() == Path(first).read_text()
    Path("third.yaml").write_text("start: {study: common, args: {x: 2}}\ngrid: {arm: {c: }}")
    with pytest.raises(UserError, match=r"common/start with different settings"):
        run(first, "third.yaml")
    with pytest.raises(UserError, match=r"common/start was made with other settings \(x: 1 -> 2\)"):
        run("third.yaml")


def test_runs_end_with_a_killed_sweep() -> None:
    killed = begin(write({"a": "hang"}))
    wait_for("a hangs")
    with open(FOLDER / "a" / "held") as held:
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        killed.kill()
        killed.communicate()
        end = time.monotonic() + 100
        fcntl.flock(held, fcntl.LOCK_EX)  # waits until the run is gone
        assert time.monotonic() < end, "the run went on without its sweep"


def test_a_stopped_sweep_goes_on() -> None:
    path = write({"a": "hang", "b": "hang", "c": "finish"})
    stopped = begin(path)
    try:
        wait_for("a hangs", "b hangs")
        stopped.send_signal(signal.SIGTERM)
        shown = stopped.communicate(timeout=300)[0].decode()
    finally:
        stopped.kill()
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: the same command resumes from here" in shown
    assert statuses() == {"a": "cut", "b": "cut"}

    (FOLDER / "go").touch()
    assert run(path) == 0
    assert set(statuses().values()) == {"done"}
    assert sum(call.endswith("finished") for call in calls()) == 3


def test_a_signal_to_every_process_stops_a_sweep_in_order() -> None:
    """As `timeout` and SLURM send it."""
    path = write({"a": "hang", "b": "hang"})
    stopped = begin(path)
    wait_for("a hangs", "b hangs")
    os.killpg(stopped.pid, signal.SIGTERM)
    assert stopped.wait(timeout=300) == 128 + signal.SIGTERM
    assert statuses() == {"a": "cut", "b": "cut"}


def test_changed_points_are_run_again_only_on_demand() -> None:
    Path("base.yaml").write_text("trainer: {max_steps: 10}")
    path = write({"a": "finish", "b": "finish"}, "configs: base.yaml")
    assert run(path) == 0
    before = calls()

    Path("base.yaml").write_text("# a comment is no change\ntrainer: {max_steps: 10}")
    assert run(path) == 0
    Path("base.yaml").write_text("trainer: {max_steps: 20}")
    with pytest.raises(
        UserError, match=r"demo/a was made .* \(trainer.max_steps: 10 -> 20\), and so were 1 "
    ):
        run(path)
    write({"a": "finish", "b": "diverge"}, "args: {trainer.max_steps: 10}")
    with pytest.raises(UserError, match=r"demo/b was made with other settings \(act: finish -> diverge\)"):
        run(path)
    assert calls() == before

    (FOLDER / "b" / "mine.txt").touch()
    assert run(path, rerun="changed") == 0
    assert calls() == [*before, "b began", "b finished"]
    assert statuses() == {"a": "done", "b": "diverged"}
    assert (FOLDER.parent / ".replaced" / "demo" / "b.1" / "mine.txt").exists()
    assert not (FOLDER / "b" / "mine.txt").exists()


def test_what_another_sweep_made_with_other_settings_meanwhile_is_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two sweeps of two versions of a study: the second begins as the first is about to."""
    path = write({"a": "finish", "b": "finish"})
    take, others = Claim.take, [lambda: run(write({"a": "diverge"}))]

    def late(claim: Claim) -> bool:
        if others:
            assert others.pop()() == 0
        return take(claim)

    monkeypatch.setattr(Claim, "take", late)
    assert run(path, workers=1) == 1
    assert statuses() == {"a": "diverged", "b": "done"}
    assert not (FOLDER.parent / ".replaced").exists()
    assert (
        "a: failed: lightning_logs/demo/a was made with other settings by another sweep in the meantime"
        in (capfd.readouterr().out)
    )
    write({"a": "finish", "b": "finish"})
    assert run(path, rerun="changed") == 0
    assert statuses() == {"a": "done", "b": "done"}


def test_what_runs_with_other_settings_is_changed() -> None:
    first = begin(write({"a": "hang"}))
    try:
        wait_for("a hangs")
        with pytest.raises(UserError, match=r"demo/a was made with other settings \(act: hang -> finish\)"):
            run(write({"a": "finish"}))
    finally:
        first.terminate()
        first.wait(timeout=300)


@pytest.mark.parametrize(("of", "status"), [("start", None), ("finish", "done"), ("take", None)])
def test_a_folder_that_cannot_be_written_costs_its_own_point_alone(
    of: str, status: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = getattr(Job, of)
    failed = []

    def full(job: Job, *args: Any, **options: Any) -> Any:
        if job.point.name.startswith("c"):
            failed.append(job)
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(job, *args, **options)

    monkeypatch.setattr(Job, of, full)
    path = write({"a": "place", "b": "place", "c1": "finish", "c2": "finish", "c3": "finish", "d": "finish"})
    assert run(path, workers=3) == 1
    others = {"a": "done", "b": "done", "d": "done"}
    assert statuses() == others | ({f"c{i}": status for i in (1, 2, 3)} if status else {})
    assert "demo/c1: failed: [Errno 28] No space left on device" in capfd.readouterr().out
    assert all(job.claim.take() for job in failed)  # they were given back


def test_folders_of_others_are_left_alone() -> None:
    path = write({"a": "finish"})
    (FOLDER / "a").mkdir(parents=True)
    (FOLDER / "a" / "config.yaml").touch()
    with pytest.raises(UserError, match="demo/a was not made by a sweep"):
        run(path)
    (FOLDER / "a" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"demo/a/sweep\.json cannot be read"):
        run(path)
    with pytest.raises(UserError, match="workers: must be at least 1"):
        run(path, workers=0)
    assert not (FOLDER / "calls.txt").exists()


def test_a_sweep_killed_while_it_made_its_first_record_goes_on() -> None:
    """Nothing but a part of the record, or of a folder, lies in the point's folder."""
    for point, name in (("a", ".sweep.json.1.part"), ("b", ".sweep.json.23.part")):
        (FOLDER / point).mkdir(parents=True)
        (FOLDER / point / name).write_text("{")
    (FOLDER / "a" / ".tokenizer.x.part").mkdir()
    (FOLDER / "a" / ".tokenizer.x.part" / "tokenizer.json").touch()
    assert run(write({"a": "finish", "b": "finish"})) == 0
    assert statuses() == {"a": "done", "b": "done"}
    assert not [file for file in FOLDER.rglob("*.part")]
    assert not Path("lightning_logs/.replaced").exists()


@pytest.mark.parametrize("kind", ["file", "loop", "broken link"])
@pytest.mark.parametrize("place", ["lightning_logs/demo", "lightning_logs"])
def test_a_folder_that_can_be_none_is_told_before_anything_runs(kind: str, place: str) -> None:
    Path(place).parent.mkdir(exist_ok=True)
    if kind == "file":
        Path(place).touch()
    else:
        Path(place).symlink_to(Path(place).name if kind == "loop" else "gone")
    with pytest.raises(
        UserError, match=f"{place} is not a folder.* move it away, or set another folder as logs"
    ):
        run(write({"a": "finish"}))


@pytest.mark.parametrize("length", [251, 255, 300])
def test_a_name_that_is_too_long_is_told_before_anything_runs(length: int) -> None:
    with pytest.raises(UserError, match=f"may have 250 characters here, .* {length}: shorten"):
        run(write({"a": "finish", "b" * length: "finish"}))
    assert not FOLDER.exists()
    with pytest.raises(UserError, match="shorten the name of the arm"):
        run(write({"a": "finish"}, f"name: {'n' * length}"))
    assert run(write({"b" * 250: "finish"})) == 0

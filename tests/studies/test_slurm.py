"""Sweeps as job arrays: the real submitit, on this machine and with stand-ins for SLURM's programs."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_sweep import FOLDER, calls, calls_of, statuses, wait_for, write

from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.studies.slurm import submit

BASE = Path(__file__).parents[2] / "configs" / "llama" / "base.yaml"
LOGS = FOLDER / ".slurm"
# A worker of stand-in runs that names itself, and that SLURM's variables must not reach.
WORKER = """
import os, sys, standin
assert not [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]
sys.exit(standin.run("demo.yaml", workers=1, gpus=(str(os.getpid()),)))
"""
COMMAND = [sys.executable, "-c", WORKER]
# As srun, for one task: options away, and its process noted
SRUN = """
while [ "${1#--}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done
echo $$ > srun.pid
exec "$@"
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs named as SLURM's; they note their arguments in `called.txt`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {"sbatch": "echo Submitted batch job 42", "srun": SRUN, "scontrol": ""}.items():
        file = programs / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called.txt\n{body}\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return programs


def options(text: str = "{tasks: 2, timeout_min: 5, cluster: local}") -> str:
    Path("options.yaml").write_text(text)
    return "options.yaml"


def task(number: int) -> subprocess.Popen:
    """Starts a task of job 42 as SLURM does, from another folder."""
    job = {"SLURM_JOB_ID": "43", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": str(number)}
    environment = os.environ | job | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    return subprocess.Popen(
        ["bash", LOGS.absolute() / "42_submission.sh"],
        env=environment,
        cwd=FOLDER,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_tasks_divide_the_points() -> None:
    write({f"p{i}": "place" for i in range(8)})
    jobs = submit(COMMAND, "demo", LOGS, options())
    for job in jobs:
        job.wait()
    assert set(statuses().values()) == {"done"}
    assert Counter(call for call in calls() if call.endswith("began")) == {f"p{i} began": 1 for i in range(8)}
    assert len({call.split(" on ")[1] for call in calls() if " on " in call}) == 2
    for log in LOGS.glob("*_log.out"):
        assert "8 done in" in log.read_text()


def test_the_command_runs_a_study_in_its_task(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"configs: {BASE}",
        "args: {trainer.max_steps: 1, trainer.limit_val_batches: 1, trainer.accelerator: cpu}",
        "grid: {arm: {fp: }, seed: [0, 1]}",
    ]
    Path("demo.yaml").write_text("\n".join(lines))
    one = options("{tasks: 1, timeout_min: 5, cluster: local}")
    assert main(["sweep", "demo.yaml", "--workers", "1", "--slurm", one]) == 0
    shown = capsys.readouterr().out
    assert "points to do: 2; submitted demo as 1 tasks: job " in shown
    assert f"stableqat compare {FOLDER}" in shown
    end = time.monotonic() + 600
    while not list(LOGS.glob("*_result.pkl")):
        logs = "\n".join(log.read_text() for log in LOGS.glob("*_log.out"))
        assert time.monotonic() < end, logs
        assert "Traceback" not in logs, logs
        assert "failed" not in logs, logs
        time.sleep(0.2)
    assert statuses() == {"fp-s0": "done", "fp-s1": "done"}
    assert [len(list(FOLDER.glob(f"fp-s{i}/events.out.tfevents.*"))) for i in range(2)] == [1, 1]

    assert main(["sweep", "demo.yaml", "--slurm", options()]) == 0
    assert "nothing to submit" in capsys.readouterr().out


def test_the_job_array(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": "finish"})
    text = "{tasks: 3, timeout_min: 90, cpus_per_task: 4, gpus_per_node: 1, slurm_partition: long}"
    assert main(["sweep", path, "--rerun", "changed", "--slurm", options(text)]) == 0
    shown = capsys.readouterr().out
    assert "points to do: 1; submitted demo as 3 tasks: job 42\n" in shown
    assert "squeue -j 42" in shown
    assert (tmp_path / "called.txt").read_text().startswith("sbatch ")

    batch = (LOGS / "42_submission.sh").read_text()
    for flag in ("array=0-2%3", "job-name=demo", "time=90", "partition=long", "gpus-per-node=1"):
        assert f"#SBATCH --{flag}\n" in batch
    assert "#SBATCH --signal=USR2@90\n" in batch
    assert "--cpus-per-task=4 " in next(line for line in batch.splitlines() if line.startswith("srun "))

    from submitit.helpers import DelayedSubmission

    worker = DelayedSubmission.load(LOGS / "42_2_submitted.pkl").function
    assert worker.folder == tmp_path
    program = str(Path(sys.executable).with_name("stableqat"))
    assert worker.command == [program, "sweep", str(tmp_path / path), "--rerun=changed"]


def test_a_preempted_task_saves_and_goes_on(slurm: Path, tmp_path: Path) -> None:
    write({"a": "hang-saved", "b": "finish"})
    submit(COMMAND, "demo", LOGS, options("{tasks: 2, timeout_min: 5}"))
    preempted = task(0)
    wait_for("a hangs")
    process = int((FOLDER / "srun.pid").read_text())
    os.kill(process, signal.SIGTERM)  # what SLURM sends first; the runs stop, the task stays
    end = time.monotonic() + 300
    while statuses()["a"] != "cut":
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    assert preempted.poll() is None
    os.kill(process, signal.SIGUSR2)
    preempted.wait(timeout=300)
    assert "scontrol requeue 42_0" in (tmp_path / "called.txt").read_text().splitlines()

    (FOLDER / "go").touch()
    again = task(0)
    again.wait(timeout=300)
    assert again.returncode == 0
    assert set(statuses().values()) == {"done"}
    assert calls_of("a") == ["began", "hangs", "resumed from last", "finished"]


def test_a_task_out_of_time_stops_its_runs_first(slurm: Path, tmp_path: Path) -> None:
    write({"a": "hang"})
    submit(COMMAND, "demo", LOGS, options("{tasks: 2, timeout_min: 5}"))
    late = task(1)
    wait_for("a hangs")
    os.kill(int((FOLDER / "srun.pid").read_text()), signal.SIGUSR2)
    late.wait(timeout=300)
    assert statuses() == {"a": "cut"}
    assert "scontrol requeue 42_1" in (tmp_path / "called.txt").read_text().splitlines()


def test_a_task_ends_as_its_sweep_does(slurm: Path) -> None:
    write({"a": "refuse"})
    submit(COMMAND, "demo", LOGS, options("{tasks: 2, timeout_min: 5}"))
    failed = task(1)
    failed.wait(timeout=300)
    assert failed.returncode == 1
    assert statuses() == {"a": "failed"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{timeout_min: 5}", r"options\.yaml: tasks: None must be the number of array tasks"),
        ("{tasks: 0, timeout_min: 5}", "tasks: 0 must be"),
        ("{tasks: 2}", "timeout_min is missing"),
        ("{tasks: 2, slurm_time: 5}", "unknown key slurm_time: did you mean timeout_min"),
        ("{tasks: 2, partition: a}", "unknown key partition: did you mean slurm_partition"),
        ("{tasks: 2, slurm_partion: a}", "unknown key slurm_partion: did you mean slurm_partition"),
        ("{tasks: 2, gpu_per_node: 1}", "unknown key gpu_per_node: did you mean gpus_per_node"),
        ("{tasks: 2, slurm_nodes: 2}", "slurm_nodes is set by the sweep"),
        ("{tasks: 2, timeout_min: long}", r'options\.yaml: Parameter "timeout_min" expected type'),
        ("{tasks: 2, timeout_min: 5, cluster: pbs}", "cluster: 'pbs' must be slurm or local"),
    ],
)
def test_wrong_options_are_refused(slurm: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        submit(COMMAND, "demo", LOGS, options(text))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "called.txt").exists()


def test_what_slurm_refuses_is_said(slurm: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: long' >&2\nexit 1\n")
    with pytest.raises(UserError, match="SLURM refuses the job: sbatch: error: invalid partition: long"):
        submit(COMMAND, "demo", LOGS, options("{tasks: 2, timeout_min: 5, slurm_partition: long}"))


def test_what_a_sweep_refuses_is_not_submitted(slurm: Path, tmp_path: Path) -> None:
    path = write({"a": "finish"})
    (FOLDER / "a").mkdir(parents=True)
    (FOLDER / "a" / "mine.txt").touch()
    assert main(["sweep", path, "--slurm", options("{tasks: 2, timeout_min: 5}")]) == 2
    assert not (tmp_path / "called.txt").exists()


def test_without_slurm_or_submitit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not installed"):
        submit(COMMAND, "demo", LOGS, options("{tasks: 2, timeout_min: 5}"))
    for name in [name for name in sys.modules if name.split(".")[0] == "submitit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'pip install "stableqat\[slurm\]"'):
        submit(COMMAND, "demo", LOGS, options())


def test_help_imports_no_submitit() -> None:
    lines = ["import sys", "from stableqat.cli.main import main", "main(['sweep', '--help'])"]
    code = "; ".join([*lines, "sys.exit('submitit' in sys.modules)"])
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--slurm" in shown
    assert "timeout_min" in shown

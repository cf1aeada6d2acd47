"""torchrun and SLURM start the processes, tell them to stop, and start them again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stableqat.events import read_run

BIN = Path(sys.executable).parent
DEBUG = [
    *["-c", "configs/llama/debug.yaml", "-c", "configs/llama/ste.yaml", "--trainer.accelerator", "cpu"],
    *["--trainer.val_check_interval", "50", "--last.every_n_train_steps", "5"],
]


def launch(command: list, log: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, **options
    )


def wait_for(path: Path, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow  # each process imports everything
def test_torchrun(tmp_path):
    run, log = tmp_path / "llama" / "run", tmp_path / "log"
    argv = ["fit", "-c", "configs/llama/base.yaml", "-c", "configs/llama/fsdp.yaml", *DEBUG]
    argv += f"--trainer.devices 2 --trainer.logger.save_dir {tmp_path} --trainer.logger.version run".split()
    command = [
        BIN / "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no-python",
        BIN / "stableqat",
        *argv,
    ]
    process = launch([*command, "--trainer.max_steps", "100000"], log)
    wait_for(run / "checkpoints" / "last.ckpt", process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    assert log.read_text().count("stopped at step") == 1
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    done = launch([*command, "--trainer.max_steps", str(step + 3), "--ckpt_path", "last"], log)
    assert done.wait(600) == 0, log.read_text()
    assert read_run(run).last("hp/steps") == step + 3


JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_JOB_NODELIST": "localhost",
}
FAKES = {
    "srun": """#!/bin/bash
shift
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
echo $$ > task
exec "$@"
""",
    "scontrol": """#!/bin/bash
echo "$@" >> scontrol.log
""",
}


@pytest.mark.slow
def test_slurm_script(tmp_path):
    """As far as can be told without SLURM: the job is told, saves, asks to be queued again, goes on."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    environment = JOB | {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    script, log = ["bash", "configs/llama/slurm.sh", *DEBUG, "--trainer.max_steps"], tmp_path / "log"
    checkpoint = tmp_path / "lightning_logs" / "llama" / "train-77" / "checkpoints" / "last.ckpt"

    process = launch([*script, "100000"], log, cwd=tmp_path, env=environment)
    wait_for(checkpoint, process, log)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert process.wait(300) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert not list(tmp_path.glob("hpc_ckpt*"))  # Lightning's own way
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    again = launch([*script, str(step + 3)], log, cwd=tmp_path, env=environment)
    assert again.wait(600) == 0, log.read_text()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step + 3
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


@pytest.mark.parametrize("restarts", [None, 1, 2])
@pytest.mark.parametrize("checkpoint", [None, "last", "previous"])
def test_a_slurm_job_begins_anew_if_it_is_queued_again_before_its_first_checkpoint(
    tmp_path, checkpoint, restarts
):
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$@" > told\n')
    (tmp_path / "srun").chmod(0o755)
    run = tmp_path / "lightning_logs" / "llama" / "train-77"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    if checkpoint is not None:
        (run / "checkpoints" / f"{checkpoint}.ckpt").touch()
    environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    script = Path("configs/llama/slurm.sh").absolute()
    assert subprocess.run(["bash", script], cwd=tmp_path, env=environment).returncode == 0
    assert ("--ckpt_path last" in (tmp_path / "told").read_text()) == (checkpoint is not None)
    anew = checkpoint is None and restarts is not None
    kept = run.with_name(f"train-77.restart{restarts}") if anew else run
    assert [each.parent for each in run.parent.glob("*/config.yaml")] == [kept]

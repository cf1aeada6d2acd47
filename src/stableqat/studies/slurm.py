"""`stableqat sweep --slurm`: the same sweep as the tasks of a SLURM job array, submitted through submitit.

Each array task runs the plain command as a worker on the shared folder, where claims divide the points, so no
point is lost with a task that is preempted, out of time or lost. The options are a YAML file:

    tasks: 8                # array tasks, each of them a worker with the resources below
    timeout_min: 240        # a worker out of time stops its runs, which save, and is queued again
    gpus_per_node: 1
    cpus_per_task: 8
    slurm_partition: gpu    # and so on: any parameter of submitit's AutoExecutor
    cluster: local          # to try it without SLURM: the tasks are processes on this machine
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from stableqat.errors import UserError, first_line
from stableqat.files import writing
from stableqat.studies.pool import PATIENCE
from stableqat.studies.study import Study
from stableqat.studies.yaml_file import check_keys, load_yaml
from stableqat.terminal import terminal

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job
    from submitit.helpers import DelayedSubmission

LOGS = ".slurm"
SET_HERE = ("name", "nodes", "tasks_per_node", "slurm_use_srun")
NEXT_SIGNAL = 600.0  # seconds in which SLURM follows a SIGTERM: USR2 in its grace time, or SIGKILL


class Worker:
    """An array task: runs a command in a separate process, which SLURM's signals stop cleanly.

    The process is separate because the task's own belongs to submitit and its signal handlers, and because a
    run that finds itself in a SLURM job would take the job's layout for its own.

    Args:
        command: The command.
        folder: Where it runs.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command = list(command)
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self) -> None:
        """Run the command; the task ends with its exit code."""
        from submitit.helpers import clean_env

        signal.signal(signal.SIGTERM, self.stop)
        with clean_env():
            environment = dict(os.environ)
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=environment, start_new_session=True
        )
        try:
            while (code := self.process.poll()) is None:
                time.sleep(0.5)
            if self.stopped and code:
                time.sleep(NEXT_SIGNAL)  # a task that ends by itself is not queued again
        finally:
            self.stop()
        if code:
            sys.exit(code)

    def stop(self, _number: int = signal.SIGTERM, _frame: FrameType | None = None) -> None:
        """Ask the command to stop, but only once: a sweep that is asked again kills its runs unsaved."""
        if self.process and not self.stopped:
            self.stopped = True
            self.process.terminate()

    def checkpoint(self) -> "DelayedSubmission":
        """Stop, and return what submitit queues again; called when out of time or preempted."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE + 10)
        return DelayedSubmission(Worker(self.command, self.folder))


def submit_sweep(studies: Sequence[Study], arguments: Sequence[str], left: int, options: str | Path) -> int:
    """Submit a sweep as a job array, and print how to follow it.

    Args:
        studies: The studies; tasks write their logs to the folder of the first.
        arguments: Arguments of `stableqat sweep` for the tasks.
        left: Number of points that are not done yet.
        options: The options file.

    Returns:
        0, at once.
    """
    console = terminal()
    if not left:
        console.print("all points are done: nothing to submit")
        return 0
    name = "+".join(study.name for study in studies)
    logs = studies[0].folder / LOGS
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("stableqat", path=beside) or "stableqat"
    jobs = submit([program, "sweep", *arguments], name, logs, options)
    ids = list(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    console.print(f"points to do: {left}; submitted {name} as {len(jobs)} tasks: job {' '.join(ids)}")
    console.print(f"logs: {' '.join(f'{logs}/{each}_*.out' for each in ids)}")
    from submitit import LocalJob

    watch, cancel = ("ps -p", "kill") if isinstance(jobs[0], LocalJob) else ("squeue -j", "scancel")
    console.print(f"watch: {watch} {','.join(ids)}; stop: {cancel} {' '.join(ids)}")
    folders = " ".join(str(study.folder) for study in studies)
    console.print(f"results so far: stableqat compare {folders}")
    console.print("the same sweep without --slurm takes part here and shows the progress of all")
    return 0


def submit(command: Sequence[str], name: str, logs: Path, options: str | Path) -> "list[Job[None]]":
    """Submit a command as every task of one job array.

    Args:
        command: What each task runs, in the current folder.
        name: Name of the job.
        logs: Folder of the tasks' logs.
        options: The options file.

    Raises:
        UserError: If submitit or SLURM is missing, an option is wrong, or SLURM refuses the job.
    """
    try:
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise UserError('--slurm needs submitit: pip install "stableqat[slurm]"') from error

    tasks, executor = _executor(options, name, logs)
    try:
        return executor.submit_array([Worker(command, Path.cwd())] * tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        said = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(f"{options}: SLURM refuses the job: {said[-1]}") from error


def _executor(path: str | Path, name: str, logs: Path) -> "tuple[int, AutoExecutor]":
    """The number of tasks and the executor of submitit, as the options file says."""
    from submitit import AutoExecutor, SlurmExecutor

    options = load_yaml(path, resolve="")
    native = {f"slurm_{theirs}": key for key, theirs in (SlurmExecutor._equivalence_dict() or {}).items()}
    own = {f"slurm_{key}" for key in SlurmExecutor._valid_parameters()} - set(native)
    for key in options:
        if key in SET_HERE or native.get(key) in SET_HERE:
            raise UserError(f"{path}: {key} is set by the sweep: remove it")
        if key in native:
            raise UserError(f"{path}: unknown key {key}: did you mean {native[key]}?")
    generic = AutoExecutor._valid_parameters()
    known = sorted(({"tasks", "cluster", "local_setup"} | generic | own) - set(SET_HERE))
    check_keys(path, "", options, tuple(known))

    tasks, cluster = options.pop("tasks", None), options.pop("cluster", "slurm")
    if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
        raise UserError(f"{path}: tasks: {tasks!r} must be the number of array tasks, 1 or more")
    if cluster not in ("slurm", "local"):
        raise UserError(f"{path}: cluster: {cluster!r} must be slurm or local")
    if options.get("timeout_min") is None:
        raise UserError(f"{path}: timeout_min is missing: say how many minutes a task may take")
    missing = [program for program in ("sbatch", "srun") if not shutil.which(program)]
    if cluster == "slurm" and missing:
        raise UserError(f"{missing[0]} is not installed: submit from a SLURM machine, or add cluster: local")
    with writing(str(logs), "set another folder as logs"):
        logs.mkdir(parents=True, exist_ok=True)
        executor = AutoExecutor(logs, cluster=cluster)
        try:
            executor.update_parameters(**_completed(options), name=name)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{path}: {first_line(error)}") from error
    return tasks, executor


def _completed(options: dict[str, Any]) -> dict[str, Any]:
    """Add one log per task, and the task's cores, which SLURM's `srun` no longer takes from the job."""
    completed = {"stderr_to_stdout": True} | options
    if cores := options.get("cpus_per_task"):
        completed["slurm_srun_args"] = [f"--cpus-per-task={cores}", *(options.get("slurm_srun_args") or [])]
    return completed

"""Tasks of lm-evaluation-harness, through the installed `lm_eval`.

Tasks are loaded once for all models. A folder of task files (for example YAML with local JSON data) works
without a network; if it has all the tasks asked for, the harness's thousands are not searched.
"""

import copy
import logging
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stableqat.errors import UserError, first_line
from stableqat.evaluate.isolation import quiet
from stableqat.evaluate.processes import Share

DEFAULT = ("piqa", "winogrande", "arc_challenge", "hellaswag", "arc_easy", "sciq", "openbookqa", "boolq")
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own


def task_names(tasks: str) -> list[str]:
    """Split a comma-separated list of names; `default` stands for the eight of `DEFAULT`.

    Raises:
        UserError: If a name is empty or `lm_eval` is not installed.
    """
    names = [each for name in tasks.split(",") for each in (DEFAULT if name == "default" else [name.strip()])]
    if not all(names):
        raise UserError(f"tasks: {tasks} contains an empty name; write --tasks piqa,boolq")
    if missing := [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]:
        raise UserError(f"tasks: need {' and '.join(missing)}; pip install 'stableqat[eval]'")
    return list(dict.fromkeys(names))


def load_tasks(names: list[str], tasks_path: str | None) -> dict[str, Any]:
    """Load tasks and their data.

    Args:
        names: Names of tasks, groups or tags, or paths of task files.
        tasks_path: Folder of further task files.

    Returns:
        Tasks and groups as the harness evaluates them.

    Raises:
        UserError: If a task is unknown or cannot be loaded.
    """
    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise UserError(f"tasks_path: {tasks_path} is not a folder; name one with task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet():
        from lm_eval.tasks import TaskManager

        local = TaskManager(include_path=tasks_path, include_defaults=False)
        own = all(name in local.all_tasks or Path(name).is_file() for name in names)
        manager = local if own else TaskManager(include_path=tasks_path)
        return manager.load([each for name in names for each in _load(manager, name)])


def _load(manager: Any, name: str) -> list[Any]:
    if name not in manager.all_tasks and not Path(name).is_file():
        raise UserError(
            f"tasks: {name} is not a task of lm_eval or of --tasks_path; `lm-eval ls tasks` lists them"
        )
    try:
        loaded = manager.load([name])
    except Exception as error:  # from datasets, the Hub client, the parsers of YAML and templates
        raise UserError(
            f"tasks: {name} cannot be loaded: {first_line(error)}; load it once with a network, which caches "
            "its data (HF_HUB_OFFLINE=1), or name local tasks with --tasks_path"
        ) from error
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def check_documents(tasks: dict[str, Any], limit: int | None, share: Share) -> None:
    """Refuse a task that leaves a process without documents: it would fail while the others wait.

    Args:
        tasks: What `load_tasks` returns.
        limit: Number of documents per task, the first ones; None takes all.
        share: This process's share of the requests.

    Raises:
        UserError: Naming the task.
    """
    for name, task in tasks["tasks"].items():
        with quiet():
            there = len(task.eval_docs)
        if (documents := there if limit is None else min(there, limit)) < share.count:
            more = "" if documents == there else f" (limit; it has {there})"
            raise UserError(
                f"tasks: {name} has {documents} documents{more} for {share.count} processes, and each needs "
                "one; start fewer processes or use more documents"
            )


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    batch_size: int,
    share: Share,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model in memory. Seeds every generator; enter `isolated` first.

    The harness's `simple_evaluate` would also spend ten seconds asking pip and the driver about the machine.

    Args:
        model: Causal language model of transformers, in evaluation mode, on its device.
        tokenizer: Its tokenizer.
        tasks: What `load_tasks` returns.
        batch_size: Requests per forward pass.
        share: This process's share of the requests.
        limit: Number of documents per task, the first ones; None takes all.
        num_fewshot: Examples before each question, for tasks that take any; None takes each task's own
            number.

    Returns:
        The harness's results, with `samples`; None on all processes but the first.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        for task in tasks["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own and num_fewshot is not None):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        return evaluate(_harness_model(model, tokenizer, batch_size, share), tasks, limit=limit)


def _harness_model(model: Any, tokenizer: Any, batch_size: int, share: Share) -> Any:
    """Wrap a model in memory for the harness, on any number of processes.

    The harness assumes a single process for such a model; these three exchanges are all it needs of others.
    """
    from lm_eval.models.huggingface import HFLM

    class LiveModel(HFLM):
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            """Return one entry per process, on every process."""
            return torch.stack(share.gather(tensor)) if share.count > 1 else tensor

        def barrier(self) -> None:
            """Wait for the other processes."""
            share.barrier()

    # the harness opens an autocast region of its own, which takes the caller's type
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    live = LiveModel(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # the harness adds a padding token
        batch_size=batch_size,
        mixed_precision_dtype=dtype,
        softmax_dtype=torch.float32,
    )
    live._rank, live._world_size = share.rank, share.count
    return live


def scores(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by task or group, each metric with its standard error, the documents, examples and version.

    `group` names the group that sums up a task or subgroup, if there is one.
    """
    told: dict[str, dict[str, Any]] = {}
    for task, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, _, name = key.partition(",")
            if isinstance(value, int | float) and name and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{name}")
                stderr = float(error) if isinstance(error, int | float) else None
                metrics[metric if name == "none" else key] = {"value": float(value), "stderr": stderr}
        told[task] = {
            "metrics": metrics,
            "documents": results.get("n-samples", {}).get(task, {}).get("effective"),
            "num_fewshot": results.get("n-shot", {}).get(task),
            "version": results.get("versions", {}).get(task),
            "group": None,
        }
    children = results.get("group_subtasks", {})
    for group in children:
        if told[group]["metrics"]:  # other groups only list their members
            for member in _members(group, children):
                told[member]["group"] = group
    return told


def _members(group: str, children: dict[str, list[str]]) -> Iterator[str]:
    for child in children.get(group, []):
        yield child
        yield from _members(child, children)

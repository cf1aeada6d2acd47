"""`stableqat evaluate`: how good a model is before quantization, after it, and as exported.

It measures perplexity on any text, tasks of lm-evaluation-harness, and top-1, top-5 and confusion on any
images. One table compares all sources; `--baselines true` adds what a run started from, in full precision and
rounded to nearest. torchrun divides the work:
`torchrun --nproc-per-node 4 --no-python stableqat evaluate ...`.
"""

from collections.abc import Sequence
from typing import Any, Literal

from stableqat.errors import UserError, check_range
from stableqat.files import check_source, new_results
from stableqat.terminal import quiet_libraries


def evaluate(
    sources: Sequence[str],
    *,
    data: Sequence[str] = (),
    data_name: str | None = None,
    text_column: str = "text",
    split: Literal["train", "validation", "test"] | None = None,
    documents: Literal["eos", "blank-line"] = "eos",
    block_size: int | None = None,
    stride: int | None = None,
    tasks: str | None = None,
    tasks_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    baselines: bool = False,
    tokenizer: str | None = None,
    batch_size: int = 8,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str | None = None,
    out: str | None = None,
) -> int:
    """Evaluates models: one column of the table per source.

    Args:
        sources: Run folders (their best checkpoints), checkpoints, transformers or timm folders (exported
            ones too), or names of language models on the Hub.
        data: Texts or images to evaluate on: files, folders, tokenized sets, names on the Hub, or runs, which
            stand for their validation data. Default: the validation data of the first run among the sources;
            with tasks, models that it does not fit are evaluated on the tasks alone.
        data_name: Configuration of a data set on the Hub.
        text_column: Column that holds the text.
        split: Split to evaluate, in full. Default: test, else validation, else everything; of a run, the
            validation rows that it validated on (trainer.limit_val_batches).
        documents: How to join a text's documents: eos ends each with EOS, as in training; blank-line
            separates them by blank lines and encodes all as one text, as published WikiText figures do.
        block_size: Tokens per block. Default: that of the run's rows, or 2048, at most what the model takes.
        stride: Tokens by which a window of block_size tokens moves; each token is scored once, given what
            precedes it. Default: blocks do not overlap.
        tasks: Tasks of lm-evaluation-harness, such as piqa,boolq; default stands for piqa, winogrande,
            arc_challenge, hellaswag, arc_easy, sciq, openbookqa and boolq.
        tasks_path: Folder with your own task files (YAML). Python code that they name is run.
        num_fewshot: Examples before each question. Default: each task's own number.
        limit: Use only this many documents per task, the first ones, for a quick look.
        baselines: Also evaluate what a quantized run started from, in full precision and rounded to nearest,
            both with activations in full precision.
        tokenizer: Folder, file or Hub name of a tokenizer. Default: the run's or the folder's.
        batch_size: Blocks, requests or images per forward pass and process.
        dtype: fp32, or bf16 for autocast over float32 weights.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one.
        out: New JSON file for the results, rewritten after each model; a picture of the confusion matrices
            (.png) goes beside it.

    Returns:
        0.
    """
    counts = {"block_size": (block_size, 2), "batch_size": (batch_size, 1), "limit": (limit, 1)}
    for key, (number, least) in {**counts, "num_fewshot": (num_fewshot, 0)}.items():
        if number is not None:
            check_range(key, number, least)
    if tasks is None and (tasks_path or num_fewshot is not None or limit is not None):
        raise UserError("tasks: missing; name the tasks that tasks_path, num_fewshot and limit are for")
    file = None if out is None else new_results(out, ".png")
    for source in sources:
        check_source(source)
    from stableqat.evaluate.tasks import SEEDS, check_documents, load_tasks, task_names

    names = [] if tasks is None else task_names(tasks)
    quiet_libraries()
    # torch is slow to import; mistakes above are refused without it
    from stableqat.evaluate import report
    from stableqat.evaluate.figures import UNRECORDED, Plan, measure
    from stableqat.evaluate.model import find, is_run, labels
    from stableqat.evaluate.processes import processes
    from stableqat.runs import open_run

    home = next((source for source in sources if is_run(source)), None)
    asked = list(data) or ([] if home is None else [home])
    with processes(device) as (share, place):
        with share.first_alone():
            found = [find(source, tokenizer=tokenizer, baselines=baselines) for source in sources]
            if not asked and not names:
                raise UserError("data: missing; name data with --data or tasks with --tasks")
            for each in found:
                if names and each.family == "images":
                    raise UserError(f"tasks: need language models, and {each.name} classifies images")
            loaded = load_tasks(names, tasks_path) if names else {}
        if names:
            check_documents(loaded, limit, share)
        runs = {source: open_run(source) for source in asked if is_run(source)}
        plan = Plan(
            data=labels(asked, of_run=split or "validation"),
            implied=bool(names) and not data,
            runs=runs,
            home=None if home is None else runs.get(home) or open_run(home),
            data_name=data_name,
            text_column=text_column,
            split=split,
            documents=documents,
            block_size=block_size,
            stride=stride,
            tasks=loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            bf16=dtype == "bf16",
        )
        settings = {key: value for key, value in vars(plan).items() if key not in UNRECORDED} | {
            "data": list(plan.data),
            "tasks": names,
            "seeds": SEEDS,
            "dtype": dtype,
            "tokenizer": tokenizer,
            "device": str(place),
            "processes": share.count,
        }
        records: list[dict[str, Any]] = []
        try:
            for load in (load for each in found for load in each.loaders):
                records.append(measure(load(), plan, share, place))
                if share.rank == 0:
                    report.keep(records, settings, file)
        finally:  # also if a later model is damaged or too large
            if share.rank == 0 and records:
                report.show(records, file)
    return 0

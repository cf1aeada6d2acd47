"""Measures one model on its device, computing its quantized weights only once."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from stableqat.data import ImageDataModule, TextDataModule
from stableqat.data.tokenizer import tokenizer_hash
from stableqat.errors import UserError
from stableqat.evaluate import text
from stableqat.evaluate.images import EvaluationImages, classify, part_of
from stableqat.evaluate.isolation import isolated, quiet
from stableqat.evaluate.model import Model
from stableqat.evaluate.perplexity import Windows, blocks, perplexity, strided
from stableqat.evaluate.processes import Share
from stableqat.evaluate.tasks import run_tasks, scores
from stableqat.runs import NoDataError, Run

MOST_TOKENS = 2048  # per block, unless the user or a run says otherwise
UNRECORDED = ("home", "runs", "implied", "bf16")  # fields of `Plan` that results do not list


class MisfitError(UserError):
    """A run's data cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class Plan:
    """What to measure each model on; the other fields are those of `stableqat.evaluate.command.evaluate`.

    Attributes:
        data: Sources of text or images, and their names in the results.
        runs: Those sources that are runs.
        implied: Whether `data` is the default; a model that it does not fit then does without it.
        home: The run whose data settings are the defaults.
        tasks: Tasks as the harness loaded them.
        bf16: Whether to compute under autocast.
    """

    data: dict[str, str]
    runs: dict[str, Run]
    implied: bool
    home: Run | None
    data_name: str | None
    text_column: str
    split: text.Split | None
    documents: text.Join
    block_size: int | None
    stride: int | None
    tasks: dict[str, Any]
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    bf16: bool


def measure(model: Model, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    """Evaluate one model.

    Args:
        model: The model.
        plan: What to measure it on.
        share: This process's share of the work.
        device: Where to compute.

    Returns:
        What the model is, and its figures: `perplexity` by text, `tasks`, or `images` by source; `left_out`
        says why it has no figure on implied data.

    Raises:
        UserError: If data, tokenizer and model do not fit.
    """
    run = model.run
    record: dict[str, Any] = {
        "source": model.source,
        "about": model.about,
        "checkpoint": None if run is None else str(run.checkpoint),
        "step": None if run is None else run.step if model.trained else 0,
        "run": str(run.folder) if run is not None and run.folder is not None and model.trained else None,
    }
    model.network.to(device)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16))
        stack.enter_context(isolated(model.network))
        if model.family == "text":
            return record | _of_text(model, plan, share, device)
        return record | {"images": _of_images(model, plan, share, device)}


def _of_text(model: Model, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"perplexity": {}}
    texts = {}
    try:
        for source in plan.data:
            with share.first_alone():
                texts[source] = _text(source, model, plan)
    except MisfitError as misfit:
        if not plan.implied:
            raise
        found["left_out"] = str(misfit)
    for source, (read, windows) in texts.items():
        told = perplexity(model.network, windows, batch_size=plan.batch_size, device=device, share=share)
        told |= {"data": source, "split": read.split, "documents": read.documents}
        found["perplexity"][plan.data[source]] = told
    if plan.tasks:
        results = run_tasks(
            model.network,
            model.tokenizer,
            plan.tasks,
            batch_size=plan.batch_size,
            share=share,
            limit=plan.limit,
            num_fewshot=plan.num_fewshot,
        )
        if results is not None:
            found["tasks"] = scores(results)
    return found


def _block_size(model: Model, plan: Plan) -> int:
    limit = int(model.network.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    size = plan.block_size
    if size is None:
        size = min(MOST_TOKENS, limit)
        with suppress(NoDataError):
            size = size if plan.home is None else getattr(plan.home.data(), "block_size", size)
    if size > limit:
        kind = MisfitError if plan.block_size is None else UserError
        raise kind(f"block_size: {size} tokens are more than {model.source} takes ({limit}); lower it")
    return size


def _text(source: str, model: Model, plan: Plan) -> tuple[text.Text, Windows]:
    block_size, run = _block_size(model, plan), plan.runs.get(source)
    if run is not None:
        datamodule = _data(source, run, TextDataModule, block_size=block_size)
        if tokenizer_hash(datamodule.tokenizer) != tokenizer_hash(model.tokenizer):
            raise MisfitError(
                f"data: {source} has another tokenizer than {model.source}, so perplexity means nothing; "
                "name a text with --data"
            )
        read = text.run_text(datamodule, plan.split)
        if plan.stride is None and block_size == _data(source, run, TextDataModule).block_size:
            count, there = None if plan.split else run.validated_rows, len(read.rows)
            read = replace(read, split=part_of(read.split, min(count or there, there), there))
            return read, blocks(read.rows, block_size, count)
    else:
        read = text.read_text(
            source,
            model.tokenizer,
            block_size=block_size,
            name=plan.data_name,
            text_column=plan.text_column,
            split=plan.split,
            documents=plan.documents,
        )
    if plan.stride is None:
        return read, blocks(read.rows, block_size)
    return read, strided(read.rows, block_size, plan.stride)


def _of_images(model: Model, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    datamodules, own = {}, {"augment": False, **model.images}
    for source in plan.data:
        if (run := plan.runs.get(source)) is not None:
            datamodule = _data(source, run, ImageDataModule)
            if datamodule.source is not None:  # the built-in digits have one form
                datamodule = _data(source, run, ImageDataModule, **own)
        else:
            home = None if plan.home is None else plan.home.image_arguments
            changes = {"source": source, "name": plan.data_name, "image_column": None, "label_column": None}
            datamodule = EvaluationImages(**{**(home or {}), **changes, **own})
        with share.first_alone():
            datamodule.prepare_data()
        datamodules[source] = datamodule
    found: dict[str, Any] = {}
    for source, datamodule in datamodules.items():
        run = None if plan.split else plan.runs.get(source)
        found[plan.data[source]] = classify(
            model.network,
            datamodule,
            split=plan.split if run is None else "validation",
            rows=None if run is None else run.validated_rows,
            batch_size=plan.batch_size,
            device=device,
            share=share,
        ) | {"data": source}
    return found


def _data(source: str, run: Run, kind: type, **changes: Any) -> Any:
    try:
        datamodule = run.data(**changes)
    except NoDataError as error:
        raise MisfitError(f"data: {source}: {error}; name data with --data") from error
    if not isinstance(datamodule, kind):
        what = "images" if isinstance(datamodule, ImageDataModule) else "text"
        raise UserError(f"data: {source}: the model does not take its {what}; name other data with --data")
    return datamodule

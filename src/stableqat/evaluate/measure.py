"""The figures of one model: it is moved to its device, its quantized weights computed once, and asked."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from stableqat.data import ImageDataModule, TextDataModule
from stableqat.data.tokenizer import tokenizer_hash
from stableqat.errors import UserError
from stableqat.evaluate import text
from stableqat.evaluate.harness import run_tasks, scores
from stableqat.evaluate.images import EvaluationImages, classify, part_of
from stableqat.evaluate.model import Subject, is_run
from stableqat.evaluate.perplexity import Windows, blocks, perplexity, strided
from stableqat.evaluate.processes import Share
from stableqat.evaluate.quiet import quiet
from stableqat.evaluate.undisturbed import undisturbed
from stableqat.runs import NoDataError, open_run

MOST_TOKENS = 2048  # of a block, where neither a user nor a run says


class Misfit(UserError):
    """Data of a run that is not to be had, or on which the model cannot be measured."""


@dataclass(frozen=True)
class Plan:
    """What each model is asked; see `stableqat.evaluate.command.evaluate`.

    Attributes:
        data: Sources of text or images, runs among them, and what they are called in the results.
        implied: Nobody asked for this data; a model that it does not fit does without.
        home: Run whose data settings count where nothing else is said.
        tasks: Tasks as the harness loaded them.
        bf16: Compute under autocast.
    """

    data: dict[str, str]
    implied: bool
    home: str | None
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


def measure(subject: Subject, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    """Evaluate one model.

    Args:
        subject: The model.
        plan: What it is asked.
        share: This process's share of the work.
        device: Where to compute.

    Returns:
        What it is, and its figures: `perplexity` by text, `tasks`, or `images` by source; `left_out` says why
        implied data is.

    Raises:
        UserError: If data, tokenizer and model do not fit.
    """
    checkpoint = None if subject.checkpoint is None else str(subject.checkpoint)
    record: dict[str, Any] = {
        "source": subject.source,
        "about": subject.about,
        "checkpoint": checkpoint,
        "step": subject.step,
        "run": None if subject.run is None else str(subject.run),
    }
    subject.model.to(device)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16))
        stack.enter_context(undisturbed(subject.model))
        if subject.tokenizer is not None:
            return record | _language(subject, plan, share, device)
        return record | {"images": _images(subject, plan, share, device)}


def _language(subject: Subject, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"perplexity": {}}
    texts = {}
    try:
        for source in plan.data:
            with share.first_alone():
                texts[source] = _text(source, subject, plan)
    except Misfit as misfit:
        if not plan.implied:
            raise
        found["left_out"] = str(misfit)
    for source, (read, windows) in texts.items():
        told = perplexity(subject.model, windows, batch_size=plan.batch_size, device=device, share=share)
        told |= {"data": source, "split": read.split, "documents": read.documents}
        found["perplexity"][plan.data[source]] = told
    if plan.tasks:
        results = run_tasks(
            subject.model,
            subject.tokenizer,
            plan.tasks,
            batch_size=plan.batch_size,
            share=share,
            limit=plan.limit,
            num_fewshot=plan.num_fewshot,
        )
        if results is not None:
            found["tasks"] = scores(results)
    return found


def _block_size(subject: Subject, plan: Plan) -> int:
    limit = int(subject.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    size = plan.block_size
    if size is None:
        size = min(MOST_TOKENS, limit)
        with suppress(NoDataError):
            size = size if plan.home is None else getattr(open_run(plan.home).data(), "block_size", size)
    if size > limit:
        kind = Misfit if plan.block_size is None else UserError
        raise kind(f"block_size: {size} tokens are more than {subject.source} takes ({limit}); lower it")
    return size


def _text(source: str, subject: Subject, plan: Plan) -> tuple[text.Text, Windows]:
    block_size = _block_size(subject, plan)
    if is_run(source):
        datamodule = _of_run(source, TextDataModule, block_size=block_size)
        if tokenizer_hash(datamodule.tokenizer) != tokenizer_hash(subject.tokenizer):
            raise Misfit(
                f"data: {source} has another tokenizer than {subject.source}, whose perplexity would say "
                "nothing; name a text with --data"
            )
        read = text.run_text(datamodule, plan.split)
        if plan.stride is None and block_size == _of_run(source, TextDataModule).block_size:
            count, there = _count(source, plan), len(read.rows)
            read = replace(read, split=part_of(read.split, min(count or there, there), there))
            return read, blocks(read.rows, block_size, count)
    else:
        read = text.read_text(
            source,
            subject.tokenizer,
            block_size=block_size,
            name=plan.data_name,
            text_column=plan.text_column,
            split=plan.split,
            documents=plan.documents,
        )
    if plan.stride is None:
        return read, blocks(read.rows, block_size)
    return read, strided(read.rows, block_size, plan.stride)


def _count(run: str, plan: Plan) -> int | None:
    """Of how many rows a run's validation data is what it validated on; None is all, as for a named split."""
    return None if plan.split is not None else open_run(run).validated_rows


def _images(subject: Subject, plan: Plan, share: Share, device: torch.device) -> dict[str, Any]:
    datamodules, own = {}, {"augment": False, **subject.images}
    for source in plan.data:
        if is_run(source):
            datamodule = _of_run(source, ImageDataModule)
            if datamodule.source is not None:  # the digits are as they are
                datamodule = _of_run(source, ImageDataModule, **own)
        else:
            home = None if plan.home is None else open_run(plan.home).image_arguments
            changes = {"source": source, "name": plan.data_name, "image_column": None, "label_column": None}
            datamodule = EvaluationImages(**{**(home or {}), **changes, **own})
        with share.first_alone():
            datamodule.prepare_data()
        datamodules[source] = datamodule
    found: dict[str, Any] = {}
    for source, datamodule in datamodules.items():
        split = "validation" if plan.split is None and is_run(source) else plan.split
        found[plan.data[source]] = classify(
            subject.model,
            datamodule,
            split=split,
            rows=_count(source, plan) if is_run(source) else None,
            batch_size=plan.batch_size,
            device=device,
            share=share,
        ) | {"data": source}
    return found


def _of_run(run: str, kind: type, **changes: Any) -> Any:
    try:
        datamodule = open_run(run).data(**changes)
    except NoDataError as error:
        raise Misfit(f"data: {run}: {error}; name data with --data") from error
    if not isinstance(datamodule, kind):
        what = "images" if isinstance(datamodule, ImageDataModule) else "text"
        raise UserError(
            f"data: {run}'s is {what}, which the model does not take; name other data with --data"
        )
    return datamodule

"""`stableqat predict`: what a model answers, one line per prompt, text or image.

It computes with the weights that `evaluate` measures and `export` writes, the quantized ones. They are
computed once, not for every token.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TextIO

from stableqat.errors import UserError, check_range
from stableqat.files import check_source, new_results, whole_file, writing
from stableqat.predict.inputs import find_images, read_prompts
from stableqat.terminal import progress, quiet_libraries

Write = Callable[[dict[str, Any]], None]


def predict(
    source: str,
    *,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    losses: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    images: Sequence[str] = (),
    top_k: int = 5,
    tokenizer: str | None = None,
    batch_size: int = 8,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str | None = None,
    out: str | None = None,
) -> int:
    """Generates text from prompts, or names the classes of images, as JSON lines.

    Args:
        source: Run folder (its best checkpoint), checkpoint, transformers or timm folder (exported ones too),
            or name of a language model on the Hub.
        prompt: Prompts for a language model.
        prompts: File of prompts: .txt with one per line, or .jsonl with `prompt`, `text` or `messages` (for
            the tokenizer's chat template) in each line.
        losses: Instead of generating, score the prompts: their tokens, and the loss of each in nats.
        max_new_tokens: Most tokens per completion; an end of text ends it earlier.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn, at 1 as the model
            predicts them.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Seed of the draws; another batch_size draws differently.
        images: Images for a vision transformer: files, or folders with all images in and below them.
        top_k: Number of classes per image, the likeliest first.
        tokenizer: Folder, file or Hub name of a tokenizer. Default: the run's or the folder's.
        batch_size: Prompts or images per forward pass.
        dtype: fp32, or bf16 for autocast over float32 weights.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one.
        out: New file for the lines: .jsonl, or .csv for images (one row per image and class). Default:
            stdout.

    Returns:
        0.
    """
    for key, number in {"max_new_tokens": max_new_tokens, "top_k": top_k, "batch_size": batch_size}.items():
        check_range(key, number, 1)
    check_range("temperature", temperature, 0)
    check_range("seed", seed, 0, below=2**64)
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: must be above 0 and at most 1, not {top_p}")
    texts = read_prompts(prompts, prompt, answer=not losses)
    files = find_images(images)
    if bool(texts) == bool(files):
        problem = "cannot be mixed with images" if files else "missing"
        raise UserError(
            f"prompts: {problem}; give --prompts or --prompt to a language model, --images to a ViT"
        )
    generated = not (losses or files)
    drawn, undrawn = generated and temperature > 0, "decides how tokens are drawn, and none is"
    for key, value, used, why in (
        ("losses", losses, not files, "score prompts, and there are none"),
        ("max_new_tokens", max_new_tokens, generated, "limits completions, and none is generated"),
        ("temperature", temperature, generated, undrawn),
        ("top_p", top_p, drawn, undrawn),
        ("seed", seed, drawn, undrawn),
        ("top_k", top_k, bool(files), "counts the classes of images, and there are none"),
    ):
        if not used and value != signature(predict).parameters[key].default:
            remedy = " or set temperature" if generated and why == undrawn else ""
            raise UserError(f"{key}: {why}; leave it out{remedy}")
    file = None if out is None else new_results(out, endings=(".jsonl", ".csv") if files else (".jsonl",))
    check_source(source)
    quiet_libraries()
    # torch is slow to import; mistakes above are refused without it
    import torch

    from stableqat.evaluate.isolation import isolated, quiet
    from stableqat.evaluate.model import find
    from stableqat.evaluate.processes import choose_device
    from stableqat.predict.images import name_classes
    from stableqat.predict.text import generate, token_losses

    place = choose_device(device)
    found = find(source, tokenizer=tokenizer)
    if (found.family == "text") != bool(texts):
        takes = "text, with --prompts or --prompt" if found.family == "text" else "images, with --images"
        raise UserError(f"{source} takes {takes}")
    model = found.loaders[0]()
    model.network.to(place)
    shared: dict[str, Any] = {"batch_size": batch_size, "device": place}
    if files:
        lines = name_classes(model, files, top_k=top_k, **shared)
    elif losses:
        lines = token_losses(model, texts, **shared)
    else:
        drawing: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        lines = generate(model, texts, max_new_tokens=max_new_tokens, **drawing, **shared)
    with ExitStack() as stack:
        write = stack.enter_context(_output(file))
        stack.enter_context(quiet())
        stack.enter_context(torch.autocast(place.type, torch.bfloat16, enabled=dtype == "bf16"))
        stack.enter_context(isolated(model.network))
        torch.manual_seed(seed)
        count = len(texts or files)
        # lines on stdout show by themselves how far it is
        show = (lambda *_: None) if file is None else stack.enter_context(progress(count))
        for number, line in enumerate(lines, 1):
            write(line)
            show(number, f"{number:,} of {count:,}")
    return 0


@contextmanager
def _output(file: Path | None) -> Iterator[Write]:
    if file is None:
        yield partial(_write_json, sys.stdout)
        return
    with (
        writing(f"out: {file}", "nothing is left of it, name another file"),
        whole_file(file) as part,
        part.open("w", encoding="utf-8", newline="") as stream,
    ):
        if file.suffix == ".jsonl":
            yield partial(_write_json, stream)
            return
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("image", "rank", "class", "probability"))
        yield lambda line: rows.writerows(_as_rows(line))


def _write_json(stream: TextIO, line: dict[str, Any]) -> None:
    """Write JSON that people can read, and that neither steers a terminal nor breaks a line."""
    text = json.dumps(line, ensure_ascii=False)
    stream.write("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) + "\n")
    stream.flush()


def _as_rows(line: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for rank, (name, chance) in enumerate(zip(line["classes"], line["probabilities"], strict=True), 1):
        yield line["image"], rank, name, chance

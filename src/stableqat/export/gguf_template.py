"""A GGUF of llama.cpp's converter as the source of a tokenizer, checked to be of the exported model.

What it says about the architecture is compared, not copied: a reader would accept another model's file, and
compute something else.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.export import gguf_header, llama_cpp
from stableqat.export.gguf_header import Field, Header
from stableqat.export.gguf_tokenizer import check_tokens

_OURS = ("general.architecture", "general.file_type", "general.alignment", "split.")
_UNUSED = ("context_length", "rope.scaling.finetuned")  # they do not affect the result
_USUAL = {f"rope.scaling.yarn_{key}": value for key, value in (
    ("ext_factor", 1), ("attn_factor", 1), ("beta_fast", 32), ("beta_slow", 1)
)}  # fmt: skip


def read(path: Path) -> Header:
    """Read a template.

    Raises:
        UserError: If it is not a GGUF.
    """
    try:
        return gguf_header.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"template: {path} cannot be read as GGUF ({error}); make it again") from error


def check(template: Header, model: Any, tokenizer: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse the template of another model.

    Args:
        template: From `read`.
        model: Llama or Qwen3 of transformers.
        tokenizer: The run's, or None.
        shapes: Of the model's tensors, by ggml's names.

    Raises:
        UserError: Naming what differs.
    """
    family = model.config.model_type
    differences = _differences(template, model, shapes)
    if (architecture := template.get("general.architecture")) != family:
        differences = iter([("general.architecture", architecture, family)])
    for key, theirs, own in differences:
        raise UserError(
            f"template: {key} is {theirs} in {template.path}, {own} in the model; make the template from "
            "this model's hf export"
        )
    tokens = template.get("tokenizer.ggml.tokens")
    if tokens is not None and tokenizer is not None:
        check_tokens(tokenizer, tokens, str(template.path))


def kept(template: Header) -> Iterator[tuple[str, Field]]:
    """Yield the metadata outside the architecture: the tokenizer, and the file's description."""
    ours = (*_OURS, f"{template.get('general.architecture')}.")
    return ((key, field) for key, field in template.fields.items() if not key.startswith(ours))


def _differences(
    template: Header, model: Any, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between a template and a model: its name, the template's value, the model's."""
    there = {name: tensor.shape for name, tensor in template.tensors.items()}
    there.pop(llama_cpp.ROPE_FACTORS, None)
    for name in shapes | there:
        if there.get(name) != shapes.get(name):
            yield name, there.get(name, "missing"), shapes.get(name, "missing")
    family = model.config.model_type
    expected = llama_cpp.metadata(model.config)
    ours = [each for each in template.fields.items() if each[0].startswith(f"{family}.")]
    said = {key.removeprefix(f"{family}."): field.value for key, field in ours}
    for key, value in said.items():
        own = expected.get(key, _USUAL.get(key, "missing"))
        if key in _UNUSED or (key.startswith("rope.") and key not in expected | _USUAL):
            continue  # the rotary embedding is compared by its result
        texts = isinstance(own, str) or isinstance(value, str | list)
        if texts or not math.isclose(value, own, rel_tol=1e-6):
            yield f"{family}.{key}", value, own
    try:
        same = llama_cpp.same_rope(model, said, llama_cpp.factors(template))
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # impossible numbers
        same = False
    if not same:
        named = {key: value for key, value in said.items() if key.startswith("rope.")}
        scaled = "with" if llama_cpp.ROPE_FACTORS in template.tensors else "without"
        theirs = f"{named} {scaled} {llama_cpp.ROPE_FACTORS}"
        yield "the rotary embedding", theirs, model.config.rope_parameters
    tokens = template.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != model.config.vocab_size:
        yield "the number of tokens", len(tokens), model.config.vocab_size

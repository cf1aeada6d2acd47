"""GGUF for llama.cpp: one file with the architecture, the weights and, if it is known, the tokenizer.

Names and the order of Llama's query and key rows are ggml's (pairs of a rotary embedding lie side by side).
A tokenizer is written where it is a plain byte-level BPE; for any other, and for scaled rotary embeddings,
upstream's converter makes a file from `--format hf`, and `--template` puts the packed tensors into it.
"""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.export import ggml, hf
from stableqat.export.packed import PackedModel, PackedWeight

FILE = "model.gguf"
_READ = (  # of a configuration, by transformers' reader
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def check(packed: PackedModel) -> None:
    """Refuse what a GGUF has no place for.

    Raises:
        UserError: Naming the layer.
    """
    if packed.family not in ("llama", "qwen3"):
        raise UserError(
            "gguf: llama.cpp has no architecture for timm's vision transformers; take onnx (packed) or hf "
            "(baked)"
        )
    if packed.scale_dtype != torch.float16:
        raise UserError(
            "gguf: ggml's blocks keep their scale in fp16; leave --scale_dtype at fp16, or take "
            "compressed-tensors"
        )
    for name, weight in packed.layers.items():
        if ggml.encoding(weight) is None:
            run = "row" if weight.scale.shape[1] == 1 else "group"
            reason = f"its {run}s of {weight.group_size} weights are no multiple of 32"
            if weight.zero_point and weight.bits > 7:
                reason = f"no type holds the {weight.bits}-bit {weight.grid} grid"
            raise UserError(f"gguf: {name}: {reason}; take compressed-tensors, or torchao")
    if packed.template is not None:
        _check_template(packed)
        return
    rope = packed.model.config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise UserError(
            f"gguf: {rope} rotary embeddings take upstream's converter: export --format hf, run llama.cpp's "
            "convert_hf_to_gguf.py on it, and give its file as --template"
        )


def write(packed: PackedModel, folder: Path) -> None:
    """Write the whole file."""
    import gguf

    writer = gguf.GGUFWriter(folder / FILE, packed.family)
    try:
        if packed.template is not None:
            _copy_template(writer, packed)
        else:
            _write_architecture(writer, packed)
            _write_tokenizer(writer, folder, packed.model.config.vocab_size)
        for name, tensor in packed.rest().items():
            _add_left(writer, packed, name, tensor)
        for name, weight in packed.layers.items():
            _add_packed(writer, packed, name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read(packed: PackedModel, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Weights as gguf's dequantizer has them, and the logits of transformers' model of the file."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    weights = {}
    for name in packed.layers:
        tensor = tensors[_ggml_name(packed, f"{name}.weight")]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        order = _row_order(packed, name)
        values = values if order is None else values[np.argsort(order)]
        weights[name] = torch.from_numpy(values.copy())
    _, logits = hf.load_language_model(packed, folder, gguf_file=FILE, config=_config(packed, folder))
    return weights, logits


def notes(packed: PackedModel) -> list[str]:
    """Which ggml types were taken, and why a wider one."""
    taken = Counter((ggml.encoding(w).type, w.bits, w.grid) for w in packed.layers.values())  # type: ignore[union-attr]
    lines = [
        f"{count} tensors of the {bits}-bit {grid} grid as {kind}"
        for (kind, bits, grid), count in taken.items()
    ]
    if any(w.group_size % 256 for w in packed.layers.values()):
        lines.append(
            "rows or groups that are no multiple of 256 weights take 32-weight blocks, which are wider"
        )
    return lines


def _config(packed: PackedModel, folder: Path) -> Any:
    """What transformers reads comes from the file, so that a wrong value shows, the rest from the model."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    config = copy.deepcopy(packed.model.config)
    for key in _READ + (("head_dim",) if packed.family == "llama" else ()):
        setattr(config, key, getattr(found, key))
    config.rope_parameters["rope_theta"] = found.rope_parameters["rope_theta"]
    return config


def _ggml_name(packed: PackedModel, name: str) -> str:
    import gguf

    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[packed.family]
    names = gguf.get_tensor_name_map(arch, packed.model.config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"{name} has no name in ggml"
    return found


def _row_order(packed: PackedModel, name: str) -> np.ndarray | None:
    """Rows of Llama's query and key weights as ggml has them; None where they stay."""
    part = name.rpartition(".")[2]
    if packed.family != "llama" or part not in ("q_proj", "k_proj"):
        return None
    config = packed.model.config
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return np.arange(heads * config.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _add_packed(writer: Any, packed: PackedModel, name: str, weight: PackedWeight) -> None:
    import gguf

    encoding = ggml.encoding(weight)
    assert encoding is not None, "checked"
    rows, order = encoding.pack(weight), _row_order(packed, name)
    kind = gguf.GGMLQuantizationType[encoding.type]
    name = _ggml_name(packed, f"{name}.weight")
    writer.add_tensor(name, rows if order is None else rows[order], raw_dtype=kind)


def _add_left(writer: Any, packed: PackedModel, name: str, tensor: Tensor) -> None:
    import gguf

    if (order := _row_order(packed, name.rpartition(".")[0])) is not None:  # of weights and biases
        tensor = tensor[torch.from_numpy(order)]
    name = _ggml_name(packed, name)
    if tensor.ndim == 1:  # ggml wants norms and biases so
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _check_template(packed: PackedModel) -> None:
    import gguf

    assert packed.template is not None
    try:
        template = gguf.GGUFReader(packed.template)
        architecture = template.get_field("general.architecture")
        found = None if architecture is None else architecture.contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"template: {packed.template} cannot be read as GGUF ({error})") from error
    rows = {tensor.name: list(map(int, tensor.shape)) for tensor in template.tensors}
    if found != packed.family:
        raise UserError(f"template: {packed.template} is of the architecture {found}, not {packed.family}")
    for name, weight in packed.layers.items():
        own = list(reversed(weight.codes.shape))  # ggml counts the fastest dimension first
        if rows.get(theirs := _ggml_name(packed, f"{name}.weight")) != own:
            raise UserError(
                f"template: {theirs} is {rows.get(theirs)} in {packed.template}, {own} in the model"
            )


def _copy_template(writer: Any, packed: PackedModel) -> None:
    """All metadata, and the tensors that no parameter of ours stands for."""
    import gguf

    assert packed.template is not None
    template = gguf.GGUFReader(packed.template)
    for field in template.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    own = {_ggml_name(packed, name) for name in packed.baked()}
    for tensor in template.tensors:
        if tensor.name not in own:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


def _write_architecture(writer: Any, packed: PackedModel) -> None:
    config = packed.model.config
    writer.add_name(f"{packed.family} of stableqat")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """A byte-level BPE with GPT-2's splitting, which ggml knows by that name; any other is left out."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text()) if file.is_file() else {}
    if not is_plain_bpe(described):
        writer.add_tokenizer_model("none")
        return
    model, added = described["model"], {each["id"]: each for each in described["added_tokens"]}
    vocabulary = {number: token for token, number in model["vocab"].items()}
    vocabulary |= {number: each["content"] for number, each in added.items()}
    numbers = range(max(size, max(vocabulary) + 1))
    control, normal, unused = 3, 1, 5
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary.get(number, f"[UNUSED{number}]") for number in numbers])
    writer.add_token_types(
        [control if n in added else normal if n in vocabulary else unused for n in numbers]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    eos = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    writer.add_eos_token_id(next(n for n, token in vocabulary.items() if token == eos))
    writer.add_add_bos_token(False)


def is_plain_bpe(described: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` splits and joins as GPT-2 does."""
    splitter = described.get("pre_tokenizer") or {}
    return (
        described.get("model", {}).get("type") == "BPE"
        and described.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
    )

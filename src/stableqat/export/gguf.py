"""GGUF for llama.cpp: one file with the architecture, the weights and, if llama.cpp knows it, the tokenizer.

Names and the order of Llama's query and key rows are ggml's (pairs of a rotary embedding lie side by side). A
tokenizer is written if llama.cpp knows its splitter; for any other, llama.cpp's converter makes a file from
`--format hf`, and `--template` takes the tokenizer and everything else outside the architecture from that
file.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableqat.errors import UserError, counted
from stableqat.export import gguf_blocks, gguf_header, gguf_template, gguf_tokenizer, hf, llama_cpp
from stableqat.export.gguf_header import Header
from stableqat.export.packed import PackedModel
from stableqat.quantizers import QuantizedWeight

FILE = "model.gguf"


def check(packed: PackedModel) -> None:
    """Refuse what a GGUF cannot hold, and what llama.cpp would compute differently.

    Raises:
        UserError: Naming the layer, the key or the file.
    """
    hf.check_language_model("gguf", packed)
    if packed.scale_dtype != torch.float16:
        raise UserError(
            "gguf: ggml's blocks store their scale in fp16; leave --scale_dtype at fp16, or take "
            "compressed-tensors"
        )
    for name, weight in packed.layers.items():
        if not gguf_blocks.encodings(weight, packed.target):
            run = "row" if weight.scale.shape[1] == 1 else "group"
            reason, where = (
                f"its {run}s of {weight.group_size} weights are not a multiple of 32",
                "compressed-tensors, or torchao",
            )
            if weight.zero_point and weight.bits > 7:
                reason, where = f"no type holds the {weight.bits}-bit {weight.grid} grid", "torchao"
            raise UserError(f"gguf: {name}: {reason}; take {where}")
    llama_cpp.check(packed.model)
    if packed.template is not None:
        gguf_template.check(packed.template, packed.model, packed.tokenizer, _shapes(packed))
    elif packed.tokenizer is not None:
        gguf_tokenizer.fields(packed.tokenizer, packed.model.config.vocab_size)


def write(packed: PackedModel, folder: Path) -> None:
    """Write the whole file."""
    import gguf

    writer = gguf.GGUFWriter(folder / FILE, packed.family)
    rope, factors = llama_cpp.rope(packed.model)
    try:
        for key, value in (llama_cpp.metadata(packed.model.config) | rope).items():
            _add_value(writer, f"{packed.family}.{key}", value)
        if packed.template is not None:
            for key, field in gguf_template.kept(packed.template):
                inner = None if field.inner is None else gguf.GGUFValueType(field.inner)
                writer.add_key_value(key, field.value, gguf.GGUFValueType(field.type), sub_type=inner)
        else:
            writer.add_name(f"{packed.family} of stableqat")
            tokenizer = {"ggml.model": "none"}
            if packed.tokenizer is not None:
                tokenizer = gguf_tokenizer.fields(packed.tokenizer, packed.model.config.vocab_size)
            for key, value in tokenizer.items():
                _add_value(writer, f"tokenizer.{key}", value)
        if factors is not None:
            writer.add_tensor(llama_cpp.ROPE_FACTORS, factors.numpy())
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
    """Return the weights as ggml dequantizes them, and the logits of the model that llama.cpp loads."""
    file = gguf_header.read(folder / FILE)
    names = [*packed.rest(), *(f"{name}.weight" for name in packed.layers)]
    state = {name: _read_tensor(file, packed, name) for name in names}
    with torch.no_grad():
        logits = llama_cpp.load(file, state)(input_ids=packed.input, use_cache=False).logits
    return {name: state[f"{name}.weight"] for name in packed.layers}, logits


def bytes_packed(packed: PackedModel) -> int:
    """Return the bytes of the quantized weights, without the file's header."""
    return sum(gguf_blocks.size(weight, packed.target) for weight in packed.layers.values())


def notes(packed: PackedModel) -> list[str]:
    """Return which ggml types the file has, why larger ones, and what llama.cpp leaves out."""
    kinds = [gguf_blocks.encodings(weight, packed.target)[0].type for weight in packed.layers.values()]
    taken = Counter(
        f"{weight.bits}-bit {weight.grid} grid as {kind}"
        for weight, kind in zip(packed.layers.values(), kinds, strict=True)
    )
    lines = [f"{counted(count, 'tensor')} of the {what}" for what, count in taken.items()]
    if "TQ2_0" in kinds:
        lines.append(
            "llama.cpp has no CUDA kernel for TQ2_0: for a GPU take --target gpu (Q2_K, a quarter larger)"
        )
    if "Q1_0" in kinds:
        lines.append("Q1_0 is new: an older llama.cpp refuses the file")
    if any(w.group_size % 256 for w in packed.layers.values() if w.bits > 1):
        lines.append(
            "rows or groups that are not a multiple of 256 weights take larger types, in blocks of 32"
        )
    if packed.template is None and packed.tokenizer is not None:
        lines += gguf_tokenizer.notes(packed.tokenizer)
    return lines


def _ggml_name(packed: PackedModel, name: str) -> str:
    import gguf

    arch = gguf.MODEL_ARCH[packed.family.upper()]
    names = gguf.get_tensor_name_map(arch, packed.model.config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"{name} has no name in ggml"
    return found


def _shapes(packed: PackedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, by ggml's names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.rest().items()}
    shapes |= {f"{name}.weight": tuple(weight.codes.shape) for name, weight in packed.layers.items()}
    return {_ggml_name(packed, name): shape for name, shape in shapes.items()}


def _row_order(packed: PackedModel, name: str) -> np.ndarray | None:
    """Return ggml's order of the rows of Llama's query and key weights; None for any other weight."""
    part = name.rpartition(".")[2]
    if packed.family != "llama" or part not in ("q_proj", "k_proj"):
        return None
    config = packed.model.config
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return np.arange(heads * config.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _add_packed(writer: Any, packed: PackedModel, name: str, weight: QuantizedWeight) -> None:
    import gguf

    encoding = gguf_blocks.encodings(weight, packed.target)[0]
    rows, order = encoding.pack(weight), _row_order(packed, name)
    kind = gguf.GGMLQuantizationType[encoding.type]
    name = _ggml_name(packed, f"{name}.weight")
    writer.add_tensor(name, rows if order is None else rows[order], raw_dtype=kind)


def _add_left(writer: Any, packed: PackedModel, name: str, tensor: Tensor) -> None:
    import gguf

    if (order := _row_order(packed, name.rpartition(".")[0])) is not None:  # of weights and biases
        tensor = tensor[torch.from_numpy(order)]
    name = _ggml_name(packed, name)
    if tensor.ndim == 1:  # ggml expects norms and biases in float32
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _read_tensor(file: Header, packed: PackedModel, name: str) -> Tensor:
    values = torch.from_numpy(gguf_blocks.dequantize(file, _ggml_name(packed, name)))
    order = _row_order(packed, name.rpartition(".")[0])
    return values if order is None else values[torch.from_numpy(np.argsort(order))]


def _add_value(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)

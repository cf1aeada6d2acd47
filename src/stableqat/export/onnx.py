"""ONNX with MatMulNBits: onnxruntime multiplies with 2, 4 and 8-bit codes as they are.

The operator computes `scale * (code - zero_point)` with codes that start at 0 and one scale per block of
inputs. The form decides which kernel of onnxruntime runs, and kernels differ in speed by up to 40 times
(`docs/benchmarks.md`):

- Half-integer grids become odd integers if these fit the same width (3 bits take 4 anyway); otherwise their
  zero point, `2^(b-1) - 1/2`, is a float.
- At 2 bits integer grids get a float zero point as well: without one the kernel is 8 times slower.
- With int8 activations only integers in short blocks have a fast kernel, so all grids become those.

Scales have the type of the activations, so a float32 model stores them as float32. A language model's graph
is a function of whole rows of tokens, without cache or mask. The file's metadata holds what a graph cannot
say: that, or a vision transformer's preprocessing and classes. Layers that quantize their input leave as
`qdq` describes.
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stableqat.errors import UserError, one_line
from stableqat.export import hf, qdq
from stableqat.export.packed import PackedModel
from stableqat.ops import Activation
from stableqat.ops.inputs import input_value
from stableqat.ops.operands import Spec
from stableqat.quantizers import QuantizedWeight

FILE = "model.onnx"
LARGEST = 1 << 30  # bytes of constants in the file itself; protobuf stops at two gigabytes
BLOCKS = (256, 128, 64, 32, 16)  # numbers of inputs that may share a scale
_INT8_BLOCK = 128  # the longest block with an int8 kernel for 2 bits
_WHOLE_ROWS = "no key-value cache and no attention mask: a call computes all its tokens; pad on the right"


def check(packed: PackedModel) -> None:
    """Refuse what the operator cannot hold.

    Raises:
        UserError: Naming the layer.
    """
    if packed.dtype != torch.float32:
        raise UserError("onnx: the graph computes in float32; leave --dtype at fp32")
    qdq.check(packed)
    static = qdq.static_inputs(packed)
    for name, weight in packed.layers.items():
        if isinstance(packed.model.get_submodule(name), nn.Embedding):
            raise UserError(
                f"onnx: MatMulNBits has no look-up ({name}); leave embeddings alone, or without quantized "
                "inputs take gguf or torchao"
            )
        if weight.zero_point and weight.bits == 8:
            raise UserError(
                f"onnx: {name} has the 8-bit {weight.grid} grid, but half-integer zero points end at 4 bits; "
                f"{packed.elsewhere('torchao')}"
            )
        if name in static:  # standard operators, which take groups of any size and any scale
            continue
        if stored_form(weight, packed.int8_activations).zero_point and packed.scale_dtype == torch.float32:
            raise UserError(
                "onnx: onnxruntime multiplies the scale by code and zero point apart, which rounds float32 "
                "scales of half-integer grids; take --scale_dtype fp16 or bf16"
            )
        if weight.scale.shape[1] > 1 and weight.group_size % BLOCKS[-1]:
            raise UserError(
                f"onnx: {name} has one scale per {weight.group_size} weights, MatMulNBits one per "
                f"{BLOCKS[-1]} or a multiple; {packed.elsewhere('compressed-tensors', 'hf')}"
            )


def notes(packed: PackedModel) -> list[str]:
    """Return how each grid is stored, what int8 activations mean, and what the graph takes."""
    static = qdq.static_inputs(packed)
    counts: Counter[str] = Counter()
    for name, weight in packed.layers.items():
        form = weight.integers() if name in static else stored_form(weight, packed.int8_activations)
        codes = "codes" if form is weight else "odd integers"
        width = qdq.form(packed, name) if name in static else f"{_width(form.bits)}-bit"
        counts[f"{weight.bits}-bit {weight.grid} grid as {width} {codes}"] += 1
    lines = [f"{count} layers of the {form}" for form, count in counts.items()] + qdq.notes(packed)
    if packed.int8_activations:
        lines.append("onnxruntime rounds activations to int8: its logits are no longer the model's")
    return lines if packed.family == "vit" else [*lines, _WHOLE_ROWS]


def write(packed: PackedModel, folder: Path) -> None:
    """Trace the model with an operator for each quantized layer.

    Raises:
        UserError: If torch cannot export the model.
    """
    import onnx_ir as ir

    model: Any = packed.plain()
    _check_calls(model, packed)
    inputs = {name: quantizer.activation() for name, quantizer in packed.inputs.items()}
    place_operators(
        model,
        packed.layers,
        inputs,
        int8_activations=packed.int8_activations,
        storage_bits=packed.storage_bits,
    )
    is_text = packed.module.family == "text"
    called = _Logits(model).eval() if is_text else model
    codes = _number_layers(called)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = {0: batch, 1: length} if is_text else {0: batch}
    try:
        program: Any = torch.onnx.export(
            called,
            (packed.input[:1].repeat_interleave(2, dim=0),),  # a batch of one would become a constant
            input_names=[packed.module.input_key],
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            opset_version=qdq.OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # whatever the model's own code raises
        cause = f"onnx: torch cannot export this model ({_cause(error)})"
        raise UserError(f"{cause}; {packed.elsewhere('hf')}") from error
    program.model.metadata_props.update(_metadata(packed))
    graph = program.model.graph
    for name, held in codes.items():
        graph.initializers[name].const_value = ir.tensor(held.numpy(), name=name)
    qdq.set_types(graph, called)
    for node in graph:  # where it is in the source would fill most of a small file
        node.metadata_props.clear()
        node.doc_string = None
    held = sum(each.const_value.nbytes for each in graph.initializers.values())
    program.save(folder / FILE, external_data=held > LARGEST)


def read(packed: PackedModel, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights as onnxruntime's operators multiply by them, and its logits."""
    import onnx

    session = open_session(folder / FILE)
    (logits,) = session.run(None, {session.get_inputs()[0].name: packed.input.numpy()})
    graph = onnx.load(str(folder / FILE)).graph
    constants = {each.name: each for each in graph.initializer}
    weights = {}
    for node in graph.node:
        if (name := layer_of(node, packed)) is not None:
            weights[name] = torch.from_numpy(_multiplied(node, constants))
    return weights, torch.from_numpy(logits)


def open_session(file: Path) -> Any:
    """Open a file in onnxruntime, with integer products that do not saturate on any CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def layer_of(node: Any, packed: PackedModel) -> str | None:
    """The layer whose weight an operator of a file holds; None if it holds none."""
    place = {"MatMulNBits": 1, "DequantizeLinear": 0}.get(node.op_type)
    if place is None or not (codes := node.input[place]).endswith(".codes"):
        return None
    prefix = f"{_Logits.PREFIX}." if packed.module.family == "text" else ""
    return str(codes.removeprefix(prefix).removesuffix(".codes"))


def _check_calls(model: nn.Module, packed: PackedModel) -> None:
    """Refuse layers whose weight the model reads itself: an operator replaces a call."""
    unused = list(packed.layers)
    with ExitStack() as hooks, torch.no_grad():
        for name in packed.layers:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, name=name: unused.remove(name)))
        model(packed.input[:1])
    if unused:
        raise UserError(
            f"onnx: {unused[0]} is not called: the model reads its weight itself, or does not use it; "
            f"{packed.elsewhere('hf')}"
        )


def _cause(error: BaseException) -> str:
    """Return the message of the first exception of a chain, in one line."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {one_line(error)}"


def _metadata(packed: PackedModel) -> Mapping[str, str]:
    if packed.family != "vit":
        return {"input_ids": f"(batch, tokens); {_WHOLE_ROWS}"}
    settings = hf.image_settings(packed) | ({} if packed.classes is None else {"classes": packed.classes})
    return {key: x if isinstance(x, str) else json.dumps(x) for key, x in settings.items()}


def stored_form(weight: QuantizedWeight, int8_activations: bool = False) -> QuantizedWeight:
    """Return the same values in the form that the operator multiplies by fastest."""
    free = _width(weight.bits) == _width(weight.bits + 1)
    return weight.integers() if free or int8_activations else weight


class MatMulNBits(nn.Module):
    """A linear layer that exports as the operator; it computes nothing in torch.

    Args:
        weight: The quantized weight.
        bias: Added to the product.
        int8_activations: Whether the operator may round its input to int8, per block, which is not exact.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, *, int8_activations: bool = False
    ) -> None:
        super().__init__()
        weight = stored_form(weight, int8_activations)
        rows, inputs = weight.codes.shape
        self.bits = _width(weight.bits)
        self.accuracy_level = 4 if int8_activations else 1
        self.block = _block(weight, _INT8_BLOCK if int8_activations else BLOCKS[0])
        lowest = -(2 ** (self.bits - 1)) if weight.zero_point == 0 else -(2 ** (weight.bits - 1))
        blocks, per_byte = -(-inputs // self.block), 8 // self.bits
        stored = torch.zeros(rows, blocks * self.block, dtype=torch.uint8)
        stored[:, :inputs] = (weight.codes.to(torch.int16) - lowest).to(torch.uint8)
        shifts = torch.arange(per_byte, dtype=torch.uint8) * self.bits
        parts = stored.view(rows, blocks, -1, per_byte) << shifts
        scale = weight.scale_of_blocks(self.block)
        given = weight.zero_point != 0 or (self.bits == 2 and not int8_activations and _is_short(scale))
        zero = torch.full_like(scale, weight.zero_point - lowest) if given else None
        self.register_buffer("codes", parts.sum(-1, dtype=torch.uint8))
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("zero_point", None if zero is None else zero.flatten())
        self.shape, self.bias = (rows, inputs), bias

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        buffers: list[Any] = [x for x in (self.codes, self.scale, self.zero_point) if x is not None]
        rows, inputs = self.shape
        attributes: Any = {"K": inputs, "N": rows, "bits": self.bits, "block_size": self.block}
        product = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (input, *buffers),
            attributes | {"accuracy_level": self.accuracy_level},
            dtype=input.dtype,
            shape=(*input.shape[:-1], rows),
            version=1,
        )
        return product if self.bias is None else product + self.bias


_OPERATORS = MatMulNBits, qdq.QDQLinear


def place_operators(
    model: nn.Module,
    layers: Mapping[str, QuantizedWeight],
    inputs: Mapping[str, Activation] | None = None,
    *,
    int8_activations: bool = False,
    storage_bits: int | None = None,
) -> None:
    """Replace linear layers by operators.

    Args:
        model: A plain model, changed in place.
        layers: Weights by layer name.
        inputs: How inputs are quantized, by layer name.
        int8_activations: See `MatMulNBits`.
        storage_bits: See `qdq.QDQLinear`.
    """
    for name, weight in layers.items():
        layer: Any = model.get_submodule(name)
        made = None if inputs is None else inputs.get(name)
        operator: nn.Module
        if made is not None and made.operands.scale is not None:
            operator = qdq.QDQLinear(weight, layer.bias, made, storage_bits)
        else:
            operator = MatMulNBits(weight, layer.bias, int8_activations=int8_activations)
        for hook in layer._forward_pre_hooks.values():  # a patch embedding's, which cut the image
            operator.register_forward_pre_hook(hook)
        if made is not None and made.operands.scale is None:
            operator.register_forward_pre_hook(partial(_round_tokens, made))
        for hook in layer._forward_hooks.values():
            operator.register_forward_hook(hook)
        model.set_submodule(name, operator)


def _number_layers(model: nn.Module) -> dict[str, Tensor]:
    """Take out the codes and leave a number per layer: the exporter makes one of small equal layers."""
    found: dict[str, Tensor] = {}
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _OPERATORS))
    for number, (name, layer) in enumerate(layers):
        codes = found[f"{name}.codes"] = layer.get_buffer("codes")
        layer.codes = torch.zeros_like(codes)
        digits = torch.tensor([number % 128, number // 128], dtype=codes.dtype)
        layer.codes.view(-1)[:2] = digits[: codes.numel()]
    return found


def _round_tokens(made: Activation, _: nn.Module, args: tuple[Tensor]) -> Tensor:
    (input,) = args
    return input_value(input, made.operands, Spec(made.grid, made.surrogate, input.dtype))


def _width(bits: int) -> int:
    """Return the operator's width for codes of this many bits."""
    return next((width for width in (2, 4) if bits <= width), 8)


def _block(weight: QuantizedWeight, longest: int) -> int:
    """Return the inputs per scale: at most a group; with one scale per row, not mostly padding."""
    inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
    fits = [b for b in BLOCKS if (b < 2 * inputs if groups == 1 else weight.group_size % b == 0)]
    return next((b for b in fits if b <= longest), BLOCKS[-1])


def _is_short(scale: Tensor) -> bool:
    """Whether three times a scale is exact; then scale times code minus scale times zero point is, too."""
    return torch.equal((3 * scale).double(), 3 * scale.double())


class _Logits(nn.Module):
    """A language model as a function of its tokens."""

    PREFIX = "model"  # of its parameters' names

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _multiplied(node: Any, constants: dict[str, Any]) -> np.ndarray:
    """Return the weight of an operator: dequantized, or the product with the identity, one term per sum.

    The codes, scales and zero points are the file's; the product is always in float32.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    alone = type(node)()
    alone.CopyFrom(node)
    alone.output[0] = "y"
    given, shape = {}, [None, None]
    if node.op_type == "MatMulNBits":
        alone.input[0] = "x"
        attributes = {each.name: each for each in alone.attribute}
        attributes["accuracy_level"].i = 1
        given = {"x": np.eye(attributes["K"].i, dtype=np.float32)}
    graph = helper.make_graph(
        [alone],
        "weight",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in given.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [constants[name] for name in node.input if name in constants],
    )
    domains = [helper.make_opsetid("", qdq.OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (transposed,) = session.run(None, given)
    return np.ascontiguousarray(transposed.T)

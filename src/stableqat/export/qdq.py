"""QuantizeLinear and DequantizeLinear: how a layer that quantizes its input leaves as ONNX.

With one scale for all tokens a layer becomes standard operators: `input - offset`, Clip, QuantizeLinear,
DequantizeLinear, MatMul with DequantizeLinear of integer weights, `+ bias`. Each step is training's
(`ops.inputs`), in its order and in float32, so equal inputs have equal codes:

- Codes are unsigned. The zero point is the code of 0: `2^(b-1)` for signed ones, which begin at `-2^(b-1)`.
- A learned offset is no whole number of steps, so no zero point holds it. It is subtracted before, and what
  it adds to an output, `offset * sum(weight)`, is in the bias. An Add after DequantizeLinear would part it
  from MatMul, and onnxruntime then rounds the activations anew.
- 4-bit codes are UINT4, others UINT8. Clip ends codes that are narrower than that; onnxruntime does not load
  it before UINT4.

With a scale per token, plain operators round the input, and the weight is MatMulNBits as without quantized
inputs. The trade-off of the weights' type: INT4 halves a file, but onnxruntime multiplies only INT8 as
integers.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.export.packed import PackedModel
from stableqat.ops import Activation, InputOperands, acting_scale
from stableqat.quantizers import QuantizedWeight

OPSET = 21  # of the operators: the first with four bits


class QDQLinear(nn.Module):
    """A linear layer that exports as standard operators; it computes nothing in torch.

    Attributes:
        weight_width: Bits of the type of the weight's integers, 4 or 8.
        input_width: Bits of the type of the input's codes, 4 or 8.

    Args:
        weight: The quantized weight.
        bias: Added to the product.
        input: How the layer's input is quantized, with one scale.
        storage_bits: See `PackedModel`.
    """

    offset: Tensor | None
    bias: Tensor | None
    input_zero_point: Tensor

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, input: Activation, storage_bits: int | None = None
    ) -> None:
        super().__init__()
        weight = weight.integers()
        operands, grid, _ = input
        step = step_of(operands)
        assert step is not None
        step = step.float().reshape(())
        lowest = 0 if operands.lowest is None else int(operands.lowest)
        ends = [code * step for code in (lowest, lowest + 2**grid.bits - 1)]
        offset = None if operands.offset is None else operands.offset.float().reshape(())
        if offset is not None:
            own = 0 if bias is None else bias.double()
            bias = (own + offset.double() * weight.dequantize().double().sum(1)).float()
        self.weight_width = weight_width(weight, storage_bits)
        self.input_width = input_width(grid.bits, storage_bits)
        self.block = weight.group_size if weight.scale.shape[1] > 1 else 0
        self.clips = grid.bits < self.input_width
        buffers = {
            "codes": weight.codes.t(),
            "scale": weight.scale.t().squeeze(0),
            "bias": bias,
            "input_scale": step,
            "input_zero_point": torch.tensor(-lowest, dtype=torch.uint8),
            "offset": offset,
            "lowest": ends[0] if self.clips else None,
            "highest": ends[1] if self.clips else None,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, None if buffer is None else buffer.detach().contiguous())

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        if self.offset is not None:
            input = input - self.offset
        if self.clips:
            input = _operator("Clip", input, self.lowest, self.highest)
        by = self.input_scale, self.input_zero_point
        input = _operator("DequantizeLinear", _operator("QuantizeLinear", input, *by, dtype=torch.uint8), *by)
        axis: dict[str, Any] = {"axis": 0, "block_size": self.block} if self.block else {"axis": 1}
        product = input @ _operator("DequantizeLinear", self.codes, self.scale, **axis)
        return product if self.bias is None else product + self.bias


def _operator(name: str, *inputs: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    shape = inputs[0].shape
    return torch.onnx.ops.symbolic(name, inputs, options, dtype=dtype, shape=shape, version=OPSET)


def step_of(operands: InputOperands) -> Tensor | None:
    """The scale that acts; None if each token has its own."""
    if operands.scale is None or operands.scale_floor is None:
        return operands.scale
    return acting_scale(operands.scale, operands.scale_floor)


def weight_width(weight: QuantizedWeight, storage_bits: int | None) -> int:
    """The bits in which a weight's integers are stored."""
    return 8 if storage_bits == 8 or weight.integers().bits > 4 else 4


def input_width(bits: int, storage_bits: int | None) -> int:
    """The bits of the type of an input's codes."""
    return 4 if bits == 4 and storage_bits != 8 else 8


def static_inputs(packed: PackedModel) -> dict[str, Activation]:
    """The inputs with one scale for all tokens, by layer."""
    made = {name: quantizer.activation() for name, quantizer in packed.inputs.items()}
    return {name: each for name, each in made.items() if each.operands.scale is not None}


def check(packed: PackedModel) -> None:
    """Refuse what the operators cannot hold or onnxruntime does not run.

    Raises:
        UserError: Naming the layer or the option.
    """
    if packed.int8_activations and packed.inputs:
        raise UserError(
            "int8_activations: this run quantizes its inputs by itself, which the file holds; leave it out"
        )
    static = static_inputs(packed)
    if packed.storage_bits is not None and not static:
        raise UserError(
            "storage_bits: onnx stores integers of a chosen width only beside inputs with one scale "
            "(LSQ, LSQPlus); leave it out"
        )
    for name, weight in packed.layers.items():
        if name in packed.inputs and weight.zero_point and weight.bits == 8:
            raise UserError(
                f"onnx: {name} needs 9-bit integers for its 8-bit {weight.grid} grid; train the integer grid"
            )
        if name not in static:
            continue
        wide = weight.integers().bits
        if packed.storage_bits is not None and wide > packed.storage_bits:
            raise UserError(f"storage_bits: {name} needs {wide}-bit integers; leave it out, or take 8")
        if weight_width(weight, packed.storage_bits) == 8 and weight.scale.shape[1] > 1:
            remedy = "leave --storage_bits out" if wide <= 4 else "train with one scale per row"
            raise UserError(
                f"onnx: {name} has one scale per {weight.group_size} weights, and onnxruntime does not run "
                f"8-bit integers in groups beside quantized inputs; {remedy}"
            )


def set_types(graph: Any, model: nn.Module) -> None:
    """Give 4-bit codes their type, which torch does not have, and 8-bit weights a zero point of their own.

    Without one, or with one that layers share, onnxruntime makes a graph that fails from its option
    session.x64quantprecision.

    Args:
        graph: Of the exported program, changed in place.
        model: What was exported.
    """
    from onnx_ir import DataType

    for name, layer in model.named_modules():
        if not isinstance(layer, QDQLinear):
            continue
        codes = graph.initializers[f"{name}.codes"]
        ((dequantize, _),) = codes.uses()
        if layer.input_width == 4:
            ((product, _),) = dequantize.outputs[0].uses()
            of_input = product.inputs[0].producer()
            zero_point = _constant(graph, f"{name}.input_zero", layer.input_zero_point, DataType.UINT4)
            for node in (of_input, of_input.inputs[0].producer()):
                node.replace_input_with(2, zero_point)
            of_input.inputs[0].dtype = DataType.UINT4
        if layer.weight_width == 4:
            codes.const_value = _tensor(codes.const_value.numpy(), codes.name, DataType.INT4)
            codes.dtype = DataType.INT4
        else:
            zeros = torch.zeros(codes.shape[1], dtype=torch.int8)
            dequantize.resize_inputs(3)
            dequantize.replace_input_with(2, _constant(graph, f"{name}.zero_point", zeros, DataType.INT8))
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _constant(graph: Any, name: str, values: Tensor, dtype: Any) -> Any:
    from onnx_ir import Value

    made = Value(name=name, const_value=_tensor(values.numpy(), name, dtype))
    graph.register_initializer(made)
    return made


def _tensor(values: np.ndarray, name: str | None, dtype: Any) -> Any:
    from onnx_ir import Tensor

    return Tensor(values.astype(dtype.numpy()), name=name)


def form(packed: PackedModel, name: str) -> str:
    """How the integers of a layer with a static input are stored."""
    return f"INT{weight_width(packed.layers[name], packed.storage_bits)}"


def notes(packed: PackedModel) -> list[str]:
    """Return how quantized inputs are held, and what onnxruntime makes of them."""
    static = static_inputs(packed)
    counts: Counter[str] = Counter()
    for name, quantizer in packed.inputs.items():
        if name in static:
            width = input_width(quantizer.bits, packed.storage_bits)
            held = f"as UINT{width}" + (" behind a Clip" if quantizer.bits < width else "")
        else:
            held = "by operators in float"
        counts[f"{quantizer.in_words} {held}"] += 1
    lines = [f"inputs of {count} layers: {what}" for what, count in counts.items()]
    weights = [packed.layers[name] for name in static]
    widths = {weight_width(weight, packed.storage_bits) for weight in weights}
    widths |= {input_width(packed.inputs[name].bits, packed.storage_bits) for name in static}
    if 4 in widths and all(weight.scale.shape[1] == 1 for weight in weights):
        lines.append(
            "onnxruntime multiplies 4-bit types in float; with --storage_bits 8 it multiplies the same codes "
            "as integers, in a larger file"
        )
    if any(weight.integers().bits == 8 for weight in weights):
        lines.append(
            "on x86 CPUs without VNNI set onnxruntime's session.x64quantprecision to 1: its products with "
            "8-bit weights saturate there"
        )
    return lines

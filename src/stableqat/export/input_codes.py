"""Proof that the quantized inputs of an ONNX file are training's.

Sums are rounded in another order in another runtime, so a value near a threshold may get the neighbouring
code, and every layer after it then sees other values: logits of two exact runtimes can differ by more than
rounding. What is compared is therefore each part on its own. onnxruntime computes a row and shows what flows
into each layer and the codes it becomes. From that same input training's quantizer must make the same codes,
all of them. The model, given these codes in place of its own, must make the same inputs of the next layers
and the same logits, up to the order of sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.export.onnx import FILE, layer_of, open_session
from stableqat.export.packed import PackedModel
from stableqat.export.qdq import input_width, step_of
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers.inputs import InputQuantizer

_ELEMENTS = 2**27  # of inputs are enough: longer rows of tokens are cut, and further rows left out


@torch.no_grad()
def compare_inputs(packed: PackedModel, folder: Path, tolerance: float) -> dict[str, float]:
    """Compare the inputs of a file's layers with the model's, row by row of the batch.

    Args:
        packed: The model, with quantized inputs.
        folder: Where its file is.
        tolerance: By how much sums may differ, of the largest value.

    Returns:
        `inputs`, the number of values compared; `inputs_on_other_codes`, how many of them the model itself
        puts on another code, because a sum before them was rounded differently; and
        `max_logit_difference_on_equal_codes`.

    Raises:
        UserError: If codes, inputs or logits differ otherwise.
    """
    quantizers = packed.inputs
    session, outputs = _session(packed, folder)
    batch = packed.input
    if packed.module.family == "text":
        layers = quantized_layers(packed.model)
        batch = batch[:, : max(1, _ELEMENTS // sum(layers[name].in_features for name in quantizers))]
    difference, given = 0.0, {name: _Given(name, each, tolerance) for name, each in quantizers.items()}
    for row in batch.split(1):
        names = list(dict.fromkeys(["logits", *(out for pair in outputs.values() for out in pair)]))
        computed = session.run(names, {session.get_inputs()[0].name: row.numpy()})
        shown = {name: torch.from_numpy(each) for name, each in zip(names, computed, strict=True)}
        for name, stand_in in given.items():
            stand_in.theirs = tuple(shown[out] for out in outputs[name])
        with _standing_in(packed.model, given):
            logits = packed.module.eval()(row).float()
        difference = max(difference, _difference("logits", shown["logits"], logits, tolerance))
        if sum(each.count for each in given.values()) >= _ELEMENTS:
            break
    return {
        "inputs": sum(each.count for each in given.values()),
        "inputs_on_other_codes": sum(each.others for each in given.values()),
        "max_logit_difference_on_equal_codes": difference,
    }


class _Given(nn.Module):
    """Stands in for an input quantizer: compares its input with the file's and passes the file's codes on."""

    def __init__(self, name: str, quantizer: InputQuantizer, tolerance: float) -> None:
        super().__init__()
        self.name, self.quantizer, self.tolerance = name, quantizer, tolerance
        self.step = step_of(quantizer.operands())
        self.theirs: tuple[Tensor, ...] = ()
        self.count = self.others = 0

    def forward(self, input: Tensor) -> Tensor:
        theirs, made = self.theirs
        value = self._value(made)
        if not torch.equal(self.quantizer(theirs), value):
            wrong = int((self.quantizer(theirs) != value).sum())
            raise UserError(
                f"onnx: onnxruntime rounds {wrong} of {value.numel()} inputs of {self.name} to other codes "
                "than training, so the file is discarded; take another release of onnxruntime"
            )
        _difference(f"inputs of {self.name}", theirs.reshape(input.shape), input, self.tolerance)
        value = value.reshape(input.shape)
        self.count += value.numel()
        step = self.step
        if step is None:
            step = input.abs().amax(-1, keepdim=True) / self.quantizer.grid.q_max
        self.others += int(((self.quantizer(input) - value).abs() > step / 2).sum())
        return value

    def _value(self, made: Tensor) -> Tensor:
        """The value of codes that start at 0; with a scale per token the file shows values."""
        if self.step is None:
            return made
        _, _, lowest, offset, _ = self.quantizer.operands()
        value = (made if lowest is None else made + lowest) * self.step
        return value if offset is None else value + offset


def _difference(what: str, theirs: Tensor, own: Tensor, tolerance: float) -> float:
    difference, largest = (theirs - own).abs().max().item(), own.abs().max().item()
    if not difference <= tolerance * largest:  # NaN differs, too
        raise UserError(
            f"onnx: {what} in the file differ from the model's by up to {difference:.1e} (the largest is "
            f"{largest:.1e}) though all codes before are equal, so the file is discarded; take another "
            "release of onnxruntime"
        )
    return difference


@contextmanager
def _standing_in(model: nn.Module, given: dict[str, _Given]) -> Iterator[None]:
    layers = quantized_layers(model)
    try:
        for name, stand_in in given.items():
            layers[name].input_quantizer = stand_in
        yield
    finally:
        for name, stand_in in given.items():
            layers[name].input_quantizer = stand_in.quantizer


def _session(packed: PackedModel, folder: Path) -> tuple[Any, dict[str, tuple[str, str]]]:
    """Return a session that also shows what flows into a layer and what it makes of it, by layer."""
    import onnx
    from onnx import TensorProto, helper

    program = onnx.load(str(folder / FILE), load_external_data=False)
    graph = program.graph
    makers = {output: node for node in graph.node for output in node.output}
    users = {input: node for node in graph.node for input in node.input}
    outputs = {}
    for node in list(graph.node):
        if (name := layer_of(node, packed)) not in packed.inputs:
            continue
        quantizer = packed.inputs[name]
        if node.op_type == "DequantizeLinear":
            codes = makers[users[node.output[0]].input[0]].input[0]
            given, made = makers[codes].input[0], f"{codes} as floats"  # which every runtime can show
            if made not in makers:  # layers with the same input and scale share its codes
                makers[made] = helper.make_node("Cast", [codes], [made], to=TensorProto.FLOAT)
                graph.node.append(makers[made])
            clips = quantizer.bits < input_width(quantizer.bits, packed.storage_bits)
            for _ in range(clips + (quantizer.operands().offset is not None)):
                given = makers[given].input[0]
        else:
            given = made = node.input[0]
            while makers[given].op_type != "Div":
                given = makers[given].input[0]
            given = makers[given].input[0]
        outputs[name] = given, made
    shown = dict.fromkeys(name for pair in outputs.values() for name in pair)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in shown)
    with NamedTemporaryFile(dir=folder, suffix=".onnx") as file:  # large constants lie in the same folder
        onnx.save(program, file.name)
        session = open_session(Path(file.name))
    return session, outputs

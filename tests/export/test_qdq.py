"""Quantized inputs in ONNX: training's codes, training's weights, and one line for what cannot be."""

import json
from functools import partial

import numpy as np
import pytest
import tiny_packed as models
import torch
import yaml
from PIL import Image
from test_export_verb import checkpoint
from torch import nn

import tiny
from stableqat import ops
from stableqat.cli.main import main
from stableqat.data.embedded import DIGITS_MEAN, DIGITS_STD, embedded_digits
from stableqat.errors import UserError
from stableqat.export.packed import PackedModel, pack
from stableqat.layers.calibration import calibrate_inputs
from stableqat.quantizers import STE, QuantizedWeight
from stableqat.quantizers.inputs import LSQ, LSQPlus, PerToken

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from stableqat.export import onnx as onnx_format  # noqa: E402
from stableqat.export.input_codes import compare_inputs  # noqa: E402
from stableqat.export.qdq import OPSET, QDQLinear, set_types  # noqa: E402

FEATURES = 40


def packed(family, inputs, scale_dtype=torch.float32, options=None, equal=(), **more):
    """A packed model with calibrated inputs; pairs of `equal` projections of a Llama have equal weights."""
    made = models.module(family, input_quantizer=inputs, **more)
    for names in equal:
        one, other = (made.model.model.layers[0].self_attn.get_submodule(name) for name in names)
        other.load_state_dict({**other.state_dict(), "weight": one.weight})
        other.weight_quantizer.load_state_dict(one.weight_quantizer.state_dict())
    batch = tiny.batch("vit" if family == "vit" else "llama", 2)
    calibrate_inputs(made.model, [batch], lambda each: made(each[made.input_key]))
    layers = pack(made, torch.float32, scale_dtype)
    return PackedModel(made, layers, torch.float32, scale_dtype, batch, **(options or {}))


def written(model, folder):
    """Write a model's file, assert that its weights are the model's, return its graph."""
    onnx_format.check(model)
    onnx_format.write(model, folder)
    weights, _ = onnx_format.read(model, folder)
    models.assert_weights(model, weights)
    assert {each.dtype for each in weights.values()} == {torch.float32}
    return onnx.load(folder / onnx_format.FILE).graph


def codes_by_layer(graph):
    """The type and zero point of each quantized input and the type of each layer's integers, by layer."""
    constants = {each.name: each for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    users = {input: node for node in graph.node for input in node.input}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            rounding = makers[makers[users[node.output[0]].input[0]].input[0]]
            zero = constants[rounding.input[2]]
            maker = makers.get(rounding.input[0])
            found[node.input[0].removesuffix(".codes").split(".", 2)[-1]] = (
                onnx.TensorProto.DataType.Name(zero.data_type),
                int(onnx.numpy_helper.to_array(zero)),
                maker is not None and maker.op_type == "Clip",
                onnx.TensorProto.DataType.Name(constants[node.input[0]].data_type),
            )
    return found


def test_all_kinds_of_inputs_in_one_file(tmp_path):
    """Each with codes equal to training's, at widths with a type of their own and without."""
    inputs = {
        "*qkv": partial(LSQPlus, bits=4),
        "*proj": None,
        "*fc1": partial(LSQPlus, bits=2),
        "*fc2": partial(PerToken, bits=3),
        "head": partial(LSQ, bits=8),
    }
    grids = {
        (96, 32): {"bits": 4, "grid": "stretched"},
        (32, 32): {"bits": 4, "group_size": 16},
        (128, 32): {"bits": 3, "grid": "stretched"},
        (32, 128): {"levels": 3},
        (10, 32): {"bits": 8},
    }
    quantizer = lambda weight: STE(weight, **grids[tuple(weight.shape)])  # noqa: E731
    model = packed("vit", inputs, quantizer=quantizer, skip=[], scale_dtype=torch.float16)
    graph = written(model, tmp_path)
    assert codes_by_layer(graph) == {
        "attn.qkv": ("UINT4", 0, False, "INT8"),  # odd integers
        "mlp.fc1": ("UINT8", 0, True, "INT4"),
        "head": ("UINT8", 128, False, "INT8"),
    }
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 2
    compared = compare_inputs(model, tmp_path, 1e-5)
    assert compared["inputs"] == 2 * (17 * (2 * 32 + 128) + 32)  # rows, tokens, features
    assert compared["inputs_on_other_codes"] < 1e-3 * compared["inputs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [onnx_format.FILE]


def test_small_layers_with_equal_weights_stay_apart(tmp_path):
    """With the same input or another: the exporter makes one of equal constants of up to 1,024 elements."""
    static, by_token = partial(LSQ, bits=4), partial(PerToken, bits=4)
    inputs = {"*k_proj": static, "*v_proj": static, "*q_proj": by_token, "*o_proj": by_token, "*": None}
    options = {"config": {"hidden_size": 32}, "scale_dtype": torch.float16}
    model = packed("llama", inputs, equal=[("k_proj", "v_proj"), ("q_proj", "o_proj")], **options)
    written(model, tmp_path)
    assert compare_inputs(model, tmp_path, 1e-5)["max_logit_difference_on_equal_codes"] < 1e-5


def test_eight_bits_are_multiplied_as_integers(tmp_path):
    """Narrower codes, too, if they are stored in eight."""
    model = packed("llama", partial(LSQPlus, bits=4), options={"storage_bits": 8})
    graph = written(model, tmp_path)
    assert set(codes_by_layer(graph).values()) == {("UINT8", 0, True, "INT8")}
    assert compare_inputs(model, tmp_path, 1e-5)["max_logit_difference_on_equal_codes"] < 1e-5
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / onnx_format.FILE, options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ran.count("MatMulIntegerToFloat") == 7


class Side(nn.Module):
    """Layers with the identity as their weight, side by side, every other one in INT8."""

    def __init__(self, quantizers):
        super().__init__()
        one = QuantizedWeight(torch.eye(FEATURES).to(torch.int8), torch.ones(FEATURES, 1), 0.0, 4, "integer")
        self.layers = nn.ModuleList(
            QDQLinear(one, None, each.activation(), (None, 8)[place % 2])
            for place, each in enumerate(quantizers)
        )

    def forward(self, input):
        return torch.stack([layer(input) for layer in self.layers])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """Quantizers of every width and kind, inputs at and around their thresholds, and a file of layers."""
    torch.manual_seed(0)
    quantizers = []
    for bits in range(2, 9):
        for kind, sees in ((LSQ, torch.randn(99)), (LSQ, torch.rand(99)), (LSQPlus, torch.rand(99) - 0.17)):
            quantizers.append(kind(FEATURES, bits=bits))
            quantizers[-1].calibrate(ops.count_values(sees))
    model = Side(quantizers).eval()
    spread = torch.linspace(-4, 4, 997)
    edges = [spread, torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4])]
    for each in quantizers:
        offset = 0.0 if each.operands().offset is None else each.offset
        edges.append((offset + each.scale * (torch.arange(-300, 300) + 0.5)).detach())
    values = torch.cat(edges)
    rows = values[: len(values) // FEATURES * FEATURES].reshape(-1, 1, FEATURES)
    program = torch.onnx.export(
        model,
        (rows[:2],),
        dynamic_shapes=({0: torch.export.Dim("rows")},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    set_types(program.model.graph, model)
    file = tmp_path_factory.mktemp("rounded") / "side.onnx"
    program.save(file)
    with torch.no_grad():
        return rows, file, torch.stack([each(rows) for each in quantizers])


@pytest.mark.parametrize("precise", ["0", "1"], ids=["", "precise"])
@pytest.mark.parametrize("optimized", [True, False])
def test_a_value_gets_the_code_of_training_bit_for_bit(rounded, optimized, precise):
    """At thresholds, where half goes to even, beyond the outermost codes, and for offsets off the grid."""
    rows, file, expected = rounded
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", precise)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    assert torch.equal(torch.from_numpy(values), expected)


def test_openvino_rounds_as_training_does(rounded):
    """Its thresholds are a few units of the last place away."""
    openvino = pytest.importorskip("openvino")
    rows, file, expected = rounded
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    spread = rows[:60]  # evenly spaced, not at thresholds
    (values,) = core.compile_model(core.read_model(file), "CPU", settings)([spread]).values()
    off = (torch.from_numpy(values) - expected[:, :60]).abs() > 1e-5
    assert off.float().mean() < 1e-3


def changed(folder, change):
    file = folder / onnx_format.FILE
    program = onnx.load(file)
    change({each.name: each for each in program.graph.initializer})
    onnx.save(program, file)


@pytest.mark.parametrize(
    ("end", "factor", "told"),
    [
        ("qkv.input_scale", 1.01, "rounds .* inputs of blocks.0.attn.qkv to other codes than training"),
        ("qkv.offset", 1.01, "rounds .* inputs of blocks.0.attn.qkv to other codes"),
        ("fc1.bias", 1.5, "inputs of blocks.0.mlp.fc2 in the file differ .* though all codes before"),
        ("fc2.bias", 1.5, "logits in the file differ"),
    ],
)
def test_a_file_with_another_constant_is_refused(end, factor, told, tmp_path, static):
    model, content = static
    (tmp_path / onnx_format.FILE).write_bytes(content)

    def scale(constants):
        (constant,) = (each for name, each in constants.items() if name.endswith(end))
        values = onnx.numpy_helper.to_array(constant) * factor
        constant.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), constant.name))

    compare_inputs(model, tmp_path, 1e-3)
    changed(tmp_path, scale)
    with pytest.raises(UserError, match=told):
        compare_inputs(model, tmp_path, 1e-3)
    made = model.inputs["blocks.0.attn.qkv"]
    assert isinstance(made, LSQPlus)  # back in its place


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    model = packed("vit", partial(LSQPlus, bits=4), quantizer={"bits": 4})
    written(model, folder)
    return model, (folder / onnx_format.FILE).read_bytes()


def test_a_run_that_quantizes_inputs_is_exported_evaluated_and_nothing_else(tmp_path, capsys):
    made = checkpoint(tmp_path, "vit", input_quantizer=partial(LSQPlus, bits=8), quantizer={"bits": 8})
    source, out = tmp_path / "run", tmp_path / "out"
    (source / "checkpoints").mkdir(parents=True)
    made.rename(source / "checkpoints" / "best.ckpt")
    data = {"class_path": "stableqat.data.ImageDataModule", "init_args": {}}
    (source / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert main(["export", str(source), "--format", "onnx", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "equal inputs have equal codes, and on equal codes logits differ by " in told
    assert "inputs of 4 layers: LSQPlus 8-bit as UINT8" in told
    report = json.loads((out / "export.json").read_text())
    assert report["scale_dtype"] == "fp32"  # in which the file holds them
    assert report["max_weight_difference"] == 0
    assert report["same_predictions"] > 0.9
    assert report["inputs_on_other_codes"] < 1e-3 * report["inputs"]
    assert report["max_logit_difference_on_equal_codes"] < 1e-5
    assert report["quantizers"][0]["input_bits"] == 8
    stored = {each.key: each.value for each in onnx.load(out / "model.onnx").metadata_props}
    assert json.loads(stored["mean"]) == [DIGITS_MEAN]
    assert json.loads(stored["classes"]) == [str(digit) for digit in range(10)]
    assert {"input_size", "std", "interpolation", "crop_pct"} <= stored.keys()
    results = tmp_path / "results.json"
    assert main(["evaluate", str(source), "--out", str(results), "--device", "cpu"]) == 0
    images = json.loads(results.read_text())["sources"][0]["images"]
    assert [each["images"] for each in images.values()] == [355]
    image = Image.fromarray((embedded_digits()[0][0] * 255).round().astype("uint8"))
    image.save(tmp_path / "digit.png")
    capsys.readouterr()
    options = ["--images", str(tmp_path / "digit.png"), "--top_k", "10", "--device", "cpu"]
    assert main(["predict", str(source), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    pixels = (torch.tensor(np.array(image) / 255).float() - DIGITS_MEAN) / DIGITS_STD
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels[None, None].numpy()})
    chances = torch.from_numpy(logits)[0].softmax(-1)
    assert answer["probabilities"] == pytest.approx(chances.sort(descending=True)[0].tolist(), abs=1e-2)
    for format in ("hf", "torchao", "gguf", "compressed-tensors"):
        assert main(["export", str(source), "--format", format, "--out", str(tmp_path / format)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "layer blocks.0.attn.qkv quantizes its input, which this format cannot hold; take onnx" in line


@pytest.mark.parametrize(
    ("inputs", "options", "more", "told"),
    [
        (partial(LSQ, bits=8), {"int8_activations": True}, {}, "int8_activations: this run quantizes"),
        (partial(PerToken, bits=8), {"storage_bits": 8}, {}, "storage_bits: onnx .* LSQPlus.; leave it out"),
        (None, {"storage_bits": 8}, {}, "storage_bits: onnx stores"),
        (partial(LSQ, bits=8), {"storage_bits": 4}, {"quantizer": {"bits": 8}}, "needs 8-bit .* or take 8"),
        (
            partial(LSQ, bits=8),
            {},
            {"quantizer": {"bits": 8, "group_size": 16}},
            "per 16 weights, .* does not run 8-bit .* train with one scale per row",
        ),
        (
            partial(PerToken, bits=8),
            {},
            {"quantizer": {"bits": 8, "grid": "stretched"}},
            "9-bit integers for its 8-bit stretched grid; train",
        ),
        (
            partial(PerToken, bits=8),
            {},
            {"quantizer": {"bits": 4, "group_size": 8}},
            "or a multiple; no other format holds quantized inputs: export a run without",
        ),
        (None, {}, {"quantizer": {"bits": 4, "group_size": 8}}, "or a multiple; take hf"),
    ],
)
def test_what_cannot_be_is_one_line(inputs, options, more, told):
    with pytest.raises(UserError, match=told) as error:
        onnx_format.check(packed("vit", inputs, options=options, **more))
    assert "\n" not in str(error.value)


def test_a_module_of_unknown_codes_is_refused():
    class Halved(nn.Module):
        def forward(self, input):
            return input / 2

    with pytest.raises(UserError, match=r"layer blocks.0.attn.qkv: .* a Halved; take LSQ, LSQPlus, PerToken"):
        packed("vit", lambda features: Halved())

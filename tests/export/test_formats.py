"""Format x grid x family: what a format's own reader makes of the file equals the model, or is refused."""

import json
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import tiny_packed as models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stableqat.errors import UserError
from stableqat.export import gguf_blocks
from stableqat.export.command import LIBRARIES
from stableqat.quantizers import STE, QuantizedWeight

LANGUAGE, FAMILIES = ("llama", "qwen3"), ("llama", "qwen3", "vit")
SUPPORTED = {
    "hf": FAMILIES,
    "compressed-tensors": LANGUAGE,
    "gguf": LANGUAGE,
    "onnx": FAMILIES,
    "torchao": LANGUAGE,
}
NEAREST = {"compressed-tensors": "take onnx", "gguf": "take onnx", "torchao": "take onnx"}


def writer(format):
    for library in LIBRARIES[format]:
        pytest.importorskip(library.replace("-", "_"))
    return import_module(f"stableqat.export.{format.replace('-', '_')}")


def assert_equal(format, model, logits, folder, tolerance=2e-5):
    """Write, read back with the format's own reader, compare bit for bit."""
    into = writer(format)
    into.check(model)
    into.write(model, folder)
    weights, theirs = into.read(model, folder)
    models.assert_weights(model, weights)
    assert (theirs - logits).abs().max() <= tolerance
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", models.GRIDS)
@pytest.mark.parametrize("format", [format for format in SUPPORTED if format != "onnx"])
def test_a_file_equals_the_model_or_is_refused(format, grid, family, tmp_path):
    model, logits = models.packed(family, grid)
    if family not in SUPPORTED[format]:
        with pytest.raises(UserError, match=NEAREST[format]):
            writer(format).check(model)
        return
    assert_equal(format, model, logits, tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "more"),
    [
        ("llama", {}, []),
        ("qwen3", {"scale_dtype": torch.bfloat16}, []),
        ("vit", {"config": {"depth": 3}}, [{"bits": 8}, {"bits": 1}, {"bits": 3, "group_size": 16},
                                           {"bits": 6, "grid": "stretched"},
                                           {"bits": 4, "grid": "stretched", "group_size": 16}]),
    ],
    ids=FAMILIES,
)  # fmt: skip
def test_every_grid_in_one_onnx_file(family, options, more, tmp_path):
    """One file a family: tracing takes seconds."""
    model, logits = models.packed(family, None, quantizer=models.every_grid(*more), **options)
    assert {(w.grid, w.bits) for w in model.layers.values()} >= {
        (settings.get("grid", "ternary"), settings.get("bits", 2)) for settings in models.GRIDS.values()
    }
    images = {"mean": (0.1,), "std": (0.2,), "interpolation": "bilinear", "crop_pct": 0.9}
    model = replace(model, images=images, classes=[f"class {n}" for n in range(10)])
    assert_equal("onnx", model, logits, tmp_path)
    import onnx

    told = {p.key: p.value for p in onnx.load(tmp_path / writer("onnx").FILE).metadata_props}
    if family == "vit":
        assert json.loads(told.pop("classes")) == [f"class {n}" for n in range(10)]
        assert told.pop("interpolation") == "bilinear"
        assert {key: json.loads(x) for key, x in told.items()} == {
            "input_size": [1, 8, 8], "mean": [0.1], "std": [0.2], "crop_pct": 0.9
        }  # fmt: skip
    else:
        assert told["input_ids"].startswith("(batch, tokens); no key-value cache and no attention mask")


@pytest.mark.parametrize("format", ["hf", "onnx"])
def test_a_first_layer_of_patches_is_exported_as_it_trains(format, tmp_path):
    """To timm as its convolution, to ONNX as a product of flattened patches."""
    model, logits = models.packed("vit", "integer-4", first_last_bits=8)
    assert model.layers["patch_embed.proj"].bits == model.layers["head"].bits == 8
    assert_equal(format, model, logits, tmp_path)


def test_int8_activations_change_logits_and_no_weight(tmp_path):
    """A runtime without a fast kernel would compute as exactly as ever."""
    wide = {"hidden_size": 128, "intermediate_size": 128}
    model, logits = models.packed("llama", None, quantizer=models.every_grid(), config=wide)
    model = replace(model, int8_activations=True)
    theirs = assert_equal("onnx", model, logits, tmp_path, tolerance=0.1 * logits.abs().max())
    assert (theirs - logits).abs().max() > 1e-3 * logits.abs().max()
    assert "as 4-bit odd integers" in " ".join(writer("onnx").notes(model))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("options", [*models.GRIDS.values(), {"bits": 8}, {"bits": 6, "grid": "stretched"}])
@pytest.mark.parametrize("group_size", [256, 48, None])
def test_the_form_of_a_weight_in_onnx_keeps_its_values(options, int8, group_size):
    torch.manual_seed(0)
    weight = torch.randn(3, 768 if group_size else 100)
    quantizer = STE(weight, group_size=group_size, **options)
    made = quantizer.quantize(weight)
    scale = made.scale.detach().half().float()
    kept = QuantizedWeight(made.codes, scale, float(made.zero_point), made.bits, quantizer.grid.name)
    into = writer("onnx").MatMulNBits(kept, None, int8_activations=int8)
    per_byte = 8 // into.bits
    codes = torch.stack([into.codes >> (into.bits * i) & (2**into.bits - 1) for i in range(per_byte)], -1)
    codes = codes.view(3, -1, into.block).float()
    zero = 2 ** (into.bits - 1) if into.zero_point is None else into.zero_point.view(3, -1, 1)
    values = ((codes - zero) * into.scale.view(3, -1, 1)).flatten(1)[:, : weight.shape[1]]
    assert torch.equal(values, kept.dequantize())
    assert into.block <= (128 if int8 else 256)
    half = kept.zero_point != 0
    assert (into.zero_point is not None) == (
        not int8 and into.bits < 8 and (into.bits == 2 or (half and kept.bits == 4))
    )


@pytest.mark.parametrize("grid", models.GRIDS)
@pytest.mark.parametrize("options", [{"group_size": 32}, {"per_channel": False}], ids=["groups", "tensor"])
@pytest.mark.parametrize("format", [format for format in SUPPORTED if format != "onnx"])
def test_groups_and_whole_tensors(format, options, grid, tmp_path):
    model, logits = models.packed("llama", grid, quantizer=options)
    assert_equal(format, model, logits, tmp_path)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "torchao"])
def test_other_types_of_scales(format, scale_dtype, tmp_path):
    model, logits = models.packed("llama", "stretched-3", scale_dtype=scale_dtype)
    assert_equal(format, model, logits, tmp_path)


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "torchao", "hf"])
def test_what_is_left_in_bfloat16(format, tmp_path):
    model, logits = models.packed("qwen3", "integer-2", dtype=torch.bfloat16)
    assert_equal(format, model, logits, tmp_path)
    embedding = model.model.get_input_embeddings().weight
    assert torch.equal(embedding, embedding.bfloat16().float())
    if format == "gguf":
        return
    stored = load_file(tmp_path / "model.safetensors")
    (kept,) = (tensor for name, tensor in stored.items() if name.startswith("model.embed_tokens.weight"))
    assert kept.dtype == torch.bfloat16
    computes = torch.bfloat16 if format == "compressed-tensors" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # in the type that the file names
    assert loaded.dtype == computes
    with torch.no_grad():
        theirs = loaded.eval()(input_ids=model.input, use_cache=False).logits
    assert torch.allclose(theirs.float(), logits, atol=0.02 if computes == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("grid", "scale"), [("integer-4", torch.float16), ("integer-2", torch.bfloat16)])
def test_plain_values_take_the_type_of_the_rest_only_where_it_holds_them(grid, scale, tmp_path):
    model, logits = models.packed("llama", grid, dtype=torch.bfloat16, scale_dtype=scale)
    assert_equal("hf", model, logits, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    fits = grid == "integer-2"  # whose levels are powers of two
    assert stored.dtype == (torch.bfloat16 if fits else torch.float32)
    named = json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert named == str(stored.dtype).removeprefix("torch.")
    assert bool(writer("hf").notes(model)) is not fits


@pytest.mark.parametrize(
    ("format", "family"),
    [("gguf", "llama"), *product(("hf", "compressed-tensors", "torchao"), LANGUAGE)],  # none in ggml's qwen3
)
def test_biases(format, family, tmp_path):
    biases = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    model, logits = models.packed(family, "integer-2", config=biases)
    assert sum(name.endswith(".bias") for name in model.rest()) == (7 if family == "llama" else 4)
    assert_equal(format, model, logits, tmp_path)


def test_one_row_makes_an_onnx_file_for_any_number(tmp_path):
    model, logits = models.packed("llama", "integer-2")
    one = replace(model, batch={key: value[:1] for key, value in model.batch.items()})
    assert_equal("onnx", one, logits[:1], tmp_path)
    _, theirs = writer("onnx").read(model, tmp_path)
    assert torch.allclose(theirs, logits, atol=2e-5)


KINDS = {
    "integer-2": "TQ2_0",
    "integer-3": "Q3_K",
    "integer-4": "Q4_0",
    "stretched-2": "Q2_K",
    "stretched-3": "Q4_0",
    "stretched-4": "Q4_K",
    "ternary": "TQ2_0",
}


@pytest.mark.parametrize("grid", KINDS)
def test_rows_of_256_take_the_small_ggml_types(grid, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model, logits = models.packed("llama", grid, config=wide)
    assert {gguf_blocks.encodings(weight, model.target)[0].type for weight in model.layers.values()} == {
        KINDS[grid]
    }
    assert_equal("gguf", model, logits, tmp_path)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_wider_integers(bits, tmp_path):
    model, logits = models.packed("llama", "integer-2", quantizer={"bits": bits})
    for format in ("gguf", "compressed-tensors", "torchao"):
        (tmp_path / format).mkdir()
        assert_equal(format, model, logits, tmp_path / format)


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize(
    ("grid", "bits"),
    [("integer-2", 4), ("ternary", 4), ("stretched-3", 4), ("integer-3", 8), ("stretched-4", 8)],
)
def test_narrow_codes_stored_wider(grid, bits, family, tmp_path):
    model, logits = models.packed(family, grid)
    model = replace(model, storage_bits=bits)
    assert_equal("compressed-tensors", model, logits, tmp_path)
    (group,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    assert group["weights"]["num_bits"] == bits
    words = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert words.shape[1] == 64 * bits // 32
    assert not any("humming" in line for line in writer("compressed-tensors").notes(model))
    assert ("humming" in writer("compressed-tensors").notes(replace(model, storage_bits=None))[-1]) == (
        grid != "stretched-3"
    )


def test_binary(tmp_path):
    model, logits = models.packed("llama", "integer-2", quantizer={"bits": 1, "grid": None})
    for format in ("gguf", "compressed-tensors", "torchao", "hf"):
        (tmp_path / format).mkdir()
        assert_equal(format, model, logits, tmp_path / format)


@pytest.mark.parametrize(
    ("format", "options", "reason"),
    [
        ("compressed-tensors", {"quantizer": {"bits": 8, "grid": "stretched"}}, "9-bit.*take torchao"),
        ("compressed-tensors", {"grid": "stretched-4", "storage_bits": 4}, "_proj needs 5-bit.*or take 8"),
        ("gguf", {"quantizer": {"bits": 8, "grid": "stretched"}}, "8-bit stretched grid; take torchao"),
        (
            "gguf",
            {"config": {"intermediate_size": 72}},
            "72 weights are not a multiple of 32; take",
        ),
        (
            "gguf",
            {"quantizer": {"group_size": 16}},
            "groups of 16 weights are not a multiple of 32",
        ),
        (
            "gguf",
            {"scale_dtype": torch.bfloat16},
            "scale in fp16; leave --scale_dtype at fp16, or take compr",
        ),
        ("onnx", {"quantizer": {"bits": 8, "grid": "stretched"}}, "end at 4 bits; take torchao"),
        ("onnx", {"quantizer": {"group_size": 8}}, "one scale per 8 weights.*take compressed-tensors"),
        (
            "onnx",
            {"grid": "stretched-2", "scale_dtype": torch.float32},
            "rounds float32.*take --scale_dtype fp16 or bf16",
        ),
        ("onnx", {"dtype": torch.bfloat16}, "computes in float32; leave --dtype at fp32"),
        ("onnx", {"skip": []}, "MatMulNBits has no look-up.*leave embeddings alone.*take gguf"),
        ("compressed-tensors", {"skip": []}, "cannot load a packed embedding.*take gguf"),
    ],
)
def test_what_a_format_has_no_place_for(format, options, reason):
    grid = options.pop("grid", "integer-2")
    storage = options.pop("storage_bits", None)
    model, _ = models.packed("llama", grid, **options)
    with pytest.raises(UserError, match=reason):
        writer(format).check(replace(model, storage_bits=storage))


@pytest.mark.parametrize("format", ["hf", "gguf", "torchao"])
def test_a_tied_embedding_that_was_trained_quantized(format, tmp_path):
    model, logits = models.packed("llama", "stretched-4", skip=[])
    assert "model.embed_tokens" in model.layers
    assert "lm_head" not in model.layers
    assert_equal(format, model, logits, tmp_path)


def test_snapping_keeps_the_codes_and_moves_weights_by_rounding_alone():
    before = models.module("llama", quantizer=models.GRIDS["stretched-2"])
    layer = before.model.model.layers[0].mlp.up_proj
    codes = layer.weight_quantizer.quantize(layer.weight).codes
    value = layer.weight_quantizer(layer.weight).detach()
    model, _ = models.packed("llama", "stretched-2", scale_dtype=torch.bfloat16)
    weight = model.layers["model.layers.0.mlp.up_proj"]
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.scale, weight.scale.bfloat16().float())
    assert 0 < ((weight.dequantize() - value) / value).abs().max() <= 2**-8

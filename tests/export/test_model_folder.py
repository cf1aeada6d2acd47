"""Folders of prepared and of converted models: read as the model that they hold, or refused in one line."""

import json
import re

import pytest
import tiny_packed as models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import stableqat
import words
from stableqat.cli.main import main
from stableqat.data.tokenizer import train_bpe
from stableqat.export.packed import pack
from stableqat.export.source import load_source
from stableqat.layers.linear import quantized_layers
from stableqat.model_folder import find_scale
from stableqat.ops import dequantize_codes, make_grid
from stableqat.quantizers import STE

LAYER = "model.layers.0.mlp.up_proj"


class Trainer(nn.Module):
    """As a trainer of one's own holds a model."""

    def __init__(self, model):
        super().__init__()
        self.net = model


def made(family="llama", config=None, **options):
    """A prepared model whose scales were moved."""
    torch.manual_seed(0)
    keys = {key: x for key, x in (models.CONFIGS[family] | (config or {})).items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))
    stableqat.prepare(model, options.pop("method", "ste"), **({"bits": 2} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model


def save(folder, family="llama", dtype=torch.float32, config=None, **options):
    """Save a converted model; return its file's tensors."""
    model = made(family, config, **options)
    stableqat.convert(Trainer(model))  # names in the folder are the model's, not the trainer's
    model.to(dtype).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        *models.GRIDS.values(),
        {"bits": 1},
        {"bits": 8},
        {"bits": 3, "grid": "stretched", "group_size": 16},
        {"bits": 4, "per_channel": False},
        {"method": "stableqat", "bits": 2, "config": {"attention_bias": True}},
        {"dtype": torch.bfloat16},  # which holds levels that are powers of two
    ],
    ids=str,
)
def test_weights_are_those_of_the_folder_bit_for_bit(options, family, tmp_path):
    saved = save(tmp_path, family, **options)
    found = load_source(str(tmp_path), None)
    packed = pack(found.module, torch.float32, torch.float32)
    assert len(packed) == 7
    for name, weight in packed.items():
        assert torch.equal(weight.dequantize(), saved[f"{name}.weight"].float())
        assert weight.bits == options.get("bits", 2)
        assert weight.scale.shape[1] == (
            weight.codes.shape[1] // options.get("group_size", weight.codes.shape[1])
        )


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "torchao"])
def test_a_converted_folder_is_exported(format, tmp_path, capsys):
    if format != "hf":
        pytest.importorskip(format.replace("-", "_"))
    saved = save(tmp_path / "saved", bits=4)
    out = tmp_path / "out"
    assert (
        main(
            [
                "export",
                str(tmp_path / "saved"),
                "--format",
                format,
                "--scale_dtype",
                "fp32",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert f"{format} of {tmp_path / 'saved'}\n" in told
    assert "random rows: a model folder names no data" in told
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model(input_ids=torch.arange(4)[None])  # compressed-tensors unpacks in the first forward
    weight = model.get_submodule(LAYER).weight
    assert torch.equal(weight if format != "torchao" else weight.dequantize(), saved[f"{LAYER}.weight"])
    assert "method" not in (out / "README.md").read_text()
    assert "stableqat" not in json.loads((out / "config.json").read_text())


WIDTHS = [(grid, bits) for grid in ("integer", "stretched") for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize("grid", [("binary", 1), ("ternary", 2), *WIDTHS], ids=str)
def test_a_scale_is_found_from_any_few_of_its_levels(grid):
    grid = make_grid(*grid)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (400, 3), generator=generator)
    scale = torch.rand(400, 1, generator=generator).exp() / 100
    weight = dequantize_codes(codes, scale, grid.zero_point, torch.float32)
    found = find_scale(weight, (400, 1), grid)
    levels = (weight / found + grid.zero_point).round().clamp(grid.q_min, grid.q_max)
    assert torch.equal(dequantize_codes(levels, found, grid.zero_point, torch.float32), weight)
    off = weight.clone()
    off[7, :2] = torch.tensor([1.0, 0.3141])
    assert find_scale(off, (400, 1), grid) is None


def test_a_matrix_of_zeros_has_a_scale_where_zero_is_a_level():
    assert find_scale(torch.zeros(2, 4), (2, 1), make_grid("integer", 2)).tolist() == [[1.0], [1.0]]
    assert find_scale(torch.zeros(2, 4), (2, 1), make_grid("stretched", 2)) is None


def change(value):
    def do(folder):
        state = load_file(folder / "model.safetensors")
        state[f"{LAYER}.weight"][0, 0] += value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return do


def record(*path, value):
    def do(folder):
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return do


def field(*path, value):
    return record("stableqat", 0, *path, value=value)


def config(text):
    return lambda folder: (folder / "config.json").write_text(text)


STRETCHED = {"grid": "stretched", "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "damage", "line"),
    [
        (STRETCHED, None, "q_proj: .* on no 2-bit stretched grid.*save in float32"),
        ({}, change(1e-4), f"{LAYER}: its weights lie on no 2-bit integer grid"),
        ({}, change(torch.nan), f"{LAYER} holds NaN or infinity"),
        ({}, record("stableqat", value=None), "names no quantized layers; export the run or checkpoint"),
        (
            {},
            record("stableqat", value={"a": 1}),
            "config.json: stableqat: must list mappings of method, grid",
        ),
        ({}, record("stableqat", value="integer"), "config.json: stableqat: must list mappings"),
        ({}, record("stableqat", value=[]), "stableqat: must list mappings of method"),
        ({}, field("bits", value="2"), "stableqat.bits: '2' is of another type"),
        ({}, field("bits", value=True), "stableqat.bits: True is of another type"),
        ({}, field("bits", value=99), "q_proj: bits: must be a whole.*not 99"),
        ({}, field("grid", value="round"), "q_proj: grid: 'round' is unknown"),
        ({}, field("group_size", value=7), "group_size: 7 does not divide"),
        ({}, field("group_size", value=-1), "group_size: -1 does not divide"),
        ({}, field("layers", 0, value="model.norm"), "model.norm is not a linear layer"),
        ({}, field("layers", 0, value=3), "3 is not a linear layer"),
        ({}, config("{"), "config.json: not the configuration"),
        ({}, config("[1]"), "config.json: not the configuration"),
        ({}, lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cut short or damaged"),
    ],
)
def test_what_is_no_converted_folder_is_one_line(options, damage, line, tmp_path, capsys):
    save(tmp_path / "saved", **options)
    if damage is not None:
        damage(tmp_path / "saved")
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "saved"), "--format", "hf", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stableqat: ")
    assert re.search(line, said), said
    assert not out.exists()


# -- folders of prepared models -----------------------------------------------------------------


class Mine(STE):
    """A method of a user's own."""


def prepared(folder, family="llama", **options):
    """Save a prepared model; return the deployed weights of its layers."""
    shard = options.pop("shard", "5GB")
    model = made(family, **options).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    layers = quantized_layers(model)
    return {name: x.weight_quantizer.quantize(x.weight).dequantize() for name, x in layers.items()}, model


@pytest.mark.parametrize(
    "options",
    [
        *models.GRIDS.values(),
        {"bits": 1},
        {"method": "dsq", "bits": 3, "grid": "stretched", "group_size": 16},
        {"method": "paretoq", "bits": 4, "per_channel": False},
        {"method": "stableqat", "bits": 2, "family": "qwen3"},
        {"method": "scaledste", "bits": 2, "skip": ["lm_head", "*.mlp.*"]},
        {"bits": 2, "freezing": 0.01},
    ],
    ids=str,
)
def test_a_prepared_folder_holds_the_trained_model(options, tmp_path):
    deployed, model = prepared(tmp_path, **options)
    found = load_source(str(tmp_path), None)
    tokens = found.batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(found.module(tokens), model(input_ids=tokens).logits)
    packed = pack(found.module, torch.float32, torch.float32)
    assert packed.keys() == deployed.keys()
    for name, weight in packed.items():
        assert torch.equal(weight.dequantize(), deployed[name])
    assert found.quantizers[0]["method"].lower() == options.get("method", "ste")


@pytest.mark.parametrize("verb", ["export", "evaluate", "predict"])
def test_every_verb_takes_a_prepared_folder(verb, tmp_path, capsys):
    """In shards, too; in full precision it would be another model."""
    tokenizer = train_bpe(words.DOCUMENTS, 300)
    folder = tmp_path / "saved"
    _, model = prepared(folder, config={"vocab_size": 300}, shard="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([tokenizer("grid scale of a row")["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    source = folder
    if verb == "export":
        source = tmp_path / "out"
        options = ["--format", "hf", "--scale_dtype", "fp32", "--out", str(source)]
        assert main(["export", str(folder), *options]) == 0
        assert "| method | STE |" in (source / "README.md").read_text()
    if verb == "evaluate":
        words.write_text(tmp_path / "text.jsonl")
        options = ["--data", str(tmp_path / "text.jsonl"), "--block_size", "16", "--device", "cpu"]
        assert main(["evaluate", str(folder), *options]) == 0
        assert "STE, 2 bits, integer" in capsys.readouterr().out
    capsys.readouterr()
    options = ["--losses", "true", "--prompt", "grid scale of a row", "--device", "cpu"]
    assert main(["predict", str(source), *options]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-5)


def without(*names, **others):
    def do(folder):
        state = load_file(folder / "model.safetensors")
        kept = {key: x for key, x in state.items() if not key.endswith(names)}
        kept |= {f"{LAYER}.{key}": torch.ones(value) for key, value in others.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return do


@pytest.mark.parametrize(
    ("options", "damage", "line"),
    [
        ({}, record("stableqat", value=None), "names no quantized layers"),
        (
            {},
            without(f"{LAYER}.weight_quantizer.scale"),
            f'{LAYER}: its quantizer is not .*Missing key.*"scale"',
        ),
        (
            {},
            without("gone", **{"weight_quantizer.scale": (3, 1)}),
            f"{LAYER}: its quantizer is not .*size mism",
        ),
        ({}, field("method", value="DSQ"), 'q_proj: its quantizer is not .*"a_logit"'),
        (
            {},
            field("method", value="mine.Mine"),
            "quantizer mine.Mine is not of this package; save what .*convert",
        ),
        ({"method": Mine}, None, "quantizer .*Mine is not of this package"),
        ({}, field("bits", value=99), "q_proj: bits: must be a whole.*not 99"),
        ({}, field("layers", value=[LAYER]), "does not name .*q_proj"),
        ({}, change(torch.nan), f"{LAYER} holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("verb", ["export", "evaluate"])
def test_a_prepared_folder_that_is_not_whole_is_one_line(verb, options, damage, line, tmp_path, capsys):
    prepared(tmp_path / "saved", **options, config={"vocab_size": 300})
    train_bpe(words.DOCUMENTS, 300).save_pretrained(tmp_path / "saved")
    if damage is not None:
        damage(tmp_path / "saved")
    capsys.readouterr()
    more = (
        ["--format", "hf", "--out", str(tmp_path / "out")] if verb == "export" else ["--data", str(tmp_path)]
    )
    assert main([verb, str(tmp_path / "saved"), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(line, said), said

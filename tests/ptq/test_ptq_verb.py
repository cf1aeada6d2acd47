"""The verb: a model becomes a run, which everything else takes, or one line says what is wrong."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from stableqat.cli.main import main
from stableqat.layers.linear import quantized_layers
from stableqat.modules import LlamaModule
from stableqat.modules.vit_config import preprocessing
from stableqat.ptq.subject import Subject, calibration_batches
from stableqat.quantizers import STE, StableQAT
from stableqat.quantizers.inputs import LSQ
from stableqat.runs import open_run

METHODS = ("rtn", "mse", "gptq", "adaround", "lapq")


def record(run):
    return json.loads((run / "ptq.json").read_text())


@pytest.fixture(scope="module")
def runs(place, ptq, tmp_path_factory):
    """A run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        assert ptq(place / "llama", folder / method, method=method) == 0
    return folder


def test_every_method_makes_a_run(runs):
    assert {path.name for path in runs.iterdir()} == set(METHODS)  # nothing unfinished is left
    losses = {method: record(runs / method)["loss"] for method in METHODS}
    assert len({each["full precision"] for each in losses.values()}) == 1
    nearest = losses["mse"]["rounded to nearest"]
    assert nearest == losses["gptq"]["rounded to nearest"] != losses["rtn"]["rounded to nearest"]
    assert losses["lapq"]["lapq"] < nearest
    for method in ("gptq", "adaround"):
        layers = record(runs / method)["layers"]
        assert len(layers) == 14
        assert all(0 < layer["error"] < layer["nearest"] < 1 for layer in layers)
        assert losses[method][method] != nearest
    for method in METHODS:
        layers = quantized_layers(open_run(str(runs / method)).load().model).values()
        assert {layer.weight_quantizer.bits for layer in layers} == {2}


def test_what_is_recorded_is_what_evaluation_and_validation_find(runs, place, ptq, tmp_path):
    run, out = tmp_path / "all", tmp_path / "out.json"
    assert ptq(place / "llama", run, samples=1000) == 2
    (text,) = measured(runs / "gptq", place, out)["perplexity"].values()
    rows = text["tokens"] // 15
    assert ptq(place / "llama", run, samples=rows, batch_size=4) == 0
    (text,) = measured(run, place, tmp_path / "2.json")["perplexity"].values()
    assert text["loss"] == pytest.approx(record(run)["loss"]["gptq"], abs=0.02)  # rows in another order
    flags = ["--data.source", str(place / "text.jsonl"), "--data.block_size", "16"]
    assert main(["validate", "-c", str(run / "config.yaml"), "--ckpt_path", "last", *flags, *CPU]) == 0
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0


CPU = ["--trainer.accelerator", "cpu"]


def measured(run, place, out):
    flags = ["--data", str(place / "text.jsonl"), "--block_size", "16", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", str(run), *flags]) == 0
    return json.loads(out.read_text())["sources"][0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", [STE, StableQAT])
def test_the_first_step_of_training_has_the_loss_of_the_run(method, quantizer, runs):
    options = {"init_from": str(runs / method), "init_quantizers": "start"}
    module = LlamaModule(quantizer=partial(quantizer, bits=2), **options)
    losses = tiny.Losses()
    tiny.trainer(max_steps=1, callbacks=[losses]).fit(module, tiny.loader("llama"))
    with torch.no_grad():
        expected = open_run(str(runs / method)).load().loss(tiny.batch("llama"))
    assert losses.values == [expected.item()]


def test_latent_weights_move_only_where_another_code_is_chosen(runs, place):
    start = load_file(place / "llama" / "model.safetensors")
    module = open_run(str(runs / "gptq")).load()
    moved = []
    for name, layer in quantized_layers(module.model).items():
        nearest = layer.weight_quantizer.quantize(start[f"{name}.weight"]).codes
        same = nearest == layer.weight_quantizer.quantize(layer.weight).codes
        assert torch.equal(layer.weight == start[f"{name}.weight"], same)
        moved.append((~same).float().mean())
    assert 0.01 < sum(moved) / len(moved) < 0.5


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_images_and_biases(method, place, ptq, tmp_path):
    """Corrected biases keep the mean of what each layer of the first block makes of its inputs."""
    for corrected in ("true", "false"):
        options = {"method": method, "block_size": None, "batch_size": 2, "bias_correction": corrected}
        assert ptq(place / "vit", tmp_path / corrected, **options) == 0
    states = {each: open_run(str(tmp_path / each)).content["state_dict"] for each in ("true", "false")}
    start = load_file(place / "vit" / "model.safetensors")
    name = "blocks.0.attn.qkv"
    moved = states["true"][f"model.{name}.bias"] - start[f"{name}.bias"]
    assert torch.equal(states["false"][f"model.{name}.bias"], start[f"{name}.bias"])
    module = open_run(str(tmp_path / "false")).load()
    batches = drawn(module, place)
    seen = []
    layer = module.model.get_submodule(name)
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            module.loss(batch)
    deployed = layer.weight_quantizer.quantize(layer.weight).dequantize()
    expected = (start[f"{name}.weight"] - deployed) @ torch.cat(seen).mean(0)
    assert torch.allclose(moved, expected, atol=1e-5)
    assert expected.abs().max() > 1e-3
    out = tmp_path / "out.json"
    arguments = ["--data", str(place / "images"), "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", str(tmp_path / "true"), *arguments]) == 0
    (found,) = json.loads(out.read_text())["sources"][0]["images"].values()
    rounded = open_run(str(tmp_path / "true")).load()
    with torch.no_grad():
        losses = [rounded.loss(batch) for batch in drawn(module, place, 24)]
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    onnx = ["export", str(tmp_path / "true"), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    assert main(onnx) == 0


def drawn(module, place, samples=6):
    """The images that the verb draws, two by two."""
    subject = Subject(module, images=preprocessing(str(place / "vit"), ""))
    options = {"text_column": "text", "block_size": None, "batch_size": 2, "seed": 0}
    return calibration_batches(subject, str(place / "images"), samples=samples, **options)


ACTIVATIONS = {
    "quantizer": partial(STE, bits=4),
    "input_quantizer": partial(LSQ, bits=4),
    "attention_quantizer": partial(LSQ, bits=4),
}


@pytest.mark.parametrize("options", [{}, ACTIVATIONS], ids=["full precision", "quantized activations"])
def test_a_run_is_rounded_like_the_model_that_it_holds(options, runs, place, ptq, tmp_path, caplog):
    """What the folder that it started from becomes; nothing sets scales of activations, so none are left."""
    module = LlamaModule(init_from=str(place / "llama"), **options)
    module.configure_model()
    trainer = tiny.trainer(max_steps=0)
    trainer.fit(module, tiny.loader("llama"))
    trainer.save_checkpoint(tmp_path / "fp" / "checkpoints" / "last.ckpt")
    (tmp_path / "fp" / "config.yaml").write_text("{}")
    shutil.copytree(runs / "gptq" / "tokenizer", tmp_path / "fp" / "tokenizer")
    assert ptq(tmp_path / "fp", tmp_path / "run", data=place / "text.jsonl") == 0
    own, other = (open_run(str(each)).content["state_dict"] for each in (tmp_path / "run", runs / "gptq"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], value) for key, value in other.items())
    told = "left out: input_quantizer, attention_quantizer" in caplog.text
    assert told == bool(options)


def test_every_grid_and_groups(place, ptq, tmp_path):
    kinds = [{"bits": None, "levels": 3}, {"grid": "stretched"}, {"bits": 1}, {"bits": 4, "group_size": 16}]
    for number, options in enumerate(kinds):
        assert ptq(place / "llama", tmp_path / str(number), act_order="false", **options) == 0
        assert all(layer["error"] < layer["nearest"] for layer in record(tmp_path / str(number))["layers"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": None}, "bits: missing"),
        ({"bits": 9}, "bits"),
        ({"grid": "ternary"}, "grid"),
        ({"group_size": 7}, "group_size"),
        ({"data": None}, "data: missing; gptq calibrates"),
        ({"data": None, "method": "mse", "bias_correction": "true"}, "data: missing; bias_correction"),
        ({"bias_correction": "true"}, "bias_correction: no quantized layer of this model has a bias"),
        ({"data": "nowhere/text.jsonl"}, "nowhere/text.jsonl"),
        ({"text_column": "words"}, "words"),
        ({"samples": 1000}, "fewer than the 1000 to draw; take more data, or lower samples"),
        ({"samples": 0}, "samples: must be at least 1"),
        ({"block_size": 65}, "block_size: 65 tokens, but the model takes 64; lower it"),
        ({"damping": -1}, "damping: must be at least 0"),
        ({"method": "awq"}, "method"),
        ({"device": "cuda:9"}, "device"),
        ({"skip": "no_such_layer"}, "no_such_layer"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options, told, place, ptq, tmp_path, capsys):
    assert ptq(place / "llama", tmp_path / "run", **options) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("stableqat: ")
    assert told in line
    assert not list(tmp_path.glob("run*"))


def test_sources_and_places_that_cannot_be(runs, place, ptq, tmp_path, capsys):
    data = place / "text.jsonl"
    assert ptq(tmp_path / "nothing", tmp_path / "run", data=data) == 2
    assert "nothing: there is no such run" in capsys.readouterr().err
    assert ptq(place / "llama", runs / "mse") == 2
    assert "mse exists already; name a new folder" in capsys.readouterr().err
    assert ptq(place / "vit", tmp_path / "run", data=data) == 2
    assert ptq(place / "llama", tmp_path / "run", data=place / "images") == 2
    assert not list(tmp_path.glob("run*"))


def test_layers_that_calibration_says_little_about_are_named(place, ptq, tmp_path, caplog):
    folder = shutil.copytree(place / "llama", tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.input_layernorm.weight"][5:9] = 0  # inputs that nothing reaches
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert ptq(folder, tmp_path / "run", samples=1, data=place / "text.jsonl") == 0
    told = "\n".join(caplog.messages)
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in told
    assert "some inputs are 0 in all of the data" in told
    assert "(and 11 more): fewer input vectors than inputs; take more samples" in told
    named = {layer["name"]: layer["unseen"] for layer in record(tmp_path / "run")["layers"]}
    assert [name for name, unseen in named.items() if unseen == 4] == [
        f"model.layers.0.self_attn.{each}_proj" for each in "qkv"
    ]


def test_a_layer_that_is_never_called_is_rounded_to_nearest(place, ptq, tmp_path, caplog):
    assert ptq(place / "llama", tmp_path / "run", skip="*.mlp.*") == 0  # the head lies outside of the blocks
    assert "lm_head: calibration never reaches it, so it is rounded to nearest" in caplog.messages
    module = open_run(str(tmp_path / "run")).load()
    assert "lm_head" in quantized_layers(module.model)


def test_inputs_that_are_not_finite_are_named(place, ptq, tmp_path, capsys):
    folder = shutil.copytree(place / "llama", tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert ptq(folder, tmp_path / "run", data=place / "text.jsonl") == 2
    assert "data: model.layers.1.self_attn.q_proj: its inputs are not finite" in capsys.readouterr().err
    assert (tmp_path / "run.partial" / "block-0.safetensors").exists()

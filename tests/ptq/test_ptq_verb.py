"""The verb: a model becomes a run, which everything else takes, or one line says what is wrong."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import tiny
from stableqat.cli.main import main
from stableqat.layers.linear import quantized_layers
from stableqat.modules import LlamaModule
from stableqat.quantizers import STE, StableQAT
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

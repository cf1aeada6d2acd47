"""The verb: what it measures is what models made by hand lose, and `fit` takes what it writes."""

import csv
import json
from functools import partial

import pytest
import torch
import yaml

from stableqat.cli.main import main
from stableqat.diagnose import measure
from stableqat.layers.linear import quantized_layers
from stableqat.modules import LlamaModule, ViTModule
from stableqat.modules.vit_config import architecture, preprocessing
from stableqat.ptq.gptq import gptq
from stableqat.ptq.subject import Subject, calibration_batches
from stableqat.quantizers import STE
from stableqat.runs import open_run

PICTURES = {"loss.png", "basin.png", "predicted.png", "widths.png"}


def record(out):
    return json.loads((out / "diagnosis.json").read_text())


@pytest.fixture(scope="module")
def llama(place, diagnose, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosis") / "llama"
    assert diagnose(place / "llama", out) == 0
    return out


@pytest.fixture(scope="module")
def vit(place, diagnose, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosis") / "vit"
    assert (
        diagnose(
            place / "vit", out, block_size=None, batch_size=4, skip="head fc1", bits="2 4 8", size_budget=3
        )
        == 0
    )
    return out


class Plain:
    """The model in full precision, with the rows that the verb draws."""

    def __init__(self, place, family):
        if family == "llama":
            self.module = LlamaModule(init_from=str(place / "llama"))
        else:
            name, args = architecture(str(place / "vit"))
            self.module = ViTModule(
                model_name=name, model_args=args, num_classes=3, init_from=str(place / "vit")
            )
        self.module.configure_model()
        self.module.eval()
        images = {} if family == "llama" else preprocessing(str(place / "vit"), "")
        tokenizer = None
        if family == "llama":
            from stableqat.data.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(str(place / "llama"))
        rows = calibration_batches(
            Subject(self.module, tokenizer, images=images),
            str(place / ("text.jsonl" if family == "llama" else "images")),
            text_column="text",
            samples=8,
            block_size=16 if family == "llama" else None,
            batch_size=1,
            seed=0,
        )
        self.calibration, self.held_out = rows[:6], rows[6:]

    @torch.no_grad()
    def loss(self, values):
        """With other values of some layers' weights."""
        weights = {name: self.module.model.get_submodule(name).weight for name in values}
        before = {name: weight.clone() for name, weight in weights.items()}
        for name, value in values.items():
            weights[name].copy_(value)
        found = torch.stack([self.module.loss(row) for row in self.held_out]).mean().item()
        for name, value in before.items():
            weights[name].copy_(value)
        return found

    @torch.no_grad()
    def rounded(self, name, bits, method):
        layer, seen = self.module.model.get_submodule(name), []
        quantizer = STE(layer.weight, bits=bits)
        if method == "rtn":
            return quantizer.quantize(layer.weight).dequantize()
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
        for row in self.calibration:
            self.module.loss(row)
        handle.remove()
        inputs = torch.cat(seen)
        return gptq(layer.weight, 2 * inputs.T @ inputs / len(inputs), quantizer).weight.dequantize()


@pytest.mark.parametrize("family", ["llama", "vit"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_it_measures_is_what_models_made_by_hand_lose(family, method, place, request):
    measured, plain = record(request.getfixturevalue(family))["measured"], Plain(place, family)
    assert measured["loss"] == pytest.approx(plain.loss({}), rel=1e-5)
    names = [layer["name"] for layer in measured["layers"]]
    assert len(names) == {"llama": 14, "vit": 6}[family]
    for layer in (measured["layers"][0], measured["layers"][-1]):
        for bits in (2, 4):
            rise = plain.loss({layer["name"]: plain.rounded(layer["name"], bits, method)}) - measured["loss"]
            assert layer["settings"][str(bits)][method]["rise"] == pytest.approx(rise, abs=2e-4)
            assert abs(rise) > 1e-3 or bits == 4
    whole = plain.loss({name: plain.rounded(name, 2, method) for name in names})
    assert measured["model"]["2"][method] == pytest.approx(whole, rel=1e-4)


def test_the_basin_ends_where_the_loss_has_risen(llama, place):
    measured, plain = record(llama)["measured"], Plain(place, "llama")
    for layer in measured["layers"][::5]:
        weight = plain.module.model.get_submodule(layer["name"]).weight.detach()
        scale = STE(weight, bits=2).effective_scale()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * scale
        unit = noise / noise.square().mean().sqrt()
        highest = {
            share: max(
                plain.loss({layer["name"]: weight + side * share * layer["width"] / 2 * unit})
                for side in (1, -1)
            )
            for share in (0.75, 1.3)
        }
        assert highest[0.75] < measured["loss"] + 0.1 < highest[1.3]
        assert layer["settings"]["2"]["step"] == pytest.approx(scale.square().mean().sqrt().item())


def test_tables_and_pictures(llama):
    found = record(llama)
    with (llama / "diagnosis.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 14 * 3 == len(found["table"])
    layer, row = found["measured"]["layers"][0], found["table"][0]
    setting = layer["settings"]["2"]
    assert (
        row["gptq actual"]
        == setting["gptq"]["rise"] - setting["gptq"]["slope"]
        == float(table[0]["gptq actual"])
    )
    assert row["step / width"] == setting["step"] / layer["width"]
    line = found["summary"][0]
    assert line["rtn actual"] == found["measured"]["model"]["2"]["rtn"] - found["measured"]["loss"]
    assert line["rtn predicted"] == pytest.approx(
        sum(each["settings"]["2"]["rtn"]["curvature"] / 2 for each in found["measured"]["layers"])
    )
    files = {path.name for path in llama.iterdir()}
    assert files == PICTURES | {"diagnosis.csv", "diagnosis.json", "quantizer-4.yaml"}


@pytest.mark.parametrize(("family", "budget"), [("llama", "4"), ("vit", "3")])
def test_fit_takes_the_mapping_as_it_is(family, budget, place, request, tmp_path):
    out = request.getfixturevalue(family)
    widths = record(out)["mixed"][budget]["widths"]
    data = place / ("text.jsonl" if family == "llama" else "images")
    flags = ["--model.init_from", place / family, "--data.source", data, "--trainer.max_steps", 1]
    flags += ["--data.validation_fraction", 0.3]
    flags += [
        "--trainer.logger.save_dir",
        tmp_path,
        "--trainer.accelerator",
        "cpu",
        "--baseline.enabled",
        "false",
    ]
    assert (
        main(
            ["fit", "-c", f"{family}/finetune", "-c", str(out / f"quantizer-{budget}.yaml"), *map(str, flags)]
        )
        == 0
    )
    (run,) = tmp_path.rglob("config.yaml")
    layers = quantized_layers(open_run(str(run.parent)).load().model)
    assert {name: layer.weight_quantizer.bits for name, layer in layers.items()} == widths
    assert len(set(widths.values())) > 1


@pytest.mark.slow
def test_a_diagnosis_is_a_source(llama, diagnose, tmp_path, capsys):
    """Other budgets and another tolerance of the same measurements; the first diagnosis stays as it was."""
    before = {path: path.read_bytes() for path in llama.iterdir()}
    unsaid = dict.fromkeys(("data", "samples", "held_out", "block_size"))
    options = {**unsaid, "size_budget": "2.5 3", "tolerance": 1e9}
    assert diagnose(llama, tmp_path / "other", **options) == 0
    found = record(tmp_path / "other")
    assert found["measured"] == record(llama)["measured"]
    assert {row["verdict"] for row in found["table"]} == {"RTN is enough"}
    for budget in ("2.5", "3"):
        assert found["mixed"][budget]["bits"] <= float(budget)
        assert (tmp_path / "other" / f"quantizer-{budget}.yaml").exists()
    assert diagnose(llama, tmp_path / "third", **{**options, "bits": "2,3"}) == 2
    assert "was measured with [2, 4, 8], not [2, 3]; leave it out" in capsys.readouterr().err
    uniform = found["mixed"]["2.5"]["uniform"]
    assert uniform["bits"] == 2
    assert found["mixed"]["2.5"]["score"] <= uniform["score"]
    assert {path: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.slow
def test_groups_and_grids_reach_the_mapping(place, diagnose, tmp_path):
    options = {"bits": "2,4", "group_size": 16, "grid": "stretched", "quantizer": "STE", "directions": 0}
    assert diagnose(place / "llama", tmp_path / "out", **options) == 0
    made = yaml.safe_load((tmp_path / "out" / "quantizer-3.yaml").read_text())["model"]["init_args"][
        "quantizer"
    ]
    for each in made.values():
        assert each["class_path"] == "stableqat.quantizers.STE"
        assert each["init_args"].keys() == {"bits", "grid", "group_size"}
    layer = record(tmp_path / "out")["measured"]["layers"][0]
    plain = Plain(place, "llama")
    weight = plain.module.model.get_submodule(layer["name"]).weight
    quantizer = partial(STE, bits=2, group_size=16, grid="stretched")(weight)
    rise = plain.loss({layer["name"]: quantizer.quantize(weight).dequantize()}) - plain.loss({})
    assert layer["settings"]["2"]["rtn"]["rise"] == pytest.approx(rise, abs=1e-4)


@pytest.mark.slow
def test_blocks_may_be_left_alone(llama, place, diagnose, tmp_path):
    options = {"bits": "2,4", "skip": "lm_head model.layers.0.*", "directions": 0}
    assert diagnose(place / "llama", tmp_path / "out", **options) == 0
    found, whole = record(tmp_path / "out")["measured"]["layers"], record(llama)["measured"]["layers"][7:]
    assert [layer["name"] for layer in found] == [layer["name"] for layer in whole]
    for one, other in zip(found, whole, strict=True):
        assert one["settings"]["2"] == other["settings"]["2"]
    made = yaml.safe_load((tmp_path / "out" / "quantizer-3.yaml").read_text())["model"]["init_args"]
    assert made["skip"] == ["lm_head", "model.layers.0.*"]


def interrupted(monkeypatch, after):
    """Let the user interrupt after some blocks; count those that are measured."""
    real, calls = measure.measure_layers, []

    def counted(*args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(measure, "measure_layers", counted)
    return calls


def test_the_same_command_goes_on(llama, place, diagnose, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        assert diagnose(place / "llama", out) == 130
    assert not out.exists()
    partial_ = tmp_path / "out.partial"
    assert {path.name for path in partial_.iterdir()} == {"settings.json", "block-0.safetensors"}
    assert diagnose(place / "llama", out, seed=1) == 2
    assert "was begun with seed 0, not 1" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        calls = interrupted(patch, 2)
        assert diagnose(place / "llama", out) == 0
    assert len(calls) == 1
    assert record(out) == record(llama)
    assert not partial_.exists()
    assert diagnose(place / "llama", out) == 2
    assert "out exists already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": "2,9"}, "bits: '9' is no width of a code; give numbers from 1 to 8, such as 2,3,4,8"),
        ({"bits": "two"}, "bits: 'two' is no width"),
        ({"size_budget": 1.5}, "size_budget: 1.5 bits per weight, but the narrowest width is 2; raise it"),
        ({"data": None}, "data: missing; give text or images"),
        ({"data": "nowhere/text.jsonl"}, "nowhere/text.jsonl"),
        ({"samples": 1000}, "fewer than the 1002 to draw; take more data, or lower samples"),
        ({"held_out": 0}, "held_out: must be at least 1"),
        ({"block_size": 65}, "block_size: 65 tokens, but the model takes 64"),
        ({"rise": 0}, "rise: must be at least"),
        ({"quantizer": "Quantizer"}, "quantizer: 'Quantizer' is unknown; choose one of"),
        ({"quantizer": "LRQAT"}, "quantizer: 'LRQAT' is unknown; choose one of"),
        ({"group_size": 7}, "group_size"),
        ({"skip": "no_such_layer"}, "no_such_layer"),
        ({"skip": "*.mlp.*"}, "skip: lm_head is no linear layer of a transformer block"),
        ({"device": "cuda:9"}, "device"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options, told, place, diagnose, tmp_path, capsys):
    assert diagnose(place / "llama", tmp_path / "out", **options) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("stableqat: ")
    assert told in line
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_no_diagnosis(diagnose, tmp_path, capsys):
    (tmp_path / "diagnosis.json").write_text("{}")
    assert diagnose(tmp_path, tmp_path / "out", data=None) == 2
    assert "diagnosis.json: is not what a diagnosis holds" in capsys.readouterr().err

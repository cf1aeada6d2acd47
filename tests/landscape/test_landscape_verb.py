"""`stableqat landscape` on runs of both families: its figures are those of the models, and it resumes."""

import csv
import json
import shutil

import pytest
import torch

from stableqat.cli.main import main
from stableqat.landscape import parts as measured
from stableqat.layers.full_precision import full_precision
from stableqat.runs import open_run

FEW = {"batches": 2, "points": 3, "grid": 3, "layers": 2, "directions": 1, "lanczos": 3, "device": "cpu"}


def call(*runs, out, **options):
    pairs = [(f"--{key}", *str(value).split()) for key, value in (FEW | options).items()]
    flags = [each for pair in pairs for each in pair]
    return main(["landscape", *map(str, runs), "--out", str(out), *flags])


@torch.no_grad()
def loss(module, run, *, latent=False):
    """The mean loss of the first two validation batches, by the module's own validation."""
    data = run.data()
    data.setup("validate")
    module.eval()
    with full_precision(module) if latent else torch.no_grad():
        for number, batch in zip(range(2), data.val_dataloader(), strict=False):
            module.validation_step(batch, number)
        return module.val_loss.compute()["loss"].item()


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_what_it_measures_is_what_the_models_do(family, request, tmp_path):
    folder, start = request.getfixturevalue(family)
    out = tmp_path / "out"
    assert call(folder, out=out, parts="ends lines inward map") == 0
    record, run = json.loads((out / f"{folder.name}.json").read_text()), open_run(str(folder))

    rounded, trained = run.load_start(quantized=True), run.load()
    known = {
        "start": loss(open_run(str(start)).load(), run),
        "start_deployed": loss(rounded, run),
        "trained": loss(trained, run, latent=True),
        "trained_deployed": loss(run.load(), run),
    }
    ends = record["ends"]["loss"]
    assert ends == pytest.approx(known, rel=1e-5)
    assert len({round(value, 4) for value in ends.values()}) == 4
    assert 0 < record["ends"]["codes_changed"] < 1

    lines = record["lines"]
    for name, (first, last) in measured.LINES.items():
        assert lines[name]["loss"][0] == pytest.approx(ends[first], rel=1e-5)
        assert lines[name]["loss"][-1] == pytest.approx(ends[last], rel=1e-5)
    assert lines["start to trained"]["predicted"][0] == pytest.approx(ends["start"], rel=1e-5)
    assert lines["start to trained"]["ratio"] is not None

    assert set(record["inward"]) == {
        f"{a}_at_{b}" for a in ("start", "trained") for b in ("weights", "deployed")
    }
    assert all(-1 <= value <= 1 for value in record["inward"].values())

    places = record["map"]["places"]
    assert places["start"] == [0, 0, 0]
    assert places["start_deployed"][1:] == pytest.approx([0, 0], abs=1e-2 * places["start_deployed"][0])
    assert places["trained_deployed"][2] == pytest.approx(0, abs=1e-2 * places["trained_deployed"][1])
    assert [len(record["map"]["loss"]), len(record["map"]["loss"][0])] == [3, 3]
    for page in ("lines.png", "map.png"):
        assert (out / page).read_bytes()[:4] == b"\x89PNG"
    (row,) = csv.DictReader((out / "landscape.csv").open())
    assert float(row["deployed"]) == pytest.approx(known["trained_deployed"], rel=1e-5)


def test_activations_stay_in_full_precision(vit, fit, tmp_path, caplog):
    """Of a run that quantizes them: the losses are those of its weights alone, and a line says so."""
    _, start = vit
    inputs = {"class_path": "stableqat.quantizers.inputs.LSQPlus", "init_args": {"bits": 2}}
    options = {"input_quantizer": inputs, "attention_quantizer": inputs}
    quantizer = {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 2}}
    folder = fit("activations", "vit", quantizer, start, options)
    assert call(folder, out=tmp_path, parts="ends lines inward map") == 0
    run = open_run(str(folder))
    trained = loss(run.load(), run, latent=True)
    assert json.loads((tmp_path / "activations.json").read_text())["ends"]["loss"]["trained"] == trained
    assert "quantizes activations, which stay in full precision" in caplog.text


def test_the_basin_and_the_way(llama, tmp_path):
    folder, _ = llama
    assert call(folder, out=tmp_path, parts="basin map") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(record["basin"]) == 2
    for layer in record["basin"].values():
        assert 0.05 < layer["rounding"] < 2
        assert layer["random"] is None or layer["random"] > 0
        assert layer["top_reach"] < layer["rounding"] * 1.001
    way = record["map"]["way"]
    assert [each[0] for each in way] == [0, 2, 4, 6]
    places = record["map"]["places"]
    for point, known in ((way[0], places["start_deployed"]), (way[-1], places["trained_deployed"])):
        size = places["start_deployed"][0]
        assert point[1:] == pytest.approx(known, abs=1e-2 * size)
    assert (tmp_path / "trajectory.png").exists()
    assert (tmp_path / "basin.png").exists()


def test_a_study_with_rounded_runs_and_full_precision(llama, fit, tmp_path, capsys):
    folder, start = llama
    rounded = folder.parent / "gptq"
    data = folder.parent.parent / "text.jsonl"
    options = {"data": data, "samples": 4, "block_size": 16, "bits": 2, "device": "cpu"}
    pairs = [each for key, value in options.items() for each in (f"--{key}", str(value))]
    assert main(["ptq", str(start), "--out", str(rounded), *pairs]) == 0
    assert call(folder.parent / "run", rounded, start, out=tmp_path, parts="map") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    _, _, distance, value = record["map"]["others"]["gptq"]
    assert value == pytest.approx(loss(open_run(str(rounded)).load(), open_run(str(folder))), rel=1e-5)
    assert distance > 0
    assert "full precision" in capsys.readouterr().err
    study = tmp_path / "study"
    study.mkdir()
    for each in ("run", "gptq", "start"):
        shutil.copytree(folder.parent / each, study / each)
    for each in ("validated", "broken"):
        (study / each).mkdir()
        (study / each / "config.yaml").write_text("{}")
    (study / "broken" / "checkpoints").mkdir()
    assert call(study, out=tmp_path / "all", parts="ends") == 0
    told = capsys.readouterr().err
    assert "broken" in told
    assert "validated" not in told
    assert [path.name for path in (tmp_path / "all").glob("*.json")] == ["run.json"]


def test_it_resumes_and_adds_what_is_new(llama, tmp_path, monkeypatch):
    folder, _ = llama
    real, calls = dict(measured.PARTS), []

    def failing(*args):
        raise RuntimeError("boom")

    monkeypatch.setitem(measured.PARTS, "inward", failing)
    with pytest.raises(RuntimeError, match="boom"):
        call(folder, out=tmp_path, parts="ends inward")
    kept = json.loads((tmp_path / "run.json").read_text())
    assert "ends" in kept
    assert "inward" not in kept
    for name, part in real.items():
        monkeypatch.setitem(measured.PARTS, name, lambda *a, n=name, p=part: calls.append(n) or p(*a))
    assert call(folder, out=tmp_path, parts="ends inward") == 0
    assert calls == ["inward"]
    assert json.loads((tmp_path / "run.json").read_text())["ends"] == kept["ends"]
    assert call(folder, out=tmp_path, parts="ends inward") == 0
    assert calls == ["inward"]


def refused(capsys, *runs, **options):
    assert call(*runs, **options) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_mistakes_are_one_line(llama, tmp_path, capsys):
    folder, start = llama
    assert call(folder, out=tmp_path / "out", parts="ends") == 0
    line = refused(capsys, folder, out=tmp_path / "out", parts="ends", batches=1)
    assert "batches: " in line
    assert "was measured with 2, not 1; name another --out" in line
    assert "runs: none was trained with quantizers" in refused(capsys, start, out=tmp_path / "new")
    assert "there is no such run" in refused(capsys, tmp_path / "nowhere", out=tmp_path / "new")
    (tmp_path / "empty").mkdir()
    assert "runs: none was trained" in refused(capsys, tmp_path / "empty", out=tmp_path / "new")
    assert "rise: must be at least" in refused(capsys, folder, out=tmp_path / "new", rise=0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "out" / "run.json").write_text("{")
    assert "is not a record" in refused(capsys, folder, out=tmp_path / "out", parts="ends")

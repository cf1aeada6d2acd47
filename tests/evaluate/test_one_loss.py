"""One checkpoint has one validation loss, whoever computes it, and what is of a part says so."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from stableqat.cli.main import main
from stableqat.events import read_run

VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 2}


def fit(kind: str, run: Path, folder: Path, **trainer) -> Path:
    """Train for three steps as the run of a text did, or on digits."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    if kind == "images":
        settings["model"] = {
            "class_path": "stableqat.modules.ViTModule",
            "init_args": {"model_name": "vit_tiny_patch16_224", "num_classes": 10, "model_args": VIT},
        }
        settings["model"]["init_args"]["quantizer"] = {
            "class_path": "stableqat.quantizers.STE",
            "init_args": {"bits": 2},
        }
        settings["data"] = {"class_path": "stableqat.data.ImageDataModule", "init_args": {"batch_size": 4}}
    settings["trainer"]["logger"]["init_args"] |= {"save_dir": str(folder), "version": kind}
    settings["trainer"] |= {"max_steps": 3, "val_check_interval": 3, **trainer}
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "-c", str(folder / f"{kind}.yaml")]) == 0
    return folder / kind


def figures(record: dict, kind: str) -> dict:
    return record["images" if kind == "images" else "perplexity"]["validation"]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_fit_evaluate_and_export_agree_on_the_same_rows(kind, run, tmp_path, capsys):
    made = fit(kind, run, tmp_path, limit_val_batches={"text": 0.5, "images": 0.02}[kind])
    logged = read_run(made).last("val/loss")
    out = tmp_path / "out.json"
    assert main(["evaluate", str(made), "--device", "cpu", "--out", str(out)]) == 0
    told = figures(json.loads(out.read_text())["sources"][0], kind)
    assert told["loss"] == pytest.approx(logged, rel=1e-6)
    assert re.match(r"validation \(the first \d+ of \d+ rows, as in training\)", told["split"])
    assert told["split"] in capsys.readouterr().out
    assert (
        main(["export", str(made), "--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")])
        == 0
    )
    report = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert report["batch"] == "validation data of the run"
    assert report["loss"]["trained"] == pytest.approx(logged, rel=1e-6)
    assert report["val_loss"] == pytest.approx(logged, rel=1e-6)
    # the whole split is another figure
    whole = tmp_path / "whole.json"
    assert main(["evaluate", str(made), "--split", "validation", "--device", "cpu", "--out", str(whole)]) == 0
    other = figures(json.loads(whole.read_text())["sources"][0], kind)
    assert other["split"] == "validation"
    assert other["loss"] != pytest.approx(logged, rel=1e-4)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_loss_of_fewer_rows_says_so(kind, run, tmp_path, capsys, monkeypatch):
    made = fit(kind, run, tmp_path)
    monkeypatch.setattr("stableqat.export.source.ROWS", 3)
    capsys.readouterr()
    assert (
        main(["export", str(made), "--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")])
        == 0
    )
    report = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert report["batch"].startswith("the first 3 of ")
    assert report["batch"].endswith(" rows of the run's validation data")
    assert f"loss on {report['batch']}: trained" in capsys.readouterr().out
    out = tmp_path / "out.json"
    assert main(["evaluate", str(made), "--device", "cpu", "--out", str(out)]) == 0
    told = figures(json.loads(out.read_text())["sources"][0], kind)
    assert told["split"] == "validation"
    assert told["loss"] == pytest.approx(read_run(made).last("val/loss"), rel=1e-6)


def test_another_block_length_takes_the_whole_split(run, tmp_path):
    made = fit("text", run, tmp_path, limit_val_batches=1)
    copy, out = shutil.copytree(made, tmp_path / "copy"), tmp_path / "out.json"
    assert main(["evaluate", str(copy), "--block_size", "8", "--device", "cpu", "--out", str(out)]) == 0
    assert figures(json.loads(out.read_text())["sources"][0], "text")["split"] == "validation"

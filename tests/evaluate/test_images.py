"""Accuracies and confusion of vision transformers, of runs and of exported folders."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from stableqat.cli.main import main
from stableqat.data.embedded import embedded_digits
from stableqat.data.holdout import held_out_images
from stableqat.events import read_run

VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 2}


def fit(folder, version, **more):
    """A run of a few steps on the embedded digits."""
    logger = {"save_dir": str(folder), "name": "", "version": version, "default_hp_metric": False}
    settings = {
        "model": {
            "class_path": "stableqat.modules.ViTModule",
            "init_args": {
                "model_name": "vit_tiny_patch16_224",
                "num_classes": 10,
                "model_args": VIT,
                "quantizer": {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 2}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
                **more,
            },
        },
        "data": {"class_path": "stableqat.data.ImageDataModule", "init_args": {"batch_size": 64}},
        "baseline": {"enabled": False},  # few steps may be no better than chance
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 20,
            "val_check_interval": 20,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        },
    }
    (folder / "vit.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "-c", str(folder / "vit.yaml")]) == 0
    return folder / version


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("vit"), "run")


def call(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu", "--batch_size", "50"])


def test_a_run_and_its_export(vit, tmp_path, capsys):
    run = shutil.copytree(vit, tmp_path / "run")
    options = ["--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")]
    assert main(["export", str(run), *options]) == 0
    card, loss = (tmp_path / "hf" / "README.md").read_text(), read_run(run).last("val/loss")
    assert f"| validation loss of the run | {loss:.4g} |" in card
    out = tmp_path / "results.json"
    assert call(run, tmp_path / "hf", "--out", out) == 0
    live, folder = (record["images"]["validation"] for record in json.loads(out.read_text())["sources"])
    assert live == folder
    logged = read_run(vit)
    for what in ("top1", "top5", "loss"):
        assert live[what] == pytest.approx(logged.last(f"val/{what}"), rel=1e-5), what
    assert 0.1 < live["top1"] < live["top5"] <= 1
    confusion = np.array(live["confusion"])
    labels = embedded_digits()[1]
    labels = labels[held_out_images(labels, 0.2)]
    assert confusion.sum(1).tolist() == np.bincount(labels).tolist()  # a row a true class
    assert np.trace(confusion) / confusion.sum() == pytest.approx(live["top1"])
    assert live["images"] == len(labels)
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
    assert read_run(run, ("eval/",)).last("eval/top1/validation") == pytest.approx(live["top1"])
    assert f"{live['top1']:.4f}" in capsys.readouterr().out


def test_baselines_of_a_run_with_quantized_activations(vit, tmp_path):
    inputs = {"class_path": "stableqat.quantizers.inputs.LSQ", "init_args": {"bits": 8}}
    both = {"input_quantizer": inputs, "attention_quantizer": inputs}
    run = fit(tmp_path, "both", **both, init_from=str(vit))
    assert call(run, "--baselines", "true", "--out", tmp_path / "results.json") == 0
    told = json.loads((tmp_path / "results.json").read_text())["sources"]
    assert [each["about"] for each in told] == [
        "STE, 2 bits, integer, W2A8",
        "its start, full precision",
        "its start, rounded to nearest, STE, 2 bits, integer, activations in full precision",
    ]
    assert len({each["images"]["validation"]["loss"] for each in told}) == 3


@pytest.fixture
def folders(tmp_path):
    """An image folder, a folder a class."""
    for label in range(2):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number in range(10):
            rising = (np.arange(64) ** 2 // 40).reshape(8, 8, 1) + np.array([0, 10, 20])
            image = Image.fromarray((5 * number + 60 * label + rising).astype(np.uint8))
            image.save(tmp_path / "images" / f"class{label}" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def timm_folder(tmp_path):
    """A folder of timm, of a model of two classes, and the model."""
    import timm
    from safetensors.torch import save_model

    arguments = {**VIT, "in_chans": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    (tmp_path / "model").mkdir()
    save_model(model, str(tmp_path / "model" / "model.safetensors"))
    pretrained = {"input_size": [3, 8, 8], "num_classes": 2, "first_conv": "patch_embed.proj"}
    pretrained |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    pretrained |= {"interpolation": "bilinear", "crop_pct": 0.6}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": arguments}
    config["pretrained_cfg"] = {**pretrained, "classifier": "head"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model", model


def test_an_image_folder(timm_folder, folders, tmp_path, capsys):
    import timm

    place, model = timm_folder
    assert call(place, "--data", folders, "--out", tmp_path / "one.json") == 0
    told = json.loads((tmp_path / "one.json").read_text())["sources"][0]["images"]["images"]
    assert (told["images"], told["split"]) == (20, "all")
    assert told["classes"] == ["class0", "class1"]
    assert "top5" not in told  # always 1
    assert "top1/images" in capsys.readouterr().out
    assert call(place, "--data", folders, "--split", "validation") == 2
    assert "split: the data has no validation (it has train)" in capsys.readouterr().err
    other = shutil.copytree(folders, tmp_path / "other" / "images")
    assert call(place, "--data", folders, other, "--out", tmp_path / "two.json") == 0
    two = json.loads((tmp_path / "two.json").read_text())["sources"][0]["images"]
    assert {name: each["data"] for name, each in two.items()} == {
        f"{tmp_path.name}/images": str(folders),
        "other/images": str(other),
    }
    # `told` is of images prepared as timm itself does for the model
    prepare = timm.data.create_transform((3, 8, 8), crop_pct=0.6, interpolation="bilinear",
                                         mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))  # fmt: skip
    losses = []
    for label in range(2):
        for number in range(10):
            with Image.open(folders / f"class{label}" / f"{number}.png") as image:
                images = prepare(image)[None]
            with torch.no_grad():
                losses.append(F.cross_entropy(model.eval()(images), torch.tensor([label])).item())
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def parquet(file, count):
    """Images of two classes, told by numbers, in a parquet file."""
    from datasets import Dataset, Features, Image, Value

    pixels = [np.full((8, 8, 3), 9 * number, np.uint8) for number in range(count)]
    labels = [number % 2 for number in range(count)]
    features = Features({"image": Image(), "label": Value("int64")})
    file.parent.mkdir(exist_ok=True)
    Dataset.from_dict({"image": pixels, "label": labels}, features=features).to_parquet(file)


def test_splits_that_are_there(timm_folder, tmp_path, capsys):
    """A folder needs no training files to be evaluated on; a file that names no split is taken whole."""
    parquet(tmp_path / "one" / "test-00000-of-00001.parquet", 12)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    parquet(tmp_path / "two" / "val-0.parquet", 7)
    one, two = tmp_path / "one", tmp_path / "two"
    for data, split, told in (
        (one, None, "one: test; 12 images"),
        (one, "test", "one: test; 12 images"),
        (one / "test-00000-of-00001.parquet", None, ".parquet: all; 12 images"),
        (two, None, "two: test; 12 images"),
        (two, "validation", "two: validation; 7 images"),
    ):
        assert call(timm_folder[0], "--data", data, *([] if split is None else ["--split", split])) == 0
        assert told in capsys.readouterr().out
    assert call(timm_folder[0], "--data", two, "--split", "train") == 2
    assert "split: the data has no train (it has " in capsys.readouterr().err


def test_mistakes_are_one_line(vit, folders, tmp_path, capsys):
    def refused(*arguments):
        assert call(*arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    line = refused(vit, "--data", folders)
    assert "data: images of 8 pixels and 3 channels, the model takes 8 and 1" in line
    (tmp_path / "empty").mkdir()
    line = refused(vit, "--data", tmp_path / "empty")
    assert line.startswith(f"stableqat: no data file in {tmp_path / 'empty'}: expected")
    assert "the data has no test (it has train, validation)" in refused(vit, "--split", "test")
    pytest.importorskip("lm_eval")
    (tmp_path / "one.yaml").write_text("task: one\n")
    line = refused(vit, "--tasks", "one", "--tasks_path", tmp_path)
    assert f"tasks: need language models, and {vit} classifies images" in line


def test_titles_of_confusion_matrices_stand_apart(tmp_path, monkeypatch):
    """Long names, that of a baseline and one that TeX would take for mathematics."""
    from matplotlib.figure import Figure

    from stableqat.evaluate.report import _draw

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k)))
    matrix = {"confusion": [[3, 1], [0, 2]], "classes": ["a$", "b$"], "top1": 0.8}
    about = ["StableQAT, 2 bits, integer", "its start, rounded to nearest, StableQAT, 2 bits, integer"]
    records = [
        {"source": "logs/stable$qat-b2-lr1e-3-s0-and_more$", "about": each, "images": {"validation": matrix}}
        for each in (*about, about[1])
    ]
    _draw(records, tmp_path / "confusion.png")
    (figure,) = drawn
    boxes = [axis.title.get_window_extent() for axis in figure.axes[:3]]
    assert boxes[0].x0 >= 0
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert max(box.y1 for box in boxes) <= figure.bbox.y1

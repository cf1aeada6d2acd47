"""How images were prepared for a model goes with it, and a start of another task is made to fit."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from jsonargparse import Namespace
from PIL import Image
from safetensors.torch import save_file

from stableqat.cli import inherit as inherited
from stableqat.cli.main import main
from stableqat.data.image import PREPROCESSING
from stableqat.errors import UserError
from stableqat.events import read_run
from stableqat.modules import ViTModule
from starts import ARGS, NAME, OWN, timm_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A start of 5 classes at 16 pixels, and images of 2 classes."""
    folder = tmp_path_factory.mktemp("images")
    timm_folder(folder / "start")
    for label in range(2):
        (folder / "pictures" / f"class{label}").mkdir(parents=True)
        for number in range(10):
            rising = (np.arange(400) ** 2 // 640).reshape(20, 20, 1) // (label + 1) + np.array([0, 10, 20])
            image = Image.fromarray((3 * number + 20 * label + rising).astype(np.uint8))
            image.save(folder / "pictures" / f"class{label}" / f"{number}.png")
    return folder


def call(version, *, model=None, data=None, verb="fit"):
    logger = {"save_dir": "logs", "name": "", "version": version, "default_hp_metric": False}
    settings = {
        "model": {
            "class_path": "stableqat.modules.ViTModule",
            "init_args": {
                "model_name": NAME,
                "num_classes": 2,
                "model_args": {key: value for key, value in ARGS.items() if key != "img_size"},
                "quantizer": {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 2}},
                "init_from": "start",
                **(model or {}),
            },
        },
        "data": {
            "class_path": "stableqat.data.ImageDataModule",
            "init_args": {"source": "pictures", "batch_size": 4, "validation_fraction": 0.3, **(data or {})},
        },
        "baseline": {"stop_at_chance": False},  # starts are random
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "val_check_interval": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        },
    }
    Path(f"{version}.yaml").write_text(yaml.safe_dump(settings))
    return main([verb, "-c", f"{version}.yaml"])


def kept(version):
    return yaml.safe_load(Path(f"logs/{version}/config.yaml").read_text())


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
        assert call("run") == 0
    return "logs/run"


def test_a_folder_of_timm_brings_its_preprocessing_size_and_weights(run, at, tmp_path):
    config = kept("run")
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    assert {key: data[key] for key in OWN} == OWN
    assert data["image_size"] == model["model_args"]["img_size"] == 16
    # training's evaluation, `evaluate`, and the exported folder with what it says of itself are one
    assert (
        main(["export", run, "--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")]) == 0
    )
    told = json.loads((tmp_path / "hf" / "config.json").read_text())["pretrained_cfg"]
    assert {key: told[key] for key in OWN} == OWN
    copy = shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "out.json"
    sources = [str(copy), str(tmp_path / "hf")]
    assert main(["evaluate", *sources, "--device", "cpu", "--out", str(out)]) == 0
    for record in json.loads(out.read_text())["sources"]:
        assert record["images"]["validation"]["loss"] == pytest.approx(
            read_run(Path(run)).last("val/loss"), rel=1e-5
        )


def test_a_run_is_evaluated_on_all_images_of_a_source(run, at, tmp_path, capsys):
    """Its share of validation is of its own images, not of others that --data names."""
    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree("pictures", tmp_path / "other")
    count = len(list(other.rglob("*.png")))
    shutil.copytree(other, tmp_path / "named" / "test")
    for name, told in (("other", "all"), ("named", "test")):
        assert main(["evaluate", str(copy), "--data", str(tmp_path / name), "--device", "cpu"]) == 0
        assert f"{name}: {told}; {count} images" in capsys.readouterr().out


def test_each_model_is_evaluated_on_images_prepared_for_it(run, at, tmp_path):
    """A folder beside a run is not measured with the run's preprocessing."""
    timm_folder(tmp_path / "two", classes=2)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5, 0.5, 0.5], "crop_mode": "center"}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    timm_folder(tmp_path / "three", classes=2)
    out = tmp_path / "out.json"
    sources = [run, str(tmp_path / "two"), str(tmp_path / "three")]
    options = ["--data", "pictures", "--split", "train", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", *sources, *options]) == 0
    _, two, three = (record["images"]["pictures"] for record in json.loads(out.read_text())["sources"])
    assert two["loss"] != pytest.approx(three["loss"], rel=1e-3)  # equal weights, other pixels


def inherit(init_from=None, ckpt_path=None, model_args=None, **given):
    arguments = Namespace(source="pictures", image_size=None, **dict.fromkeys(PREPROCESSING))
    arguments.update(Namespace(**given))
    model = Namespace(init_args=Namespace(model_name=NAME, model_args=model_args, init_from=init_from))
    data = Namespace(class_path="stableqat.data.ImageDataModule", init_args=arguments)
    lines = inherited.inherit(Namespace(model=model, data=data, ckpt_path=ckpt_path))
    taken = {key: arguments[key] for key in (*PREPROCESSING, "image_size")}
    return lines, taken, model.init_args.model_args


def test_weights_alone_take_what_timm_knows_of_the_architecture(at, tmp_path):
    shutil.copy("start/model.safetensors", tmp_path / "alone.safetensors")
    own = timm.get_pretrained_cfg(NAME)
    positions = {"img_size": 16}  # tell the size of the images
    for start, size, known in ((str(tmp_path / "alone.safetensors"), 16, positions), (None, 224, None)):
        _, taken, args = inherit(start)
        assert (list(taken["mean"]), taken["crop_pct"], taken["image_size"]) == (list(own.mean), 0.9, size)
        assert args == known


def test_a_run_and_its_checkpoint_bring_what_they_were_trained_with(run, at):
    for options in ({"init_from": run}, {"ckpt_path": f"{run}/checkpoints/last.ckpt", "model_args": ARGS}):
        lines, taken, args = inherit(**options)
        assert {key: list(v) if isinstance(v, tuple) else v for key, v in taken.items()} == OWN | {
            "image_size": 16
        }
        assert args["img_size"] == 16
        assert lines[-1].startswith(
            "data.mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6], interpolation bilinear, "
        )


def test_a_processor_of_transformers_is_read(at, tmp_path):
    shutil.copy("start/model.safetensors", tmp_path / "model.safetensors")
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "size": {"shortest_edge": 40},
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "crop_size": {"height": 32}}))
    _, taken, args = inherit(str(tmp_path))
    assert taken["mean"] == [0.5] * 3
    assert (taken["std"], taken["crop_pct"], taken["interpolation"]) == ([0.25] * 3, 0.8, "bilinear")
    assert taken["image_size"] == args["img_size"] == 32


def test_another_preprocessing_takes_a_word_and_is_said_in_a_line(at):
    lines, taken, _ = inherit("start", mean=(0.5, 0.5, 0.5), crop_pct=0.7)
    (told,) = [line for line in lines if "not what the model was trained with" in line]
    assert told.startswith("data.mean [0.5, 0.5, 0.5] (the model: [0.1, 0.2, 0.3]): ")
    assert (taken["mean"], taken["std"]) == ((0.5, 0.5, 0.5), OWN["std"])


@pytest.mark.parametrize(("start", "size"), [("start", 24), (None, 32), ("run", 8)])
def test_a_model_follows_the_size_of_the_images(start, size, at, run, capsys):
    start = run if start == "run" else start
    capsys.readouterr()
    assert call(f"size{size}", model={"init_from": start}, data={"image_size": size}) == 0
    assert kept(f"size{size}")["model"]["init_args"]["model_args"]["img_size"] == size
    assert f"stableqat: model.model_args.img_size: {size}, that of the data" in capsys.readouterr().err
    assert np.isfinite(read_run(Path(f"logs/size{size}")).last("val/loss"))


def test_a_size_that_the_model_does_not_take_is_refused_from_python(at):
    from stableqat.data import ImageDataModule

    module = ViTModule(
        model_name=NAME, num_classes=2, model_args={"depth": 1, "embed_dim": 24, "num_heads": 2}
    )
    with pytest.raises(UserError, match=r"img_size: the model takes 224, but the data has image_size 112"):
        module.check_data(ImageDataModule("pictures", image_size=112))
    free = {"depth": 1, "embed_dim": 24, "num_heads": 2, "dynamic_img_size": True}
    ViTModule(model_name=NAME, num_classes=2, model_args=free).check_data(
        ImageDataModule("pictures", image_size=112)
    )


@pytest.mark.parametrize(
    ("classes", "size", "told"),
    [
        (5, 16, ""),
        (3, 16, "a new classifier of 3 classes (the start has one of 5)"),
        (5, 24, "positions resampled from 4x4 to 6x6 patches"),
        (
            3,
            8,
            "a new classifier of 3 classes (the start has one of 5), positions resampled from 4x4 to 2x2",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["file", "run"])
def test_a_start_of_other_classes_or_size_is_made_to_fit(kind, classes, size, told, at, tmp_path, caplog):
    state = timm_folder(tmp_path / "own")
    source = tmp_path / "own" / "model.safetensors"
    if kind == "run":
        source = tmp_path / "last.ckpt"
        torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, source)
    module = ViTModule(
        model_name=NAME, num_classes=classes, model_args={**ARGS, "img_size": size}, init_from=str(source)
    )
    with caplog.at_level(logging.INFO):
        module.configure_model()
    loaded, fresh = module.model.state_dict(), module.build_model().state_dict()
    same = {key for key in state if key in loaded and torch.equal(state[key], loaded[key])}
    expected = {"head.weight", "head.bias"} if classes == 3 else set()
    expected |= {"pos_embed"} if size != 16 else set()
    assert set(state) - same == expected
    assert loaded["pos_embed"].shape == fresh["pos_embed"].shape
    if size != 16:  # the class token's place stays what it was
        assert torch.equal(loaded["pos_embed"][:, :1], state["pos_embed"][:, :1])
    lines = [record.message for record in caplog.records if "init_from" in record.message]
    assert len(lines) == bool(told)
    assert all(told in line and str(source) in line for line in lines)


def test_a_start_without_a_classifier_gets_a_new_one(tmp_path, caplog):
    model = timm.create_model(NAME, num_classes=0, **ARGS)
    save_file(model.state_dict(), tmp_path / "features.safetensors")
    module = ViTModule(
        model_name=NAME, num_classes=2, model_args=ARGS, init_from=str(tmp_path / "features.safetensors")
    )
    with caplog.at_level(logging.INFO):
        module.configure_model()
    assert "a new classifier of 2 classes (the start has none)" in caplog.text
    assert torch.equal(module.model.state_dict()["pos_embed"], model.pos_embed)


def test_a_teacher_of_other_pixels_is_said_before_training(place):
    taught = {"key": "model.teacher.source", "source": str(place / "start"), "name": NAME}
    same = Namespace(mean=tuple(OWN["mean"]), std=OWN["std"])
    assert inherited._compare_pixels(same, **taught) == []
    other = Namespace(mean=[0.5, 0.5, 0.5], std=OWN["std"])
    assert inherited._compare_pixels(other, **taught) == [
        f"data.mean [0.5, 0.5, 0.5] (the teacher: [0.1, 0.2, 0.3]): {place / 'start'} was trained with other "
        "pixels"
    ]

"""Classes of images: of a run and of its export, with names where they are known."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from stableqat.cli.main import main
from stableqat.data.embedded import DIGITS_MEAN, DIGITS_STD, embedded_digits
from stableqat.runs import open_run, write_run


@pytest.fixture
def photos(tmp_path):
    """Three digits as images of eight bits, one in a folder below."""
    pixels = (embedded_digits()[0][:3] * 255).round().astype(np.uint8)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, image in zip(("b.png", "a.PNG", "more/c.bmp"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").touch()
    return tmp_path / "photos"


def predict(source, *arguments):
    return main(["predict", str(source), "--device", "cpu", *map(str, arguments)])


def test_a_run_and_its_export_name_the_same_classes(vit, photos, tmp_path, capsys):
    assert predict(vit, "--images", photos, photos / "b.png", "--top_k", 3, "--batch_size", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["a.PNG", "b.png", "more/c.bmp", "b.png"]
    assert [line["image"] for line in lines] == [str(photos / name) for name in names]
    model = open_run(str(vit)).load()
    for line in lines:
        pixels = torch.from_numpy(np.array(Image.open(line["image"]))).float() / 255
        with torch.no_grad():
            chances = model((pixels[None, None] - DIGITS_MEAN) / DIGITS_STD)[0].softmax(-1)
        assert line["classes"] == [str(each) for each in chances.argsort(descending=True)[:3].tolist()]
        assert line["probabilities"] == pytest.approx(chances.sort(descending=True)[0][:3].tolist(), abs=1e-5)
    assert len({line["probabilities"][0] for line in lines}) == 3

    options = ["--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")]
    assert main(["export", str(vit), *options]) == 0
    out = tmp_path / "out.csv"
    assert predict(tmp_path / "hf", "--images", photos, "--top_k", 99, "--out", out) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 10
    assert [row["rank"] for row in rows[:10]] == [str(rank) for rank in range(1, 11)]
    assert [row["class"] for row in rows[10:13]] == lines[1]["classes"]
    assert [float(row["probability"]) for row in rows[10:13]] == pytest.approx(lines[1]["probabilities"])


def rename(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_where_names_of_classes_come_from(vit, photos, tmp_path, capsys, caplog):
    options = ["--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")]
    assert main(["export", str(vit), *options]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]

    def classes():
        capsys.readouterr()
        assert predict(tmp_path / "hf", "--images", photos / "b.png", "--top_k", 10) == 0
        return json.loads(capsys.readouterr().out)["classes"]

    own = classes()
    assert not caplog.messages
    rename(tmp_path / "hf", label_names=list("abcdefghij"))
    assert classes() == ["abcdefghij"[int(each)] for each in own]
    rename(tmp_path / "hf", label_descriptions={"a": "an apple"})
    assert "an apple" in classes()
    rename(tmp_path / "hf", label_names=["too few"])
    assert classes() == own
    assert "the names of its classes are unknown, so they are numbers" in caplog.text


def test_what_a_checkpoint_alone_does_not_say(vit, photos, tmp_path, capsys, caplog):
    folder = tmp_path / "coloured"
    folder.mkdir()
    module = tiny.configured("vit", model_args=tiny.VIT | {"in_chans": 3})
    write_run(folder, module, place=folder)
    options = ["--images", photos / "b.png", "--top_k", 10]
    assert predict(folder, *options) == 0
    assert set(json.loads(capsys.readouterr().out)["classes"]) == {str(label) for label in range(10)}
    assert "the names of its classes are unknown, so they are numbers" in caplog.text
    assert "does not say how to prepare images; ImageNet's usual way is taken" in caplog.text
    alone = shutil.copy(vit / "checkpoints" / "last.ckpt", tmp_path / "grey.ckpt")
    assert predict(alone, *options) == 2
    assert "takes 1 channels, and has no mean and std for an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; name a folder or image files"),
        ({}, "holds no image (.png"),
        ({"a.png": b"no image"}, "a.png is not a readable image"),
    ],
)
def test_a_bad_image_is_one_line(content, said, vit, tmp_path, capsys):
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
        for name, inside in content.items():
            (folder / name).write_bytes(inside)
    assert predict(vit, "--images", folder, "--out", tmp_path / "out.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} <= {"images"}


def test_a_vit_reads_no_text(vit, capsys):
    assert predict(vit, "--prompt", "a") == 2
    assert "takes images, with --images" in capsys.readouterr().err

import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stableqat.data import ImageDataModule, image_cache, image_rows
from stableqat.data.augmentation import TimmTransform
from stableqat.data.holdout import held_out_images
from stableqat.data.image_file import read
from stableqat.data.order import PAD, EvaluationOrder, Loader
from stableqat.errors import UserError

DATA = Path(os.environ.get("STABLEQAT_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def picture(number, size=12):
    """An image of its own colour, with a gradient across."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number * 5, np.arange(size) * 20
    return Image.fromarray(pixels)


def encoded(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def image_folder(root, counts, splits=("",)):
    number = 0
    for split in splits:
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for _ in range(count):
                picture(number).save(folder / f"{number:03}.png")
                number += 1
    return root


def parquet(path, column="img", label="label", names=("cat", "dog"), count=40, labels=None, feature=None):
    import datasets

    labels = labels or [n % len(names) for n in range(count)]
    features = {
        column: datasets.Image(),
        label: feature or (datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")),
    }
    rows = {column: [{"bytes": encoded(n), "path": None} for n in range(count)], label: labels}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path


@pytest.fixture
def make(tmp_path):
    def module(source, **options):
        options = {"image_size": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache")} | options
        data = ImageDataModule(str(source), **options)
        data.prepare_data()
        data.setup("fit")
        return data

    return module


def everything(rows):
    return rows[[(0, 0, index) for index in range(len(rows))]]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.sampled_from([0.1, 0.2, 1 / 3, 0.5]))
def test_each_class_is_held_out_alike(labels, fraction):
    labels = np.array(labels)
    mask = held_out_images(labels, fraction)
    for label in range(5):
        of_class = mask[labels == label]
        assert of_class.sum() == int(len(of_class) * fraction + 1e-9)
        assert (held_out_images(np.zeros(len(of_class), int), fraction) == of_class).all()


class TestDigits:
    def test_split_shape_and_scale(self):
        data = ImageDataModule()
        assert (data.num_classes, data.image_size, data.in_chans) == (10, 8, 1)
        assert data.class_names[7] == "7"
        data.setup()
        train, validation = data.splits["train"], data.splits["validation"]
        assert (len(train), len(validation)) == (1442, 355)
        counts = np.bincount(validation.labels)
        assert counts.min() >= 34
        assert counts.max() <= 36
        batch = next(iter(data.train_dataloader()))
        assert batch["pixel_values"].shape == (64, 1, 8, 8)
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
        plain = ImageDataModule(augment=False)
        plain.setup()
        pixels = everything(plain.splits["train"])["pixel_values"]
        assert abs(pixels.mean().item()) < 1e-3
        assert abs(pixels.std().item() - 1) < 1e-3

    def test_every_image_is_in_one_split(self):
        data = ImageDataModule(augment=False)
        data.setup()
        images = [
            image.tobytes()
            for rows in data.splits.values()
            for image in everything(rows)["pixel_values"].numpy()
        ]
        assert len(images) == 1797
        assert len(set(images)) == 1797

    def test_augmentation_moves_by_a_pixel_and_changes_every_epoch(self):
        data = ImageDataModule()
        data.setup()
        rows = data.splits["train"]
        seen = rows[[(0, epoch, 5) for epoch in range(60)]]["pixel_values"]
        assert len({image.numpy().tobytes() for image in seen}) == 9
        assert torch.equal(rows[[(0, 7, 5)]]["pixel_values"], seen[7:8])

    def test_padding_is_ignored(self):
        data = ImageDataModule()
        data.setup()
        batch = data.splits["validation"][[(0, 0, 1), (0, 0, PAD)]]
        assert batch["labels"][1] == -100
        assert batch["labels"][0] >= 0
        assert batch["pixel_values"].shape == (2, 1, 8, 8)


def test_an_evaluation_may_take_larger_batches_and_training_repeats_images(tmp_path, make):
    root = image_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    data = make(root, validation_fraction=0.5, eval_batch_size=16, batch_size=6, repeated_augmentation=3)
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [16, 4]
    batch = next(iter(data.train_dataloader()))
    assert len(batch["labels"]) == 6
    assert [len(set(batch["labels"][n : n + 3].tolist())) for n in (0, 3)] == [1, 1]
    assert len({image.numpy().tobytes() for image in batch["pixel_values"]}) == 6
    assert [len(batch["labels"]) for batch in make(root, batch_size=3).val_dataloader()] == [3, 1]
    with pytest.raises(UserError, match="eval_batch_size: must be at least 1 or null, not 0"):
        make(root, eval_batch_size=0)
    with pytest.raises(UserError, match="repeated_augmentation: must be at least 1, not 0"):
        make(root, repeated_augmentation=0)


def test_an_image_folder(tmp_path, make):
    data = make(image_folder(tmp_path / "pets", {"cat": 20, "dog": 10, "test_tube": 10}))
    assert data.class_names == ["cat", "dog", "test_tube"]
    assert data.in_chans == 3
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 36, "validation": 4}
    assert np.bincount(data.splits["validation"].labels).tolist() == [2, 1, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 16, 16)


def test_an_image_folder_with_splits(tmp_path, make):
    data = make(image_folder(tmp_path / "pets", {"cat": 3, "train": 2}, ("train", "val", "test")))
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 5,
        "validation": 5,
        "test": 5,
    }
    assert data.class_names == ["cat", "train"]


@pytest.mark.parametrize("names", [("cat", "dog"), None], ids=["class labels", "integers"])
def test_parquet_with_images(tmp_path, make, names):
    parquet(tmp_path / "train-0.parquet", names=names, labels=[n % 2 for n in range(40)])
    data = make(tmp_path / "train-0.parquet")
    assert data.class_names == (list(names) if names else ["0", "1"])
    assert (data.image_column, data.label_column) == ("img", "label")
    assert len(data.splits["validation"]) == 4
    # Evaluation is plain: resize, centre crop, standardise.
    sharp = make(
        tmp_path / "train-0.parquet", image_size=12, crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    held = everything(sharp.splits["validation"])
    numbers = (held["pixel_values"][:, 0, 0, 0] * 255 / 5).round().int().tolist()
    assert numbers == [18, 19, 38, 39]
    assert held["labels"].tolist() == [n % 2 for n in numbers]


def test_string_labels(tmp_path, make):
    import datasets

    labels = ["dog" if n % 2 else "cat" for n in range(40)]
    path = parquet(tmp_path / "a.parquet", label="kind", labels=labels, feature=datasets.Value("string"))
    data = make(path, label_column="kind")
    assert data.class_names == ["cat", "dog"]
    assert data.splits["train"].labels[:4].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("source", ["digits", "parquet"])
def test_workers_and_augmentation_give_the_same_pixels(tmp_path, make, source):
    options = {"seed": 4, "batch_size": 8}
    if source == "parquet":
        path = parquet(tmp_path / "a.parquet")
        options |= {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}

    def epochs(**more):
        data = ImageDataModule(**options, **more) if source == "digits" else make(path, **options, **more)
        data.setup()
        loader = data.train_dataloader()
        return [batch["pixel_values"] for _ in range(2) for _, batch in zip(range(4), loader, strict=False)]

    plain, forked = epochs(), epochs(num_workers=2)
    assert len(plain) == 8
    assert all(torch.equal(one, two) for one, two in zip(plain, forked, strict=True))
    assert not torch.equal(plain[0], epochs(augment=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_values_are_those_of_timms_own_transform(training):
    from timm.data import create_transform

    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.9} if training else {}
    whole = create_transform(
        (3, 16, 16), is_training=training, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), **options
    )
    ours, out = TimmTransform(whole), torch.full((3, 16, 16), torch.nan)
    for number in range(20):
        made = []
        for transform in (whole, lambda image: ours(image, out)):
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(number)
            made.append(transform(picture(number)))
        assert torch.equal(out, made[0])


class TestCache:
    """Images that are few and small are decoded once, by whichever process comes first."""

    @pytest.fixture
    def reader(self, tmp_path, make):
        root = image_folder(tmp_path / "pets", {"cat": 5, "dog": 5}, ("train", "val"))
        picture(4, size=20).save(root / "train" / "cat" / "004.png")
        return make(root).splits["train"].read

    def test_processes_share_it(self, reader, monkeypatch):
        expected = [picture(n, size=20 if n == 4 else 12).tobytes() for n in range(10)]
        worker = multiprocessing.get_context("fork").Process(target=lambda: [reader(n) for n in range(10)])
        worker.start()
        worker.join()
        decoded = []
        note = lambda path, where: decoded.append(where) or read(path, where)  # noqa: E731
        monkeypatch.setattr(image_rows, "read", note)
        assert [reader(n).tobytes() for n in range(10)] == expected
        assert [Path(where).name for where in decoded] == ["004.png"]  # of another size

    def test_it_does_not_travel_to_a_process_that_is_not_forked(self, reader):
        there = pickle.loads(pickle.dumps(reader))
        assert there.cache is None
        assert there(1).tobytes() == picture(1).tobytes()

    def test_many_pixels_are_not_kept(self, reader, monkeypatch):
        assert reader.cache is not None
        monkeypatch.setattr(image_cache, "LIMIT", 10 * 12 * 12 * 3 - 1)
        assert replace(reader, cache=None).with_cache().cache is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", [50, 60])
def test_an_unreadable_image_is_named(tmp_path, make, workers, end):
    root = image_folder(tmp_path / "pets", {"cat": 3, "dog": 3}, ("train", "val"))
    bad = root / "val" / "cat" / "007.png"
    bad.write_bytes(bad.read_bytes()[:end])
    data = make(root, num_workers=workers)
    # Nothing may hold the error, whose traceback keeps the workers.
    with pytest.raises(UserError, match=f"^{re.escape(str(bad))} is not a readable image: [a-z ]+$"):
        list(data.val_dataloader())


class Suicidal:
    """Rows whose first batch costs the worker its life."""

    def __len__(self):
        return 8

    def __getitem__(self, keys):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_end_of_a_worker_is_told():
    loader = Loader(Suicidal(), batch_size=None, sampler=EvaluationOrder(8, 2), num_workers=1)
    with pytest.raises(UserError, match=r"^a data loader worker died .*: lower data.num_workers$"):
        list(loader)


def test_an_unreadable_row_is_numbered(tmp_path, make):
    import datasets

    rows = {
        "image": [{"bytes": encoded(n) if n != 3 else b"junk", "path": None} for n in range(8)],
        "label": [0, 1] * 4,
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    data = make(path, validation_fraction=0.5)
    with pytest.raises(UserError, match=r"a.parquet train row 3 is not a readable image"):
        list(data.val_dataloader()), list(data.train_dataloader())


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["cat/1.png", "2.png"], ["cat/1.png", "cat/x/2.png"]])
def test_images_outside_of_class_folders_are_told(tmp_path, make, names):
    for number, name in enumerate(names):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "pets" / name)
    with pytest.raises(UserError, match=r"pets has images outside the folders of their classes"):
        make(tmp_path / "pets")


def test_a_class_that_training_lacks_is_told(tmp_path, make, caplog):
    image_folder(tmp_path / "pets", {"cat": 2, "dog": 2}, ("train", "val"))
    image_folder(tmp_path / "pets", {"zebra": 2}, ("val",))
    make(tmp_path / "pets")
    assert "pets: 1 classes of validation have no training image: zebra" in caplog.text


def test_class_folders_are_no_patterns(tmp_path, make):
    data = make(image_folder(tmp_path / "pets[1]*", {"cat?": 10, "dog[2]": 10, "dog2": 10}))
    assert data.class_names == ["cat?", "dog2", "dog[2]"]
    assert np.bincount(np.concatenate([rows.labels for rows in data.splits.values()])).tolist() == [10] * 3


def test_a_path_that_is_no_file_is_not_opened(tmp_path, make):
    import pyarrow.parquet

    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    paths = [str(tmp_path / "pipe"), "/dev/zero", "http://127.0.0.1:9/a.png", "zip://a.png::b.zip"]
    for number, path in enumerate(paths):
        table = pyarrow.table({"image": [{"bytes": None, "path": path}] * 4, "label": [0, 1] * 2})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
        with pytest.raises(UserError, match=rf"^{re.escape(path)} is not a file: repair or remove it"):
            make(tmp_path / f"{number}.parquet", validation_fraction=0.5)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data")
def test_cifar10_as_the_hub_has_it(make):
    data = make(next((DATA / "cifar10").glob("test-*.parquet")), image_size=32, batch_size=32)
    assert (data.num_classes, data.image_column, data.label_column) == (10, "img", "label")
    assert data.class_names[0] == "airplane"
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 9000, "validation": 1000}
    batch = next(iter(data.val_dataloader()))
    assert batch["pixel_values"].shape == (32, 3, 32, 32)
    assert abs(batch["pixel_values"].mean().item()) < 1


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original-mstd9", "augmix-m9-mstd9"])
def test_the_strongest_posterizing_keeps_a_bit(make, tmp_path, policy):
    """timm asks for none, which Pillow 13 refuses."""
    data = make(image_folder(tmp_path / "pets", {"cat": 4, "dog": 4}, ("train", "val")), auto_augment=policy)
    operations = [
        operation for each in data.splits["train"].transform.on_image
        for operation in [*getattr(each, "ops", ()), *(o for s in getattr(each, "policy", ()) for o in s)]
        if operation.name.startswith("Posterize")
    ]  # fmt: skip
    assert operations
    for operation in operations:
        coarse = np.asarray(operation.aug_fn(picture(3), 0))
        assert set(np.unique(coarse)) <= {0, 128}
        assert coarse.any()
        assert operation.aug_fn(picture(3), 8).tobytes() == picture(3).tobytes()


def webdataset(root, labels, name="imagenet1k-train-{:04}.tar", broken=None):
    """Two images a shard."""
    root.mkdir(exist_ok=True)
    for shard in range(0, len(labels), 2):
        with tarfile.open(root / name.format(shard), "w") as archive:
            for number in (shard, shard + 1):
                image = b"junk" if number == broken else encoded(number)
                for ending, content in (("png", image), ("cls", str(labels[number]).encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return root


def test_a_webdataset(tmp_path, make):
    root = webdataset(tmp_path / "shards", [0, 1, 2, 0, 1, 2])
    webdataset(root, [2, 0], name="imagenet1k-validation-{:04}.tar")
    data = make(root, batch_size=6)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 6, "validation": 2}
    assert (data.image_column, data.label_column, data.class_names) == ("png", "cls", ["0", "1", "2"])
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (6, 3, 16, 16)
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [2, 0]


def test_what_is_wrong_with_a_webdataset_is_one_line(tmp_path, make):
    root = webdataset(tmp_path / "shards", [0, 1, 0, 1], broken=2)
    data = make(root, validation_fraction=0.5, batch_size=2)
    with pytest.raises(UserError, match=r"shards train row 2 is not a readable image \(PNG, [^\n]+$"):
        list(data.train_dataloader()), list(data.val_dataloader())
    with pytest.raises(UserError, match=r"shards2 cannot be read as webdataset \([^\n]+\): repair it$"):
        make(webdataset(tmp_path / "shards2", [0, "cat"]))
    whole = webdataset(tmp_path / "shards3", [0, 1, 0, 1]) / "imagenet1k-train-0002.tar"
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(
        UserError, match=r"imagenet1k-train-0002.tar is cut short or not a tar archive [^\n]+$"
    ):
        make(whole.parent)


def test_a_label_out_of_range_and_a_hidden_test_split(tmp_path, make, caplog):
    root = tmp_path / "sets"
    root.mkdir()
    parquet(root / "train-0.parquet", count=40)
    parquet(root / "test-0.parquet", count=4, labels=[-1] * 4)
    with caplog.at_level("INFO"):
        assert set(make(root).splits) == {"train", "validation"}
    assert "leaving out the test split, which has no labels" in caplog.text
    parquet(root / "test-0.parquet", count=4, labels=[0, -1, 0, 1])
    with pytest.raises(UserError, match=r"test row 1 of .* has label -1, which is not one of the 2 training"):
        make(root)


def test_a_missing_class_folder_is_one_line(tmp_path, make, caplog):
    root = image_folder(tmp_path / "pets", {"cat": 3, "dog": 3, "owl": 3}, ("train", "val"))
    shutil.rmtree(root / "val" / "dog")
    make(root)
    assert f"{root}: 1 classes of train have no validation image: dog" in caplog.messages

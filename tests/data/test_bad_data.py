"""A user's mistakes: one line that names the file or key and the remedy, as early as it can be known."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from sample_documents import document

from stableqat.data import ImageDataModule, TextDataModule, source
from stableqat.data.source import TEXT_FORMATS, _zst_is_whole
from stableqat.errors import UserError


def rows(count=40):
    return [json.dumps({"text": document(n), "id": n}) for n in range(count)]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*changes):
    """A jsonl file whose lines at some numbers are others."""
    content = rows()
    for number, line in changes:
        content[number - 1] = line
    return "\n".join(content) + "\n"


def parquet(folder, columns):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def cut(content, share=0.5):
    return content[: int(len(content) * share)]


def flipped(content):
    return content[:-30] + bytes(byte ^ 0xFF for byte in content[-30:-20]) + content[-20:]


def zst(text):
    return zstandard.compress(text.encode())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"seed": -1}, "seed -1"),
        ({"block_size": 1}, "block_size 1 must be at least 2"),
        ({"vocab_size": 200}, "vocab_size 200 must be at least 257"),
        ({"validation_fraction": 0.0}, "validation_fraction 0.0"),
        ({"validation_fraction": 1.5}, "validation_fraction 1.5"),
        ({"tokenizer": "./nowhere"}, "no such tokenizer file or folder: ./nowhere"),
        ({"tokenizer": "tokenizer.json"}, "no such tokenizer file or folder: tokenizer.json"),
        ({"source": "/nowhere/at/all.jsonl"}, "no such data file or folder: /nowhere/at/all.jsonl"),
        ({"source": "missing.parquet"}, "no such data file or folder: missing.parquet"),
        ({"source": "./missing"}, "no such data file or folder: ./missing"),
        ({"source": "too/many/parts"}, "no such data file or folder: too/many/parts"),
    ],
)
def test_text_arguments(options, says):
    with pytest.raises(UserError, match=says):
        TextDataModule(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"image_size": 32}, "the embedded digits have 8 pixels a side"),
        ({"source": "a/b", "image_size": 0}, "image_size 0"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"hflip": 1.5}, "hflip 1.5"),
        ({"re_prob": -0.5}, "re_prob -0.5"),
        ({"interpolation": "cubic"}, "interpolation cubic must be bicubic, bilinear or nearest"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"source": "/nowhere/images"}, "no such data file or folder: /nowhere/images"),
    ],
)
def test_image_arguments(options, says):
    with pytest.raises(UserError, match=says):
        ImageDataModule(**options)


FILES = {
    "an empty file": ("a.jsonl", "", r"a.jsonl is empty"),
    "another format": ("a.csv", "text\nhello\n", r"a.csv: cannot read .csv; take .json,"),
    "zst cut short": ("a.jsonl.zst", cut(zst(lines())), r"a.jsonl.zst is cut short"),
    "zst less its last byte": ("a.jsonl.zst", zst(lines())[:-1], r"a.jsonl.zst is cut short"),
    "no zst": ("a.jsonl.zst", lines(), r"a.jsonl.zst is cut short or not zstandard"),
    "parquet cut short": ("a.parquet", b"PAR1" + bytes(100), r"a.parquet is cut short"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_checked_before_anything_is_read(tmp_path, case):
    name, content, says = FILES[case]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=says) as caught:
        TextDataModule(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):  # an image module says no less of a folder that holds only this
        ImageDataModule(str(tmp_path))


@pytest.mark.parametrize(
    "twin", ["./a.jsonl", "{here}/a.jsonl", "link.jsonl", "hard.jsonl", "sub/../a.jsonl"]
)
def test_one_file_is_one_source_of_a_mixture(tmp_path, monkeypatch, twin):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl", lines())
    Path("sub").mkdir()
    Path("link.jsonl").symlink_to("a.jsonl")
    os.link("a.jsonl", "hard.jsonl")
    twin = twin.format(here=tmp_path)
    with pytest.raises(UserError, match=f"source names one place twice, as a.jsonl and as {twin}: name it"):
        TextDataModule({"a.jsonl": 1, twin: 2})


@pytest.mark.parametrize("twin", ["./set", "set/", "{here}/set", "link"])
def test_one_folder_is_one_source_of_a_mixture(tmp_path, monkeypatch, twin):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "set/a.jsonl", lines())
    Path("link").symlink_to("set")
    with pytest.raises(UserError, match="source names one place twice, as set and as"):
        TextDataModule({"set": 1, twin.format(here=tmp_path): 2})
    write(tmp_path, "other/a.jsonl", lines())
    TextDataModule({"set": 1, "other": 2})


def test_folders_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="no data file in"):
        TextDataModule(str(tmp_path))
    write(tmp_path, "test-0.jsonl", lines())
    with pytest.raises(UserError, match=r"no training file in .*: name files train\*"):
        TextDataModule(str(tmp_path))
    write(tmp_path, "train-0.txt", "text")
    with pytest.raises(UserError, match=r"mixes file formats \(.jsonl, .txt\)"):
        TextDataModule(str(tmp_path))


def pieces(content, size=1000):
    return [content[k : k + size] for k in range(0, len(content), size)]


@pytest.mark.parametrize(
    "compressed",
    [
        zst(lines()),
        zst("a" * 1_000_000),
        zst(""),
        zst("one") + zst("two"),
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(lines().encode()),
        b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello" + zst("skippable before"),
        zst(os.urandom(300_000).hex()),
    ],
    ids=["plain", "run", "nothing", "two frames", "checksum", "skippable", "many blocks"],
)
def test_a_whole_zst_is_told_from_a_cut_one(tmp_path, compressed):
    assert _zst_is_whole(Path(write(tmp_path, "a.zst", compressed)))
    for end in {1, 5, len(compressed) // 3, len(compressed) - 1}:
        path = Path(write(tmp_path, "b.zst", compressed[:end]))
        if compressed[:end] != zst("one"):
            assert not _zst_is_whole(path), end


CONTENTS = {
    "a broken line": ("a.jsonl", lines((31, '{"text": "cut')), r"a.jsonl line 31 is not valid JSON"),
    "a broken line in zst": (
        "a.jsonl.zst",
        zst(lines((7, "{oops}"))),
        r"a.jsonl.zst line 7 is not valid JSON",
    ),
    "a line that is no object": ("a.jsonl", lines((2, "[1, 2]")), r"a.jsonl line 2 is not a JSON object"),
    "a broken list": ("a.json", '[{"text": "a"},\n {"text": }]', r"a.json line 2 is not valid JSON"),
    "damaged zst": ("a.jsonl.zst", flipped(zst(lines())), r"a.jsonl.zst can't be decompressed"),
    "damaged gz": ("a.jsonl.gz", b"\x1f\x8b" + bytes(50), r"a.jsonl.gz can't be decompressed"),
    "not UTF-8": ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 at byte 3"),
    "damaged parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", r"a.parquet can't be read as parquet"),
    "no text column": (
        "a.jsonl",
        '{"content": "x", "id": 1}\n',
        r"no column text \(it has content, id\): set text_column",
    ),
    "numbers": ("a.jsonl", '{"text": 1}\n{"text": 2}\n', r"column text of .* holds not only strings"),
    "numbers among strings": (
        "a.jsonl",
        '{"text": 1}\n{"text": "a"}\n',
        r"column text of .* holds not only strings",
    ),
    "one document": ("a.txt", document(1), r"a.txt is a single document"),
    "too little": (
        "a.jsonl",
        "".join(json.dumps({"text": f"x{n}"}) + "\n" for n in range(3)),
        r"no row of block_size",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents(tmp_path, case):
    name, content, says = CONTENTS[case]
    data = TextDataModule(write(tmp_path, name, content), vocab_size=300, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says) as caught:
        data.setup()
    assert "\n" not in str(caught.value)


def test_the_broken_file_of_a_folder_is_named(tmp_path):
    write(tmp_path, "corpus/train-0.jsonl", lines())
    write(tmp_path, "corpus/train-1.jsonl", lines((12, "nonsense")))
    data = TextDataModule(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"train-1.jsonl line 12 is not valid JSON"):
        data.setup()


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone/nothing' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for module in (TextDataModule, ImageDataModule):
        with pytest.raises(UserError) as caught:
            module("someone/nothing").setup()
        assert str(caught.value) == (
            "someone/nothing is neither a local file or folder nor a data set that the hub gives: "
            "Couldn't reach 'someone/nothing' on the Hub"
        )


def test_a_hub_data_set_without_a_train_split(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"test": None, "dev": None})
    with pytest.raises(UserError, match=r"someone/thing has no train split \(it has test, dev\)"):
        source.load_splits("someone/thing", None, formats=TEXT_FORMATS, cache_dir=None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "can't be loaded from disk or the hub"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "has no EOS token"),
    ],
)
def test_tokenizers(tmp_path, corpus, content, says):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    data = TextDataModule(str(corpus), tokenizer=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says) as caught:
        data.setup()
    assert str(path) in str(caught.value)


def test_fewer_samples_than_a_step(corpus, tmp_path):
    data = TextDataModule(str(corpus), vocab_size=300, batch_size=4000, cache_dir=str(tmp_path / "cache"))
    data.setup()
    with pytest.raises(UserError, match=r"fewer than the 4000 of one step .*: lower batch_size"):
        data.train_dataloader()


def images(folder, **columns):
    return parquet(folder, {"image": [{"bytes": b"x", "path": None}] * 10} | columns)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({}, {}, r"has no column of labels \(it has image\): set label_column"),
        (
            {"label": [0] * 10},
            {"label_column": "fine"},
            r"has no column fine \(it has image, label\): set label_column",
        ),
        (
            {"label": [0] * 10},
            {"image_column": "label"},
            r"column label of .* holds no images: set image_column",
        ),
        ({"label": [0.5] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [-1] * 10}, {}, r"column label of .* holds no classes"),
        (
            {"label": [0] * 10},
            {"validation_fraction": 0.01},
            r"validation_fraction 0.01 of 10 images holds out none",
        ),
        ({"label": [0] * 10}, {"auto_augment": "bogus"}, r"auto_augment bogus is no policy of timm"),
    ],
)
def test_image_columns(tmp_path, columns, options, says):
    data = ImageDataModule(images(tmp_path, **columns), cache_dir=str(tmp_path / "cache"), **options)
    with pytest.raises(UserError, match=says):
        data.setup()


def test_no_image_column(tmp_path):
    data = ImageDataModule(parquet(tmp_path, {"label": [0, 1]}), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"has no column of images \(it has label\): set image_column"):
        data.setup()


def test_a_label_beyond_the_training_classes_is_named(tmp_path):
    for split, labels in (("train", [0, 1, 1]), ("test", [0, 2, 1])):
        (tmp_path / "set").mkdir(exist_ok=True)
        table = pyarrow.table({"image": [{"bytes": b"x", "path": None}] * 3, "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{split}.parquet")
    data = ImageDataModule(str(tmp_path / "set"), validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"test row 1 of .* has label 2, none of the 2 training classes"):
        data.setup()

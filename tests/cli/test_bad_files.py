"""Faults that only the data's files show: one line on stderr, exit code 2, no run folder begun."""

import json
import shutil

import pytest

from stableqat.cli.main import main

TEXT = "".join(json.dumps({"text": f"document {n} of some words"}) + "\n" for n in range(40))


@pytest.fixture
def refuse(at, capsys):
    """Run a command; return the last line on stderr, which refuses it; above stand news at most."""
    shutil.rmtree(at / "logs/bad", ignore_errors=True)  # of another test, which may begin a run

    def run(argv):
        capsys.readouterr()
        assert main([*argv, "--trainer.logger.name", "bad"]) == 2
        err = capsys.readouterr().err
        line = err.splitlines()[-1]
        assert line.startswith("stableqat: ")
        assert "Traceback" not in err
        return line.removeprefix("stableqat: ")

    return run


def zstd(text):
    import zstandard

    return zstandard.ZstdCompressor().compress(text.encode())


# file, what it holds, the pieces of the line
FILES = {
    "an empty file": ("case.jsonl", b"", ["case.jsonl is empty"]),
    "an archive cut short": ("case.jsonl.zst", zstd(TEXT)[:-20], ["case.jsonl.zst is cut short"]),
    "a broken line": (
        "case.jsonl",
        (TEXT + '{"text": "cut').encode(),
        ["case.jsonl line 41 is not valid JSON"],
    ),
    "another column": (
        "case.jsonl",
        TEXT.replace('"text"', '"content"').encode(),
        ["has no column text", "content", "set text_column"],
    ),
    "no parquet": ("case.parquet", b"PAR1 no", ["case.parquet is cut short"]),
    "hardly any text": ("case.jsonl", TEXT[:74].encode(), ["less than one row of block_size 16"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_text_file_is_refused_by_name(case, refuse, at):
    name, content, pieces = FILES[case]
    (at / name).write_bytes(content)
    line = refuse(["fit", "-c", "llama.yaml", "--data.source", name])
    for piece in pieces:
        assert piece in line
    assert not (at / "logs/bad").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(refuse, at):
    from stableqat.data.text import train_bpe

    train_bpe(iter([TEXT * 3, "many more words that make merges " * 40]), 320).save_pretrained(
        at / "tokenizer"
    )
    line = refuse(["fit", "-c", "llama.yaml", "--data.tokenizer", "tokenizer"])
    assert "model.config.vocab_size: 300 is less than the tokenizer's" in line
    assert "or use the tokenizer that the model was trained with" in line
    assert not (at / "logs/bad").exists()


@pytest.fixture(scope="module")
def images(place):
    """An image folder of two classes, one image of which is cut short."""
    from PIL import Image

    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            folder = place / "images" / split / label
            folder.mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (8, 8), (n * 40, 9, 9)).save(folder / f"{n}.png")
    damaged = place / "images/train/dog/2.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    return ["--data.source", "images", "--data.image_size", "8", "--model.model_args.in_chans", "3"]


def test_another_number_of_classes_is_refused(refuse, images):
    line = refuse(["fit", "-c", "vit.yaml", *images])
    assert line == "model.num_classes: the model has 10 classes, but the data has 2; set it to 2"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named(workers, refuse, images):
    steps = ["--trainer.max_steps", "2", "--model.num_classes", "2"]
    line = refuse(["fit", "-c", "vit.yaml", *images, *steps, "--data.num_workers", workers])
    assert line.endswith("images/train/dog/2.png is not a readable image: repair or remove it")

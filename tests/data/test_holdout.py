"""One rule says which documents validate: raw, tokenized, sampled and mixed, they are the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw import records
from sample_documents import document

from stableqat.data import TextDataModule
from stableqat.data.encoder import DocumentEncoder
from stableqat.data.holdout import HeldOut, document_hash, hash_cutoff
from stableqat.data.prepare.command import sample, tokenize
from stableqat.errors import UserError

TEXTS = [document(n) for n in range(400)]


def jsonl(folder: Path, texts: list[str]) -> None:
    for name, some in (("a", texts[::2]), ("b", texts[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))


def plain_text(folder: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)


def splits(source: object, tokenizer: Path, cache: Path, **options: object) -> dict[str, set[str]]:
    """The documents of each split as training reads them, the one that the last row cuts off left out."""
    data = TextDataModule(
        source, tokenizer=str(tokenizer), block_size=2, batch_size=1, cache_dir=str(cache), **options
    )
    data.setup("fit")
    found: dict[str, set[str]] = {"train": set(), "validation": set()}
    for split, texts in found.items():
        rows = data.splits[split]
        for part in getattr(rows, "parts", [rows]):
            run = part.tokens(0, 2 * len(part))
            texts.update(data.tokenizer.decode(run).split(data.tokenizer.eos_token))
    return {split: texts & set(TEXTS) for split, texts in found.items()}


@pytest.mark.parametrize("write", [jsonl, plain_text])
@pytest.mark.parametrize("count", [400, 12])  # of 12 none falls below the share
def test_a_raw_folder_and_the_same_folder_tokenized_validate_on_the_same(tmp_path, tokenizer, write, count):
    texts, share = TEXTS[:count], {"validation_fraction": 0.1 if count == 400 else 0.01}
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw", texts)
    raw = splits(str(tmp_path / "raw"), tokenizer, tmp_path / "cache", **share)
    out = str(tmp_path / "out")
    settings = {"tokenizer": str(tokenizer), "block_size": 2, "num_proc": 1, **share}
    tokenize(input=str(tmp_path / "raw"), out=out, **settings)
    assert splits(out, tokenizer, tmp_path / "cache") == raw
    hashes = {text: document_hash(text) for text in texts}
    expected = {text for text in texts if hashes[text] < hash_cutoff(share["validation_fraction"])}
    assert raw["validation"] >= (expected or {min(hashes, key=hashes.get)}) - {*texts[-1:]}
    assert not raw["train"] & raw["validation"]
    assert len(raw["train"] | raw["validation"]) >= count - 2


def test_a_sample_and_a_mixture_validate_on_no_other_documents(tmp_path, tokenizer):
    (tmp_path / "raw").mkdir()
    jsonl(tmp_path / "raw", TEXTS)
    cache, share = tmp_path / "cache", {"validation_fraction": 0.01}
    raw = splits(str(tmp_path / "raw"), tokenizer, cache, **share)
    drawn = {}
    for tokens in ("all", "8k"):
        out = tmp_path / tokens
        sample(source=str(tmp_path / "raw"), layout="text", tokens=tokens, out=str(out))
        drawn[tokens] = {split: {each["text"] for each in records(out, split)} for split in raw}
        assert drawn[tokens]["validation"] <= {t for t in TEXTS if document_hash(t) < hash_cutoff(0.01)}
        assert not drawn[tokens]["train"] & raw["validation"]
    assert drawn["all"]["validation"] >= raw["validation"]
    mixed = splits({str(tmp_path / "all"): 1, str(tmp_path / "raw"): 1}, tokenizer, cache, **share)
    assert mixed["validation"] == raw["validation"]
    assert not mixed["train"] & mixed["validation"]


@given(st.sets(st.integers(0, 2**63 - 1), min_size=2), st.floats(1e-9, 1, exclude_max=True))
def test_both_sides_have_a_document_and_a_larger_share_holds_out_more(hashes, share):
    held_out = HeldOut(hash_cutoff(share, hashes))
    sides = {held_out.split(number) for number in hashes}
    assert sides == {"train", "validation"}
    assert hash_cutoff(share / 2, hashes) <= held_out.cutoff


def test_a_listed_document_is_left_out():
    held_out = HeldOut(10, np.array([5, 20]))
    assert [held_out.split(number) for number in (4, 5, 9, 10, 20, 21)] == [
        *("validation", None, "validation", "train", None, "train")
    ]


def test_the_end_of_a_single_document_validates(tmp_path, tokenizer):
    lines = "".join(f"{n} {text[:20]}\n" for n, text in enumerate(TEXTS[:40]))
    (tmp_path / "book.txt").write_text(lines)
    options = {"block_size": 8, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.25}
    data = TextDataModule(str(tmp_path / "book.txt"), tokenizer=str(tokenizer), **options)
    data.setup()
    texts = {}
    for split, tokens in data._documents[data.source].tokenized(DocumentEncoder.of(data.tokenizer)).items():
        (document,) = tokens["input_ids"]
        texts[split] = data.tokenizer.decode(document, skip_special_tokens=True)
    assert texts["train"] + texts["validation"] == lines
    assert texts["train"].endswith("\n")
    assert 0.25 <= len(texts["validation"]) / len(lines) < 0.3


@pytest.mark.parametrize("size", ["name", "train:300"])
def test_a_single_document_tokenized_is_cut_where_a_raw_one_is(size, tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("".join(f"{n} {text[:20]}\n" for n, text in enumerate(TEXTS[:200])))
    made, chosen = str(tmp_path / "out"), str(tokenizer) if size == "name" else size
    options = {"block_size": 8, "validation_fraction": 0.25}
    tokenize(input=str(tmp_path / "book.txt"), tokenizer=chosen, out=made, num_proc=1, **options)
    options |= {"tokenizer": f"{made}/tokenizer", "cache_dir": str(tmp_path / "cache")}
    raw, tokenized = (TextDataModule(source, **options) for source in (str(tmp_path / "book.txt"), made))
    raw.setup()
    tokenized.setup()
    for split in ("train", "validation"):
        mine, theirs = (data.splits[split] for data in (raw, tokenized))
        assert len(mine) == len(theirs) > 10
        keys = list(enumerate(range(len(mine))))
        assert torch.equal(mine[keys]["input_ids"], theirs[keys]["input_ids"])
    told = json.loads(Path(made, "manifest.json").read_text())
    assert told["validation"] == "0.25 of the only document, its end, held out"
    assert told["splits"]["validation"]["documents"] == 1


def test_equal_documents_cannot_be_split(tmp_path, tokenizer):
    path = tmp_path / "one.jsonl"
    path.write_text((json.dumps({"text": TEXTS[0]}) + "\n") * 3)
    says = "one.jsonl is a single document, of which no part is held out: put it into a folder"
    with pytest.raises(UserError, match=says):
        TextDataModule(str(path), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache")).setup()
    with pytest.raises(UserError, match=says):
        tokenize(
            input=str(path), tokenizer=str(tokenizer), block_size=8, out=str(tmp_path / "out"), num_proc=1
        )
    assert not (tmp_path / "out").exists()

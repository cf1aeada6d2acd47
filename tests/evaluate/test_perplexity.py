"""Perplexity is what its definition says, token by token."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

import tiny
from stableqat.data.text_rows import PackedRows
from stableqat.data.tokenizer import train_bpe
from stableqat.errors import UserError
from stableqat.evaluate import text
from stableqat.evaluate.perplexity import blocks, perplexity, strided
from stableqat.evaluate.processes import Share
from stableqat.evaluate.text import read_text
from stableqat.layers.hold import hold_weights

CPU = torch.device("cpu")
WORDS = ["grid", "scale", "level", "bits", "round", "clamp", "weight"]


@pytest.fixture(scope="module")
def model():
    made = tiny.configured("llama").model.eval()
    hold_weights(made)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join(WORDS)] * 9, 300)


def packed(count, block_size):
    tokens = torch.cat([tiny.tokens(row) for row in range(-(-count // 16))])[:count]
    return PackedRows(Dataset.from_dict({"input_ids": [tokens.int().numpy()]}), block_size), tokens


def nll(model, context, target):
    """Of one token after those before it."""
    with torch.no_grad():
        logits = model(input_ids=context[None], use_cache=False).logits[0, -1]
    return F.cross_entropy(logits, target).double().item()


def measured(model, windows, share=Share()):  # noqa: B008
    return perplexity(model, windows, batch_size=3, device=CPU, share=share)


def test_blocks(model):
    rows, tokens = packed(45, 10)
    told = measured(model, blocks(rows, 10))
    expected = [nll(model, tokens[s:t], tokens[t]) for s in (0, 10, 20, 30) for t in range(s + 1, s + 10)]
    assert told["tokens"] == 36  # the tail of 5 fills no block
    assert told["windows"] == 4
    assert told["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert told["perplexity"] == pytest.approx(np.exp(np.mean(expected)), rel=1e-6)


@pytest.mark.parametrize(("count", "stride"), [(45, 4), (45, 9), (45, 1), (10, 3), (22, 4), (13, 5)])
def test_strided(model, count, stride):
    rows, tokens = packed(count, 10)
    told = measured(model, strided(rows, 10, stride))
    expected = []
    for t in range(1, count):
        start = 0
        while start + 10 <= t:  # the first window that holds it
            start += stride
        expected.append(nll(model, tokens[start:t], tokens[t]))
    assert told["tokens"] == count - 1
    assert told["loss"] == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("stride", [0, 10, 11])
def test_a_stride_that_leaves_tokens_out(stride):
    with pytest.raises(UserError, match="stride: must be from 1 to block_size - 1"):
        strided(packed(45, 10)[0], 10, stride)


def test_shares_add_up(model):
    windows = strided(packed(45, 10)[0], 10, 4)
    whole = measured(model, windows)

    class Part(Share):
        def total(self, value):  # what this process alone has
            return value

    parts = [measured(model, windows, Part(rank, 2)) for rank in range(2)]
    assert sum(part["tokens"] for part in parts) == whole["tokens"]
    total = sum(part["loss"] * part["tokens"] for part in parts) / whole["tokens"]
    assert total == pytest.approx(whole["loss"], rel=1e-6)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(path)


def flat(read):
    assert isinstance(read.rows, PackedRows)
    return read.rows.tokens(0, read.rows.num_tokens).tolist()


def test_documents(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DOCUMENTS", 2)
    texts = ["grid scale", "", "round weight clamp", "level", "bits bits", "step"]
    source = write(tmp_path / "text.jsonl", texts)
    read = read_text(source, tokenizer, block_size=2)
    a, b, c, d, e = ([*tokenizer.encode(each), tokenizer.eos_token_id] for each in texts if each)
    assert flat(read) == a + b + c + d + e
    assert read.rows.documents["input_ids"][:] == [a + b, c + d, e]  # two documents at once
    assert read.split == "all"
    read = read_text(source, tokenizer, block_size=2, documents="blank-line")
    assert flat(read) == tokenizer.encode("\n\n".join(texts))


def test_a_single_text_file(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("grid scale\nlevel bits")
    read = read_text(str(tmp_path / "one.txt"), tokenizer, block_size=2)
    assert flat(read) == [*tokenizer.encode("grid scale\nlevel bits"), tokenizer.eos_token_id]


def test_splits(tokenizer, tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", [split, "grid scale"])
    first = {
        split: tokenizer.decode(flat(read_text(str(tmp_path), tokenizer, split=split, block_size=2)))
        for split in (None, "train", "validation", "test")
    }
    assert {split: each.split("<|endoftext|>")[0] for split, each in first.items()} == {
        None: "test",
        "train": "train",
        "validation": "validation",
        "test": "test",
    }
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"split: .* has no test \(it has train, validation\)"):
        read_text(str(tmp_path), tokenizer, split="test", block_size=2)


def test_too_little_text(tokenizer, tmp_path):
    source = write(tmp_path / "text.jsonl", ["grid"])
    with pytest.raises(UserError, match="no block of 512; lower block_size"):
        read_text(source, tokenizer, block_size=512)

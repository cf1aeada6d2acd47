"""Calibration data: drawn by the seed, and of a text only as much as it takes."""

import pytest
import torch

import starts
import words
from stableqat.evaluate import text


@pytest.mark.parametrize("drawn", [1, 5, 40])
def test_a_text_is_read_as_far_as_it_takes(drawn, tmp_path, monkeypatch):
    source = str(words.write_text(tmp_path / "text.jsonl"))
    tokenizer = starts.special(words.DOCUMENTS, 300, "<eos>")
    encoded, real = [], text.DocumentEncoder.of

    def counting(tokenizer):
        encode = real(tokenizer)
        return lambda documents: encoded.extend(documents) or encode(documents)

    monkeypatch.setattr(text.DocumentEncoder, "of", counting)

    def rows(**options):
        encoded.clear()
        read = text.read_text(source, tokenizer, block_size=16, split="train", **options).rows
        return torch.stack([read[[(0, 0, index)]]["input_ids"][0] for index in range(len(read))])

    whole = rows()
    assert sorted(encoded) == sorted(words.DOCUMENTS)
    some = rows(drawn=drawn)
    assert drawn <= len(some) <= len(whole)
    assert len(encoded) in (16, 32, 48, 60)
    assert drawn == 40 or len(encoded) == 16
    assert torch.equal(some, rows(drawn=drawn))
    assert not torch.equal(some[:1], rows(drawn=drawn, seed=1)[:1])

"""Perplexity of conversations: of what the assistant writes, in rows as in training."""

import pytest
import torch
from torch.nn import functional as F

import tiny
from chats import byte_tokenizer, chat, write_chats
from stableqat.data.prepare.command import tokenize
from stableqat.errors import UserError
from stableqat.evaluate.perplexity import blocks, perplexity, strided
from stableqat.evaluate.processes import Share
from stableqat.evaluate.text import read_text

CONFIG = {**tiny.LLAMA, "vocab_size": 258, "max_position_embeddings": 512}
TOKENIZER = byte_tokenizer()


def by_hand(model, number):
    """Losses of each answer and its end of turn, in a conversation that is read by itself."""
    turns, losses = chat(number), []
    ids = torch.tensor([TOKENIZER.apply_chat_template(turns, return_dict=False)])
    with torch.no_grad():
        found = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = TOKENIZER.apply_chat_template(
                turns[:place], return_dict=False, add_generation_prompt=True
            )
            losses.append(found[len(before) - 1 :][: len(turn["content"]) + 1])
    return torch.cat(losses)


def test_the_assistants_tokens_count_raw_and_tokenized(tmp_path):
    model = tiny.configured("llama", "fp", config=CONFIG).model.eval()
    source = write_chats(tmp_path / "raw" / "chats.jsonl", 12)
    expected = torch.cat([by_hand(model, number) for number in range(12)])
    TOKENIZER.save_pretrained(tmp_path / "named")
    out = str(tmp_path / "set")
    named = {"tokenizer": str(tmp_path / "named"), "num_proc": 1, "validation_fraction": 0.5}
    tokenize(input=str(source.parent), block_size=128, out=out, **named)
    sums = []
    for data, split in ((str(source), None), (out, "train"), (out, "validation")):
        read = read_text(data, TOKENIZER, block_size=256, split=split)
        assert read.documents == "rendered by the chat template; the assistant's tokens count"
        options = {"batch_size": 3, "device": torch.device("cpu"), "share": Share()}
        told = perplexity(model, blocks(read.rows, 256), **options)
        assert told["how"] == "conversations in rows of 256 tokens, those that have labels"
        sums.append((told["tokens"], told["loss"] * told["tokens"]))
    (count, total), *parts = sums
    assert count == len(expected) == sum(tokens for tokens, _ in parts)
    assert total == pytest.approx(expected.sum().item(), rel=1e-5)
    assert sum(part for _, part in parts) == pytest.approx(total, rel=1e-5)


def test_what_conversations_have_none_of(tmp_path):
    source = str(write_chats(tmp_path / "chats.jsonl", 12))
    with pytest.raises(UserError, match=r"documents: .* holds chat messages; leave blank-line out"):
        read_text(source, TOKENIZER, block_size=256, documents="blank-line")
    with pytest.raises(UserError, match="no label in rows of 8; raise block_size"):
        read_text(source, TOKENIZER, block_size=8)
    with pytest.raises(UserError, match="stride: needs one text, and the data is conversations"):
        strided(read_text(source, TOKENIZER, block_size=256).rows, 256, 128)
    with pytest.raises(UserError, match="has no chat template"):
        read_text(source, byte_tokenizer(None), block_size=256)

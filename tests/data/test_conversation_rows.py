"""Conversations in rows: which go where, what has a label, and that nothing is lost without a word."""

import logging
import pickle

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import byte_tokenizer, chat, turn, write_chats, write_jsonl
from stableqat.data import TextDataModule
from stableqat.data.conversation_rows import ConversationRows, best_fit
from stableqat.data.encoder import token_features
from stableqat.data.order import PAD
from stableqat.data.prepare.command import tokenize
from stableqat.errors import UserError


def stored(*conversations, chunks=1):
    """Runs of tokens with their spans, as `datasets` holds them."""
    features = token_features(conversations=True)
    parts = np.array_split(np.arange(len(conversations)), chunks)
    return datasets.concatenate_datasets(
        [
            datasets.Dataset.from_dict(
                {
                    "input_ids": [conversations[n][0] for n in part],
                    "spans": [conversations[n][1] for n in part],
                },
                features=features,
            )
            for part in parts
        ]
    )


def run(first, length):
    return list(range(first, first + length))


@given(lengths=st.lists(st.integers(1, 12), max_size=40))
@settings(deadline=None, max_examples=60)
def test_best_fit_fills_rows_and_never_too_much(lengths):
    rows = best_fit(np.array(lengths, np.int64), 12)
    filled = np.bincount(rows, lengths) if lengths else np.empty(0)
    assert len(rows) == len(lengths)
    assert (filled <= 12).all()
    # rows are numbered by their first runs, and no two rows could be one
    firsts = [rows.tolist().index(row) for row in range(len(filled))]
    assert firsts == sorted(firsts)
    if len(filled) > 1:
        assert np.sort(filled)[:2].sum() > 12


def test_rows_are_those_counted_by_hand():
    data = stored((run(10, 3), [1, 3]), (run(20, 4), [2, 4]), (run(30, 2), [0, 2]), chunks=2)
    rows = ConversationRows(data, 6, padding=7)
    assert len(rows) == 2
    first, second = rows.sample(0), rows.sample(1)
    assert first["input_ids"].tolist() == [10, 11, 12, 7, 7, 7]
    assert first["labels"].tolist() == [-100, 11, 12, -100, -100, -100]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    assert second["input_ids"].tolist() == [20, 21, 22, 23, 30, 31]
    assert second["labels"].tolist() == [-100, -100, 22, 23, -100, 31]  # no label for a first token
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]


def test_a_row_of_its_own_and_a_row_seen_whole_need_no_positions():
    data = stored((run(10, 3), [1, 3]), (run(20, 3), [1, 3]))
    assert len(ConversationRows(data, 6, 0, packing=False)) == 2
    for options in ({"packing": False}, {"attend_across": True}):
        assert "position_ids" not in ConversationRows(data, 6, 0, **options).sample(0)
    everything = ConversationRows(data, 6, 0, loss_on="all").sample(0)
    assert everything["labels"].tolist() == [-100, 11, 12, -100, 21, 22]


def test_what_is_cut_and_what_is_left_out():
    data = stored(
        (run(0, 9), [2, 9]),  # cut, some labels left
        (run(0, 9), [6, 9]),  # cut, none left
        (run(0, 4), []),  # the assistant is silent
        (run(0, 4), [0, 1]),  # only the first token, which nothing predicts
        (run(0, 4), [3, 4]),
    )
    rows = ConversationRows(data, 5, 0)
    assert (len(rows), rows.cut, rows.unlabelled) == (2, 2, 3)
    assert rows.sample(0)["labels"].tolist() == [-100, -100, 2, 3, 4]
    assert ConversationRows(data, 5, 0, loss_on="all").unlabelled == 0


@given(seed=st.integers(0, 1000), packing=st.booleans(), across=st.booleans())
@settings(deadline=None, max_examples=25)
def test_packed_or_not_the_same_labels_are_asked_for(seed, packing, across):
    random = np.random.default_rng(seed)
    some = []
    for number in range(20):
        length = int(random.integers(2, 12))
        start = int(random.integers(0, length))
        some.append((run(100 * number, length), [start, length]))
    rows = ConversationRows(stored(*some, chunks=3), 10, 0, packing=packing, attend_across=across)
    alone = ConversationRows(stored(*some), 10, 0, packing=False)

    def asked(these):
        samples = [these.sample(n)["labels"] for n in range(len(these))]
        return sorted(label for labels in samples for label in labels[labels != -100])

    assert asked(rows) == asked(alone)
    again = pickle.loads(pickle.dumps(rows))
    assert all((again.sample(n)["labels"] == rows.sample(n)["labels"]).all() for n in range(len(rows)))


@pytest.fixture
def make(tmp_path):
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)

    def module(source, **options):
        options = {"tokenizer": str(folder), "block_size": 64, "batch_size": 4, "seed": 3} | options
        data = TextDataModule(source, cache_dir=str(tmp_path / "cache"), **options)
        data.prepare_data()
        data.setup("fit")
        return data

    return module


def test_chats_are_recognised_and_said_in_one_line(tmp_path, make, caplog):
    caplog.set_level(logging.INFO)
    data = make(str(write_chats(tmp_path / "chats.jsonl")))
    assert "data: chat messages, 60 conversations, loss on the assistant's tokens" in caplog.messages
    cut = sum(rows.cut for rows in data.splits.values())
    assert cut > 1
    assert (
        f"data: {cut} of 60 conversations longer than block_size 64, and cut; block_size 96 keeps 99% of "
        "them whole, if the model has as many positions"
    ) in caplog.messages
    assert data.rows_for_conversations() == 96
    batch = next(iter(data.train_dataloader()))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        key: (4, 64) for key in ("input_ids", "labels", "position_ids")
    }
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    padding = data.splits["train"][[(0, 0, PAD)]]
    assert (padding["labels"] == -100).all()


def test_every_answer_is_learnt_and_nothing_else(tmp_path, make):
    data = make(str(write_chats(tmp_path / "chats.jsonl")), block_size=256)
    learnt = ""
    for rows in data.splits.values():
        labels = np.concatenate([rows.sample(number)["labels"] for number in range(len(rows))])
        learnt += data.tokenizer.decode(labels[labels != -100])
    answers = [each["content"] for n in range(60) for each in chat(n) if each["role"] == "assistant"]
    assert sorted(learnt.split("<|im_end|>")) == sorted(["", *answers])


def test_the_order_is_resumed(tmp_path, make):
    source = str(write_chats(tmp_path / "chats.jsonl"))
    data = make(source, block_size=128)
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    place, third = loader.state_dict(), next(iterator)
    again = make(source, block_size=128)
    resumed = again.train_dataloader()
    resumed.load_state_dict(place)
    assert torch.equal(next(iter(resumed))["input_ids"], third["input_ids"])
    with pytest.raises(UserError, match="cannot resume"):  # other rows
        make(source, block_size=128, packing=False).train_dataloader().load_state_dict(place)


def test_a_mixture_of_texts_and_chats_has_positions_for_both(tmp_path, make):
    chats = str(write_chats(tmp_path / "chats.jsonl"))
    texts = str(write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{n} is a number"} for n in range(200)]))
    data = make({chats: 1, texts: 1}, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    whole = torch.arange(64)
    restarts = [not torch.equal(row, whole) for row in batch["position_ids"]]
    assert 0 < sum(restarts) < 8
    assert all(
        (labels == tokens).all() != restart
        for labels, tokens, restart in zip(batch["labels"], batch["input_ids"], restarts, strict=True)
    )


BAD = {
    "no role": ({"messages": [{"content": "hi"}]}, "message 1 has no role: give it one of system, user"),
    "no messages": ({"messages": []}, "messages is empty: remove the conversation"),
    "null messages": ({"messages": None}, "messages is not a list: give one of mappings"),
    "no mapping": ({"messages": ["hi"]}, "message 1 is not a mapping: give it role and content"),
    "unknown role": ({"messages": [turn("bot", "hi")]}, "message 1 has the unknown role 'bot': use one of"),
    "no text": ({"messages": [turn("user", 3)]}, "message 1 has a content that is not text"),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "a"}])]},
        "message 1 has a content that is not text",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 has no content: write it as text"),
    "empty answer": (
        {"messages": [turn("user", "a"), turn("assistant", " ")]},
        "message 2, the assistant's, is empty",
    ),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty: fill it or remove"),
    "empty prompt": ({"prompt": None, "completion": "a"}, "prompt is empty: fill it or remove"),
    "turns as a prompt": (
        {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]},
        "prompt is a list, not text: write the turns as messages",
    ),
    "a number": ({"prompt": 3, "completion": "a"}, "prompt is not text"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
    "no output": ({"instruction": "a", "output": None}, "output is empty"),
}

GOOD = {
    "messages": {"messages": chat(1)},
    "prompt": {"prompt": "a", "completion": "b"},
    "instruction": {"instruction": "a", "output": "b"},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_one_line_with_file_and_row(tmp_path, make, case):
    record, says = BAD[case]
    good = next(good for good in GOOD.values() if good.keys() <= record.keys())
    source = write_jsonl(tmp_path / "chats" / "train.jsonl", [good, good, record, good])
    write_jsonl(tmp_path / "chats" / "validation.jsonl", [good])
    out = tmp_path / "out"
    options = {"tokenizer": str(tmp_path / "tokenizer"), "block_size": 64, "num_proc": 1}
    with pytest.raises(UserError, match=rf"train.jsonl row 3: {says}") as caught:
        tokenize(input=str(source.parent), out=str(out), **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    with pytest.raises(UserError, match=rf"train.jsonl row 3: {says}"):
        make(str(source.parent))

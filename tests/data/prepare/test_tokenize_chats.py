"""`stableqat data tokenize` of conversations: the same rows as raw, whatever happens on the way."""

import json

import numpy as np
import pytest
from raw import contents

from chats import CHATML, byte_tokenizer, chat, write_chats, write_jsonl
from stableqat.cli.main import main
from stableqat.data import TextDataModule
from stableqat.data.prepare import tokenize as module
from stableqat.data.prepare.command import tokenize
from stableqat.errors import UserError


@pytest.fixture
def named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "named")
    return str(tmp_path / "named")


@pytest.fixture
def raw(tmp_path):
    return write_chats(tmp_path / "raw" / "chats.jsonl", 80).parent


def make(folder, out, tokenizer, **options):
    options = {"block_size": 64, "num_proc": 1} | options
    assert tokenize(input=str(folder), tokenizer=tokenizer, out=str(out), **options) == 0
    return json.loads((out / "manifest.json").read_text())


def rows(source, tmp_path, **options):
    data = TextDataModule(str(source), block_size=64, cache_dir=str(tmp_path / "cache"), **options)
    data.prepare_data()
    data.setup("fit")
    return {
        split: sorted(
            json.dumps({k: v.tolist() for k, v in part.sample(n).items()}) for n in range(len(part))
        )
        for split, part in data.splits.items()
    }


def test_a_set_has_the_rows_of_its_raw_folder(tmp_path, raw, named):
    write_jsonl(raw / "more.jsonl", [{"messages": chat(n), "id": n} for n in range(80, 110)])
    manifest = make(raw, tmp_path / "set", named)
    assert manifest["request"]["format"] == "messages"
    assert sum(split["documents"] for split in manifest["splits"].values()) == 110
    for options in ({"packing": False}, {"packing": False, "loss_on": "all"}):
        raw_rows = rows(raw, tmp_path, tokenizer=named, **options)
        assert rows(tmp_path / "set", tmp_path, **options) == raw_rows
    everything = [label for each in raw_rows.values() for row in each for label in json.loads(row)["labels"]]
    assert sum(label != -100 for label in everything) > manifest["splits"]["train"]["assistant_tokens"]


def test_a_set_may_be_read_with_any_block_size(tmp_path, raw, named, capsys):
    arguments = ["--input", str(raw), "--tokenizer", named, "--block_size", "32", "--num_proc", "1"]
    assert main(["data", "tokenize", *arguments, "--out", str(tmp_path / "set")]) == 0
    said = capsys.readouterr().out
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    line = f"train: {train['documents']} documents, {train['tokens']} tokens, {train['assistant_tokens']} of"
    assert line in said
    data = TextDataModule(str(tmp_path / "set"), block_size=200)
    data.setup()
    assert sum(rows.cut for rows in data.splits.values()) == 0
    labels = np.concatenate(
        [data.splits["train"].sample(n)["labels"] for n in range(len(data.splits["train"]))]
    )
    assert (labels != -100).sum() == train["assistant_tokens"]


def test_an_interrupted_set_ends_with_the_same_bytes(tmp_path, raw, named, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_TOKENS", 500)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 700)
    make(raw, tmp_path / "whole", named)
    assert len(list((tmp_path / "whole").glob("train-*.arrow"))) > 3
    write, left = module._ArrowFile.write, iter(range(9))

    def fail(self, *columns):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, *columns)

    with monkeypatch.context() as patched:
        patched.setattr(module._ArrowFile, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            make(raw, tmp_path / "set", named)
    assert (tmp_path / "set.part" / ".state.json").is_file()
    make(raw, tmp_path / "set", named)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_another_template_is_another_set(tmp_path, raw, named):
    make(raw, tmp_path / "set", named)
    byte_tokenizer(CHATML.replace("assistant", "model")).save_pretrained(tmp_path / "other")
    data = TextDataModule(str(tmp_path / "set"), tokenizer=str(tmp_path / "other"), block_size=64)
    with pytest.raises(UserError, match=r"set was made with another chat template than .*other: leave"):
        data.setup()


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        (
            [{"messages": chat(1)}],
            {"tokenizer": "train:300"},
            "chat messages train no tokenizer: name that of",
        ),
        (
            [{"messages": chat(1), "text": "a"}],
            {},
            "holds text and chat messages: keep one of them, or set format to text or messages",
        ),
        (
            [{"messages": chat(1)}, {"prompt": "a", "completion": "b"}],
            {},
            r"row 2 has no column messages \(it has prompt, completion\), and others hold chat messages",
        ),
        ([{"text": "a"}], {"format": "messages"}, r"has no column messages \(it has text\)"),
        ([{"messages": chat(1)}], {"format": "chat"}, "format: 'chat' is unknown; choose one of text, mess"),
    ],
)
def test_formats_are_not_mixed(tmp_path, named, records, options, says):
    folder = write_jsonl(tmp_path / "raw" / "a.jsonl", records).parent
    with pytest.raises(UserError, match=says) as caught:
        make(folder, tmp_path / "set", **{"tokenizer": named, **options})
    assert "\n" not in str(caught.value)
    if "tokenizer" not in options:
        data = TextDataModule(str(folder), tokenizer=named, cache_dir=str(tmp_path / "cache"), **options)
        at_once = "holds chat messages and prompts and completions: keep" if "row 2" in says else says
        with pytest.raises(UserError, match=at_once):
            data.setup()


def test_texts_are_read_beside_messages_if_the_format_says_so(tmp_path, named):
    records = [{"messages": chat(n), "text": f"{n} is a number"} for n in range(80)]
    folder = write_jsonl(tmp_path / "raw" / "a.jsonl", records).parent
    assert "rows" in make(folder, tmp_path / "set", named, format="text")["splits"]["train"]
    data = TextDataModule(
        str(folder), tokenizer=named, format="text", block_size=64, cache_dir=str(tmp_path / "cache")
    )
    data.setup()
    assert not data.splits["train"].hold_conversations
    with pytest.raises(UserError, match=r"packing: false needs conversations, and .*raw holds texts"):
        TextDataModule(
            str(folder),
            tokenizer=named,
            format="text",
            packing=False,
            block_size=64,
            cache_dir=str(tmp_path / "cache"),
        ).setup()

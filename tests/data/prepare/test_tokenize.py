"""`stableqat data tokenize`: the rows are the documents, no more and no less, whatever happens on the way."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw import command_line, contents, kill_until_done, processes_of, records, write_slimpajama
from sample_documents import document
from tokenizers import Tokenizer

from stableqat.cli.main import main
from stableqat.data import TextDataModule
from stableqat.data.chat import Records
from stableqat.data.encoder import DocumentEncoder
from stableqat.data.holdout import HeldOut, document_hash, hash_cutoff
from stableqat.data.prepare import encode
from stableqat.data.prepare import tokenize as module
from stableqat.data.prepare.command import sample, tokenize
from stableqat.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe
from stableqat.errors import UserError
from stableqat.evaluate.text import read_text

DATA = Path(os.environ.get("STABLEQAT_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split.replace('_', '-')}.jsonl").write_text(lines)
    return folder


def make(folder, out, tokenizer, **options):
    options = {"block_size": 16, "num_proc": 1} | options
    assert tokenize(input=str(folder), tokenizer=str(tokenizer), out=str(out), **options) == 0
    return json.loads((out / "manifest.json").read_text())


def tokens(folder, split):
    """The tokens of a split's rows, one after another, read as `datasets` reads them."""
    shards = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob(f"{split}-*.arrow"))]
    rows = datasets.concatenate_datasets(shards).with_format("numpy")
    return rows["input_ids"][:].reshape(-1).tolist()


def joined(tokenizer, texts, eos=0):
    """The same tokens, document by document."""
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    return [token for text in texts if text for token in [*backend.encode(text).ids, eos]]


TEXTS = st.lists(st.text(alphabet="ab \n\u00e9\u4e16\ud800", max_size=12), min_size=1, max_size=25)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    files=st.lists(TEXTS, min_size=1, max_size=4),
    block_size=st.integers(2, 9),
    shard=st.integers(1, 60),
    batch=st.integers(1, 40),
    written=st.integers(1, 40),
)
def test_rows_are_the_documents_less_the_tail(
    tmp_path_factory, tokenizer, files, block_size, shard, batch, written
):
    folder = tmp_path_factory.mktemp("property")
    first = [f"document {n}" for n in range(5)]
    write(folder / "raw", validation=["abc " * 5], **{f"train_{n}": t for n, t in enumerate([first, *files])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARD_TOKENS", shard)
        patch.setattr(module, "_BATCH_CHARACTERS", batch)
        patch.setattr(module, "_WRITTEN_TOKENS", written)
        manifest = make(folder / "raw", folder / "out", tokenizer, block_size=block_size)
    texts = [t.encode("utf-8", "replace").decode() for some in [first, *files] for t in some]
    expected = joined(tokenizer, texts)
    whole = len(expected) // block_size * block_size
    assert tokens(folder / "out", "train") == expected[:whole]
    about = manifest["splits"]["train"]
    assert about["tokens"] == about["rows"] * block_size == whole
    assert about["tail_tokens"] == len(expected) - whole
    assert about["documents"] == sum(map(bool, texts))
    assert about["characters"] == sum(map(len, texts))


def test_the_number_of_processes_changes_no_byte(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(module, "_SHARD_TOKENS", 10_000)
    raw = write(tmp_path / "raw", train=[document(n) for n in range(300)], validation=[document(999)] * 3)
    for count in (1, 2):
        make(raw, tmp_path / f"out-{count}", tokenizer, num_proc=count)
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-2")
    assert len(list((tmp_path / "out-1").glob("train-*.arrow"))) > 3


def test_the_manifest_can_be_checked(tmp_path, tokenizer):
    raw = write_slimpajama(tmp_path / "raw", chunks=1)
    sampled = tmp_path / "sampled"
    sample(source=str(raw), layout="slimpajama", tokens="all", out=str(sampled), seed=3)
    manifest = make(sampled, tmp_path / "out", tokenizer)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            content = (tmp_path / "out" / shard["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert sum(shard["tokens"] for shard in split["shards"]) == split["tokens"]
    assert manifest["sample"]["source"] == str(raw)
    assert manifest["sample"]["seed"] == 3
    assert (manifest["block_size"], manifest["vocab_size"], manifest["eos_token_id"]) == (16, 300, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "tokenizer",
        "train-00000.arrow",
        "validation-00000.arrow",
    ]
    features = datasets.Dataset.from_file(str(tmp_path / "out" / "train-00000.arrow")).features
    assert features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=16)})


def test_held_out_documents_are_whole_and_equal_ones_stay_together(tmp_path, tokenizer):
    texts = [document(n) for n in range(400)]
    write(tmp_path / "raw", train_0=texts, train_1=texts[::-1])
    make(tmp_path / "raw", tmp_path / "out", tokenizer, block_size=2, validation_fraction=0.1)
    cutoff = hash_cutoff(0.1)
    for split in ("train", "validation"):
        expected = [
            text for text in texts + texts[::-1] if (document_hash(text) < cutoff) == (split == "validation")
        ]
        assert len(expected) > 40
        run = joined(tokenizer, expected)
        assert tokens(tmp_path / "out", split) == run[: len(run) // 2 * 2]


def test_training_documents_that_another_split_has_are_left_out(tmp_path, tokenizer):
    texts = [document(n) for n in range(60)]
    raw = write(tmp_path / "raw", train=texts, validation=texts[10:20], test=[*texts[30:33], document(99)])
    manifest = make(raw, tmp_path / "out", tokenizer, block_size=2)
    kept = texts[:10] + texts[20:30] + texts[33:]
    run = joined(tokenizer, kept)
    assert tokens(tmp_path / "out", "train") == run[: len(run) // 2 * 2]
    assert manifest["splits"]["train"]["left_out"] == 13
    assert manifest["splits"]["test"]["documents"] == 4


def test_a_bpe_is_trained_on_the_training_documents_alone_and_saved(tmp_path, monkeypatch):
    trained = []

    def spy(texts, size):
        trained.append(list(texts))
        return train_bpe(trained[-1], size)

    monkeypatch.setattr(module, "train_bpe", spy)
    texts = [document(n) for n in range(100)]
    raw = write(tmp_path / "raw", train_0=texts[:50], train_1=texts[50:], validation=texts[:5])
    manifest = make(raw, tmp_path / "out", "train:320", block_size=8)
    assert trained == [texts[5:]]
    data = TextDataModule(str(tmp_path / "out"), block_size=8)
    assert manifest["tokenizer_sha256"] == tokenizer_hash(data.tokenizer)
    assert data.vocab_size == manifest["vocab_size"] == 320
    monkeypatch.setattr(module, "_BPE_CHARACTERS", 2 * sum(map(len, texts[50:60])))
    make(raw, tmp_path / "share", "train:320", block_size=8)
    assert 18 <= len(trained[1]) <= 22
    assert set(trained[1]) & set(texts[50:])


class TestTextDataModule:
    @pytest.fixture
    def out(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(module, "_SHARD_TOKENS", 3000)
        monkeypatch.setattr(module, "_BATCH_CHARACTERS", 2000)
        held_out = [document(900), document(901)]
        raw = write(tmp_path / "raw", train=[document(n) for n in range(120)], validation=held_out)
        make(raw, tmp_path / "out", tokenizer)
        return tmp_path / "out"

    @pytest.mark.parametrize("block_size", [16, 8, 7, 100])
    def test_reads_it_with_any_block_size(self, out, block_size):
        data = TextDataModule(str(out), block_size=block_size, batch_size=2)
        data.prepare_data()
        data.setup("fit")
        for split in ("train", "validation"):
            rows, run = data.splits[split], tokens(out, split)
            assert len(rows) == len(run) // block_size
            got = rows[[(0, 0, index) for index in range(len(rows))]]["input_ids"].flatten().tolist()
            assert got == run[: len(got)]
        assert len(data.splits["train"].chunks) > 1
        assert next(iter(data.train_dataloader()))["input_ids"].shape == (2, block_size)

    def test_workers_read_the_same_rows(self, out):
        plain, forked = (
            TextDataModule(str(out), block_size=16, seed=1, num_workers=count) for count in (0, 1)
        )
        for one, two in zip(plain.train_dataloader(), forked.train_dataloader(), strict=True):
            assert one["input_ids"].equal(two["input_ids"])

    def test_another_tokenizer_is_refused(self, out, tokenizer, tmp_path):
        TextDataModule(str(out), tokenizer=str(tokenizer), block_size=16).setup()
        train_bpe([document(n) for n in range(9)], 300).save_pretrained(tmp_path / "other")
        data = TextDataModule(str(out), tokenizer=str(tmp_path / "other"), block_size=16)
        with pytest.raises(UserError, match=r"was made with another tokenizer than .*other"):
            data.setup()

    def test_a_shard_cut_short_is_told(self, out):
        path = out / "train-00001.arrow"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"train-00001.arrow is missing or does not have its \d+ bytes"):
            TextDataModule(str(out))

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_a_flipped_bit_is_found_before_training(self, out, split):
        path = sorted(out.glob(f"{split}-*.arrow"))[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        data = TextDataModule(str(out), block_size=16)
        data.prepare_data()  # what was whole once counts as whole until it is written again
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged \(its SHA-256 is not the manifest's\)"):
            TextDataModule(str(out), block_size=16).prepare_data()
        with pytest.raises(UserError, match=rf"{path.name} is damaged"):
            read_text(str(out), data.tokenizer, block_size=16)

    @pytest.mark.parametrize(
        ("keys", "value", "says"),
        [
            (("tokenizer_sha256",), None, "tokenizer_sha256 is not text"),
            (("splits",), None, "splits is not a mapping"),
            (("splits",), ["train"], "splits is not a mapping"),
            (("splits", "train"), None, "splits.train is not a mapping"),
            (("splits", "validation"), 3, "splits.validation.shards is not a list"),
            (("splits", "train", "shards"), [], "splits.train.shards is not a list"),
            (("splits", "train", "shards", 1), "x", "splits.train.shards.1.file is not text"),
            (("splits", "train", "shards", 0, "file"), None, "splits.train.shards.0.file is not text"),
            (("splits", "train", "shards", 0, "sha256"), 7, "splits.train.shards.0.sha256 is not text"),
            (("splits", "train", "shards", 0, "bytes"), "1", "splits.train.shards.0.bytes is not a number"),
        ],
    )
    def test_a_manifest_that_lost_a_field_is_named(self, out, keys, value, says):
        manifest = json.loads((out / "manifest.json").read_text())
        owner = manifest
        for key in keys[:-1]:
            owner = owner[key]
        if value is None:
            del owner[keys[-1]]
        else:
            owner[keys[-1]] = value
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"out/manifest.json is damaged \({re.escape(says)}\)"):
            TextDataModule(str(out))

    @pytest.mark.parametrize("bytes_", [10**30, 10**6])
    def test_a_manifest_of_huge_sizes_is_told(self, out, bytes_):
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["splits"]["train"]["shards"][0]["bytes"] = bytes_
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            UserError, match=rf"train-00000.arrow is missing or does not have its {bytes_} bytes"
        ):
            TextDataModule(str(out))

    @pytest.mark.parametrize("content", [None, "", "[" * 100_000, '{"splits": {}}'])
    def test_arrow_files_without_their_manifest_are_refused(self, out, content):
        (out / "manifest.json").unlink()
        if content is not None:
            (out / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"out holds Arrow files without manifest.json"):
            TextDataModule(str(out))

    def test_a_shard_of_something_else_is_told(self, out):
        manifest = json.loads((out / "manifest.json").read_text())
        shard = manifest["splits"]["train"]["shards"][0]
        schema = pyarrow.schema({"text": pyarrow.string()})
        with pyarrow.ipc.new_stream(str(out / shard["file"]), schema) as stream:
            stream.write_table(pyarrow.table({"text": ["a"]}, schema))
        shard["bytes"] = (out / shard["file"]).stat().st_size
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"train-00000.arrow cannot be read as rows of tokens"):
            TextDataModule(str(out), block_size=16).setup()

    def test_a_large_block_size_is_refused(self, out):
        with pytest.raises(UserError, match=r"validation split of .* less than one row of block_size 10000"):
            TextDataModule(str(out), block_size=10000).setup()


def test_a_cut_anywhere_changes_no_byte(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_TOKENS", 1500)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1000)
    raw = write(tmp_path / "raw", train_0=[document(n) for n in range(30)], train_1=[document(77)] * 9)
    (raw / "validation.jsonl").write_text(json.dumps({"text": document(500)}) + "\n")
    make(raw, tmp_path / "whole", "train:300")
    replace = os.replace
    for step in range(1, 25, 3):
        calls = 0

        def replacing(*paths):
            nonlocal calls
            calls += 1
            if calls == step and step % 2:  # noqa: B023
                raise KeyboardInterrupt
            replace(*paths)
            if calls == step:  # noqa: B023
                raise KeyboardInterrupt

        out = tmp_path / f"out-{step}"
        monkeypatch.setattr(os, "replace", replacing)
        try:
            make(raw, out, "train:300")
        except KeyboardInterrupt:
            assert not (out / "manifest.json").exists() or not out.with_name(out.name + ".part").exists()
        monkeypatch.setattr(os, "replace", replace)
        make(raw, out, "train:300")
        assert contents(out) == contents(tmp_path / "whole"), step


def test_kills_change_no_byte_and_leave_no_process(tmp_path, tokenizer):
    raw = write(tmp_path / "raw", train=[document(n) for n in range(1500)], validation=[document(9999)] * 3)
    settings = "import stableqat.data.prepare.tokenize as t; t._SHARD_TOKENS = t._BATCH_CHARACTERS = 20000"
    common = ["data", "tokenize", "--input", str(raw), "--tokenizer", str(tokenizer), "--block_size", "32"]
    out = tmp_path / "out"
    assert kill_until_done([*common, "--out", str(out)], settings, out, kills=2, seed=1) >= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARD_TOKENS", 20000)
        patch.setattr(module, "_BATCH_CHARACTERS", 20000)
        make(raw, tmp_path / "whole", tokenizer, block_size=32)
    assert contents(out) == contents(tmp_path / "whole")
    deadline = time.monotonic() + 120
    while left := processes_of(out):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_few_batches_are_in_flight(tokenizer):
    work = encode.Work(
        DocumentEncoder(Path(f"{tokenizer}/tokenizer.json").read_text(), 0), Records("text"), HeldOut(0)
    )
    read = 0

    def batches():
        nonlocal read
        for number in range(40):
            read += 1
            yield encode.Batch("train", 0, "a.jsonl", number, [{"text": document(number)}])

    for position, (batch, encoded) in enumerate(encode.encode_all(work, batches(), 2)):
        assert batch.first == position
        (run,) = encoded.columns["train"]["input_ids"]
        assert run.tolist() == joined(tokenizer, [document(position)])
        assert read - position <= 6


def test_no_process_sees_ctrl_c_not_even_while_it_starts(tokenizer, monkeypatch, capfd):
    """The terminal sends it to all processes; the parent alone tells of it and ends the others."""
    started = []

    start = multiprocessing.context.SpawnProcess.start

    def start_and_interrupt(process):
        start(process)
        os.kill(process.pid, signal.SIGINT)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_and_interrupt)
    work = encode.Work(DocumentEncoder.of(load_tokenizer(str(tokenizer))), Records("text"), HeldOut(0))
    batches = (encode.Batch("train", 0, "a.jsonl", n, [{"text": document(n)}]) for n in range(40))
    encoded = encode.encode_all(work, batches, 2)
    for number in range(9):
        assert next(encoded)[0].first == number
    with pytest.raises(KeyboardInterrupt):
        encoded.throw(KeyboardInterrupt())
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)
    assert capfd.readouterr() == ("", "")


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"block_size": 1}, "block_size: must be at least 2, not 1"),
            ({"num_proc": 0}, "num_proc: must be at least 1"),
            ({"validation_fraction": 1.0}, "validation_fraction: must lie between 0 and 1"),
            ({"tokenizer": "train:x"}, "tokenizer: train:x must name at least 257 entries"),
            ({"tokenizer": "train:100"}, "tokenizer: train:100 must name at least 257"),
            ({"tokenizer": "./none"}, "no such tokenizer file or folder: ./none"),
            (
                {"folder": "/nowhere"},
                "no such data file or folder: /nowhere",
            ),
            ({"text_column": "body"}, "has no column body"),
            (
                {"block_size": 5000},
                "train split of .* no row of block_size 5000: .*validation_fraction",
            ),
            ({"block_size": 500}, "validation split of .* fills no row"),
        ],
    )
    def test_options(self, tmp_path, tokenizer, options, says):
        raw = write(tmp_path / "raw", train=[document(n) for n in range(20)])
        options = {"folder": raw, "tokenizer": tokenizer} | options
        with pytest.raises(UserError, match=says):
            make(options.pop("folder"), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("num_proc", [1, 2])
    def test_a_broken_line_is_named_from_every_process(self, tmp_path, tokenizer, num_proc, capsys):
        raw = write(tmp_path / "raw", train=[document(n) for n in range(20)])
        with (raw / "train.jsonl").open("a") as file:
            file.write('{"text": \n')
        arguments = ["data", "tokenize", "--input", str(raw), "--tokenizer", str(tokenizer)]
        arguments += ["--block_size", "8", "--out", str(tmp_path / "out"), "--num_proc", str(num_proc)]
        assert main(arguments) == 2
        assert "train.jsonl line 21 is not valid JSON" in capsys.readouterr().err

    def test_numbers_are_no_text(self, tmp_path, tokenizer):
        (tmp_path / "raw").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "raw" / "train.parquet")
        with pytest.raises(UserError, match=r"column text of train.parquet holds more than strings"):
            make(tmp_path / "raw", tmp_path / "out", tokenizer)

    def test_a_corrected_command_begins_anew(self, tmp_path, tokenizer):
        raw = write(tmp_path / "raw", train=[document(n) for n in range(200)])
        with pytest.raises(UserError, match="has no column body"):
            make(raw, tmp_path / "out", tokenizer, text_column="body")
        assert not (tmp_path / "out.part").exists()
        make(raw, tmp_path / "out", tokenizer, text_column="text")

    def test_a_flipped_bit_in_a_sample_is_found(self, tmp_path, tokenizer):
        raw = write_slimpajama(tmp_path / "raw", chunks=1)
        sample(source=str(raw), layout="slimpajama", tokens="all", out=str(tmp_path / "sampled"))
        path = next((tmp_path / "sampled").glob("train-*.zst"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged"):
            make(tmp_path / "sampled", tmp_path / "out", tokenizer)
        with pytest.raises(UserError, match=rf"{path.name} is damaged"):
            TextDataModule(str(tmp_path / "sampled"), tokenizer=str(tokenizer)).prepare_data()

    def test_a_damaged_manifest_of_the_input_is_told(self, tmp_path, tokenizer):
        raw = write(tmp_path / "raw", train=[document(n) for n in range(200)])
        about = {"kind": "sample", "text_column": "text", "splits": {"train": {"characters": "many"}}}
        (raw / "manifest.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=r"raw/manifest.json is damaged \(splits.train.characters is no"):
            make(raw, tmp_path / "out", tokenizer)

    def test_another_set_is_left_alone(self, tmp_path, tokenizer, capsys):
        raw = write(tmp_path / "raw", train=[document(n) for n in range(200)])
        make(raw, tmp_path / "out", tokenizer)
        capsys.readouterr()
        make(raw, tmp_path / "out", tokenizer)
        assert "already holds this set" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"with another block_size \(16, not 32\): give another --out"):
            make(raw, tmp_path / "out", tokenizer, block_size=32)
        with pytest.raises(UserError, match="holds a tokenized set, not a sample"):
            sample(source=str(raw), layout="text", tokens="1k", out=str(tmp_path / "out"))


@pytest.mark.slow
class TestOnRealText:
    @pytest.fixture
    def books(self, tmp_path):
        if not DATA.is_dir():
            pytest.skip(f"no data in {DATA}")
        sample(source=str(DATA / "books"), layout="slimpajama", tokens="all", out=str(tmp_path / "books"))
        make(tmp_path / "books", tmp_path / "first", "train:8192", num_proc=2)
        return tmp_path / "books"

    def test_throughput_is_that_of_bare_encode_batch(self, books, tmp_path):
        """At least 0.85 of it on the same cores and text, start and files included; best of two each."""
        texts = [each["text"] for split in ("train", "validation") for each in records(books, split)]
        tokenizer = Tokenizer.from_file(str(tmp_path / "first" / "tokenizer" / "tokenizer.json"))
        cores = len(os.sched_getaffinity(0))
        bare, ours = [], []
        for turn in range(2):
            start = time.perf_counter()
            for first in range(0, len(texts), 500):
                tokenizer.encode_batch(texts[first : first + 500], add_special_tokens=False)
            bare.append(time.perf_counter() - start)
            folder, out = tmp_path / "first" / "tokenizer", tmp_path / f"out-{turn}"
            arguments = ["data", "tokenize", "--input", str(books), "--tokenizer", str(folder)]
            arguments += ["--block_size", "512", "--out", str(out), "--num_proc", str(cores)]
            start = time.perf_counter()
            subprocess.run(command_line(arguments), check=True)
            ours.append(time.perf_counter() - start)
        assert min(bare) / min(ours) >= 0.85, (bare, ours)

    def test_memory_is_flat(self, books, tmp_path):
        """Three times the text, the same peak, in the process that reads and in those that tokenize."""
        report = "import atexit, resource as r; atexit.register(lambda: print(*(r.getrusage(w).ru_maxrss"
        report += " for w in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN))))"
        peaks = []
        for copies in (1, 3):
            folder = tmp_path / f"raw-{copies}"
            folder.mkdir()
            for path in books.glob("*.zst"):
                for copy in range(copies):
                    (folder / path.name.replace(".", f"-{copy}.", 1)).symlink_to(path)
            arguments = ["data", "tokenize", "--input", str(folder), "--block_size", "512"]
            arguments += ["--tokenizer", str(tmp_path / "first" / "tokenizer"), "--out", str(folder) + "-out"]
            done = subprocess.run(
                command_line(arguments, report), check=True, stdout=subprocess.PIPE, text=True
            )
            peaks.append([int(number) for number in done.stdout.splitlines()[-1].split()])
        assert all(large < 1.1 * small for small, large in zip(*peaks, strict=True)), peaks

"""`stableqat data sample`: what is drawn, from where, and what a kill changes (nothing)."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from raw import contents, full_disk, kill_until_done, records, write_fineweb, write_slimpajama
from sample_documents import document

from stableqat.cli.main import main
from stableqat.data.holdout import document_hash, hash_cutoff
from stableqat.data.prepare import sample as module
from stableqat.data.prepare.command import sample
from stableqat.data.prepare.corpus import CorpusFile, find_corpus, read
from stableqat.data.prepare.sample import Place, draw
from stableqat.errors import UserError


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory):
    return write_slimpajama(tmp_path_factory.mktemp("slimpajama"))


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    return write_fineweb(tmp_path_factory.mktemp("fineweb"))


def number(text: str) -> int:
    return int(text.split()[0])


def take(source, out, tokens="8k", **options):
    options = {"layout": "slimpajama"} | options
    assert sample(source=str(source), tokens=tokens, out=str(out), **options) == 0
    return json.loads((out / "manifest.json").read_text())


def test_the_budget_is_met_and_the_manifest_says_of_what(slimpajama, tmp_path):
    manifest = take(slimpajama, tmp_path / "out")
    train, validation = (records(tmp_path / "out", split) for split in ("train", "validation"))
    longest = max(len(document(n)) for n in range(500))
    about = manifest["splits"]["train"]
    assert 32_000 <= about["characters"] < 32_000 + longest
    assert about["characters"] == sum(len(each["text"]) for each in train)
    assert about["documents"] == len(train) == len({each["text"] for each in train})
    assert about["estimated_tokens"] == about["characters"] // 4
    assert manifest["splits"]["validation"]["documents"] == len(validation) == 1
    assert train[0]["meta"] == {"redpajama_set_name": "RedPajama\u2014C4"}
    assert manifest["revision"] is None
    assert "Common Crawl" in manifest["licence"]
    assert manifest["token_estimate"] == "characters / 4"
    assert set(manifest["files"]) < {path.name for path in []} | {
        str(path.relative_to(slimpajama)) for path in slimpajama.rglob("*.zst")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "train-00000.jsonl.zst",
        "validation-00000.jsonl.zst",
    }
    assert not (tmp_path / "out.part").exists()


def test_chunks_give_shares_by_their_bytes(tmp_path):
    source = write_slimpajama(tmp_path / "source", chunks=2, documents=60)
    take(write_slimpajama(tmp_path / "more" / "x", chunks=1, documents=1), tmp_path / "unused", "100")
    for path in (source / "train" / "chunk2").glob("*_[23].jsonl.zst"):
        path.unlink()  # chunk2 has half the bytes of chunk1 now
    take(source, tmp_path / "out", "6k")
    first = {number(text["text"]) < 4 * 60 for text in records(tmp_path / "out", "train")}
    assert first == {True, False}
    characters = Counter()
    for each in records(tmp_path / "out", "train"):
        characters[number(each["text"]) < 4 * 60] += len(each["text"])
    assert characters[True] / characters.total() == pytest.approx(2 / 3, abs=0.04)


def test_a_seed_decides_the_sample(slimpajama, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        take(slimpajama, tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    one, other = ({each["text"] for each in records(tmp_path / name, "train")} for name in "ac")
    assert 0 < len(one & other) < 0.6 * len(one)


def test_documents_have_the_same_chance(tmp_path):
    files = []
    for index in range(6):
        path = tmp_path / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{index} {n:03}"}) + "\n" for n in range(40)))
        files.append(CorpusFile(path.name, str(path), path.stat().st_size))
    drawn, seeds = Counter(), 300
    for seed in range(seeds):
        place = Place()
        for _, text, _, _ in draw(files, 60 * 5, 4, seed, "text", place):
            drawn[text] += 1
            place.taken += 5
    assert drawn.total() == 60 * seeds
    expected = seeds * 60 / 240
    chi_square = sum((drawn[f"{i} {n:03}"] - expected) ** 2 / expected for i in range(6) for n in range(40))
    assert chi_square < 240 + 4 * (2 * 240) ** 0.5
    for index in range(6):
        assert sum(drawn[f"{index} {n:03}"] for n in range(40)) / drawn.total() == pytest.approx(
            1 / 6, abs=0.01
        )
    # 60 documents of parts of 10: one file of six is left somewhere in its part
    assert sum(drawn[f"{i} {n:03}"] for i in range(6) for n in range(20)) / drawn.total() < 0.5 + 1 / 6 / 4


def test_all_takes_every_document_once(slimpajama, fineweb, tmp_path):
    take(slimpajama, tmp_path / "s", "all")
    texts = Counter(
        each["text"] for split in ("train", "validation") for each in records(tmp_path / "s", split)
    )
    assert max(texts.values()) == 1
    assert len(texts) == 3 * 4 * 40 + 20
    take(fineweb, tmp_path / "f", "all", layout="fineweb-edu")
    drawn = [each for split in ("train", "validation") for each in records(tmp_path / "f", split)]
    assert sorted(each["token_count"] for each in drawn) == list(range(150))
    assert {each["id"] for each in drawn} == {f"<urn:uuid:{n}>" for n in range(150)}
    assert all(each["score"] == each["token_count"] / 7 for each in drawn)


def test_documents_are_held_out_by_their_text_whatever_the_seed(tmp_path):
    lines = [json.dumps({"body": document(n % 900), "n": n}) + "\n" for n in range(1800)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    held_out = {document(n) for n in range(900) if document_hash(document(n)) < hash_cutoff(0.01)}
    assert held_out
    for seed in (0, 1):
        out = tmp_path / f"out-{seed}"
        options = {"layout": "text", "text_column": "body", "seed": seed}
        manifest = take(tmp_path / "corpus.jsonl", out, "60k", **options)
        assert manifest["text_column"] == "body"
        assert {each["body"] for each in records(out, "validation")} <= held_out
        assert not held_out & {each["body"] for each in records(out, "train")}


def test_a_validation_document_is_never_drawn_for_training(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    shared = [document(n) for n in range(10)]
    others = [document(n) for n in range(10, 60)]
    for name, texts in (("train-0", others + shared), ("validation-0", shared)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "raw" / f"{name}.jsonl").write_text(lines)
    take(tmp_path / "raw", tmp_path / "out", "all", layout="text")
    assert sorted(each["text"] for each in records(tmp_path / "out", "validation")) == sorted(shared)
    assert sorted(each["text"] for each in records(tmp_path / "out", "train")) == sorted(others)
    monkeypatch.setattr(module, "_SHARD_CHARACTERS", 2000)
    write = module._JsonLines.write
    monkeypatch.setattr(module._JsonLines, "write", lambda *arguments: left.pop() and write(*arguments))
    left = [True] * 15
    with pytest.raises(IndexError):
        take(tmp_path / "raw", tmp_path / "cut", "all", layout="text")
    left = [True] * 1000
    take(tmp_path / "raw", tmp_path / "cut", "all", layout="text")
    assert records(tmp_path / "cut", "train") == records(tmp_path / "out", "train")


@pytest.mark.parametrize("layout", ["slimpajama", "fineweb-edu"])
def test_a_cut_anywhere_changes_no_byte(slimpajama, fineweb, tmp_path, monkeypatch, layout):
    source = slimpajama if layout == "slimpajama" else fineweb
    monkeypatch.setattr(module, "_SHARD_CHARACTERS", 3000)
    take(source, tmp_path / "whole", "6k", layout=layout)
    replace, calls = os.replace, 0

    def fail(before: bool):
        def replacing(*paths):
            nonlocal calls
            calls -= 1
            if calls == 0 and before:
                raise KeyboardInterrupt
            replace(*paths)
            if calls == 0:
                raise KeyboardInterrupt

        return replacing

    for step, before in [(n, n % 2 == 0) for n in (1, 2, 3, 4, 5, 6, 9, 12, 15, 18)]:
        out, calls = tmp_path / f"cut-{step}", step
        for _ in range(50):  # each call gets a few moves further
            monkeypatch.setattr(os, "replace", fail(before))
            try:
                take(source, out, "6k", layout=layout)
                break
            except KeyboardInterrupt:
                calls = max(step, 4) + 5
        monkeypatch.setattr(os, "replace", replace)
        take(source, out, "6k", layout=layout)  # the last call may have been killed after its last move
        assert contents(out) == contents(tmp_path / "whole"), step


def test_kills_change_no_byte(tmp_path):
    source = write_slimpajama(tmp_path / "source", documents=150)
    settings = "import stableqat.data.prepare.sample as s; s._SHARD_CHARACTERS = 8000"
    common = [
        "data",
        "sample",
        "--source",
        str(source),
        "--layout",
        "slimpajama",
        "--tokens",
        "100k",
        "--out",
    ]
    out = tmp_path / "out"
    assert kill_until_done([*common, str(out)], settings, out, kills=5, seed=0) >= 3
    assert kill_until_done([*common, str(tmp_path / "whole")], settings, tmp_path / "whole", 0, 0) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert len(list(out.glob("train-*"))) > 30


def test_a_sample_killed_in_the_last_moment_is_only_moved(slimpajama, tmp_path, monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if Path(b).suffix else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(slimpajama, tmp_path / "out")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(module, "_draw_all", None)  # a call would fail
    assert take(slimpajama, tmp_path / "out")["splits"]["train"]["documents"]


def test_what_is_there_already_is_left_alone(slimpajama, tmp_path, capsys):
    out = tmp_path / "out"
    take(slimpajama, out)
    before = contents(out)
    capsys.readouterr()
    take(slimpajama, out)
    assert "already holds this sample" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"out holds a sample with another seed \(0, not 1\): give another --out"
    ):
        take(slimpajama, out, seed=1)
    assert contents(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="other exists and is not a sample"):
        take(slimpajama, other)
    assert contents(other) == {"thesis.txt": b"x"}


def test_one_process_writes_at_a_time(slimpajama, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="another process is writing"):
            take(slimpajama, tmp_path / "out")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_draw_all", second)
    with pytest.raises(KeyboardInterrupt):
        take(slimpajama, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out.part holds a sample with another tokens \(8k, not 9k\): delete it"
    ):
        take(slimpajama, tmp_path / "out", "9k")


def test_a_source_that_changed_is_told(slimpajama, tmp_path, monkeypatch):
    source = write_slimpajama(tmp_path / "source")
    monkeypatch.setattr(module, "_draw_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(source, tmp_path / "out")
    next(source.rglob("*.zst")).unlink()
    with pytest.raises(UserError, match=r"have changed: delete .*out.part to start again"):
        take(source, tmp_path / "out")


class TestMistakes:
    def test_too_many_tokens(self, slimpajama, tmp_path):
        with pytest.raises(
            UserError,
            match=r"tokens 2000000 is more than .* holds, about \d+: lower tokens, or draw --tokens all",
        ):
            take(slimpajama, tmp_path / "out", "2M")
        assert not list(tmp_path.iterdir())
        take(slimpajama, tmp_path / "out", "20k")

    @pytest.mark.parametrize("tokens", ["", "0", "-3", "1.5X", "many", "0.2"])
    def test_no_number(self, slimpajama, tmp_path, tokens):
        with pytest.raises(UserError, match="tokens: must be a number such as 300000, 20M"):
            take(slimpajama, tmp_path / "out", tokens)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"layout": "fineweb-edu"}, r"no data file in .*: expected .parquet"),
            ({"seed": -1}, "seed: must be at least 0"),
            ({"text_column": "body"}, r"has no column body \(it has text, meta\): set text_column"),
            ({"text_column": "meta"}, "column meta of .* holds more than strings"),
            ({"name": "sample-10BT"}, "is local: leave out name and revision"),
        ],
    )
    def test_options(self, slimpajama, tmp_path, options, says):
        with pytest.raises(UserError, match=says):
            take(slimpajama, tmp_path / "out", **options)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not valid JSON"),
            (b'{"text": "a"}\n\n[1]\n', "a.jsonl line 3 is not a JSON object"),
            (b'[{"text": "a"}]', "a.jsonl holds one JSON list"),
            (b'{"text": "\xff"}\n', "a.jsonl line 1 is not valid JSON"),
        ],
    )
    def test_broken_lines(self, tmp_path, content, says):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=says):
            take(tmp_path / "a.jsonl", tmp_path / "out", "all", layout="text")

    def test_a_broken_file_is_named(self, tmp_path):
        good = zstandard.compress(b'{"text": "abc"}\n' * 1000)
        (tmp_path / "a.jsonl.zst").write_bytes(good[:20] + b"\xff\xff" + good[22:])
        with pytest.raises(UserError, match=r"a.jsonl.zst"):
            take(tmp_path / "a.jsonl.zst", tmp_path / "out", "all", layout="text")

    def test_a_full_disk_is_one_line_and_work_goes_on(self, slimpajama, tmp_path, monkeypatch, capsys):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module._JsonLines, "write", full)
        arguments = [
            "data",
            "sample",
            "--source",
            str(slimpajama),
            "--layout",
            "slimpajama",
            "--tokens",
            "1k",
        ]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert "out.part cannot be written (No space left on device): make room" in capsys.readouterr().err
        monkeypatch.undo()
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 0

    @pytest.mark.parametrize("size", [0, 40_000])
    @pytest.mark.parametrize("verb", ["sample", "tokenize"])
    def test_a_disk_without_room_is_one_line(self, tmp_path, size, verb, capsys):
        chance, raw = random.Random(0), tmp_path / "raw"
        raw.mkdir()
        for split, count in (("train", 100), ("validation", 10)):
            texts = [{"text": chance.randbytes(1000).hex()} for _ in range(count)]
            (raw / f"{split}.jsonl").write_text("\n".join(map(json.dumps, texts)))
        arguments = {
            "sample": ["--source", str(raw), "--layout", "text", "--tokens", "all"],
            "tokenize": ["--input", str(raw), "--tokenizer", "train:300", "--block_size", "16"],
        }[verb]
        arguments = ["data", verb, *arguments, "--out", str(tmp_path / "out")]
        arguments += ["--num_proc", "1"] if verb == "tokenize" else []
        with full_disk(size):
            assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"out\.part cannot be written \(.*File too large\): make room and repeat the", line)
        assert main(arguments) == 0

    @pytest.mark.parametrize(
        ("out", "says"),
        [
            (".", "out: '.' is not a new folder"),
            ("./", "out: './' is not a new folder"),
            ("", "out: '' is not a new folder"),
            (" ", "out: ' ' is not a new folder"),
            ("/", "out: '/' is not a new folder"),
            ("..", "out: '..' is not a new folder"),
            ("other/..", "out: 'other/..' is not a new folder"),
            ("a" * 300, "cannot be created"),
            ("loop", "cannot be created"),
            ("file", "file exists and is not a sample: give another --out"),
            ("file/below", "cannot be written"),
            ("/proc/none/out", "cannot be written"),
        ],
    )
    def test_an_output_that_cannot_be(self, slimpajama, tmp_path, monkeypatch, out, says):
        (tmp_path / "here" / "other").mkdir(parents=True)
        (tmp_path / "here" / "file").write_text("mine")
        (tmp_path / "here" / "loop").symlink_to("loop")
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            sample(source=str(slimpajama), layout="text", tokens="1k", out=out)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in Path().iterdir()) == ["file", "loop", "other"]
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "raw") == ["here"]

    def test_names_steer_no_terminal(self, slimpajama, tmp_path, capfd):
        arguments = ["data", "sample", "--layout", "text", "--tokens", "1k", "--out"]
        for name in ("red\x1b[31m", "bell\a\nline", os.fsdecode(b"latin\xe9")):
            out = str(tmp_path / name)
            assert main([*arguments, out, "--source", str(slimpajama)]) == 0
            assert main([*arguments, out, "--source", str(slimpajama), "--seed", "2"]) == 2
        said = capfd.readouterr()
        assert all(line.isprintable() for line in (said.out + said.err).splitlines())
        assert r"red\x1b[31m" in said.out
        assert r"latin\udce9" in said.out
        assert r"bell\x07 line holds a sample with another seed" in said.err

    def test_an_output_may_be_a_link(self, slimpajama, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to("disk")
        (tmp_path / "dangling").symlink_to("elsewhere")
        for link, folder in (("link", "disk"), ("dangling", "elsewhere")):
            sample(source=str(slimpajama), layout="text", tokens="1k", out=str(tmp_path / link))
            assert (tmp_path / folder / "manifest.json").is_file()

    def test_a_damaged_record_of_a_begun_sample_is_told(self, slimpajama, tmp_path):
        (tmp_path / "out.part").mkdir()
        (tmp_path / "out.part" / ".request.json").write_text('{"kind": "sam')
        with pytest.raises(UserError, match=r".request.json is damaged: delete .*out.part to start again"):
            take(slimpajama, tmp_path / "out", "1k", layout="text")
        (tmp_path / "out.part" / ".request.json").write_text('{"kind": "sample"}')
        with pytest.raises(UserError, match=r"is damaged \(request is not a mapping\)"):
            take(slimpajama, tmp_path / "out", "1k", layout="text")


def test_surrogates_blank_lines_and_compressions(tmp_path):
    import gzip

    lines = b'{"text": "half \\ud800"}\n\n{"text": ""}\n{"text": null}\n' + b"".join(
        json.dumps({"text": document(n), "day": n}).encode() + b"\n" for n in range(30)
    )
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(lines))
    take(tmp_path / "c4-train.00000.json.gz", tmp_path / "out", "all", layout="text")
    texts = [each["text"] for each in records(tmp_path / "out", "train")]
    assert "half \ud800" in texts
    assert len(texts) + len(records(tmp_path / "out", "validation")) == 31


@pytest.mark.parametrize("group", [16, 1000])
def test_parquet_is_read_from_any_row(tmp_path, group):
    rows = [{"text": document(n)} for n in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=group)
    file = find_corpus(str(tmp_path), {".parquet": "parquet"}).splits["train"][0]
    for start in (0, 1, 15, 16, 17, 255, 256, 400, 599, 600):
        assert list(read(file, start)) == rows[start:]


class TestHub:
    """A data set of the hub, served from a folder: addresses, sizes and streams, and no network."""

    @pytest.fixture
    def hub(self, slimpajama, monkeypatch):
        import datasets
        import fsspec.core
        from fsspec.implementations.local import LocalFileSystem

        prefix = "hf://datasets/org/corpus@c0ffee/"
        opened: list[str] = []

        class Hub(LocalFileSystem):
            cachable = False

            def open(self, path, *args, **kwargs):
                opened.append(str(path))
                return super().open(path, *args, **kwargs)

        class Builder:
            def __init__(self, source, name=None, revision=None):
                assert (source, name) == ("org/corpus", "default")
                self.config = self
                self.data_files = {
                    split: [
                        prefix + str(path.relative_to(slimpajama))
                        for path in sorted((slimpajama / split).rglob("*.zst"))
                    ]
                    for split in ("train", "validation")
                }

        known = fsspec.core.url_to_fs

        def serve(address, **options):
            if address.startswith(prefix):
                return Hub(), str(slimpajama / address.removeprefix(prefix))
            return known(address, **options)

        monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
        monkeypatch.setattr(fsspec.core, "url_to_fs", serve)
        return opened

    def test_a_sample_is_that_of_the_same_local_files(self, hub, slimpajama, tmp_path):
        # the local folder's names hold the split, as the hub's do
        here = take(slimpajama, tmp_path / "here")
        there = take("org/corpus", tmp_path / "there", name="default")
        assert there["revision"] == "c0ffee"
        assert there["splits"] == here["splits"]
        assert there["files"] == here["files"]

    def test_little_is_opened_for_little(self, hub, tmp_path):
        take("org/corpus", tmp_path / "out", "300", name="default")
        assert len(hub) == 1 + 3  # of validation, and of each chunk

    def test_a_begun_sample_keeps_to_its_commit(self, hub, tmp_path, monkeypatch):
        import datasets

        with monkeypatch.context() as patch:
            patch.setattr(module, "_draw_all", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                take("org/corpus", tmp_path / "out", name="default")
        monkeypatch.setattr(datasets, "load_dataset_builder", None)  # a call would fail
        assert take("org/corpus", tmp_path / "out", name="default")["revision"] == "c0ffee"

    def test_no_access_is_one_line(self, tmp_path, monkeypatch):
        import datasets

        def gated(*_, **__):
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/x' is a gated dataset\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset_builder", gated)
        with pytest.raises(UserError, match=r"org/x is not found .*\(.*gated dataset\): check"):
            take("org/x", tmp_path / "out")


def test_public_schemas(tmp_path):
    data = Path(os.environ.get("STABLEQAT_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    if not data.is_dir():
        pytest.skip(f"no data in {data}")
    manifest = take(data / "books", tmp_path / "books", "50k")
    assert manifest["splits"]["train"]["estimated_tokens"] >= 50_000
    manifest = take(data / "docs", tmp_path / "docs", "50k", layout="fineweb-edu")
    assert set(records(tmp_path / "docs", "train")[0]) >= {"text", "id", "url", "language", "score"}


def test_help_of_the_verbs_imports_nothing_heavy():
    heavy = {"torch", "lightning", "transformers", "datasets", "numpy", "pyarrow", "tokenizers", "fsspec"}
    code = (
        "import sys; from stableqat.cli.main import main\n"
        "for verb in ([], ['sample'], ['tokenize']): assert main(['data', *verb, '--help']) == 0\n"
        "assert main(['data']) == 0\n"
        f"assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n  data sample " in done.stdout
    assert "\n  fit " not in done.stdout
    assert "--layout {slimpajama,fineweb-edu,text}" in done.stdout
    assert "--block_size BLOCK_SIZE" in done.stdout


def test_a_mistyped_verb_is_told(capsys):
    assert main(["data", "smple"]) == 2
    assert "data smple is not a verb of stableqat; did you mean data sample?" in capsys.readouterr().err

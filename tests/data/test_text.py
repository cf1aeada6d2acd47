import gzip
import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_documents import document

from stableqat.data import TextDataModule, embedded, text, text_rows
from stableqat.data.holdout import document_hash, hash_cutoff
from stableqat.data.order import PAD
from stableqat.data.source import TEXT_FORMATS, local_files
from stableqat.data.tokenizer import EOS, train_bpe
from stableqat.errors import UserError

DATA = Path(os.environ.get("STABLEQAT_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.fixture
def make(tmp_path, tokenizer):
    def module(source, **options):
        options = {"tokenizer": str(tokenizer), "block_size": 16, "batch_size": 4} | options
        data = TextDataModule(
            None if source is None else str(source), cache_dir=str(tmp_path / "cache"), **options
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return module


def lines(texts):
    return "".join(json.dumps({"text": text, "meta": {"set": "x"}}) + "\n" for text in texts)


def as_jsonl(folder, name, texts):
    (folder / f"{name}.jsonl").write_text(lines(texts))


def as_json(folder, name, texts):
    (folder / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]))


def as_jsonl_zst(folder, name, texts):
    (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines(texts).encode()))


def as_jsonl_zst_streamed(folder, name, texts):
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    with (folder / f"{name}.jsonl.zst").open("wb") as file, compressor.stream_writer(file) as stream:
        stream.write(lines(texts).encode())


def as_jsonl_gz(folder, name, texts):
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(texts).encode()))


def as_parquet(folder, name, texts):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "id": range(len(texts))}), folder / f"{name}.parquet"
    )


def as_txt(folder, name, texts):
    for number, content in enumerate(texts):
        (folder / f"{name}-{number:04}.txt").write_text(content)


WRITERS = [as_jsonl, as_json, as_jsonl_zst, as_jsonl_zst_streamed, as_jsonl_gz, as_parquet, as_txt]


def flat(data, split):
    """The tokens of all rows of a split, in order."""
    rows = data.splits[split]
    return rows[[(0, 0, index) for index in range(len(rows))]]["input_ids"].flatten().tolist()


def joined(data, texts):
    """The same tokens, worked out document by document."""
    return [
        token
        for text in texts
        for token in [*data.tokenizer(text, add_special_tokens=False)["input_ids"], data.eos_token_id]
    ]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_rows(tmp_path, make, write):
    folder = tmp_path / "corpus"
    folder.mkdir()
    contents = {"train": range(0, 30), "valid": range(30, 40), "test": range(40, 45)}
    for name, numbers in contents.items():
        write(folder, name, [document(n) for n in numbers])
    data = make(folder)
    assert set(data.splits) == {"train", "validation", "test"}
    for split, numbers in zip(("train", "validation", "test"), contents.values(), strict=True):
        expected = joined(data, [document(n) for n in numbers])
        assert flat(data, split) == expected[: len(expected) // 16 * 16]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert len(data.test_dataloader()) == -(-len(data.splits["test"]) // 4)


@pytest.mark.parametrize("layout", ["one file", "folders"])
def test_layouts_without_split_names_in_the_files(tmp_path, make, layout):
    texts = [document(n) for n in range(40)]
    if layout == "one file":
        as_jsonl(tmp_path, "everything", texts)
        data = make(tmp_path / "everything.jsonl", validation_fraction=0.2)
        assert set(data.splits) == {"train", "validation"}
    else:
        for folder, part in (("train", texts[:30]), ("validation", texts[30:])):
            (tmp_path / "corpus" / folder).mkdir(parents=True)
            as_parquet(tmp_path / "corpus" / folder, "part-0", part)
        data = make(tmp_path / "corpus")
        assert flat(data, "validation") == joined(data, texts[30:])[: len(flat(data, "validation"))]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=30), min_size=1, max_size=12),
    block_size=st.integers(2, 20),
    chunk=st.integers(1, 5),
)
def test_rows_are_the_documents_less_the_tail(documents, block_size, chunk):
    import datasets

    table = pyarrow.table({"input_ids": pyarrow.array(documents, pyarrow.list_(pyarrow.int32()))})
    pieces = pyarrow.Table.from_batches(table.to_batches(max_chunksize=chunk))
    rows = text_rows.PackedRows(datasets.Dataset(pieces), block_size)
    everything = [token for tokens in documents for token in tokens]
    assert rows.num_tokens == len(everything)
    assert len(rows) == len(everything) // block_size
    got = [token for i in range(len(rows)) for token in rows[[(0, 0, i)]]["input_ids"][0].tolist()]
    assert got == everything[: len(rows) * block_size]


def test_held_out_documents_are_whole_and_never_trained_on(corpus, documents, make):
    data = make(corpus, block_size=2, validation_fraction=0.1)
    eos = data.eos_token_id

    def split_texts(split):
        tokens = np.array(flat(data, split))
        return {
            data.tokenizer.decode(part[part != eos])
            for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1)
        }

    train, validation = split_texts("train"), split_texts("validation")
    held_out = {text for text in documents if document_hash(text) < hash_cutoff(0.1)}
    assert len(held_out) > 10
    for split, expected in ((validation, held_out), (train, set(documents) - held_out)):
        assert split & set(documents) <= expected
        assert len(split & set(documents)) >= len(expected) - 1  # the last one may have lost its tail
    assert not train & validation - {""}


def test_equal_documents_are_held_out_together_and_order_does_not_matter(tmp_path, make):
    texts = [document(n) for n in range(60)]
    as_jsonl(tmp_path, "once", texts)
    as_jsonl(tmp_path, "twice", [*reversed(texts), *texts])
    once, twice = make(tmp_path / "once.jsonl"), make(tmp_path / "twice.jsonl")
    cutoffs = {each.held_out.cutoff for data in (once, twice) for each in data._documents.values()}
    assert len(cutoffs) == 1
    assert twice.splits["validation"].num_tokens == 2 * once.splits["validation"].num_tokens


def test_another_block_size_tokenizes_nothing_again(corpus, make, monkeypatch):
    first = make(corpus)
    monkeypatch.setattr("stableqat.data.encoder._backend", None)  # a call would fail
    second = make(corpus, block_size=32)
    assert flat(second, "train")[:320] == flat(first, "train")[:320]


def test_rows_survive_pickling_and_padding_is_ignored(corpus, make):
    rows = make(corpus).splits["train"]
    copy = pickle.loads(pickle.dumps(rows))
    keys = [(0, 0, 3), (0, 0, PAD)]
    batch = copy[keys]
    assert torch.equal(batch["input_ids"], rows[keys]["input_ids"])
    assert (batch["labels"][1] == -100).all()
    assert (batch["labels"][0] != -100).all()


@pytest.mark.parametrize("bare", [False, True])
def test_a_tokenizer_from_a_folder_or_a_file(corpus, make, tokenizer, tmp_path, bare):
    source = tokenizer
    if bare:
        source = tmp_path / "tokenizer.json"
        source.write_bytes((tokenizer / "tokenizer.json").read_bytes())
    data = make(corpus, tokenizer=str(source))
    assert data.vocab_size == len(data.tokenizer) == 300
    assert data.tokenizer.eos_token == EOS
    assert max(flat(data, "train")) < 300


def test_a_bpe_is_trained_once_on_the_train_split_alone(corpus, documents, make, monkeypatch):
    trained = []

    def spy(texts, vocab_size):
        trained.append(list(texts))
        return train_bpe(trained[-1], vocab_size)

    monkeypatch.setattr(text, "train_bpe", spy)
    first, second = (make(corpus, tokenizer=None, vocab_size=320) for _ in range(2))
    assert len(trained) == 1
    assert trained[0] == [text for text in documents if document_hash(text) >= hash_cutoff(0.05)]
    assert first.vocab_size == len(first.tokenizer) == 320
    assert flat(first, "train") == flat(second, "train")
    strange = "caf\u00e9 \u4e16\u754c\n\ttab"
    assert first.tokenizer.decode(first.tokenizer(strange)["input_ids"]) == strange
    make(corpus, tokenizer=None, vocab_size=330)
    assert len(trained) == 2


def test_a_large_corpus_gives_the_bpe_an_even_share(corpus, make, monkeypatch):
    data = make(corpus)
    everything = list(data._training_texts())
    monkeypatch.setattr(text, "_BPE_MAX_BYTES", data._documents[str(corpus)].splits["train"].data.nbytes // 4)
    share = list(data._training_texts())
    assert len(everything) / 6 < len(share) < len(everything) / 4
    assert set(share) < set(everything)


def test_empty_and_missing_texts_drop_out(tmp_path, make):
    rows = [{"text": document(n) if n % 3 else ("" if n % 2 else None)} for n in range(60)]
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make(tmp_path / "gaps.jsonl", validation_fraction=0.5)
    tokens = flat(data, "train") + flat(data, "validation")
    assert data.eos_token_id in tokens
    assert all(pair != (data.eos_token_id,) * 2 for pair in itertools.pairwise(tokens))


def test_workers_read_the_same_rows(corpus, make):
    plain, forked = make(corpus, seed=1), make(corpus, seed=1, num_workers=2)
    for one, two in zip(plain.train_dataloader(), forked.train_dataloader(), strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


class TestEmbedded:
    @pytest.fixture
    def library(self, tmp_path, monkeypatch):
        """A small standard library."""
        root = tmp_path / "lib"
        for path, source in {
            "pydoc_data/topics.py": "topics = {'b': 'Second.\\n', 'a': 'First.'}",
            "zlast.py": '"""Last."""\nif True:\n    def f():\n        """  Of f.\n\n        More."""\n',
            "apack/__init__.py": '"""Pack."""\nclass C:\n    """Of C."""\n    def m(self):\n        "Of m."',
            "apack/silent.py": "x = 1\nraise SystemExit('imported')",
            "apack/broken.py": '"""Broken."""\ndef',
            "test/test_x.py": '"""A test."""',
            "site-packages/other.py": '"""Not of the library."""',
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(source)
        return root

    def test_documents(self, library):
        assert embedded.stdlib_documents(library) == [
            "First.",
            "Second.",
            "Pack.\n\nOf C.\n\nOf m.",
            "Last.\n\nOf f.\n\nMore.",
        ]

    def test_a_python_without_sources_says_so(self, tmp_path):
        with pytest.raises(UserError, match="name your own source"):
            embedded.stdlib_documents(tmp_path)

    def test_the_cache_is_used_and_races_do_no_harm(self, library, tmp_path, monkeypatch):
        monkeypatch.setenv("STABLEQAT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(library))
        path = embedded.embedded_text()
        content = path.read_bytes()
        monkeypatch.setattr(embedded, "stdlib_documents", None)  # a call would fail
        assert embedded.embedded_text() == path
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_the_running_pythons_text(self):
        documents = embedded.stdlib_documents()
        assert sum(map(len, documents)) > 1_500_000
        assert len(documents) > 400
        assert "context manager" in documents[0] + documents[1] + "".join(documents[:79])
        assert not any("\x00" in text for text in documents)

    def test_the_default_source(self, library, tmp_path, monkeypatch):
        monkeypatch.setenv("STABLEQAT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(library))
        cache = str(tmp_path / "cache")
        data = TextDataModule(vocab_size=257, block_size=4, validation_fraction=0.3, cache_dir=cache)
        data.setup()
        assert data.vocab_size == len(data.tokenizer) == 257
        seen = data.tokenizer.decode(flat(data, "train") + flat(data, "validation"))
        assert "Pack.\n\nOf C." in seen


def test_a_bpe_is_the_same_every_time():
    first, second = (train_bpe([document(n) for n in range(300)], 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


class TestRealData:
    @pytest.fixture(autouse=True)
    def _present(self):
        if not DATA.is_dir():
            pytest.skip(f"no data in {DATA}")

    @pytest.mark.parametrize("file", ["books/validation-*.jsonl.zst", "docs/validation-*.parquet"])
    def test_public_schemas(self, make, file):
        data = make(next(DATA.glob(file)), block_size=256)
        assert len(data.splits["train"]) > 1000
        assert len(data.splits["validation"]) > 10
        assert len(data.tokenizer.decode(flat(data, "validation")).split()) > 1000

    def test_folders_have_their_splits(self):
        builder, files = local_files(str(DATA / "books"), TEXT_FORMATS)
        assert (builder, {split: len(some) for split, some in files.items()}) == (
            "json",
            {"train": 8, "validation": 1},
        )

"""A user's mistakes: one line that names the file or key and the remedy, as early as it can be known."""

import gzip
import json
import os
import re
import resource
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from raw import full_disk
from sample_documents import document

from stableqat.data import ImageDataModule, TextDataModule, source
from stableqat.data.damage import _zst_is_whole
from stableqat.data.encoder import DocumentEncoder
from stableqat.data.prepare.command import tokenize
from stableqat.data.source import TEXT_FORMATS
from stableqat.data.tokenizer import load_tokenizer
from stableqat.errors import UserError


def rows(count=40):
    return [json.dumps({"text": document(n), "id": n}) for n in range(count)]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*changes):
    """A jsonl file whose lines at some numbers are others."""
    content = rows()
    for number, line in changes:
        content[number - 1] = line
    return "\n".join(content) + "\n"


def parquet(folder, columns):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def cut(content, share=0.5):
    return content[: int(len(content) * share)]


def flipped(content):
    return content[:-30] + bytes(byte ^ 0xFF for byte in content[-30:-20]) + content[-20:]


def zst(text):
    return zstandard.compress(text.encode())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers: must be at least 0"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"block_size": 1}, "block_size 1 must be at least 2"),
        ({"vocab_size": 200}, "vocab_size: must be at least 257, not 200"),
        ({"validation_fraction": 0.0}, "validation_fraction: must lie between 0 and 1, not 0.0"),
        ({"validation_fraction": 1.5}, "validation_fraction: must lie between 0 and 1, not 1.5"),
        ({"tokenizer": "./nowhere"}, "no such tokenizer file or folder: ./nowhere"),
        ({"tokenizer": "tokenizer.json"}, "no such tokenizer file or folder: tokenizer.json"),
        ({"source": "/nowhere/at/all.jsonl"}, "no such data file or folder: /nowhere/at/all.jsonl"),
        ({"source": "missing.parquet"}, "no such data file or folder: missing.parquet"),
        ({"source": "./missing"}, "no such data file or folder: ./missing"),
        ({"source": "text/*.jsonl"}, r"text/\*.jsonl \(globs are not expanded\)"),
        ({"source": "too/many/parts"}, "no such data file or folder: too/many/parts"),
    ],
)
def test_text_arguments(options, says):
    with pytest.raises(UserError, match=says):
        TextDataModule(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"image_size": 32}, "the embedded digits have 8 pixels a side"),
        ({"source": "a/b", "image_size": 0}, "image_size: must be at least 1 or null, not 0"),
        ({"validation_fraction": 1.0}, "validation_fraction: must lie between 0 and 1, not 1.0"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"hflip": 1.5}, "hflip: must be at least 0 and at most 1, not 1.5"),
        ({"re_prob": -0.5}, "re_prob: must be at least 0 and at most 1, not -0.5"),
        ({"interpolation": "cubic"}, "interpolation cubic must be bicubic, bilinear or nearest"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"source": "/nowhere/images"}, "no such data file or folder: /nowhere/images"),
    ],
)
def test_image_arguments(options, says):
    with pytest.raises(UserError, match=says):
        ImageDataModule(**options)


FILES = {
    "an empty file": ("a.jsonl", "", r"a.jsonl is empty"),
    "another format": ("a.csv", "text\nhello\n", r"a.csv: cannot read .csv, only .json,"),
    "zst cut short": ("a.jsonl.zst", cut(zst(lines())), r"a.jsonl.zst is cut short"),
    "zst less its last byte": ("a.jsonl.zst", zst(lines())[:-1], r"a.jsonl.zst is cut short"),
    "no zst": ("a.jsonl.zst", lines(), r"a.jsonl.zst is cut short or not zstandard"),
    "parquet cut short": ("a.parquet", b"PAR1" + bytes(100), r"a.parquet is cut short"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_checked_before_anything_is_read(tmp_path, case):
    name, content, says = FILES[case]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=says) as caught:
        TextDataModule(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):  # an image module says no less of a folder that holds only this
        ImageDataModule(str(tmp_path))


@pytest.mark.parametrize(
    "twin", ["./a.jsonl", "{here}/a.jsonl", "link.jsonl", "hard.jsonl", "sub/../a.jsonl"]
)
def test_one_file_is_one_source_of_a_mixture(tmp_path, monkeypatch, twin):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl", lines())
    Path("sub").mkdir()
    Path("link.jsonl").symlink_to("a.jsonl")
    os.link("a.jsonl", "hard.jsonl")
    twin = twin.format(here=tmp_path)
    with pytest.raises(
        UserError, match=f"source names the same data twice, as a.jsonl and as {twin}: name it"
    ):
        TextDataModule({"a.jsonl": 1, twin: 2})


@pytest.mark.parametrize("twin", ["./set", "set/", "{here}/set", "link"])
def test_one_folder_is_one_source_of_a_mixture(tmp_path, monkeypatch, twin):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "set/a.jsonl", lines())
    Path("link").symlink_to("set")
    with pytest.raises(UserError, match="source names the same data twice, as set and as"):
        TextDataModule({"set": 1, twin.format(here=tmp_path): 2})
    write(tmp_path, "other/a.jsonl", lines())
    TextDataModule({"set": 1, "other": 2})


def test_folders_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="no data file in"):
        TextDataModule(str(tmp_path))
    write(tmp_path, "test-0.jsonl", lines())
    with pytest.raises(UserError, match=r"no training file in .*: name files train\*"):
        TextDataModule(str(tmp_path))
    write(tmp_path, "train-0.txt", "text")
    with pytest.raises(UserError, match=r"mixes file formats \(.jsonl, .txt\)"):
        TextDataModule(str(tmp_path))
    write(tmp_path, "images/test-0.parquet", "")
    with pytest.raises(UserError, match=r"no training file in .*: name files train\*"):
        ImageDataModule(str(tmp_path / "images"))


def pieces(content, size=1000):
    return [content[k : k + size] for k in range(0, len(content), size)]


@pytest.mark.parametrize(
    "compressed",
    [
        zst(lines()),
        zst("a" * 1_000_000),
        zst(""),
        zst("one") + zst("two"),
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(lines().encode()),
        b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello" + zst("skippable before"),
        zst(os.urandom(300_000).hex()),
    ],
    ids=["plain", "run", "nothing", "two frames", "checksum", "skippable", "many blocks"],
)
def test_a_whole_zst_is_told_from_a_cut_one(tmp_path, compressed):
    assert _zst_is_whole(Path(write(tmp_path, "a.zst", compressed)))
    for end in {1, 5, len(compressed) // 3, len(compressed) - 1}:
        path = Path(write(tmp_path, "b.zst", compressed[:end]))
        if compressed[:end] != zst("one"):
            assert not _zst_is_whole(path), end


CONTENTS = {
    "a broken line": ("a.jsonl", lines((31, '{"text": "cut')), r"a.jsonl line 31 is not valid JSON"),
    "a broken line in zst": (
        "a.jsonl.zst",
        zst(lines((7, "{oops}"))),
        r"a.jsonl.zst line 7 is not valid JSON",
    ),
    "a line that is no object": ("a.jsonl", lines((2, "[1, 2]")), r"a.jsonl line 2 is not a JSON object"),
    "a broken list": ("a.json", '[{"text": "a"},\n {"text": }]', r"a.json line 2 is not valid JSON"),
    "damaged zst": ("a.jsonl.zst", flipped(zst(lines())), r"a.jsonl.zst cannot be decompressed"),
    "damaged gz": ("a.jsonl.gz", b"\x1f\x8b" + bytes(50), r"a.jsonl.gz cannot be decompressed"),
    "not UTF-8": ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 at byte 3"),
    "damaged parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", r"a.parquet cannot be read as parquet"),
    "no text column": (
        "a.jsonl",
        '{"content": "x", "id": 1}\n',
        r"no column text \(it has content, id\): set text_column",
    ),
    "numbers": ("a.jsonl", '{"text": 1}\n{"text": 2}\n', r"column text of .* holds more than strings"),
    "numbers among strings": (
        "a.jsonl",
        '{"text": 1}\n{"text": "a"}\n',
        r"column text of .* holds more than strings",
    ),
    "only nulls": ("a.jsonl", '{"text": null}\n' * 9, r"column text of .* is empty: give documents"),
    "empty documents": ("a.jsonl", '{"text": ""}\n' * 9, r"column text of .* is empty: give documents"),
    "blank lines": ("a.jsonl", "\n" * 9, r"cannot be read as json \(it holds no rows\)"),
    "empty mappings": ("a.jsonl", "{}\n" * 9, r"cannot be read as json \(it holds no rows\)"),
    "nested without end": (
        "a.jsonl",
        lines((3, '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")),
        r"a.jsonl nests more than 200 levels deep",
    ),
    "nested over lines": ("a.json", "[\n" * 30_000 + "]\n" * 30_000, r"a.json nests more than 200 levels"),
    "nested in zst": (
        "a.jsonl.zst",
        zst('{"text": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001),
        r"a.jsonl.zst nests more than 200 levels",
    ),
    "a null record": ("a.jsonl", "null\n" + lines(), r"a.jsonl holds a line that is null: make it a JSON"),
    "null alone": ("a.json.gz", gzip.compress(b" \n null"), r"a.json.gz holds a line that is null"),
    "nested deeply": (
        "a.jsonl",
        '{"text": ' + "[" * 190 + "]" * 190 + "}",
        r"cannot be read as json \(Recursion",
    ),
    "half of a surrogate pair": (
        "a.jsonl",
        lines((5, r'{"text": "a\ud800b", "id": 5}')),
        r"a.jsonl line 5 holds half of a surrogate pair",
    ),
    "half of a pair in bytes": (
        "a.jsonl",
        lines((5, '{"text": "a\ud800b", "id": 5}')).encode("utf-8", "surrogatepass"),
        r"a.jsonl line 5 is not UTF-8 at byte 11",
    ),
    "conversations": (
        "a.jsonl",
        '{"conversations": [{"from": "human", "value": "hi"}]}\n' * 9,
        r"holds chats \(in conversations\), not texts: give messages, .* a column of text \(none\)",
    ),
    "question and answer": (
        "a.jsonl",
        '{"question": "a", "answer": "b"}\n' * 9,
        r"holds pairs \(in question and answer\), not texts: .* a column of text \(question, answer\)",
    ),
    "one short document": ("a.txt", document(1), r"the validation split .* less than one row of block_size"),
    "too little": (
        "a.jsonl",
        "".join(json.dumps({"text": f"x{n}"}) + "\n" for n in range(3)),
        r"less than one row of block_size",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents(tmp_path, case):
    name, content, says = CONTENTS[case]
    data = TextDataModule(write(tmp_path, name, content), vocab_size=300, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says) as caught:
        data.setup()
    assert "\n" not in str(caught.value)


def test_who_names_a_column_of_text_trains_on_it(tmp_path):
    chat = '{"messages": [{"role": "user", "content": "hi"}], "id": "x"}\n' * 9
    path = write(tmp_path, "a.jsonl", chat)
    data = TextDataModule(path, text_column="messages", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"holds chats \(in messages\), not texts"):
        data.setup()
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds chats \(in messages\), not texts"):
        tokenize(input=path, tokenizer="train:300", block_size=8, out=out, text_column="messages")
    path = write(
        tmp_path,
        "b.jsonl",
        "".join(json.dumps({"prompt": document(n), "answer": "b"}) + "\n" for n in range(40)),
    )
    TextDataModule(
        path, text_column="prompt", vocab_size=300, block_size=8, cache_dir=str(tmp_path / "cache")
    ).setup()


def test_deep_nesting_is_told_by_the_verbs_that_parse_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", lines((3, '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")))
    with pytest.raises(UserError, match=r"a.jsonl line 3 is not valid JSON \(maximum recursion depth"):
        tokenize(input=path, tokenizer="train:300", block_size=8, out=str(tmp_path / "out"))


def test_brackets_in_text_are_no_nesting(tmp_path):
    texts = [document(n) + "[" * 300 + '\\"{' * 300 + "\\\\" for n in range(40)]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    TextDataModule(path, vocab_size=300, block_size=8, cache_dir=str(tmp_path / "cache")).setup()


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    texts = pyarrow.array([document(n) for n in range(40)])
    column = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pyarrow, kind)())
    data = TextDataModule(
        parquet(tmp_path, {"text": column}), vocab_size=300, block_size=8, cache_dir=str(tmp_path / "cache")
    )
    data.setup()
    assert len(data.splits["train"])


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pyarrow.nulls(9), r"column text of .* is empty: give documents"),
        (pyarrow.array([None] * 9, pyarrow.string()), r"column text of .* is empty: give documents"),
        (pyarrow.array([], pyarrow.string()), r"a.parquet holds no rows: remove it"),
        ([["a"]] * 9, r"column text of .* holds more than strings: it has no column of text"),
        ([b"a"] * 9, r"column text of .* holds more than strings"),
    ],
)
def test_parquet_without_text(tmp_path, column, says):
    data = TextDataModule(parquet(tmp_path, {"text": column}), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says):
        data.setup()


def test_names_are_no_patterns(tmp_path):
    """`datasets` takes names for patterns: [1] would read the 1 beside it."""
    write(tmp_path, "set1.jsonl", json.dumps({"text": "wrong"}))
    for name in ("set[1].jsonl", "s*.jsonl", "set?.jsonl", "s**t.jsonl", "set{1,2}.jsonl"):
        path = write(tmp_path, name, json.dumps({"text": name}))
        data = TextDataModule(path, cache_dir=str(tmp_path / "cache"))
        splits = data._documents[path].splits  # of a single document, whose end validates
        assert "".join(splits[split]["text"][0] for split in ("train", "validation")) == name
    with pytest.raises(UserError, match=r"a::b.jsonl: cannot read a path with :: in it; rename it"):
        TextDataModule(write(tmp_path, "a::b.jsonl", lines()))


def test_a_link_to_nothing_is_told(tmp_path):
    write(tmp_path, "set/train-0.jsonl", lines())
    (tmp_path / "set/train-1.jsonl").symlink_to("moved.jsonl")
    with pytest.raises(UserError, match=r"set/train-1.jsonl is a broken link: repair or remove it"):
        TextDataModule(str(tmp_path / "set"))


def test_folders_that_link_to_themselves_are_read_once(tmp_path):
    write(tmp_path, "set/a.jsonl", lines())
    (tmp_path / "set/loop").symlink_to(".")
    data = TextDataModule(
        str(tmp_path / "set"), vocab_size=300, block_size=8, cache_dir=str(tmp_path / "cache")
    )
    assert len(data._documents[str(tmp_path / "set")].splits["train"]) == 40


def text_module(folder, cache):
    return TextDataModule(write(folder, "a.jsonl", lines()), vocab_size=300, block_size=8, cache_dir=cache)


def image_module(folder, cache):
    return ImageDataModule(images(folder, label=[0] * 10), cache_dir=cache)


@pytest.mark.parametrize("module", [text_module, image_module])
@pytest.mark.parametrize(
    ("cache", "why"),
    [
        ("{here}/file", "File exists"),
        ("{here}/file/below", "Not a directory"),
        ("/proc/none", "No such file or directory"),
        ("{here}/" + "a" * 300, "File name too long"),
        ("full", "File too large"),
    ],
)
def test_a_cache_that_cannot_be_written(tmp_path, module, cache, why):
    write(tmp_path, "file", "mine")
    cache = str(tmp_path / "cache") if cache == "full" else cache.format(here=tmp_path)
    data = module(tmp_path, cache)
    says = rf"the cache folder {re.escape(cache)} cannot be written \({why}\): make room there, or set data\."
    with (
        full_disk(0 if why == "File too large" else resource.RLIM_INFINITY),
        pytest.raises(UserError, match=says),
    ):
        data.prepare_data()


def test_a_cache_of_the_environment_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEQAT_CACHE", write(tmp_path, "file", "mine"))
    with pytest.raises(
        UserError, match=r"file cannot be written .*, or set \$STABLEQAT_CACHE to another folder"
    ):
        TextDataModule().prepare_data()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/none"))
    with pytest.raises(UserError, match=r"cache folder /proc/none \(below \$HF_HOME\) cannot be written"):
        text_module(tmp_path, None).prepare_data()


def test_the_broken_file_of_a_folder_is_named(tmp_path):
    write(tmp_path, "corpus/train-0.jsonl", lines())
    write(tmp_path, "corpus/train-1.jsonl", lines((12, "nonsense")))
    data = TextDataModule(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"train-1.jsonl line 12 is not valid JSON"):
        data.setup()


@pytest.mark.parametrize("other", ["train-1", "validation"])
def test_files_of_different_columns_are_told(tmp_path, other):
    write(tmp_path, "corpus/train-0.jsonl", lines())
    write(tmp_path, f"corpus/{other}.jsonl", '{"text": "a", "score": 1}\n')
    data = TextDataModule(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"the documents of .*corpus differ in their columns: give all the same"
    ):
        data.setup()


def test_columns_without_number_fill_no_screen(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps(dict.fromkeys(map(str, range(3000)), 1)) + "\n")
    with pytest.raises(UserError, match=r"\(it has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2988 more\)"):
        TextDataModule(path, cache_dir=str(tmp_path / "cache")).setup()


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone/nothing' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for module in (TextDataModule, ImageDataModule):
        with pytest.raises(UserError) as caught:
            module("someone/nothing").setup()
        assert str(caught.value) == (
            "someone/nothing is not found locally or on the Hub (Couldn't reach 'someone/nothing' on the "
            "Hub): check its name"
        )


def test_a_hub_data_set_without_a_train_split(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"test": None, "dev": None})
    with pytest.raises(UserError, match=r"someone/thing has no train split \(it has test, dev\)"):
        source.load_splits("someone/thing", None, formats=TEXT_FORMATS, cache_dir=None)
    options = {"formats": TEXT_FORMATS, "cache_dir": None, "training": False}
    assert source.load_splits("someone/thing", None, **options).keys() == {"test", "validation"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"extra": None})
    with pytest.raises(UserError, match=r"has no train, validation or test split \(it has extra\)"):
        source.load_splits("someone/thing", None, **options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "cannot be loaded from disk or the Hub"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "has no EOS token"),
    ],
)
def test_tokenizers(tmp_path, corpus, content, says):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    data = TextDataModule(str(corpus), tokenizer=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says) as caught:
        data.setup()
    assert str(path) in str(caught.value)


def split_by(pattern, folder, *, normalizer=False):
    """A tokenizer.json that splits, or replaces, by a regular expression."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    if normalizer:
        tokenizer.normalizer = normalizers.Replace(Regex(pattern), " ")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    return str(path)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y"])
@pytest.mark.parametrize("normalizer", [False, True])
def test_a_regular_expression_without_end_is_refused(tmp_path, pattern, normalizer, capfd):
    path = split_by(pattern, tmp_path, normalizer=normalizer)
    with pytest.raises(
        UserError, match=r"tokenizer.json has a regular expression that takes too long on long"
    ):
        load_tokenizer(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
)
def test_regular_expressions_of_well_known_tokenizers_are_taken(tmp_path, pattern):
    assert load_tokenizer(split_by(pattern, tmp_path)).eos_token_id == 1


def test_a_regular_expression_that_gives_up_on_a_document_is_told(tmp_path):
    """One that the trial at loading does not find, in every reader of documents."""

    pattern = r"^(\u6f22+)+$"  # of a letter that is not tried
    path = split_by(pattern, tmp_path)
    load_tokenizer(path)
    write(
        tmp_path,
        "set/a.jsonl",
        "".join(json.dumps({"text": "\u6f22" * 99 + f"!{n}"}) + "\n" for n in range(9)),
    )
    says = "the tokenizer cannot encode a document .*: choose another tokenizer"
    with pytest.raises(UserError, match=says):
        DocumentEncoder(Path(path).read_text(), 0)(["\u6f22" * 99 + "!"])
    with pytest.raises(UserError, match=says):
        TextDataModule(str(tmp_path / "set"), tokenizer=path, cache_dir=str(tmp_path / "cache")).setup()
    with pytest.raises(UserError, match=says):
        tokenize(
            input=str(tmp_path / "set"), tokenizer=path, block_size=8, out=str(tmp_path / "out"), num_proc=1
        )


def test_fewer_samples_than_a_step(corpus, tmp_path):
    data = TextDataModule(str(corpus), vocab_size=300, batch_size=4000, cache_dir=str(tmp_path / "cache"))
    data.setup()
    with pytest.raises(UserError, match=r"fewer than the 4000 of one step .*: lower batch_size"):
        data.train_dataloader()


def images(folder, **columns):
    return parquet(folder, {"image": [{"bytes": b"x", "path": None}] * 10} | columns)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({}, {}, r"has no column of labels \(it has image\): set label_column"),
        (
            {"label": [0] * 10},
            {"label_column": "fine"},
            r"has no column fine \(it has image, label\): set label_column",
        ),
        (
            {"label": [0] * 10},
            {"image_column": "label"},
            r"column label of .* holds no images: set image_column",
        ),
        ({"label": [0.5] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [-1] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [[0]] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [{"a": 0}] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [None] * 10}, {}, r"column label of .* holds no classes"),
        ({"label": [0, None] * 5}, {}, r"column label of .* holds no classes"),
        ({"label": ["a", None] * 5}, {}, r"column label of .* holds no classes"),
        ({"label": [0, 10**9] * 5}, {}, r"column label of .* has label 1000000000, too large for a class"),
        ({"label": [0, 2**62] * 5}, {}, r"column label of .* has label 4611686018427387904, too large"),
        (
            {"label": [0] * 10},
            {"validation_fraction": 0.01},
            r"validation_fraction 0.01 of 10 images holds out none",
        ),
        ({"label": [0] * 10}, {"auto_augment": "bogus"}, r"auto_augment bogus is not a timm policy"),
    ],
)
def test_image_columns(tmp_path, columns, options, says):
    data = ImageDataModule(images(tmp_path, **columns), cache_dir=str(tmp_path / "cache"), **options)
    with pytest.raises(UserError, match=says):
        data.setup()


def test_no_image_column(tmp_path):
    data = ImageDataModule(parquet(tmp_path, {"label": [0, 1]}), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"has no column of images \(it has label\): set image_column"):
        data.setup()


def test_a_label_beyond_the_training_classes_is_named(tmp_path):
    for split, labels in (("train", [0, 1, 1]), ("test", [0, 2, 1])):
        (tmp_path / "set").mkdir(exist_ok=True)
        table = pyarrow.table({"image": [{"bytes": b"x", "path": None}] * 3, "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{split}.parquet")
    data = ImageDataModule(str(tmp_path / "set"), validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"test row 1 of .* has label 2, which is not one of the 2 training classes"
    ):
        data.setup()

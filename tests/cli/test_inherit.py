"""The tokenizer of a model goes with it: from a folder, a run or a checkpoint, into any verb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from transformers import AutoModelForCausalLM

import tiny
import words
from stableqat.cli import inherit as inherited
from stableqat.cli.main import main
from stableqat.data import TextDataModule
from stableqat.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe
from stableqat.errors import UserError
from stableqat.modules import LlamaModule
from stableqat.runs import open_run
from starts import OTHER, model_folder, special


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inherited")
    words.write_text(folder / "text.jsonl")
    words.write_rows(folder / "other.jsonl", [{"text": text[::-1]} for text in words.DOCUMENTS])
    for model_type in ("llama", "qwen3"):
        model_folder(folder / model_type, model_type)
    return folder


def settings(version, *, source="text.jsonl", init_from=None, tokenizer=None, **model):
    logger = {"save_dir": "logs", "name": "", "version": version, "default_hp_metric": False}
    config = tiny.LLAMA | {"vocab_size": 320} if init_from is None else None
    text = {"source": source, "block_size": 16, "batch_size": 4, "vocab_size": 300, "tokenizer": tokenizer}
    return {
        "model": {
            "class_path": "stableqat.modules.LlamaModule",
            "init_args": {"config": config, "init_from": init_from, **model},
        },
        "data": {"class_path": "stableqat.data.TextDataModule", "init_args": {**text, "cache_dir": "cache"}},
        "baseline": {"stop_at_chance": False},  # starts are random
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        },
    }


def call(version, *flags, verb="fit", **options):
    Path(f"{version}.yaml").write_text(yaml.safe_dump(settings(version, **options)))
    return main([verb, "-c", f"{version}.yaml", *map(str, flags)])


def trained_with(version):
    return tokenizer_hash(load_tokenizer(f"logs/{version}/tokenizer"))


@pytest.fixture(scope="module")
def run(place):
    """A run on the text of words, with a BPE of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
        assert call("run") == 0
    return "logs/run"


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_model_folder_brings_its_tokenizer(model_type, at, capsys):
    capsys.readouterr()
    assert call(f"from-{model_type}", init_from=model_type) == 0
    lines = capsys.readouterr().err.splitlines()
    assert f"stableqat: data.tokenizer: {model_type}, which model.init_from brings" in lines
    assert trained_with(f"from-{model_type}") == tokenizer_hash(load_tokenizer(model_type))
    kept = yaml.safe_load(Path(f"logs/from-{model_type}/config.yaml").read_text())
    assert kept["data"]["init_args"]["tokenizer"] == model_type


LEFTOVERS = {
    "llama": {
        "unsloth_version": "2025.1",
        "nested": {"a": [1]},
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
    },
    "qwen3": {"auto_map": {"AutoConfig": "theirs.Config"}, "max_window_layers": 0, "rope_scaling": None},
}


@pytest.mark.parametrize("model_type", LEFTOVERS)
def test_a_run_of_a_folder_with_keys_of_others_is_resumed_evaluated_and_exported(model_type, at, tmp_path):
    folder = shutil.copytree(model_type, tmp_path / "start")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config | LEFTOVERS[model_type]))
    version = f"leftovers-{model_type}"
    quantizer = {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}}
    assert call(version, init_from=str(folder), quantizer=quantizer) == 0
    shutil.rmtree(folder)
    on = ["--ckpt_path", "last", "--trainer.max_steps", 2]
    assert call(version, *on, init_from=str(folder), quantizer=quantizer) == 0
    assert main(["evaluate", f"logs/{version}", "--out", str(tmp_path / "found.json")]) == 0
    assert main(["export", f"logs/{version}", "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    module = LlamaModule.load_from_checkpoint(f"logs/{version}/checkpoints/last.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = module.eval()(ids), exported(ids).logits
    assert module.config.rope_parameters["rope_theta"] == LEFTOVERS[model_type].get("rope_theta", 10_000)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("part", ["", "/checkpoints/last.ckpt"])
def test_a_run_brings_its_tokenizer_to_other_data(part, run, at, capsys):
    version = f"on{len(part)}"
    assert call(version, source="other.jsonl", init_from=run + part) == 0
    assert trained_with(version) == trained_with("run")
    assert f"data.tokenizer: {at}/{run}/tokenizer, which model.init_from brings" in capsys.readouterr().err
    assert call("fresh", source="other.jsonl") == 0  # what would have been taken
    assert trained_with("fresh") != trained_with("run")
    shutil.rmtree("logs/fresh")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_brings_its_tokenizer_to_every_verb(verb, run, at):
    last = f"{run}/checkpoints/last.ckpt"
    assert call(verb, "--ckpt_path", last, verb=verb, source="other.jsonl") == 0
    assert trained_with(verb) == trained_with("run")


def test_a_changed_text_does_not_change_the_tokenizer_of_a_run(run, at):
    copy = Path(shutil.copytree(run, "logs/grown"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("text.jsonl", "other.jsonl"))
    datamodule = open_run(str(copy / "checkpoints" / "last.ckpt")).data()
    assert tokenizer_hash(datamodule.tokenizer) == trained_with("run")
    assert call("again", source="other.jsonl", init_from="logs/grown") == 0
    assert trained_with("again") == trained_with("run")


def inherit(arguments, init_from=None, **more):
    data = Namespace(class_path="stableqat.data.TextDataModule", init_args=arguments)
    teacher = more.pop("teacher", None)
    model = Namespace(init_args=Namespace(init_from=init_from, teacher=teacher))
    return inherited.inherit(Namespace(model=model, data=data, **more))


def test_another_tokenizer_takes_a_word(at):
    base = load_tokenizer("llama")
    same = special(words.DOCUMENTS, 299, "<eos>")
    assert same.get_vocab()["<eos>"] != base.get_vocab()["<eos>"]
    special(OTHER, 300, "<eos>").save_pretrained("again")
    assert inherit(Namespace(tokenizer="again", source=None), "llama") == []  # equal, only elsewhere
    same.save_pretrained("moved")
    with pytest.raises(
        UserError, match=r"^data\.tokenizer: moved does not fit model\.init_from llama: <eos>"
    ):
        inherit(Namespace(tokenizer="moved", source=None), "llama")
    train_bpe(OTHER, 280).save_pretrained("smaller")  # the same EOS at the same place, and other merges
    train_bpe(words.DOCUMENTS, 280).save_pretrained("words")
    shutil.copytree("llama", "plain")
    shutil.copytree("smaller", "plain", dirs_exist_ok=True)
    (line,) = inherit(Namespace(tokenizer="words", source=None), "plain")
    assert line == (
        "data.tokenizer: words is not the one that model.init_from plain was trained with, used as asked"
    )


def test_a_tokenized_set_must_have_the_tokenizer_of_the_start(at, capsys):
    tokenize = ["data", "tokenize", "--input", "text.jsonl", "--block_size", "16"]
    train_bpe(OTHER, 280).save_pretrained("bpe")
    for name, tokenizer in (("set-own", "llama"), ("set-bpe", "bpe")):
        assert main([*tokenize, "--tokenizer", tokenizer, "--out", name]) == 0
    assert inherit(Namespace(tokenizer=None, source="set-own"), "llama") == []
    capsys.readouterr()
    for source in ("set-bpe", "{set-bpe: 1, set-bpe/: 1}"):
        assert call("set", source=yaml.safe_load(source), init_from="llama") == 2
        line = capsys.readouterr().err.strip()
        assert "data.tokenizer: set-bpe/tokenizer of the data or the start is not the one that" in line
        assert "or add --data.tokenizer set-bpe/tokenizer" in line
    assert not Path("logs/set").exists()


def test_a_teacher_has_the_tokenizer_of_the_student(at):
    arguments = Namespace(tokenizer=None, source=None)
    assert inherit(arguments, teacher=Namespace(source="qwen3")) == [
        "data.tokenizer: qwen3, which model.teacher.source brings"
    ]
    shutil.copytree("qwen3", "teacher")
    train_bpe(words.DOCUMENTS, 280).save_pretrained("teacher")
    with pytest.raises(
        UserError, match=r"llama of the data or the start is not the one that model\.teacher\.source teacher"
    ):
        inherit(Namespace(tokenizer=None, source=None), "llama", teacher={"source": "teacher"})


def test_a_start_without_a_tokenizer_needs_one_named(at, capsys):
    shutil.copytree("llama", "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert call("bare", init_from="bare") == 2
    assert "data.tokenizer: missing; bare was trained with a tokenizer" in capsys.readouterr().err
    assert not Path("logs/bare").exists()
    assert call("bare", init_from="bare", tokenizer="llama") == 0
    # from Python, nobody links the two
    module = LlamaModule(init_from="llama")
    with pytest.raises(UserError, match=r"data\.tokenizer: missing; llama"):
        module.check_data(TextDataModule("text.jsonl", block_size=16))
    module.check_data(TextDataModule("text.jsonl", block_size=16, tokenizer="llama"))


def test_a_checkpoint_outside_a_run_says_that_its_tokenizer_is_unknown(run, at):
    shutil.copy(f"{run}/checkpoints/last.ckpt", "lone.ckpt")
    (line,) = inherit(Namespace(tokenizer=None, source=None), "lone.ckpt")
    assert line.startswith("model.init_from: lone.ckpt has no tokenizer")


def test_a_tokenizer_of_more_entries_than_the_model_is_refused_everywhere(run, at, capsys):
    """Also one of few entries with a gap in their ids."""
    special(words.DOCUMENTS, 300, "<eos>").save_pretrained("gap")
    text = json.loads(Path("gap/tokenizer.json").read_text())
    last = max(vocabulary := text["model"]["vocab"], key=vocabulary.get)
    vocabulary[last] = 999
    Path("gap/tokenizer.json").write_text(json.dumps(text))
    train_bpe(words.DOCUMENTS + OTHER, 400).save_pretrained("large")
    capsys.readouterr()
    for name, rows in (("gap", 1000), ("large", len(load_tokenizer("large")))):
        assert rows > 320
        commands = (
            ["evaluate", run, "--data", "text.jsonl", "--tokenizer", name, "--device", "cpu"],
            ["export", run, "--format", "hf", "--tokenizer", name, "--out", "out"],
            ["evaluate", "llama", "--data", "text.jsonl", "--tokenizer", name, "--device", "cpu"],
            ["validate", "-c", "run.yaml", "--data.tokenizer", name, "--trainer.logger.version", "no"],
        )
        for command in commands:
            assert main(command) == 2, command
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"{rows} entries" in line, line
            assert "320" in line, line
    assert not Path("out").exists()

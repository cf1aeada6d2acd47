"""Models, folders and chats that the verbs cannot take: one line, exit code 2, and nothing is left behind."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import stableqat
import words
from chats import byte_tokenizer, chat, write_chats, write_jsonl
from stableqat.cli.main import main
from starts import model_folder, timm_folder

TURNS = {"messages": chat(1)}
TOKENIZE = ["data", "tokenize", "--input", "chats", "--tokenizer", "chatty", "--block_size", "16", "--out"]
LLAMA = ["fit", "-c", "llama/finetune", "--data.source", "words.jsonl"]
VIT = ["fit", "-c", "vit/finetune", "--data.source", "pictures"]
HF = ["--format", "hf", "--out", "made"]
DISTILL = [*LLAMA, "-c", "llama/distill", "--model.init_from", "llama"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models as they lie on disks, a text, pictures, and chats with one mistake each."""
    from PIL import Image

    at = tmp_path_factory.mktemp("sources")
    model_folder(at / "llama")
    model_folder(at / "larger", entries=400)
    timm_folder(at / "vit")
    words.write_text(at / "words.jsonl")
    byte_tokenizer().save_pretrained(at / "chatty")
    byte_tokenizer(template=None).save_pretrained(at / "mute")
    for name in ("cat", "dog"):
        (at / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16)).save(at / "pictures" / name / f"{number}.png")
    write_chats(at / "chats" / "a.jsonl")
    for name, record in {
        "roleless": {"messages": [{"content": "hello"}]},
        "stranger": {"messages": [{"role": "robot", "content": "hello"}]},
        "silent": {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " "}]},
    }.items():
        write_jsonl(at / name / "a.jsonl", [TURNS, record])
    write_jsonl(at / "both" / "a.jsonl", [{**TURNS, "text": "hello"}])
    model = AutoModelForCausalLM.from_pretrained(at / "llama", dtype=torch.float32)
    stableqat.prepare(model, bits=2)
    model.save_pretrained(at / "prepared")
    stableqat.convert(model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.add_(torch.linspace(0, 0.1, weight.shape[1]))
    model.save_pretrained(at / "merged")
    (at / "bare").mkdir()
    (at / "bare" / "config.json").write_text((at / "prepared" / "config.json").read_text())
    (at / "empty").mkdir()
    return at


CASES = {
    # data tokenize, of chats
    "a tokenizer without a template": (
        [*TOKENIZE, "made", "--tokenizer", "mute"],
        "the tokenizer has no chat template, which chat messages need: choose the tokenizer of a model",
    ),
    "a tokenizer trained on chats": (
        [*TOKENIZE, "made", "--tokenizer", "train:300"],
        "tokenizer: chat messages train no tokenizer: name that of a model",
    ),
    "a message without a role": (
        [*TOKENIZE, "made", "--input", "roleless"],
        "a.jsonl row 2: message 1 has no role: give it one of system, user",
    ),
    "a message of an unknown role": (
        [*TOKENIZE, "made", "--input", "stranger"],
        "a.jsonl row 2: message 1 has the unknown role 'robot': use one of system, user",
    ),
    "an empty answer": (
        [*TOKENIZE, "made", "--input", "silent"],
        "a.jsonl row 2: message 2, the assistant's, is empty: fill it or remove the conversation",
    ),
    "text and chats in one": (
        [*TOKENIZE, "made", "--input", "both"],
        "a.jsonl holds text and chat messages: keep one of them, or set format to text or messages",
    ),
    "chats as prompts": (
        [*TOKENIZE, "made", "--format", "prompt"],
        "a.jsonl has no column prompt (it has messages, id), which prompts and completions need",
    ),
    # export and predict, of folders
    "a folder that nobody prepared": (
        ["export", "llama", *HF],
        "llama: a model folder that names no quantized layers; export the run or checkpoint that it came",
    ),
    "a folder that was merged": (
        ["export", "merged", *HF],
        "layer model.layers.0.mlp.up_proj: its weights lie on no 2-bit integer grid: they were changed",
    ),
    "a folder without weights": (["export", "bare", *HF], "bare cannot be loaded: Error no file named"),
    "an empty folder": (["export", "empty", *HF], "empty: neither a run folder nor a checkpoint (.ckpt)"),
    "a folder without a tokenizer": (
        ["predict", "prepared", "--prompt", "a", "--out", "made.jsonl"],
        "tokenizer: prepared holds none; name a tokenizer's folder or file",
    ),
    "predictions of an empty folder": (
        ["predict", "empty", "--prompt", "a", "--out", "made.jsonl"],
        "empty: not a run, a checkpoint or a folder with config.json",
    ),
    # runs
    "runs of a file": (["runs", "words.jsonl"], "folders: words.jsonl is not a folder; name one that holds"),
    "an unknown order of runs": (["runs", "empty", "--sort", "speed"], "sort: must be age, name, method,"),
    # finetune
    "no start": (LLAMA, "model.config: missing; give an architecture, or set model.init_from to take its"),
    "no start of images": (
        VIT,
        "model.model_name: missing; name a timm model, such as vit_small_patch16_224, or set model.init_from",
    ),
    "a start of images for text": (
        [*LLAMA, "--model.init_from", "vit"],
        "init_from: vit: model_type: 'timm_wrapper' is not supported; choose llama or qwen3",
    ),
    "a start of text for images": (
        [*VIT, "--model.init_from", "llama"],
        "model.model_name: llama does not say which timm model it is; name it",
    ),
    "rows longer than the model": (
        [*LLAMA, "--model.init_from", "llama", "--data.block_size", "64"],
        "data.block_size: 64 tokens exceed the model's max_position_embeddings, 16; shorten the rows",
    ),
    # distill
    "nothing to distil": ([*LLAMA, "-c", "llama/distill"], "model.config: missing; give an architecture, or"),
    "a teacher of another vocabulary": (
        [*DISTILL, "--model.teacher.source", "larger"],
        "teacher.source: vocab_size is 400, and 320 in the student; take a teacher of the same family",
    ),
    "a teacher that is not there": (
        [*DISTILL, "--model.teacher.source", "./none"],
        "model.teacher.source: ./none does not exist; name a run, a checkpoint, a model folder or a name",
    ),
    "a weight above one": ([*DISTILL, "--model.teacher.weight", "2"], "teacher.weight: must be from 0 to 1"),
    "no temperature": (
        [*DISTILL, "--model.teacher.temperature", "0"],
        "teacher.temperature: must be more than 0, not 0.0",
    ),
}
ON_THE_WAY = re.compile(r"|Loading weights: .*|stableqat: (data|model|trainer)\.\w+(\.lr)?: .*")


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_line_and_nothing_is_left(case, place, tmp_path, monkeypatch, capsys):
    arguments, expected = CASES[case]
    for each in place.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / "datasets")
    monkeypatch.setenv("STABLEQAT_CACHE", str(tmp_path.parent / "cache"))
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    *told, line = err.splitlines()
    assert line.startswith("stableqat: ")
    assert expected in line
    assert len(line) < 400
    assert all(ON_THE_WAY.fullmatch(each) for each in told)  # what a start brings
    assert not out
    assert sorted(tmp_path.rglob("*")) == before

"""Text and losses: the same from every place that holds the weights, and what a plain loop computes."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import stableqat
from stableqat.cli.main import main
from stableqat.evaluate.model import find
from stableqat.predict import command, text
from stableqat.runs import open_run

PROMPTS = ["grid scale", "the step of a row", "bits"]


@pytest.fixture
def predict(capsys):
    """Call the verb, return the lines that it prints."""

    def call(source, *arguments):
        assert main(["predict", str(source), "--device", "cpu", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def plain(run):
    """The run's model without quantizers, and its tokenizer."""
    opened = open_run(str(run))
    module = opened.load()
    return stableqat.convert(module.model), opened.load_tokenizer(module, None)


def test_every_form_of_a_model_writes_the_same_text(run, predict, tmp_path, capsys):
    model, tokenizer = plain(run)
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    options = ["--format", "hf", "--scale_dtype", "fp32", "--out", str(tmp_path / "hf")]
    assert main(["export", str(run), *options]) == 0
    capsys.readouterr()
    options = ["--prompt", *PROMPTS, "--max_new_tokens", 8]
    lines = predict(run, *options)
    for source in (run / "checkpoints" / "last.ckpt", tmp_path / "converted", tmp_path / "hf"):
        assert predict(source, *options) == lines
    assert [line["prompt"] for line in lines] == PROMPTS
    assert len({line["completion"] for line in lines}) == 3
    for line in lines:  # neither padding nor the cache changes what the likeliest token is
        ids = tokenizer(line["prompt"])["input_ids"]
        start = len(ids)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert line["completion"] == tokenizer.decode(ids[start:])
        assert line["finish"] == "length"


def test_weights_are_quantized_once_for_all_tokens(run, predict, computed):
    predict(run, "--prompt", "grid", "--max_new_tokens", 2)
    once = len(computed)
    predict(run, "--prompt", *PROMPTS, "--max_new_tokens", 9, "--batch_size", 1)
    assert len(computed) == 2 * once


def test_an_end_of_text_ends_a_completion(run):
    model = find(str(run)).loaders[0]()
    options = {"temperature": 0.0, "top_p": 1.0, "batch_size": 2, "device": torch.device("cpu")}
    options["max_new_tokens"] = 8
    prompts = [{"prompt": each} for each in PROMPTS[:2]]
    whole = list(text.generate(model, prompts, **options))
    ids = model.tokenizer(whole[0]["completion"])["input_ids"]
    tokenizer = model.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[3])
    ended = list(text.generate(replace(model, tokenizer=tokenizer), prompts, **options))
    assert ended[0]["finish"] == "stop"
    assert ended[0]["completion"] == tokenizer.decode(ids[: ids.index(ids[3])])


def test_what_ends_a_text(run):
    """EOS and special tokens that the model names, not transformers' default end, an ordinary token here."""
    model = find(str(run)).loaders[0]()
    tokenizer = model.tokenizer
    assert model.network.config.eos_token_id == 2
    assert text._ends(model.network, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    added = tokenizer.convert_tokens_to_ids("<end>")
    model.network.generation_config.eos_token_id = [2, added]
    assert text._ends(model.network, tokenizer) == sorted([tokenizer.eos_token_id, added])


def test_draws_follow_the_seed(run, predict):
    options = ["--prompt", *PROMPTS, "--max_new_tokens", 8, "--temperature", "1.5"]
    first, again, other = (predict(run, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    greedy = predict(run, *options[:-2])
    assert predict(run, *options, "--top_p", "1e-6") == greedy
    assert first != greedy


def test_a_folder_s_own_generation_settings_do_not_apply(run, predict, tmp_path):
    model, tokenizer = plain(run)
    tokenizer.save_pretrained(tmp_path)
    model.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0)
    model.save_pretrained(tmp_path)
    options = ["--prompt", *PROMPTS, "--max_new_tokens", 8]
    assert predict(tmp_path, *options) == predict(run, *options)


def test_prompts_of_files(run, predict, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(command, "progress", lambda total: nullcontext(lambda *told: shown.append(told)))
    (tmp_path / "a.txt").write_text("grid scale\n\n the step\u2028of a row\r\n", encoding="utf-8")
    lines = predict(run, "--prompts", tmp_path / "a.txt", "--max_new_tokens", 3, "--prompt", "bits")
    assert [line["prompt"] for line in lines] == ["grid scale", " the step\u2028of a row", "bits"]
    messages = [{"role": "system", "content": "step"}, {"role": "user", "content": "grid"}]
    records = [
        {"messages": messages, "id": 3},
        {"prompt": "<system>step<user>grid<assistant>"},
        {"text": "a"},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    out = tmp_path / "new" / "out.jsonl"
    assert predict(run, "--prompts", tmp_path / "b.jsonl", "--max_new_tokens", 8, "--out", out) == []
    assert shown == [(1, "1 of 3"), (2, "2 of 3"), (3, "3 of 3")]  # not of the lines on stdout
    chat, same, other = map(json.loads, out.read_text().splitlines())
    assert chat["completion"] == same["completion"] != other["completion"]
    assert chat["messages"] == messages
    assert chat.keys() == {"messages", "completion", "finish"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_of_tokens(batch_size, run, predict):
    lines = predict(run, "--losses", "true", "--prompt", *PROMPTS[:2], "g", "--batch_size", batch_size)
    model, tokenizer = plain(run)
    for line in lines[:2]:
        ids = torch.tensor(tokenizer(line["prompt"])["input_ids"])
        assert "".join(line["tokens"]) == line["prompt"]
        assert line["ids"] == ids.tolist()
        expected = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        assert line["losses"][0] is None
        assert line["losses"][1:] == pytest.approx(expected.tolist(), rel=1e-5)
        assert line["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert lines[2] == {
        "prompt": "g",
        "tokens": ["g"],
        "ids": lines[2]["ids"],
        "losses": [None],
        "loss": None,
    }


def test_messages_are_scored_with_the_answer(run, predict, tmp_path):
    messages = [{"role": "user", "content": "grid"}, {"role": "assistant", "content": "scale"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    (line,) = predict(run, "--losses", "true", "--prompts", tmp_path / "a.jsonl")
    assert "".join(line["tokens"]) == "<user>grid<assistant>scale"


LINES = {
    "x.md": ("", "must end in .txt"),
    "none.txt": (None, "cannot be read (No such file"),
    "empty.txt": ("\n \n", "holds no prompt"),
    "latin.txt": (b"caf\xe9", "it is not UTF-8"),
    "cut.jsonl": ('{"prompt": "a"}\n{"pro', "line 2: is not JSON"),
    "list.jsonl": ("[1]", "line 1: needs one of messages, prompt, text"),
    "key.jsonl": ('{"question": "a"}', "line 1: needs one of messages, prompt, text"),
    "null.jsonl": ('{"prompt": ""}', "line 1: prompt must be text, and not empty"),
    "roles.jsonl": ('{"messages": [{"role": "user"}]}', "messages must list mappings of role and content"),
    "own.jsonl": ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with the assistant's own"),
    "long.txt": ("grid scale " * 40, "and max_new_tokens 64, and the model takes 64; shorten it or lower"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_file_of_prompts_is_one_line(name, run, tmp_path, capsys):
    content, said = LINES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert (
        main(["predict", str(run), "--prompts", str(tmp_path / name), "--out", str(tmp_path / "o.jsonl")])
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stableqat: prompts: ")
    assert said in line
    assert not (tmp_path / "o.jsonl").exists()


MISTAKES = [
    ([], "prompts: missing; give --prompts or --prompt to a language model, --images to a ViT"),
    (["--prompt", ""], "prompt: is empty"),
    (["--prompt", "a", "--images", "."], "cannot be mixed with images"),
    (["--prompt", "a", "--top_p", "0.5"], "top_p: decides how tokens are drawn, and none is"),
    (
        ["--prompt", "a", "--losses", "true", "--temperature", "1"],
        "temperature: decides how tokens are drawn",
    ),
    (["--prompt", "a", "--losses", "true", "--max_new_tokens", "3"], "max_new_tokens: limits completions"),
    (
        ["--prompt", "a", "--seed", "1"],
        "seed: decides how tokens are drawn, and none is; leave it out or set",
    ),
    (["--prompt", "a", "--seed", "-1"], "seed: must be at least 0"),
    (["--prompt", "a", "--temperature", "1", "--top_p", "0"], "top_p: must be above 0 and at most 1, not 0"),
    (["--prompt", "a", "--top_k", "2"], "top_k: counts the classes of images, and there are none"),
    (["--images", "digit.png", "--losses", "true"], "losses: score prompts, and there are none"),
    (["--prompt", "a", "--temperature", "-1"], "temperature: must be at least 0"),
    (["--prompt", "a", "--batch_size", "0"], "batch_size: must be at least 1"),
    (["--prompt", "a", "--out", "x.csv"], "out: x.csv must end in .jsonl"),
    (["--prompt", "a", "--out", "there.jsonl"], "there.jsonl exists already; name a new file"),
    (["-c", "x.yaml"], "predict takes a model, not a configuration: stableqat predict RUN --prompts FILE"),
    (["--model.init_from=x"], "predict takes a model, not a configuration"),
    (["--images", "digit.png"], "takes text, with --prompts or --prompt"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=str)
def test_a_mistake_is_one_line(arguments, said, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("there.jsonl", "digit.png"):
        (tmp_path / name).touch()
    assert main(["predict", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert (tmp_path / "there.jsonl").read_text() == ""


def test_a_list_s_flag_given_again_adds_to_it(run, predict):
    together = predict(run, "--prompt", *PROMPTS, "--losses", "true")
    apart = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert len(together) == len(PROMPTS)
    assert predict(run, *apart, "--losses", "true") == together


def test_messages_need_a_chat_template(run, tmp_path, capsys):
    model, tokenizer = plain(run)
    tokenizer.chat_template = None
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert main(["predict", str(tmp_path / "model"), "--prompts", str(tmp_path / "a.jsonl")]) == 2
    assert "the tokenizer has no chat template; give prompts" in capsys.readouterr().err

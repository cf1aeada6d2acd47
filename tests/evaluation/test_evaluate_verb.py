"""The verb: runs, checkpoints and folders side by side, in a table, a file and TensorBoard."""

import json
import shutil

import pytest
import torch

from stableqat.analysis.events import find_runs, read_run
from stableqat.cli import main


def call(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu"])


def results(folder, *arguments, name="results.json"):
    assert call(*arguments, "--out", folder / name) == 0
    return json.loads((folder / name).read_text())


@pytest.fixture
def refused(capsys):
    """Call the verb, expect exit code 2, return the line."""

    def refuse(*arguments):
        assert call(*arguments) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("stableqat: ")
        assert "\n" not in line
        return line

    return refuse


def test_a_run_beside_what_it_started_from(run, start, rounded, tmp_path, capsys):
    logged_before = read_run(run).last("val/loss")
    before = {p: p.read_bytes() for p in run.glob("events*")}
    told = results(tmp_path, run, "--baselines", "true")
    trained, full, ptq = told["sources"]
    # what training and `validate` have logged is the same definition
    for record, folder in ((trained, run), (full, start), (ptq, rounded)):
        validation = record["perplexity"]["validation"]
        logged = read_run(folder).last("val/loss")
        assert validation["loss"] == pytest.approx(logged, rel=1e-6)
        assert validation["tokens"] % 15 == 0
    losses = [record["perplexity"]["validation"]["loss"] for record in told["sources"]]
    assert len(set(losses)) == 3
    assert (trained["about"], trained["step"]) == ("StableQAT, 2 bits, integer", 4)
    assert (full["about"], full["step"], full["run"]) == ("its start, full precision", 0, None)
    assert told["settings"]["data"] == [str(run)]
    assert torch.__version__.startswith(told["versions"]["torch"])
    table = capsys.readouterr().out
    assert f"{losses[0]:.4f}" in table
    assert f"{losses[2]:.4f}" in table
    assert "documents each ended by EOS" in table
    # an event file of its own beside the others, for the run and not for what it started from
    assert {p: p.read_bytes() for p in before} == before
    (new,) = set(run.glob("events*")) - set(before)
    assert new.name.endswith(".evaluate")
    assert read_run(run, ("eval/",)).scalars["eval/loss/validation"] == {4: pytest.approx(losses[0])}
    assert read_run(run).last("val/loss") == pytest.approx(logged_before)
    assert find_runs(run) == [run]
    assert not [p for p in start.glob("events*") if p.name.endswith(".evaluate")]
    new.unlink()


def test_live_and_exported_are_the_same_model(run, exported, tasks, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    copy = shutil.copytree(run, tmp_path / "run")
    checkpoint = copy / "checkpoints" / "last.ckpt"
    options = ["--tasks", "words", "--tasks_path", tasks, "--limit", 10]
    told = results(tmp_path, copy, checkpoint, exported, *options)
    live, last, folder = told["sources"]
    assert folder["tasks"] == live["tasks"] == last["tasks"]
    assert folder["perplexity"] == live["perplexity"] == last["perplexity"]
    words = live["tasks"]["words"]
    assert words["documents"] == 10
    assert words["version"] == 3
    assert set(words["metrics"]) == {"acc", "acc_norm"}
    assert words["metrics"]["acc"]["stderr"] > 0
    assert told["settings"]["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert told["versions"]["lm_eval"]
    acc = words["metrics"]["acc"]
    assert f"{acc['value']:.4f} +- {acc['stderr']:.4f}" in capsys.readouterr().out
    assert read_run(copy, ("eval/",)).last("eval/words/acc") == pytest.approx(acc["value"])


def test_texts_of_any_kind(run, place, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    data = ["--data", place / "further.txt", copy, "--block_size", 32, "--stride", 8, "--split", "train"]
    told = results(tmp_path, copy, *data[:2], "--block_size", 32, "--stride", 8)
    strided = told["sources"][0]["perplexity"]["further.txt"]
    assert strided["split"] == "all"
    assert "windows of 32 tokens at every 8th" in strided["how"]
    told = results(tmp_path, copy, *data[:3], "--split", "train", name="two.json")
    two = told["sources"][0]["perplexity"]
    assert two.keys() == {"further.txt", "train"}
    assert two["further.txt"]["loss"] > strided["loss"] - 1
    assert two["train"]["tokens"] > two["further.txt"]["tokens"] > 0


def test_half_precision_products(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    single = results(tmp_path, copy)["sources"][0]["perplexity"]["validation"]["loss"]
    half = results(tmp_path, copy, "--dtype", "bf16", name="bf16.json")
    assert half["sources"][0]["perplexity"]["validation"]["loss"] == pytest.approx(single, abs=0.05)
    assert half["sources"][0]["perplexity"]["validation"]["loss"] != single
    assert half["settings"]["dtype"] == "bf16"


def test_mistakes_are_one_line(run, exported, place, tmp_path, refused, capsys):
    assert "nothing to evaluate on; name data with --data" in refused(exported)
    assert "must end in .json" in refused(run, "--out", tmp_path / "results.txt")
    (tmp_path / "there.json").touch()
    assert "exists already" in refused(run, "--out", tmp_path / "there.json")
    assert "128 tokens are more than" in refused(run, "--block_size", 128)
    assert "batch_size: must be at least 1" in refused(run, "--batch_size", 0)
    assert "stride: must be from 1 to block_size - 1 (15)" in refused(run, "--stride", 16)
    assert "has no test (it has train, validation)" in refused(run, "--split", "test")
    assert "tasks: name the tasks" in refused(run, "--limit", 3)
    assert "no such data file or folder" in refused(run, "--data", place / "nothing.txt")
    (tmp_path / "empty").mkdir()
    assert "neither a run, a checkpoint nor a folder with config.json" in refused(tmp_path / "empty")
    assert main(["evaluate", str(run), "--device", "cuda:99"]) == 2
    assert main(["evaluate", str(run), "--device", "abacus"]) == 2
    there, known = capsys.readouterr().err.strip().splitlines()
    assert "device: there is no cuda:99, PyTorch sees" in there
    assert "device: abacus is none that PyTorch knows" in known
    assert "there is no checkpoint" in refused(tmp_path / "nothing.ckpt")
    assert refused(tmp_path / "nothing" / "there").endswith("hub name you have access to")


def test_another_tokenizer(run, exported, place, refused):
    from stableqat.data.tokenizer import train_bpe

    train_bpe(["other text"], 280).save_pretrained(place / "other")
    line = refused(exported, "--data", run, "--tokenizer", place / "other")
    assert "has another tokenizer than the model" in line


def test_a_run_whose_data_is_gone(run, place, tmp_path, refused, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "text.jsonl"), str(tmp_path / "gone.jsonl")))
    assert "has no tokenizer (the run's data is not to be had (no such data file" in refused(copy)
    tokenizer = next((place / "cache" / "tokenizers").iterdir())
    assert "name data with --data" in refused(copy, "--tokenizer", tokenizer)
    assert call(copy, "--tokenizer", tokenizer, "--data", place / "further.txt", "--block_size", 16) == 0
    assert "perplexity/further.txt" in capsys.readouterr().out

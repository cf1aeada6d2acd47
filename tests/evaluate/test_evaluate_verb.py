"""The verb: runs, checkpoints and folders side by side, in a table, a file and TensorBoard."""

import errno
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import pytest
import torch
import yaml

import words
from stableqat.cli.main import main
from stableqat.data.tokenizer import train_bpe
from stableqat.evaluate import report
from stableqat.evaluate.model import labels
from stableqat.events import find_runs, read_run


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


def test_baselines_of_a_run_with_quantized_activations(with_inputs, run, tmp_path):
    """They have full-precision activations, and are those of a run that quantizes weights alone."""
    copy = shutil.copytree(run, tmp_path / "run")
    told = results(tmp_path, with_inputs, copy, "--baselines", "true")["sources"]
    assert [each["about"] for each in told[:3]] == [
        "StableQAT, 2 bits, integer, W2A8",
        "its start, full precision",
        "its start, rounded to nearest, StableQAT, 2 bits, integer, activations in full precision",
    ]
    losses = [each["perplexity"]["validation"]["loss"] for each in told]
    assert losses[1:3] == losses[4:]
    assert losses[0] not in losses[1:]


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


def test_splits_that_are_there(run, tmp_path, refused, capsys):
    """A folder needs no training files to be evaluated on."""
    folder = tmp_path / "texts"
    folder.mkdir()
    copy = shutil.copytree(run, tmp_path / "run")
    for split in ("test", "validation"):
        words.write_text(folder / f"{split}-00000-of-00001.jsonl")
        options = ["--data", folder, "--block_size", 16]
        for more, told in (([], "test"), (["--split", split], split)):
            assert call(copy, *options, *more) == 0
            assert f"texts: {told}, documents each ended by EOS" in capsys.readouterr().out
    assert "has no train (it has " in refused(copy, *options, "--split", "train")


def test_sources_of_the_same_name(run, tmp_path, capsys):
    runs = [shutil.copytree(run, tmp_path / folder / "run") for folder in ("a", "b")]
    texts = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    texts[0].write_text("grid scale " * 20)
    texts[1].write_text("step rate " * 20)
    told = results(tmp_path, *runs, "--data", *texts, *runs, run)
    for record in told["sources"]:
        data = {name: each["data"] for name, each in record["perplexity"].items()}
        assert data == {
            "a/text.txt": str(texts[0]),
            "b/text.txt": str(texts[1]),
            str(runs[0]): str(runs[0]),
            str(runs[1]): str(runs[1]),
            str(run): str(run),
        }
        assert record["perplexity"]["a/text.txt"]["loss"] != record["perplexity"]["b/text.txt"]["loss"]
    assert {"a/run", "b/run"} <= set(capsys.readouterr().out.split())


def test_labels(run):
    assert labels(["wiki/test.jsonl", "c4/test.jsonl", "c4/train.jsonl"]) == {
        "wiki/test.jsonl": "wiki/test.jsonl",
        "c4/test.jsonl": "c4/test.jsonl",
        "c4/train.jsonl": "train.jsonl",
    }
    assert labels(["my_text/"]) == {"my_text/": "my_text"}
    assert list(labels(["a/x/t", "b/x/t", "a/y/t", "a/t/", ".", "x/t"]).values()) == [
        "a/x/t",
        "b/x/t",
        "y/t",
        "a/t",
        ".",
        "x/t",
    ]
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    assert labels([str(run), "text"], of_run="train") == {str(run): "train", "text": "text"}
    assert labels([str(run), checkpoint, "train"], of_run="train") == {
        str(run): "run/train",
        checkpoint: "best.ckpt/train",
        "train": "train",
    }


def test_half_precision_products(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    single = results(tmp_path, copy)["sources"][0]["perplexity"]["validation"]["loss"]
    half = results(tmp_path, copy, "--dtype", "bf16", name="bf16.json")
    assert half["sources"][0]["perplexity"]["validation"]["loss"] == pytest.approx(single, abs=0.05)
    assert half["sources"][0]["perplexity"]["validation"]["loss"] != single
    assert half["settings"]["dtype"] == "bf16"


def test_mistakes_are_one_line(run, exported, place, tmp_path, refused, capsys):
    assert "data: missing; name data with --data" in refused(exported)
    assert "must end in .json" in refused(run, "--out", tmp_path / "results.txt")
    (tmp_path / "there.json").touch()
    assert "exists already" in refused(run, "--out", tmp_path / "there.json")
    assert "128 tokens are more than" in refused(run, "--block_size", 128)
    assert "batch_size: must be at least 1" in refused(run, "--batch_size", 0)
    assert "stride: must be from 1 to block_size - 1 (15)" in refused(run, "--stride", 16)
    assert "has no test (it has train, validation)" in refused(run, "--split", "test")
    assert "tasks: missing; name the tasks" in refused(run, "--limit", 3)
    assert "no such data file or folder" in refused(run, "--data", place / "nothing.txt")
    (tmp_path / "empty").mkdir()
    assert "not a run, a checkpoint or a folder with config.json" in refused(tmp_path / "empty")
    for text in ('{"architecture": {"a": 1}}', "[1]"):
        (tmp_path / "empty" / "config.json").write_text(text)
        assert "config.json: does not describe a model; copy it again" in refused(tmp_path / "empty")
    assert main(["evaluate", str(run), "--device", "cuda:99"]) == 2
    assert main(["evaluate", str(run), "--device", "abacus"]) == 2
    there, known = capsys.readouterr().err.strip().splitlines()
    assert "device: there is no cuda:99, PyTorch sees" in there
    assert "device: abacus computes nothing here" in known
    assert refused(gone := tmp_path / "nothing.ckpt").endswith(
        f"{gone}: there is no such run, checkpoint or folder"
    )
    assert refused(tmp_path / "no" / "where").endswith(
        "/no/where: there is no such run, checkpoint or folder"
    )
    assert refused("nothing/there").endswith("name of a Hub model you can access")


@pytest.fixture
def other(exported, tmp_path):
    """The exported model with another tokenizer."""
    folder = shutil.copytree(exported, tmp_path / "other")
    train_bpe(["other text"], 280).save_pretrained(folder)
    return folder


def test_another_tokenizer(run, other, tasks, tmp_path, refused, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    assert f"{copy} has another tokenizer than {other}" in refused(other, "--data", copy)
    assert f"{copy} has another tokenizer than {other}" in refused(copy, other)
    pytest.importorskip("lm_eval")
    options = ["--tasks", "words", "--tasks_path", tasks, "--limit", 4]
    assert "has another tokenizer" in refused(copy, other, "--data", copy, *options)
    capsys.readouterr()
    told = results(tmp_path, other, copy, *options)
    left, home = told["sources"]
    assert left["perplexity"] == {}
    assert f"{copy} has another tokenizer than" in left["left_out"]
    assert left["tasks"]["words"]["documents"] == home["tasks"]["words"]["documents"] == 4
    assert home["perplexity"].keys() == {"validation"}
    assert f"no perplexity of {other}: data: {copy} has another" in capsys.readouterr().out


def test_rows_that_are_too_long_for_one_model(run, exported, tasks, tmp_path, refused):
    pytest.importorskip("lm_eval")
    short = shutil.copytree(exported, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 15}
    (short / "config.json").write_text(json.dumps(config))
    options = ["--tasks", "words", "--tasks_path", tasks, "--limit", 4]
    copy = shutil.copytree(run, tmp_path / "run")
    home, left = results(tmp_path, copy, short, *options)["sources"]
    assert f"16 tokens are more than {short} takes (15)" in left["left_out"]
    assert left["tasks"].keys() == home["tasks"].keys() == {"words"}
    assert f"16 tokens are more than {short}" in refused(copy, short, *options, "--block_size", 16)


def test_mistakes_come_before_the_work(run, exported, tasks, tmp_path, refused, capsys, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "results.json"
    assert refused(copy, "no/where", "--out", out).endswith("name of a Hub model you can access")
    bare = shutil.copytree(exported, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "tokenizer" in refused(copy, bare, "--out", out)
    odd = tmp_path / "odd.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"_class_path": "elsewhere.Module"}}, odd)
    assert "elsewhere.Module is not a class of this suite" in refused(copy, odd, "--out", out)
    lost = shutil.copytree(run, tmp_path / "lost")
    config = yaml.safe_load((lost / "config.yaml").read_text())
    config["model"]["init_args"]["init_from"] = str(tmp_path / "start.ckpt")
    (lost / "config.yaml").write_text(yaml.safe_dump(config))
    line = refused(copy, lost, "--baselines", "true", "--out", out)
    assert f"baselines: the start of {lost} cannot be loaded (there is no checkpoint" in line
    pytest.importorskip("lm_eval")
    from stableqat.evaluate import processes
    from stableqat.evaluate.processes import Share

    class Many(Share):
        def first_alone(self):
            return nullcontext()

    monkeypatch.setattr(processes, "processes", lambda _: nullcontext((Many(0, 13), torch.device("cpu"))))
    assert "words has 12 documents for 13" in refused(copy, "--tasks", "words", "--tasks_path", tasks)
    assert not capsys.readouterr().out
    assert not out.exists()
    assert read_run(copy, ("eval/",)).scalars == {}


def test_what_is_measured_is_kept(run, exported, tmp_path, refused, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "results.json"
    assert call(copy, exported, damaged, "--out", out) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"stableqat: {damaged}: transformers cannot load it")
    one, two = json.loads(out.read_text())["sources"]
    assert (one["source"], two["source"]) == (str(copy), str(exported))
    loss = one["perplexity"]["validation"]["loss"]
    assert read_run(copy, ("eval/",)).scalars["eval/loss/validation"] == {4: pytest.approx(loss)}
    assert len([p for p in copy.glob("events*") if p.name.endswith(".evaluate")]) == 1
    assert f"{loss:.4f}" in told.out
    assert str(out) in told.out


def test_a_run_of_its_best_checkpoint(run, tmp_path, refused):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        (copy / "checkpoints" / name).unlink(missing_ok=True)
    (record,) = results(tmp_path, copy, "--data", copy)["sources"]
    assert record["checkpoint"] == str(copy / "checkpoints" / "best.ckpt")
    assert record["perplexity"].keys() == {"validation"}
    (copy / "checkpoints" / "best.ckpt").unlink()
    assert f"{copy}: the run holds no checkpoints/last.ckpt" in refused(copy)


def test_a_run_whose_data_is_gone(run, place, tasks, tmp_path, refused, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "text.jsonl"), str(tmp_path / "gone.jsonl")))
    assert "the run's data cannot be read (no such data file" in (line := refused(copy))
    assert line.endswith("name data with --data")  # the run keeps its tokenizer
    tokenizer = shutil.move(copy / "tokenizer", tmp_path / "elsewhere")
    settings = yaml.safe_load(config.read_text())
    settings["data"]["init_args"]["tokenizer"] = None  # where the start kept it
    config.write_text(yaml.safe_dump(settings))
    assert "has no tokenizer (the run's data cannot be read (no such data file" in refused(copy)
    assert "name data with --data" in refused(copy, "--tokenizer", tokenizer)
    if find_spec("lm_eval") is not None:
        assert call(copy, "--tokenizer", tokenizer, "--tasks", "words", "--tasks_path", tasks) == 0
        assert (
            f"no perplexity of {copy}: data: {copy}: the run's data cannot be read" in capsys.readouterr().out
        )
    assert call(copy, "--tokenizer", tokenizer, "--data", place / "further.txt", "--block_size", 16) == 0
    assert "perplexity/further.txt" in capsys.readouterr().out


def test_a_run_that_takes_no_event_file(run, tmp_path, capsys, monkeypatch, caplog):
    """A read-only or full disk under the run costs the event file alone, in one line."""
    copy = shutil.copytree(run, tmp_path / "run")
    before = set(copy.iterdir())
    real = report.whole_file

    @contextmanager
    def refuse(path):
        if path.parent == copy:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with real(path) as part:
            yield part

    monkeypatch.setattr(report, "whole_file", refuse)
    told = results(tmp_path, copy)
    assert f"{told['sources'][0]['perplexity']['validation']['loss']:.4f}" in capsys.readouterr().out
    assert f"{copy}: takes no event file (Read-only file system)" in caplog.text
    assert set(copy.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--device", "meta"], "device: meta computes nothing here; take cpu, cuda or cuda:1"),
        (["--device", "xla"], "device: xla computes nothing here"),
        (["--num_fewshot", -3, "--tasks", "piqa"], "num_fewshot: must be at least 0, not -3"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, line, run, capsys):
    assert main(["evaluate", str(run), *map(str, options)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"stableqat: {line}")
    assert "\n" not in err


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_a_cache_that_cannot_be_written_is_one_line(what, run, place, tmp_path, refused, monkeypatch):
    (tmp_path / "file").touch()
    where = tmp_path / "file" if what == "a file" else tmp_path / "file" / "below"
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "cache"), str(where)))
    assert f"the cache folder {where} cannot be written" in refused(copy)
    assert f"the cache folder {where} cannot be written" in refused(copy, "--split", "train")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", where)
    line = refused(copy, "--data", place / "further.txt")
    assert f"the cache folder {where} (below $HF_HOME) cannot be written" in line

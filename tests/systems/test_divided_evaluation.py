"""Two processes (gloo), as torchrun starts them, find what one does."""

import json

import forked
import pytest
import yaml

import tiny
import words

LLAMA = tiny.LLAMA | {"vocab_size": 300, "num_hidden_layers": 1, "max_position_embeddings": 64}


def as_torchrun(argv, environment, log):
    if environment:
        environment["RANK"] = environment["LOCAL_RANK"]  # Lightning's launchers do without
    forked._run(argv, environment, log)


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.setattr(forked, "_run", as_torchrun)


def fit(folder, family, model, data, **more):
    logger = {"save_dir": str(folder), "name": "", "version": family, "default_hp_metric": False}
    settings = {
        "model": {"class_path": f"stableqat.modules.{family}", "init_args": model},
        "data": {"class_path": f"stableqat.data.{data.pop('class')}", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        }
        | more,
    }
    (folder / f"{family}.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "-c", str(folder / f"{family}.yaml")]


def language(folder):
    text = words.write_text(folder / "text.jsonl")
    words.write_task(folder, questions=9)  # so that one process has a request more than the other
    data = {"class": "TextDataModule", "source": str(text), "block_size": 19}
    data |= {"batch_size": 4, "vocab_size": 300, "cache_dir": str(folder / "cache")}
    quantizer = {"class_path": "stableqat.quantizers.StableQAT", "init_args": {"bits": 2}}
    return fit(folder, "LlamaModule", {"config": LLAMA, "quantizer": quantizer}, data)


def evaluated(folder, processes, run, *options):
    out = folder / f"{run}-{processes}.json"
    argv = ["evaluate", str(folder / run), "--device", "cpu", "--out", str(out), *options]
    forked.succeed(argv, folder / "log", processes)
    assert "loss" in (folder / "log").read_text()
    if processes > 1:  # a table once
        assert not (folder / "log.1").read_text().strip()
    return json.loads(out.read_text())


def test_text_and_tasks(torchrun, tmp_path):
    pytest.importorskip("lm_eval")
    forked.succeed(language(tmp_path), tmp_path / "log")
    options = ["--tasks", "words", "--tasks_path", str(tmp_path), "--batch_size", "3"]
    one, two = (evaluated(tmp_path, n, "LlamaModule", *options) for n in (1, 2))
    assert two["settings"]["processes"] == 2
    (one,), (two,) = one["sources"], two["sources"]
    scored = one["perplexity"]["validation"]
    assert scored["windows"] % 2  # one process has a block more than the other
    assert two["perplexity"]["validation"].pop("loss") == pytest.approx(scored.pop("loss"), rel=1e-6)
    assert two["perplexity"]["validation"].pop("perplexity") == pytest.approx(
        scored.pop("perplexity"), rel=1e-6
    )
    assert two["perplexity"] == one["perplexity"]
    for metric, score in one["tasks"]["words"]["metrics"].items():
        other = two["tasks"]["words"]["metrics"][metric]
        assert other["value"] == pytest.approx(score["value"])
        assert other["stderr"] == pytest.approx(score["stderr"])
    assert two["tasks"]["words"]["documents"] == one["tasks"]["words"]["documents"] == 9
    # one event file an evaluation, not one a process
    assert len(list((tmp_path / "LlamaModule").glob("events*.evaluate"))) == 2


def test_images(torchrun, tmp_path):
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 1}
    model = {"model_name": "vit_tiny_patch16_224", "num_classes": 10, "model_args": args}
    forked.succeed(fit(tmp_path, "ViTModule", model, {"class": "ImageDataModule"}), tmp_path / "log")
    one, two = (evaluated(tmp_path, n, "ViTModule", "--batch_size", "50") for n in (1, 2))
    one, two = (each["sources"][0]["images"]["validation"] for each in (one, two))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert two == one


def test_a_training_of_two_processes_is_evaluated_by_both(tmp_path):
    pytest.importorskip("lm_eval")
    from stableqat.events import read_run

    argv = [*language(tmp_path), "--trainer.strategy", "STRATEGY", "--trainer.devices", "2"]
    argv += ["--data.batch_size", "2", "--trainer.callbacks+=stableqat.callbacks.Evaluate"]
    argv += ["--trainer.callbacks.data", f"[{tmp_path / 'text.jsonl'}]", "--trainer.callbacks.tasks", "words"]
    argv += ["--trainer.callbacks.tasks_path", str(tmp_path)]
    seen = {}
    for strategy in ("ddp", "fsdp2"):
        flags = [strategy if part == "STRATEGY" else part for part in argv]
        forked.succeed([*flags, "--trainer.logger.version", strategy], tmp_path / "log", 2)
        seen[strategy] = {
            tag: series[2] for tag, series in read_run(tmp_path / strategy, ("eval/",)).scalars.items()
        }
    assert seen["ddp"].keys() == seen["fsdp2"].keys() >= {"eval/perplexity/text.jsonl", "eval/words/acc_norm"}
    assert seen["fsdp2"]["eval/loss/text.jsonl"] == pytest.approx(
        seen["ddp"]["eval/loss/text.jsonl"], rel=1e-3
    )

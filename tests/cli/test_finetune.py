"""`-c llama/finetune` and `-c vit/finetune`: a start, data and bits are enough, from any folder."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import words
from chats import byte_tokenizer, write_jsonl
from stableqat.cli.inherit import inherit
from stableqat.cli.main import main
from stableqat.cli.sizing import _choose_rows, _fewest_bits, _workers
from stableqat.data import image
from stableqat.data.source import load_splits
from stableqat.data.tokenizer import load_tokenizer, tokenizer_hash
from stableqat.errors import UserError
from stableqat.modules import SizedAdamW
from stableqat.modules.sizing import Size, rows_of_step
from starts import ARGS, NAME, OWN, model_folder, timm_folder

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--trainer.logger.version", "run"]
QUIET += ["--baseline.stop_at_chance", "false"]  # the starts are random
LLAMA = ["--model.init_from", "starts/llama", "--data.source", "words.jsonl", "--model.quantizer.bits", "4"]
VIT = ["--model.init_from", "starts/vit", "--data.source", "pictures", "--model.quantizer.bits", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("finetune")
    (folder / "starts").mkdir()
    model_folder(folder / "starts" / "llama")
    timm_folder(folder / "starts" / "vit")
    words.write_text(folder / "words.jsonl")
    for label, name in enumerate(("cat", "dog", "owl")):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (20, 20), (90 * label, 5 * number, 50)).save(
                folder / "pictures" / name / f"{number}.png"
            )
    return folder


@pytest.fixture
def at(place, tmp_path, monkeypatch):
    """A new current folder, from which the starts and the data are named as if they were in it."""
    for each in place.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
    monkeypatch.setenv("STABLEQAT_CACHE", str(place / "cache"))
    return tmp_path


def fit(family, *flags, verb="fit"):
    given = LLAMA if family == "llama" else VIT
    return main([verb, "-c", f"{family}/finetune", *given, *QUIET, *map(str, flags)])


def kept(family):
    config = yaml.safe_load(Path(f"lightning_logs/{family}/run/config.yaml").read_text())
    return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]


def test_a_start_a_text_and_the_bits_are_enough(at, capsys):
    assert fit("llama", "--trainer.max_steps", 10) == 0
    lines = capsys.readouterr().err.splitlines()
    for line in (
        "data.tokenizer: starts/llama, which model.init_from brings",
        "data.block_size: 16 of the model's 16 positions",
        "trainer.precision: 32-true, for this device",
        "model.optimizer.lr: 0.0003, for 4 bits at width 32",
        "trainer.val_check_interval: every 2 steps",
    ):
        assert f"stableqat: {line}" in lines
    model, data, trainer = kept("llama")
    assert model["optimizer"]["init_args"]["lr"] == 3e-4
    assert (data["block_size"], trainer["precision"], trainer["val_check_interval"]) == (16, "32-true", 2)
    assert f"stableqat: data.batch_size: {data['batch_size']}: a step takes" in "\n".join(lines)
    run = Path("lightning_logs/llama/run")
    assert tokenizer_hash(load_tokenizer(str(run / "tokenizer"))) == tokenizer_hash(
        load_tokenizer("starts/llama")
    )
    assert (run / "checkpoints" / "best.ckpt").exists()

    # the same command resumes, and what it made is evaluated and exported
    assert fit("llama", "--trainer.max_steps", 12, "--ckpt_path", "last") == 0
    assert main(["evaluate", str(run), "--device", "cpu", "--out", "found.json"]) == 0
    assert main(["export", str(run), "--format", "hf", "--out", "out"]) == 0
    assert AutoModelForCausalLM.from_pretrained("out").config.hidden_size == 32


def test_a_start_images_and_the_bits_are_enough(at, capsys, monkeypatch):
    read = []
    monkeypatch.setattr(image, "load_splits", lambda *a, **k: read.append(a) or load_splits(*a, **k))
    assert fit("vit", "--trainer.max_steps", 5) == 0
    assert read == [("pictures", None)]  # once, for the classes, the batch and the training
    text = capsys.readouterr().err
    assert f"stableqat: model.model_name {NAME}, model_args {ARGS}, which model.init_from brings" in text
    assert "stableqat: model.num_classes: 3, those of the data (cat, dog, owl)" in text
    assert "a new classifier of 3 classes (the start has one of 5)" in text
    model, data, _ = kept("vit")
    assert (model["model_name"], model["model_args"], model["num_classes"]) == (NAME, ARGS, 3)
    assert {key: data[key] for key in OWN} == OWN
    assert data["image_size"] == ARGS["img_size"]
    assert data["batch_size"] == 6  # 54 images train, and an epoch has 8 steps at least

    run = "lightning_logs/vit/run"
    assert fit("vit", "--trainer.max_steps", 6, "--ckpt_path", "last") == 0
    assert main(["evaluate", run, "--device", "cpu", "--out", "found.json"]) == 0
    assert main(["export", run, "--format", "hf", "--out", "out"]) == 0
    # a run is a start as well
    flags = ["--model.init_from", run, "--trainer.logger.version", "second", "--trainer.max_steps", 1]
    assert fit("vit", *flags) == 0


def test_what_the_user_gives_stays(at):
    flags = ["--trainer.max_steps", 2, "--model.optimizer.lr", 0.01, "--data.block_size", 8]
    flags += ["--data.batch_size", 3, "--trainer.val_check_interval", 2, "--trainer.precision", "bf16-mixed"]
    flags += ["--trainer.accumulate_grad_batches", 2]
    assert fit("llama", *flags) == 0
    model, data, trainer = kept("llama")
    assert model["optimizer"]["init_args"]["lr"] == 0.01
    assert (data["block_size"], data["batch_size"]) == (8, 3)
    assert (trainer["val_check_interval"], trainer["precision"]) == (2, "bf16-mixed")
    assert trainer["accumulate_grad_batches"] == 2


@pytest.mark.parametrize(
    ("letters", "positions", "rows", "why"),
    [
        (100, 512, 128, ", which hold 99% of the conversations whole"),  # all but one
        (4, 512, 32, ", fewer as the source is small"),
        (100, 64, 64, ""),
    ],
)
def test_rows_of_a_small_source_hold_its_conversations(at, letters, positions, rows, why):
    byte_tokenizer().save_pretrained("tokenizer")
    prompts = [f"{n:0{letters}}" for n in range(150)] + ["a" * 400]
    write_jsonl(at / "chats.jsonl", [{"prompt": prompt, "completion": "b"} for prompt in prompts])
    given = Namespace(source="chats.jsonl", tokenizer="tokenizer", cache_dir="cache", block_size=None)
    data = Namespace(class_path="stableqat.data.TextDataModule", init_args=given)
    module = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    line = _choose_rows(data, module, validation=100)
    assert given.block_size == rows
    assert line == f"data.block_size: {rows} of the model's {positions} positions{why}"


def test_another_image_size_resamples_the_positions(at, capsys):
    assert fit("vit", "--trainer.max_steps", 1, "--data.image_size", 24, "--model.num_classes", 3) == 0
    assert "positions resampled from 4x4 to 6x6 patches" in capsys.readouterr().err
    assert kept("vit")[0]["model_args"]["img_size"] == 24


@pytest.mark.parametrize("named", ["metadata", "flag", None])
def test_a_weight_file_says_what_it_is_or_is_asked(named, at, capsys):
    metadata = {"architecture": NAME} if named == "metadata" else None
    shape = {key: value for key, value in ARGS.items() if key != "img_size"}
    save_file(load_file("starts/vit/model.safetensors"), "vit.safetensors", metadata)
    flags = ["--model.init_from", "vit.safetensors", "--model.model_args", json.dumps(shape)]
    flags += ["--model.model_name", NAME] if named == "flag" else []
    code = fit("vit", *flags, "--trainer.max_steps", 1)
    if named is None:
        assert code == 2
        line = capsys.readouterr().err.strip()
        assert "model.model_name: vit.safetensors does not say which timm model it is; name it" in line
        assert "\n" not in line
    else:
        assert code == 0
        assert kept("vit")[0]["model_name"] == NAME
        assert kept("vit")[1]["image_size"] == 16  # as its positions say; timm has 224 for this name


CONTRADICTIONS = {
    "rows": (["--data.block_size", 17], "data.block_size: 17 tokens exceed the model's"),
    "shape": (
        ["-c", "llama/smollm2-135m"],
        "model.config.hidden_size: is 576, but starts/llama in init_from",
    ),
    "one key": (
        ["--model.config.hidden_size", "64"],
        "model.config.hidden_size: is 64, but starts/llama in init_from has 32",
    ),
    "a model as data": (["--data.source", "starts/llama"], "starts/llama is a model folder, not data"),
    "nothing": (
        ["--model.init_from", "null"],
        "model.config: missing; give an architecture, or set model.in",
    ),
    "tokens": (["--data.tokenizer", "large"], "320 is less than the tokenizer's 330 entries"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_one_line_before_training(name, at, capsys):
    flags, line = CONTRADICTIONS[name]
    if name == "tokens":
        large = load_tokenizer("starts/llama")
        large.add_tokens([f"<extra{i}>" for i in range(330 - len(large))])
        large.save_pretrained("large")
    assert fit("llama", *flags) == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("bits", "width", "lr"),
    [
        (1, 576, 1e-3),
        (2, 576, 1e-3),
        (3, 576, 1e-3),
        (4, 576, 3e-4),
        (None, 576, 3e-4),
        (8, 64, 3e-4),
        (2, 2048, 2.8e-4),
        (4, 2048, 8.4e-5),
    ],
)
def test_fewer_bits_learn_faster_and_wider_models_slower(bits, width, lr):
    assert Size(width, 1, 1).learning_rate(bits, "text") == lr
    assert Size(width, 1, 1).learning_rate(bits, "images") == pytest.approx(lr / 10)


def test_a_step_suits_the_source_and_its_parts_the_device():
    assert [rows_of_step(n, None) for n in (2048, 64, 20_000)] == [8, 256, 1]
    assert rows_of_step(2048, 10**9) == 8
    assert [rows_of_step(256, n) for n in (80, 7)] == [10, 1]
    assert [rows_of_step(None, n) for n in (None, 10**6, 54)] == [128, 128, 6]
    size = Size(width=8, parameters=10**6, activations=10**6)  # 3 MB a row in 16 bits, 20 MB of state
    assert size.parts(8, 1e9, mixed=True) == 1
    assert size.parts(8, 40e6, mixed=True) == 2  # 12 MB are left
    assert size.parts(8, 40e6, mixed=False) == 4
    assert size.parts(8, 1e6, mixed=True) == 8


def test_only_the_command_line_chooses_a_learning_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="lr: missing"):
        SizedAdamW([parameter])
    assert SizedAdamW([parameter], lr=0.1, weight_decay=0.0).defaults["lr"] == 0.1


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (None, None),
        ({"class_path": "STE", "init_args": {"bits": 4}}, 4),
        ({"class_path": "STE", "init_args": {"bits": None, "levels": 3}}, 2),
        ({"class_path": "STE", "init_args": {"grid": "ternary"}}, 2),
        ({"class_path": "STE", "init_args": {"grid": "binary"}}, 1),
        ({"*": {"class_path": "STE", "init_args": {"bits": 4}}, "*.up_proj": None}, 4),
        ({"*": {"class_path": "STE", "init_args": {"bits": 4}}, "*.q": {"init_args": {"levels": 3}}}, 2),
    ],
)
def test_every_way_to_name_a_width_counts_for_the_learning_rate(quantizer, bits):
    assert _fewest_bits(quantizer) == bits


def test_an_export_of_images_is_a_start(at, capsys):
    assert fit("vit", "--trainer.max_steps", 1, "--trainer.logger.version", "made") == 0
    assert main(["export", "lightning_logs/vit/made", "--format", "hf", "--out", "made"]) == 0
    assert fit("vit", "--model.init_from", "made", "--trainer.max_steps", 1) == 0
    assert "num_classes" not in kept("vit")[0]["model_args"]


def test_a_key_of_the_start_changes_without_the_others(at):
    flags = ["--model.config.attention_dropout", 0.1, "--baseline.stop_at_chance", "false"]
    assert fit("llama", *flags, "--trainer.max_steps", 1) == 0


def test_weights_of_another_architecture_leave_no_run(at, capsys):
    assert fit("vit", "--model.model_name", NAME, "--model.model_args", json.dumps({**ARGS, "depth": 2})) == 2
    assert "weights of another architecture" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("lightning_logs").exists()


def test_as_many_classes_of_other_names_get_a_new_classifier(at, capsys, monkeypatch):
    timm_folder(at / "named", classes=3)
    config = json.loads((at / "named" / "config.json").read_text())
    for number, (names, new) in enumerate(
        [
            (["cat", "dog", "owl"], None),
            (["dog", "cat", "owl"], True),
            (["0", "1", "2"], None),
            (["ant", "bee", "fly"], True),
        ]
    ):
        (at / "named" / "config.json").write_text(json.dumps({**config, "label_names": names}))
        model = Namespace(
            class_path="stableqat.modules.ViTModule",
            init_args=Namespace(num_classes=3 if number else None, new_classifier=None, init_from="named"),
        )
        data = Namespace(class_path="stableqat.data.ImageDataModule", init_args=Namespace(source="pictures"))
        lines = inherit(Namespace(model=model, data=data, ckpt_path=None))
        assert model.init_args.new_classifier is new
        assert any("model.new_classifier: true" in line for line in lines) is bool(new)
    monkeypatch.setattr(  # as timm reads a model of the Hub
        "timm.models.load_model_config_from_hf",
        lambda name: ({**config["pretrained_cfg"], "label_names": names}, NAME, ARGS),
    )
    model.init_args = Namespace(num_classes=3, new_classifier=None, init_from="someone/vit")
    lines = inherit(Namespace(model=model, data=data, ckpt_path=None))
    assert "model.new_classifier: true, as the start's classes are others (ant, bee, fly)" in lines
    flags = ["--model.init_from", "named", "--trainer.max_steps", 1]
    assert fit("vit", *flags) == 0
    assert capsys.readouterr().err.count("a new classifier of 3 classes (the start has one of 3 others)") == 1


@pytest.mark.parametrize(("cores", "processes", "workers"), [(12, 2, 5), (64, 2, 16), (2, 2, 0)])
def test_loader_processes_share_the_cores_of_a_gpus_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = Namespace(accelerator="gpu", devices=processes, num_nodes=3)
    line = f"data.num_workers: {workers}, of {cores} cores for {processes} processes"
    assert _workers(trainer) == (workers, line)
    trainer.accelerator = "cpu"
    assert _workers(trainer) == (0, "data.num_workers: 0, as the CPU trains")

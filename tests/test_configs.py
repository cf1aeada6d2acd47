"""Every configuration is a test: each base x overlay parses and builds, and the small ones run.

The arms of a comparison must not drift apart, so an overlay changes what it names and nothing else.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import words
from stableqat import callbacks, quantizers
from stableqat.cli.lightning import QATCommand
from stableqat.cli.main import main
from stableqat.data.image import PREPROCESSING
from stableqat.data.tokenizer import train_bpe
from stableqat.modules import Distillation
from stableqat.studies.study import read_study

ROOT = Path(__file__).parents[1] / "configs"
FAMILIES = ["llama", "vit"]
METHODS = {
    name.lower()
    for name in quantizers.__all__
    if name not in ("Quantizer", "QuantizerFactory", "QuantizerSpec", "QuantizedWeight")
}
STRATEGIES = {"ddp", "fsdp"}
REMEDIES = {"dampening", "freezing"}  # laid over a method
# parameters of the published models
SIZES = {
    "llama-30m": 29_893_120,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "deit-tiny": 5_717_416,
    "deit-small": 22_050_664,
    "vit-base": 86_567_656,
}


def raw(family: str, name: str) -> dict:
    return yaml.safe_load((ROOT / family / f"{name}.yaml").read_text())


def names(family: str) -> list[str]:
    """Overlays of a family; a study is for `stableqat sweep`, and finetune stands alone."""
    found = sorted(path.stem for path in (ROOT / family).glob("*.yaml"))
    return [name for name in found if name not in ("base", "finetune") and "grid" not in raw(family, name)]


OVERLAYS = [(family, name) for family in FAMILIES for name in names(family)]


def arguments(family: str, *overlays: str) -> list[str]:
    return [part for name in ("base", *overlays) for part in ("-c", f"{family}/{name}")]


def leaves(block: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in block.items():
        flat |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        )
    return flat


@pytest.fixture(scope="module")
def built():
    """Commands that were parsed and built, by their arguments: half a second each."""
    return {}


@pytest.fixture
def command(monkeypatch, built):
    """Parse and build everything of `stableqat fit`, and go on to run it if asked."""
    monkeypatch.chdir(ROOT.parent)
    original = QATCommand._run_subcommand

    def build(*argv: str, run: bool = False) -> QATCommand:
        def record(self: QATCommand, verb: str) -> None:
            built[argv] = self
            if run:
                original(self, verb)

        if run or argv not in built:
            monkeypatch.setattr(QATCommand, "_run_subcommand", record)
            assert main(["fit", *argv, "--trainer.accelerator", "cpu"]) == 0
        return built[argv]

    return build


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """A folder of images, which the sizes of ViTs need: digits are too small for them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    (folder / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "train" / "cat" / "one.png")
    return ["--data.source", str(folder)]


def resolved(made: QATCommand) -> dict[str, object]:
    return leaves({key: value for key, value in made.config["fit"].as_dict().items() if key != "config"})


def block(key: str) -> str:
    """What an overlay may change by naming `key`: a class with its options, and free keys, go together."""
    whole = (
        "model.init_args.config",
        "model.init_args.input_quantizer",
        "model.init_args.model_args",
        "model.init_args.quantizer",
        "model.init_args.teacher",
        "trainer.strategy",
    )
    return next((name for name in whole if key.startswith(name)), key)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, list[str]]:
    """Full-precision models of the bases' shapes, which a teacher needs."""
    import timm
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("start")
    given = raw("vit", "base")["model"]["init_args"]
    vit = timm.create_model(given["model_name"], num_classes=given["num_classes"], **given["model_args"])
    save_file(vit.state_dict(), folder / "vit.safetensors")
    config = AutoConfig.for_model(**raw("llama", "base")["model"]["init_args"]["config"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_bpe(words.DOCUMENTS, 280).save_pretrained(folder)
    starts = {"llama": str(folder), "vit": str(folder / "vit.safetensors")}
    return {family: ["--model.init_from", start] for family, start in starts.items()}


@pytest.mark.parametrize(("family", "name"), OVERLAYS)
def test_an_overlay_changes_what_it_names_and_nothing_else(family, name, command, images, start):
    source = images if family == "vit" and name in SIZES else []
    both = start[family] if name == "distill" else []
    under = ["ste"] if name in REMEDIES else []
    base = resolved(command(*arguments(family, *under), *both))
    after = resolved(command(*arguments(family, *under, name), *source, *both))
    changed = {key for key in base.keys() | after.keys() if base.get(key) != after.get(key)}
    changed.discard("data.init_args.source")
    if source:  # images are prepared as the model of that name wants them
        changed -= {f"data.init_args.{key}" for key in (*PREPROCESSING, "image_size")}
    assert changed
    assert {block(key) for key in changed} <= {block(key) for key in leaves(raw(family, name))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["base", "debug", "demo", *sorted(METHODS)])
def test_a_small_configuration_runs(family, name, command):
    overlays = [] if name == "base" else [name]
    made = command(*arguments(family, *overlays), "--trainer.fast_dev_run", "true", run=True)
    assert made.trainer.global_step == 1
    assert torch.isfinite(made.trainer.callback_metrics["val/loss"])
    assert made.model.describe()["method"].lower() == (name if name in METHODS else "fp")


WIDTHS = ["w2a2", "w2a8", "w3a3", "w4a4", "w4a8", "w8a8"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overlay_of_widths_is_what_its_name_says(family, command):
    assert [name for name in names(family) if name[0] == "w" and "a" in name] == WIDTHS
    for name in WIDTHS:
        blocks = raw(family, name)["model"]["init_args"]
        weights, inputs = (blocks[key]["init_args"]["bits"] for key in ("quantizer", "input_quantizer"))
        assert f"w{weights}a{inputs}" == name
        assert len((ROOT / family / f"{name}.yaml").read_text().splitlines()) <= 8
    argv = [*arguments(family, "debug", "w4a8"), "--trainer.fast_dev_run", "true"]
    made = command(*argv, "--model.calibration_batches", "1", run=True)
    assert made.model.describe()["widths"] == "W4A8"
    assert torch.isfinite(made.trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_distill_trains_on_the_starts_predictions_alone(family, command, start):
    extra = {"llama": ["--data.block_size", "32"], "vit": ["--data.image_size", "8"]}[family]
    argv = ["-c", f"{family}/finetune", "-c", f"{family}/distill", *start[family], *extra]
    if family == "vit":
        given = raw("vit", "base")["model"]["init_args"]
        argv += [
            "--model.model_name",
            given["model_name"],
            "--model.model_args",
            json.dumps(given["model_args"]),
        ]
    made = command(*argv, "--trainer.fast_dev_run", "true", run=True)
    assert made.model.distillation == Distillation(source=start[family][1], weight=1.0, temperature=1.0)
    assert made.trainer.callback_metrics["train/loss"] < 0.7 * made.trainer.callback_metrics["val/loss"]


@pytest.mark.parametrize(("family", "name"), [pair for pair in OVERLAYS if pair[1] in SIZES])
def test_a_model_size_has_the_published_shape(family, name, command, images):
    made = command(*arguments(family, name), *(images if family == "vit" else []))
    assert made.model.model is None  # nothing but the meta device was touched
    with torch.device("meta"):
        model = made.model.build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", [name for family, name in OVERLAYS if family == "vit" and name in SIZES])
def test_images_are_prepared_as_the_model_of_that_name_was_trained(name, command, images):
    import timm

    made = command(*arguments("vit", name), *images)
    own = timm.get_pretrained_cfg(made.model.model_name).to_dict()
    assert made.datamodule.preprocessing == {key: own[key] for key in PREPROCESSING}
    assert (made.datamodule.in_chans, made.datamodule.image_size) == own["input_size"][:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_overlay_is_the_quantizer_alone(family):
    assert set(names(family)) >= METHODS
    for name in METHODS:
        assert len((ROOT / family / f"{name}.yaml").read_text().splitlines()) <= 12
        overlay = raw(family, name)
        assert list(leaves(overlay)) == [
            "model.init_args.quantizer.class_path",
            "model.init_args.quantizer.init_args.bits",
        ]
        kind = overlay["model"]["init_args"]["quantizer"]["class_path"]
        assert kind.rpartition(".")[2].lower() == name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_a_remedy_is_one_option_of_the_quantizer(family, name):
    assert list(leaves(raw(family, name))) == [f"model.init_args.quantizer.init_args.{name}"]


# a remedy alone, over STE, is among the overlays
@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in sorted(METHODS - {"lrqat"})), ("vit", "ste")],  # its weight is frozen
)
def test_both_remedies_lie_over_any_method(family, method, command):
    quantizer = command(*arguments(family, method, *sorted(REMEDIES))).model.quantizer
    described = quantizer(torch.randn(8, 64)).describe()
    assert described["method"].lower() == method
    for name in REMEDIES:
        assert described[name] == raw(family, name)["model"]["init_args"]["quantizer"]["init_args"][name]


@pytest.mark.parametrize(("first", "last"), [("dsq", "stableqat"), ("stableqat", "dsq"), ("paretoq", "ste")])
def test_the_last_of_two_methods_leaves_nothing_of_the_first(first, last, command):
    """jsonargparse keeps what fits of the options of an earlier class."""
    alone, after = command(*arguments("llama", last)), command(*arguments("llama", first, last))
    assert resolved(after) == resolved(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_print_config_shows_what_runs(family, command, capsys):
    made = command(*arguments(family, "stableqat"), "--model.quantizer.bits", "3")
    capsys.readouterr()
    argv = [*arguments(family, "stableqat"), "--model.quantizer.bits", "3", "--trainer.accelerator", "cpu"]
    assert main(["fit", *argv, "--print_config"]) == 0
    printed = leaves(yaml.safe_load(capsys.readouterr().out))
    shown = {key: value for key, value in resolved(made).items() if key in printed}
    assert len(shown) > 100
    assert printed["model.init_args.quantizer.init_args.bits"] == 3
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in shown.items()} == printed


RECIPES = {
    "imagenet/scratch": [],
    "imagenet/finetune": ["--model.model_name", "deit_small_patch16_224"],
    "cifar/scratch": [],
    "cifar/qat": [],
}
VIT_STUDIES = {  # points that train, among them the start, and arms
    "dinov2/study": (61, 6),
    "dinov2/activations": (41, 10),
    "dinov2/seeds": (25, 8),
    "dinov2/seeds-w2a2": (10, 3),
    "cifar/study": (37, 6),
}
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}


def test_every_recipe_for_images_is_tested():
    found = {p.relative_to(ROOT / "vit").with_suffix("").as_posix() for p in (ROOT / "vit").glob("*/*.yaml")}
    assert found == {*RECIPES, *VIT_STUDIES, "dinov2/base", "dinov2/start"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_images_runs(name, command, tmp_path):
    """With a smaller model and batch; what it sets otherwise is what it names."""
    from PIL import Image

    for number in range(12):
        (folder := tmp_path / ("cat", "dog")[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (20 * number, 50, 90)).save(folder / f"{number}.png")
    before = ["-c", "vit/cifar/scratch"] if name == "cifar/qat" else []
    argv = [*before, "-c", f"vit/{name}", *RECIPES[name], "--data.source", str(tmp_path)]
    argv += ["--model.num_classes", "2", "--data.image_size", "32", "--data.batch_size", "6"]
    argv += ["--data.validation_fraction", "0.4", "--trainer.accumulate_grad_batches", "1"]
    argv += ["--model.model_args", json.dumps(TINY), "--trainer.fast_dev_run", "true"]
    made = command(*argv, run=True)
    assert made.trainer.global_step == 1
    assert torch.isfinite(made.trainer.callback_metrics["val/loss"])
    averaged = next(each for each in made.trainer.callbacks if isinstance(each, callbacks.EMA)).decay
    assert (averaged is not None) == name.endswith("scratch")
    assert (made.model.mixup is not None) == name.endswith("scratch")
    assert made.datamodule.eval_batch_size >= 500


def test_the_recipe_for_small_images_has_few_parameters(command, images):
    made = command("-c", "vit/cifar/scratch", *images, "--model.num_classes", "10")
    with torch.device("meta"):
        assert 2.6e6 < sum(p.numel() for p in made.model.build_model().parameters()) < 2.8e6


def test_both_families_have_the_same_files():
    """But for overlays of the model alone: sizes, and what only language models have."""
    own = SIZES.keys() | {"activation-checkpointing"}
    shared = [{path.stem for path in (ROOT / family).glob("*.yaml")} - own for family in FAMILIES]
    assert shared[0] == shared[1]
    assert shared[0] >= METHODS | STRATEGIES | REMEDIES | {"base", "finetune", "debug", "demo"}
    for family, name in OVERLAYS:
        if name in SIZES:
            assert all(key.startswith("model.init_args.") for key in leaves(raw(family, name)))
        if name in STRATEGIES:
            keys = {block(key) for key in leaves(raw(family, name))}
            assert keys == {"trainer.strategy", "trainer.devices"}


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_are_those_of_the_overlays(family, command):
    made = {name: command(*arguments(family, name), "--trainer.devices", "2").trainer for name in STRATEGIES}
    assert {name: type(trainer.strategy).__name__ for name, trainer in made.items()} == {
        "ddp": "DDPStrategy",
        "fsdp": "FSDP2Strategy",
    }
    assert all(trainer.world_size == 2 for trainer in made.values())
    assert not any(trainer._accelerator_connector.use_distributed_sampler for trainer in made.values())


# the others are laid over these
STUDIES = [
    path
    for path in sorted((ROOT / "llama" / "study").glob("*.yaml"))
    if "grid" in yaml.safe_load(path.read_text())
]


@pytest.fixture(scope="module")
def seen():
    """Kinds of arms that have been built, of any study."""
    return set()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_the_stability_study_builds(path, command, seen, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    kinds = set()
    for point in read_study(path).points:
        if point.verb != "fit":
            continue
        values = point.overlay.settings()
        assert (values["trainer.max_steps"], values["guard.margin"]) == (240, 20)
        # arms that differ in a number only build alike
        kind = (*(file.path for file in point.overlay.configs), *sorted(point.overlay.args))
        kinds.add(kind)
        if kind not in seen:
            seen.add(kind)
            elsewhere = ["--model.init_from", "null", "--data.source", "null", "--data.tokenizer", "null"]
            made = command(*point.argv[1:], *elsewhere, "--trainer.precision", "32-true")
            settings = made.config["fit"]
            assert (settings.trainer.max_steps, settings.guard.margin) == (240, 20)
    assert len(kinds) >= 3


def test_every_arm_of_the_smollm2_study_builds(command, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    shape = yaml.safe_load((ROOT / "llama" / "smollm2-135m.yaml").read_text())["model"]["init_args"]["config"]
    shape |= {"num_hidden_layers": 1, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}
    points = {
        p.arm: p for p in read_study(ROOT / "llama" / "smollm2" / "study.yaml").points if p.verb == "fit"
    }
    assert len(points) == 8
    elsewhere = ["--model.init_from", "null", "--model.config", json.dumps(shape), "--data.source", "null"]
    for arm, point in points.items():
        settings = point.overlay.settings()
        assert (
            settings["trainer.max_steps"] * settings["data.batch_size"] * settings["data.block_size"] > 20e6
        )
        taught = ["--model.teacher.source", "start"] if "distill" in arm else []
        made = command(*point.argv[1:], *elsewhere, *taught, "--trainer.precision", "32-true")
        quantizer = made.model.quantizer
        assert (quantizer is None) == (arm == "fp")
        if quantizer is not None:
            assert quantizer(torch.randn(8, 64)).grid.name == (
                "stretched" if "stretched" in arm else "integer"
            )


@pytest.mark.parametrize("name", VIT_STUDIES)
def test_the_arms_of_a_vit_study_start_alike_and_are_what_their_names_say(name, command, images):
    points = [p for p in read_study(ROOT / "vit" / f"{name}.yaml").points if p.verb == "fit"]
    start, *runs = points
    arms = {point.arm: point for point in runs}
    assert (len(points), len(arms)) == VIT_STUDIES[name]
    assert start.study == ("vit-cifar" if name.startswith("cifar") else "vit-dinov2")
    budget = ("trainer.max_epochs", "data.batch_size", "model.label_smoothing", "ema.decay", "last.enabled")
    assert len({tuple(str(p.overlay.settings().get(key)) for key in budget) for p in runs}) == 1
    elsewhere = [*images, "--model.init_from", "null", "--model.num_classes", "10", "--data.num_workers", "0"]
    elsewhere += ["--trainer.precision", "32-true"]
    for arm, point in {"start": start, **arms}.items():
        model = command(*point.argv[1:], *elsewhere).model
        method, *rest = arm.split("-")
        assert (model.layer_lr_decay < 1) == (arm == "start" and start.study == "vit-dinov2")
        if method in ("start", "fp"):
            assert model.quantizer is None
            continue
        quantizer = model.quantizer(torch.randn(8, 64))
        assert type(quantizer).__name__.lower() == method
        assert quantizer.grid.name == (
            "stretched" if {method, *rest} & {"paretoq", "stretched"} else "integer"
        )
        if rest and rest[0][0] == "w":
            inputs = model.input_quantizer(64)
            assert f"w{quantizer.bits}a{inputs.bits}" == rest[0]
            assert inputs.surrogate_name == ("stableqat" if {"inputs", "both"} & {*rest} else "ste")
        else:
            assert model.input_quantizer is None


@pytest.mark.parametrize("bits", [2, 3])
def test_the_studies_of_starts_train_from_what_the_table_wrote(bits):
    script = (ROOT / "llama" / "ptq-table.sh").read_text()
    methods = re.search(r"for method in (.*); do", script)[1].split()
    assert "run=$out/$method-$bits-$size" in script
    study = read_study(ROOT / "llama" / "smollm2" / f"starts-{bits}bit.yaml")
    settings = [point.overlay.settings() for point in study.points]
    runs = {f"data/ptq/{method}-{bits}-row" for method in methods}
    for verb, count in (("validate", 4), ("fit", 32)):
        chosen = [s for s, point in zip(settings, study.points, strict=True) if point.verb == verb]
        assert len(chosen) == count
        assert {s["model.init_from"] for s in chosen} == runs
    assert {(s["model.init_quantizers"], s["model.quantizer.bits"]) for s in settings} == {("start", bits)}

"""A run takes its start's quantizers: it begins with the loss that the start deploys."""

import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

import tiny
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import quantized_layers
from stableqat.modules import start
from stableqat.quantizers import DSQ, LRQAT, STE

FAMILIES = ["llama", "vit"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Runs of both families whose scales training has moved."""
    made = {}
    for family in FAMILIES:
        module = tiny.module(
            family, quantizer=partial(DSQ, bits=4), optimizer=partial(torch.optim.AdamW, lr=2e-2)
        )
        trainer = tiny.trainer(max_steps=3)
        trainer.fit(module, tiny.loader(family))
        made[family] = tmp_path_factory.mktemp(family) / "last.ckpt"
        trainer.save_checkpoint(made[family])
    return made


def begun(family, source, quantizer, **options):
    options = {"init_quantizers": "start", **options}
    return tiny.configured(family, quantizer=quantizer, init_from=str(source), **options)


def logits(module, family):
    with torch.no_grad():
        return module.eval()(tiny.batch(family)["input_ids" if family == "llama" else "pixel_values"])


def loaded(module, path):
    return type(module).load_from_checkpoint(path)


def sharded(path: Path, folder: Path) -> Path:
    rest = torch.load(path, weights_only=True)
    dcp.save({"state_dict": rest.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", ["file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_grid_takes_all_parameters_bit_for_bit(family, kind, starts, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    source = starts[family] if kind == "file" else sharded(starts[family], tmp_path / "last.ckpt")
    read, paths = start.read_checkpoint, []
    monkeypatch.setattr(start, "read_checkpoint", lambda path: paths.append(path) or read(path))
    module = begun(family, source, partial(DSQ, bits=4))
    assert paths == [source]  # once
    assert caplog.text.count("linear layers quantized") == 1
    expected = torch.load(starts[family], weights_only=True)["state_dict"]
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    count = len(quantized_layers(module.model))
    assert f"init_quantizers: {source}: {count} layers with the start's scales" in caplog.messages
    assert not any("latent weights are taken" in message for message in caplog.messages)


def test_a_second_phase_keeps_what_the_first_has_frozen(starts, tmp_path):
    """And freezing begins anew where the start did not freeze."""
    freezing = partial(STE, bits=4, freezing=0.0)
    module = tiny.module("llama", quantizer=freezing, optimizer=partial(torch.optim.SGD, lr=2.0))
    trainer = tiny.trainer(max_steps=6)
    trainer.fit(module, tiny.loader("llama", 64))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = begun("llama", tmp_path / "last.ckpt", freezing)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())
    kept = [layer.weight_quantizer.freezing.frozen for layer in quantized_layers(second).values()]
    assert sum(each.sum() for each in kept) > 0
    deployed = [x.weight_quantizer.quantize(x.weight).codes for x in quantized_layers(second).values()]
    tiny.trainer(max_steps=2).fit(second, tiny.loader("llama", 64))
    for layer, frozen, codes in zip(quantized_layers(second).values(), kept, deployed, strict=True):
        assert layer.weight_quantizer.freezing.frozen[frozen].all()
        assert torch.equal(layer.weight_quantizer.quantize(layer.weight).codes[frozen], codes[frozen])
    assert begun("llama", tmp_path / "last.ckpt", partial(STE, bits=4)).state_dict().keys() < expected.keys()
    third = begun("llama", starts["llama"], partial(DSQ, bits=4, freezing=0.0))
    assert torch.equal(logits(third, "llama"), logits(loaded(third, starts["llama"]), "llama"))
    assert not any(x.weight_quantizer.freezing.frozen.any() for x in quantized_layers(third).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_method_on_the_same_grid_starts_with_the_same_values(family, starts):
    module = begun(family, starts[family], partial(STE, bits=4))
    assert torch.equal(logits(module, family), logits(loaded(module, starts[family]), family))
    other = begun(family, starts[family], partial(STE, bits=4), init_quantizers="weights")
    assert not torch.equal(logits(module, family), logits(other, family))


@pytest.mark.parametrize(
    "quantizer",
    [partial(DSQ, bits=2), partial(DSQ, bits=4, group_size=16), partial(DSQ, bits=4, grid="stretched")],
    ids=["width", "granularity", "grid"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_grid_starts_from_the_deployed_values(family, quantizer, starts, caplog):
    caplog.set_level(logging.INFO)
    module = begun(family, starts[family], quantizer)
    layers = quantized_layers(module.model)
    theirs = quantized_layers(loaded(module, starts[family]).model)
    assert layers.keys() == theirs.keys()
    for name, layer in layers.items():
        deployed = theirs[name].weight_quantizer.quantize(theirs[name].weight).dequantize()
        assert torch.equal(layer.weight, deployed)
        assert torch.equal(layer.weight_quantizer.scale, quantizer(deployed).scale)
    assert f"{len(layers)} layers with scales set from the start's values" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_quantized_any_more_keep_the_deployed_values(family, starts):
    module = begun(family, starts[family], None)
    assert torch.equal(logits(module, family), logits(loaded(module, starts[family]), family))


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    """A run whose factors training has moved; its weights are stored in a byte each."""
    module = tiny.module(
        "llama", quantizer=partial(LRQAT, bits=4), optimizer=partial(torch.optim.AdamW, lr=2e-2)
    )
    trainer = tiny.trainer(max_steps=3)
    trainer.fit(module, tiny.loader("llama"))
    path = tmp_path_factory.mktemp("low_rank") / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_a_stored_weight_is_taken_with_its_factors(low_rank, caplog):
    caplog.set_level(logging.INFO)
    module = begun("llama", low_rank, partial(LRQAT, bits=4))
    expected = torch.load(low_rank, weights_only=True)["state_dict"]
    state = module.state_dict()
    assert any(value.dtype == torch.int8 for value in expected.values())
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert "14 layers with the start's scales" in caplog.text


@pytest.mark.parametrize("quantizer", [partial(STE, bits=4), None], ids=["STE", "none"])
def test_another_method_starts_as_the_stored_weight_deploys(quantizer, low_rank):
    module = begun("llama", low_rank, quantizer)
    assert torch.equal(logits(module, "llama"), logits(loaded(module, low_rank), "llama"))


def test_stored_weights_start_others_by_what_was_learned(low_rank):
    """Not by the frozen weight: as other methods' latent weights do, which training has moved."""
    module = tiny.configured("llama", "fp", init_from=str(low_rank))
    theirs = loaded(module, low_rank)
    with full_precision(theirs.model):
        expected = logits(theirs, "llama")
    assert torch.equal(logits(module, "llama"), expected)


def test_low_rank_training_starts_as_another_method_deploys(starts, caplog):
    caplog.set_level(logging.INFO)
    module = begun("llama", starts["llama"], partial(LRQAT, bits=4))
    assert torch.equal(logits(module, "llama"), logits(loaded(module, starts["llama"]), "llama"))
    assert "14 layers with the start's codes and scales" in caplog.text


def test_a_classifier_of_other_classes_is_set_from_its_own_weights(starts, caplog):
    caplog.set_level(logging.INFO)
    whole = partial(STE, bits=4)
    module = tiny.module("vit", quantizer=whole, skip=[])
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(module, tiny.loader("vit"))
    path = starts["vit"].with_name("head.ckpt")
    trainer.save_checkpoint(path)
    module = begun("vit", path, whole, skip=[], num_classes=7)
    head = quantized_layers(module.model)["head"]
    assert torch.equal(head.weight_quantizer.scale, whole(head.weight).scale)
    assert "1 layer with new weights" in caplog.text


def refused(pattern, family="llama", **options):
    with pytest.raises(UserError, match=pattern):
        begun(family, **{"quantizer": partial(STE, bits=4), **options})


def test_what_has_no_quantizers_is_refused(starts, tmp_path):
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(tiny.module("llama", "fp"), tiny.loader("llama"))
    trainer.save_checkpoint(tmp_path / "fp.ckpt")
    refused(r"start, but .*fp\.ckpt was trained without quantizers; take", source=tmp_path / "fp.ckpt")
    tiny.configured("llama", "fp").model.save_pretrained(tmp_path / "folder")
    refused("is not a run or checkpoint; name a quantized run", source=tmp_path / "folder")
    refused(r"layer lm_head has no quantizer in .*; add it to model\.skip", source=starts["llama"], skip=[])
    with pytest.raises(UserError, match=r"start, but init_from is missing; name a quantized run"):
        tiny.configured("llama", init_quantizers="start")
    with pytest.raises(UserError, match="init_quantizers: must be weights or start, not scales"):
        tiny.module("llama", init_quantizers="scales")


# -- on the command line ------------------------------------------------------------------------

MODELS = {
    "llama": {"class_path": "stableqat.modules.LlamaModule", "init_args": {"config": tiny.LLAMA}},
    "vit": {
        "class_path": "stableqat.modules.ViTModule",
        "init_args": {
            "model_name": "vit_tiny_patch16_224",
            "num_classes": 10,
            "model_args": {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1}
            | {"num_heads": 2},
        },
    },
}
DATA = {
    "llama": {
        "class_path": "stableqat.data.TextDataModule",
        "init_args": {"block_size": 16, "batch_size": 4, "vocab_size": 300, "num_workers": 0},
    },
    "vit": {"class_path": "stableqat.data.ImageDataModule", "init_args": {"batch_size": 8, "num_workers": 0}},
}


def settings(family):
    model = {"class_path": MODELS[family]["class_path"], "init_args": dict(MODELS[family]["init_args"])}
    if family == "llama":
        model["init_args"]["config"] = tiny.LLAMA | {"vocab_size": 300}
    model["init_args"]["quantizer"] = {
        "class_path": "stableqat.quantizers.StableQAT",
        "init_args": {"bits": 4},
    }
    model["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    logger = {"save_dir": "logs", "name": "", "default_hp_metric": False}
    trainer = {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
    }
    return {"model": model, "data": DATA[family], "trainer": trainer}


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_phases_and_widths_on_the_command_line(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(settings(family) | {"baseline": {"stop_at_chance": False}}))

    def call(verb, version, *flags):
        capsys.readouterr()
        assert main([verb, "-c", "run.yaml", "--trainer.logger.version", version, *map(str, flags)]) == 0
        return capsys.readouterr()

    def losses(out):
        return [line for line in out.splitlines() if "val/loss" in line]

    call("fit", "first")
    deployed = losses(call("validate", "check", "--ckpt_path", "logs/first/checkpoints/last.ckpt").out)
    phase = ["--model.init_from", "logs/first", "--model.init_quantizers", "start"]
    assert losses(call("validate", "begun", *phase).out) == deployed != []

    told = call("fit", "second", *phase).err
    assert "init_quantizers: logs/first:" in told
    narrow = [
        "--model.quantizer.bits",
        2,
        "--model.init_from",
        "logs/first",
        "--model.init_quantizers",
        "start",
    ]
    assert "layers with scales set from the start's values" in call("fit", "narrow", *narrow).err

    # resumed without its start, a run is the uninterrupted one
    call("fit", "longer", *phase, "--trainer.max_steps", 3)
    shutil.rmtree("logs/first")
    call("fit", "second", *phase, "--trainer.max_steps", 3, "--ckpt_path", "last")
    states = [
        torch.load(f"logs/{version}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for version in ("second", "longer")
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())

    call("fit", "plain", "--model.quantizer", "null", "--trainer.max_steps", 1)
    wrong = ["--model.init_from", "logs/plain", "--model.init_quantizers", "start"]
    assert main(["fit", "-c", "run.yaml", "--trainer.logger.version", "wrong", *wrong]) == 2
    assert "logs/plain was trained without quantizers" in capsys.readouterr().err
    assert not Path("logs/wrong").exists()

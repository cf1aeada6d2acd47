"""Runs calibrate their inputs before anything is measured, once, on the data that they train on."""

from functools import partial

import lightning as L
import pytest
import torch

import stableqat
import tiny
from stableqat.callbacks import calibrate
from stableqat.callbacks.baseline import Baseline
from stableqat.data import ImageDataModule
from stableqat.errors import UserError
from stableqat.layers.calibration import uncalibrated
from stableqat.layers.linear import quantized_inputs
from stableqat.modules import QATModule
from stableqat.quantizers import STE
from stableqat.quantizers.inputs import LSQ, LSQPlus, PerToken
from stableqat.runs import open_run, write_run

FAMILIES = ["llama", "vit"]
BITS = partial(STE, bits=4)
INPUTS = partial(LSQPlus, bits=4)


def states(module: QATModule) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in module.state_dict().items() if ".input_quantizer." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_validates_trains_and_resumes(family, tmp_path, monkeypatch):
    def fit(steps, path=None):
        module = tiny.module(family, quantizer=BITS, input_quantizer=INPUTS, calibration_batches=2)
        return module, *tiny.calibrated_run(module, family, steps, path)

    whole, _, expected = fit(8)
    assert len(quantized_inputs(whole.model)) == (14 if family == "llama" else 8)
    assert not uncalibrated(whole.model)
    half, trainer, first = fit(4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr(calibrate, "calibrate_inputs", None)  # a run that resumes does not
    resumed, _, second = fit(8, tmp_path / "last.ckpt")
    assert first + second == expected
    for name, value in states(whole).items():
        assert torch.equal(states(resumed)[name], value), name
        assert value.isfinite().all()
    moved = [name for name, value in states(half).items() if not torch.equal(states(whole)[name], value)]
    assert {name.rsplit(".", 1)[1] for name in moved} == {"scale", "offset"}


def test_validate_measures_with_the_scales_that_training_begins_with():
    begun: dict[str, torch.Tensor] = {}

    class Begin(L.Callback):
        def on_train_start(self, trainer, pl_module):
            begun.update(states(pl_module))

    settings = {"quantizer": BITS, "input_quantizer": INPUTS, "calibration_batches": 2}
    modules = [tiny.module("vit", **settings) for _ in range(2)]
    trainer = tiny.trainer(max_steps=1, limit_val_batches=2, callbacks=[Begin()])
    torch.manual_seed(0)
    [measured] = trainer.validate(modules[0], datamodule=ImageDataModule(batch_size=32), verbose=False)
    assert measured["val/loss"] > 0
    rounded = states(modules[0])
    torch.manual_seed(0)
    trainer.fit(modules[1], datamodule=ImageDataModule(batch_size=32))
    assert rounded.keys() == begun.keys()
    assert all(torch.equal(value, begun[name]) for name, value in rounded.items())


def test_the_place_in_the_data_stays(monkeypatch):
    seen: list[torch.Tensor] = []
    first: list[torch.Tensor] = []

    class Module(tiny.ViTModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch["labels"])
            return super().training_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            first.append(batch["labels"])
            return super().predict_step(batch, batch_idx)

    settings = {"model_name": "vit_tiny_patch16_224", "num_classes": 10, "model_args": tiny.VIT}
    module = Module(**settings, quantizer=BITS, input_quantizer=INPUTS, calibration_batches=3)
    data = ImageDataModule(batch_size=16)
    tiny.trainer(max_steps=2).fit(module, datamodule=data)
    assert len(first) == 3
    assert all(map(torch.equal, first[:2], seen))
    assert data.state_dict()["consumed"] == 32


def test_the_calibrated_start_is_what_the_first_step_trains():
    """Calibration depends on the batches and on nothing else, and changes neither weights nor chance."""
    module = tiny.module("llama", quantizer=BITS, input_quantizer=partial(LSQ, bits=8), calibration_batches=1)
    other = tiny.configured("llama", quantizer=BITS, input_quantizer=partial(LSQ, bits=8))
    losses = tiny.Losses()
    trainer = tiny.trainer(max_steps=1, callbacks=[losses])
    torch.manual_seed(0)
    trainer.fit(module, tiny.loader("llama"))
    batch = tiny.batch("llama")
    stableqat.calibrate(other.model.eval(), [{"input_ids": batch["input_ids"]}])
    other.train()
    assert other.loss(batch).item() == losses.values[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_loaded_and_described(family, tmp_path):
    module = tiny.module(family, quantizer=BITS, input_quantizer=INPUTS)
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(module, tiny.loader(family))
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, module, place=folder)
    loaded = open_run(str(folder)).load()
    module.eval()
    batch = tiny.batch(family)
    with torch.no_grad():
        assert torch.equal(loaded(batch[module.input_key]), module(batch[module.input_key]))
    described = loaded.describe()
    assert described["widths"] == "W4A4"
    assert (described["bits"], described["input_bits"], described["input_quantizer"]) == (4, 4, "LSQPlus")
    assert "input LSQPlus 4-bit" in module.surgery.lines()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_brings_its_inputs_and_calibrates_others(family, tmp_path, monkeypatch):
    module = tiny.module(family, quantizer=BITS, input_quantizer=INPUTS)
    trainer = tiny.trainer(max_steps=3)
    trainer.fit(module, tiny.loader(family))
    trainer.save_checkpoint(path := tmp_path / "start.ckpt")
    options = {"quantizer": BITS, "init_from": str(path), "init_quantizers": "start"}
    same = tiny.configured(family, input_quantizer=INPUTS, **options)
    assert all(map(torch.equal, states(same).values(), states(module).values()))
    key = module.input_key
    batch = tiny.batch(family)
    with torch.no_grad():
        assert torch.equal(same.eval()(batch[key]), module.eval()(batch[key]))
    wider = tiny.configured(family, input_quantizer=partial(LSQPlus, bits=8), **options)
    assert len(uncalibrated(wider.model)) == len(quantized_inputs(wider.model))
    weights = tiny.configured(family, input_quantizer=INPUTS, quantizer=BITS, init_from=str(path))
    assert uncalibrated(weights.model)
    plain = tiny.configured(family, quantizer=None, init_from=str(path))
    assert not states(plain)


def test_inputs_are_quantized_where_weights_are():
    with pytest.raises(UserError, match=r"model.quantizer is null"):
        tiny.module("llama", quantizer=None, input_quantizer=INPUTS)
    with pytest.raises(UserError, match="calibration_batches"):
        tiny.module("llama", quantizer=BITS, input_quantizer=INPUTS, calibration_batches=0)


def test_no_batch_is_a_line():
    module = tiny.module("llama", quantizer=BITS, input_quantizer=INPUTS)
    with pytest.raises(UserError, match="no batch to calibrate on"):
        tiny.trainer(limit_train_batches=1).fit(module, torch.utils.data.DataLoader([]))


def test_a_start_that_is_not_finite_is_a_line():
    module = tiny.configured("llama", quantizer=BITS, input_quantizer=INPUTS)
    with torch.no_grad():
        module.model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"layer model.layers.0.self_attn.q_proj: NaN or infinity"):
        tiny.trainer().fit(module, tiny.loader("llama"))


def test_without_scales_nothing_is_calibrated(monkeypatch):
    module = tiny.module("vit", quantizer=BITS, input_quantizer=partial(PerToken, bits=8))
    monkeypatch.setattr(module, "predict_step", None)
    tiny.trainer(max_steps=1).fit(module, tiny.loader("vit"))


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_a_forward_again_gives_the_same_gradients(family):
    """Inputs are quantized alike wherever a forward is computed again."""

    def gradients(**options):
        module = tiny.configured(family, quantizer=BITS, input_quantizer=INPUTS, **options)
        batch = tiny.batch(family)
        stableqat.calibrate(
            module.model, [{"input_ids": batch["input_ids"]} if family == "llama" else batch["pixel_values"]]
        )
        module.train()
        module.loss(batch).backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    plain = gradients()
    for options in ({"activation_checkpointing": True}, {"recompute": True}):
        for name, gradient in gradients(**options).items():
            assert torch.equal(gradient, plain[name]), (options, name)


def test_lean_and_whole_losses_agree_where_the_head_quantizes_its_input():
    values = []
    for lean in (False, True):
        options = {"skip": (), "config": {**tiny.LLAMA, "tie_word_embeddings": False}, "lean_loss": lean}
        module = tiny.configured("llama", quantizer=BITS, input_quantizer=INPUTS, **options)
        batch = tiny.batch("llama")
        stableqat.calibrate(module.model, [{"input_ids": batch["input_ids"]}])
        values.append(module.loss(batch))
    torch.testing.assert_close(*values)


def test_the_loss_of_rounding_includes_inputs():
    """The start, rounded: weights and inputs."""

    def rounded(bits):
        baseline = Baseline(stop_at_chance=False)
        module = tiny.module("vit", quantizer=BITS, input_quantizer=partial(LSQ, bits=bits))
        trainer = tiny.trainer(max_steps=1, limit_val_batches=1, callbacks=[baseline])
        torch.manual_seed(0)
        trainer.fit(module, tiny.loader("vit"), tiny.loader("vit"))
        return baseline

    wide, narrow = rounded(8), rounded(2)
    assert wide.loss_fp == narrow.loss_fp
    assert wide.loss_ptq != narrow.loss_ptq

"""A checkpoint is enough by itself: it loads without arguments, without pickled code, without its source."""

import shutil
from functools import partial

import pytest
import torch

import tiny
import words
from stableqat import ops
from stableqat.cli.main import main
from stableqat.data.tokenizer import train_bpe
from stableqat.modules import LlamaModule
from stableqat.quantizers import DSQ, STE

FAMILIES = ["llama", "vit"]


def fit(module, family, folder, **options):
    trainer = tiny.trainer(max_steps=3, **options)
    data = tiny.loader(family, count=32, batch_size=4)
    trainer.fit(module, data, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def outputs(module, family):
    module.eval()
    batch = tiny.batch(family)
    with torch.no_grad():
        return module(batch["input_ids"] if family == "llama" else batch["pixel_values"])


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("method", ["fp", "dsq", "paretoq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_without_arguments(family, method, tmp_path, monkeypatch):
    module = tiny.module(family, method, scale_lr_multiplier=0.5, skip=["*.1.*"])
    path = fit(module, family, tmp_path)
    # loading never computes a scale that the file holds
    monkeypatch.setattr(ops, "initial_scale", lambda *_: pytest.fail("a scale was initialised"))
    loaded = type(module).load_from_checkpoint(path)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(outputs(loaded, family), outputs(module, family))
    assert loaded.scale_lr_multiplier == 0.5
    assert loaded.skip == module.skip
    assert loaded.describe() == module.describe()


@pytest.mark.parametrize("family", FAMILIES)
def test_hyperparameters_are_plain(family, tmp_path):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "quantizer": partial(DSQ, bits=3, a=0.3)}
    saved = torch.load(fit(tiny.module(family, **options), family, tmp_path), weights_only=True)
    kept = saved["hyper_parameters"]
    assert plain(kept)
    assert kept["quantizer"] == {
        "class_path": "stableqat.quantizers.dsq.DSQ",
        "init_args": {"bits": 3, "a": 0.3},
    }
    assert kept["optimizer"] == {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}}


def test_what_cannot_be_plain_is_left_out_and_can_be_given_again(tmp_path):
    """A lambda has no name to be found under: pickling it would tie the file to code."""
    module = tiny.module("llama", quantizer=lambda weight: STE(weight, bits=2))
    path = fit(module, "llama", tmp_path)
    assert "quantizer" not in torch.load(path, weights_only=True)["hyper_parameters"]
    loaded = LlamaModule.load_from_checkpoint(path, quantizer=partial(STE, bits=2))
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


def test_optimizer_states_are_kept_by_name(tmp_path):
    """Processes number parameters in orders of their own."""
    module = tiny.module("vit", "dsq")
    [state] = torch.load(fit(module, "vit", tmp_path), weights_only=True)["optimizer_states"]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert state["state"].keys() == trained
    assert {name for group in state["param_groups"] for name in group["params"]} == trained
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    assert all(moments["exp_avg"].shape == shapes[name] for name, moments in state["state"].items())


@pytest.mark.filterwarnings("ignore:You're resuming")
def test_learned_scales_are_resumed_not_initialised(tmp_path):
    """From the latent weights alone the scales would come out otherwise."""
    options = {"optimizer": partial(torch.optim.AdamW, lr=3e-2)}
    path = fit(tiny.module("llama", "dsq", **options), "llama", tmp_path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    learned = {name: value for name, value in saved.items() if name.endswith(("quantizer.scale", "a_logit"))}

    module = tiny.module("llama", "dsq", **options)
    seen = {}

    class Start(tiny.Losses):
        def on_train_start(self, trainer, pl_module):
            seen.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    data = tiny.loader("llama", count=32, batch_size=4)
    tiny.trainer(max_steps=4, callbacks=[Start()]).fit(module, data, data, ckpt_path=path, weights_only=True)
    assert all(torch.equal(seen[name], value) for name, value in learned.items())

    fresh = tiny.module("llama", "dsq", init_from=str(path))
    fresh.configure_model()
    assert not any(torch.equal(fresh.state_dict()[name], value) for name, value in learned.items())


@pytest.fixture
def folder(tmp_path):
    """A transformers model on disk, as it comes from the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"} | {"vocab_size": 512}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **keys))
    model.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.mark.parametrize("key", ["init_from", "config"])
def test_the_original_folder_may_be_deleted(key, folder, tmp_path):
    module = LlamaModule(**{key: str(folder)}, quantizer=partial(STE, bits=2))
    path = fit(module, "llama", tmp_path)
    shutil.rmtree(folder)
    loaded = LlamaModule.load_from_checkpoint(path)
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))
    assert loaded.config.to_dict() == module.config.to_dict()
    assert loaded.init_from is None


def test_a_run_of_the_command_outlives_its_original_folder(folder, tmp_path, monkeypatch):
    """It resumes by the same command, and its checkpoint loads in Python."""
    monkeypatch.chdir(tmp_path.parents[0])
    train_bpe(words.DOCUMENTS, 300).save_pretrained(folder)
    settings = f"""
        --model stableqat.modules.LlamaModule --model.init_from {folder} --data stableqat.data.TextDataModule
        --data.vocab_size 512 --data.block_size 16 --data.batch_size 2 --trainer.accelerator cpu
        --model.quantizer stableqat.quantizers.DSQ --model.quantizer.bits 2 --trainer.limit_val_batches 1
        --trainer.enable_progress_bar false --trainer.enable_model_summary false
        --trainer.logger.save_dir {tmp_path} --trainer.logger.name runs --trainer.logger.version one
    """.split()
    assert main(["fit", *settings, "--trainer.max_steps", "2"]) == 0
    shutil.rmtree(folder)
    last = tmp_path / "runs" / "one" / "checkpoints" / "last.ckpt"
    assert plain(torch.load(last, weights_only=True)["hyper_parameters"])
    before = LlamaModule.load_from_checkpoint(last).state_dict()
    assert main(["fit", *settings, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    after = torch.load(last, weights_only=True)
    assert after["global_step"] == 3
    assert before.keys() == after["state_dict"].keys()

"""Start from anything: a run, a checkpoint, a folder of transformers, a weight file of timm."""

import logging
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

import tiny
from stableqat.checkpoints.names import find_checkpoint
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.modules import LlamaModule
from stableqat.quantizers import STE
from stableqat.runs import open_run
from stableqat.surgery import quantize_linears

FAMILIES = ["llama", "vit"]


@pytest.fixture
def run(tmp_path):
    """A run's folder, made in full precision from weights that no fresh model has."""

    def make(family: str, method: str = "fp") -> Path:
        module = tiny.module(family, method)
        trainer = tiny.trainer(max_steps=2)
        trainer.fit(module, tiny.loader(family), tiny.loader(family))
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
        return tmp_path / "run"

    return make


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}


@pytest.mark.parametrize("part", [".", "checkpoints/last.ckpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_run_or_its_checkpoint(family, part, run):
    folder = run(family)
    module = tiny.configured(family, "fp", seed=5, init_from=str(folder / part))
    expected = weights_of(folder)
    assert all(torch.equal(value, expected[name]) for name, value in module.model.state_dict().items())


@pytest.mark.parametrize("method", ["ste", "paretoq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantizers_are_initialised_from_the_loaded_weights(family, method, run):
    """What is evaluated before training is round-to-nearest of those weights: the PTQ arm."""
    folder = run(family)
    module = tiny.configured(family, method, seed=5, init_from=str(folder))
    plain = tiny.module(family, "fp").build_model()
    plain.load_state_dict(weights_of(folder))
    quantize_linears(plain, tiny.METHODS[method], module.skip)
    assert plain.state_dict().keys() == module.model.state_dict().keys()
    assert all(
        torch.equal(value, plain.state_dict()[name]) for name, value in module.model.state_dict().items()
    )


def test_latent_weights_of_a_quantized_run_are_taken_and_said_so(run, caplog):
    folder = run("llama", "dsq")
    with caplog.at_level(logging.WARNING):
        module = tiny.configured("llama", "fp", init_from=str(folder))
    assert "latent weights" in caplog.text
    expected = {name: value for name, value in weights_of(folder).items() if "quantizer" not in name}
    assert all(torch.equal(value, expected[name]) for name, value in module.model.state_dict().items())


def test_a_language_model_takes_its_architecture_from_its_start(run):
    module = LlamaModule(init_from=str(run("llama")))
    assert (module.config.hidden_size, module.config.vocab_size) == (32, 64)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_from_a_folder_of_transformers(model_type, tied, tmp_path):
    """The hub's files hold bfloat16; masters are float32, of the very same values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"} | {
        "tie_word_embeddings": tied,
        "num_key_value_heads": 2,  # Qwen3 supposes 32
    }
    torch.manual_seed(3)
    original = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **keys), dtype=torch.bfloat16
    )
    original.save_pretrained(tmp_path)
    assert "bfloat16" in (tmp_path / "config.json").read_text()

    module = tiny.configured("llama", "ste", config=None, init_from=str(tmp_path))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(buffer.dtype == torch.float32 for buffer in module.model.buffers())
    expected = original.state_dict()
    loaded = {name: value for name, value in module.model.state_dict().items() if "quantizer" not in name}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in loaded.items())
    embedding, head = module.model.get_input_embeddings(), module.model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert module.model.training


def test_the_file_of_the_published_model_reloads_in_transformers(run, tmp_path):
    """The full-precision weights of a checkpoint are the stock model's own."""
    from transformers import AutoModelForCausalLM

    module = tiny.configured("llama", "fp", init_from=str(run("llama")))
    module.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    batch = tiny.batch("llama")
    with torch.no_grad():
        assert torch.equal(again.eval()(batch["input_ids"]).logits, module.eval()(batch["input_ids"]))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_from_a_weight_file_of_timm(suffix, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    original = timm.create_model("vit_tiny_patch16_224", num_classes=10, **tiny.VIT).state_dict()
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(original, path)
    else:
        save_file(original, path)
    for source in (path, tmp_path):
        module = tiny.configured("vit", quantizer=partial(STE, bits=2), init_from=str(source))
        loaded = {name: value for name, value in module.model.state_dict().items() if "quantizer" not in name}
        assert all(torch.equal(value, original[name]) for name, value in loaded.items())
        assert loaded.keys() == original.keys()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *product(["llama/model.safetensors", "vit.safetensors", "vit.pth"], [0, 0.5, 0.99]),
        ("llama/pytorch_model.bin", 0),
    ],
)
def test_a_weight_file_cut_short_is_one_line(name, kept, tmp_path):
    from safetensors.torch import save_file

    path, family = tmp_path / name, Path(name).parts[0].split(".")[0]
    model = tiny.module(family, "fp").build_model()
    if family == "llama":
        model.save_pretrained(path.parent)
        (path.parent / "model.safetensors").rename(path)
    else:
        (torch.save if path.suffix == ".pth" else save_file)(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    source = path.parent if family == "llama" else path
    with pytest.raises(
        UserError, match=rf"^init_from: .*{source.name}.* damaged.*; take another copy$"
    ) as error:
        tiny.configured(family, "fp", init_from=str(source))
    assert "\n" not in str(error.value)


def test_a_weight_file_of_another_architecture_is_not_said_to_be_damaged(tmp_path):
    state = tiny.module("vit", "fp").build_model().state_dict()
    torch.save({**state, "norm.bias": torch.ones(5)}, path := tmp_path / "vit.pth")
    with pytest.raises(UserError, match=rf"^{path}: weights of another architecture: norm\.bias has shape"):
        tiny.configured("vit", "fp", init_from=str(path))


def test_a_run_without_a_last_checkpoint_is_refused(tmp_path):
    """Also where its best one would do; whoever takes that looks for it first."""
    (tmp_path / "checkpoints").mkdir()
    for find in (find_checkpoint, open_run):
        with pytest.raises(UserError, match=r"holds no checkpoints/last\.ckpt or best\.ckpt; let it train"):
            find(str(tmp_path))
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.touch()
    with pytest.raises(UserError, match=r"holds no checkpoints/last\.ckpt; name its best\.ckpt"):
        find_checkpoint(str(tmp_path))
    assert find_checkpoint(str(best)) == open_run(str(tmp_path)).checkpoint == best


def test_a_pickled_model_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": {}, "trap": Trap()}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth"):
        tiny.configured("vit", "fp", init_from=str(tmp_path / "model.pth"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("last.ckpt/.metadata", "run: a run's folder; name a checkpoint: stableqat consolidate run/{}"),
        ("last.ckpt", "run/{}: not a sharded checkpoint, but one file already; use it as it is"),
        (None, "run: the run holds no {} or best.ckpt; let it train first"),
    ],
)
def test_consolidate_says_what_to_type_for_the_folder_of_a_run(last, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    if last is not None:
        Path("run/checkpoints", last).parent.mkdir(exist_ok=True)
        Path("run/checkpoints", last).touch()
    assert main(["consolidate", "run"]) == 2
    assert capsys.readouterr().err == f"stableqat: {told.format('checkpoints/last.ckpt')}\n"

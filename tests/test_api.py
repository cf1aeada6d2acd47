"""QAT for trainers that are not ours: prepare, train, convert, and every example of the documentation."""

import copy
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

import stableqat
import tiny
from stableqat.callbacks import HoldWeights
from stableqat.data.tokenizer import load_tokenizer, train_bpe
from stableqat.errors import UserError
from stableqat.layers.calibration import uncalibrated
from stableqat.layers.embedding import QuantEmbedding
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import DSQ, STE, StableQAT
from stableqat.quantizers.inputs import LSQ

ROOT = Path(__file__).parents[1]
METHODS = ["ste", "dsq", "paretoq", "stableqat"]
ROWS = [{"input_ids": tiny.tokens(row), "labels": tiny.tokens(row)} for row in range(16)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama(**options) -> LlamaForCausalLM:
    config = {key: value for key, value in tiny.LLAMA.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**{**config, "use_cache": False, **options}))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **tiny.VIT)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        if isinstance(model, LlamaForCausalLM):
            return model(torch.stack([row["input_ids"] for row in ROWS[:4]])).logits
        return model(torch.stack([tiny.pixels(row) for row in range(4)]))


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps, so that scales and weights are no longer where they began."""
    optimizer = torch.optim.AdamW(stableqat.parameter_groups(model, lr=3e-3))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.stack([row["input_ids"] for row in ROWS])
        out = model(batch).logits[:, :-1] if isinstance(model, LlamaForCausalLM) else None
        if out is not None:
            loss = F.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())
        else:
            images = torch.stack([tiny.pixels(row) for row in range(8)])
            loss = F.cross_entropy(model(images), torch.arange(8))
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("build", [llama, vit])
@pytest.mark.parametrize("method", METHODS)
def test_converted_is_the_trained_model_bit_for_bit_and_plain(build, method):
    model = build()
    kinds = [type(m) for m in model.modules()]
    assert stableqat.prepare(model, method, bits=2) is model
    assert len(quantized_layers(model)) == (14 if build is llama else 8)
    train(model)
    expected = logits(model)
    plain = copy.deepcopy(model)
    assert stableqat.convert(plain) is plain
    assert torch.equal(logits(plain), expected)
    assert [type(m) for m in plain.modules()] == kinds
    assert not any("quantizer" in key for key in plain.state_dict())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    for name, layer in quantized_layers(model).items():
        assert torch.equal(plain.get_submodule(name).weight, layer.weight_quantizer(layer.weight))
        assert 1 < len(plain.get_submodule(name).weight[0].unique()) <= 4

    with torch.no_grad():  # the copy was converted, the model still trains
        assert torch.equal(logits(model), expected)
    before = model.state_dict()[f"{name}.weight"].clone()
    train(model, 1)
    assert not torch.equal(model.get_submodule(name).weight, before)


def test_converted_under_autocast_too():
    model = stableqat.prepare(llama(), "stableqat", bits=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
        assert torch.equal(logits(stableqat.convert(model)), expected)


def test_what_convert_saves_loads_in_transformers(tmp_path):
    model = stableqat.prepare(llama(), "paretoq", bits=2)
    train(model)
    expected = logits(model)
    stableqat.convert(model).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["save_pretrained", "state_dict"])
def test_a_state_dict_goes_into_a_model_prepared_alike(method, how, tmp_path):
    model = stableqat.prepare(llama(), method, bits=2, group_size=16)
    train(model)
    if how == "save_pretrained":
        from safetensors.torch import load_file

        model.save_pretrained(tmp_path)
        state, strict = load_file(tmp_path / "model.safetensors"), False  # a tied head is saved once
    else:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        state, strict = torch.load(tmp_path / "model.pt", weights_only=True), True
    torch.manual_seed(1)
    again = stableqat.prepare(llama(), method, bits=2, group_size=16)
    assert not torch.equal(logits(again), logits(model))
    missing, unexpected = again.load_state_dict(state, strict=strict)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "quantizer", ["StableQAT", StableQAT, partial(StableQAT, amplitude=0.1), "stableqat"]
)
def test_a_method_by_name_by_class_or_with_options(quantizer):
    model = stableqat.prepare(llama(), quantizer, bits=3, skip=["lm_head", "*.0.mlp.*"])
    layers = quantized_layers(model)
    assert len(layers) == 11
    assert "model.layers.0.mlp.up_proj" not in layers
    for layer in layers.values():
        assert type(layer.weight_quantizer) is StableQAT
        assert layer.weight_quantizer.bits == 3
        assert layer.weight_quantizer.surrogate.amplitude == (0.1 if isinstance(quantizer, partial) else 0.21)


@pytest.mark.parametrize(
    ("again", "key"),
    [
        ({"quantizer": "stableqat", "bits": 4}, "method STE instead of StableQAT"),
        ({"bits": 4}, "bits 2 instead of 4"),
    ],
)
def test_preparing_otherwise_is_refused(again, key):
    model = stableqat.prepare(llama(), "ste", bits=2)
    layers = quantized_layers(model)
    with pytest.raises(
        UserError, match=f"^layer model.layers.0.self_attn.q_proj: quantized already, with {key};"
    ):
        stableqat.prepare(model, **{"quantizer": "ste", **again})
    assert quantized_layers(model) == layers
    module = Foreign()
    lightning(1).fit(module, samples())
    with pytest.raises(UserError, match="method DSQ instead of STE"):
        lightning(1, callbacks=[stableqat.PrepareQAT("ste", skip="net.4", bits=2)]).fit(module, samples())


def test_one_pattern_may_be_a_string():
    model = stableqat.prepare(llama(), "ste", skip="lm_head", bits=2)
    assert (
        quantized_layers(model).keys() == quantized_layers(stableqat.prepare(llama(), "ste", bits=2)).keys()
    )


class Adapter(nn.Module):
    """As peft builds it."""

    def __init__(self, base: nn.Linear | None = None) -> None:
        super().__init__()
        self.base_layer = base or nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_not_quantized_and_merging_them_afterwards_is_warned_of(caplog):
    model = nn.Sequential(Adapter(), nn.ReLU(), Adapter())
    with pytest.raises(
        UserError, match=r"^layer 0\.lora_A\.default: an adapter, .*: skip lora_A, lora_B and the heads$"
    ):
        stableqat.prepare(model, bits=2)
    stableqat.prepare(model, bits=2, skip="lora_*")
    assert list(quantized_layers(model)) == ["0.base_layer", "2.base_layer"]
    stableqat.convert(model)
    assert "0 has an adapter: keep it apart" in caplog.text


def test_adapters_train_beside_the_layers_of_a_prepared_model():
    model = stableqat.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), bits=2)
    for name, layer in quantized_layers(model).items():
        layer.requires_grad_(False)
        model.set_submodule(name, Adapter(layer))
    optimizer = torch.optim.AdamW(stableqat.parameter_groups(model, lr=1e-2))
    x = torch.randn(4, 8)
    before = model(x)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x)
    assert trained.square().sum() < before.square().sum()
    assert torch.equal(stableqat.convert(model)(x), trained)
    assert len(model[0].base_layer.weight.unique(dim=1)[0].unique()) <= 4


class WeightNormed(Adapter):
    """As peft's DoRA: a magnitude over the norm of the weight and what the adapter adds to it."""

    def __init__(self, base: nn.Linear | None = None) -> None:
        super().__init__(base)
        self.lora_magnitude_vector = nn.ModuleDict({"default": nn.Linear(8, 1, bias=False)})

    def forward(self, x):
        norm = self.base_layer.weight.norm(dim=1)
        return self.lora_magnitude_vector["default"].weight / norm * super().forward(x)


def test_an_adapter_that_was_trained_on_latent_weights_is_not_converted():
    x = torch.randn(4, 8)
    first = nn.Sequential(WeightNormed(), nn.ReLU(), WeightNormed())
    stableqat.prepare(first, bits=2, skip="lora_*", example_inputs=x)
    expected = first(x)
    assert torch.equal(stableqat.convert(first)(x), expected)
    last = stableqat.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), bits=2)
    for name, layer in quantized_layers(last).items():
        last.set_submodule(name, WeightNormed(layer))
    with pytest.raises(
        UserError, match=r"^layer 0: its adapter was trained on the latent weight, .* prepared"
    ):
        stableqat.convert(last)
    assert len(quantized_layers(last)) == 2


def test_prepare_records_the_grids_and_convert_keeps_them():
    model = stableqat.prepare(llama(), {"*.mlp.*": "dsq", "*": partial(StableQAT, bits=4)}, bits=2)
    record = model.config.stableqat
    assert [(kind["method"], kind["bits"]) for kind in record] == [("StableQAT", 4), ("DSQ", 2)]
    names = [name for kind in record for name in kind["layers"]]
    assert sorted(names) == sorted(quantized_layers(model))
    assert stableqat.convert(model).config.stableqat == record
    refused = llama()
    with pytest.raises(UserError):
        stableqat.prepare(refused, bits=2, skip="nothing")
    assert not hasattr(refused.config, "stableqat")


MIXTURE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**MIXTURE, num_local_experts=3),
    "qwen3_moe": lambda: Qwen3MoeConfig(**MIXTURE, moe_intermediate_size=8, num_experts=3),
    "gpt_oss, transposed": lambda: GptOssConfig(
        **MIXTURE, head_dim=8, num_local_experts=3, pad_token_id=0, eos_token_id=1
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_fused_experts_are_quantized_a_scale_for_each_expert_and_row(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[kind]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    plain, ids = copy.deepcopy(model), torch.arange(24).reshape(2, 12)
    keys = set(model.state_dict())
    stableqat.prepare(model, "stableqat", bits=2)
    experts = model.model.layers[0].mlp.experts
    latent = {name: p for name, p in experts.named_parameters(recurse=False) if p.ndim == 3}
    assert latent.keys() == {"gate_up_proj", "down_proj"}
    model(input_ids=ids).logits.square().sum().backward()
    for name, weight in latent.items():
        quantizer = experts.get_submodule(f"{name}_quantizer")
        transposed = weight.transpose(1, 2) if experts.is_transposed else weight
        assert quantizer.scale.shape == (transposed.shape[0] * transposed.shape[1], 1)
        assert quantizer.scale.grad.abs().sum() > 0
        assert weight.grad.abs().sum() > 0
        assert getattr(experts, name) is weight
    groups = {group["name"]: group["params"] for group in stableqat.parameter_groups(model)}
    assert any(p is experts.down_proj_quantizer.scale for p in groups["scales"])
    fresh = stableqat.prepare(copy.deepcopy(plain), "stableqat", bits=2)
    fresh.load_state_dict(model.state_dict())

    deployed = stableqat.convert(copy.deepcopy(model)).eval()
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits
        assert torch.equal(found, deployed(input_ids=ids).logits)
        assert (found - plain.eval()(input_ids=ids).logits).abs().max() > 1e-3
    assert set(deployed.state_dict()) == keys
    for name in latent:
        weight = getattr(deployed.model.layers[0].mlp.experts, name).detach()
        rows = (weight.transpose(1, 2) if experts.is_transposed else weight).flatten(0, 1)
        assert all(len(row.unique()) <= 4 for row in rows)


def test_fused_experts_may_be_skipped_and_are_named_with_their_share(caplog):
    model = AutoModelForCausalLM.from_config(MIXTURES["mixtral"]())
    stableqat.prepare(model, "stableqat", bits=2, skip=["experts", "lm_head"])
    assert not any("quantizer" in name for name, _ in model.model.layers[0].mlp.named_modules())
    assert "less than half of the model is quantized" in caplog.text
    assert "model.layers.0.mlp.experts (7" in caplog.text


def test_a_model_of_which_nothing_can_be_quantized_is_refused():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(UserError, match=r"none of the model's weights .* a Doubled, not a plain Linear"):
        stableqat.prepare(nn.Sequential(Doubled(4, 4), nn.Conv1d(4, 4, 1)), bits=2)


def test_falcons_layers_are_quantized():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    plain = copy.deepcopy(model)
    stableqat.prepare(model, "stableqat", bits=2)
    assert len(quantized_layers(model)) == 4
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_preparing_twice_changes_nothing():
    model = stableqat.prepare(llama(), bits=2)
    layers = quantized_layers(model)
    stableqat.prepare(model, bits=2)
    assert quantized_layers(model) == layers


def headless() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())


def twins() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


MISTAKES = {
    "unknown method": (llama, {"quantizer": "stabelqat", "bits": 2}, "did you mean stableqat"),
    "no bits": (llama, {}, "bits: missing"),
    "an unknown option": (
        llama,
        {"quantizer": "ste", "bits": 2, "foo": 1},
        "foo: STE has no such option; choose",
    ),
    "a misspelt option": (
        llama,
        {"quantizer": DSQ, "bit": 2},
        "bit: DSQ has no such option; did you mean bits",
    ),
    "an option of another method": (
        llama,
        {"quantizer": partial(STE, bits=2), "amplitude": 0.1},
        "amplitude: STE has no such option",
    ),
    "an instance": (llama, {"quantizer": STE(torch.ones(2, 2), bits=2)}, "the class STE"),
    "a factory of something else": (
        llama,
        {"quantizer": lambda weight: torch.nn.Identity()},
        "q_proj: quantizer: the factory returns Identity; it must return a Quantizer",
    ),
    "a pattern that matches nothing": (llama, {"bits": 2, "skip": ["lm_haed"]}, "lm_haed matches no"),
    "nothing left": (llama, {"bits": 2, "skip": ["*"]}, "none of the 15 linear layers"),
    "no linear layer": (headless, {"bits": 2}, "the model has no linear layer"),
    "a head tied to its embedding": (llama, {"bits": 2, "skip": []}, "embed_tokens has the same weight"),
    "two layers with one weight": (
        twins,
        {"bits": 2},
        "layer 0: 1 has the same weight and would keep using its latent values; add 0 to skip",
    ),
    "groups that do not fit every layer": (
        partial(llama, intermediate_size=48),
        {"bits": 2, "group_size": 32},
        r"layers\.0\.mlp\.down_proj: group_size: 32 does not divide",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_model_as_it_was(mistake):
    build, options, message = MISTAKES[mistake]
    model = build()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=message) as error:
        stableqat.prepare(model, **options)
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == kinds


def test_nothing_to_convert_is_said():
    with pytest.raises(UserError, match="prepare it first"):
        stableqat.convert(llama())


def test_a_tied_head_and_its_embedding_become_plain_and_stay_tied():
    module = tiny.configured("llama", skip=[])
    model = module.model
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    weight, expected = model.lm_head.weight, logits(model)
    stableqat.convert(module)
    embedding = model.get_input_embeddings()
    assert type(embedding) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert embedding.weight is model.lm_head.weight is weight
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == llama().state_dict().keys()


def test_half_precision_masters_are_warned_of(caplog):
    stableqat.prepare(llama().bfloat16(), bits=2)
    assert "load them as float32" in caplog.text


def test_parameter_groups_divide_every_trainable_parameter_once():
    model = stableqat.prepare(nn.ModuleDict({"vit": vit(), "norm": nn.LayerNorm(4)}), DSQ, bits=2)
    model.vit.cls_token.requires_grad_(False)
    groups = {group["name"]: group for group in stableqat.parameter_groups(model, lr=1e-2)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 1e-2,
        "scales": 1e-3,
        "norms_and_biases": 1e-2,
    }
    assert [group.get("weight_decay") for group in groups.values()] == [None, 0.0, 0.0]
    assert len(groups["scales"]["params"]) == 2 * len(quantized_layers(model))  # scale and a_logit
    together = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rest = {id(p) for p in groups["norms_and_biases"]["params"]}
    assert id(model.vit.pos_embed) in rest  # timm names it, a module below the root
    assert id(model.vit.patch_embed.proj.weight) not in rest
    assert all("lr" not in group for group in stableqat.parameter_groups(model))


# -- trainers -----------------------------------------------------------------------------------


def hf_trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    model = stableqat.prepare(llama(), "dsq", bits=2)
    optimizer = torch.optim.AdamW(stableqat.parameter_groups(model, lr=3e-3))
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=ROWS, optimizers=(optimizer, None))


def test_transformers_trainer_resumes_exactly(tmp_path):
    whole = hf_trainer(tmp_path / "whole", 6)
    whole.train()
    hf_trainer(tmp_path / "cut", 3).train()
    resumed = hf_trainer(tmp_path / "cut", 6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    assert rates == pytest.approx([3e-3, 3e-4, 3e-3])


class Foreign(L.LightningModule):
    """Knows nothing of quantization but its optimizer's groups."""

    def __init__(self, late: bool = False, groups: bool = True) -> None:
        super().__init__()
        self.net: nn.Module | None = None if late else self.build()
        self.groups = groups

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        self.net = self.net or self.build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        self.before = [p.detach().clone() for p in self.parameters()]
        parameters = (
            stableqat.parameter_groups(self, lr=1e-2) if self.groups else list(self.net[4].parameters())
        )
        return torch.optim.AdamW(parameters)


def samples(batch_size: int = 6) -> DataLoader:
    x = torch.linspace(-1, 1, 24 * 8).sin().reshape(24, 8)
    return DataLoader([(row, torch.tensor(n % 4)) for n, row in enumerate(x)], batch_size=batch_size)


def lightning(steps: int, **options) -> L.Trainer:
    callback = stableqat.PrepareQAT("dsq", skip=["net.4"], bits=2)
    return tiny.trainer(**{"max_steps": steps, "callbacks": [callback], "limit_val_batches": 4, **options})


@pytest.mark.parametrize("late", [False, True])
def test_the_callback_trains_a_foreign_module(late):
    torch.manual_seed(0)
    module = Foreign(late)
    lightning(4).fit(module, samples())
    assert list(quantized_layers(module)) == ["net.0", "net.2"]
    trainable = [p.requires_grad for p in module.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), module.before, strict=True)]
    assert moved == trainable  # all but the floors
    assert "configure_model" not in vars(module)
    lightning(2).fit(module, samples())  # a second trainer finds it prepared
    assert list(quantized_layers(module)) == ["net.0", "net.2"]


@pytest.mark.parametrize("late", [False, True])
def test_the_callback_resumes_exactly(late, tmp_path):
    batches = samples(24)  # one: where in its epoch a plain loader resumes is not the question
    torch.manual_seed(0)
    whole = Foreign(late)
    lightning(8).fit(whole, batches)

    torch.manual_seed(0)
    first = lightning(4)
    first.fit(Foreign(late), batches)
    first.save_checkpoint(tmp_path / "cut.ckpt")
    torch.manual_seed(1)
    resumed = Foreign(late)
    lightning(8).fit(resumed, batches, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())

    read = stableqat.prepare(Foreign(), "dsq", skip=["net.4"], bits=2)
    read.load_state_dict(torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"])


@pytest.mark.parametrize("how", ["batches", "function"])
def test_the_callback_calibrates_inputs_and_resumes_exactly(how, tmp_path):
    """Its first step is that of a module which was prepared and calibrated by hand."""
    batches = samples(24)
    x = next(iter(batches))[0]
    runs = []

    def run(module):
        runs.append(module.training)
        return module.net(x)

    given = [x] if how == "batches" else run
    inputs = partial(LSQ, bits=4)

    def fit(steps, seed, **options):
        torch.manual_seed(seed)
        module = Foreign()
        made = {"skip": ["net.4"], "bits": 2, "input_quantizer": inputs, "calibration": given}
        trainer = lightning(steps, callbacks=[stableqat.PrepareQAT("dsq", **made)], limit_val_batches=0)
        trainer.fit(module, batches, **options)
        return module, trainer

    whole, _ = fit(4, 0)
    torch.manual_seed(0)
    by_hand = stableqat.prepare(
        Foreign(), "dsq", ["net.4"], bits=2, input_quantizer=inputs, calibration=given
    )
    started = {name: p.clone() for name, p in by_hand.named_parameters()}
    tiny.trainer(max_steps=4).fit(by_hand, batches)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in by_hand.state_dict().items())
    scales = [f"net.{i}.input_quantizer.scale" for i in (0, 2)]
    assert all(started[name] != expected[name] for name in scales)  # they learn

    _, first = fit(2, 0)
    first.save_checkpoint(tmp_path / "cut.ckpt")
    before = len(runs)
    resumed, _ = fit(4, 1, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert len(runs) == before
    assert not any(runs)  # in evaluation mode
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_calibration_needs_what_it_calibrates():
    for make in (partial(stableqat.prepare, Foreign()), stableqat.PrepareQAT):
        with pytest.raises(UserError, match=r"calibration: .* name an input_quantizer"):
            make("dsq", bits=2, calibration=[torch.zeros(1, 8)])
    model, nan = Foreign(), [torch.full((1, 8), torch.nan)]
    with pytest.raises(UserError, match=r"layer net.0: NaN or infinity"):
        stableqat.prepare(model, "dsq", bits=2, input_quantizer=partial(LSQ, bits=4), calibration=nan)
    assert not quantized_layers(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    module = Foreign()
    callback = stableqat.PrepareQAT("dsq", bits=2, input_quantizer=partial(LSQ, bits=4))
    with pytest.raises(UserError, match="give PrepareQAT a calibration"):
        lightning(1, callbacks=[callback]).fit(module, samples())


def test_the_callback_computes_weights_once_an_evaluation(computed):
    module = Foreign()
    trainer = lightning(1)
    trainer.validate(module, samples(), verbose=False)
    assert len(computed) == 2  # layers, for four batches
    loss = trainer.callback_metrics["val/loss"]
    stableqat.convert(module)
    trainer = tiny.trainer(limit_val_batches=4)
    trainer.validate(module, samples(), verbose=False)
    assert torch.equal(trainer.callback_metrics["val/loss"], loss)


def test_two_callbacks_mix_bits():
    narrow = stableqat.PrepareQAT("ste", bits=2, skip=["net.0", "net.4"])
    wide = stableqat.PrepareQAT("ste", bits=4, skip=["net.2", "net.4"])
    module = Foreign()
    lightning(2, callbacks=[narrow, wide]).fit(module, samples())
    bits = {name: layer.weight_quantizer.bits for name, layer in quantized_layers(module).items()}
    assert bits == {"net.0": 4, "net.2": 2}
    assert "configure_model" not in vars(module)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("late", [False, True])
def test_weights_are_averaged_after_they_are_prepared(late):
    """Over all steps, scales too; a copy of what is not yet quantized would be of another shape."""
    taken = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            taken.append([parameter.detach().clone() for parameter in module.parameters()])

    callbacks = [stableqat.PrepareQAT("dsq", skip=["net.4"], bits=2), Steps(), WeightAveraging()]
    module = Foreign(late)
    lightning(4, callbacks=callbacks).fit(module, samples())
    assert list(quantized_layers(module)) == ["net.0", "net.2"]
    for ended, *steps in zip(module.parameters(), *taken, strict=True):
        torch.testing.assert_close(ended.detach(), torch.stack(steps).mean(0))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_a_validation_sees_the_averaged_weights():
    """They are swapped in by a callback after PrepareQAT, in a way that leaves no trace in the tensors."""
    module = Foreign()
    losses = []

    class Losses(L.Callback):
        def on_validation_epoch_end(self, trainer, module):
            plain = stableqat.convert(copy.deepcopy(module.net))
            x, y = next(iter(samples()))
            losses.append((trainer.callback_metrics["val/loss"], F.cross_entropy(plain(x), y)))

    callbacks = [stableqat.PrepareQAT("dsq", skip=["net.4"], bits=2), Losses(), WeightAveraging()]
    trainer = lightning(4, callbacks=callbacks, limit_val_batches=1)
    trainer.fit(module, samples(), samples())
    for seen, expected in losses:
        torch.testing.assert_close(seen, expected)
    assert sum(type(callback) is HoldWeights for callback in trainer.callbacks) == 1


AVERAGING = [
    ([EMAWeightAveraging, "PrepareQAT"], "EMAWeightAveraging copies .*; put it after PrepareQAT"),
    ([WeightAveraging, "PrepareQAT"], "WeightAveraging copies .*; put it after PrepareQAT"),
    (
        ["PrepareQAT", EMAWeightAveraging, "PrepareQAT"],
        "EMAWeightAveraging copies .*; put it after PrepareQAT",
    ),
    (["PrepareQAT", SWA], "StochasticWeightAveraging copies .*; take WeightAveraging or EMA"),
    ([SWA, "PrepareQAT"], "StochasticWeightAveraging copies .*; take WeightAveraging or EMA"),
]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(("order", "line"), AVERAGING)
@pytest.mark.parametrize("late", [False, True])
def test_a_callback_that_copies_what_is_not_prepared_is_refused(order, line, late):
    made = {"PrepareQAT": lambda: stableqat.PrepareQAT("dsq", skip=["net.4"], bits=2), SWA: lambda: SWA(1e-2)}
    callbacks = [made.get(each, each)() for each in order]
    with pytest.raises(UserError, match=f"^PrepareQAT: {line}"):
        lightning(-1, max_epochs=2, callbacks=callbacks).fit(Foreign(late), samples())


def test_a_run_that_ended_before_it_began_leaves_the_module_as_it_was():
    class Fails(Foreign):
        def setup(self, stage):
            raise OSError("no data")

    module = Fails()
    with pytest.raises(OSError, match="no data"):
        lightning(2).fit(module, samples())
    assert "configure_model" not in vars(module)
    module.setup = lambda stage: None
    lightning(2, callbacks=[stableqat.PrepareQAT("ste", skip=["net.4"], bits=4)]).fit(module, samples())
    bits = [layer.weight_quantizer.bits for layer in quantized_layers(module).values()]
    assert bits == [4, 4]


def test_a_converted_module_is_evaluated_as_it_is_and_trained_anew():
    module, trainer = Foreign(), lightning(2)
    trainer.fit(module, samples())
    trainer.validate(module, samples(), verbose=False)
    loss = trainer.callback_metrics["val/loss"]
    plain = stableqat.convert(copy.deepcopy(module))
    stableqat.convert(module.net)
    for converted in (module, plain):
        trainer.validate(converted, samples(), verbose=False)
        assert not quantized_layers(converted)
        assert torch.equal(trainer.callback_metrics["val/loss"], loss)
    lightning(2).fit(plain, samples())
    assert list(quantized_layers(plain)) == ["net.0", "net.2"]


@pytest.mark.parametrize("where", ["forward", "training_step"])
def test_a_weight_that_the_module_reads_itself_is_shown_or_refused(where):
    class Reads(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4, bias=False)

        def read(self, x):
            return F.linear(self.net(x), self.out.weight)

        def forward(self, x):
            return self.read(x) if where == "forward" else self.net(x)

        def training_step(self, batch, batch_idx):
            made = self(batch[0]) if where == "forward" else self.read(batch[0])
            return F.cross_entropy(made, batch[1])

    module, batches = Reads(), samples()
    if where == "training_step":
        with pytest.raises(UserError, match=r"^layer out: its weight is used .* add out to skip$"):
            lightning(2).fit(module, batches)
        return
    lightning(1).fit(module, batches)
    assert module.out.weight_quantizer.scale.grad is not None
    x = next(iter(batches))[0]
    assert torch.equal(module(x), stableqat.convert(copy.deepcopy(module))(x))


def test_an_optimizer_without_the_scales_is_refused():
    with pytest.raises(UserError, match="4 learned parameters of quantizers are in no optimizer"):
        lightning(2).fit(Foreign(groups=False), samples())


# -- the documentation --------------------------------------------------------------------------


def blocks() -> dict[str, str]:
    """Code of the documentation that is for trainers of one's own, by heading."""
    text = (ROOT / "docs" / "trainers.md").read_text()
    return dict(re.findall(r"\n## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", text, re.DOTALL))


def test_there_is_an_example_for_each_trainer():
    trainers = ["transformers' Trainer", "A loop in plain torch", "A LightningModule"]
    assert list(blocks()) == [*trainers, "Activations", "Only the scales"]


def test_the_example_with_activations_runs():
    """It continues that of a LightningModule."""
    code = (blocks()["A LightningModule"] + blocks()["Activations"]).replace("max_epochs=10", "max_epochs=1")
    given = {"batches": DataLoader([(torch.randn(64), torch.tensor(3))] * 4, batch_size=2)}
    exec(compile(code, "docs/trainers.md", "exec"), given)
    module = given["trainer"].lightning_module
    assert not uncalibrated(module)
    assert module.net[0].input_quantizer.bits == 8


def test_the_scales_alone_are_trained():
    model = llama()
    given = {"model": model}
    exec(compile(blocks()["Only the scales"], "docs/trainers.md", "exec"), given)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss.backward()
    given["optimizer"].step()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {f"{name}.weight_quantizer.scale" for name in quantized_layers(model)}


@pytest.mark.parametrize("heading", list(blocks())[:3])
def test_the_documentation_runs(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained(tmp_path / "start")
    train_bpe(["a b"], 257).save_pretrained(tmp_path / "start")
    # as written, but for the size of things
    code = blocks()[heading].replace("meta-llama/Llama-3.2-1B", str(tmp_path / "start"))
    code = code.replace("max_steps=1000", "max_steps=4").replace("max_epochs=10", "max_epochs=1")
    given = {"rows": ROWS}
    if "plain torch" in heading:
        given = {
            "model": vit(),
            "batches": [(torch.stack([tiny.pixels(n)]), torch.tensor([n])) for n in range(3)],
        }
    if "Lightning" in heading:
        given = {"batches": DataLoader([(torch.ones(64), torch.tensor(3))] * 4, batch_size=2)}
    exec(compile(code, "docs/trainers.md", "exec"), given)
    model = given.get("module", given.get("model"))
    assert not quantized_layers(model)
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear)).weight
    assert len(weight[0].unique()) <= (8 if "plain torch" in heading else 4)
    if "Trainer" in heading:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-2bit", dtype=torch.float32)
        assert torch.equal(logits(loaded), logits(model))
        assert load_tokenizer(str(tmp_path / "llama-2bit")).eos_token
    if "plain torch" in heading:
        plain = vit()
        plain.load_state_dict(torch.load("deploy.pt", weights_only=True))
        assert torch.equal(logits(plain), logits(model))

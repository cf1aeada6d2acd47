"""What is quantized is what is called: models that use a weight without calling its layer."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import stableqat
from stableqat import quantize_linears
from stableqat.errors import UserError
from stableqat.layers.hold import hold_weights
from stableqat.layers.linear import quantized_layers
from stableqat.layers.trial import Calls, check_calls, try_calls
from stableqat.modules import ViTModule
from stableqat.quantizers import DSQ, STE

TWO_BITS = partial(DSQ, bits=2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    """Multiplies with the weight of `qkv` itself, as EVA-02 does, unless it is told to call the layer."""

    def __init__(self, calls=False):
        super().__init__()
        self.qkv, self.proj, self.calls = nn.Linear(8, 24, bias=False), nn.Linear(8, 8), calls

    def forward(self, x):
        bias = torch.ones(24, dtype=x.dtype)
        made = self.qkv(x) + bias if self.calls else F.linear(x, weight=self.qkv.weight, bias=bias)
        q, k, v = made.chunk(3, -1)
        return self.proj(q.sigmoid() * k.tanh() + v)


class Net(nn.Module):
    def __init__(self, calls=False, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(calls) for _ in range(2)])
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def rows(*shape):
    return torch.linspace(-2, 2, 8 * 6).sin().reshape(2, 3, 8)


def prepared(**options):
    torch.manual_seed(0)
    return stableqat.prepare(Net(**options), TWO_BITS, example_inputs=rows())


def measured(model, x=None):
    model.zero_grad()
    y = model(rows() if x is None else x)
    y.square().sum().backward()
    return [y.detach(), *[p.grad for p in model.parameters() if p.requires_grad]]


def hooked(model):
    """Names of the modules that wait for a first forward, or show weights."""
    own = ("_FirstForward", "_Shown")
    found = {
        name: [h.__self__ for h in module._forward_pre_hooks.values() if type(h.__self__).__name__ in own]
        for name, module in model.named_modules()
    }
    return [name for name, hooks in found.items() if hooks]


def eva():
    name = "eva02_tiny_patch14_224"
    return timm.create_model(name, num_classes=10, depth=2, img_size=28, embed_dim=48, num_heads=2)


def swin():
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": 4}
    return timm.create_model("swinv2_tiny_window8_256", num_classes=10, **sizes)


def mamba():
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=1, bos_token_id=0, eos_token_id=0))


READERS = {
    "eva02": (eva, torch.linspace(-1, 1, 2 * 3 * 28 * 28).sin().reshape(2, 3, 28, 28), "attn.qkv"),
    "swinv2": (swin, torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32), "attn.qkv"),
    "mamba": (mamba, torch.arange(12).reshape(2, 6), "mixer.dt_proj"),
}


@pytest.mark.parametrize("kind", READERS)
def test_real_models_that_read_weights_compute_with_the_quantized_ones(kind):
    build, x, read = READERS[kind]
    model = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    keys = set(model.state_dict())
    parameters = dict(model.named_parameters())
    stableqat.prepare(model, "stableqat", bits=2)
    layers = quantized_layers(model)
    assert any(name.endswith(read) for name in layers)
    assert {key for key in model.state_dict() if ".weight_quantizer." not in key} == keys
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())

    def out(net):
        made = net(x)
        return getattr(made, "logits", made)

    out(model).square().sum().backward()
    for name, layer in layers.items():
        assert layer.weight_quantizer.scale.grad is not None, name
        assert layer.weight.grad is not None, name
        assert layer.weight is layer._parameters["weight"]
    deployed = stableqat.convert(copy.deepcopy(model))
    for mode in (True, False):
        model.train(mode), deployed.train(mode)
        with torch.no_grad():
            outputs = []
            for net in (model, deployed):
                torch.manual_seed(3)
                outputs.append(out(net))
        assert torch.equal(*outputs)
    assert not hooked(deployed)


@pytest.mark.parametrize("how", ["encoder", "encoder of padded rows", "layer"])
def test_torchs_fused_encoder_computes_with_the_quantized_weights(how):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = (layer if how == "layer" else nn.TransformerEncoder(layer, 2)).eval()
    plain, x = copy.deepcopy(net), torch.randn(3, 5, 16)
    options = {}
    if "padded" in how:
        options["src_key_padding_mask"] = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    stableqat.prepare(net, "stableqat", bits=1)
    deployed = stableqat.convert(copy.deepcopy(net))
    trained = net(x, **options)
    with torch.no_grad():
        assert torch.equal(deployed(x, **options), net(x, **options))
        torch.testing.assert_close(net(x, **options), trained)
        kept = ~options.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
        assert (plain(x, **options) - trained)[kept].abs().max() > 0.1


@pytest.mark.parametrize("mode", ["plain", "checkpointed", "held", "together", "amp"])
def test_a_read_weight_has_the_values_and_gradients_of_a_called_layer(mode, monkeypatch):
    if mode == "together":
        monkeypatch.setattr("stableqat.ops.implementation", lambda *_: "triton")
    reads, calls = (prepared(calls=c, checkpointed=mode == "checkpointed") for c in (False, True))
    assert check_calls(reads, ((rows(),), {})).reads == {f"blocks.{i}": {f"blocks.{i}.qkv"} for i in (0, 1)}
    assert check_calls(calls, ((rows(),), {})).reads == {}
    if mode == "held":
        hold_weights(reads), hold_weights(calls)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "amp"):
        found, expected = measured(reads), measured(calls)
    tolerance = 2e-2 if mode == "amp" else 1e-6
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_model_that_reads_weights_compiles_to_one_graph():
    model = prepared()
    expected = measured(model)
    torch._dynamo.reset()
    whole = torch.__version__ >= (2, 14)  # dynamo breaks the graph at such hooks before
    found = measured(torch.compile(model, fullgraph=whole, backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_weight_is_the_latent_one_outside_of_forwards_also_after_an_exception():
    model = prepared()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7))
    for layer in quantized_layers(model).values():
        assert layer.weight is layer._parameters["weight"]


def test_looking_at_a_weight_is_not_using_it():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))  # asks for the type of `wo.weight`
    stableqat.prepare(model, TWO_BITS)
    assert check_calls(model).reads == {}


class Captured(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kept = [self.up.weight]

    def forward(self, x):
        return self.down(x @ self.kept[0].T)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            self.up.weight.clamp_(-0.1, 0.1)
        return self.down(self.up(x))


@pytest.mark.parametrize(("build", "what"), [(Captured, "uses"), (Clamped, "changes")])
def test_what_cannot_be_made_right_is_refused_and_the_model_is_as_it_was(build, what):
    model = build()
    kinds, weights = [type(m) for m in model.modules()], [p.clone() for p in model.parameters()]
    message = rf"^layer up: the model {what} its weight .*; add up to skip$"
    with pytest.raises(UserError, match=message):
        stableqat.prepare(model, TWO_BITS, example_inputs=rows())
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    stableqat.prepare(model, TWO_BITS)  # without an example the first forward tells
    with pytest.raises(UserError, match=message):
        model(rows())
    assert build is Captured or model.up.weight.abs().max() > 0.1
    skipped = stableqat.prepare(build(), TWO_BITS, skip="up", example_inputs=rows())
    assert list(quantized_layers(skipped)) == ["down"]


class Watchful(nn.Module):
    """Whatever a forward can leave behind."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.seen, self.cache, self.last = [], {}, None
        self.norm.eval()

    def forward(self, x):
        self.count += 1
        self.seen.append(x.shape)
        self.cache["last"] = self.last = x
        x += np.random.rand() + random.random()
        y = F.dropout(self.norm(self.up(x).flatten(0, 1)), self.training * 0.5)
        return self.down(y)


@pytest.mark.parametrize("when", ["at once", "first forward"])
def test_a_trial_leaves_no_trace(when):
    def life(model):
        states = torch.manual_seed(5), random.seed(5), np.random.seed(5)
        del states
        x = rows()
        output = model(x)
        output.sum().backward()
        return [output, x, torch.rand(1), random.random(), np.random.rand(), *model.buffers()]

    model = Watchful()
    calls = []
    model.up.register_forward_hook(lambda *_: calls.append("forward"))
    model.down.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    stableqat.prepare(model, TWO_BITS)
    expected = copy.deepcopy(model)
    for module in expected.modules():
        module._forward_pre_hooks.clear()
    if when == "at once":
        check_calls(model, ((rows(),), {}))
        assert random.random() == random.Random(5).random()
        assert model.seen == []
        assert model.cache == {}
        assert model.last is None
        assert model.count == 0
        assert all(p.grad is None for p in model.parameters())
        assert calls == []
    found, expected = life(model), life(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert calls[:2] == ["forward", "backward"]
    assert len(model.seen) == 1
    assert model.training
    assert not model.norm.training
    assert not hooked(model)


@pytest.mark.parametrize("call", ["root", "parts"])
def test_without_an_example_the_first_forward_tells_once(call, monkeypatch):
    torch.manual_seed(0)
    model = stableqat.prepare(Net(), TWO_BITS)
    reference = prepared(calls=True)
    tried = []
    monkeypatch.setattr(
        "stableqat.layers.trial.try_calls",
        lambda model, *args: tried.append(model) or try_calls(model, *args),
    )
    x = rows()
    for _ in range(2):
        found = model(x) if call == "root" else x + model.blocks[0](x)
        if call == "parts":
            found = found + model.blocks[1](found)
        assert torch.equal(found, reference(x))
    assert tried == [model] if call == "root" else list(model.blocks)
    assert hooked(model) == ["blocks.0", "blocks.1"]  # those that show the weights


def test_an_example_that_does_not_fit_is_refused():
    model = Net()
    with pytest.raises(UserError, match=r"^example_inputs: the model refuses them"):
        stableqat.prepare(model, TWO_BITS, example_inputs=torch.randn(2, 7))
    assert not quantized_layers(model)


def test_layers_that_are_not_called_are_named(caplog):
    model = nn.ModuleDict({"net": Net()})["net"]
    model.extra = nn.Linear(8, 8)
    quantize_linears(model, TWO_BITS)
    calls = try_calls(model, rows())
    assert calls == Calls(reads={f"blocks.{i}": {f"blocks.{i}.qkv"} for i in (0, 1)}, idle={"extra"})
    calls.tell()
    assert "1 quantized layers were not called in a trial: extra" in caplog.text


def test_a_training_system_shows_weights_that_its_model_reads():
    sizes = {"depth": 1, "img_size": 28, "embed_dim": 48, "num_heads": 2}
    module = ViTModule(
        model_name="eva02_tiny_patch14_224",
        num_classes=4,
        model_args=sizes,
        quantizer=partial(STE, bits=2),
    )
    module.configure_model()
    images = torch.randn(2, 3, 28, 28)
    module(images).sum().backward()
    layers = quantized_layers(module.model)
    assert "blocks.0.attn.qkv" in layers
    assert all(layer.weight_quantizer.scale.grad is not None for layer in layers.values())
    module.eval()
    assert torch.equal(module(images), stableqat.convert(copy.deepcopy(module))(images))

"""Surgery: what is swapped and what stays, on small nets and on real transformers and timm models."""

import logging
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from stableqat import QuantLinear, convert, quantize_linears
from stableqat.errors import UserError
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import DSQ, STE, ParetoQ, StableQAT
from stableqat.surgery import check_skip

TWO_BITS = partial(STE, bits=2)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROJECTIONS = [
    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o")),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()


def qwen3(**options):
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, **options)).eval()


def vit():
    name = "vit_tiny_patch16_224"
    return timm.create_model(
        name, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()


def text():
    return {"input_ids": torch.arange(16).reshape(2, 8)}


def out(model):
    """Logits on a fixed input."""
    if hasattr(model, "lm_head"):
        return model(**text()).logits
    return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16))


MODELS = {
    "llama": (llama, ("lm_head",), [f"model.layers.{i}.{p}" for i in (0, 1) for p in PROJECTIONS]),
    "llama-tied": (
        partial(llama, tie_word_embeddings=True),
        ("lm_head",),
        [f"model.layers.{i}.{p}" for i in (0, 1) for p in PROJECTIONS],
    ),
    "llama-bias": (
        partial(llama, attention_bias=True, mlp_bias=True),
        ("lm_head",),
        [f"model.layers.{i}.{p}" for i in (0, 1) for p in PROJECTIONS],
    ),
    "qwen3": (
        partial(qwen3, tie_word_embeddings=True),
        ("lm_head",),
        [f"model.layers.{i}.{p}" for i in (0, 1) for p in PROJECTIONS],
    ),
    "vit": (
        vit,
        ("head",),
        [f"blocks.{i}.{p}" for i in (0, 1) for p in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    ),
}
each_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@each_model
def test_real_models_keep_their_parameters_keys_and_ties(model):
    build, skip, linears = MODELS[model]
    net = build()
    parameters = dict(net.named_parameters(remove_duplicate=False))
    keys, modes = list(net.state_dict()), {name: m.training for name, m in net.named_modules()}

    report = quantize_linears(net, partial(DSQ, bits=2), skip)

    assert report.swapped == linears
    assert report.skipped == {skip[0]: f"skip: {skip[0]}"}
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    new = {f"{name}.weight_quantizer.{p}" for name in linears for p in ("scale", "scale_floor", "a_logit")}
    assert set(net.state_dict()) == set(keys) | new
    assert [key for key in net.state_dict() if key not in new] == keys
    assert list(quantized_layers(net)) == linears
    assert all(net.get_submodule(name).training == mode for name, mode in modes.items())
    if model in ("llama-tied", "qwen3"):
        assert net.lm_head.weight is net.model.embed_tokens.weight


@each_model
def test_real_models_compute_with_the_deployed_weights(model):
    """The output is that of the plain model with every linear weight replaced by its quantized value."""
    build, skip, linears = MODELS[model]
    net = build()
    quantize_linears(net, partial(ParetoQ, bits=3, group_size=16), skip)
    plain = build()
    plain.load_state_dict(net.state_dict(), strict=False)
    original = out(plain)
    for name in linears:
        layer = net.get_submodule(name)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(layer.weight_quantizer.quantize(layer.weight).dequantize())
    assert torch.equal(out(net), out(plain))
    assert not torch.allclose(out(net), original)


@each_model
def test_a_full_precision_state_dict_still_loads(model):
    build, skip, _ = MODELS[model]
    net, checkpoint = build(), build().state_dict()
    quantize_linears(net, TWO_BITS, skip)
    missing, unexpected = net.load_state_dict(checkpoint, strict=False)
    assert unexpected == []
    assert all(".weight_quantizer." in key for key in missing)


@each_model
def test_skipping_everything_leaves_the_model_untouched(model):
    build, _, linears = MODELS[model]
    net = build()
    before, types = out(net), [type(m) for m in net.modules()]
    report = quantize_linears(net, TWO_BITS, skip=["*"])
    assert report.swapped == []
    assert set(report.skipped) >= set(linears)
    assert [type(m) for m in net.modules()] == types
    assert torch.equal(out(net), before)


def test_full_precision_is_the_untouched_model():
    from stableqat.modules import LlamaModule, ViTModule

    text_config = {"model_type": "llama", **SIZES}
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    for make, reference in (
        (lambda: LlamaModule(config=text_config, quantizer=None), llama),
        (lambda: ViTModule(model_name="vit_tiny_patch16_224", num_classes=5, model_args=sizes), vit),
    ):
        module, plain = make(), reference()
        module.configure_model()
        assert [type(m) for m in module.model.modules()] == [type(m) for m in plain.modules()]
        module.model.load_state_dict(plain.state_dict())
        assert torch.equal(out(module.model.eval()), out(plain))


@each_model
def test_works_on_meta(model):
    build, skip, linears = MODELS[model]
    real = build()
    direct = build()
    direct.load_state_dict(real.state_dict())
    quantize_linears(direct, partial(DSQ, bits=2), skip)

    with torch.device("meta"):
        net = build()
    report = quantize_linears(net, partial(DSQ, bits=2), skip)
    assert report.swapped == linears
    assert all(p.is_meta for p in net.parameters())
    net.load_state_dict(direct.state_dict(), assign=True)
    assert all(
        torch.equal(layer(x), quantized_layers(direct)[name](x))
        for name, layer in quantized_layers(net).items()
        for x in [torch.randn(3, layer.in_features)]
    )


def test_meta_then_initialize():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    quantize_linears(net, TWO_BITS)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    for layer in quantized_layers(net).values():
        layer.weight_quantizer.initialize(layer.weight)
    direct = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    direct.load_state_dict({k: v for k, v in net.state_dict().items() if "quantizer" not in k})
    quantize_linears(direct, TWO_BITS)
    x = torch.randn(5, 8)
    assert torch.equal(net(x), direct(x))


@pytest.mark.parametrize("method", [STE, DSQ, ParetoQ, StableQAT])
def test_without_initialization_scales_are_nan_until_a_state_dict_comes(method):
    factory = partial(method, bits=2, group_size=4)
    trained = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    quantize_linears(trained, factory)
    fresh = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    quantize_linears(fresh, factory, initialize=False)
    for layer in quantized_layers(fresh).values():
        assert all(p.isnan().all() for p in layer.weight_quantizer.parameters())
        assert not any(p.is_meta for p in layer.parameters())
    assert fresh(torch.randn(2, 8)).isnan().all()
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), trained(x))


def test_twice_changes_nothing():
    net = llama()
    quantize_linears(net, TWO_BITS, ["lm_head"])
    modules, state = list(net.modules()), {k: v.clone() for k, v in net.state_dict().items()}
    report = quantize_linears(net, partial(StableQAT, bits=4), ["lm_head"])
    assert report.swapped == []
    assert set(report.skipped.values()) == {"quantized already", "skip: lm_head"}
    assert all(a is b for a, b in zip(modules, net.modules(), strict=True))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer(bias):
    linear = nn.Linear(6, 3, bias=bias)
    layer = QuantLinear.from_linear(linear, STE(linear.weight, bits=2))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.bias is not None) == bias
    assert (layer.in_features, layer.out_features) == (6, 3)
    x = torch.randn(2, 5, 6)
    assert torch.equal(layer(x), F.linear(x, layer.weight_quantizer(linear.weight), linear.bias))
    layer(x).square().sum().backward()
    assert linear.weight.grad is not None
    assert layer.weight_quantizer.scale.grad is not None
    assert not bias or linear.bias.grad.abs().sum() > 0
    assert "bits=2, grid=integer" in repr(layer)


def test_an_input_quantizer_comes_first():
    class Sign(nn.Module):
        def forward(self, x):
            return x.sign()

    linear = nn.Linear(6, 3)
    layer = QuantLinear.from_linear(linear, STE(linear.weight, bits=2), Sign())
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), F.linear(x.sign(), layer.weight_quantizer(linear.weight), linear.bias))


def test_only_the_exact_type_is_swapped():
    class LowRank(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "subclass": LowRank(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv1d(4, 4, 1),
            "bilinear": nn.Bilinear(4, 4, 4),
            "embedding": nn.Embedding(4, 4),
        }
    )
    report = quantize_linears(net, TWO_BITS)
    assert report.swapped == ["plain"]
    assert report.skipped == {
        "subclass": "a LowRank, not a plain Linear",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, not a plain Linear",
    }
    assert type(net["subclass"]) is LowRank


class Renamed(nn.Linear):
    """Computes what its base does, as a subclass that only has another constructor."""

    def __init__(self):
        super().__init__(4, 4)


class Spelt(nn.Linear):
    """Computes what its base does in other words, as Falcon's."""

    def forward(self, input):
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    scale = 2.0

    def forward(self, input):
        return F.linear(input, self.weight * self.scale, self.bias)


class Dropping(nn.Linear):
    def forward(self, input):
        return F.linear(F.dropout(input, training=self.training), self.weight, self.bias)


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "swapped"),
    [(Renamed, True), (Spelt, True), (Scaled, False), (Dropping, False), (Adapted, False)],
)
def test_a_subclass_is_swapped_where_it_computes_the_same(make, swapped, bias):
    linear = make() if make is Renamed else make(4, 4)
    linear.bias = linear.bias if bias else None
    net, state = nn.ModuleDict({"a": linear}), torch.get_rng_state()
    report = quantize_linears(net, partial(STE, bits=2))
    assert report.swapped == ["a"] * swapped
    assert swapped or report.skipped == {"a": f"a {make.__name__}, not a plain Linear"}
    assert torch.equal(torch.get_rng_state(), state)


REPARAMETRISED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig"),
    "weight norm": (parametrizations.weight_norm, r"a parametrization \(_WeightNorm\)"),
    "spectral norm": (parametrizations.spectral_norm, r"a parametrization \(_SpectralNorm\)"),
    "old spectral norm": (nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_weight_that_is_computed_in_every_forward_is_refused(kind):
    change, parts = REPARAMETRISED[kind]
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    change(net["b"])
    with pytest.raises(UserError, match=rf"^layer b: its weight is computed from {parts} .*add b to skip$"):
        quantize_linears(net, TWO_BITS)
    assert not quantized_layers(net)
    assert quantize_linears(net, TWO_BITS, ["b"]).swapped == ["a"]


def test_the_report_counts_matrices_once_and_neither_embeddings_nor_heads():
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(100, 8),
            "conv": nn.Conv2d(3, 8, 2),  # 96
            "up": nn.Linear(8, 16),  # 128
            "kept": nn.Linear(16, 8),  # 128
            "attention": nn.MultiheadAttention(8, 2),  # 192 and 64
            "head": nn.Linear(8, 100),
        }
    )
    net["again"], net["norm"] = net["up"], nn.LayerNorm(8)
    net.register_parameter("positions", nn.Parameter(torch.zeros(1, 9, 8)))
    report = quantize_linears(net, TWO_BITS, ["head", "kept"])
    assert (report.quantized_weights, report.matrix_weights) == (128, 608)
    assert report.quantized_share == pytest.approx(128 / 608)
    assert report.others == pytest.approx({"conv": 96 / 608, "attention": 192 / 608})
    assert "21.1% of the matrix weights outside embeddings and heads" in str(report)
    assert "\n  attention: 31.58% of the weights\n" in report.lines()
    every = quantize_linears(nn.Sequential(nn.Linear(8, 8)), TWO_BITS)
    assert every.quantized_share == 1


@pytest.mark.parametrize(
    ("skip", "swapped"),
    [
        ([], ["a.up", "a.down", "b.up", "b.head"]),
        (["a.up"], ["a.down", "b.up", "b.head"]),  # a full name
        (["up"], ["a.down", "b.head"]),  # a part
        (["b"], ["a.up", "a.down"]),  # a part that is a container
        (["*p"], ["a.down", "b.head"]),  # a glob over parts
        (["a.*"], ["b.up", "b.head"]),  # a glob over names
        (["[ab].up", "head"], ["a.down"]),
        (["u"], ["a.up", "a.down", "b.up", "b.head"]),  # not a substring
        (["UP"], ["a.up", "a.down", "b.up", "b.head"]),  # case counts
    ],
)
def test_skip_patterns(skip, swapped):
    net = nn.ModuleDict(
        {
            "a": nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}),
            "b": nn.ModuleDict({"up": nn.Linear(4, 4), "head": nn.Linear(4, 4)}),
        }
    )
    report = quantize_linears(net, TWO_BITS, skip)
    assert report.swapped == swapped
    assert set(report.skipped) == {"a.up", "a.down", "b.up", "b.head"} - set(swapped)
    assert all(reason.removeprefix("skip: ") in skip for reason in report.skipped.values())
    if skip in (["u"], ["UP"]):
        with pytest.raises(UserError, match=f"skip: {skip[0]} matches no linear layer; correct it"):
            check_skip(net, skip)
    else:
        check_skip(net, skip)


def test_a_skip_is_refused_where_it_says_nothing_or_too_much():
    net = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    check_skip(net, ["head", "he*", "lm_head"])  # he* matches too, though head came first
    with pytest.raises(UserError, match="skip: lm_head matches no linear layer"):
        check_skip(net, ["lm_head"], optional=["head"])
    with pytest.raises(UserError, match="skip: head, body leaves none of the 2 linear layers to quantize"):
        check_skip(net, ["head", "body"])


def test_a_factory_that_makes_no_quantizer_is_named():
    net = nn.ModuleDict({"body": nn.Linear(4, 4)})
    for initialize in (True, False):
        with pytest.raises(UserError, match="layer body: quantizer: the factory returns Linear; it must"):
            quantize_linears(net, lambda weight: nn.Linear(4, 4), initialize=initialize)
    assert type(net["body"]) is nn.Linear


def test_the_report_reads_well_and_is_logged(caplog):
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(3))
    net = nn.ModuleDict({"head": nn.Linear(4, 4), "blocks": blocks, "patches": nn.Conv2d(1, 4, 2)})
    with caplog.at_level(logging.INFO, logger="stableqat.surgery"):
        report = quantize_linears(net, {"down": None, "*": TWO_BITS}, ["head"])
    assert caplog.messages == [
        "3 linear layers quantized, 42.9% of the matrix weights outside embeddings and heads",
        "left alone: head (skip: head)",
        "left alone: blocks.0.down and 2 more (quantizer: down is null)",
        "left alone: patches (14.3% of the weights)",
    ]
    for number in range(3):
        assert f"\n  blocks.{number}.up: STE 2-bit integer (*)\n" in report.lines()
        assert f"\n  blocks.{number}.down: quantizer: down is null\n" in report.lines()
    report.check()
    assert "down and 2 more (quantizer: down is null); patches (14.3% of the" in caplog.messages[-1]


def test_a_model_that_is_only_looked_at_is_not_reported(caplog):
    with torch.device("meta"):
        net = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    with caplog.at_level(logging.INFO, logger="stableqat.surgery"):
        assert quantize_linears(net, TWO_BITS).swapped == ["head", "body"]
    assert not caplog.messages


def test_a_module_under_two_names_stays_one():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(4, 4)})
    report = quantize_linears(net, TWO_BITS)
    assert report.swapped == ["a", "b.1", "c"]
    assert net["a"] is net["b"][1]
    assert type(net["a"]) is QuantLinear
    assert list(quantized_layers(net)) == ["a", "c"]
    assert {k for k in net.state_dict() if k.endswith("scale")} == {
        f"{name}.weight_quantizer.scale" for name in ("a", "b.1", "c")
    }


@pytest.mark.parametrize("other", [nn.Linear(4, 4), nn.Bilinear(4, 4, 4)], ids=["quantized, too", "kept"])
def test_a_weight_of_two_modules_is_refused_before_anything_is_computed(other):
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"up": nn.Linear(4, 4), "other": other})})
    net["b"]["other"].weight = net["b"]["up"].weight
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(UserError, match=r"^layer b\.up: b\.other has the same weight .*; add up to skip$"):
        quantize_linears(net, lambda weight: pytest.fail("a quantizer was made"))
    assert [type(m) for m in net.modules()] == kinds


def test_skipped_modules_with_one_weight_keep_it():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    net["b"].weight = net["a"].weight
    report = quantize_linears(net, TWO_BITS, ["a", "b"])
    assert report.swapped == ["c"]
    assert net["a"].weight is net["b"].weight


def test_an_embedding_may_be_tied_where_something_makes_it_follow():
    net = llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"^layer lm_head: model\.embed_tokens has the same weight"):
        quantize_linears(net, TWO_BITS, tied=False)
    assert "lm_head" in quantize_linears(net, TWO_BITS).swapped
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_hooks_stay_and_can_be_removed():
    net, seen = nn.Sequential(nn.Linear(4, 4)), []
    handles = [
        net[0].register_forward_pre_hook(lambda module, args: seen.append(("before", module))),
        net[0].register_forward_hook(
            lambda module, args, kwargs, output: seen.append(("after", module)), with_kwargs=True
        ),
        net[0].register_full_backward_hook(lambda module, *_: seen.append(("backward", module))),
    ]
    quantize_linears(net, TWO_BITS)
    net(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [(when, net[0]) for when in ("before", "after", "backward")]
    convert(net)
    seen.clear()
    net(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [(when, net[0]) for when in ("before", "after", "backward")]
    for handle in handles:
        handle.remove()
    net(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(seen) == 3


def test_an_optimizer_made_before_still_holds_the_weights():
    net = nn.Sequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantize_linears(net, TWO_BITS)
    before = net[0].weight.detach().clone()
    net(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_a_refusal_names_the_layer():
    net = llama()
    with pytest.raises(
        UserError, match=r"^layer model\.layers\.0\.self_attn\.q_proj: group_size: 20 does not"
    ):
        quantize_linears(net, partial(STE, bits=2, group_size=20), ["lm_head"])
    # 32 divides the hidden size, not the 48 inputs of down_proj
    with pytest.raises(
        UserError, match=r"^layer model\.layers\.0\.mlp\.down_proj: group_size: 32 .* 48 inputs"
    ):
        quantize_linears(llama(), partial(STE, bits=2, group_size=32), ["lm_head"])


def test_a_weight_that_is_nan_is_named():
    net = vit()
    with torch.no_grad():
        net.blocks[1].mlp.fc1.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match=r"^layer blocks\.1\.mlp\.fc1: .*NaN"):
        quantize_linears(net, TWO_BITS, ["head"])


def test_modes_follow_the_model():
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    quantize_linears(net, TWO_BITS)
    assert not net[0].training
    assert not net[0].weight_quantizer.training
    net.train()
    assert net[0].weight_quantizer.training

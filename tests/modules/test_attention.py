"""Quantized products of attention, and a quantized cache: what is multiplied, what stays as it was."""

from functools import partial

import pytest
import timm
import torch
from torch.nn import functional as F

import stableqat
import tiny
from stableqat.callbacks import calibrate
from stableqat.errors import UserError
from stableqat.export.packed import pack
from stableqat.layers.attention import OPERANDS, QuantAttention, attend
from stableqat.layers.calibration import uncalibrated
from stableqat.layers.full_precision import full_precision
from stableqat.quantizers import STE
from stableqat.quantizers.inputs import LSQ, LSQPlus, PerToken
from stableqat.runs import open_run, write_run

BITS = partial(STE, bits=4)
GROUPED = {**tiny.LLAMA, "num_key_value_heads": 1}
QWEN = {**GROUPED, "model_type": "qwen3", "head_dim": 16}
PACKED = torch.tensor([[*range(6), *range(10)], [*range(16)]])
SETTINGS = {"llama": {"config": GROUPED}, "vit": {}}
FAMILIES = ["llama", "vit"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def made(family, spec=None, *, configured=True, quantizer=BITS, **options):
    options = {**SETTINGS[family], "quantizer": quantizer, "attention_quantizer": spec, **options}
    return (tiny.configured if configured else tiny.module)(family, **options)


def calibrated(family, spec, **options):
    module = made(family, spec, **options)
    stableqat.calibrate(module.model, [inputs(family)])
    return module.eval()


def inputs(family, count=8):
    given = tiny.batch(family, count)
    return {"input_ids": given["input_ids"]} if family == "llama" else given["pixel_values"]


def logits(module, *args):
    with torch.no_grad():
        family = "llama" if module.family == "text" else "vit"
        return module(tiny.batch(family, 2)[module.input_key], *args)


def attentions(module):
    return [m for m in module.modules() if isinstance(m, QuantAttention)]


def watch(module):
    """What each operand's quantizers of the first attention take and return, from now on."""
    seen = {}
    for operand, quantizer in attentions(module)[0].attention_quantizer.items():
        quantizer.register_forward_hook(lambda _, args, out, key=operand: seen.update({key: (args[0], out)}))
    return seen


@each_family
@pytest.mark.parametrize("kind", [LSQ, LSQPlus, PerToken])
@pytest.mark.parametrize("bits", [2, 8])
def test_each_operand_takes_few_levels(family, kind, bits):
    module = calibrated(family, partial(kind, bits=bits))
    seen = watch(module)
    assert len(attentions(module)) == 2
    logits(module)
    assert set(seen) == set(OPERANDS)
    for operand, (plain, rounded) in seen.items():
        rows = rounded.flatten(0, -2) if kind is PerToken else rounded.reshape(1, -1)
        assert all(len(row.unique()) <= 2**bits for row in rows), operand
        assert not torch.equal(plain, rounded)
    plain, rounded = seen["probabilities"]
    assert plain.min() >= 0
    assert plain.shape[-1] == plain.shape[-2] == (16 if family == "llama" else 17)
    torch.testing.assert_close(plain.sum(-1), torch.ones(plain.shape[:-1]))
    if kind is PerToken:  # codes from 0 on: none is wasted on negative probabilities
        step = plain.amax(-1, keepdim=True) / (2**bits - 1)
        torch.testing.assert_close(rounded, (plain / step).round() * step)


@pytest.mark.parametrize("mask", [None, "boolean", "added", "causal"])
def test_products_one_by_one_are_those_of_the_fused_call(mask):
    """With a quantizer that rounds nothing."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    options = {"enable_gqa": True, "scale": 0.2, "is_causal": mask == "causal"}
    if mask in ("boolean", "added"):
        seen = torch.rand(2, 1, 5, 5) > 0.4
        seen[..., 0] = True
        options["attn_mask"] = seen if mask == "boolean" else torch.randn(2, 1, 5, 5)
    one_by_one = attend({"probabilities": torch.nn.Identity()}, query, key, value, **options)
    torch.testing.assert_close(one_by_one, F.scaled_dot_product_attention(query, key, value, **options))


@each_family
def test_nothing_else_changes(family):
    """Within `full_precision`, also masks of packed rows are those of the plain model."""
    module, plain = calibrated(family, partial(LSQ, bits=4)), made(family, quantizer=None).eval()
    for more in ((), (PACKED,)) if family == "llama" else ((),):
        rounded = logits(module, *more)
        with full_precision(module.model):
            assert torch.equal(logits(module, *more), logits(plain, *more))
        assert not torch.equal(rounded, logits(plain, *more))
        assert torch.equal(logits(module, *more), rounded)


@pytest.mark.parametrize("config", [GROUPED, QWEN], ids=["llama", "qwen3"])
def test_a_token_does_not_see_those_after_it(config):
    module = calibrated("llama", partial(LSQ, bits=4), config=config)
    ids = tiny.batch("llama", 2)["input_ids"]
    other = ids.clone()
    other[:, 8:] = 0
    with torch.no_grad():
        assert torch.equal(module(ids)[:, :8], module(other)[:, :8])
        assert torch.equal(module(ids[:1], PACKED[:1])[:, :6], module(ids[:1, :6]))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_other_models_of_timm(name):
    args = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 2}
    options = {"model_name": name, "model_args": args, "quantizer": None}
    module = made("vit", partial(PerToken, bits=8), **options).eval()
    plain = made("vit", **options).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        few, whole = module(images), plain(images)
        assert not torch.equal(few, whole)
        torch.testing.assert_close(few, whole, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "cait_xxs24_224",
            {"depth": 1},
            "a LayerScaleBlock has no attention whose products can be quantized",
        ),
        (
            "vit_tiny_patch16_224",
            {"attn_layer": "diff", "depth": 1},
            "DiffAttention calls .* 2 times, not once",
        ),
    ],
)
def test_an_attention_that_does_not_allow_it_is_a_line(name, args, message):
    options = {"model_name": name, "model_args": args, "configured": False}
    with pytest.raises(UserError, match=f"model.attention_quantizer: .*{message}"):
        made("vit", partial(LSQ, bits=8), **options)


def test_a_switch_against_fused_attention_changes_nothing():
    expected = logits(calibrated("vit", partial(LSQ, bits=4)))
    timm.layers.set_fused_attn(False)
    try:
        assert torch.equal(logits(calibrated("vit", partial(LSQ, bits=4))), expected)
    finally:
        timm.layers.set_fused_attn(True)


@each_family
def test_a_run_calibrates_trains_resumes_and_is_read_again(family, tmp_path, monkeypatch):
    spec = partial(LSQ, bits=4, surrogate="dsq")

    def fit(steps, path=None):
        module = made(family, spec, configured=False, calibration_batches=2)
        return module, *tiny.calibrated_run(module, family, steps, path)

    whole, _, expected = fit(8)
    assert not uncalibrated(whole.model)
    half, trainer, first = fit(4)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    monkeypatch.setattr(calibrate, "calibrate_inputs", None)  # a run that resumes does not
    resumed, _, second = fit(8, path)
    assert first + second == expected
    states = [
        {name: p for name, p in module.state_dict().items() if ".attention_quantizer." in name}
        for module in (whole, resumed, half)
    ]
    assert len(states[0]) == 2 * 4 * 4
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    moved = {name.rsplit(".", 1)[1] for name, p in states[0].items() if not torch.equal(p, states[2][name])}
    assert moved == {"scale", "a_logit"}

    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, whole, place=folder)
    loaded = open_run(str(folder)).load()
    assert torch.equal(logits(loaded), logits(whole.eval()))
    assert loaded.describe()["attention"] == "query, key, probabilities, value: LSQ 4 dsq range"
    start = made(family, spec, init_from=str(path), init_quantizers="start")
    assert not uncalibrated(start.model)
    assert torch.equal(logits(start.eval()), logits(half.eval()))
    with pytest.raises(UserError, match=r"export a run without model.attention_quantizer"):
        pack(loaded, torch.float32, torch.float32)


@each_family
def test_computing_a_forward_again_gives_the_same_gradients(family):
    def gradients(**options):
        module = calibrated(family, partial(LSQ, bits=4), **options).train()
        module.loss(tiny.batch(family)).backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    plain = gradients()
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in gradients(activation_checkpointing=True).items():
        assert torch.equal(gradient, plain[name]), name


@each_family
def test_products_compile_in_one_graph(family):
    module = calibrated(family, partial(LSQ, bits=4))
    block = next(iter(module.blocks(module.model)))
    x = torch.randn(2, 5, 32)
    embeddings = [torch.randn(1, 5, 16), torch.randn(1, 5, 16)]
    more = {"position_embeddings": embeddings} if family == "llama" else {}
    compiled = torch.compile(lambda given: block(given, **more), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x, **more))


def test_operands_take_a_mapping():
    spec = {"*.0.*probabilities": None, "probabilities": partial(LSQ, bits=8), "*": partial(PerToken, bits=4)}
    module = calibrated("vit", spec)
    assert list(attentions(module)[0].attention_quantizer) == ["query", "key", "value"]
    words = "query, key, value: PerToken 4 ste none; 1 probabilities: LSQ 8 ste range"
    assert module.describe()["attention"] == words
    with pytest.raises(UserError, match="attention_quantizer: keys chooses no layer"):
        made("vit", {"keys": None, "*": partial(LSQ, bits=8)}, configured=False)


def test_a_scale_that_calibration_cannot_give_names_the_operand():
    module = made("vit", partial(LSQ, bits=4))
    with torch.no_grad():
        module.model.blocks[1].attn.qkv.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"layer blocks.1.attn.query: NaN"):
        stableqat.calibrate(module.model, [inputs("vit")])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_cache_holds_keys_and_values_of_few_levels(bits):
    module = made("llama", cache_bits=bits).eval()
    seen = watch(module)
    logits(module)
    assert set(seen) == {"key", "value"}
    for _, rounded in seen.values():
        assert rounded.shape[0] == 2
        assert all(len(row.unique()) <= 2**bits - 1 for row in rounded.flatten(0, 2))
    assert module.state_dict().keys() == made("llama").state_dict().keys()
    assert module.describe()["attention"] == f"key, value: PerToken {bits} ste none"


def test_text_is_the_same_with_a_cache_and_without():
    module, ids = made("llama", cache_bits=3).eval(), tiny.batch("llama", 2)["input_ids"][:, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        one, other = (module.model.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(one, other)


def test_keys_and_values_have_one_option():
    with pytest.raises(UserError, match=r"model.cache_bits: model.attention_quantizer says how"):
        made("llama", partial(LSQ, bits=8), cache_bits=4, configured=False)


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_out_of_range_is_a_line(bits):
    with pytest.raises(UserError, match=r"model.cache_bits: must be"):
        made("llama", cache_bits=bits)

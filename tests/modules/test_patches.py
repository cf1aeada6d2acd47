"""The patch embedding as a linear layer: the same map, quantized with the classifier."""

from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import tiny
from stableqat.errors import UserError
from stableqat.evaluate.images import channels
from stableqat.layers.linear import QuantLinear
from stableqat.modules import ViTModule
from stableqat.modules.patches import WEIGHT, make_linear
from stableqat.quantizers import STE, StableQAT


def plain(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**tiny.VIT, **options}).eval()


@pytest.mark.parametrize("options", [{}, {"in_chans": 3, "patch_size": 4}, {"dynamic_img_size": True}])
def test_cutting_and_multiplying_is_the_convolution(options):
    model = plain(**options)
    images = torch.randn(3, {**tiny.VIT, **options}["in_chans"], 8, 8)
    expected = model(images)
    make_linear(model)
    assert type(model.patch_embed.proj) is nn.Linear
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert channels(model) == images.shape[1]


def test_an_image_that_no_patches_fill_is_cut_as_the_convolution_cuts_it():
    model = plain()
    convolution = model.patch_embed.proj
    images = torch.randn(2, 1, 9, 7)
    expected = convolution(images)
    make_linear(model)
    assert torch.allclose(model.patch_embed.proj(images), expected, atol=1e-6)


def test_both_ends_take_the_method_at_their_own_width():
    made = tiny.configured("vit", quantizer=partial(StableQAT, bits=2, group_size=16), first_last_bits=8)
    layers = {name: layer for name, layer in made.model.named_modules() if isinstance(layer, QuantLinear)}
    bits = {name: layer.weight_quantizer.bits for name, layer in layers.items()}
    assert bits.pop("patch_embed.proj") == bits.pop("head") == 8
    assert set(bits.values()) == {2}
    assert {type(layer.weight_quantizer) for layer in layers.values()} == {StableQAT}
    assert layers["head"].weight_quantizer.scale.shape == (10, 1)
    assert layers["blocks.0.attn.qkv"].weight_quantizer.scale.shape == (96, 2)
    assert not made.surgery.others
    made.train().loss(tiny.batch("vit")).backward()
    assert layers["patch_embed.proj"].weight.grad.norm() > 0
    assert made.describe()["method"] == "StableQAT"


def test_a_mapping_keeps_its_own_choice_for_the_other_layers():
    mapping = {"*fc1": partial(STE, bits=4), "*": None}
    made = tiny.configured("vit", quantizer=mapping, first_last_bits=8)
    assert set(made.surgery.swapped) == {"patch_embed.proj", "head", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}


def test_full_precision_keeps_its_convolution():
    assert isinstance(tiny.configured("vit", "fp", first_last_bits=8).model.patch_embed.proj, nn.Conv2d)


@pytest.mark.parametrize("kind", ["file", "checkpoint", "quantized checkpoint"])
def test_it_starts_from_a_convolution_and_from_itself(tmp_path, kind):
    start, images = tmp_path / "start.safetensors", tiny.batch("vit")["pixel_values"]
    model = plain()
    if kind == "file":
        save_file(model.state_dict(), start)
    else:
        options = {"first_last_bits": 8} if kind.startswith("quantized") else {}
        made = tiny.configured("vit", "ste" if options else "fp", **options)
        made.model.load_state_dict(
            {k: v.flatten(1) if k == WEIGHT and options else v for k, v in model.state_dict().items()},
            strict=False,
        )
        start, trainer = tmp_path / "start.ckpt", tiny.trainer(max_steps=0)
        trainer.fit(made, tiny.loader("vit"), tiny.loader("vit"))
        trainer.save_checkpoint(start)
    made = tiny.configured("vit", init_from=str(start), first_last_bits=8)
    layer = made.model.patch_embed.proj
    assert torch.equal(layer.weight, model.patch_embed.proj.weight.flatten(1))
    back = tiny.configured("vit", "fp", init_from=str(start))
    assert torch.allclose(back.eval()(images), model(images), atol=1e-6)


def test_a_checkpoint_rebuilds_it(tmp_path):
    made = tiny.module("vit", first_last_bits=4)
    trainer = tiny.trainer(max_steps=2)
    trainer.fit(made, tiny.loader("vit"), tiny.loader("vit"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded, images = ViTModule.load_from_checkpoint(tmp_path / "a.ckpt"), tiny.batch("vit")["pixel_values"]
    assert torch.equal(loaded.eval()(images), made.eval()(images))


def test_another_first_layer_is_refused():
    model = plain()
    model.patch_embed.proj = nn.Conv2d(1, 32, 3, stride=2)
    with pytest.raises(UserError, match=r"model.first_last_bits: the first layer of VisionTransformer is no"):
        make_linear(model)
    with pytest.raises(UserError, match=r"model.first_last_bits: must be at least 2 and at most 8 or null"):
        tiny.module("vit", first_last_bits=9)

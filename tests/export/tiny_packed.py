"""Tiny models of the three families, quantized, for the tests of exported files."""

from functools import partial
from itertools import cycle

import torch

import tiny
from stableqat.export.packed import PackedModel, evaluate, pack
from stableqat.modules import LlamaModule, ViTModule
from stableqat.quantizers import STE

GRIDS = {
    **{
        f"{grid}-{bits}": {"grid": grid, "bits": bits}
        for grid in ("integer", "stretched")
        for bits in (2, 3, 4)
    },
    "ternary": {"levels": 3},
}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = tiny.LLAMA | SHAPE | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LLAMA,
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
}
VIT = tiny.VIT | {"depth": 1}


def every_grid(*more):
    """A factory that takes the next grid for each layer."""
    options = cycle([*GRIDS.values(), *more])
    return lambda weight: STE(weight, **next(options))


def module(family, **options):
    """A trained module's stand-in: scales moved away from where they were set."""
    torch.manual_seed(0)
    quantizer = options.pop("quantizer", {})
    if not callable(quantizer):
        quantizer = partial(STE, **{"bits": 2} | quantizer)
    if family == "vit":
        args = VIT | options.pop("config", {})
        made = ViTModule(
            model_name="vit_tiny_patch16_224", num_classes=10, model_args=args, quantizer=quantizer, **options
        )
    else:
        config = CONFIGS[family] | options.pop("config", {})
        made = LlamaModule(config=config, quantizer=quantizer, **options)
    made.configure_model()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".scale"):
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def assert_weights(model, weights):
    """What a reader made of a file are the deployed weights, and those of the quantizers, bit for bit."""
    assert weights.keys() == model.layers.keys()
    for name, weight in model.layers.items():
        trained = model.model.get_submodule(name)
        own = trained.weight_quantizer(trained.weight) if hasattr(trained, "weight_quantizer") else None
        assert torch.equal(weights[name].float(), weight.dequantize()), name
        assert own is None or torch.equal(own, weight.dequantize()), name


def packed(family, grid, dtype=torch.float32, scale_dtype=torch.float16, template=None, **options):
    """A packed model, and the logits of the module it was made of."""
    if grid is not None:
        options["quantizer"] = GRIDS[grid] | options.get("quantizer", {})
    made = module(family, **options)
    batch = tiny.batch("vit" if family == "vit" else "llama", 4)
    layers = pack(made, dtype, scale_dtype)
    logits, _ = evaluate(made, batch)
    return PackedModel(made, layers, dtype, scale_dtype, batch, template), logits

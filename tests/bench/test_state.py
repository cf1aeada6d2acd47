"""The memory of LR-QAT at the 1B shape that docs/methods.md states, from shapes alone."""

from functools import partial
from pathlib import Path

import torch

from stableqat.bench.architecture import read_architecture
from stableqat.layers.latent import store_weights
from stableqat.layers.linear import quantized_layers
from stableqat.parameters import parameter_groups
from stableqat.quantizers import LRQAT, STE

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def groups(method):
    """The quantized layers of Llama-3.2-1B, and bytes of weights, gradients and AdamW's states."""
    module = read_architecture("llama-3.2-1b").module(quantizer=partial(method, bits=4))
    with torch.device("meta"):
        model = module.build_model()
        module.assemble(model, module.quantizer)
        store_weights(model)
    layers = quantized_layers(model)
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    taken = {True: 0, False: 0}
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        taken[id(parameter) in inside] += size * (4 if parameter.requires_grad else 1)
    counts = {g["name"]: sum(p.numel() for p in g["params"]) for g in parameter_groups(model)}
    return layers, taken, counts


def test_the_page_states_the_memory_at_the_1b_shape():
    layers, ste, _ = groups(STE)
    _, low, counts = groups(LRQAT)
    text = DOCS.read_text()
    weights = sum(layer.weight.numel() for layer in layers.values())
    rest = counts["weights"] + counts["norms_and_biases"]
    assert f"{weights / 1e6:.0f} M weights in quantized layers" in text.replace("\n", " ")
    stated = f"{counts['factors'] / 1e6:.1f} M in factors of rank 32, {counts['scales'] / 1e6:.1f} M scales"
    assert stated in text.replace("\n", " ")
    assert f"{rest / 1e6:.0f} M weights in embedding and norms" in text
    assert f"| quantized layers, other methods | 4 | 4 | 8 | {ste[True] / 1e9:.1f} |" in text
    assert f"factors only | factors only | {low[True] / 1e9:.1f} |" in text
    assert ste[False] == low[False]
    assert f"| embedding and norms, either way | 4 | 4 | 8 | {ste[False] / 1e9:.1f} |" in text

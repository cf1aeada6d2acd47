"""Fake-quantized weights held while the weights stay as they are: evaluation, accumulated gradients."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.linear import quantized_layers


def hold_weights(model: nn.Module) -> None:
    """Compute the fake-quantized weight of each layer once, for all forwards until `release_weights`.

    For as long as weights stay as they are: evaluation, micro-steps of an accumulated gradient. It takes the
    memory of the weights in the compute type. An eager forward notices a parameter that changed in place
    and computes afresh; fused optimizers and writes to `.data` leave no trace, and a compiled forward does
    not look, so call `release_weights` before them. A model sharded by FSDP2 is left alone: each rank
    would keep all of it.

    Args:
        model: Holds the layers; call it in the autocast region that the forwards run in.
    """
    if not any(isinstance(m, FSDPModule) for m in model.modules()):
        for layer in quantized_layers(model).values():
            layer.hold()


def release_weights(model: nn.Module) -> None:
    """Forget what `hold_weights` kept."""
    for layer in quantized_layers(model).values():
        layer.release()

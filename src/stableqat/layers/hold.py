"""Hold fake-quantized weights while the latent ones do not change: evaluation, accumulated gradients."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from stableqat.layers.linear import quantized_layers


def hold_weights(model: nn.Module) -> None:
    """Compute the fake-quantized weight of each layer once, for all forwards until `release_weights`.

    Use it while the weights do not change: in evaluation, and between the micro-steps of an accumulated
    gradient. It takes the memory of the weights in the compute type. An eager forward notices a parameter
    that changed in place and computes the weight again. Fused optimizers and writes to `.data` leave no
    trace, and a compiled forward does not look, so call `release_weights` before them. A model sharded by
    FSDP2 is left alone, because each rank would hold all of it.

    Args:
        model: The model. Call this in the autocast region that the forwards run in.
    """
    if not any(isinstance(m, FSDPModule) for m in model.modules()):
        for layer in quantized_layers(model).values():
            layer.hold()


def release_weights(model: nn.Module) -> None:
    """Release what `hold_weights` holds.

    Args:
        model: The model that was given to `hold_weights`.
    """
    for layer in quantized_layers(model).values():
        layer.release()

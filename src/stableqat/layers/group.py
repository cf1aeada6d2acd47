"""The weights of one block fake-quantized together, in one operation."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stableqat import ops
from stableqat.layers.experts import AroundForward

if TYPE_CHECKING:
    from stableqat.layers.linear import QuantLinear

MOST_IN_GROUP = ops.TOGETHER  # quantized layers of a block
FEW_ROWS = 2048  # up to here launches bound a step on a GPU, beyond it arithmetic


class LayerGroup(AroundForward):
    """Fake-quantizes the weights of a block in one operation, just before the block's forward.

    At small batches, calls and launches take more of a training step than arithmetic does. The values are
    kept for the backward, so the group is used only where their memory does not matter: with few rows, whose
    step is bound by launches, or where activations outweigh weights.

    Args:
        layers: The block's quantized layers.
    """

    def __init__(self, layers: "list[QuantLinear]") -> None:
        super().__init__()
        self.layers = layers
        self.elements = sum(layer.weight.numel() for layer in layers)
        self.values: tuple[Tensor, ...] | None = None
        self.saving: Any = None
        for place, layer in enumerate(layers):
            layer._group, layer._place = self, place

    def dissolve(self) -> None:
        """Leave each layer to itself."""
        self.detach()
        for layer in self.layers:
            layer._group = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: compute what the layers will use."""
        self.values = None
        if "_is_replica" in vars(module):
            return  # DataParallel's replicas have weights of their own, and share this group
        layers, first = self.layers, self.layers[0]
        input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
        if input is None or not self._pays(input) or any(layer.recompute is True for layer in layers):
            return
        if first.implementation != "triton":
            return
        weights = [layer.operands() for layer in layers]
        if any(isinstance(weight.x, DTensor) for weight in weights):
            return
        known = [layer.known_value() for layer in layers]
        if torch.compiler.is_compiling() and any(value is not None for value in known):
            return  # each layer's own graph node takes its held value
        self.values = first.weight_quantizer.many(weights, known)
        if not torch.compiler.is_compiling():
            self.saving = _saving()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an exception: values and their graph end with the forward."""
        self.values = None

    def value_of(self, place: int, latent: Tensor) -> Tensor | None:
        """The value of a layer while the block's forward runs; None where the layer cannot use it.

        Args:
            place: The layer's number in the group.
            latent: Its latent weight.
        """
        assert self.values is not None
        value = self.values[place]
        # a region inside the block may have switched autocast or gradients
        usable = value.dtype == ops.compute_dtype(latent)
        usable = usable and (value.requires_grad or not torch.is_grad_enabled())
        if usable and not torch.compiler.is_compiling():
            # inside a checkpoint that the block has not entered, the recomputation would not find it again
            usable = _saving() == self.saving
        return value if usable else None

    def _pays(self, input: Tensor) -> bool:
        elements = input.numel()
        rows = elements // input.shape[-1] if input.is_floating_point() else elements
        return rows <= FEW_ROWS or elements >= self.elements


def group_layers(model: nn.Module, layers: "list[QuantLinear]") -> None:
    """Group layers that are quantized alike, so that each group is fake-quantized in one operation.

    A group lies within one block: the largest module that holds at most `MOST_IN_GROUP` of them.
    """
    left: dict[Hashable, set[QuantLinear]] = {}
    for layer in layers:
        left.setdefault(layer.weight_quantizer.kind, set()).add(layer)
    left.pop(None, None)
    for alike in left.values():
        for module in model.modules():
            within = [each for each in module.modules() if each in alike]
            if 1 < len(within) <= MOST_IN_GROUP:
                LayerGroup(within).attach(module)
                alike.difference_update(within)


def _saving() -> Any:
    """The hooks that saved tensors go through here, such as those of activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)

"""What flows into each layer, block by block, as the blocks before are quantized.

The model stays where it is, one block at a time is moved to the device, and what flows from block to block
is kept for all calibration batches: `rows x tokens x width` values. So the model may be larger than the
device's memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import QuantLinear, quantized_layers

Batch = dict[str, Tensor]


class _Stop(Exception):
    """The inputs of the first block are known."""


@dataclass
class BlockInputs:
    """A block on the device, and what flows into it.

    Attributes:
        number: The block's number.
        block: The block.
        layers: Its quantized layers by their full names.
        inputs: One entry per batch: the arguments of the block's forward.
    """

    number: int
    block: nn.Module
    layers: dict[str, QuantLinear]
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)

    def activations(self) -> Iterator[dict[Tensor, list[str]]]:
        """Run the block in full precision, batch by batch.

        Yields:
            By activation, `(..., in)`: the names of the quantized layers that it flows into.
        """
        seen: dict[Tensor, list[str]] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(args[0], []).append(name)
            )
            for name, layer in self.layers.items()
        ]
        try:
            for args, kwargs in self.inputs:
                with torch.no_grad(), full_precision(self.block):
                    self.block(*args, **kwargs)
                yield seen
                seen.clear()
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def block_inputs(
    model: nn.Module, blocks: Iterable[nn.Module], batches: Sequence[Batch], device: torch.device
) -> Iterator[BlockInputs]:
    """Yield each block with its inputs; when the next is asked for, the block runs as it then is.

    Args:
        model: The model, in evaluation mode.
        blocks: Its blocks, in order, each of which takes the output of the one before.
        batches: Arguments of the model's forward.
        device: Where blocks run.
    """
    names = {layer: name for name, layer in quantized_layers(model).items()}
    blocks = list(blocks)
    home = next(model.parameters()).device
    inputs = [_first_inputs(model, blocks[0], batch, device) for batch in batches]
    for number, block in enumerate(blocks):
        block.to(device)
        layers = {names[layer]: layer for layer in quantized_layers(block).values()}
        yield BlockInputs(number, block, layers, inputs)
        inputs = [_next_inputs(block(*args, **kwargs), args, kwargs) for args, kwargs in inputs]
        block.to(home)


def _first_inputs(
    model: nn.Module, first: nn.Module, batch: Batch, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stop

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), found[0])


def _next_inputs(
    output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = output if isinstance(output, Tensor) else output[0]
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}

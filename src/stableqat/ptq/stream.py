"""What flows through a model while it is rounded, block by block, for all calibration batches at once.

Only one block is on the device at a time, beside the embedding and the head, and what flows from block to
block, `rows x tokens x width` values, waits where the model is. So the model may be larger than the device's
memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stableqat.layers.full_precision import full_precision
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.modules import QATModule

Batch = dict[str, Tensor]
_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with beside what flows into it


class _Stop(Exception):
    """Every block has been called."""


@dataclass(frozen=True)
class Block:
    """A block on the device.

    Attributes:
        number: Its number.
        module: The block.
        layers: Its quantized layers by their full names.
    """

    number: int
    module: nn.Module
    layers: dict[str, QuantLinear]


class Stream:
    """The calibration data on its way through a model, which starts before the first block.

    Args:
        module: The training system, in evaluation mode; each block takes the output of the one before.
        batches: Batches of its data.
        device: Where to compute.

    Attributes:
        hidden: What flows into the next block, one tensor per batch.
    """

    @torch.no_grad()
    def __init__(self, module: QATModule, batches: Sequence[Batch], device: torch.device) -> None:
        assert module.model is not None
        self.module, self.batches, self.device = module, batches, device
        self.modules = list(module.blocks(module.model))
        self.home = next(self.modules[0].parameters()).device
        self.hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        for batch in batches:
            hidden, calls = self._record(batch)
            self.hidden.append(hidden)
            self._calls.append(calls)

    @torch.no_grad()
    def blocks(self) -> Iterator[Block]:
        """Yield each block; when the next is asked for, the data flows through the block as it then is."""
        assert self.module.model is not None
        names = {layer: name for name, layer in quantized_layers(self.module.model).items()}
        for number, module in enumerate(self.modules):
            module.to(self.device)
            yield Block(number, module, {names[each]: each for each in quantized_layers(module).values()})
            self.flow(number)
            module.to(self.home)

    @torch.no_grad()
    def flow(self, number: int) -> None:
        """Let the data flow through a block, the one that it has come to."""
        for index in range(len(self.batches)):
            self.hidden[index] = self._run(number, index).to(self.home)

    @contextmanager
    def resumed(self, number: int, index: int) -> Iterator[None]:
        """Inside, a forward pass of a batch begins at a block, the one that the data has come to.

        Args:
            number: The block's number; that of blocks is after the last.
            index: The batch's number.
        """
        hidden = self.hidden[index].to(self.device)
        with self._replaced(lambda *_, **__: hidden, before=number):
            yield

    @torch.no_grad()
    def inputs(self, block: Block) -> Iterator[dict[Tensor, list[str]]]:
        """Run a block in full precision on what flows into it, batch by batch.

        Yields:
            By activation, `(..., in)`: the names of the quantized layers that it flows into.
        """
        seen: dict[Tensor, list[str]] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(args[0], []).append(name)
            )
            for name, layer in block.layers.items()
        ]
        try:
            with full_precision(block.module):
                for index in range(len(self.batches)):
                    self._run(block.number, index)
                    yield seen
                    seen.clear()
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def losses(self) -> Iterator[float]:
        """The loss of each batch, once the data has flowed through the last block."""
        for index, batch in enumerate(self.batches):
            with self.resumed(len(self.modules), index):
                yield self.module.loss(_on(batch, self.device)).item()

    def _run(self, number: int, index: int) -> Tensor:
        """The output of a block for a batch."""
        args, kwargs = _on(self._calls[index][number], self.device)
        output = self.modules[number](self.hidden[index].to(self.device), *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _record(self, batch: Batch) -> tuple[Tensor, list[_Call]]:
        """What flows into the first block, and what each block is called with; none of them runs."""
        calls: list[_Call] = []
        first: list[Tensor] = []

        def note(number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(x)
            calls.append(_on((args, kwargs), self.home))
            if len(calls) == len(self.modules):
                raise _Stop
            return x

        with self._replaced(note), suppress(_Stop):
            self.module.loss(_on(batch, self.device))
        return first[0].to(self.home), calls

    @contextmanager
    def _replaced(self, function: Callable[..., Tensor], before: int | None = None) -> Iterator[None]:
        """Inside, the blocks before a number do what a function of their number and arguments does."""
        try:
            for number, block in enumerate(self.modules[:before]):
                vars(block)["forward"] = lambda *args, n=number, **kwargs: function(n, *args, **kwargs)
            yield
        finally:
            for block in self.modules:
                vars(block).pop("forward", None)


def move_outside_of_blocks(module: QATModule, device: torch.device) -> None:
    """Move what a model has outside of its blocks, such as the embedding and the head."""
    assert module.model is not None
    inside = {each for block in module.blocks(module.model) for each in block.modules()}
    for each in module.model.modules():
        if each not in inside:
            each._apply(lambda tensor: tensor.to(device), recurse=False)


def _on(arguments: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)

"""Transformer blocks compiled one by one: one compilation serves all blocks of a kind, in seconds.

A compiler fuses a block's small operations (norms, activations, casts, residual sums), which on a GPU take as
long as its products. Values are those of the plain block up to rounding.
"""

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from stableqat.errors import UserError, one_line

logger = logging.getLogger(__name__)


class CompiledForward:
    """The forward of a module, compiled where it trains and plain in evaluation.

    Hooks of the module run outside of it.

    Args:
        module: The module whose forward it takes the place of.
        required: Refuse a module that cannot be compiled; otherwise it stays plain, which is logged.
    """

    def __init__(self, module: nn.Module, *, required: bool) -> None:
        self.module, self.plain, self.required = module, module.forward, required
        self.compiled = torch.compile(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward.

        Raises:
            UserError: If it cannot be compiled but must be.
        """
        if not (self.module.training and torch.is_grad_enabled()):
            return self.plain(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            what = f"{type(self.module).__name__} cannot be compiled ({one_line(error)})"
            if self.required:
                raise UserError(f"model.compile_model: {what}; remove it") from error
            logger.warning("%s: it trains as it is", what)
            self.compiled = self.plain
            return self.plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return CompiledForward(memo[id(self.module)], required=self.required)  # whose copy asks for this


def compile_blocks(blocks: Iterable[nn.Module], *, required: bool) -> None:
    """Let each block compute its forward compiled while it trains.

    Args:
        blocks: Modules alike.
        required: See `CompiledForward`.
    """
    for block in blocks:
        vars(block)["forward"] = CompiledForward(block, required=required)


def compiles(device: torch.device) -> bool:
    """Whether blocks are compiled unless the settings say otherwise: on a GPU that Triton serves.

    Args:
        device: Where the model trains.
    """
    return device.type == "cuda" and find_spec("triton") is not None

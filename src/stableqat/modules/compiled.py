"""Transformer blocks compiled one by one: one compilation serves all blocks of a kind, in seconds.

A compiler fuses a block's small operations (norms, activations, casts, residual sums), which on a GPU take as
long as its products. Values are those of the plain block up to rounding.
"""

import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import nn

from stableqat.errors import UserError, one_line

# A run gives the same bits again: no kernel is chosen by its time, and random numbers are the plain block's.
_EXACT = ("deterministic", "fallback_random")
_KINDS = 64  # of blocks that are compiled, by quantizers and shapes

logger = logging.getLogger(__name__)


class CompiledForward:
    """The forward of a module, compiled where it trains and plain in evaluation.

    Hooks of the module run outside of it.

    Args:
        module: The module whose forward it takes the place of.
        compiled: Computes what the callable that is its first argument does, given the others.
        required: Refuse a module that cannot be compiled; otherwise it stays plain, which is logged.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], *, required: bool) -> None:
        self.module, self.plain, self.required = module, module.forward, required
        self.compiled: Callable[..., Any] | None = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward.

        Raises:
            UserError: If it cannot be compiled but must be.
        """
        if self.compiled is None or not (self.module.training and torch.is_grad_enabled()):
            return self.plain(*args, **kwargs)
        try:
            return self.compiled(self.plain, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            what = f"{type(self.module).__name__} cannot be compiled ({one_line(error)})"
            if self.required:
                raise UserError(f"model.compile_model: {what}; remove it") from error
            logger.warning("%s: it trains as it is", what)
            self.compiled = None
            return self.plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        copied = memo[id(self.module)]  # whose copy asks for this one's
        return CompiledForward(copied, _compiled_call(), required=self.required)


def compile_blocks(blocks: Iterable[nn.Module], *, required: bool) -> None:
    """Let each block compute its forward compiled while it trains.

    Args:
        blocks: Modules alike.
        required: See `CompiledForward`.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _KINDS)
    compiled = _compiled_call()
    for block in blocks:
        vars(block)["forward"] = CompiledForward(block, compiled, required=required)


def _compiled_call() -> Callable[..., Any]:
    """A compiled call, with code of its own.

    Dynamo keeps what it compiles, and what it gives up on, with the code object that a call enters: what
    breaks one model's graph would break another's.
    """

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), globals())
    from torch._inductor import config

    options: dict[str, Any] = {key: True for key in _EXACT if hasattr(config, key)}
    return torch.compile(own, dynamic=False, options=options)  # an earlier shape changes no values


def compiles(device: torch.device) -> bool:
    """Whether blocks are compiled unless the settings say otherwise: on a GPU that Triton serves.

    Args:
        device: Where the model trains.
    """
    return device.type == "cuda" and find_spec("triton") is not None

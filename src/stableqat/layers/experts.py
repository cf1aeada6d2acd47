"""Fused experts: one three-dimensional parameter holds the matrices of all experts in a layer of a mixture.

transformers 5 builds Mixtral, Qwen3-MoE and others this way, so there is no linear layer to swap. The
parameter stays, a quantizer beside it (`gate_up_proj_quantizer`) holds a scale for each expert and row, and
the module reads the fake-quantized weight while its forward runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stableqat.quantizers import Quantizer

_SUFFIX = "_quantizer"


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, module and own name of each parameter that holds the matrices of fused experts.

    transformers marks such a module by `is_transposed`; without the mark nobody knows how its matrices lie.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "is_transposed", None), bool):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.is_floating_point():
                    yield f"{name}.{key}" if name else key, module, key


def quantized_experts(model: nn.Module) -> dict[str, tuple[nn.Module, str, Quantizer]]:
    """Module, parameter's own name and quantizer of quantized experts, by the parameter's full name."""
    return {
        name: (module, key, quantizer)
        for name, module, key in fused_experts(model)
        if isinstance(quantizer := module._modules.get(key + _SUFFIX), Quantizer)
    }


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """The matrices of all experts, stacked: `(experts * out, in)`."""
    return (weight.transpose(1, 2) if module.is_transposed else weight).flatten(0, 1)


def from_rows(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_rows`."""
    if not module.is_transposed:
        return rows.reshape(shape)
    return rows.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)


def quantize_experts(module: nn.Module, key: str, quantizer: Quantizer) -> None:
    """Let a module of fused experts compute with a quantized weight.

    Args:
        module: The module.
        key: Name of its parameter.
        quantizer: Made for `as_rows` of it.
    """
    module.add_module(key + _SUFFIX, quantizer)
    if not any(isinstance(getattr(h, "__self__", None), _Shown) for h in module._forward_pre_hooks.values()):
        _Shown().attach(module)


@torch.no_grad()
def make_plain(model: nn.Module, *, deploy: bool = True) -> None:
    """Remove the quantizers of fused experts.

    Args:
        model: The model.
        deploy: Set each weight to its deployed value first.
    """
    for module, key, quantizer in quantized_experts(model).values():
        if deploy:
            weight = module.get_parameter(key)
            rows = quantizer.quantize(as_rows(module, weight)).dequantize()
            weight.copy_(from_rows(module, rows, weight.shape))
        delattr(module, key + _SUFFIX)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(shown := getattr(hook, "__self__", None), _Shown):
                shown.detach()


class AroundForward:
    """A pair of hooks around a module's forward; the second also runs after an exception."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def attach(self, module: nn.Module) -> None:
        """Run around the module's forward, until `detach`."""
        self.handles += [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def detach(self) -> None:
        """Stop running."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an exception; does nothing by default."""


class _Shown(AroundForward):
    """While the module's forward runs, an attribute of the instance hides each quantized parameter."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: compute what the module will read."""
        for _, key, quantizer in quantized_experts(module).values():
            weight = module._parameters[key]
            assert weight is not None
            value = from_rows(module, quantizer(as_rows(module, weight)), weight.shape)
            object.__setattr__(module, key, value)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an exception."""
        for _, key, _ in quantized_experts(module).values():
            vars(module).pop(key, None)

"""The two products of attention, queries by keys and probabilities by values, with quantized operands.

A stock attention module makes both in one call of `scaled_dot_product_attention`. While the module's forward
runs, this call quantizes its operands first. The module keeps its own code, so what it does before and after
the call (rotary embeddings, norms, masks, gates) stays what it is. Fused kernels do not show probabilities:
where these are quantized, the products are computed one by one, at the price of their memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stableqat.errors import UserError
from stableqat.quantizers.choice import Choice
from stableqat.quantizers.inputs import (
    InputQuantizer,
    InputQuantizerFactory,
    InputQuantizerSpec,
    make_input_quantizer,
)

OPERANDS = ("query", "key", "probabilities", "value")
KEY = "model.attention_quantizer"


class QuantAttention(nn.Module):
    """What an attention module derives from, beside its own class, while its products are quantized.

    Attributes:
        attention_quantizer: Quantizers by operand; None leaves the products as they are.
    """

    attention_quantizer: nn.ModuleDict | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class.

        Raises:
            UserError: If it does not make its products in one call, so that they cannot be quantized.
        """
        quantizers = self._modules["attention_quantizer"]
        if quantizers is None:  # within `full_precision`
            return super().forward(*args, **kwargs)
        products = _Products(quantizers)
        with products:
            output = super().forward(*args, **kwargs)
        if products.calls != 1:
            raise UserError(
                f"{KEY}: {type(self).__bases__[1].__name__} calls scaled_dot_product_attention "
                f"{products.calls} times, not once, so its products cannot be quantized; leave the option out"
            )
        return output


class _Products(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` quantizes its operands."""

    def __init__(self, quantizers: nn.Module) -> None:
        super().__init__()
        self.quantizers, self.calls = quantizers, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return attend(self.quantizers, *args, **(kwargs or {}))


def attend(
    quantizers: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of quantized operands.

    Args:
        quantizers: By operand; what has none stays as it is.
        query: `(..., heads, queries, head_dim)`.
        key: `(..., heads, tokens, head_dim)`, with fewer heads for `enable_gqa`.
        value: Shaped like the keys.
        attn_mask: As torch has it: booleans, or what is added to the scores.
        dropout_p: Share of probabilities, already quantized, that become 0.
        is_causal: Whether a query sees the tokens up to its own place only.
        scale: Of the scores; None is `head_dim ** -0.5`.
        enable_gqa: Whether several heads of queries share one of keys and values.

    Returns:
        `(..., heads, queries, head_dim)`.
    """
    given = {"query": query, "key": key, "value": value}
    query, key, value = (quantizers[o](x) if o in quantizers else x for o, x in given.items())
    if "probabilities" not in quantizers:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    probabilities = quantizers["probabilities"](scores.softmax(-1))
    return F.dropout(probabilities, dropout_p) @ value


def find_attentions(model: nn.Module, blocks: Iterable[nn.Module], has: str) -> dict[str, nn.Module]:
    """The attention module of each block, by its name in the model.

    Args:
        model: The model.
        blocks: Its blocks.
        has: An attribute by which an attention module is known.

    Raises:
        UserError: If a block has none whose products can be quantized.
    """
    names, found = {module: name for name, module in model.named_modules()}, {}
    for block in blocks:
        own = (module for module in block.modules() if hasattr(module, has) and hasattr(module, "head_dim"))
        if (attention := next(own, None)) is None:
            raise UserError(
                f"{KEY}: a {type(block).__name__} has no attention whose products can be quantized; leave "
                "the option out"
            )
        found[names[attention]] = attention
    return found


def quantize_attention(attentions: Mapping[str, Any], quantizer: InputQuantizerSpec) -> None:
    """Quantize the operands of attention modules, in place.

    Args:
        attentions: The modules by name, each with its `head_dim`.
        quantizer: Makes the quantizer of an operand from the size of a head; or a mapping from patterns over
            `NAME.OPERAND` to such, where None leaves an operand as it is.

    Raises:
        UserError: If a pattern chooses nothing, or an operand has none.
    """
    choice = Choice[InputQuantizerFactory](quantizer, (), KEY)
    for name, module in attentions.items():
        made = nn.ModuleDict()
        device = next(module.parameters()).device
        for operand in OPERANDS:
            factory = choice.of(f"{name}.{operand}")
            if (own := make_input_quantizer(factory, module.head_dim, device, KEY)) is not None:
                made[operand] = own
        if isinstance(never_negative := dict(made).get("probabilities"), InputQuantizer):
            never_negative.unsigned()
        if made:
            if hasattr(module, "fused_attn"):  # timm's, which environment variables may turn off
                module.fused_attn = True
            module.__class__ = _quantized(type(module))  # type: ignore[arg-type]
            module.attention_quantizer = made.train(module.training)
    choice.check()


def describe_attention(model: nn.Module) -> dict[str, str]:
    """How the products of a model's attention are quantized, for tables; nothing if they are not."""
    modules = [m.attention_quantizer for m in model.modules() if isinstance(m, QuantAttention)]
    found: dict[str, Counter[str]] = {}
    for made in modules:
        for operand, quantizer in (made or {}).items():
            settings = quantizer.describe() if isinstance(quantizer, InputQuantizer) else {}
            kind = " ".join(map(str, settings.values())) or type(quantizer).__name__
            found.setdefault(kind, Counter())[operand] += 1
    words = []
    for kind, counts in found.items():
        operands = [o if counts[o] == len(modules) else f"{counts[o]} {o}" for o in OPERANDS if counts[o]]
        words.append(f"{', '.join(operands)}: {kind}")
    return {"attention": "; ".join(words)} if words else {}


@cache
def _quantized(kind: type[nn.Module]) -> Any:
    """The class of a module of that kind whose products are quantized."""
    return type(f"Quant{kind.__name__}", (QuantAttention, kind), {"__module__": kind.__module__})

"""Keys and values in few bits, as a quantized cache of a runtime holds them.

Each token's key and value have one scale per head, that of the largest magnitude, and are rounded after the
rotary embedding, just before attention: training and evaluation see what a cache would return. Queries and
probabilities stay as they are, as in runtimes.
"""

from typing import Any

from torch import Tensor, nn

from stableqat.quantizers.inputs import PerToken

_NAME = "stableqat_cache"  # of the attention in transformers' registry


def quantize_cache(model: Any, bits: int) -> None:
    """Let a transformers model attend to keys and values of few bits, in place.

    Args:
        model: Causal language model whose attention is sdpa.
        bits: Width, 2 to 8.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for module in list(model.modules()):
        if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            module.add_module("cache_quantizer", PerToken(module.head_dim, bits=bits))
    model.config._attn_implementation = _NAME


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """The sdpa of transformers on rounded keys and values, `(batch, heads, tokens, head_dim)`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    quantizer = module._modules["cache_quantizer"]
    if quantizer is not None:  # it is None within `full_precision`
        key, value = quantizer(key), quantizer(value)
    return sdpa_attention_forward(module, query, key, value, *args, **options)

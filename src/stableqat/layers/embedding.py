"""One weight for embedding and head: where the head quantizes it, the embedding looks up the same values.

Llama-3.2 and Qwen3 up to 4B share the weight of `embed_tokens` and `lm_head`. Left alone (the default
`skip`) it stays in full precision on either side. Quantized, it is stored once, so a lookup of latent
values would train a model that cannot be deployed.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.layers.linear import QuantLinear


class QuantEmbedding(nn.Embedding):
    """An embedding whose weight is that of a quantized head; the head keeps quantizer and scale.

    The values are those of the head in the compute type; what comes out has the latent weight's type, so
    that the residual stream of a model keeps its precision under autocast.
    """

    _head: tuple[QuantLinear]  # in a tuple, lest it become a submodule

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, head: QuantLinear) -> "QuantEmbedding":
        """Wrap the Parameter that `embedding` and `head` share, without copying it.

        Args:
            embedding: The embedding to replace.
            head: The layer that quantizes its weight.

        Returns:
            The quantized embedding.
        """
        made = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            _weight=embedding.weight,
            _freeze=not embedding.weight.requires_grad,
        )
        made.weight, made._head = embedding.weight, (head,)
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(...)` entries to `(..., embedding_dim)`."""
        value = effective_weight(self._head[0])
        return F.embedding(input, value, self.padding_idx).to(self.weight.dtype)


def quantize_tied_embedding(model: Any) -> None:
    """Replace the embedding of a transformers model whose quantized head has the same weight.

    Args:
        model: Causal language model, after `quantize_linears`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, QuantLinear) and head.weight is embedding.weight:
        model.set_input_embeddings(QuantEmbedding.from_embedding(embedding, head))


def effective_weight(layer: nn.Linear) -> Tensor:
    """The weight that a linear layer multiplies with: fake-quantized where the layer is."""
    return layer.value() if isinstance(layer, QuantLinear) else layer.weight

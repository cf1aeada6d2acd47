"""One weight for embedding and head: if the head quantizes it, the embedding looks up the quantized values.

Llama-3.2 and Qwen3 up to 4B share one weight between `embed_tokens` and `lm_head`. The default `skip` leaves
it in full precision. A quantized weight is deployed once, for both, so looking up latent values would train a
model that cannot be deployed.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.layers.linear import QuantLinear


class QuantEmbedding(nn.Embedding):
    """An embedding on the weight of a quantized head, which keeps the quantizer.

    It looks up the head's fake-quantized values in the compute type and returns them in the latent weight's
    type, so that the residual stream of a model keeps its precision under autocast.
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
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        made.weight, made._head = embedding.weight, (head,)
        return made.train(embedding.training)

    def to_embedding(self) -> nn.Embedding:
        """The plain embedding on the same Parameter."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = self.weight
        return plain.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Entries `(...)` to vectors `(..., embedding_dim)`."""
        (head,) = self._head
        stored = not head.latent.is_floating_point()
        dtype = head.weight_quantizer.scale.dtype if stored else head.latent.dtype
        return F.embedding(input, head.value(), self.padding_idx).to(dtype)


def quantize_tied_embedding(model: Any) -> None:
    """Replace the embedding of a transformers model if its quantized head shares the weight.

    Args:
        model: Causal language model, after `quantize_linears`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, QuantLinear) and head.weight is embedding.weight:
        model.set_input_embeddings(QuantEmbedding.from_embedding(embedding, head))


def effective_weight(layer: nn.Linear) -> Tensor:
    """The weight that a linear layer multiplies with: fake-quantized if the layer is quantized."""
    return layer.value() if isinstance(layer, QuantLinear) else layer.weight

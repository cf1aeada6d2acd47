"""Losses over a large vocabulary, chunk by chunk of tokens: the logits never exist as a whole.

The logits of 4 x 2048 tokens over 128k entries take 4 GiB in float32, and cross-entropy keeps several
tensors of that size. Here the forward takes a chunk of logits, its loss and, at once, the gradient of
that loss; what the chunk sends to hidden states and weight is added up in float32, the chunk forgotten.
Three products a chunk, as many as without chunks: nothing is recomputed. The logits are those of the plain
loss, in the compute type, and the loss is float32; on a GPU one kernel makes it and its gradient. (PyTorch
2.15's `linear_cross_entropy` returns a loss in the type of its input: under bfloat16 two digits, and another
loss than the plain one.)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from stableqat import ops
from stableqat.layers.embedding import effective_weight
from stableqat.layers.linear import QuantLinear
from stableqat.ops.once_differentiable import once_differentiable

IGNORED = ops.IGNORED
LOGITS = 2**27  # elements of a chunk's logits, 512 MiB in float32

RowLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Losses `(rows,)` in float32 of some rows, from their logits `(rows, vocab)` and the slice of these rows.

With the gradient of their sum by the logits, in the logits' type, if the third argument asks for it: the
logits then belong to a graph. It may overwrite the logits.
"""


def lean_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of `F.linear(hidden, weight, bias)` over the labels that are not ignored.

    Args:
        hidden: `(..., in)`.
        weight: `(vocab, in)`.
        labels: `(...)` entries of the vocabulary, each for its own row of `hidden`; -100 is ignored.
        bias: `(vocab,)` or None.

    Returns:
        Scalar, float32; NaN if every label is ignored, as without chunks.
    """
    total = sum_over_rows(hidden, weight, bias, _cross_entropy(labels.flatten()))
    return total / (labels != IGNORED).sum()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The cross-entropy of each row, 0 where its label is ignored; carries no gradient.

    Args:
        hidden: `(..., in)`.
        weight: `(vocab, in)`.
        labels: `(...)` entries of the vocabulary.
        bias: `(vocab,)` or None.

    Returns:
        `(...)`, float32.
    """
    rows, row_loss = hidden.flatten(0, -2), _cross_entropy(labels.flatten())
    dtype = ops.compute_dtype(hidden)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    losses = [
        row_loss(F.linear(rows[part].to(dtype), weight, bias), part, False)[0]
        for part in _chunks(rows.shape[0], weight.shape[0])
    ]
    return torch.cat(losses).view(labels.shape)


@torch.compiler.disable  # a compiled model calls it uncompiled
def sum_over_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, row_loss: RowLoss) -> Tensor:
    """The sum of a loss over rows of logits, differentiable once by `hidden`, `weight` and `bias`.

    Args:
        hidden: `(..., in)`.
        weight: `(vocab, in)`.
        bias: `(vocab,)` or None.
        row_loss: Computes losses of rows; other tensors it uses receive no gradient.

    Returns:
        Scalar, float32.
    """
    inputs = (hidden.flatten(0, -2), weight, bias)
    total: Tensor = _RowLosses.apply(*inputs, row_loss, torch.is_grad_enabled())
    return total


def lean_forward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    loss: Callable[..., Tensor] = lean_cross_entropy,
    **options: Any,
) -> Any:
    """Replaces the forward of a transformers causal language model: with labels, it makes no logits.

    As the model's forward it runs inside the model's hooks, of which FSDP2's give it whole weights.

    Args:
        model: Causal language model with a `model` that makes hidden states and an `lm_head`.
        input_ids: `(batch, tokens)`.
        labels: `(batch, tokens)`, not shifted; None gives the logits.
        loss: Takes hidden states, weight, shifted labels and bias.
        options: For the decoder; with `output_hidden_states`, `loss` gets them as `hidden_states`.

    Returns:
        The model's output, `loss` and no logits.
    """
    if labels is None:
        return type(model).forward(model, input_ids=input_ids, **options)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = model.model(input_ids=input_ids, **options)  # type: ignore[operator]
    hidden, head = outputs.last_hidden_state, model.lm_head
    assert isinstance(head, nn.Linear)
    if isinstance(head, QuantLinear) and head.input_quantizer is not None:
        hidden = head.input_quantizer(hidden)
    states = {} if outputs.hidden_states is None else {"hidden_states": outputs.hidden_states}
    value = loss(hidden, effective_weight(head), next_tokens(labels), head.bias, **states)
    return CausalLMOutputWithPast(loss=value)


def next_tokens(labels: Tensor) -> Tensor:
    """Labels shifted by one: each position has the next token's, the last one is ignored."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_loss: RowLoss,
        differentiate: bool,
    ) -> Tensor:
        dtype = ops.compute_dtype(hidden)
        # once, not in every chunk
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        by_hidden, by_weight, by_bias = (
            torch.zeros_like(x, dtype=torch.float32) if differentiate and x is not None and needed else None
            for x, needed in inputs
        )
        total = torch.zeros((), device=hidden.device)
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            h = hidden[part].to(dtype)
            with torch.set_grad_enabled(differentiate):  # a graph, so that autograd need not keep the logits
                h = h.detach().requires_grad_(differentiate)
                losses, gradient = row_loss(F.linear(h, w, b), part, differentiate)
            total += losses.sum()
            if gradient is None:
                continue
            if by_hidden is not None:
                by_hidden[part] = gradient @ w
            if by_weight is not None:
                _add_product(by_weight, gradient.T, h.detach())
            if by_bias is not None:
                by_bias += gradient.sum(0, dtype=torch.float32)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # in place to save memory: autograd itself refuses a second backward
        gradients = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def by_autograd(losses_of: Callable[[Tensor, slice], Tensor]) -> RowLoss:
    """A loss of rows whose gradient comes from autograd.

    Args:
        losses_of: Losses `(rows,)` from float32 logits `(rows, vocab)` and the slice of these rows.
    """

    def row_loss(logits: Tensor, part: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        dtype, exact = logits.dtype, logits.float()
        losses = losses_of(exact, part)
        if not differentiate:
            return losses, None
        at_logits = get_gradient_edge(exact)
        del exact, logits  # the gradient needs neither
        gradient = torch.autograd.grad(losses.sum(), at_logits)[0].to(dtype)
        return losses.detach(), gradient

    return row_loss


def _cross_entropy(labels: Tensor) -> RowLoss:
    plain = by_autograd(
        lambda logits, part: F.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="none")
    )

    def row_loss(logits: Tensor, part: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        fused = ops.fused_cross_entropy(logits, labels[part]) if differentiate else None
        return fused or plain(logits, part, differentiate)

    return row_loss


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices of about equal length."""
    number = -(-rows * vocab // LOGITS)
    size = -(-rows // max(number, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1)))

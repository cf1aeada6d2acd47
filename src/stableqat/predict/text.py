"""Text from prompts, and the loss of each token of a text, with a causal language model.

The tokenizer encodes a prompt as it does by default (with BOS, if it adds one); messages go through its chat
template. transformers' `generate` decodes, greedily or by temperature and top-p. A model's own generation
settings, such as a repetition penalty, do not apply: equal weights write equal text, whatever holds them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.errors import UserError, one_line
from stableqat.evaluate.model import Model

Prompt = dict[str, Any]


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Continue prompts, in their order.

    Args:
        model: Language model on the device, in evaluation mode.
        prompts: What `read_prompts` returns.
        max_new_tokens: Most tokens per completion.
        temperature: Softens or sharpens the distribution to draw from; 0 takes the likeliest token.
        top_p: Draw from the likeliest tokens that together have this probability.
        batch_size: Prompts per forward pass, padded on the left.
        device: Where the model is.

    Yields:
        The prompt with its `completion`, and `finish`: "stop" at an end of text, "length" at
        `max_new_tokens`.

    Raises:
        UserError: If a prompt does not fit into the model's context, or has no tokens.
    """
    from transformers import GenerationConfig

    network: Any = model.network
    tokenizer = model.tokenizer
    encoded = [_encode(tokenizer, prompt, answer=True) for prompt in prompts]
    _check_lengths(encoded, max_new_tokens, network.config.max_position_embeddings)
    ends = _ends(network, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    network.generation_config = GenerationConfig(  # generate fills what is missing from here
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        ids, mask = _padded(batch, pad, left=True)
        written = network.generate(input_ids=ids.to(device), attention_mask=mask.to(device)).cpu()
        for offset, (tokens, row) in enumerate(zip(batch, written[:, ids.shape[1] :].tolist(), strict=True)):
            end = next((at for at, token in enumerate(row) if token in ends), None)
            yield {
                **prompts[start + offset],
                "completion": _continuation(tokenizer, tokens, row[:end]),
                "finish": "length" if end is None else "stop",
            }


@torch.no_grad()
def token_losses(
    model: Model, texts: Sequence[Prompt], *, batch_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Score each token of texts, given those before it.

    Args:
        model: Language model on the device, in evaluation mode.
        texts: What `read_prompts` returns; messages are scored with all that the chat template adds.
        batch_size: Texts per forward pass, padded on the right, where a causal model does not look.
        device: Where the model is.

    Yields:
        The text with its `tokens`, their `ids`, their `losses` in nats, None for the first, and the mean
        `loss`, None for a single token.

    Raises:
        UserError: If a text does not fit into the model's context, or has no tokens.
    """
    network: Any = model.network
    encoded = [_encode(model.tokenizer, text, answer=False) for text in texts]
    _check_lengths(encoded, 0, network.config.max_position_embeddings)
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        ids = _padded(batch, 0, left=False)[0].to(device)
        logits = network(input_ids=ids, use_cache=False).logits
        for offset, tokens in enumerate(batch):  # one at a time, because float32 logits are large
            row, targets = logits[offset, : len(tokens) - 1].float(), ids[offset, 1 : len(tokens)]
            losses = F.cross_entropy(row, targets, reduction="none").double()
            yield {
                **texts[start + offset],
                "tokens": [model.tokenizer.decode([token]) for token in tokens],
                "ids": tokens,
                "losses": [None, *losses.tolist()],
                "loss": losses.mean().item() if len(losses) else None,
            }


def _encode(tokenizer: Any, prompt: Prompt, *, answer: bool) -> list[int]:
    if "messages" not in prompt:
        (text,) = prompt.values()
        tokens = tokenizer(text.encode("utf-8", "replace").decode())["input_ids"]
    elif tokenizer.chat_template is None:
        raise UserError("prompts: there are messages, and the tokenizer has no chat template; give prompts")
    else:
        try:
            text = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template is a program, with errors of its own
            raise UserError(f"prompts: the chat template refuses messages: {one_line(error)}") from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them
    if not tokens:
        raise UserError(f"prompts: {text!r} has no tokens; write a longer one")
    return tokens


def _check_lengths(encoded: Sequence[list[int]], new: int, context: int) -> None:
    for number, tokens in enumerate(encoded, 1):
        if len(tokens) + new > context:
            more, lower = (f" and max_new_tokens {new}", " or lower max_new_tokens") if new else ("", "")
            raise UserError(
                f"prompts: number {number} has {len(tokens)} tokens{more}, and the model takes {context}; "
                f"shorten it{lower}"
            )


def _ends(network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: EOS, and what the model names beside it.

    A configuration without an end has transformers' default, which is an ordinary token of most tokenizers.
    """
    named = [network.config.eos_token_id, getattr(network.generation_config, "eos_token_id", None)]
    ends = {end for each in named for end in (each if isinstance(each, list) else [each])}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({tokenizer.eos_token_id} | (ends & special))


def _padded(batch: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens as one matrix, and where it holds them."""
    width = max(map(len, batch))
    ids, mask = torch.full((len(batch), width), pad), torch.zeros(len(batch), width, dtype=torch.long)
    for row, tokens in enumerate(batch):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens; decoded alone, some would lose the space before their first word."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(tokens, **options) for tokens in (prompt, prompt + new))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, **options)

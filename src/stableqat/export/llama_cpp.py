"""What llama.cpp computes for a Llama or Qwen3 model, and so which models it runs as they were trained.

Shapes, the epsilon of the norms and the rotary embedding come from a file's metadata. Everything else is part
of llama.cpp's code for an architecture: the activation, the attention mask, which layers have biases. It
would silently ignore a configuration value that is in neither, so such a value is refused here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stableqat.errors import UserError
from stableqat.export import gguf_blocks
from stableqat.export.gguf_header import Header

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the frequencies, in Llama only
_READ = {  # key of the metadata -> key of the configuration
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TENSORS = ("tie_word_embeddings", "mlp_bias")  # llama.cpp uses whatever tensor is there
_TRAINING = ("initializer_range", "attention_dropout", "pretraining_tp", "use_cache")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_LAYERS = ("use_sliding_window", "sliding_window", "max_window_layers")  # they decide layer_types
_INERT = {*_READ.values(), *_TENSORS, *_TRAINING, *_TOKENS, *_LAYERS, "rope_parameters"}
_ELSEWHERE = "take compressed-tensors, or hf"


def check(model: Any) -> None:
    """Refuse a model that llama.cpp would compute differently.

    Args:
        model: Llama or Qwen3 of transformers.

    Raises:
        UserError: Naming the key of its configuration.
    """
    from transformers import PreTrainedConfig

    config = model.config
    general = PreTrainedConfig().to_dict()
    usual = {key: value for key, value in type(config)().to_dict().items() if key not in general}
    usual |= {"is_causal": True}  # transformers reads it from any configuration
    for key in usual.keys() - _INERT:
        value = getattr(config, key, usual[key])
        if not _honoured(config.model_type, key, value, usual[key]):
            own, theirs = value, usual[key]
            if key == "layer_types":
                own, theirs = f"sliding_attention ({config.sliding_window} tokens)", "full_attention only"
            raise UserError(
                f"gguf: {key}: llama.cpp computes {config.model_type} with {theirs}, this model has {own}; "
                f"{_ELSEWHERE}"
            )
    if not same_rope(model, *rope(model)):
        raise UserError(
            f"gguf: rope_parameters: llama.cpp does not rotate heads by {config.rope_parameters}; "
            f"{_ELSEWHERE}"
        )


def _honoured(family: str, key: str, value: Any, usual: Any) -> bool:
    if key == "hidden_act":
        return value in ("silu", "swish")
    if key == "layer_types":
        return set(value or ()) <= {"full_attention"}
    if key == "attention_bias" and family == "llama":
        return True
    return value == usual


def metadata(config: Any) -> dict[str, Any]:
    """Return shapes and epsilon by key, without the prefix of the architecture."""
    return {key: getattr(config, name) for key, name in _READ.items()}


def rope(model: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Return metadata of the rotary embedding, and divisors of its frequencies if it needs them.

    Raises:
        UserError: If llama.cpp does not know the rotary embedding.
    """
    config, rotary = model.config, model.model.rotary_emb
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    found: dict[str, Any] = {"rope.freq_base": float(parameters["rope_theta"])}
    if kind == "default":
        return found, None
    if kind in ("linear", "yarn"):
        factor = float(parameters["factor"])
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
        if kind == "yarn":
            found["rope.scaling.original_context_length"] = parameters["original_max_position_embeddings"]
            found["rope.scaling.attn_factor"] = rotary.attention_scaling / _magnitude(factor)
        return found, None
    if kind == "llama3" and config.model_type == "llama":
        plain, _ = frequencies(found, None, config.head_dim)
        return found, plain / rotary.inv_freq.float().cpu()
    raise UserError(
        f"gguf: rope_parameters.rope_type: llama.cpp has no {kind} rotary embedding for {config.model_type}; "
        f"{_ELSEWHERE}"
    )


def frequencies(metadata: dict[str, Any], factors: Tensor | None, size: int) -> tuple[Tensor, float]:
    """Return the angles by which llama.cpp rotates, and the magnitude of rotated queries and keys.

    Args:
        metadata: Keys of the rotary embedding.
        factors: Divisors of the frequencies.
        size: Size of a head.

    Returns:
        Angles per position, `(size / 2,)`, and the magnitude.
    """
    base = float(metadata.get("rope.freq_base", 10_000.0))
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if factors is not None:
        plain = plain / factors
    kind = metadata.get("rope.scaling.type", "linear")
    factor = float(metadata.get("rope.scaling.factor", 0.0)) or 1.0
    magnitude = float(metadata.get("rope.scaling.attn_factor", 1.0))
    if kind == "none":
        return plain, magnitude
    if kind != "yarn":
        return plain / factor, magnitude
    # fast pairs keep their frequency, slow ones are divided, those in between are mixed
    context = float(metadata.get("rope.scaling.original_context_length", metadata.get("context_length", 0)))
    turns = [size * math.log(context / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1)]
    low, high = max(0, math.floor(turns[0])), min(size - 1, math.ceil(turns[1]))
    slow = ((torch.arange(size // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain * (1 - slow) + plain / factor * slow, magnitude * _magnitude(factor)


def _magnitude(factor: float) -> float:
    """Return YaRN's magnitude for a context that is longer by a factor."""
    return 1 + 0.1 * math.log(factor)


def factors(file: Header) -> Tensor | None:
    """Return the divisors of a file's frequencies."""
    if ROPE_FACTORS not in file.tensors:
        return None
    return torch.from_numpy(gguf_blocks.dequantize(file, ROPE_FACTORS))


def same_rope(model: Any, metadata: dict[str, Any], factors: Tensor | None) -> bool:
    """Whether llama.cpp would rotate a model's heads as the model does."""
    if metadata.get("rope.scaling.type", "linear") not in ("none", "linear", "yarn"):
        return False
    rotary = model.model.rotary_emb
    own = rotary.inv_freq.float().cpu()
    theirs, magnitude = frequencies(metadata, factors, model.config.head_dim)
    same = own.shape == theirs.shape and torch.allclose(own, theirs, rtol=1e-4, atol=0)
    return same and math.isclose(rotary.attention_scaling, magnitude, rel_tol=1e-4)


def load(file: Header, state: dict[str, Tensor]) -> Any:
    """Return the transformers model that llama.cpp makes of a file.

    Args:
        file: The file's header, the source of all settings; the rest are defaults of the architecture.
        state: The file's tensors, by the names of transformers.

    Returns:
        The model, in evaluation mode.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = file.get("general.architecture")
    found = {key.removeprefix(f"{family}."): field.value for key, field in file.fields.items()}
    settings = {name: found[key] for key, name in _READ.items()}
    settings["tie_word_embeddings"] = "output.weight" not in file.tensors
    settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if family == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    with torch.device("meta"):
        described = AutoConfig.for_model(family, **settings)
        model: Any = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    if settings["tie_word_embeddings"]:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, assign=True)
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.attention_scaling = frequencies(found, factors(file), settings["head_dim"])
    return model.eval()

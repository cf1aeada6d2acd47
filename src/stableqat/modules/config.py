"""The architecture of a language model: from config keys, a local folder, a run, or a hub name.

What the hub refuses becomes one line with the remedy: its own messages take five, and those of transformers
mix several causes.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from stableqat.checkpoints.names import find_checkpoint
from stableqat.checkpoints.read import read_rest
from stableqat.construct import check_plain
from stableqat.errors import UserError, did_you_mean, first_line
from stableqat.files import as_it_stands, is_missing

# far above any real model: refuse it before it takes time and memory
_MOST = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**28,
}

_SHAPES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def resolve_config(config: dict[str, Any] | str | None, init_from: str | None) -> Any:
    """The transformers config of a model; its `dtype` is that of the start's weights, in which exports go.

    Args:
        config: Keys of a config, a folder or a hub name; None takes that of `init_from`.
        init_from: Run folder, checkpoint, model folder or hub name.

    Raises:
        UserError: If the architecture is unknown, inconsistent or not found.
    """
    key = "model.config"
    if config is None:
        key = "init_from"
        if init_from is None:
            raise UserError(
                "model.config: missing; give an architecture, or set model.init_from to take its own"
            )
        checkpoint = find_checkpoint(init_from, key)
        config = init_from if checkpoint is None else read_rest(checkpoint)["hyper_parameters"].get("config")
        if config is None:
            raise UserError(f"init_from: {init_from} is not a language model; give model.config")
    if isinstance(config, str):
        where = f"{key}: {config}: "
        config = _known_keys(pretrained_config(key, config), where)
    else:
        where = f"{key}." if key == "model.config" else f"{key}: {init_from}: "
        if init_from is not None and key == "model.config" and "model_type" not in config:
            config = _of_start(config, init_from)
    resolved = _config_from_keys(config, where)
    _check(resolved, where)
    if resolved.dtype is None and key == "model.config" and init_from is not None:
        with suppress(UserError):  # loading the start reports what is wrong with it
            resolved.dtype = resolve_config(None, init_from).dtype
    resolved.use_cache = False
    return resolved


def pretrained_config(key: str, source: str) -> Any:
    """The config of a model folder or hub name.

    Args:
        key: The setting that names it, for messages.
        source: Local folder or hub name.

    Raises:
        UserError: If it is not found, with the reason.
    """
    from transformers import AutoConfig

    remedy = "give a local model folder or the name of a Hub model you can access"
    if is_missing(source):
        raise UserError(f"{key}: {source} does not exist{as_it_stands(source)}; {remedy}")
    written = Path(source) / "config.json"
    keys = None
    with suppress(OSError, ValueError, RecursionError):  # transformers reports what is wrong
        keys = json.loads(written.read_text())
    _check_sizes(keys, f"{key}: {source}: ")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises several types of its own
        if Path(source).exists():
            told = first_line(error) if isinstance(error, OSError | ValueError) else str(error)
            reason = f"has no usable config.json ({' '.join(told.split())[:200]})"
        else:
            reason = hub_refusal(source, error) or (
                f"was not found locally (there is no such folder) or on the Hub ({first_line(error)})"
            )
        raise UserError(f"{key}: {source} {reason}; {remedy}") from error


def hub_refusal(source: str, error: BaseException) -> str | None:
    """Why the hub refused a name, and what to do; None if it did not.

    Args:
        source: Hub name.
        error: What a library raised; the hub's own error may be its cause.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, HFValidationError):
            return "is neither a local folder nor a valid Hub name"
        if isinstance(cause, GatedRepoError):
            return (
                f"is gated: request access at https://huggingface.co/{source}, log in with `hf auth login` "
                "(or set HF_TOKEN), and try again"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return (
                "was not found locally (there is no such folder) or on the Hub: correct the name or, if it "
                "is private, log in with `hf auth login` (or set HF_TOKEN)"
            )
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            return (
                f"is refused by the Hub ({cause.response.status_code}): log in with `hf auth login` (or set "
                "HF_TOKEN) using a token with read access"
            )
    if any(
        isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError)
        for cause in causes
    ):
        return (
            "was not found locally (there is no such folder) or in the Hub's cache, and the Hub cannot be "
            "reached (offline?): download it while online"
        )
    return None


def compare_configs(config: Any, source: str) -> None:
    """Refuse an architecture that differs from that of the weights it starts from.

    Args:
        config: The architecture.
        source: Model folder or hub name of the weights.

    Raises:
        UserError: Naming the key and both values, or as `pretrained_config`.
    """
    _compare_shapes(config.to_dict(), pretrained_config("init_from", source), source)


def _compare_shapes(keys: dict[str, Any], own: Any, source: str) -> None:
    for key in _SHAPES:
        mine, theirs = keys.get(key), getattr(own, key, None)
        if mine != theirs:
            raise UserError(
                f"model.config.{key}: is {mine}, but {source} in init_from has {theirs}; take the "
                "architecture from there with --model.config null"
            )


def _of_start(keys: dict[str, Any], source: str) -> dict[str, Any]:
    """Complete keys that do not name a type of model with those of its start."""
    own = resolve_config(None, source)
    brought = own.to_dict()
    _compare_shapes({**brought, **keys}, own, source)
    del brought["transformers_version"]  # the user writes the rest by hand
    return {**brought, **keys}


def _known_keys(config: Any, where: str) -> dict[str, Any]:
    """The keys that a config's class knows; trainers leave others in a config.json."""
    _check_type(config.model_type, where)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{where}is already quantized (quantization_config); start from the original model")
    known = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if key in known}


def _config_from_keys(keys: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig

    check_plain(keys, where.rstrip(".: "))
    keys = dict(keys)
    model_type = keys.pop("model_type", None)
    _check_type(model_type, where)
    _check_sizes(keys, where)
    known = set(AutoConfig.for_model(model_type).to_dict()) | {"torch_dtype", "rope_theta", "rope_scaling"}
    written = "transformers_version" in keys  # by a program of another version, not by hand
    for key in [key for key in keys if key not in known]:
        if not written:
            hint = did_you_mean(key, known, "correct or remove it")
            raise UserError(f"{where}{key}: unknown key of a {model_type} config; {hint}")
        del keys[key]
    try:
        resolved = AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # transformers raises several types of its own
        raise UserError(f"{where.rstrip('.: ')}: {' '.join(str(error).split())}") from error
    if resolved.hidden_size % resolved.num_attention_heads and "head_dim" not in keys:
        raise UserError(
            f"{where.rstrip('.: ')}: hidden_size {resolved.hidden_size} is not a multiple of "
            f"num_attention_heads {resolved.num_attention_heads}"
        )
    return resolved


def _check_type(model_type: Any, where: str) -> None:
    if model_type not in ("llama", "qwen3"):
        raise UserError(f"{where}model_type: {model_type!r} is not supported; choose llama or qwen3")


def _check_sizes(keys: Any, where: str) -> None:
    """Refuse sizes that no model has, before anything is built."""
    for key, most in _MOST.items() if isinstance(keys, dict) else ():
        if isinstance(value := keys.get(key), int) and not 0 < value <= most:
            raise UserError(f"{where}{key}: must be from 1 to {most}, not {value}")


def _check(config: Any, where: str) -> None:
    """Refuse what transformers accepts and cannot build or train."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{where}num_key_value_heads: {groups} does not divide num_attention_heads {heads}; set it to a "
            f"divisor, or to {heads} to share no keys and values"
        )
    if config.hidden_act not in ACT2FN:
        hint = did_you_mean(config.hidden_act, ACT2FN, "take silu, as Llama does")
        raise UserError(f"{where}hidden_act: {config.hidden_act} is unknown; {hint}")
    if (pad := config.pad_token_id) is not None and not -1 <= pad < config.vocab_size:
        raise UserError(f"{where}pad_token_id: {pad} is not one of the {config.vocab_size} tokens; remove it")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in (known := ("default", *ROPE_INIT_FUNCTIONS)):
        raise UserError(
            f"{where}rope_parameters.rope_type: {rope} is unknown; choose one of {', '.join(known)}"
        )
    config.return_dict = True
    if not 0 <= config.attention_dropout < 1:
        raise UserError(f"{where}attention_dropout: must lie in [0, 1), not {config.attention_dropout}")

"""Which language model: keys of a transformers config, a local folder, a run, or a name on the hub.

What the hub refuses is told in one line with the remedy: its own messages take five, and transformers'
put several causes into one.
"""

import difflib
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.modules.start import find_checkpoint, read_checkpoint


def resolve_config(config: dict[str, Any] | str | None, init_from: str | None) -> Any:
    """The transformers config of a model.

    Args:
        config: Keys of a config, a folder or a hub name; None takes that of `init_from`.
        init_from: Run folder, checkpoint, model folder or hub name.

    Raises:
        UserError: If the architecture is unknown, inconsistent or not to be had.
    """
    key = "model.config"
    if config is None:
        key = "init_from"
        if init_from is None:
            raise UserError(
                "model.config: missing; give an architecture, or model.init_from to take it from there"
            )
        checkpoint = find_checkpoint(init_from)
        config = (
            init_from if checkpoint is None else read_checkpoint(checkpoint)["hyper_parameters"].get("config")
        )
        if config is None:
            raise UserError(f"init_from: {init_from} is not a language model; give model.config")
    resolved = pretrained_config(key, config) if isinstance(config, str) else _config_from_keys(config)
    resolved.use_cache = False
    return resolved


def pretrained_config(key: str, source: str) -> Any:
    """The config of a model folder or hub name.

    Args:
        key: Setting that names it, for the message.
        source: Local folder or hub name.

    Raises:
        UserError: If it is not to be had, with the reason.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            reason = f"is a folder without a readable config.json ({first_line(error)})"
        else:
            reason = hub_refusal(source, error) or (
                f"is neither here nor to be had from the hub ({first_line(error)})"
            )
        raise UserError(
            f"{key}: {source} {reason}; give a local model folder or a hub name you have access to"
        ) from error


def hub_refusal(source: str, error: BaseException) -> str | None:
    """Why the hub did not serve a name, and what to do about it; None if that is not what happened.

    Args:
        source: Name on the hub.
        error: What a library raised; the hub's own error may lie beneath it.
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
            return "is neither a folder here nor a name that the hub could have"
        if isinstance(cause, GatedRepoError):
            return (
                f"is gated: ask for access at https://huggingface.co/{source}, log in with `hf auth login` "
                "(or set HF_TOKEN), and start again"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return (
                "is neither here nor to be seen on the hub: correct the name or, if it is private, log in "
                "with `hf auth login` (or set HF_TOKEN)"
            )
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            return (
                f"is refused by the hub ({cause.response.status_code}): log in with `hf auth login` (or set "
                "HF_TOKEN) with a token that may read it"
            )
    if any(
        isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError)
        for cause in causes
    ):
        return (
            "is neither here nor in the hub's cache, and the hub cannot be reached (offline?): download it "
            "where there is a network"
        )
    return None


def _config_from_keys(keys: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    keys = dict(keys)
    model_type = keys.pop("model_type", None)
    if model_type not in ("llama", "qwen3"):
        raise UserError(f"model.config.model_type: {model_type!r} is not supported; choose llama or qwen3")
    known = set(AutoConfig.for_model(model_type).to_dict()) | {"torch_dtype", "rope_theta"}
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.config.{key}: unknown key of a {model_type} config{hint}")
    try:
        resolved = AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # transformers validates with several exception types of its own
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error
    if resolved.hidden_size % resolved.num_attention_heads and "head_dim" not in keys:
        raise UserError(
            f"model.config: hidden_size {resolved.hidden_size} is no multiple of num_attention_heads "
            f"{resolved.num_attention_heads}"
        )
    return resolved


def first_line(error: BaseException) -> str:
    """What a library's exception says, up to its first line break."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""Causal language models of transformers (Llama, Qwen3) as training systems.

The stock transformers model is used as it is; only its linear layers are swapped. Masters are
float32 whatever the file holds. Perplexity is `exp` of the negative log-likelihood over all
predicted tokens, summed in float64 over batches and ranks, not averaged over batches.
"""

import difflib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.modules.base import QATModule
from stableqat.modules.evaluation import MeanLoss
from stableqat.modules.start import find_checkpoint, read_checkpoint
from stableqat.quantizers import QuantizerFactory

logger = logging.getLogger(__name__)


class LlamaModule(QATModule):
    """A quantized Llama or Qwen3 causal language model.

    Args:
        config: The architecture: keys of a transformers config (`model_type: llama` or `qwen3`), or a local
            folder or hub name that has one. None takes it from `init_from`.
        quantizer: Makes the quantizer of one weight; None trains in full precision.
        skip: Linear layers that stay in full precision, by name patterns.
        init_from: Full-precision start: run folder, checkpoint, model folder or hub name.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the scheduler from the optimizer, stepped every optimizer step.
        scale_lr_multiplier: Learning rate of the quantizers' parameters as a share of `lr`.
        weight_lr_multiplier: Learning rate of the weights as a share of `lr`; a control for methods whose gradients
            are smaller.
        compile_model: Compile the inner model with `torch.compile`.
        recompute: Recompute fake-quantized weights in the backward instead of saving them; None decides, see
            `QuantLinear`.

    Raises:
        UserError: If the architecture is unknown or a setting does not fit it.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any] | str | None = None,
        quantizer: QuantizerFactory | None = None,
        skip: Sequence[str] = ("lm_head",),
        init_from: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        scale_lr_multiplier: float = 0.1,
        weight_lr_multiplier: float = 1.0,
        compile_model: bool = False,
        recompute: bool | None = None,
    ) -> None:
        super().__init__(
            quantizer=quantizer,
            skip=skip,
            init_from=init_from,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            scale_lr_multiplier=scale_lr_multiplier,
            weight_lr_multiplier=weight_lr_multiplier,
            compile_model=compile_model,
            recompute=recompute,
        )
        self.save_plain_hyperparameters()
        self.config = _resolve_config(config, init_from)
        self.check_architecture()
        self.val_loss = MeanLoss()

    def resolved(self) -> dict[str, Any]:
        """The full transformers config, as plain values."""
        return {"config": json.loads(self.config.to_json_string(use_diff=False))}

    def build_model(self) -> nn.Module:
        """See `QATModule.build_model`."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).train()

    def load_pretrained(self, source: str) -> nn.Module:
        """See `QATModule.load_pretrained`: a transformers folder or hub name, loaded as float32."""
        from transformers import AutoModelForCausalLM

        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=self.config, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"init_from: {source}: {_first_line(error)}") from error
        model, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            key = next(iter([*info["missing_keys"], *info["mismatched_keys"]]))
            raise UserError(
                f"init_from: {source}: weights of another architecture: {key}; check model.config"
            )
        return model.train()

    def check_pretrained(self, source: str) -> None:
        """See `QATModule.check_pretrained`: the config must be there."""
        _pretrained_config("init_from", source)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Decoder layers."""
        return model.model.layers  # type: ignore[union-attr, return-value]

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Positions and embedding must be large enough for the data's rows and tokens."""
        block, limit = getattr(datamodule, "block_size", 0), self.config.max_position_embeddings
        if block > limit:
            raise UserError(
                f"data.block_size: {block} tokens are more than the model allows "
                f"(max_position_embeddings {limit}); shorten the rows or raise the limit in model.config"
            )
        size = getattr(datamodule, "vocab_size", 0)
        if size > self.config.vocab_size:
            raise UserError(
                f"model.config.vocab_size: {self.config.vocab_size} is less than the tokenizer's {size} "
                "entries; raise it, or take the tokenizer that the model was trained with"
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(batch, tokens)` ids to `(batch, tokens, vocab)` logits."""
        assert self.model is not None
        return self.model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the next token; the model shifts the labels itself."""
        assert self.model is not None
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        self.log_training_loss(loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up negative log-likelihoods and tokens."""
        nll = self.predict_step(batch, batch_idx)
        self.val_loss.update(nll.double().sum(), (batch["labels"][:, 1:] != -100).sum(), batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over all tokens of all ranks."""
        self._log_evaluation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_evaluation("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of each next token, `(batch, tokens - 1)`, 0 where its label is ignored."""
        logits = self(batch["input_ids"])[:, :-1].float()
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
        )

    def _log_evaluation(self, stage: str) -> None:
        losses = self.val_loss.compute()
        metrics = {"loss": losses["loss"], "perplexity": losses["loss"].exp()}
        self.log_evaluation(stage, metrics, losses)
        self.val_loss.reset()


def _resolve_config(config: dict[str, Any] | str | None, init_from: str | None) -> Any:
    if config is None:
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
    resolved = (
        _pretrained_config("model.config", config) if isinstance(config, str) else _config_from_keys(config)
    )
    resolved.use_cache = False
    return resolved


def _pretrained_config(key: str, source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        there = Path(source).exists()
        place = (
            "is a folder without a readable config.json"
            if there
            else "is neither here nor to be had from the hub"
        )
        raise UserError(
            f"{key}: {source} {place}; give a local model folder or a hub name you have access to "
            f"({_first_line(error)})"
        ) from error


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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

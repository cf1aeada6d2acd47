"""Causal language models of transformers (Llama, Qwen3) as training systems.

The stock transformers model stays as it is but for its linear layers. Latent weights are float32, whatever
the file holds. Perplexity is `exp` of the mean negative log-likelihood over all tokens with a label, summed
in float64 over batches and processes, not averaged over batches.
"""

import json
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stableqat.checkpoints.names import find_checkpoint
from stableqat.errors import UserError, check_range, first_line
from stableqat.layers.embedding import quantize_tied_embedding
from stableqat.modules.base import QATModule
from stableqat.modules.config import compare_configs, hub_refusal, resolve_config
from stableqat.modules.documents import documents_of
from stableqat.modules.language_teacher import LanguageTeacher
from stableqat.modules.loss import IGNORED, lean_forward, token_losses
from stableqat.modules.metrics import MeanLoss
from stableqat.modules.teacher import Distillation, load_frozen
from stableqat.quantizers.inputs import PerToken

_LARGE = 2**14  # entries of a vocabulary from which the loss is lean


class LlamaModule(QATModule):
    """A quantized Llama or Qwen3 causal language model.

    Args:
        config: The architecture: keys of a transformers config (`model_type: llama` or `qwen3`), or a local
            folder or hub name that has one. None takes it from `init_from`.
        lean_loss: Compute the loss chunk by chunk, without the logits of a whole batch; equal up to rounding.
            None does so for vocabularies of 16,384 entries and more.
        cache_bits: Width of keys and values, 2 to 8, each rounded per token and head as a quantized cache
            holds them: short for an `attention_quantizer` of these two. None leaves them as they are.
        skip: Linear layers that stay in full precision, by name patterns.
        options: Those of `QATModule`.

    Raises:
        UserError: If the architecture is unknown or a setting does not fit it.
    """

    family = "text"
    input_key = "input_ids"
    heads = ("lm_head",)
    attention_has = "k_proj"

    def __init__(
        self,
        *,
        config: dict[str, Any] | str | None = None,
        skip: Sequence[str] = heads,
        lean_loss: bool | None = None,
        cache_bits: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(skip=skip, **options)
        self.config = resolve_config(config, self.init_from)
        self.lean_loss = self.config.vocab_size >= _LARGE if lean_loss is None else lean_loss
        check_range("model.cache_bits", cache_bits, 2, 8, null=True)
        if cache_bits is not None:
            if self.attention_quantizer is not None:
                raise UserError(
                    "model.cache_bits: model.attention_quantizer says how keys and values are quantized; "
                    "leave one out, or give key and value a PerToken of their own in a mapping"
                )
            cached = partial(PerToken, bits=cache_bits)
            self.attention_quantizer = {"key": cached, "value": cached, "*": None}
        self.check_architecture(self.quantizer)
        self.val_loss = MeanLoss()

    def chance(self) -> float:
        """See `QATModule.chance`: all tokens alike."""
        return math.log(self.config.vocab_size)

    def resolved(self) -> dict[str, Any]:
        """The full transformers config, as plain values, and the teacher's source."""
        return {**super().resolved(), "config": json.loads(self.config.to_json_string(use_diff=False))}

    def build_model(self) -> nn.Module:
        """See `QATModule.build_model`."""
        from transformers import AutoModelForCausalLM

        config = deepcopy(self.config)  # which keeps the type of the start
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).train()

    def load_pretrained(self, source: str) -> nn.Module:
        """See `QATModule.load_pretrained`: a transformers folder or hub name, loaded as float32."""
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        self.check_pretrained(source)  # transformers reports weights it may not read as missing
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=self.config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = hub_refusal(source, error) or f"cannot be loaded: {first_line(error)}"
            raise UserError(f"init_from: {source} {reason}") from error
        except (SafetensorError, EOFError) as error:
            raise UserError(
                f"init_from: the weights of {source} are cut short or damaged ({first_line(error)}); take "
                "another copy"
            ) from error
        model, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            key = next(iter([*info["missing_keys"], *info["mismatched_keys"]]))
            raise UserError(
                f"init_from: {source}: weights of another architecture: {key}; check model.config"
            )
        return model.train()

    def check_pretrained(self, source: str) -> None:
        """See `QATModule.check_pretrained`: its config must exist and equal this model's."""
        compare_configs(self.config, source)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Decoder layers."""
        return model.model.layers  # type: ignore[union-attr, return-value]

    def adapt(self, model: nn.Module) -> None:
        """See `QATModule.adapt`: a tied embedding follows its head, a lean loss makes no logits."""
        quantize_tied_embedding(model)
        if self.lean_loss or self.distillation is not None:
            vars(model)["forward"] = MethodType(lean_forward, model)

    def load_teacher(self, settings: Distillation) -> LanguageTeacher:
        """See `QATModule.load_teacher`: a language model."""
        made = load_frozen(lambda: LlamaModule(init_from=settings.source))
        assert made.model is not None
        return LanguageTeacher(made.model, settings)

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Rows must fit the positions, and tokens the embedding and the start."""
        block, limit = getattr(datamodule, "block_size", 0), self.config.max_position_embeddings
        if block > limit:
            raise UserError(
                f"data.block_size: {block} tokens exceed the model's max_position_embeddings, {limit}; "
                "shorten the rows or raise the limit in model.config"
            )
        own_tokens = getattr(datamodule, "tokenizer_source", "") is None
        start = self.init_from
        if own_tokens and start is not None and find_checkpoint(start, "init_from") is None:
            raise UserError(
                f"data.tokenizer: missing; {start} was trained with a tokenizer but does not "
                "include it; name it"
            )
        size = getattr(datamodule, "vocab_size", 0)
        if size > self.config.vocab_size:
            raise UserError(
                f"model.config.vocab_size: {self.config.vocab_size} is less than the tokenizer's {size} "
                "entries; raise it, or use the tokenizer that the model was trained with"
            )

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute the logits.

        Args:
            input_ids: `(batch, tokens)`.
            position_ids: `(batch, tokens)`. Where they restart, a document begins that does not see those
                before it in its row; None lets each token see all before it.

        Returns:
            `(batch, tokens, vocab)`.
        """
        return self._run(input_ids, position_ids).logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the next token over the batch's labels that are not -100.

        The model itself shifts the labels. See `share` for several processes.
        """
        inputs = batch["input_ids"], batch.get("position_ids")
        options = {} if self.teacher is None else self.teacher.options_for(*inputs)
        return self._run(*inputs, labels=batch["labels"], **options).loss

    def share(self, batch: dict[str, Tensor]) -> Tensor | float:
        """See `Training.share`: a process counts by its labels, as processes average their gradients.

        Accumulated batches count alike, however many labels they have.
        """
        if self.trainer.world_size == 1:
            return 1.0
        labels = (batch["labels"][:, 1:] != IGNORED).sum().float()
        return labels / self.trainer.strategy.reduce(labels.clone(), reduce_op="mean")

    def example_batch(self, rows: int, *, tokens: int = 64, seed: int = 0) -> dict[str, Tensor]:
        """See `QATModule.example_batch`."""
        length = min(tokens, self.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.config.vocab_size, (rows, length), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sum negative log-likelihoods and tokens."""
        nll = self.predict_step(batch, batch_idx)
        self.val_loss.update(nll.double().sum(), (batch["labels"][:, 1:] != IGNORED).sum(), batch_idx)

    def measured(self, loss: Tensor) -> dict[str, Tensor]:
        """Perplexity over all tokens that have a label."""
        return {"perplexity": loss.exp()}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of each next token, `(batch, tokens - 1)`, 0 where its label is ignored."""
        if self.lean_loss:
            inputs = batch["input_ids"], batch.get("position_ids")
            return self._run(*inputs, labels=batch["labels"], loss=token_losses).loss[:, :-1]
        logits = self(batch["input_ids"], batch.get("position_ids"))[:, :-1].float()
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
        )

    def _run(self, input_ids: Tensor, position_ids: Tensor | None, **options: Any) -> Any:
        assert self.model is not None
        with documents_of(position_ids):
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)

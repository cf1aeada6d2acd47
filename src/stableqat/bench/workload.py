"""What every arm computes: one model's training loss on random batches, at one precision.

The loss is the module's own, of the model as it trains (`QATModule.assemble`), under autocast as with
Lightning's `bf16-mixed`. Inputs are random tokens or images of the model's size, another batch for each seed,
although their content does not change the cost.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stableqat.bench.architecture import Architecture
from stableqat.errors import UserError
from stableqat.modules import QATModule

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
Batch = dict[str, Tensor]

_TOKENS = 2048


class Workload:
    """A model in full precision with its loss and its inputs.

    Args:
        architecture: The model.
        batch: Rows or images per step.
        tokens: Tokens per row; None takes 2048 for a language model.
        precision: As for Lightning's Trainer.
        device: Where the model runs.
        seeds: Number of different batches.

    Raises:
        UserError: If tokens are given for images or exceed the model's positions.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        batch: int,
        tokens: int | None,
        precision: Precision,
        device: torch.device,
        seeds: int,
    ) -> None:
        module: Any = architecture.module()
        self.module: QATModule = module
        self.precision, self.device, self.batch = precision, device, batch
        self.seeds = range(seeds)
        self.tokens: int | None = None
        if module.family == "images":
            if tokens is not None:
                raise UserError(f"tokens: {architecture.name} takes images; remove --tokens")
            return
        limit = module.config.max_position_embeddings
        tokens = min(_TOKENS, limit) if tokens is None else tokens
        if not 2 <= tokens <= limit:
            raise UserError(
                f"tokens: {architecture.name} takes from 2 to {limit} tokens per row, not {tokens}"
            )
        self.tokens = tokens

    @property
    def kind_of_loss(self) -> str | None:
        """How a language model's loss is computed; None for images."""
        if self.module.family == "images":
            return None
        return "lean" if getattr(self.module, "lean_loss", False) else "full logits"

    @property
    def unit(self) -> str:
        """What the throughput counts."""
        return "images" if self.tokens is None else "tokens"

    @property
    def items(self) -> int:
        """Tokens or images per step."""
        return self.batch * (self.tokens or 1)

    def build_model(self) -> nn.Module:
        """Make the untouched model with random weights, the same in every run."""
        torch.manual_seed(0)
        with self.device:
            model = self.module.build_model()
        return model.to(torch.bfloat16) if self.precision == "bf16-true" else model

    def batches(self) -> list[Batch]:
        """Make the inputs, one batch per seed, on the device."""
        made = (self.module.example_batch(self.batch, tokens=self.tokens or 0, seed=n) for n in self.seeds)
        return [{key: self._placed(value) for key, value in batch.items()} for batch in made]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the training loss of an assembled model."""
        self.module.model = model
        with self.autocast():
            return self.module.loss(batch)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast region of the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def _placed(self, value: Tensor) -> Tensor:
        narrow = value.is_floating_point() and self.precision == "bf16-true"
        return value.to(self.device, torch.bfloat16 if narrow else None)

"""What every arm computes: one model's training loss on random batches, at one precision.

The loss is the module's own `loss`, under autocast where Lightning's `bf16-mixed` has it.
Inputs are random tokens or images of the model's size; their content does not change the cost, but
each seed is another batch all the same.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from stableqat.bench.architecture import Architecture
from stableqat.errors import UserError
from stableqat.modules import LlamaModule, ViTModule

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
Batch = dict[str, Tensor]

_TOKENS = 2048


class Workload:
    """A model in full precision with its loss and its inputs.

    Args:
        architecture: The model.
        batch: Rows or images a step.
        tokens: Tokens a row; None takes 2048 for a language model.
        precision: As Lightning's Trainer names it.
        device: Where it runs.
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
        self.module = architecture.module()
        self.precision, self.device, self.batch = precision, device, batch
        self.seeds = range(seeds)
        self.tokens: int | None = None
        if isinstance(self.module, LlamaModule):
            limit = self.module.config.max_position_embeddings
            self.tokens = min(_TOKENS, limit) if tokens is None else tokens
            if not 2 <= self.tokens <= limit:
                raise UserError(f"tokens: {architecture.name} takes 2 to {limit} tokens a row, not {tokens}")
        elif not isinstance(self.module, ViTModule):
            raise UserError(f"model: {architecture.class_path} is neither a LlamaModule nor a ViTModule")
        elif tokens is not None:
            raise UserError(f"tokens: {architecture.name} takes images; leave --tokens out")

    @property
    def unit(self) -> str:
        """What the throughput counts."""
        return "images" if self.tokens is None else "tokens"

    @property
    def items(self) -> int:
        """Tokens or images a step."""
        return self.batch * (self.tokens or 1)

    def build_model(self) -> nn.Module:
        """The untouched model with random weights, the same in every run."""
        torch.manual_seed(0)
        with self.device:
            model = self.module.build_model()
        return model.to(torch.bfloat16) if self.precision == "bf16-true" else model

    def batches(self, model: nn.Module) -> list[Batch]:
        """The inputs, one a seed, on the device."""
        return [self._batch(model, torch.Generator().manual_seed(seed)) for seed in self.seeds]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a model of this architecture."""
        self.module.model = model
        with self.autocast():
            return self.module.loss(batch)

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as the precision has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def _batch(self, model: nn.Module, generator: torch.Generator) -> Batch:
        if isinstance(self.module, LlamaModule):
            assert self.tokens is not None
            vocabulary = self.module.config.vocab_size
            ids = torch.randint(vocabulary, (self.batch, self.tokens), generator=generator).to(self.device)
            return {"input_ids": ids, "labels": ids}
        assert isinstance(self.module, ViTModule)
        patches = model.patch_embed
        shape = (self.batch, patches.proj.in_channels, *patches.img_size)  # type: ignore[union-attr, misc]
        images = torch.randn(shape, generator=generator).to(self.device, next(model.parameters()).dtype)
        labels = torch.randint(self.module.num_classes, (self.batch,), generator=generator).to(self.device)
        return {"pixel_values": images, "labels": labels}

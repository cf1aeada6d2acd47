"""A frozen language model as a teacher; all terms of its loss are means over the tokens with a label."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.modules.documents import documents_of
from stableqat.modules.loss import IGNORED, by_autograd, sum_over_rows
from stableqat.modules.teacher import Distillation, Teacher, relative_error


class LanguageTeacher(Teacher):
    """A frozen causal language model of transformers; see `Teacher`."""

    layers = "model.layers"

    def check(self, student: Any) -> None:
        """See `Teacher.check`: the same vocabulary, and for hidden states the same shape."""
        own, config = self.model.config, student.config
        keys = ["vocab_size", *(["num_hidden_layers", "hidden_size"] if self.settings.hidden_weight else [])]
        for key in keys:
            if getattr(own, key) != getattr(config, key):
                less = "" if key == "vocab_size" else ", or set teacher.hidden_weight to 0"
                raise UserError(
                    f"teacher.source: {key} is {getattr(own, key)}, and {getattr(config, key)} in the "
                    f"student; take a teacher of the same family{less}"
                )

    @torch.no_grad()
    def options_for(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Any]:
        """Run the teacher on a batch, for what `lean_forward` needs to compute the student's loss.

        Args:
            input_ids: `(batch, tokens)`.
            position_ids: `(batch, tokens)`, as the student reads them.
        """
        self.to(input_ids.device)
        states = {"output_hidden_states": True} if self.settings.hidden_weight else {}
        with documents_of(position_ids), torch.autocast(input_ids.device.type, enabled=False):
            read = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **states)
        head = self.model.lm_head
        loss = DistillationLoss(
            self.settings, read.last_hidden_state, head.weight, head.bias, read.hidden_states
        )
        return {"loss": loss, **states}


@dataclass
class DistillationLoss:
    """The loss of one batch, given the teacher's output; takes the place of `lean_cross_entropy`.

    Attributes:
        settings: Weights and temperature.
        hidden: The teacher's last hidden states.
        weight: Weight of the teacher's head.
        bias: Bias of the teacher's head, or None.
        states: The teacher's hidden states, embedding first, or None.
    """

    settings: Distillation
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    states: tuple[Tensor, ...] | None

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        hidden_states: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """See `lean_cross_entropy`; `hidden_states` are the student's."""
        counted = labels != IGNORED
        row_loss = by_autograd(partial(self._rows, labels.flatten(), self.hidden.flatten(0, -2)))
        loss = sum_over_rows(hidden, weight, bias, row_loss) / counted.sum()
        if self.states is None:
            return loss
        pairs = zip(self.states[1:], hidden_states[1:], strict=True)
        errors = [(relative_error(*pair) * counted).sum() / counted.sum() for pair in pairs]
        return loss + self.settings.hidden_weight * torch.stack(errors).mean()

    def _rows(self, labels: Tensor, hidden: Tensor, logits: Tensor, part: slice) -> Tensor:
        share = self.settings.weight
        with torch.no_grad():
            theirs = F.linear(hidden[part], self.weight, self.bias).float()
        taught = self.settings.divergence(theirs, logits).masked_fill(labels[part] == IGNORED, 0.0)
        nll = F.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="none")
        return (1 - share) * nll + share * taught

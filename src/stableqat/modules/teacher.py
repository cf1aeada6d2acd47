"""Distillation: pull the quantized student towards the predictions of a full-precision model.

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student) + hidden_weight * error

KL (Hinton et al., arXiv:1503.02531) is taken over the whole vocabulary, both distributions at temperature T,
the teacher's first: the student must cover what the teacher finds likely. The student without its quantizers
is not a teacher, as its latent weights move. All terms are means over the tokens that have a label. The
teacher is frozen, in bfloat16 and outside the module: state dict, optimizer, wrapping and checkpoints do not
know it, so a resumed run loads it again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.modules.documents import documents_of
from stableqat.modules.loss import IGNORED, by_autograd, sum_over_rows


@dataclass
class Distillation:
    """Settings of the teacher.

    Args:
        source: The full-precision model, with the student's vocabulary: run folder, checkpoint, model folder
            or hub name. None takes `init_from`.
        weight: Share of the KL divergence in the loss; the rest is cross-entropy.
        temperature: Softens both distributions; the gradient keeps its size.
        hidden_weight: Weight of the squared error between the hidden states of both after each layer,
            relative to the teacher's; the teacher needs the student's depth and width.
        offload: Keep the teacher's layers in CPU memory, each copied to the device for its forward only.
    """

    source: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"teacher.weight: must be from 0 to 1, not {self.weight}")
        if not self.temperature > 0:
            raise UserError(f"teacher.temperature: must be more than 0, not {self.temperature}")
        if not self.hidden_weight >= 0:
            raise UserError(f"teacher.hidden_weight: must be 0 or more, not {self.hidden_weight}")

    @property
    def is_on(self) -> bool:
        """Whether any weight is above 0."""
        return bool(self.weight or self.hidden_weight)


class Teacher:
    """A frozen causal language model for a student's loss.

    Args:
        model: Full-precision model of transformers; it becomes bfloat16.
        settings: How much it teaches.
    """

    def __init__(self, model: Any, settings: Distillation) -> None:
        self.model = model.eval().requires_grad_(False)
        self.settings = settings
        for parameter in model.parameters():  # not the buffers: rotary tables stay exact
            parameter.data = parameter.data.to(torch.bfloat16)
        self.device = torch.device("cpu")

    def check(self, student: Any) -> None:
        """Refuse a student that cannot learn from this teacher.

        Args:
            student: Config of the student.
        """
        own = self.model.config
        keys = ["vocab_size", *(["num_hidden_layers", "hidden_size"] if self.settings.hidden_weight else [])]
        for key in keys:
            if getattr(own, key) != getattr(student, key):
                less = "" if key == "vocab_size" else ", or set teacher.hidden_weight to 0"
                raise UserError(
                    f"teacher.source: {key} is {getattr(own, key)}, and {getattr(student, key)} in the "
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

    def to(self, device: torch.device) -> None:
        """Move the model to a device; an offloaded one without its layers.

        Args:
            device: Device of the inputs.
        """
        if device == self.device:
            return
        if self.settings.offload:
            layers, self.model.model.layers = self.model.model.layers, nn.ModuleList()
            self.model.to(device)
            self.model.model.layers = layers
            for layer in layers:
                _stream(layer, device)
        else:
            self.model.to(device)
        self.device = device


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
        pairs = list(zip(self.states[1:], hidden_states[1:], strict=True))
        errors = [_relative_error(theirs, own, counted) for theirs, own in pairs]
        return loss + self.settings.hidden_weight * torch.stack(errors).mean()

    def _rows(self, labels: Tensor, hidden: Tensor, logits: Tensor, part: slice) -> Tensor:
        share, temperature = self.settings.weight, self.settings.temperature
        with torch.no_grad():
            theirs = F.linear(hidden[part], self.weight, self.bias).float()
            theirs = F.log_softmax(theirs / temperature, -1)
        own = F.log_softmax(logits / temperature, -1)
        kl = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1) * temperature**2
        kl = kl.masked_fill(labels[part] == IGNORED, 0.0)
        nll = F.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="none")
        return (1 - share) * nll + share * kl


def _relative_error(theirs: Tensor, own: Tensor, counted: Tensor) -> Tensor:
    """Squared error relative to the teacher's state, per token: a few tokens have huge states."""
    theirs, own = theirs.float(), own.float()
    errors = (own - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)
    return (errors * counted).sum() / counted.sum()


def _stream(layer: nn.Module, device: torch.device) -> None:
    """Copy a layer's weights to the device for its forward only."""
    kept = [(m, name, p) for m in layer.modules() for name, p in m.named_parameters(recurse=False)]
    if device.type == "cuda":
        for _, _, parameter in kept:
            parameter.data = parameter.data.pin_memory()

    def load(*_: Any) -> None:
        for module, name, parameter in kept:
            copied = parameter.data.to(device, non_blocking=True)
            setattr(module, name, nn.Parameter(copied, requires_grad=False))

    def unload(*_: Any) -> None:
        for module, name, parameter in kept:
            setattr(module, name, parameter)

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(unload, always_call=True)

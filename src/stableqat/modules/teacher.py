"""Distillation: pull the quantized student towards the predictions of a full-precision model.

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student) + hidden_weight * error

KL (Hinton et al., arXiv:1503.02531) is taken over all classes, both distributions at temperature T, the
teacher's first: the student must cover what the teacher finds likely. Hard distillation (DeiT, Touvron et
al., arXiv:2012.12877, eq. 3) puts the cross-entropy with the teacher's likeliest class in its place. The
student without its quantizers is not a teacher, as its latent weights move. The teacher is frozen, in
bfloat16 and outside the module: state dict, optimizer, wrapping and checkpoints do not know it, so a resumed
run loads it again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.modules.start import state_dict_follows

if TYPE_CHECKING:
    from stableqat.modules.base import QATModule


@dataclass
class Distillation:
    """Settings of the teacher.

    Args:
        source: The full-precision model, with the student's vocabulary or classes: run folder, checkpoint,
            model folder or hub name. None takes `init_from`.
        weight: Share of the teacher's predictions in the loss; the rest is cross-entropy with the labels. A
            vision transformer with a distillation token (timm's deit_*_distilled) learns the former with the
            token's head and the latter with the other.
        temperature: Softens both distributions; the gradient keeps its size.
        hard: Learn only what the teacher finds most likely, not its whole distribution.
        hidden_weight: Weight of the squared error between the hidden states of both, relative to the
            teacher's: a language model's after each layer, a vision transformer's last tokens. The teacher
            needs the student's width, and a language model its depth.
        offload: Keep the teacher's layers in CPU memory, each copied to the device for its forward only.
    """

    source: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    hard: bool = False
    hidden_weight: float = 0.0
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"teacher.weight: must be from 0 to 1, not {self.weight}")
        if not self.temperature > 0:
            raise UserError(f"teacher.temperature: must be more than 0, not {self.temperature}")
        if not self.hidden_weight >= 0:
            raise UserError(f"teacher.hidden_weight: must be 0 or more, not {self.hidden_weight}")

    def of(self, start: str | None) -> "Distillation | None":
        """These settings with their source; None if no weight is above 0.

        Args:
            start: The student's start, the default source.

        Raises:
            UserError: If there is neither.
        """
        if not (self.weight or self.hidden_weight):
            return None
        if (source := self.source or start) is None:
            raise UserError(
                "teacher.source: missing; name the full-precision model, or start from it with init_from"
            )
        return replace(self, source=source)

    def describe(self) -> dict[str, float]:
        """What tables say of it."""
        numbers = {key: getattr(self, key) for key in ("weight", "temperature", "hidden_weight")}
        return {f"teacher_{key}": value for key, value in numbers.items()} | (
            {"teacher_hard": 1.0} if self.hard else {}
        )

    def divergence(self, theirs: Tensor, own: Tensor) -> Tensor:
        """What is lost of the teacher's predictions, `(rows,)`.

        Args:
            theirs: The teacher's logits in float32, `(rows, classes)`.
            own: The student's.
        """
        if self.hard:
            return F.cross_entropy(own, theirs.argmax(-1), reduction="none")
        theirs, own = (F.log_softmax(logits / self.temperature, -1) for logits in (theirs, own))
        return F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1) * self.temperature**2


class Teacher(ABC):
    """A frozen model for a student's loss.

    Attributes:
        layers: Name of the repeated layers in the model.

    Args:
        model: Full-precision model; it becomes bfloat16.
        settings: How much it teaches.
    """

    layers: ClassVar[str]

    def __init__(self, model: nn.Module, settings: Distillation) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.settings = settings
        for parameter in model.parameters():  # not the buffers: rotary tables stay exact
            parameter.data = parameter.data.to(torch.bfloat16)
        self.device = torch.device("cpu")

    @abstractmethod
    def check(self, student: Any) -> None:
        """Refuse a student that cannot learn from this teacher.

        Args:
            student: The training system.
        """

    def to(self, device: torch.device) -> None:
        """Move the model to a device; an offloaded one without its layers.

        Args:
            device: Device of the inputs.
        """
        if device == self.device:
            return
        if self.settings.offload:
            layers: Any = self.model.get_submodule(self.layers)
            self.model.set_submodule(self.layers, nn.ModuleList())
            self.model.to(device)
            self.model.set_submodule(self.layers, layers)
            for layer in layers:
                _stream(layer, device)
        else:
            self.model.to(device)
        self.device = device


def load_frozen(make: Callable[[], "QATModule"]) -> "QATModule":
    """Build a teacher without a trace in the student: its random weights and its coming state dict stay.

    Args:
        make: Makes the training system around the teacher.

    Raises:
        UserError: If its source cannot be loaded.
    """
    with torch.random.fork_rng([]), state_dict_follows(False):
        try:
            module = make()
            module.configure_model()
        except UserError as error:
            raise UserError(f"teacher.source: {str(error).removeprefix('init_from: ')}") from error
    return module


def relative_error(theirs: Tensor, own: Tensor) -> Tensor:
    """Squared error relative to the teacher's state, per token: a few tokens have huge states.

    Args:
        theirs: The teacher's states, `(..., width)`.
        own: The student's.

    Returns:
        `(...)`, float32.
    """
    theirs, own = theirs.float(), own.float()
    return (own - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)


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

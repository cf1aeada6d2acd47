"""A frozen vision transformer as a teacher, and what of a student it teaches.

Without a distillation token, one classifier learns from labels and teacher. With one (DeiT, Touvron et al.,
arXiv:2012.12877, section 4) the class token's classifier learns from the labels and the distillation token's
from the teacher; evaluation takes the mean of both. Last tokens are those after the final norm.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.modules.teacher import Teacher, relative_error


class ImageTeacher(Teacher):
    """A frozen vision transformer of timm; see `Teacher`."""

    layers = "blocks"

    def check(self, student: Any) -> None:
        """See `Teacher.check`: images of the same size, and for last tokens as many of the same width."""
        built = _on_meta(student)
        if hasattr(built, "head_dist") and self.settings.weight == 1:
            raise UserError(
                "teacher.weight: 1 teaches the distillation token's classifier alone, and the class token's "
                "would stay untrained; set it to 0.5, as DeiT does"
            )
        shapes = [self._shape(model) for model in (self.model, built)]
        names = ["image size"]
        if self.settings.hidden_weight:
            names += ["width", "number of patches", "number of class tokens"]
        for name, own, theirs in zip(names, *shapes, strict=False):
            if own != theirs:
                less = "" if name == "image size" else ", or set teacher.hidden_weight to 0"
                raise UserError(
                    f"teacher.source: {name} is {own}, and {theirs} in the student; take a teacher that "
                    f"reads the same images{less}"
                )

    @staticmethod
    def _shape(model: Any) -> tuple[Any, ...]:
        patches = model.patch_embed
        return patches.img_size, model.embed_dim, patches.num_patches, model.num_prefix_tokens

    def loss(self, student: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
        """The loss of a student that `prepare_student` has prepared.

        Args:
            student: The model that trains.
            batch: Images, and their classes or the probabilities of classes.
            smoothing: Share of the labels' target that is spread over all classes.
        """
        settings, images = self.settings, batch["pixel_values"]
        theirs, their_tokens = self.read(images)
        logits, *tokens = student(images, tokens=True) if settings.hidden_weight else (student(images),)
        # the distillation token's head learns from the teacher
        own, taught = logits if isinstance(logits, tuple) else (logits, logits)
        loss = (1 - settings.weight) * F.cross_entropy(own, batch["labels"], label_smoothing=smoothing)
        if settings.weight:
            loss = loss + settings.weight * settings.divergence(theirs, taught.float()).mean()
        if settings.hidden_weight:
            loss = loss + settings.hidden_weight * relative_error(their_tokens, tokens[0]).mean()
        return loss

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32, `(batch, classes)`, and the last tokens, `(batch, tokens, width)`.

        Args:
            images: What the student sees, augmented and mixed.
        """
        self.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.model.forward_features(images.to(torch.bfloat16))
            return self.model.forward_head(tokens).float(), tokens


def prepare_student(model: Any) -> None:
    """Let a student's forward give what a teacher's loss compares: its last tokens, and both heads' logits.

    The forward stays inside the model's hooks, of which FSDP2's give it whole weights.

    Args:
        model: Vision transformer of timm.
    """
    vars(model)["forward"] = MethodType(_forward, model)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)


def _forward(model: Any, images: Tensor, *, tokens: bool = False) -> Any:
    if not tokens:
        return type(model).forward(model, images)
    last = model.forward_features(images)
    return model.forward_head(last), last


def _on_meta(student: Any) -> Any:
    with torch.device("meta"):
        return student.build_model()

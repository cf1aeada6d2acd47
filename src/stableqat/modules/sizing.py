"""What suits a pretrained model where its user says nothing: the learning rate, and the size of a step.

The learning rates of language models are the best of a few on SmolLM2-135M (width 576): 300 steps of 16,384
tokens, AdamW, a cosine. Vision transformers take a tenth: at 3e-4 a pretrained ViT-S of 4 bits forgets its
classes, at 3e-5 it does not (docs/notes.md); published recipes, for four times the batch, have 2e-4 to 5.5e-4
(arXiv 2210.06707, 2302.02210). A wider model takes a smaller one, in proportion to 1 / width, as usual for
Adam; a narrower one takes the same. A step has as many tokens, or `IMAGES` images, in as many parts as the
device needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stableqat.errors import UserError
from stableqat.modules.base import QATModule

WIDTH = 576
FEW_BITS = 3
LR = {"text": (1e-3, 3e-4), "images": (1e-4, 3e-5)}  # up to so few bits, and above
TOKENS, IMAGES = 2**14, 128
LONGEST = 2048  # tokens of a row
STEPS_PER_EPOCH = 8  # at least: of a small source, a step takes fewer rows
CPU_MEMORY = 8e9  # a CPU trains as fast in small parts
STATE = 20  # bytes per parameter: weight, gradient, AdamW's two moments in float32, and a 16-bit copy
SAVED = 3  # bytes per input and output of a linear layer under 16-bit autocast; twice that in float32


class SizedAdamW(torch.optim.AdamW):
    """torch's AdamW, whose learning rate suits the model's width and bits if none is given.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate. null takes, on the command line, 1e-3 for at most 3 bits and 3e-4 for more, a tenth
            of it for images, times 576 / width for models wider than 576.
        options: Those of torch's AdamW.

    Raises:
        UserError: If there is none.
    """

    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        if lr is None:
            raise UserError("lr: missing; only the command line chooses one")
        super().__init__(params, lr=lr, **options)


@dataclass(frozen=True)
class Size:
    """How large a model is, and a row of its data in it.

    Attributes:
        width: Inputs of its first linear layer, the width of the residual stream.
        parameters: Their number.
        activations: Inputs and outputs of linear layers for one row.
    """

    width: int
    parameters: int
    activations: int

    @classmethod
    def of(cls, module: QATModule, tokens: int) -> "Size":
        """Measure a module without computing anything.

        Args:
            module: Not yet configured; it stays so.
            tokens: Of a row of text.
        """
        found: list[tuple[int, int, int]] = []

        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found.append((inputs[0].shape[-1], inputs[0].numel(), output.numel()))

        with torch.random.fork_rng([]), torch.device("meta"), torch.no_grad():
            model = module.build_model()
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(record)
            row = module.example_batch(1, tokens=tokens)[module.input_key]
            with FakeTensorMode(allow_non_fake_inputs=True):  # transformers looks at the values of a real row
                model(torch.empty(row.shape, dtype=row.dtype))
        return cls(
            found[0][0],
            sum(parameter.numel() for parameter in model.parameters()),
            sum(taken + given for _, taken, given in found),
        )

    def learning_rate(self, bits: int | None, family: str) -> float:
        """The peak learning rate of AdamW.

        Args:
            bits: The fewest of any layer; None in full precision.
            family: text or images.
        """
        few, more = LR[family]
        lr = few if bits is not None and bits <= FEW_BITS else more
        return float(f"{lr * min(1.0, WIDTH / self.width):.2g}")

    def parts(self, rows: int, memory: float, mixed: bool) -> int:
        """In how many parts a device computes the rows of a step.

        Args:
            rows: Rows of a step on this device.
            memory: Bytes of the device.
            mixed: Whether it computes in 16 bits.
        """
        row = self.activations * SAVED * (1 if mixed else 2)
        free = 0.8 * memory - STATE * self.parameters
        return ceil(rows / max(1, int(free / row)))


def rows_of_step(tokens: int | None, available: int | None) -> int:
    """The rows of an optimizer step.

    Args:
        tokens: Of a row of text; None for images.
        available: Rows of the train split, or about; None if unknown.
    """
    rows = IMAGES if tokens is None else TOKENS // tokens
    most = rows if available is None else available // STEPS_PER_EPOCH
    return max(1, min(rows, most))

"""What the methods know of a layer's inputs: their mean and their second moment."""

import torch
from torch import Tensor

from stableqat.evaluate.processes import Share


class Moments:
    """Mean and second moment of a layer's inputs, added up in float32.

    Args:
        inputs: Number of the layer's inputs.
        device: Where the sums are kept.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._squares = torch.zeros(inputs, inputs, device=device)
        self._sum = torch.zeros(inputs, device=device)
        self._rows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs `(..., in)`."""
        x = x.detach().flatten(0, -2).float()
        self._squares.addmm_(x.T, x)
        self._sum += x.sum(0)
        self._rows += len(x)

    def total(self, share: Share) -> "Moments":
        """Add up those of all processes, in place."""
        for each in (self._squares, self._sum, self._rows):
            share.total(each)
        return self

    @property
    def rows(self) -> int:
        """How many inputs were added."""
        return int(self._rows)

    @property
    def mean(self) -> Tensor:
        """The mean, `(in,)`."""
        return self._sum / max(self.rows, 1)

    @property
    def hessian(self) -> Tensor:
        """`(2/n) sum x x^T`, `(in, in)`: that of the layer's squared output error, for each row."""
        return self._squares * (2 / max(self.rows, 1))

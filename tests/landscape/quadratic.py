"""A model of one quantized layer whose loss is a quadratic function of its weights, with a known Hessian."""

from functools import partial

import torch
from torch import nn

from stableqat.landscape.space import WeightSpace
from stableqat.quantizers import STE
from stableqat.surgery import quantize_linears

ROWS, INPUTS = 3, 4
EIGENVALUES = [9.0, 5.0, 2.0, *[0.5] * 8, -3.0]


class Quadratic(nn.Module):
    """`f(w) = <g, w> + <w, H w> / 2 + 7`, on the weight of one layer; `losses` are two batches of it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(INPUTS, ROWS, bias=False)).double()
        quantize_linears(self.net, partial(STE, bits=4))
        count = ROWS * INPUTS
        self.turn = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64))[0]  # eigenvectors
        self.hessian = self.turn @ torch.diag(torch.tensor(EIGENVALUES, dtype=torch.float64)) @ self.turn.T
        self.slope = torch.randn(count, dtype=torch.float64)
        self.space = WeightSpace(self.net)

    def weight(self) -> torch.Tensor:
        """What the layer multiplies with."""
        return self.net(torch.eye(INPUTS, dtype=torch.float64)).T.flatten()

    def batch(self, share: float) -> torch.Tensor:
        """One batch's part of the loss: they differ, and their mean is the loss."""
        w = self.weight()
        return w @ self.hessian @ w * share + 2 * (1 - share) * (self.slope @ w) + 7

    @property
    def losses(self):
        return [lambda: self.batch(1.0), lambda: self.batch(0.0)]

    def value(self, w: torch.Tensor) -> torch.Tensor:
        """The loss in closed form."""
        return self.slope @ w + w @ self.hessian @ w / 2 + 7

    def point(self, w: torch.Tensor) -> list[torch.Tensor]:
        """A vector as a point of the space."""
        return [w.view(ROWS, INPUTS)]

"""Methods that this package does not have, hosted by its interface: each is a class of a few lines."""

from dataclasses import replace
from math import cos, pi

import torch
from torch import nn

from stableqat import ops
from stableqat.quantizers import STE, Quantizer
from stableqat.quantizers.shard import local


class Hardening(Quantizer):
    """Between the latent weight and its grid value, ever nearer to the latter."""

    def __init__(self, weight, **kwargs):
        super().__init__(weight, surrogate=ops.Identity(), **kwargs)

    def forward(self, weight):
        hard = super().forward(weight)
        return torch.lerp(weight, hard, self.progress) if self.training else hard


class Stochastic(Quantizer):
    """Rounds up or down with probabilities that keep the mean, inside the grid's range."""

    def __init__(self, weight, **kwargs):
        super().__init__(weight, surrogate=ops.Identity(), **kwargs)

    def forward(self, weight):
        if self.training:
            noise = torch.rand_like(weight) - 0.5
            scale = self.effective_scale().repeat_interleave(weight.shape[1] // self.scale.shape[1], dim=1)
            weight = weight + noise * scale
        return super().forward(weight)


class Dampened(STE):
    """Oscillation dampening (Nagel et al. 2022): the latent weight is drawn to its level, ever harder."""

    def __init__(self, weight, *, strength=0.1, **kwargs):
        super().__init__(weight, **kwargs)
        self.strength = strength

    def penalty(self, weight):
        quantized = self.quantize(weight)
        low, high = (
            replace(quantized, codes=torch.full_like(quantized.codes, q)).dequantize()
            for q in (self.grid.q_min, self.grid.q_max)
        )
        factor = self.strength * (1 - cos(pi * self.progress)) / 2
        return factor * (quantized.dequantize() - weight.clamp(low, high)).square().sum()


class Freezing(STE):
    """Iterative freezing (Nagel et al. 2022): a weight that oscillates keeps the code it is at most often."""

    def __init__(self, weight, *, threshold=0.02, momentum=0.1, **kwargs):
        self.threshold, self.momentum = threshold, momentum
        super().__init__(weight, **kwargs)

    def allocate(self, shape, **options):
        super().allocate(shape, **options)
        for name in ("code", "direction", "oscillation", "average", "frozen"):  # parameters: FSDP shards them
            state = nn.Parameter(torch.full(self.weight_shape, torch.nan, **options), requires_grad=False)
            self.register_parameter(name, state)

    @torch.no_grad()
    def initialize(self, weight):
        super().initialize(weight)
        codes = self.quantize(weight).codes
        self.code.copy_(codes)
        self.average.copy_(codes)
        self.frozen.fill_(self.grid.q_max + 1)  # no code
        self.direction.zero_()
        self.oscillation.zero_()

    def after_step(self, weight, lr, progress):
        code, direction, oscillation, average, frozen = map(
            local, (self.code, self.direction, self.oscillation, self.average, self.frozen)
        )
        made = self.quantize(weight)
        change = (made.codes - code).sign()
        oscillation.lerp_((change * direction < 0).float(), self.momentum)
        direction.copy_(torch.where(change == 0, direction, change))
        average.lerp_(made.codes.float(), self.momentum)
        code.copy_(made.codes)
        free = frozen > self.grid.q_max
        frozen.copy_(torch.where(free & (oscillation > self.threshold), average.round(), frozen))
        keep = frozen <= self.grid.q_max
        codes = torch.where(keep, frozen, made.codes).to(torch.int8)
        weight.copy_(torch.where(keep, replace(made, codes=codes).dequantize(), weight))


class LowRank(STE):
    """The weight stays; a product of two small matrices is learned beside it (as LR-QAT, 2406.06385)."""

    trains_weight = False

    def __init__(self, weight, *, rank=12, **kwargs):
        self.rank = rank
        super().__init__(weight, **kwargs)

    def allocate(self, shape, **options):
        rows, inputs = self.weight_shape
        super().allocate(shape, **options)
        self.up = nn.Parameter(torch.full((rows, self.rank), torch.nan, **options))
        self.down = nn.Parameter(torch.full((self.rank, inputs), torch.nan, **options))

    def initialize(self, weight):
        super().initialize(weight)
        nn.init.zeros_(self.up)
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def roles(self):
        return {**super().roles(), "up": "weight", "down": "weight"}

    def latent(self, weight):
        return weight + self.up @ self.down

    def set_latent(self, weight, latent):
        nn.init.zeros_(self.up)
        super().set_latent(weight, latent)


class Rotated(STE):
    """Rounds the weight in a basis in which no input stands out; the layer's input is rotated likewise."""

    def latent(self, weight):
        return rotate(weight)

    def set_latent(self, weight, latent):
        super().set_latent(weight, rotate(latent))


class Pulled(STE):
    """A penalty whose gradient is 1 for every weight, and a record of what the clock says."""

    def __init__(self, weight, **options):
        super().__init__(weight, **options)
        self.seen = []

    @property
    def seen_progress(self):
        return [progress for progress, _ in self.seen]

    def penalty(self, weight):
        return weight.sum()

    def after_step(self, weight, lr, progress):
        self.seen.append((round(progress, 6), lr))


def rotate(x):
    """Along the last dimension by a Hadamard matrix, orthonormal and its own inverse."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix / x.shape[-1] ** 0.5


class RotatedInput(nn.Module):
    """The other half of `Rotated`."""

    def forward(self, x):
        return rotate(x)

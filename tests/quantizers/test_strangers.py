"""Two methods that this package does not have, hosted by its interface.

`Hardening` is soft at first and hardens as its own clock advances; `Stochastic` rounds at
random while it trains. Both deploy what `quantize` says, like any other method.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stableqat import ops
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import STE, Quantizer
from stableqat.surgery import quantize_linears


class Hardening(Quantizer):
    """Between the latent weight and its grid value, ever nearer to the latter."""

    clock: torch.Tensor

    def __init__(self, weight, *, steps=20, **kwargs):
        super().__init__(weight, surrogate=ops.Identity(), **kwargs)
        self.steps = steps

    def allocate(self, shape, **options):
        super().allocate(shape, **options)
        self.register_buffer("clock", torch.zeros((), device=options["device"]))

    def initialize(self, weight):
        super().initialize(weight)
        self.clock.zero_()

    def forward(self, weight):
        hard = super().forward(weight)
        if not self.training:
            return hard
        self.clock += 1
        return torch.lerp(weight, hard, (self.clock / self.steps).clamp(max=1))


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


STRANGERS = [Hardening, Stochastic]
SHAPES = {"channel": {}, "group": {"group_size": 8}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def train(model, steps=80):
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    y = (x[:, :4] * x[:, 4:8]).sign()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_lives_a_whole_life(stranger, shape):
    factory = partial(stranger, bits=3, **SHAPES[shape])
    model = net()
    report = quantize_linears(model, factory, skip=["4"])
    assert report.swapped == ["0", "2"]
    losses = train(model.train())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    # what is deployed is the evaluation forward, bit for bit
    model.eval()
    x = torch.randn(32, 16)
    answer = model(x)
    assert torch.equal(model(x), answer)
    deployed = net().eval()
    for name, layer in quantized_layers(model).items():
        quantized = layer.weight_quantizer.quantize(layer.weight)
        assert torch.equal(quantized.dequantize(), layer.weight_quantizer(layer.weight))
        with torch.no_grad():
            deployed.get_submodule(name).weight.copy_(quantized.dequantize())
            deployed.get_submodule(name).bias.copy_(layer.bias)
    deployed[4].load_state_dict(model[4].state_dict())
    assert torch.equal(deployed(x), answer)

    # a state dict carries all of it into a model whose scales were never set
    fresh = net()
    quantize_linears(fresh, factory, skip=["4"], initialize=False)
    assert fresh[0].weight_quantizer.scale.isnan().all()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), answer)
    for buffer, other in zip(fresh.buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_the_soft_one_hardens_with_its_own_clock():
    weight = torch.randn(8, 64)
    soft, ste = Hardening(weight, bits=2, steps=10).train(), STE(weight, bits=2)
    hard = ste(weight)
    assert torch.equal(soft.eval()(weight), hard)  # evaluation is hard from the first step on
    soft.train()
    gaps = [(soft(weight) - hard).abs().max().item() for _ in range(10)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5
    assert gaps[-1] == 0
    assert soft.clock == 10
    assert torch.equal(soft(weight), hard)

    again = Hardening(weight.to("meta"), bits=2, steps=10).to_empty(device="cpu")
    again.initialize(weight)
    assert again.clock == 0
    again.load_state_dict(soft.state_dict())
    assert again.clock == 11


def test_the_stochastic_one_is_right_on_average():
    weight = torch.rand(4, 32) * 2 - 1.4
    quantizer = Stochastic(weight, bits=2).train()
    with torch.no_grad():
        quantizer.scale.fill_(1.0)  # all inside [-2, 1]: rounding keeps the mean
    draws = torch.stack([quantizer(weight) for _ in range(1000)]).detach()
    assert set(draws.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), weight, rtol=0, atol=0.08)
    assert torch.equal(quantizer.eval()(weight), weight.round())


def test_dropout_and_strangers_share_one_seed():
    weight = torch.randn(4, 32)
    quantizer = Stochastic(weight, bits=2).train()
    torch.manual_seed(7)
    first = quantizer(weight)
    assert not torch.equal(first, quantizer(weight))
    torch.manual_seed(7)
    assert torch.equal(first, quantizer(weight))

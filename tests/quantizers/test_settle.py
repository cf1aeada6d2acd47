"""`settle` is the inverse of `quantize`: codes and scales come back bit for bit, or are refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stableqat.quantizers
from stableqat.errors import UserError
from stableqat.quantizers import LRQAT, STE, Quantizer
from strangers import Dampened, Freezing, LowRank, Rotated

ROWS, INPUTS = 6, 32
METHODS = [
    cls
    for name in stableqat.quantizers.__all__
    if isinstance(cls := getattr(stableqat.quantizers, name), type)
    and issubclass(cls, Quantizer)
    and cls is not Quantizer
]
STRANGERS = [Dampened, Freezing, LowRank, Rotated]
GRANULARITIES = ({}, {"group_size": 8}, {"per_channel": False})
GRIDS = [{"bits": bits, "grid": grid} for grid in ("integer", "stretched") for bits in (2, 3, 8)]
GRIDS += [{"levels": 3}, {"bits": 1}]
each_grid = pytest.mark.parametrize("options", GRIDS, ids=lambda o: "-".join(str(x) for x in o.values()))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def same(made, other):
    return torch.equal(made.codes, other.codes) and torch.equal(made.scale, other.scale)


def cases(method):
    """Granularities and weights, in bfloat16 as well for the methods of this suite."""
    for granularity in GRANULARITIES:
        for dtype in (torch.float32,) if method in STRANGERS else (torch.float32, torch.bfloat16):
            yield granularity, (torch.randn(ROWS, INPUTS) * 0.05).to(dtype)


@each_grid
@pytest.mark.parametrize("method", [*METHODS, *STRANGERS], ids=lambda cls: cls.__name__)
def test_what_a_weight_becomes_settles_without_moving_it(method, options):
    for granularity, weight in cases(method):
        quantizer = method(weight, **options, **granularity)
        made, before = quantizer.quantize(weight), weight.clone()
        quantizer.settle(weight, made)
        assert same(quantizer.quantize(weight), made)
        if method is not Rotated:  # the rotation and back round
            assert torch.equal(weight, before)
        assert torch.equal(quantizer.scale_floor, quantizer.scale.detach() * 1e-4)


@each_grid
@pytest.mark.parametrize("method", [*METHODS, *STRANGERS], ids=lambda cls: cls.__name__)
def test_any_codes_and_scales_settle(method, options):
    for granularity, weight in cases(method):
        quantizer = method(weight.to("meta"), **options, **granularity).to_empty(device="cpu")
        for parameter in quantizer.parameters():  # as a model whose scales were never set
            torch.nn.init.constant_(parameter, torch.nan)
        if method in (LRQAT, LowRank, Freezing):
            quantizer.initialize(weight)
        grid = quantizer.grid
        codes = torch.randint(grid.q_min, grid.q_max + 1, weight.shape, dtype=torch.int8)
        scale = torch.rand(quantizer.scale.shape) + 0.1
        quantizer.settle(weight, made := replace(quantizer.quantize(weight), codes=codes, scale=scale))
        assert same(quantizer.quantize(weight), made)
        if weight.dtype == torch.float32 and method is not Rotated:
            assert torch.equal(quantizer.eval()(weight), made.dequantize())


@given(
    bits=st.integers(2, 8),
    grid=st.sampled_from(["integer", "stretched"]),
    exponent=st.integers(-120, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_scales_of_any_size_settle(bits, grid, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 16, generator=generator).to(dtype)
    quantizer = STE(weight, bits=bits, grid=grid)
    codes = torch.randint(quantizer.grid.q_min, quantizer.grid.q_max + 1, (3, 16), generator=generator)
    scale = (torch.rand(3, 1, generator=generator) + 1) * 2.0**exponent
    made = replace(quantizer.quantize(weight), codes=codes.to(torch.int8), scale=scale)
    quantizer.settle(weight, made)
    assert same(quantizer.quantize(weight), made)


def refused(quantizer, weight, quantized, message):
    before = [weight.clone(), *(p.detach().clone() for p in quantizer.parameters())]
    with pytest.raises(UserError, match=message):
        quantizer.settle(weight, quantized)
    for was, now in zip(before, [weight, *quantizer.parameters()], strict=True):
        assert torch.equal(was, now)


def test_what_cannot_be_held_is_refused_and_changes_nothing():
    weight = torch.randn(ROWS, INPUTS)
    quantizer = STE(weight, bits=2)
    made = quantizer.quantize(weight)
    half = STE(weight, bits=2, grid="stretched").quantize(weight)
    refused(quantizer, weight, half, "2-bit integer grid does not hold these codes")
    refused(quantizer, weight, STE(weight, bits=3).quantize(weight), "use their own grid")
    refused(
        quantizer, weight, STE(weight, bits=2, group_size=8).quantize(weight), r"scales \(6, 4\) do not fit"
    )
    for bad in (0.0, torch.nan, torch.inf):
        scale = made.scale.clone()
        scale[2] = bad
        refused(quantizer, weight, replace(made, scale=scale), "a scale is zero or not a number")
    tiny = torch.full_like(made.scale, 1e-45)  # half of it is not a number of this type
    quantizer = STE(weight, bits=2, grid="stretched")
    refused(quantizer, weight, replace(half, scale=tiny), "float32 weights with .* cannot hold these codes")
    quantizer.to(torch.bfloat16)
    refused(quantizer, weight, half, "bfloat16 scales cannot hold these codes and scales")

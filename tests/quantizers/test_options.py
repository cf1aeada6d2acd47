"""Options of a quantizer: which grid they mean, and one clear line where they mean none."""

import pytest
import torch

from stableqat.errors import UserError
from stableqat.quantizers import DSQ, STE, ParetoQ, StableQAT

METHODS = [STE, DSQ, ParetoQ, StableQAT]
WEIGHT = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^bits: missing"),
        ({"bits": 0}, r"^bits: .* 1 to 8, not 0"),
        ({"bits": -1}, r"^bits: .* 1 to 8, not -1"),
        ({"bits": 9}, r"^bits: .* 1 to 8, not 9"),
        ({"bits": 2.5}, r"^bits: must be a whole number .* not 2.5"),
        ({"bits": True}, r"^bits: must be a whole number"),
        ({"levels": 5}, r"^levels: must be 3 or a power of two from 2 to 256, not 5"),
        ({"levels": 1}, r"^levels: "),
        ({"levels": 512}, r"^levels: "),
        ({"levels": 3, "bits": 3}, r"^levels: 3 levels take 2 bit.* bits is 3"),
        ({"levels": 3, "grid": "integer"}, r"^levels: 3 levels are not the integer grid"),
        ({"levels": 4, "grid": "ternary"}, r"^levels: 4 levels are not the ternary grid"),
        ({"bits": 1, "grid": "integer"}, r"^bits: the integer grid takes 2 to 8 bits, not 1"),
        ({"bits": 1, "grid": "stretched"}, r"^bits: the stretched grid"),
        ({"bits": 3, "grid": "ternary"}, r"^bits: the ternary grid takes 2 bits, not 3"),
        ({"bits": 2, "grid": "binary"}, r"^bits: the binary grid takes 1 bits, not 2"),
        ({"bits": 2, "grid": "log2"}, r"^grid: 'log2' is unknown"),
        ({"bits": 2, "mask": "clip"}, r"^mask: 'clip' is unknown; choose one of range, levels, none"),
        (
            {"bits": 2, "scale_init": "minmax"},
            r"^scale_init: 'minmax' is unknown; choose one of signed_mse, mse",
        ),
        ({"bits": 2, "group_size": 7}, r"^group_size: 7 does not divide the layer's 48 inputs"),
        ({"bits": 2, "group_size": 96}, r"^group_size: 96 does not divide"),
        ({"bits": 2, "group_size": 0}, r"^group_size: "),
        ({"bits": 2, "group_size": -8}, r"^group_size: "),
        ({"bits": 2, "group_size": 8, "per_channel": False}, r"^group_size: groups divide a row"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(options, message):
    for method in METHODS:
        for device in ("cpu", "meta"):
            with pytest.raises(UserError, match=message) as caught:
                method(WEIGHT.to(device), **options)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (StableQAT, {"amplitude": 0.3}, r"^amplitude: at 0.3 .* change sign"),
        (StableQAT, {"amplitude": 0.22508}, r"^amplitude: "),
        (StableQAT, {"amplitude": -0.1}, r"^amplitude: "),
        (StableQAT, {"harmonics": 0}, r"^harmonics: "),
        (StableQAT, {"amplitude": 0.24, "harmonics": 2}, r"^amplitude: "),
        (DSQ, {"a": 0.0}, r"^a: must lie between 0 and 1, not 0"),
        (DSQ, {"a": 1.0}, r"^a: "),
        (DSQ, {"a": -0.2}, r"^a: "),
    ],
)
def test_refused_by_a_method(method, options, message):
    with pytest.raises(UserError, match=message):
        method(WEIGHT, bits=2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_does_not_exist(method):
    with pytest.raises(TypeError, match="w_bits"):
        method(WEIGHT, w_bits=2)


def test_a_vector_has_no_rows():
    with pytest.raises(UserError, match="two or more dimensions"):
        STE(torch.randn(8), bits=2)


@pytest.mark.parametrize(
    ("options", "name", "bits"),
    [
        ({"bits": 1}, "binary", 1),
        ({"levels": 2}, "binary", 1),
        ({"levels": 3}, "ternary", 2),
        ({"levels": 3, "bits": 2}, "ternary", 2),
        ({"grid": "ternary"}, "ternary", 2),
        ({"grid": "binary"}, "binary", 1),
        ({"levels": 16}, "integer", 4),
        ({"bits": 4}, "integer", 4),
        ({"bits": 4, "grid": "stretched"}, "stretched", 4),
        ({"bits": 2, "grid": "integer"}, "integer", 2),
        ({"levels": 4, "grid": "stretched"}, "stretched", 2),
        ({"bits": 3.0}, "integer", 3),
    ],
)
def test_which_grid_the_options_mean(options, name, bits):
    for method in METHODS:
        quantizer = method(WEIGHT, **options)
        assert (quantizer.grid.name, quantizer.bits) == (name, bits)
        assert type(quantizer.bits) is int


def test_the_methods_differ_at_two_bits_only():
    for bits in range(1, 9):
        names = {method.__name__: method(WEIGHT, bits=bits).grid.name for method in METHODS}
        shared = {names["STE"], names["DSQ"], names["StableQAT"]}
        assert shared == {"binary" if bits == 1 else "integer"}
        assert names["ParetoQ"] == ("stretched" if bits == 2 else shared.pop())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["integer", "stretched", "ternary", "binary"])
def test_every_method_runs_on_any_grid(method, grid):
    weight = WEIGHT.clone().requires_grad_()
    bits = {"binary": 1}.get(grid, 2)
    for mask in ("range", "levels", "none"):
        quantizer = method(weight, bits=bits, grid=grid, mask=mask)
        assert quantizer.surrogate.mask == mask
        value = quantizer(weight)
        assert torch.equal(quantizer.quantize(weight).dequantize(), value)
        value.square().sum().backward()
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale_init", ["signed_mse", "mse", "max", "lsq", "absmax_as_step"])
def test_scale_init_reaches_the_scale(method, scale_init):
    quantizer = method(WEIGHT, bits=2, grid="integer", scale_init=scale_init)
    largest, mean = WEIGHT.abs().amax(1), WEIGHT.abs().mean(1)
    expected = {"max": largest / 2, "lsq": 2 * mean, "absmax_as_step": largest}
    if scale_init in expected:
        torch.testing.assert_close(quantizer.scale.flatten(), expected[scale_init])
    else:  # the methods start equal
        assert torch.equal(quantizer.scale, STE(WEIGHT, bits=2, grid="integer", scale_init=scale_init).scale)

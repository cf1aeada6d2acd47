"""What every quantizer keeps, for each class found by subclassing, at every width and type."""

import io

import pytest
import torch

import stableqat.quantizers
from stableqat.errors import UserError
from stableqat.quantizers import Quantizer

ROWS, INPUTS = 6, 32
CHANNEL, GROUP, TENSOR = {}, {"group_size": 8}, {"per_channel": False}
GRANULARITIES = (CHANNEL, GROUP, TENSOR)
WIDTHS = range(1, 9)


def subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


# the package's own: other tests define strangers
METHODS = sorted(
    (c for c in subclasses(Quantizer) if c.__module__.startswith("stableqat.")), key=lambda c: c.__name__
)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)
TYPES = {torch.float32: WIDTHS, torch.bfloat16: (1, 2, 8), torch.float64: (1, 2, 8)}
each_case = pytest.mark.parametrize(
    ("bits", "dtype"), [(bits, dtype) for dtype, widths in TYPES.items() for bits in widths], ids=str
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_weight(dtype=torch.float32, requires_grad=False):
    return (torch.randn(ROWS, INPUTS) * 0.05).to(dtype).requires_grad_(requires_grad)


def trainable(quantizer):
    return {name: p for name, p in quantizer.named_parameters() if p.requires_grad}


def expand(scale):
    """The scale of every weight."""
    return scale.repeat_interleave(INPUTS // scale.shape[1], dim=1).expand(ROWS, INPUTS)


def test_the_four_methods_are_found_and_exported():
    assert {"STE", "DSQ", "ParetoQ", "StableQAT"} <= {c.__name__ for c in METHODS}
    assert {c.__name__ for c in METHODS} <= set(stableqat.quantizers.__all__)


@each_method
@each_case
def test_values_lie_on_the_grid(method, bits, dtype):
    weight = make_weight(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for options in GRANULARITIES:
        quantizer = method(weight, bits=bits, **options).eval()
        value = quantizer(weight)
        assert value.shape == weight.shape
        assert value.dtype == dtype
        levels = torch.tensor(quantizer.grid.levels, dtype=working)
        assert len(levels) <= 2**bits
        # (out, in, level): each value is exactly one of the scale's multiples, rounded to the type
        on_grid = (expand(quantizer.scale.detach().to(working)).unsqueeze(-1) * levels).to(dtype)
        assert (value.unsqueeze(-1) == on_grid).any(-1).all()
        if options is CHANNEL:
            assert all(len(row.unique()) <= 2**bits for row in value)
        assert torch.equal(quantizer(value), value)  # idempotent


@each_method
@each_case
def test_dequantize_is_the_evaluation_forward_bit_for_bit(method, bits, dtype):
    weight = make_weight(dtype)
    for options in GRANULARITIES:
        quantizer = method(weight, bits=bits, **options).eval()
        quantized = quantizer.quantize(weight)
        assert quantized.codes.dtype == torch.int8
        assert quantized.codes.shape == weight.shape
        assert quantized.scale.shape == quantizer.scale.shape
        assert quantized.bits == quantizer.bits
        assert not quantized.codes.requires_grad
        value = quantized.dequantize()
        assert value.dtype == dtype
        assert torch.equal(value, quantizer(weight))
        # the written formula: scale * (code - zero_point)
        written = expand(quantized.scale.double()) * (quantized.codes.double() - quantized.zero_point)
        torch.testing.assert_close(
            value.double(), written, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0
        )


@each_method
@each_case
def test_a_power_of_two_passes_through(method, bits, dtype):
    """Q(c * w; c * s) = c * Q(w; s)."""
    weight = make_weight(dtype)
    for c in (2.0**-12, 8.0):
        quantizer = method(weight, bits=bits, **GROUP).eval()
        before = quantizer(weight)
        with torch.no_grad():
            for name, parameter in quantizer.named_parameters():
                if "scale" in name:
                    parameter.mul_(c)
        assert torch.equal(quantizer(weight * c), before * c)
        assert torch.equal(method(weight * c, bits=bits, **GROUP).eval()(weight * c), before * c)


@each_method
@each_case
def test_every_parameter_learns(method, bits, dtype):
    for options in GRANULARITIES:
        weight = make_weight(dtype, requires_grad=True)
        quantizer = method(weight, bits=bits, **options).train()
        parameters = trainable(quantizer) | ({"weight": weight} if method.trains_weight else {})
        before = {name: p.detach().clone() for name, p in parameters.items()}
        target = torch.randn_like(weight)
        optimizer = torch.optim.Adam(parameters.values(), lr=0.01)

        reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
        for _ in range(2):  # a factor whose partner is zero learns from the second step on
            optimizer.zero_grad()
            (quantizer(weight) - target).square().sum().backward()
            for name, parameter in parameters.items():
                reached[name] |= parameter.grad != 0
            optimizer.step()

        for name, parameter in parameters.items():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == parameter.dtype
            share = reached[name].float().mean()
            assert share > 0.3 if name == "weight" else share == 1, name  # a mask cuts some weights
            assert not torch.equal(parameter, before[name]), name


@each_method
def test_state_dict_round_trip(method):
    for bits in WIDTHS:
        weight = make_weight()
        trained = method(weight, bits=bits, **GROUP)
        with torch.no_grad():
            for parameter in trainable(trained).values():
                parameter.mul_(1.37)
        file = io.BytesIO()
        torch.save(trained.state_dict(), file)
        file.seek(0)
        fresh = method(torch.randn(ROWS, INPUTS), bits=bits, **GROUP)
        assert not torch.equal(fresh.scale_floor, trained.scale_floor)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh.eval()(weight), trained.eval()(weight))
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), trained.parameters(), strict=True))


@each_method
def test_meta_then_initialize(method):
    for bits in WIDTHS:
        weight = make_weight()
        for options in GRANULARITIES:
            torch.manual_seed(bits)
            direct = method(weight, bits=bits, **options).eval()
            later = method(weight.to("meta"), bits=bits, **options).eval()
            assert all(t.is_meta for t in later.state_dict().values())
            assert later(weight.to("meta")).is_meta
            torch.manual_seed(bits)
            later.to_empty(device="cpu").initialize(weight)
            assert list(later.state_dict()) == list(direct.state_dict())
            for name, tensor in direct.state_dict().items():
                assert torch.equal(later.state_dict()[name], tensor), name
            assert torch.equal(later(weight), direct(weight))


@each_method
def test_parameters_are_float32_small_and_never_0d(method):
    for bits in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for options, shape in zip(GRANULARITIES, [(ROWS, 1), (ROWS, 4), (1, 1)], strict=True):
                quantizer = method(make_weight(dtype), bits=bits, **options)
                assert quantizer.scale.shape == shape
                assert all(parameter.dtype == torch.float32 for parameter in quantizer.parameters())
                roles = quantizer.roles()
                scales = [p for name, p in quantizer.named_parameters() if roles[name] == "scale"]
                assert all(parameter.shape == shape for parameter in scales)
                assert len(scales) <= 4
                # nothing of the weight's size is kept
                kept = {
                    name: tensor for name, tensor in quantizer.state_dict().items() if roles[name] != "scale"
                }
                assert all(method.__name__ == "LRQAT" and name.startswith("factor") for name in kept)


@each_method
def test_casts(method):
    for bits in WIDTHS:
        weight = make_weight()
        quantizer = method(weight, bits=bits, **GROUP).eval()
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            cast = weight.to(dtype)
            assert torch.equal(quantizer.quantize(cast).dequantize(), quantizer(cast))
        for dtype in (torch.bfloat16, torch.float64):
            quantizer.to(dtype)
            assert torch.equal(quantizer(weight), quantizer.quantize(weight).dequantize())


@pytest.mark.gpu
@each_method
def test_moves_to_a_gpu(method):
    weight = make_weight()
    for bits in WIDTHS:
        quantizer = method(weight, bits=bits, **GROUP).eval()
        value = quantizer(weight)
        quantizer.cuda()
        assert torch.equal(quantizer(weight.cuda()).cpu(), value)
        assert torch.equal(quantizer.quantize(weight.cuda()).dequantize().cpu(), value)


@each_method
def test_describe_is_flat_and_plain(method):
    for bits in WIDTHS:
        quantizers = [method(make_weight(), bits=bits, **options) for options in GRANULARITIES]
        for quantizer in quantizers:
            described = quantizer.describe()
            assert described["method"] == method.__name__
            assert described["bits"] == bits
            assert described["mask"] == "range"
            assert described["scale_init"] == "signed_mse"
            assert described["grid"] == quantizer.grid.name
            assert all(type(value) in (str, int, float) for value in described.values())
        assert len({tuple(q.describe().items()) for q in quantizers}) == 3  # the granularity shows


@each_method
def test_a_scale_never_acts_as_zero_or_changes_its_sign(method):
    for bits in WIDTHS:
        for bad in (0.0, -0.3):
            weight = make_weight(requires_grad=True)
            quantizer = method(weight, bits=bits).eval()  # what is deployed
            floor = 1e-4 * quantizer.scale.detach().clone()
            with torch.no_grad():
                quantizer.scale.copy_(bad * floor.sign())
            value = quantizer(weight)
            assert value.isfinite().all()
            assert torch.equal(quantizer.quantize(weight).scale, floor)
            assert torch.equal(value, quantizer.quantize(weight).dequantize())
            assert (value.abs() <= 1.01 * floor.abs() * quantizer.grid.outermost).all()
            (value - weight).square().sum().backward()
            assert quantizer.scale.grad.isfinite().all()
            assert (quantizer.scale.grad * floor < 0).all()  # a larger scale would help: the way back is open


@each_method
def test_the_floor_is_kept_with_the_scale(method):
    weight = make_weight()
    quantizer = method(weight, bits=2)
    assert torch.equal(quantizer.scale_floor, quantizer.scale.detach() * 1e-4)
    assert "scale_floor" not in trainable(quantizer)
    assert "scale_floor" in quantizer.state_dict()


@each_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(method, bad):
    weight = make_weight()
    weight[2, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        method(weight, bits=2)


@each_method
def test_a_scale_that_is_nan_is_loud(method):
    weight = make_weight()
    quantizer = method(weight, bits=2)
    with torch.no_grad():
        quantizer.scale[1] = torch.nan
    assert quantizer(weight).isnan().any(1).tolist() == [False, True, False, False, False, False]


@each_method
def test_autocast(method):
    """Masters in float32: the value comes in the compute type, rounded once, gradients in float32."""
    weight = make_weight(requires_grad=True)
    quantizer = method(weight, bits=2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        value = quantizer(weight)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, quantizer(weight).bfloat16())
    value.float().square().sum().backward()
    assert (weight.grad is not None) == method.trains_weight
    assert weight.grad is None or weight.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in trainable(quantizer).values())

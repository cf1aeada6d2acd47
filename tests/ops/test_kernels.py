"""The fused kernels against `kernel_oracle`, on a GPU where there is one, else in Triton's interpreter.

Values are compared bit for bit with the torch reference's, up to the sign of zero.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from importlib import import_module
from math import gcd

import closed_form
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_oracle import BF16, DEVICE, FLOAT, HALF, Case, errors, expected_gradients, expected_value, sample

from stableqat.errors import UserError
from stableqat.ops import (
    Constant,
    Fourier,
    Grid,
    Identity,
    KernelForm,
    Permuted,
    Surrogate,
    Tanh,
    fake_quantize,
    make_grid,
    reference,
)
from stableqat.ops.operands import Operands, Spec, from_text, to_text

pytest.importorskip("triton.language")
fused = import_module("stableqat.ops.fused")
pytestmark = pytest.mark.usefixtures("rounding_as_on_a_gpu")

GRIDS = [("integer", 2), ("integer", 3), ("integer", 4), ("integer", 8), ("stretched", 2), ("stretched", 4)]
GRIDS += [("ternary", 2), ("binary", 1)]
MASKS = ("range", "levels", "none")
SURROGATES = {
    "identity": Identity(),
    "constant": Constant(value=0.3025),
    "fourier-1": Fourier(amplitude=0.21),
    "fourier-1-weak": Fourier(amplitude=0.05),
    "fourier-2": Fourier(amplitude=0.23, harmonics=2),
    "fourier-3": Fourier(amplitude=0.2, harmonics=3),
    "fourier-5": Fourier(amplitude=0.19, harmonics=5),
    "tanh": Tanh(),
}
LAYOUTS = [
    ((1, 1), (1, 1)),
    ((1, 7), (1, 1)),
    ((3, 5), (3, 1)),
    ((3, 5), (3, 5)),  # a group of one weight
    ((7, 129), (7, 1)),
    ((7, 129), (7, 3)),
    ((7, 129), (1, 1)),
    ((2, 3, 5, 4), (2, 1)),
    ((2, 3, 5, 4), (2, 6)),
    ((64, 48), (64, 1)),
    ((16, 96), (16, 3)),  # groups of 32
    ((16, 96), (16, 2)),
    ((5, 384), (5, 3)),
    ((1, 32768), (1, 1)),
    ((1, 32768), (1, 256)),
    ((300, 33), (300, 1)),
]
DTYPES = [
    (FLOAT, FLOAT, BF16),
    (FLOAT, BF16, BF16),
    (BF16, BF16, BF16),
    (BF16, FLOAT, FLOAT),
    (HALF, HALF, HALF),
]


def weight_of(case):
    return Operands(case.x, case.scale, case.floor, case.param)


def forward(case, dtype):
    _poison(case.x.shape, dtype)
    return fused.forward(weight_of(case), case.grid, dtype)


def backward(case, value_dtype=None):
    for like in (case.x, case.scale.float()):
        _poison(like.shape, like.dtype)
    _poison(case.x.shape, value_dtype or FLOAT)
    return fused.backward(case.upstream, weight_of(case), case.grid, case.surrogate, value_dtype)


def _poison(shape, dtype):
    """Leave NaN in the memory that the next output of this size is likely to get."""
    torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def same(found, expected):
    """Equal numbers, NaN where NaN is expected."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check(case, value_dtype):
    """Forward, backward and the value that the backward writes; returns the errors over their limits."""
    value = forward(case, value_dtype)
    same(value, expected_value(case, value_dtype))
    *gradients, again = backward(case, value_dtype)
    assert again.dtype == value_dtype
    assert torch.equal(again.view(torch.uint8), value.view(torch.uint8))
    worst = errors(case, gradients)
    assert all(error <= 1 for error in worst.values()), worst  # NaN is no number below 1
    return worst


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_the_oracle_is_the_closed_form(name, bits, surrogate):
    """Away from thresholds the oracle's decisions are float64's too."""
    for mask in MASKS:
        kind = replace(SURROGATES[surrogate], mask=mask)
        case = sample((4, 24), (4, 2), make_grid(name, bits), kind)
        v = case.x.double().reshape(4, 2, 12) / case.scale.double().unsqueeze(-1)
        off = torch.where((v * 2 - (v * 2).round()).abs() < 1e-4, v + 0.01, v) * case.scale.unsqueeze(-1)
        case = replace(case, x=off.float().reshape(4, 24))
        w, s, upstream = (t.double().cpu().numpy() for t in (case.x, case.scale, case.upstream))
        a = None if case.param is None else case.param.double().sigmoid().cpu().numpy()[..., None]
        g = {
            Fourier: lambda u, kind=kind: closed_form.stableqat_g(u, kind.amplitude, kind.harmonics),
            Tanh: lambda u, a=a: closed_form.dsq_g(u, a),
            Constant: lambda u: 0.3025,
            Identity: lambda u: 1.0,
        }[type(kind)]
        grouped = [t.reshape(4, 2, -1) for t in (upstream, w, s)]
        wanted = closed_form.gradients(*grouped, name, bits, mask, g, a)
        (by_weight, _), by_scale, by_param = expected_gradients(case)
        for found, exact in zip((by_weight, by_scale[0], by_param and by_param[0]), wanted, strict=True):
            assert (found is None) == (exact is None)
            if found is not None:
                exact = torch.tensor(exact).reshape(found.shape)
                torch.testing.assert_close(found.cpu(), exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_every_grid_mask_and_surrogate(name, bits, surrogate):
    for seed, mask in enumerate(MASKS):
        surrogate_ = replace(SURROGATES[surrogate], mask=mask)
        check(sample((6, 96), (6, 1), make_grid(name, bits), surrogate_, seed=seed), BF16)


@pytest.mark.parametrize("surrogate", ["identity", "fourier-2", "tanh"])
@pytest.mark.parametrize(("shape", "scale_shape"), LAYOUTS, ids=str)
def test_every_layout(shape, scale_shape, surrogate):
    """Ragged, one row, one column, long rows, convolutions; groups down to a weight; one scale for all."""
    dtype, upstream, value = DTYPES[(LAYOUTS.index((shape, scale_shape)) + len(surrogate)) % len(DTYPES)]
    grid = make_grid("stretched" if surrogate == "tanh" else "integer", 3)
    check(
        sample(shape, scale_shape, grid, SURROGATES[surrogate], dtype=dtype, upstream=upstream, seed=1), value
    )


@pytest.mark.parametrize("surrogate", ["identity", "fourier-3", "tanh"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda types: "-".join(str(t)[6:] for t in types))
def test_every_dtype(dtypes, surrogate):
    dtype, upstream, value = dtypes
    case = sample(
        (9, 80), (9, 2), make_grid("integer", 4), SURROGATES[surrogate], dtype=dtype, upstream=upstream
    )
    check(case, value)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("name", "bits"), [("integer", 2), ("stretched", 2), ("binary", 1)])
def test_weights_far_outside_the_grid(name, bits, surrogate, mask):
    """Where a run with a large learning rate takes them: up to 40,000 scales."""
    case = sample((6, 96), (6, 1), make_grid(name, bits), replace(SURROGATES[surrogate], mask=mask), seed=4)
    far = torch.linspace(0, 1, case.x.numel(), device=DEVICE).mul_(10).exp_().reshape(case.x.shape)
    *found, _ = backward(replace(case, x=case.x * far))
    *expected, _ = gradients_of(replace(case, x=case.x * far))
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.isfinite().all()
            if mask != "none":  # without a mask, the distance to a level so far out has no digits to agree on
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def gradients_of(case):
    """What the torch reference gives."""
    spec = Spec(case.grid, case.surrogate, FLOAT)
    x, scale, param = reference.grouped(weight_of(case))
    upstream = case.upstream.reshape(x.shape)
    found = reference.backward(upstream, x, scale, spec.grid, spec.surrogate, param)
    likes = (case.x, case.scale, case.param)
    return (*[g if g is None else g.reshape(like.shape) for g, like in zip(found, likes, strict=True)], None)


@pytest.mark.parametrize("logit", [10.0, -10.0])
def test_a_logit_far_off_acts_as_the_bound(logit):
    """One large step of SGD may take it there; `a` rounded to 0 or 1 would make gradients NaN."""
    case = sample((6, 96), (6, 1), make_grid("integer", 3), Tanh(), seed=3)
    bound, beyond = (replace(case, param=torch.full_like(case.scale, x)) for x in (logit, 50 * logit))
    for found, expected in zip(backward(beyond)[:3], backward(bound)[:3], strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)
    u = torch.linspace(-0.5, 0.5, 9)
    for found, expected in zip(
        Tanh().derivatives(u, torch.tensor(50 * logit)),
        Tanh().derivatives(u, torch.tensor(logit)),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("surrogate", ["fourier-1", "tanh"])
@pytest.mark.parametrize("grid", [("integer", 4), ("stretched", 2)])
def test_one_scale_for_a_hundred_thousand_weights(grid, surrogate):
    check(sample((250, 401), (1, 1), make_grid(*grid), SURROGATES[surrogate], upstream=BF16), BF16)


@pytest.mark.parametrize("surrogate", ["identity", "fourier-1", "tanh"])
@pytest.mark.parametrize("scale_shape", [(8, 1), (8, 3), (1, 1)])
def test_floor(scale_shape, surrogate):
    """The scale's gradient arrives undiminished where the floor stands in for a scale below it."""
    case = sample((8, 60), scale_shape, make_grid("integer", 3), SURROGATES[surrogate], floor=True)
    check(case, BF16)
    assert (case.scale < case.floor).any()
    lifted = replace(case, scale=case.acting_scale, floor=None)
    for got, wanted in zip(backward(case), backward(lifted), strict=True):
        assert got is wanted is None or torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize(("name", "bits"), GRIDS)
@pytest.mark.parametrize(("dtype", "value"), [(FLOAT, FLOAT), (FLOAT, BF16), (BF16, BF16), (HALF, HALF)])
def test_hard_weights(name, bits, dtype, value):
    """Ties, zeros of both signs, subnormals, saturation, NaN; scales of all sizes, floored and NaN."""
    grid = make_grid(name, bits)
    scale = torch.tensor([[0.25], [0.0371], [1e-30], [3e4], [-1.0], [1e-9], [torch.nan]], device=DEVICE)
    floor = torch.full_like(scale, 1e-6)
    floor[2] = 0
    steps = torch.arange(-140, 141, device=DEVICE) / 2
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38], device=DEVICE)
    huge = torch.tensor([3e38, -3e38, 65504.0, 2.0**22 + 0.5, -(2.0**23), 1e7, torch.nan], device=DEVICE)
    acting = torch.maximum(scale, floor).nan_to_num(1.0)
    rows = [torch.cat((s * steps, tiny, huge, s * huge[3:])) for s in acting]
    x = torch.stack(rows).to(dtype)
    x = torch.where(x.isinf(), torch.finfo(dtype).max, x)
    case = Case(x, torch.ones_like(x), scale, floor, None, grid, Identity())
    expected = expected_value(case, value)
    assert expected[-1].isnan().all()
    assert expected.isnan().sum() == expected[-1].numel() + 2 * (len(scale) - 1)
    same(forward(case, value), expected)
    same(backward(case, value)[3], expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("surrogate", ["identity", "fourier-1", "fourier-5", "tanh"])
def test_far_outside_without_a_mask(surrogate):
    """Where float32 has no digits left for a distance, the factor is still one that the surrogate takes."""
    case = sample((4, 40), (4, 1), make_grid("integer", 4), replace(SURROGATES[surrogate], mask="none"))
    far = torch.tensor([1e5, 4194305.0, 1e9, 1e30], device=DEVICE)
    weight, scale, param, _ = backward(replace(case, x=case.upstream.sign() * far[:, None]))
    assert (weight.abs() <= 2 * case.upstream.abs()).all()
    assert scale.isfinite().all()
    assert param is None or param.isfinite().all()


@pytest.mark.parametrize("surrogate", ["fourier-1", "tanh"])
def test_scales_in_bfloat16(surrogate):
    """Their gradients are float32 all the same."""
    case = sample((6, 90), (6, 3), make_grid("stretched", 2), SURROGATES[surrogate], dtype=BF16, floor=True)
    scale, floor = case.scale.to(BF16), case.floor.to(BF16)
    check(
        replace(case, scale=scale, floor=floor, param=None if case.param is None else case.param.to(BF16)),
        BF16,
    )


@pytest.mark.parametrize("surrogate", ["identity", "fourier-1", "tanh"])
def test_nan_reaches_the_gradient_of_its_own_scale_alone(surrogate):
    case = sample((6, 40), (6, 1), make_grid("integer", 2), SURROGATES[surrogate])
    case.x[1, 3] = torch.nan
    case.x[4, 39], case.upstream[4, 39] = 0, torch.nan
    weight, scale, param, _ = backward(case)
    assert scale.isnan().squeeze(-1).tolist() == [False, True, False, False, True, False]
    assert weight.isnan().any(-1)[4]
    assert not weight[[0, 2, 3, 5]].isnan().any()
    assert param is None or not param[[0, 2, 3, 5]].isnan().any()


@pytest.mark.parametrize("surrogate", ["fourier-1", "tanh"])
@pytest.mark.parametrize("scale_shape", [(1, 1), (40, 1), (40, 4)])
def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs_alone(scale_shape, surrogate):
    columns = 11008 if DEVICE == "cuda" else 400
    case = sample((40, columns), scale_shape, make_grid("integer", 4), SURROGATES[surrogate])
    before = [None if t is None else t.clone() for t in (case.x, case.upstream, case.scale, case.param)]
    first = backward(case, BF16)
    for _ in range(20 if DEVICE == "cuda" else 1):
        for one, other in zip(first, backward(case, BF16), strict=True):
            assert one is other is None or torch.equal(one, other)
    for old, new in zip(before, (case.x, case.upstream, case.scale, case.param), strict=True):
        assert old is new is None or torch.equal(old, new)


def test_the_value_only_where_it_is_asked_for():
    assert backward(sample((3, 8), (3, 1), make_grid("integer", 2), Identity()))[3] is None


def test_an_unaligned_weight_after_an_aligned_one():
    """A launch that is remembered for aligned tensors is not for these."""
    case = sample((6, 64), (6, 1), make_grid("integer", 4), SURROGATES["fourier-1"])
    for _ in range(2):
        check(case, BF16)
    case.x.copy_(case.x.flatten().roll(5).reshape(6, 64))
    shifted = torch.cat((case.x.new_zeros(1), case.x.flatten()))[1:].reshape(6, 64)
    assert shifted.data_ptr() % 16
    check(replace(case, x=shifted), BF16)


@pytest.mark.parametrize(("surrogate", "floor"), [("identity", True), ("fourier-1", False), ("tanh", True)])
def test_several_weights_in_one_launch(surrogate, floor):
    """What each gets in a launch of its own: values bit for bit, sums too where rows are of whole tiles."""
    grid, surrogate = make_grid("integer", 4), SURROGATES[surrogate]
    shapes = [(4, 2048), (1, 1040), (3, 5632), (2, 8192), (3, 1536), (5, 48)]
    cases = [
        sample(shape, (shape[0], 1), grid, surrogate, upstream=BF16, floor=floor, seed=i)
        for i, shape in enumerate(shapes)
    ]
    weights = [weight_of(case) for case in cases]
    for count in (2, 3, len(cases)):
        joined = fused.join(weights[:count], grid)
        assert joined is not None
        values = fused.split_values(fused.forward_flat(joined, BF16), weights[:count])
        upstreams = [case.upstream for case in cases[:count]]
        gradients = fused.split_gradients(fused.backward_flat(upstreams, joined, surrogate), weights[:count])
        for case, value, found in zip(cases, values, gradients, strict=False):
            assert torch.equal(value, forward(case, BF16))
            for one, other in zip(found, backward(case)[:3], strict=True):
                if one is None or other is None or case.x.shape[1] > 1024:
                    assert one is other is None or torch.equal(one, other)
                else:
                    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 64)],  # alone
        [(4, 64)] * 9,  # more than a launch takes
        [(4, 64), (4, 50)],  # rows of no whole vectors
        [(4, 64), (4, 65536)],  # a row that is spread over programs
    ],
    ids=["alone", "many", "ragged", "long"],
)
def test_weights_that_do_not_share_a_launch(shapes):
    grid = make_grid("integer", 4)
    weights = [weight_of(sample(shape, (shape[0], 1), grid, Identity())) for shape in shapes]
    assert fused.join(weights, grid) is None


def test_tensors_that_are_not_contiguous(monkeypatch):
    """The kernels read by number; what is strided or expanded is copied first."""
    monkeypatch.setattr("stableqat.ops.dispatch.implementation", lambda *_: "triton")
    x, upstream = torch.randn(48, 6, device=DEVICE).t(), torch.randn(48, 6, device=DEVICE).t()
    for scale in (
        torch.full((1, 1), 0.3, device=DEVICE).expand(6, 1),
        torch.rand(6, 2, device=DEVICE)[:, 1:] + 0.1,
    ):
        grid, found = make_grid("integer", 4), []
        for implementation in ("triton", "torch"):
            monkeypatch.setattr("stableqat.ops.dispatch.implementation", lambda *_, it=implementation: it)
            leaves = [x.detach().requires_grad_(), scale.detach().requires_grad_()]
            value = fake_quantize(*leaves, grid=grid, surrogate=Fourier())
            found.append([value, *torch.autograd.grad(value, leaves, upstream)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("surrogate", [s for s in SURROGATES.values()])
def test_a_spec_as_text_says_all_of_it(surrogate):
    for grid in (*(make_grid(*each) for each in GRIDS), Grid("integer", 4, -7, 7, 0)):
        for mask in MASKS:
            kind = replace(surrogate, mask=mask)
            spec = from_text(to_text(grid, kind), BF16)
            assert spec == (grid, kind, BF16)
            assert type(spec.surrogate) is type(kind)
    assert to_text(grid, Theirs()) == to_text(grid, Fourier(amplitude=0.21))
    assert to_text(grid, Permuted()) is None


@dataclass(frozen=True)
class Theirs(Surrogate):
    """A user's own surrogate, with the form of StableQAT's kernel."""

    def derivative(self, u, param=None):
        return Fourier(amplitude=0.21).derivative(u)

    @property
    def kernel(self):
        return KernelForm("fourier", (0.21, 1))


def test_a_declared_form_is_what_the_kernel_computes():
    grid = make_grid("integer", 3)
    for mask in MASKS:
        theirs, own = (
            sample((6, 96), (6, 1), grid, surrogate) for surrogate in (Theirs(mask), Fourier(mask, 0.21))
        )
        for one, other in zip(backward(theirs), backward(own), strict=True):
            assert one is other is None or torch.equal(one, other)


def test_a_form_that_no_kernel_has_is_refused():
    class Cubic(Theirs):
        kernel = KernelForm("cubic")

    with pytest.raises(UserError, match="no kernel 'cubic'; declare one of identity, constant, fourier"):
        backward(sample((3, 8), (3, 1), make_grid("integer", 2), Cubic()))


def cases(shapes):
    return st.builds(
        lambda shape, split, grid, surrogate, mask, dtypes, **rest: (
            sample(
                shape,
                {"row": (shape[0], 1), "tensor": (1, 1), "group": (shape[0], gcd(shape[1], 24))}[split],
                make_grid(*grid),
                replace(SURROGATES[surrogate], mask=mask),
                dtype=dtypes[0],
                upstream=dtypes[1],
                **rest,
            ),
            dtypes[2],
        ),
        shape=shapes,
        split=st.sampled_from(["row", "row", "group", "tensor"]),
        grid=st.sampled_from(GRIDS),
        surrogate=st.sampled_from(sorted(SURROGATES)),
        mask=st.sampled_from(MASKS),
        dtypes=st.sampled_from(DTYPES),
        floor=st.booleans(),
        seed=st.integers(0, 2**31),
    )


def property_test(shapes, examples):
    """Run `check` on many drawn cases and return the worst errors over their limits."""
    worst = defaultdict(float)

    @settings(
        max_examples=examples,
        derandomize=True,
        phases=[Phase.generate],  # on a GPU each step of shrinking would compile anew
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(shapes))
    def run(drawn):
        for name, error in check(*drawn).items():
            worst[name] = max(worst[name], error)

    run()
    return worst


def test_any_small_call():
    property_test(st.tuples(st.integers(1, 12), st.integers(1, 127)), 40)


@pytest.mark.gpu
@pytest.mark.timeout(1200)  # almost every example compiles kernels of its own
@pytest.mark.skipif(DEVICE == "cpu", reason="large shapes: a GPU's")
def test_any_call(capsys):
    tall_and_wide = [(1, 32768), (32768, 16), (5632, 2048), (2048, 5632), (4096, 4096), (8192, 2048), (1, 1)]
    ragged = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
    examples = 200
    worst = property_test(st.one_of(st.sampled_from(tall_and_wide), ragged), examples)
    with capsys.disabled():
        figures = ", ".join(f"{name} {error:.3f}" for name, error in worst.items())
        print(f"\n{examples} calls on {torch.cuda.get_device_name()}, worst error over its limit: {figures}")

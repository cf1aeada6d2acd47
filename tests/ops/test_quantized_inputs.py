"""Fake-quantized activations: the papers' examples, the product, what it saves, the least squared error."""

import pytest
import torch
from torch.nn import functional as F

from stableqat import ops
from stableqat.ops.inputs import Activation, InputOperands, quantize_input
from stableqat.ops.operands import Operands
from stableqat.ops.product import product

STE = ops.Identity()
BITS = ops.make_grid("integer", 2)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], requires_grad=True)


def test_lsq_plus_at_the_papers_gradients():
    """arXiv 2004.09576: n 0, p 3, s 1, beta -.2."""
    x = torch.tensor([-0.4, -0.1, 0.2, 0.9, 3.0], requires_grad=True)
    scale, offset = one(1.0), one(-0.2)
    value = quantize_input(x, Activation(InputOperands(scale, offset=offset), BITS, STE))
    torch.testing.assert_close(value, torch.tensor([0.0, 0, 0, 1, 3]) - 0.2)
    factor = 1 / (5 * 3) ** 0.5
    toward_scale, toward_offset = [0, -0.1, -0.4, -0.1, 3], [1, 0, 0, 0, 1]
    for i in range(5):
        by_x, by_scale, by_offset = torch.autograd.grad(value[i], (x, scale, offset), retain_graph=True)
        assert by_x[i] == 1 - toward_offset[i]
        torch.testing.assert_close(by_scale, torch.tensor([toward_scale[i] * factor]))
        torch.testing.assert_close(by_offset, torch.tensor([toward_offset[i] * factor]))


@pytest.mark.parametrize(("lowest", "codes"), [(-2, [-2, 0, 1, 1]), (0, [0, 0, 1, 3])])
def test_lsq_rounds_to_signed_or_unsigned_codes(lowest, codes):
    x = torch.tensor([-1.3, -0.2, 0.6, 1.6])
    scale, low = one(0.5), torch.tensor([float(lowest)])
    value = quantize_input(x, Activation(InputOperands(scale, lowest=low), BITS, STE))
    assert torch.equal(value, torch.tensor(codes) * 0.5)


def test_a_token_has_the_scale_of_its_largest_magnitude():
    """Codes -127 to 127 at 8 bits, the identity as gradient; zeros stay zeros."""
    x = torch.tensor([[0.5, -1.27, 0.013], [0.0, 0.0, 0.0], [100.0, 1.0, -50.0]], requires_grad=True)
    activation = Activation(InputOperands(), ops.make_grid("integer", 8), ops.Identity("none"))
    value = quantize_input(x, activation)
    expected = torch.tensor([[0.5, -1.27, 0.01], [0, 0, 0], [100, 100 / 127, -64 * 100 / 127]])
    torch.testing.assert_close(value, expected)
    value.backward(upstream := torch.randn(3, 3))
    assert torch.equal(x.grad, upstream)


SURROGATES = {
    "ste": ops.Identity(),
    "dsq": ops.Tanh(),
    "stableqat": ops.Fourier(),
    "none": STE.__class__("none"),
}
KINDS = ["lsq", "lsq+", "token"]


def made(kind: str, surrogate: ops.Surrogate) -> Activation:
    logit = one(-1.0) if isinstance(surrogate, ops.Tanh) else None
    tensors = {
        "lsq": InputOperands(one(0.3), torch.tensor([1e-4]), torch.tensor([-8.0]), param=logit),
        "lsq+": InputOperands(one(0.2), torch.tensor([1e-4]), offset=one(-0.4), param=logit),
        "token": InputOperands(),
    }
    return Activation(tensors[kind], ops.make_grid("integer", 4), surrogate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_is_the_surrogates(kind, name):
    """Compared with autograd through a straight-through expression of the same formula."""
    if kind == "token" and name == "dsq":
        return
    activation, surrogate = made(kind, SURROGATES[name]), SURROGATES[name]
    x, upstream = torch.randn(6, 32, requires_grad=True), torch.randn(6, 32)
    quantize_input(x, activation).backward(upstream)

    operands = activation.operands
    own = [t.detach().clone().requires_grad_() if t is not None else None for t in operands]
    scale, _, _, offset, param = own
    y = x.detach().clone().requires_grad_()
    base = 0.0 if offset is None else offset
    if scale is None:
        scale = y.detach().abs().amax(-1, keepdim=True) / 7
    low = {"lsq": -8.0, "lsq+": 0.0, "token": -8.0}[kind]
    v = (y - base) / scale
    inside = torch.ones_like(v, dtype=torch.bool)
    if surrogate.mask != "none":
        inside = (v >= low) & (v <= low + 15)
    codes = v.detach().round().clamp(low, low + 15)
    factor, by_param = surrogate.derivatives((v - v.round()).detach(), param)
    g = 1.0 if factor is None else factor
    torch.testing.assert_close(x.grad, upstream * inside * g)
    if activation.operands.scale is None:
        return
    learned = 1 / (32 * (low + 15)) ** 0.5
    toward = codes - torch.where(inside, v, 0.0)
    torch.testing.assert_close(operands.scale.grad, (toward * upstream).sum().reshape(1) * learned)
    if offset is not None:
        torch.testing.assert_close(operands.offset.grad, (upstream * ~inside).sum().reshape(1) * learned)
    if by_param is not None:
        total = (by_param * upstream * inside).sum().reshape(1) * scale * learned
        torch.testing.assert_close(operands.param.grad, total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True], ids=["operands", "value"])
def test_the_product_is_that_of_the_quantized_input(kind, known):
    surrogate = ops.Fourier()
    x, w, bias = torch.randn(2, 5, 32), torch.randn(8, 32), torch.randn(8)

    def run(fused: bool):
        torch.manual_seed(0)
        activation = made(kind, surrogate)
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        weight = Operands(leaves[1], torch.full((8, 1), 0.5, requires_grad=True))
        options = {"grid": activation.grid, "surrogate": surrogate}
        value = ops.fake_quantize(*weight[:2], **options) if known else weight
        if fused:
            given = {} if known else options
            output = product(leaves[0], value, leaves[2], of_input=activation, **given)
        else:
            of_weight = value if known else ops.fake_quantize(*weight[:2], **options)
            output = F.linear(quantize_input(leaves[0], activation), of_weight, leaves[2])
        output.square().sum().backward()
        learned = [t for t in (weight.scale, *activation.operands) if t is not None and t.requires_grad]
        return output, [t.grad for t in (*leaves, *learned)]

    (output, gradients), (expected, others) = run(True), run(False)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True], ids=["operands", "value"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_keeps_no_more_activations_than_a_plain_layer(kind, known, autocast):
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    scale = torch.full((8, 1), 0.5, requires_grad=True)
    activation = made(kind, STE)
    options = {"grid": activation.grid, "surrogate": STE}

    def kept(compute) -> int:
        tensors = {}

        def pack(t):
            tensors[t.untyped_storage().data_ptr()] = t
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
            compute()
        return sum(t.nbytes for t in tensors.values() if t.shape[0] == 64)

    def quantized():
        weight = ops.fake_quantize(w, scale, **options) if known else Operands(w, scale)
        product(x, weight, None, of_input=activation, **({} if known else options))

    assert 0 < kept(quantized) <= kept(lambda: F.linear(x, w))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_equals_compiled(kind):
    activation = made(kind, ops.Fourier())
    x, w, s = torch.randn(4, 32), torch.randn(8, 32), torch.full((8, 1), 0.4)

    def compute(x, w, s, *tensors):
        of_input = Activation(InputOperands(*tensors), activation.grid, activation.surrogate)
        options = {"grid": activation.grid, "surrogate": activation.surrogate}
        return (
            product(x, Operands(w, s), None, of_input=of_input, **options).sin()
            + quantize_input(x, of_input).mean()
        )

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x, w, s)]
        tensors = [None if t is None else t.detach().clone() for t in activation.operands]
        for place in (0, 3):
            if tensors[place] is not None:
                tensors[place].requires_grad_()
        output = function(*leaves, *tensors)
        output.square().sum().backward()
        learned = [t for t in tensors if t is not None and t.requires_grad]
        return [output.detach(), *(t.grad for t in (*leaves, *learned))]

    torch.compiler.reset()
    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, run(compute), run(compiled)))


def test_counts_hold_every_value_to_three_digits():
    x = torch.tensor([0.0, -0.0, 1.0, 1.0, -3.5, 1e30, 1e-30, float("nan"), float("inf")])
    values, counts = ops.counted_values(ops.count_values(x) + ops.count_values(x[2:3]))
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert found[1.0] == 3
    assert found[-3.5] == 1
    assert counts.sum() == 10
    large = max(value for value in found if value < float("inf"))
    assert abs(large / 1e30 - 1) < 2**-8
    assert not values.isfinite().all()


def shapes() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(4000)
    return {
        "normal": normal,
        "gelu": F.gelu(normal * 2),
        "relu": normal.relu(),
        "outlier": torch.cat([normal, torch.tensor([80.0])]),
        "shifted": normal + 5,
        "two values": torch.tensor([0.0, 1.0]).repeat(50),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", shapes())
def test_the_first_scale_has_the_least_squared_error(shape, bits):
    """No scale of a fine search is better by more than a few hundredths, nor LSQ better than LSQ+."""
    x = shapes()[shape].to(torch.bfloat16).double()
    values, counts = ops.counted_values(ops.count_values(x))

    def error(scale, offset, low):
        codes = ((x - offset) / scale).round().clamp(low, low + 2**bits - 1)
        return (codes * scale + offset - x).square().sum()

    least = {}
    for low in (0, -(2 ** (bits - 1))):
        scale, own = ops.least_scale(values, counts, low, low + 2**bits - 1)
        torch.testing.assert_close(own, error(scale, 0.0, low).item())
        largest = x.abs().max().item() / max(low + 2**bits - 1, 1)
        searched = min(error(s, 0.0, low) for s in torch.linspace(0.002, 1.1, 600).double() * largest)
        assert own <= 1.03 * searched + 1e-9
        least[low] = own
    scale, offset = ops.least_scale_and_offset(values, counts, 2**bits)
    assert error(scale, offset, 0) <= min(least.values()) * (1 + 1e-9) + 1e-9


def test_an_offset_serves_what_a_gelu_leaves():
    values, counts = ops.counted_values(ops.count_values(shapes()["gelu"]))
    scale, offset = ops.least_scale_and_offset(values, counts, 16)
    codes = ((values - offset) / scale).round().clamp(0, 15)
    with_offset = (counts * (codes * scale + offset - values).square()).sum()
    without = min(ops.least_scale(values, counts, low, low + 15)[1] for low in (0, -8))
    assert -0.3 < offset < 0
    assert with_offset < 0.85 * without

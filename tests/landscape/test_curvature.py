"""Gradients, Hessian products and eigenvectors, against a known Hessian and against torch's own."""

from functools import partial

import pytest
import torch
from quadratic import EIGENVALUES, Quadratic
from torch.autograd.functional import hessian
from torch.func import functional_call

import tiny
from stableqat.errors import UserError
from stableqat.landscape.curvature import (
    gradient,
    hessian_product,
    mean_loss,
    quadratic,
    top_eigenvectors,
)
from stableqat.landscape.space import WeightSpace, dot
from stableqat.layers.full_precision import full_precision


@pytest.fixture
def toy():
    made = Quadratic()
    with full_precision(made.net):
        yield made


def test_the_mean_of_the_batches(toy):
    (w,) = toy.space.get()
    assert mean_loss(toy.losses).item() == pytest.approx(toy.value(w.flatten()).item(), rel=1e-6)
    (slopes,) = gradient(toy.space, toy.losses)
    torch.testing.assert_close(slopes.flatten(), toy.slope + toy.hessian @ w.flatten())
    by = torch.randn(12, dtype=torch.float64)
    (product,) = hessian_product(toy.space, toy.losses, toy.point(by))
    torch.testing.assert_close(product.flatten(), toy.hessian @ by)


def test_the_quadratic_model_of_a_quadratic_is_exact(toy):
    (w,), by = toy.space.get(), torch.randn(12, dtype=torch.float64)
    model = quadratic(toy.space, toy.losses, toy.point(by))
    for length in (-2.0, 0.0, 0.7):
        assert model.at(length) == pytest.approx(toy.value(w.flatten() + length * by).item(), rel=1e-5)


@pytest.mark.parametrize(("steps", "exact"), [(12, True), (30, True), (9, False)])
def test_top_eigenvectors(toy, steps, exact):
    found = top_eigenvectors(toy.space, toy.losses, 3, steps=steps)
    tolerance = 1e-6 if exact else 0.2
    assert [pair.value for pair in found] == pytest.approx(EIGENVALUES[:3], abs=tolerance)
    for place, (value, (vector,), residual) in enumerate(found):
        flat = vector.flatten()
        assert flat.norm().item() == pytest.approx(1)
        actual = (toy.hessian @ flat - value * flat).norm().item()
        assert residual == pytest.approx(actual, abs=1e-5)
        assert abs(flat @ toy.turn[:, place]).item() == pytest.approx(1, abs=tolerance)


def test_it_ends_where_the_space_does(toy):
    found = top_eigenvectors(toy.space, toy.losses, 20, steps=20)
    assert len(found) == 5  # eigenvalues that are equal count once
    assert [pair.value for pair in found] == pytest.approx([9, 5, 2, 0.5, -3])


@pytest.mark.parametrize("settings", [{"count": 0}, {"count": 3, "steps": 2}])
def test_numbers_out_of_range(toy, settings):
    with pytest.raises(UserError, match=r"^(count|steps): must be at least"):
        top_eigenvectors(toy.space, toy.losses, **settings)


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama in float64, three of its layers, and torch's own Hessian by them."""
    config = tiny.LLAMA | {"hidden_size": 8, "intermediate_size": 8, "num_key_value_heads": 1}
    made = tiny.configured("llama", config=config).double().eval()
    batches = [tiny.batch("llama", 2), tiny.batch("llama", 3)]
    names = [f"model.layers.{at}" for at in ("0.self_attn.k_proj", "1.mlp.down_proj", "1.self_attn.v_proj")]
    space = WeightSpace(made.model, names)
    with torch.no_grad():
        space.move(space.get(), (0.3, space.noise(0)))  # off the flat start
    sizes = [weight.numel() for weight in space.weights.values()]
    shapes = [weight.shape for weight in space.weights.values()]

    def loss(flat):
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        own = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        batch = [functional_call(made.model, own, (), {**each, "use_cache": False}).loss for each in batches]
        return torch.stack(batch).mean()

    with full_precision(made.model):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            known = hessian(loss, torch.cat([each.flatten() for each in space.get()]))
        yield space, [partial(made.loss, batch) for batch in batches], known


def test_a_llama_agrees_with_torchs_hessian(llama):
    space, losses, known = llama
    noise = space.noise(1)
    product = torch.cat([each.flatten() for each in hessian_product(space, losses, noise)])
    expected = known @ torch.cat([each.flatten() for each in noise])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-7)  # its norms are in float32
    values = torch.linalg.eigvalsh(known)
    found = top_eigenvectors(space, losses, 2, steps=40)
    assert [pair.value for pair in found] == pytest.approx(values[[-1, -2]].tolist(), rel=1e-4)
    assert dot(found[0].vector, found[1].vector).item() == pytest.approx(0, abs=1e-8)


def test_a_quantized_model_has_no_hessian():
    made = tiny.configured("llama")
    space = WeightSpace(made.model)
    with pytest.raises(UserError, match=r"^a quantized model has no Hessian"):
        hessian_product(space, [partial(made.loss, tiny.batch("llama"))], space.noise(0))

"""The lean loss is the plain one, without ever holding a batch's logits."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import tiny
from stableqat.layers.embedding import QuantEmbedding
from stableqat.modules import loss as lean
from stableqat.modules.loss import IGNORED, lean_cross_entropy, next_tokens, token_losses
from stableqat.quantizers import DSQ, STE

TOKENS, VOCAB, WIDTH = 50, 96, 24


class Largest(TorchDispatchMode):
    """Remembers the most elements that one tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, list | tuple) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.fixture
def chunked(monkeypatch):
    """Chunks of at most so many rows of logits."""
    return lambda rows, vocab=VOCAB: monkeypatch.setattr(lean, "LOGITS", rows * vocab)


def inputs(bias=False):
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (5, TOKENS // 5))
    labels[0, :4] = labels[3, 1] = IGNORED
    leaves = [torch.randn(5, TOKENS // 5, WIDTH), torch.randn(VOCAB, WIDTH)]
    leaves += [torch.randn(VOCAB)] if bias else []
    return [leaf.requires_grad_() for leaf in leaves], labels


def plain(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias).float().flatten(0, 1), labels.flatten())


def differentiated(loss, precision, bias=False):
    leaves, labels = inputs(bias)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        value = loss(leaves[0], leaves[1], labels, *leaves[2:])
    (3 * value).backward()
    return value, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [7, 25, 64])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_loss_and_gradients_are_the_plain_ones(precision, tolerance, rows, bias, chunked):
    """Under autocast the logits, and so the loss, are the same; gradients are rounded otherwise."""
    chunked(rows)
    expected, gradients = differentiated(plain, precision, bias)
    value, found = differentiated(lean_cross_entropy, precision, bias)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(found, gradients, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= tolerance * other.norm()
        assert mine.abs().sum() > 0


def test_gradients_under_autocast_are_nearer_to_the_truth_than_the_plain_ones(chunked):
    chunked(7)
    truth = differentiated(plain, torch.float32)[1]
    errors = [
        [(a - b).norm() for a, b in zip(differentiated(loss, torch.bfloat16)[1], truth, strict=True)]
        for loss in (lean_cross_entropy, plain)
    ]
    assert all(mine <= 1.05 * other for mine, other in zip(*errors, strict=True))


def test_ignored_labels_count_for_nothing(chunked):
    chunked(7)
    (hidden, weight), labels = inputs()
    lean_cross_entropy(hidden, weight, labels).backward()
    assert not hidden.grad[labels == IGNORED].any()
    assert hidden.grad[labels != IGNORED].any(-1).all()
    assert lean_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED)).isnan()


def test_a_second_backward_is_refused_rather_than_wrong():
    (hidden, weight), labels = inputs()
    loss = lean_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_frozen_weight_gets_no_gradient(chunked):
    chunked(7)
    (hidden, weight), labels = inputs()
    lean_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad.any()
    assert weight.grad is None


def test_losses_of_tokens(chunked):
    chunked(7)
    (hidden, weight), labels = inputs()
    found = token_losses(hidden, weight, labels)
    expected = F.cross_entropy(F.linear(hidden, weight).transpose(1, 2), labels, reduction="none")
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not found[labels == IGNORED].any()
    assert not found.requires_grad


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_is_as_large_as_the_logits(with_gradient, chunked):
    def largest(loss):
        (hidden, weight), labels = inputs()
        with Largest() as seen, torch.set_grad_enabled(with_gradient):
            value = loss(hidden, weight, labels)
            if with_gradient:
                value.backward()
        return seen.elements

    chunked(7)
    assert largest(plain) == TOKENS * VOCAB
    assert largest(lean_cross_entropy) == max(7 * VOCAB, WIDTH * VOCAB)
    assert largest(token_losses if not with_gradient else lean_cross_entropy) < TOKENS * VOCAB


def test_a_label_is_that_of_the_next_token():
    labels = torch.tensor([[5, 6, IGNORED, 8]])
    assert next_tokens(labels).tolist() == [[6, IGNORED, 8, IGNORED]]


# -- in a model ---------------------------------------------------------------------------------


HEADS = {"num_key_value_heads": 2, "head_dim": 16}  # Qwen3's own are another model's


def module(lean_loss, *, tied=True, method="dsq", model_type="llama", vocab_size=64, **options):
    keys = {"model_type": model_type, "tie_word_embeddings": tied, "vocab_size": vocab_size}
    config = {**tiny.LLAMA, **keys, **HEADS}
    return tiny.configured("llama", method, config=config, lean_loss=lean_loss, **options)


def batch():
    made = tiny.batch("llama")
    made["labels"] = made["labels"].clone()
    made["labels"][0, :9] = made["labels"][2, 4] = IGNORED
    return made


def step(made, precision=torch.float32):
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = made.loss(batch())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "qwen3": {"model_type": "qwen3"},
    "quantized head": {"tied": False, "skip": []},
    "quantized tied head": {"skip": []},
    "full precision": {"method": "fp"},
}


@pytest.mark.parametrize("which", MODELS)
def test_a_model_trains_with_it_as_without(which, chunked):
    chunked(23, vocab=64)
    expected, gradients = step(module(False, **MODELS[which]))
    value, found = step(module(True, **MODELS[which]))
    assert value == pytest.approx(expected, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("which", ["tied", "quantized tied head"])
def test_a_model_under_autocast(which, chunked):
    chunked(23, vocab=64)
    expected, gradients = step(module(False, **MODELS[which]), torch.bfloat16)
    value, found = step(module(True, **MODELS[which]), torch.bfloat16)
    assert value == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_an_accumulated_gradient_takes_the_held_head(computed):
    made = module(True, tied=False, skip=[], method="ste")
    tiny.trainer(max_steps=1, accumulate_grad_batches=4).fit(
        made, tiny.loader("llama", 16, 4), tiny.loader("llama", 4, 4)
    )
    assert len(computed) == 15  # layers


@pytest.mark.parametrize("which", ["tied", "quantized tied head"])
def test_evaluation_is_the_same(which, chunked):
    chunked(23, vocab=64)
    data = DataLoader([batch(), *tiny.loader("llama", 6, 3)], batch_size=None)
    results = [
        tiny.trainer(limit_val_batches=3).validate(module(on, **MODELS[which]), data, verbose=False)[0]
        for on in (False, True)
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_logits_are_still_to_be_had():
    ids = batch()["input_ids"]
    assert torch.equal(module(True)(ids), module(False)(ids))


def test_training_and_validation_never_hold_the_logits(chunked):
    chunked(23, vocab=640)
    made, rows = module(True, vocab_size=640), batch()["input_ids"].numel()
    with Largest() as seen:
        step(made)
        with torch.no_grad():
            made.predict_step(batch(), 0)
    assert seen.elements < rows * 640 / 3


def test_it_trains_compiled(chunked):
    chunked(23, vocab=64)
    losses = []
    for compiled in (False, True):
        L.seed_everything(0, verbose=False)
        made, seen = module(True, method="ste"), tiny.Losses()
        if compiled:
            made.model.compile(backend="eager")
        tiny.trainer(max_steps=2, callbacks=[seen]).fit(
            made, tiny.loader("llama", 8, 4), tiny.loader("llama", 4, 4)
        )
        losses.append(seen.values)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# -- tied embedding and quantized head ------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_looks_up_what_its_quantized_head_multiplies_with(precision):
    made = module(False, skip=[]).model
    embedding, head = made.model.embed_tokens, made.lm_head
    assert isinstance(embedding, QuantEmbedding)
    assert embedding.weight is head.weight
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        table = embedding(torch.arange(64))
        value = head.weight_quantizer(head.weight)
    assert value.dtype == precision
    assert table.dtype == torch.float32
    assert torch.equal(table, value.float())
    deployed = head.weight_quantizer.quantize(head.weight).dequantize()
    assert torch.equal(table, deployed.to(precision).float())


def test_the_shared_weight_receives_the_gradients_of_both_sides():
    made = module(False, skip=[], method="ste")
    made.model.lm_head.weight_quantizer.requires_grad_(False)
    table = made.model.model.embed_tokens(torch.tensor([[3, 3]]))
    table.sum().backward()
    gradient = made.model.lm_head.weight.grad
    assert gradient[3].any()
    assert not gradient[[0, 1, 2, *range(4, 64)]].any()


@pytest.mark.parametrize(("tied", "skip"), [(True, ["lm_head"]), (False, ["lm_head"]), (False, [])])
def test_any_other_embedding_stays_as_it_is(tied, skip):
    made = module(False, tied=tied, skip=skip).model
    assert type(made.model.embed_tokens) is torch.nn.Embedding
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("quantizer", [partial(STE, bits=2), partial(DSQ, bits=3, group_size=16)])
def test_a_quantized_tied_head_survives_a_checkpoint(quantizer, tmp_path):
    made = tiny.module("llama", quantizer=quantizer, skip=[])
    trainer = tiny.trainer(max_steps=2)
    data = tiny.loader("llama", 8, 4)
    trainer.fit(made, data, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(made).load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    ids = batch()["input_ids"]
    assert torch.equal(loaded(ids), made.eval()(ids))


@pytest.mark.parametrize("kind", ["lean loss", "layer", "weight", "weights together"])
@pytest.mark.parametrize("power", [1, 2])
def test_what_is_differentiable_once_says_so(kind, power):
    (hidden, weight), labels = inputs()
    quantizer = STE(weight, bits=4)
    loss = {
        "lean loss": lambda: lean_cross_entropy(hidden, weight, labels),
        "layer": lambda: quantizer.linear(hidden, weight),
        "weight": lambda: quantizer(weight),
        "weights together": lambda: quantizer.many([quantizer.operands(weight)], [None])[0],
    }[kind]()
    # of a sum the incoming gradient has no graph, and yet the gradient depends on what was saved
    (gradient,) = torch.autograd.grad(loss.pow(power).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()

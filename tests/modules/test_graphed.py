"""Steps replayed as CUDA graphs are those launched kernel by kernel, bit for bit."""

import logging
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

import tiny
from stableqat.errors import UserError
from stableqat.modules.graphed import GraphedLoss
from stableqat.quantizers import STE


class Annealed(STE):
    """Its forward follows the progress of training."""

    fuses = False

    def forward(self, weight):
        return super().forward(weight) * (1 + 0 * self.progress)


def fitted(
    family, method, graphed, *, steps=6, rows=10, ckpt_path=None, callbacks=(), options=None, **trainer
):
    """Train on batches of 4, by default of 4, 4 and 2; return the module and its losses."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module = tiny.module(family, method, graphed=graphed, optimizer=optimizer, **(options or {}))
    losses = tiny.Losses()
    defaults = {"accelerator": "gpu", "precision": "bf16-mixed", "gradient_clip_val": 0.5}
    made = tiny.trainer(max_steps=steps, callbacks=[losses, *callbacks], **(defaults | trainer))
    L.seed_everything(3)
    data = tiny.loader(family, count=rows, batch_size=4)
    made.fit(module, data, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, losses.values, made


def same(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in ours.items()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_replayed_run_is_the_launched_one(family, method, accumulate):
    options = {"model_args": {**tiny.VIT, "proj_drop_rate": 0.1}, "mixup_alpha": 0.8, "label_smoothing": 0.1}
    options = options if family == "vit" else {"config": {**tiny.LLAMA, "attention_dropout": 0.1}}
    launched = fitted(family, method, False, options=options, accumulate_grad_batches=accumulate)
    replayed = fitted(family, method, True, options=options, accumulate_grad_batches=accumulate)
    assert replayed[1] == launched[1]
    assert same(replayed[0], launched[0])


@pytest.mark.gpu
def test_a_run_resumes_with_graphs_as_it_does_without(tmp_path):
    whole, losses, _ = fitted("llama", "stableqat", False, rows=4)
    _, _, trainer = fitted("llama", "stableqat", True, steps=3, rows=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, rest, _ = fitted("llama", "stableqat", True, rows=4, ckpt_path=tmp_path / "half.ckpt")
    assert rest == losses[3:]
    assert same(resumed, whole)


@pytest.mark.gpu
def test_a_quantizer_that_follows_training_is_launched_or_refused(caplog):
    options = {"quantizer": partial(Annealed, bits=2)}
    with caplog.at_level(logging.INFO, logger="stableqat.modules.graphed"):
        fitted("llama", "ste", None, options=options)
    assert "a quantizer follows the progress of training" in caplog.text
    with pytest.raises(UserError, match="graphed: this step cannot be captured: a quantizer follows"):
        fitted("llama", "ste", True, options=options)


def test_graphs_need_a_gpu():
    with pytest.raises(UserError, match="graphed: it needs a CUDA device; remove it"):
        fitted("llama", "ste", True, accelerator="cpu", precision="32-true")


class Graph:
    """Writes the next gradient where a captured backward would."""

    def __init__(self, gradient):
        self.gradient, self.times = gradient, 0

    def replay(self):
        self.times += 1
        self.gradient.fill_(10.0**self.times)


def test_gradients_add_up_until_they_are_dropped():
    model = torch.nn.Linear(2, 1)
    more = iter([True, True, False, False, False, True])
    step = GraphedLoss(model, None, always=True, accumulates=lambda: next(more))
    gradient = torch.zeros(1, 2)
    graph = SimpleNamespace(gradients=[gradient, None], scale=torch.ones(()), backward=Graph(gradient))
    step.graphs = graph
    for total in (10, 110, 1110):
        step.differentiate(torch.ones(()))
        gradient.zero_()  # as the next forward may, which is replayed on the same memory
        assert model.weight.grad.tolist() == [[total, total]]
        assert model.bias.grad is None
    model.zero_grad(set_to_none=True)
    step.differentiate(torch.ones(()))
    assert model.weight.grad is gradient
    model.zero_grad(set_to_none=False)
    step.differentiate(torch.ones(()))
    assert model.weight.grad.tolist() == [[1e5, 1e5]]
    model.zero_grad(set_to_none=False)
    step.differentiate(torch.ones(()))
    assert model.weight.grad is not gradient
    assert model.weight.grad.tolist() == [[1e6, 1e6]]


@pytest.mark.parametrize("change", ["froze", "moved"])
def test_a_graph_is_left_when_what_it_holds_has_changed(change, caplog):
    model = torch.nn.Linear(2, 1)
    step = GraphedLoss(model, lambda batch: model(batch["x"]).sum(), always=True)
    step.batch, step.graphs = {"x": torch.ones(1, 2)}, SimpleNamespace()
    step._captured = step._weights()
    if change == "froze":
        model.bias.requires_grad_(False)
    else:
        model.weight.data = model.weight.data.clone()
    assert step({"x": torch.ones(1, 2)}).requires_grad
    assert step.graphs is None
    assert "launched kernel by kernel from now on" in caplog.text

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


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_are_given_as_autograd_gives_them(accumulates):
    model = torch.nn.Linear(2, 1)
    step = GraphedLoss(model, None, always=True, accumulates=accumulates)
    step.graphs = SimpleNamespace(gradients=[torch.ones(1, 2), None])
    step.give()
    step.graphs.gradients[0].fill_(3)  # the next replay
    step.give()
    assert model.weight.grad.tolist() == [[4.0, 4.0]] if accumulates else [[3.0, 3.0]]
    assert model.bias.grad is None

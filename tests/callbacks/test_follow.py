"""Quantizers follow a Trainer: the penalty joins each step once, progress is the trainer's."""

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

import tiny
from stableqat.callbacks import PrepareQAT
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import STE
from strangers import Pulled


class Gradients(tiny.L.Callback):
    """The gradient of one weight that each step takes."""

    def __init__(self):
        self.values = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        weight = next(iter(quantized_layers(pl_module).values())).latent
        if weight.grad is not None:
            self.values.append(weight.grad.clone())


def train(method, *, prepared, accumulate, callbacks=(), **options):
    seen, losses = Gradients(), tiny.Losses()
    callbacks = [seen, losses, *callbacks]
    if prepared:
        module = tiny.module("llama", "fp", optimizer=partial(torch.optim.SGD, lr=0.0))
        callbacks.append(PrepareQAT(partial(method, bits=2)))
    else:
        module = tiny.module(
            "llama", quantizer=partial(method, bits=2), optimizer=partial(torch.optim.SGD, lr=0.0)
        )
    torch.manual_seed(0)
    trainer = tiny.trainer(callbacks=callbacks, max_steps=3, accumulate_grad_batches=accumulate, **options)
    trainer.fit(module, tiny.loader("llama", 12, 2))
    return seen.values, losses.values, next(iter(quantized_layers(module).values())).weight_quantizer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("prepared", [False, True], ids=["module", "PrepareQAT"])
def test_a_penalty_joins_each_step_once(prepared, accumulate):
    plain, losses, _ = train(STE, prepared=prepared, accumulate=accumulate)
    pulled, same, quantizer = train(Pulled, prepared=prepared, accumulate=accumulate)
    assert losses == same  # logged are those of the data
    assert len(plain) == len(pulled) == 2  # the last step's gradient is not cleared
    for without, with_penalty in zip(plain, pulled, strict=True):
        torch.testing.assert_close(with_penalty - without, torch.ones_like(without), rtol=0, atol=1e-5)
    assert quantizer.seen == [(round(step / 3, 6), 0.0) for step in (1, 2, 3)]


def test_a_penalty_is_clipped_with_the_loss():
    pulled, *_ = train(Pulled, prepared=False, accumulate=1, gradient_clip_val=0.01)
    assert all(gradient.norm() <= 0.01 for gradient in pulled)


class Overflow(tiny.L.Callback):
    """An infinite gradient in the second step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            next(iter(quantized_layers(pl_module).values())).latent.grad.fill_(torch.inf)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_the_loss_scaler_skips_has_no_after_step(accumulate):
    """The trainer counts it, so that schedules end with the run."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, _, quantizer = train(
        Pulled,
        prepared=False,
        accumulate=accumulate,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[Overflow()],
    )
    assert scaler.get_scale() == 2.0**9
    assert quantizer.seen_progress == [round(step / 3, 6) for step in (1, 3)]

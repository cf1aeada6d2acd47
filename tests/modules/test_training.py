"""The systems learn, fail early, and draw their randomness from their position."""

from functools import partial

import pytest
import torch

import tiny
from stableqat.errors import UserError
from stableqat.modules import LlamaModule, ViTModule
from stableqat.modules.parallel import shard
from stableqat.quantizers import STE

FAMILIES = ["llama", "vit"]


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "ste"), ("llama", "stableqat"), ("vit", "dsq"), ("vit", "paretoq")]
)
def test_one_batch_can_be_learned_by_heart(family, method):
    """At 2 bits, by the quantized weights themselves."""
    losses = tiny.Losses()
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    data = tiny.loader(family, count=4, batch_size=4)
    trainer = tiny.trainer(max_steps=120, callbacks=[losses])
    trainer.fit(tiny.module(family, method, optimizer=optimizer), data, data)
    assert sum(losses.values[-5:]) / 5 < 0.1 * losses.values[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": partial(STE, bits=9)}, "bits: must be a whole number from 1 to 8"),
        ({"quantizer": partial(STE, bits=2.5)}, "bits: must be a whole number"),
        ({"quantizer": partial(STE, bits=2, group_size=24)}, r"layer .*: group_size: 24 does not divide"),
        ({"skip": ["*"]}, r"skip: \* leaves none"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_that_cannot_work_fails_at_construction(family, options, message):
    """Factories are lazy: without a trial the fault would show when the data is prepared."""
    with pytest.raises(UserError, match=message):
        tiny.module(family, **options)


def test_an_architecture_that_cannot_be_fails_at_construction():
    with pytest.raises(UserError, match="hidden_sise"):
        LlamaModule(config={**tiny.LLAMA, "hidden_sise": 3})
    with pytest.raises(UserError, match="vit_gigantic"):
        ViTModule(model_name="vit_gigantic")


@pytest.mark.parametrize("family", FAMILIES)
def test_construction_touches_no_memory(family):
    module = tiny.module(family)
    assert module.model is None
    assert not list(module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_configuring_twice_changes_nothing(family):
    module = tiny.configured(family, "dsq")
    model, state = module.model, {name: value.clone() for name, value in module.state_dict().items()}
    module.configure_model()
    assert module.model is model
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_left_in_full_precision_unless_asked_for(family):
    module = tiny.configured(family)
    assert module.surgery.skipped == {{"llama": "lm_head", "vit": "head"}[family]: "skip: " + module.skip[0]}
    every = tiny.configured(family, skip=[], **({"config": {**tiny.LLAMA}} if family == "llama" else {}))
    assert len(every.surgery.swapped) == len(module.surgery.swapped) + 1


class Draws(tiny.Losses):
    """What each step would draw."""

    def __init__(self):
        super().__init__()
        self.drawn = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn[trainer.current_epoch, batch_idx] = torch.rand(1).item()


def drawn(**options):
    draws = Draws()
    data = tiny.loader("llama", count=8, batch_size=4)
    tiny.trainer(max_steps=6, callbacks=[draws], **options).fit(tiny.module("llama"), data, data)
    return draws.drawn


def test_a_step_draws_by_its_seed_and_position(monkeypatch):
    """Not by what was drawn before: that is what makes a resumed run repeat itself."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    torch.manual_seed(0)
    first = drawn()
    torch.manual_seed(1)
    assert drawn() == first
    assert list(first) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(set(first.values())) == 6
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert not set(drawn().values()) & set(first.values())


def test_tensor_parallelism_is_refused():
    """Lightning's ModelParallelStrategy takes it by default: nothing would be sharded, and nobody told."""

    class Mesh(dict):
        def size(self):
            return 2

    with pytest.raises(UserError, match="take --trainer"):
        shard(torch.nn.Linear(2, 2), [], Mesh(data_parallel=Mesh(), tensor_parallel=Mesh()))


def test_processes_draw_apart(monkeypatch):
    first = drawn()
    monkeypatch.setattr(LlamaModule, "global_rank", 1)
    assert not set(drawn().values()) & set(first.values())

"""Gradient mismatch where the truth is known, and that training does not notice a measurement."""

import random
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

import tiny
from stableqat.callbacks import GradientMismatch
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.events import read_run
from stableqat.modules import FSDP2Strategy
from stableqat.quantizers import STE
from stableqat.surgery import quantize_linears

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]


class Memory(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def only(self, what):
        return {
            step: value
            for step, row in self.rows.items()
            if (value := {k: v for k, v in row.items() if what in k})
        }


def fit(module, data, *callbacks, **options):
    memory = Memory()
    options = {"max_steps": 1, "log_every_n_steps": 1, "logger": memory, **options}
    tiny.trainer(callbacks=list(callbacks), **options).fit(module, data)
    return memory


# -- the truth -------------------------------------------------------------------------------------


class Toy(L.LightningModule):
    """One quantized layer under a loss that is a function of its output; `twist` changes its gradient."""

    def __init__(self, weight, bits, loss, twist=None):
        super().__init__()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        self.net, self.of_output = nn.Sequential(linear), loss
        quantize_linears(self.net, partial(STE, bits=bits, scale_init="mse"))
        nn.init.ones_(self.net[0].weight_quantizer.scale)
        self.net[0].weight_quantizer.scale.data.mul_(torch.linspace(0.5, 2, len(weight))[:, None])
        self.net[0].weight.data.mul_(self.net[0].weight_quantizer.scale.data)
        if twist is not None:
            self.net[0].weight.register_hook(twist)

    def loss(self, batch):
        return self.of_output(self.net(batch))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(*batches):
    return DataLoader(batches, batch_size=None)


def measured(toy, batch, **options):
    rows = fit(toy, loader(batch), GradientMismatch(every_n_steps=1, **options)).rows
    return rows[0]["quant/grad_cosine"], rows[0]["quant/grad_cosine_se"]


def quadratic(twist=None):
    """256 weights spread over the 2-bit grid (and a little beyond), squared error of the layer's output."""
    make = torch.Generator().manual_seed(1)
    weight = torch.empty(4, 64).uniform_(-2.5, 1.5, generator=make)
    x = torch.randn(32, 64, generator=make)
    target = x @ torch.randn(64, 4, generator=make)
    return Toy(weight, 2, lambda y: (y - target).square().mean(), twist), x, target


def by_brute_force(toy, x, target, sigma, samples=60_000):
    """Cosine with the smoothed loss's gradient, and what a residue leaves of it, by Stein's identity."""
    layer = toy.net[0]
    scale = layer.weight_quantizer.scale.detach()
    v = layer.weight.detach() / scale
    (gradient,) = torch.autograd.grad(toy.loss(x), layer.weight)
    unit = nn.functional.normalize((gradient * scale).flatten(), dim=0)
    make = torch.Generator().manual_seed(2)

    def loss(at):
        return ((at.round().clamp(-2, 1) * scale) @ x.T - target.T).square().mean((1, 2))

    f, middle, e = [], [], []
    for _ in range(samples // 2000):
        noise = torch.randn(2000, *v.shape, generator=make)
        ends = [
            (loss(v + sigma * (at + noise)) - loss(v + sigma * (at - noise))) / (2 * sigma)
            for at in (unit.view_as(v), 0, -unit.view_as(v))
        ]
        f.append(ends[1])
        middle.append((ends[0] + ends[2]) / 2)  # the residue there is a little smaller
        e.append(noise)
    f, middle, e = torch.cat(f).double(), torch.cat(middle).double(), torch.cat(e).flatten(1).double()
    smoothed = (f[:, None] * e).mean(0)
    noise = (f[:, None] * e).var(0).sum() / samples
    slope, shared = smoothed @ unit.double(), e @ unit.double()
    rest = (middle - slope * shared).square().mean()
    true = slope / (smoothed @ smoothed - noise).sqrt()
    return true.item(), (slope / (slope**2 + rest).sqrt()).item()


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_it_agrees_with_brute_force(sigma):
    toy, x, target = quadratic()
    true, attenuated = by_brute_force(toy, x, target, sigma)
    cosine, error = measured(toy, x, directions=200, sigma=sigma)
    assert error < 0.03
    assert cosine == pytest.approx(attenuated, abs=3 * error)
    assert 0.3 < 0.84 * true - 3 * error < cosine < true + 3 * error


def test_a_constant_factor_does_not_matter_and_a_sign_does():
    cosine, error = measured(*quadratic()[:2], directions=20)
    same = measured(*quadratic(lambda g: 0.3 * g)[:2], directions=20)
    back = measured(*quadratic(lambda g: -g)[:2], directions=20)
    assert same == pytest.approx((cosine, error), rel=1e-3)
    assert back[0] == pytest.approx(-cosine, rel=1e-3)


def test_a_gradient_of_something_else_is_near_zero():
    make = torch.Generator().manual_seed(5)
    cosine, error = measured(*quadratic(lambda g: torch.randn(g.shape, generator=make))[:2], directions=100)
    assert abs(cosine) < 3 * error + 3 / 256**0.5 * 0.84  # random vectors of 256 numbers are not orthogonal
    assert error < 0.1


def test_the_staircase_alone():
    """A linear loss, weights spread evenly: STE's true cosine is sqrt(2 sqrt(pi) sigma), shown times 0.84."""
    make = torch.Generator().manual_seed(0)
    weight = torch.empty(32, 128).uniform_(-6, 6, generator=make)
    slopes = torch.randn(128, 32, generator=make)
    toy = Toy(weight, 4, lambda y: (y * slopes).sum())
    cosine, error = measured(toy, torch.eye(128), directions=100, sigma=0.1)
    assert error < 0.03
    assert cosine == pytest.approx(2**-0.25 * (2 * torch.pi**0.5 * 0.1) ** 0.5, abs=3 * error + 0.01)


def test_the_error_is_the_spread_between_measurements():
    toy, x, _ = quadratic()
    rows = fit(toy, loader(*[x] * 40), GradientMismatch(1, directions=16), max_steps=40).rows.values()
    cosines, errors = (
        torch.tensor([row[f"quant/grad_cosine{what}"] for row in rows]) for what in ("", "_se")
    )
    assert len(cosines) == 40
    assert cosines.std().item() == pytest.approx(errors.mean().item(), rel=0.4)


# -- no trace --------------------------------------------------------------------------------------


class Restless(L.LightningModule):
    """All that a measurement could disturb: dropout of an RNG nobody resets, batch norm, random modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 2))
        self.net[1].bias.requires_grad_(False)
        quantize_linears(self.net, partial(STE, bits=2))
        self.fail_at, self.calls = None, 0

    def loss(self, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("boom")
        noise = np.random.rand() + random.random()
        return self.net(batch + noise).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        self.log_dict({"train/other": 2 * loss})
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def restless_data():
    return DataLoader(torch.linspace(-1, 1, 320).reshape(40, 8), batch_size=4)


def state(module):
    """Everything, bit for bit."""
    tensors = [
        *module.parameters(),
        *module.buffers(),
        *(p.grad for p in module.parameters() if p.grad is not None),
    ]
    return (
        [tensor.detach().clone() for tensor in tensors],
        [m.training for m in module.modules()],
        torch.get_rng_state().clone(),
        random.getstate(),
        str(np.random.get_state()),
        sorted(vars(module)),
    )


def same(a, b):
    tensors = all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    return tensors and a[1] == b[1] and torch.equal(a[2], b[2]) and a[3:] == b[3:]


class Watched(GradientMismatch):
    """Compares the state before and after."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        before, logged = state(pl_module), dict(trainer.callback_metrics)
        try:
            super().on_train_batch_start(trainer, pl_module, *args)
        finally:
            assert same(before, state(pl_module))
            assert trainer.callback_metrics == logged


def test_a_measurement_leaves_everything_as_it_was():
    module = Restless()
    memory = fit(module, restless_data(), Watched(every_n_steps=2, directions=3), max_steps=6)
    assert list(memory.only("grad_cosine")) == [0, 2, 4]
    assert module.calls == 6 + 3 * (1 + 4 * 3)


@pytest.mark.parametrize("call", [1, 2, 9])
def test_an_exception_in_the_middle_leaves_everything_too(call):
    module = Restless()
    module.fail_at = call
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, restless_data(), GradientMismatch(every_n_steps=1, directions=3))
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


def trace(module, data, *callbacks, **options):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    losses = tiny.Losses()
    memory = fit(module, data, losses, *callbacks, **options)
    return losses.values, {step: row for step, row in memory.only("train/").items()}, state(module)


MODULES = {
    "restless": (Restless, restless_data),
    "llama": (partial(tiny.configured, "llama", "dsq"), partial(tiny.loader, "llama", 16, 4)),
    "vit": (
        partial(
            tiny.configured, "vit", "stableqat", mixup_alpha=0.4, model_args=tiny.VIT | {"drop_rate": 0.2}
        ),
        partial(tiny.loader, "vit", 16, 4),
    ),
}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}])
@pytest.mark.parametrize("name", MODULES)
def test_training_does_not_notice(name, options):
    make, data = MODULES[name]
    callback = GradientMismatch(every_n_steps=3, directions=2)
    plain = trace(make(), data(), max_steps=7, **options)
    observed = trace(make(), data(), callback, max_steps=7, **options)
    assert len(plain[0]) == 7 * options.get("accumulate_grad_batches", 1)
    assert observed[:2] == plain[:2]
    assert same(observed[2], plain[2])


def test_the_first_micro_batch_is_measured():
    class Seen(Restless):
        batches = []

        def loss(self, batch):
            self.batches.append(self.trainer.fit_loop.epoch_loop.batch_progress.current.completed)
            return super().loss(batch)

    module = Seen()
    fit(
        module,
        restless_data(),
        GradientMismatch(every_n_steps=2, directions=2),
        max_steps=3,
        accumulate_grad_batches=3,
    )
    measured = [batch for batch in range(9) for _ in range(module.batches.count(batch) - 1)]
    assert measured == [0] * 9 + [6] * 9


# -- when and where --------------------------------------------------------------------------------


def test_off_by_default_and_nothing_in_full_precision():
    assert not fit(tiny.configured("llama"), tiny.loader("llama"), GradientMismatch()).only("grad_cosine")
    full = tiny.configured("llama", "fp")
    assert not fit(full, tiny.loader("llama"), GradientMismatch(every_n_steps=1)).only("grad_cosine")


def test_no_value_where_there_is_no_gradient():
    toy, x, _ = quadratic(lambda g: 0 * g)
    assert not fit(toy, loader(x), GradientMismatch(every_n_steps=1, directions=2)).only("grad_cosine")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"every_n_steps": -1}, "every_n_steps"), ({"directions": 1}, "directions"), ({"sigma": 0.0}, "sigma")],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=rf"^mismatch\.{named}: must be"):
        GradientMismatch(**settings)


def test_shards_are_refused():
    trainer = tiny.trainer(strategy=FSDP2Strategy())
    GradientMismatch().setup(trainer, None, "fit")
    with pytest.raises(UserError, match=r"^mismatch\.every_n_steps: .* sharded .*ddp"):
        GradientMismatch(every_n_steps=1).setup(trainer, None, "fit")


class Criterion(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.loss = nn.MSELoss()


class OfOutputs(L.LightningModule):
    def loss(self, outputs, targets):
        return (outputs - targets).square().mean()


@pytest.mark.parametrize("module", [L.LightningModule, Criterion, OfOutputs])
def test_a_module_without_a_loss_of_a_batch_is_refused(module):
    with pytest.raises(UserError, match=r"^mismatch\.every_n_steps: \w+ has no method loss\(batch\)"):
        GradientMismatch(every_n_steps=1).setup(tiny.trainer(), module(), "fit")


def test_the_command_line(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    configs = [
        part for name in ("base", "debug", "stableqat") for part in ("-c", f"configs/llama/{name}.yaml")
    ]
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": "0",
        "trainer.logger.save_dir": str(tmp_path),
        "trainer.logger.version": "run",
        "mismatch.every_n_steps": "5",
        "mismatch.directions": "2",
    }
    assert (
        main(["fit", *configs, *[part for key, value in settings.items() for part in (f"--{key}", value)]])
        == 0
    )
    scalars = read_run(tmp_path / "llama" / "run", ("quant/grad_cosine",)).scalars
    assert scalars.keys() == {"quant/grad_cosine", "quant/grad_cosine_se"}
    assert all(len(values) == 2 for values in scalars.values())
    assert -1 <= scalars["quant/grad_cosine"][0] <= 1

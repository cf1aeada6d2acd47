"""Parameter groups, the learning rate's schedule, and that no parameter is forgotten."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import tiny
from stableqat.callbacks import DivergenceGuard
from stableqat.errors import UserError
from stableqat.modules import CosineWarmup, LlamaModule

FAMILIES = ["llama", "vit"]


def groups(module) -> dict[str, dict]:
    return {group["name"]: group for group in module.configure_optimizers().param_groups}


def names(module, group: dict) -> set[str]:
    by_id = {id(parameter): name for name, parameter in module.model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("method", ["ste", "dsq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_is_in_the_group_of_its_kind(family, method):
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    module = tiny.configured(
        family, method, optimizer=optimizer, scale_lr_multiplier=0.25, weight_lr_multiplier=0.5
    )
    made = groups(module)
    kinds = {name: names(module, group) for name, group in made.items()}
    everything = [name for members in kinds.values() for name in members]
    assert sorted(everything) == sorted(n for n, p in module.model.named_parameters() if p.requires_grad)

    assert all(".weight_quantizer." in name for name in kinds["scales"])
    learned = {"scale"} if method == "ste" else {"scale", "a_logit"}
    assert {name.rpartition(".")[2] for name in kinds["scales"]} == learned
    parameters = dict(module.model.named_parameters())
    assert all(parameters[name].ndim >= 2 for name in kinds["weights"])
    exempt = {"pos_embed", "cls_token"} if family == "vit" else set()
    assert {name for name in kinds["norms_and_biases"] if parameters[name].ndim >= 2} == exempt
    assert any("norm" in name for name in kinds["norms_and_biases"])

    assert {name: (group["lr"], group["weight_decay"]) for name, group in made.items()} == {
        "weights": (5e-3, 0.1),
        "scales": (2.5e-3, 0.0),
        "norms_and_biases": (1e-2, 0.0),
    }


def test_layers_near_the_images_learn_more_slowly_as_timm_groups_them():
    from timm.optim import param_groups_layer_decay

    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = tiny.configured("vit", optimizer=optimizer, layer_lr_decay=0.5, scale_lr_multiplier=0.25)
    rates = {name: group["lr"] for group in groups(module).values() for name in names(module, group)}
    plain = tiny.configured("vit", "fp").model
    by_id = {id(parameter): name for name, parameter in plain.named_parameters()}
    theirs = {
        by_id[id(parameter)]: 1e-2 * group["lr_scale"]
        for group in param_groups_layer_decay(plain, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert len(set(theirs.values())) > 2
    assert {name: rates[name] for name in theirs} == pytest.approx(theirs)
    block = "blocks.0.mlp.fc1.weight"
    assert rates["blocks.0.mlp.fc1.weight_quantizer.scale"] == pytest.approx(rates[block] / 4)
    with pytest.raises(UserError, match=r"model.layer_lr_decay: must lie in \(0, 1\], not 1.5"):
        tiny.module("vit", layer_lr_decay=1.5)


def test_full_precision_has_no_group_of_scales():
    assert set(groups(tiny.configured("llama", "fp"))) == {"weights", "norms_and_biases"}


@pytest.mark.parametrize("name", ["scale_lr_multiplier", "weight_lr_multiplier"])
def test_a_multiplier_below_zero_is_refused(name):
    with pytest.raises(UserError, match=name):
        tiny.module("llama", **{name: -1.0})


def test_the_norm_of_the_gradient_is_logged_before_clipping():
    """Clipped to 1e-3, the same gradient has the same norm in the log."""
    found = []
    for clip in (None, 1e-3):
        module = tiny.configured("llama", "stableqat")
        data = tiny.loader("llama")
        trainer = tiny.trainer(max_steps=1, gradient_clip_val=clip, log_every_n_steps=1)
        trainer.fit(module, data, data)
        found.append(trainer.callback_metrics["train/grad_norm"].item())
    assert found[0] == found[1]
    assert found[0] > 1e-2
    module = tiny.configured("llama", "stableqat")
    module.loss(next(iter(tiny.loader("llama")))).backward()
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    assert found[0] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)


class Gradients(L.Callback):
    """The gradients that the optimizer steps with."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        if grads:
            self.last = torch.cat([grad.flatten() for grad in grads])


def mixed(precision: str) -> dict:
    """Lightning has float16 for GPUs alone; the loss scaler works on a CPU, too."""
    if precision == "bf16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fused_optimizers_are_clipped_in_mixed_precision(precision, algorithm):
    limit, found = 1e-3, {}
    for fused in (False, True):
        module = tiny.configured("llama", "stableqat", optimizer=partial(torch.optim.AdamW, fused=fused))
        gradients = Gradients()
        options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "callbacks": [gradients]}
        trainer = tiny.trainer(max_steps=2, **mixed(precision), **options)
        trainer.fit(module, tiny.loader("llama"), tiny.loader("llama"))
        found[fused] = gradients.last
    size = found[True].norm() if algorithm == "norm" else found[True].abs().max()
    assert size == pytest.approx(limit, rel=1e-3)
    assert torch.allclose(found[True], found[False], atol=1e-2 * limit)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_sees_the_step_that_the_guard_drops(fused):
    class Nan(LlamaModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    module = Nan(config=tiny.LLAMA, optimizer=partial(torch.optim.AdamW, fused=fused))
    module.configure_model()
    before, guard = [p.clone() for p in module.parameters()], DivergenceGuard()
    trainer = tiny.trainer(max_steps=3, gradient_clip_val=1.0, callbacks=[guard], **mixed("16-mixed"))
    trainer.fit(module, tiny.loader("llama"), tiny.loader("llama"))
    assert guard.diverged
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_the_guard_judges_the_loss_and_not_what_the_scaler_makes_of_it():
    scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    plugin, module, guard = (
        MixedPrecision("16-mixed", "cpu", scaler),
        tiny.configured("llama"),
        DivergenceGuard(),
    )
    trainer = tiny.trainer(max_steps=40, max_epochs=-1, plugins=[plugin], callbacks=[guard, tiny.Losses()])
    trainer.fit(module, tiny.loader("llama"), tiny.loader("llama"))
    assert guard.initial_loss == pytest.approx(trainer.callbacks[1].values[0], rel=1e-5)
    assert scaler.get_scale() > 2**17
    assert not guard.diverged


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_moves(family):
    module = tiny.configured(family, "dsq")
    before = {name: parameter.clone() for name, parameter in module.model.named_parameters()}
    data = tiny.loader(family)
    tiny.trainer(max_steps=2).fit(module, data, data)
    still = {n for n, p in module.model.named_parameters() if torch.equal(p, before[n])}
    assert still == {name for name in before if name.endswith("scale_floor")}


def test_a_dead_optimizer_is_noticed():
    """LightningCLI by itself builds the optimizer before surgery; training then does nothing."""

    class Dead(LlamaModule):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for n, p in self.named_parameters() if "q_proj" not in n], lr=1e-3)

    module = Dead(config=tiny.LLAMA, quantizer=tiny.METHODS["ste"])
    with pytest.raises(AssertionError, match=r"outside the optimizer: .*q_proj\.weight"):
        tiny.trainer(max_steps=1).fit(module, tiny.loader("llama"), tiny.loader("llama"))


def test_cosine_with_warmup():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1.0}])
    schedule = CosineWarmup(optimizer, warmup_steps=3, total_steps=11, final_ratio=0.2)
    rates = []
    for _ in range(14):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.6)  # half-way down from 1 to 0.2
    assert rates[5] == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert rates[11:] == pytest.approx([0.2] * 3)


def test_without_warmup_the_peak_comes_first():
    assert CosineWarmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), total_steps=4).factor(0) == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"warmup_steps": -1}, "warmup_steps"), ({"warmup_steps": 5, "total_steps": 5}, "total_steps")],
)
def test_a_schedule_that_cannot_be_is_refused(settings, key):
    with pytest.raises(UserError, match=key):
        CosineWarmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), **settings)


EPOCHS = {"max_steps": -1, "max_epochs": 1}  # of eight steps
TIMED = {"max_steps": -1, "max_time": {"seconds": 0.3}}


@pytest.mark.parametrize("endless", [TIMED, {"max_steps": -1, "max_epochs": -1}], ids=["time", "epochs"])
def test_a_schedule_needs_an_end_if_the_run_has_none(endless):
    module, data = tiny.module("llama", lr_scheduler=CosineWarmup), tiny.loader("llama")
    with pytest.raises(UserError, match=r"^total_steps: .* set total_steps, trainer\.max_steps"):
        tiny.trainer(**endless).fit(module, data, data)


@pytest.mark.parametrize("length", [{"max_steps": 8}, EPOCHS])
def test_a_schedule_that_fails_beyond_its_end_has_as_many_steps_as_the_run(length):
    def fit(total_steps):
        scheduler = partial(OneCycleLR, max_lr=1e-3, total_steps=total_steps)
        trainer, data = tiny.trainer(**length), tiny.loader("llama", count=32, batch_size=4)
        trainer.fit(tiny.module("llama", lr_scheduler=scheduler), data, data)
        return trainer.global_step

    with pytest.raises(UserError, match=r"^total_steps: OneCycleLR ends after 7 steps, .* takes 8; set it"):
        fit(7)
    assert fit(8) == 8


@pytest.mark.parametrize("scheduler", [None, partial(CosineWarmup, total_steps=5)], ids=["none", "given"])
def test_a_run_may_end_with_its_time(scheduler):
    trainer = tiny.trainer(**TIMED)
    trainer.fit(tiny.module("llama", lr_scheduler=scheduler), tiny.loader("llama"), tiny.loader("llama"))
    assert trainer.global_step


def fit(module, folder, length, **resume):
    """Learning rates of the groups, those that each step is taken with."""
    rates = []

    class Rates(tiny.Losses):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer = tiny.trainer(**length, callbacks=[Rates()])
    data = tiny.loader("llama", count=32, batch_size=4)
    trainer.fit(module, data, data, **resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return rates


@pytest.mark.filterwarnings("ignore:You're resuming")
def test_the_schedule_ends_with_the_run_and_keeps_the_groups_apart(tmp_path):
    options = {"lr_scheduler": CosineWarmup, "optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    rates = fit(tiny.module("llama", **options), tmp_path, {"max_steps": 4})
    assert [weights for weights, _, _ in rates] == pytest.approx(
        [1e-2 * f for f in (1, 0.8535534, 0.5, 0.1464466)]
    )
    assert all(scales == pytest.approx(0.1 * weights) for weights, scales, _ in rates)


class LinearDecay(LambdaLR):
    """A schedule of a user's own: it ends with the run if nothing else is said."""

    def __init__(self, optimizer, total_steps=None):
        self.total_steps = total_steps
        super().__init__(optimizer, lambda step: 1 - step / (self.total_steps or 1))


SCHEDULES = {  # by the run's number of steps
    "cosine": lambda _: CosineWarmup,
    "warmup": lambda _: partial(CosineWarmup, warmup_steps=2, final_ratio=0.1),
    "linear": lambda _: LinearDecay,
    "function": lambda steps: partial(LambdaLR, lr_lambda=lambda step: (1 - step / steps) ** 2),
}


@pytest.mark.filterwarnings("ignore:You're resuming")
@pytest.mark.parametrize(
    ("schedule", "unit"),
    [
        *((schedule, "max_steps") for schedule in SCHEDULES),
        ("warmup", "max_epochs"),
        ("linear", "max_epochs"),
    ],
)
def test_a_run_that_resumes_with_more_steps_follows_the_longer_schedule(schedule, unit, tmp_path):
    """From its first step on: the rate in the checkpoint is that of the shorter schedule's end."""
    first, whole = ({"max_steps": 8}, {"max_steps": 16})
    if unit == "max_epochs":
        first, whole = EPOCHS, EPOCHS | {"max_epochs": 2}
    resume = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}

    def module(steps):
        scheduler = SCHEDULES[schedule](steps)
        return tiny.module("llama", lr_scheduler=scheduler, optimizer=partial(torch.optim.AdamW, lr=1e-2))

    undisturbed = fit(module(16), tmp_path, whole)
    fit(module(8), tmp_path, first)
    resumed = fit(module(16), tmp_path, whole, **resume)
    assert resumed == undisturbed[8:]
    assert min(map(min, resumed)) > 0

"""A student learns from a frozen full-precision model that nothing but its loss knows of."""

import copy
import logging

import lightning as L
import pytest
import torch

import tiny
from stableqat.errors import UserError
from stableqat.modules import Distillation, LlamaModule
from stableqat.modules import loss as lean

IGNORED = -100


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A full-precision run's checkpoint, trained a little."""
    folder = tmp_path_factory.mktemp("start")
    made = tiny.module("llama", "fp", optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    torch.manual_seed(7)
    trainer, data = tiny.trainer(max_steps=4), tiny.loader("llama", 16, 4)
    trainer.fit(made, data, data)
    trainer.save_checkpoint(folder / "fp.ckpt")
    return folder / "fp.ckpt"


def module(start, method="dsq", **settings):
    options = {key: settings.pop(key) for key in list(settings) if key not in vars(Distillation())}
    return tiny.module("llama", method, init_from=str(start), teacher=Distillation(**settings), **options)


def set_up(made):
    made.trainer = tiny.trainer()
    made.setup("fit")


def ready(start, **settings):
    made = module(start, **settings)
    made.configure_model()
    set_up(made)
    return made


def batch():
    made = tiny.batch("llama")
    made["labels"] = made["labels"].clone()
    made["labels"][0, :9] = made["labels"][2, 4] = IGNORED
    return made


def by_hand(made, start, weight, temperature):
    """From whole logits, in float64, without a function that is made for it."""
    teacher = tiny.configured("llama", "fp", init_from=str(start)).model.to(torch.bfloat16).eval()
    teacher.model.rotary_emb = copy.deepcopy(made.model.model.rotary_emb)
    ids, labels = batch()["input_ids"], batch()["labels"][:, 1:]
    with torch.no_grad():
        theirs = teacher(input_ids=ids).logits[:, :-1].double()
    own = made(ids)[:, :-1].double()
    counted = labels != IGNORED
    p, q = (torch.softmax(each / temperature, -1) for each in (theirs, own))
    kl = (p * (p.log() - q.log())).sum(-1)[counted].mean() * temperature**2
    nll = -torch.log(torch.softmax(own, -1))[counted].gather(-1, labels[counted][:, None]).mean()
    return (1 - weight) * nll + weight * kl


@pytest.mark.parametrize("rows", [13, 1000])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
def test_loss_and_gradients_are_those_computed_by_hand(weight, temperature, rows, start, monkeypatch):
    monkeypatch.setattr(lean, "LOGITS", rows * 64)
    made = ready(start, weight=weight, temperature=temperature)
    loss = made.loss(batch())
    loss.backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    expected = by_hand(made, start, weight, temperature)
    expected.backward()
    assert loss.item() == pytest.approx(
        expected.item(), rel=1e-3
    )  # the teacher's logits are not bfloat16 here
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_hidden_states_are_drawn_towards_the_teachers(start):
    """Here the student is the teacher, so that only the rounding to bfloat16 is left."""
    plain, drawn = (
        ready(start, method="fp", weight=0.5, hidden_weight=hidden).loss(batch()).item()
        for hidden in (0.0, 1000.0)
    )
    assert 0 < (drawn - plain) / 1000 < 1e-4
    quantized = ready(start, weight=0.0, hidden_weight=1.0)
    teacher = quantized.teacher.model
    with torch.no_grad():
        theirs, own = (
            m(input_ids=batch()["input_ids"], output_hidden_states=True).hidden_states
            for m in (teacher, tiny.configured("llama", "dsq", init_from=str(start)).model)
        )
    counted = lean.next_tokens(batch()["labels"]) != IGNORED
    errors = [
        ((b.float() - a.float()).norm(dim=-1) / a.float().norm(dim=-1))[counted].square().mean()
        for a, b in zip(theirs[1:], own[1:], strict=True)
    ]
    loss = quantized.loss(batch())
    nll = tiny.configured("llama", "dsq", init_from=str(start)).model(**batch()).loss
    assert loss.item() == pytest.approx((nll + sum(errors) / len(errors)).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in quantized.parameters() if p.requires_grad)


def test_the_teacher_is_frozen_and_no_part_of_the_module(start):
    made, alone = ready(start), tiny.configured("llama", "dsq", init_from=str(start))
    assert made.state_dict().keys() == alone.state_dict().keys()
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in alone.named_parameters()]
    before = {name: value.clone() for name, value in made.teacher.model.state_dict().items()}
    made.loss(batch()).backward()
    teacher = made.teacher.model
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32


def fit(made, steps=4, ckpt_path=None):
    """On one batch, whatever the step."""
    losses = tiny.Losses()
    trainer = tiny.trainer(max_steps=steps, callbacks=[losses])
    L.seed_everything(0, verbose=False)
    data = tiny.loader("llama", 4, 4)
    trainer.fit(made, data, data, ckpt_path=ckpt_path, weights_only=True)
    return losses.values, trainer


def state(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("lean_loss", [False, True])
def test_with_weight_0_training_is_as_without(lean_loss, start):
    off = module(start, weight=0.0, lean_loss=lean_loss)
    plain = tiny.module("llama", "dsq", init_from=str(start), lean_loss=lean_loss)
    losses = [fit(made)[0] for made in (off, plain)]
    assert losses[0] == losses[1]
    assert off.teacher is None
    assert all(torch.equal(value, state(plain)[name]) for name, value in state(off).items())


def test_a_teacher_leaves_the_students_random_start_alone(start):
    made = tiny.module("llama", "dsq", teacher=Distillation(source=str(start)))
    torch.manual_seed(3)
    set_up(made)
    made.configure_model()
    alone = tiny.configured("llama", "dsq", seed=3).state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in made.state_dict().items())


def test_a_student_learns_what_the_teacher_says(start):
    """From random weights, by the KL divergence alone."""
    made = tiny.module("llama", "fp", teacher=Distillation(source=str(start), weight=1.0))
    torch.manual_seed(1)
    losses, _ = fit(made, 30)
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_goes_on_with_its_teacher_and_the_file_has_none(start, tmp_path):
    whole, _ = fit(module(start), 6)
    half = module(start)
    _, trainer = fit(half, 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    plain = tiny.module("llama", "dsq", init_from=str(start))
    _, other = fit(plain, 3)
    other.save_checkpoint(tmp_path / "plain.ckpt")
    sizes = [(tmp_path / name).stat().st_size for name in ("half.ckpt", "plain.ckpt")]
    assert sizes[0] < sizes[1] + 2000
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == state(plain).keys()
    assert saved["hyper_parameters"]["teacher"]["source"] == str(start)

    losses, _ = fit(module(start), 6, tmp_path / "half.ckpt")
    assert losses == whole[3:]


def test_a_checkpoint_loads_without_the_teachers_source(start, tmp_path):
    gone = tmp_path / "gone.ckpt"
    gone.write_bytes(start.read_bytes())
    made = module(gone, temperature=2.0)
    _, trainer = fit(made, 1)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    gone.unlink()
    loaded = LlamaModule.load_from_checkpoint(tmp_path / "student.ckpt")
    assert loaded.distillation == made.distillation
    assert loaded.teacher is None
    data = tiny.loader("llama", 8, 4)
    tiny.trainer(limit_val_batches=2).validate(loaded, data, verbose=False)
    with pytest.raises(UserError, match=r"teacher.source: there is no checkpoint .*gone.ckpt"):
        tiny.trainer(max_steps=1).fit(loaded, data, data)


def test_a_teacher_of_another_shape(start, tmp_path):
    """A deeper one teaches by its logits; hidden states need the student's shape."""
    deeper = {**tiny.LLAMA, "num_hidden_layers": 3}
    big = tiny.module("llama", "fp", config=deeper)
    _, trainer = fit(big, 1)
    trainer.save_checkpoint(tmp_path / "big.ckpt")
    made = tiny.module("llama", teacher=Distillation(source=str(tmp_path / "big.ckpt")))
    set_up(made)
    assert len(made.teacher.model.model.layers) == 3
    made = tiny.module("llama", teacher=Distillation(source=str(tmp_path / "big.ckpt"), hidden_weight=1.0))
    with pytest.raises(UserError, match=r"num_hidden_layers is 3, and 2 in the student.*hidden_weight to 0"):
        set_up(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "teacher.weight: must be from 0 to 1"),
        ({"temperature": 0.0}, "teacher.temperature: must be more than 0"),
        ({"hidden_weight": -1.0}, "teacher.hidden_weight: must be 0 or more"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Distillation(**settings)


def test_a_teacher_needs_a_source():
    with pytest.raises(UserError, match=r"teacher\.source: missing"):
        tiny.module("llama", teacher=Distillation())


def test_a_quantized_runs_latent_weights_are_said_to_be_taken(start, tmp_path, caplog):
    _, trainer = fit(tiny.module("llama", "dsq", init_from=str(start)), 1)
    trainer.save_checkpoint(tmp_path / "q.ckpt")
    with caplog.at_level(logging.WARNING):
        ready(tmp_path / "q.ckpt")
    assert "latent weights are taken" in caplog.text


def test_what_a_table_says_of_it(start):
    assert ready(start, weight=0.25).describe()["teacher_weight"] == 0.25
    assert not [key for key in tiny.configured("llama").describe() if key.startswith("teacher")]


def test_an_offloaded_teacher_keeps_its_layers_where_they_are(start):
    """Shown with the meta device for another one: weights are there while a layer runs, and back after it."""
    made = ready(start, offload=True)
    layers = made.teacher.model.model.layers
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    seen = []
    layers[1].mlp.register_forward_pre_hook(lambda mlp, _: seen.append(mlp.up_proj.weight.device.type))
    made.teacher.to(torch.device("meta"))
    assert made.teacher.model.lm_head.weight.is_meta
    tables = torch.zeros(2, 1, 16, 16, dtype=torch.bfloat16, device="meta")
    hidden = torch.zeros(8, 16, 32, dtype=torch.bfloat16, device="meta")
    assert layers[1](hidden, position_embeddings=tuple(tables)).is_meta
    assert seen == ["meta"]
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_offloading_changes_no_loss(start):
    losses = [ready(start, offload=offload).loss(batch()).item() for offload in (False, True)]
    assert losses[0] == losses[1]

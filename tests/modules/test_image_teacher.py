"""A vision transformer learns from a frozen one: by one classifier, by DeiT's token, by its last tokens."""

import pytest
import torch
from torch.nn import functional as F

import tiny
from stableqat.errors import UserError
from stableqat.modules import Distillation, ViTModule

DISTILLED = {"model_name": "deit_tiny_distilled_patch16_224"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A full-precision run's checkpoint, trained a little."""
    folder = tmp_path_factory.mktemp("start")
    made = tiny.module("vit", "fp", optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    torch.manual_seed(7)
    trainer, data = tiny.trainer(max_steps=4), tiny.loader("vit", 16, 4)
    trainer.fit(made, data, data)
    trainer.save_checkpoint(folder / "fp.ckpt")
    return str(folder / "fp.ckpt")


def ready(start, method="dsq", own=None, **settings):
    made = tiny.module("vit", method, teacher=Distillation(source=start, **settings), **(own or {}))
    torch.manual_seed(3)
    made.configure_model()
    made.trainer = tiny.trainer()
    made.setup("fit")
    return made.train()


def teachers_logits(start):
    model = tiny.configured("vit", "fp", init_from=start).model.to(torch.bfloat16).eval()
    with torch.no_grad():
        return model(tiny.batch("vit")["pixel_values"].to(torch.bfloat16)).double()


def mixed():
    batch = tiny.batch("vit")
    return {**batch, "labels": 0.7 * F.one_hot(batch["labels"], 10).float() + 0.03}


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
def test_the_loss_is_that_computed_by_hand(start, weight, temperature, hard):
    made = ready(start, weight=weight, temperature=temperature, hard=hard)
    theirs, own = teachers_logits(start), made(mixed()["pixel_values"]).double()
    if hard:
        taught = -own.log_softmax(-1).gather(-1, theirs.argmax(-1, keepdim=True)).mean()
    else:
        p, q = ((each / temperature).softmax(-1) for each in (theirs, own))
        taught = (p * (p.log() - q.log())).sum(-1).mean() * temperature**2
    labelled = -(mixed()["labels"] * own.log_softmax(-1)).sum(-1).mean()
    expected = (1 - weight) * labelled + weight * taught
    assert made.loss(mixed()).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_distillation_token_learns_from_the_teacher_and_the_other_from_the_labels(start):
    made = ready(start, own=DISTILLED, weight=0.5, hard=True)
    own, taught = made.model(tiny.batch("vit")["pixel_values"])
    labels = tiny.batch("vit")["labels"]
    assert not torch.equal(labels, teachers_logits(start).argmax(-1))
    expected = (F.cross_entropy(own, labels) + F.cross_entropy(taught, teachers_logits(start).argmax(-1))) / 2
    assert made.loss(tiny.batch("vit")).item() == pytest.approx(expected.item(), rel=1e-5)
    made.eval()
    assert torch.allclose(made(tiny.batch("vit")["pixel_values"]), (own + taught) / 2, atol=1e-6)


def test_last_tokens_are_drawn_towards_the_teachers(start):
    """Of a student with the teacher's weights only the rounding to bfloat16 is left."""
    same = ready(start, "fp", own={"init_from": start}, weight=0.0, hidden_weight=1000.0)
    labelled = F.cross_entropy(same(tiny.batch("vit")["pixel_values"]), tiny.batch("vit")["labels"])
    assert 0 < (same.loss(tiny.batch("vit")) - labelled).item() / 1000 < 1e-3
    other = ready(start, "fp", weight=0.0, hidden_weight=1.0)
    before = (other.loss(tiny.batch("vit")) - F.cross_entropy(
        other(tiny.batch("vit")["pixel_values"]), tiny.batch("vit")["labels"]
    )).item()  # fmt: skip
    images = tiny.batch("vit")["pixel_values"]
    theirs, own = other.teacher.read(images)[1].float(), other.model.forward_features(images)
    error = ((own - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean().item()
    assert error > 0.1
    assert before == pytest.approx(error, rel=1e-3)
    other.loss(tiny.batch("vit")).backward()
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", [{}, {"hidden_weight": 1.0, "weight": 0.5}, {"offload": True}])
def test_a_student_learns_what_the_teacher_says(start, settings):
    made = tiny.module("vit", "ste", teacher=Distillation(source=start, **settings))
    losses, data = tiny.Losses(), tiny.loader("vit", 16, 16)
    torch.manual_seed(1)
    tiny.trainer(max_steps=30, callbacks=[losses]).fit(made, data, data)
    assert losses.values[-1] < 0.8 * losses.values[0]
    assert not [name for name in made.state_dict() if "teacher" in name]
    assert not made.teacher.model.training


def test_a_checkpoint_holds_no_teacher_and_evaluates_without_it(start, tmp_path):
    made = tiny.module("vit", "ste", teacher=Distillation(source=start, weight=0.5), **DISTILLED)
    trainer, data = tiny.trainer(max_steps=1), tiny.loader("vit")
    trainer.fit(made, data, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ViTModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.distillation == made.distillation
    assert loaded.describe()["teacher_weight"] == 0.5
    batch = tiny.batch("vit")
    assert torch.equal(loaded.eval()(batch["pixel_values"]), made.eval()(batch["pixel_values"]))


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        ({"num_classes": 7}, {}, r"teacher.source: .*fp.ckpt has no classifier of the 7 classes"),
        (DISTILLED, {}, r"teacher.weight: 1 teaches the distillation token's .*; set it to 0.5"),
        (DISTILLED, {"weight": 0.5, "hidden_weight": 1.0}, r"number of class tokens is 1, and 2 in the"),
        ({"model_args": {**tiny.VIT, "embed_dim": 16}}, {"hidden_weight": 1.0}, "width is 32, and 16 in the"),
        ({}, {"source": "gone.ckpt"}, r"teacher.source: .*gone.ckpt"),
    ],
)  # fmt: skip
def test_students_that_cannot_learn_are_refused(start, own, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        ready(settings.pop("source", start), own=own, **settings)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_architecture_reads_the_same_images(start, tmp_path):
    deeper = {**tiny.VIT, "depth": 3, "embed_dim": 16}
    big = tiny.module("vit", "fp", model_args=deeper)
    trainer, data = tiny.trainer(max_steps=1), tiny.loader("vit")
    trainer.fit(big, data, data)
    trainer.save_checkpoint(tmp_path / "big.ckpt")
    made = ready(str(tmp_path / "big.ckpt"))
    assert len(made.teacher.model.blocks) == 3
    assert made.loss(tiny.batch("vit")).item() > 0

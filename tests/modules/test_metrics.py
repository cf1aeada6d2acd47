"""What the modules report, against a computation by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import tiny
from stableqat.modules import LlamaModule


def logits(module, key, batch):
    with torch.no_grad():
        return module.eval()(batch[key]).double()


def evaluated(module, batches):
    trainer = tiny.trainer(limit_val_batches=None)
    trainer.validate(module, batches, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def uneven(rows, sizes):
    batches, start = [], 0
    for size in sizes:
        part = rows[start : start + size]
        batches.append({key: torch.stack([row[key] for row in part]) for key in part[0]})
        start += size
    return DataLoader(batches, batch_size=None)


def test_the_training_loss_is_that_of_the_next_token():
    """The model shifts the labels itself: shifted ones would teach it the token after the next."""
    module = tiny.configured("llama", "ste")
    batch = tiny.batch("llama")
    batch["labels"][0, :5] = -100
    expected = F.cross_entropy(
        logits(module, "input_ids", batch)[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=-100,
    )
    assert module.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    twice_shifted = F.cross_entropy(
        logits(module, "input_ids", batch)[:, :-2].flatten(0, 1),
        batch["labels"][:, 2:].flatten(),
        ignore_index=-100,
    )
    assert abs(twice_shifted - expected) > 1e-3


def test_perplexity_is_an_average_over_tokens():
    """Batches of different sizes, rows of different lengths, and one batch of padding alone."""
    module = tiny.configured("llama", "ste")
    rows = tiny.rows("llama", 6)
    for number, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][16 - 2 * number :] = -100
    rows[5]["labels"][:] = -100
    batches = uneven(rows, [1, 4, 1])

    nll, count, means = 0.0, 0, []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(
            logits(module, "input_ids", batch)[:, :-1].transpose(1, 2),
            labels,
            ignore_index=-100,
            reduction="sum",
        )
        number = (labels != -100).sum().item()
        nll, count = nll + each.item(), count + number
        means += [each.item() / number] if number else []
    metrics = evaluated(module, batches)
    # the second of three batches is the odd half; the third is padding alone
    assert metrics["val/loss_odd"] == pytest.approx(means[1], rel=1e-6)
    assert metrics["val/loss_even"] == pytest.approx(means[0], rel=1e-6)
    assert metrics["val/loss"] == pytest.approx(nll / count, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(torch.tensor(nll / count).exp().item(), rel=1e-6)
    assert abs(sum(means) / len(means) - nll / count) > 1e-3


def test_validation_starts_anew_every_time():
    module = tiny.configured("llama", "ste")
    first = evaluated(module, uneven(tiny.rows("llama", 6), [2, 4]))
    other = evaluated(module, uneven(tiny.rows("llama", 3), [3]))
    assert first != other
    assert evaluated(module, uneven(tiny.rows("llama", 6), [2, 4])) == first


def test_top1_and_top5_are_averages_over_images():
    """The loss in nats is the plain cross-entropy, whatever smoothing and mixup training has."""
    module = tiny.configured("vit", "ste", label_smoothing=0.3, mixup_alpha=0.8)
    rows = tiny.rows("vit", 21)
    rows[4]["labels"] = rows[20]["labels"] = torch.tensor(-100)
    batches = uneven(rows, [3, 17, 1])
    outputs = torch.cat([logits(module, "pixel_values", batch) for batch in batches])
    labels = torch.stack([row["labels"] for row in rows])
    odd = (torch.arange(21) >= 3) & (torch.arange(21) < 20)  # the rows of the second of three batches
    odd = odd[labels != -100]
    outputs, labels = outputs[labels != -100], labels[labels != -100]
    ranked = outputs.argsort(descending=True)
    expected = {
        "val/loss": F.cross_entropy(outputs, labels).item(),
        "val/loss_even": F.cross_entropy(outputs[~odd], labels[~odd]).item(),
        "val/loss_odd": F.cross_entropy(outputs[odd], labels[odd]).item(),
        "val/top1": (ranked[:, 0] == labels).double().mean().item(),
        "val/top5": (ranked[:, :5] == labels[:, None]).any(1).double().mean().item(),
    }
    metrics = evaluated(module, batches)
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["val/top1"] < expected["val/top5"] < 1


@pytest.mark.parametrize("classes", [2, 5, 6])
def test_top5_of_few_classes_is_left_out(classes):
    module = tiny.configured("vit", "ste", num_classes=classes)
    rows = tiny.rows("vit", 12)
    for row in rows:
        row["labels"] %= classes
    metrics = evaluated(module, uneven(rows, [12]))
    assert "val/top1" in metrics
    assert ("val/top5" in metrics) == (classes > 5)


def test_label_smoothing_and_mixup_are_in_the_training_loss():
    batch = tiny.batch("vit")

    def loss(**options):
        module = tiny.configured("vit", "ste", **options)
        np.random.seed(0)  # where timm draws the share of each image from
        return module.loss(module.augment(batch)).item(), module

    plain, module = loss()
    smooth, _ = loss(label_smoothing=0.3)
    scores = logits(module, "pixel_values", batch).float()
    assert plain == pytest.approx(F.cross_entropy(scores, batch["labels"]).item(), rel=1e-6)
    expected = F.cross_entropy(scores, batch["labels"], label_smoothing=0.3).item()
    assert smooth == pytest.approx(expected, rel=1e-6)
    kept = batch["pixel_values"].clone()
    assert loss(mixup_alpha=0.8)[0] != pytest.approx(plain, abs=1e-4)
    assert torch.equal(batch["pixel_values"], kept)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_testing_reports_as_validation_does(family):
    module = tiny.configured(family, "ste")
    trainer = tiny.trainer(limit_test_batches=None)
    trainer.test(module, tiny.loader(family), verbose=False)
    tested = {name.removeprefix("test/"): value.item() for name, value in trainer.callback_metrics.items()}
    validated = evaluated(module, tiny.loader(family))
    assert tested == {name.removeprefix("val/"): value for name, value in validated.items()}


def test_predictions():
    for family, shape in (("llama", (8, 15)), ("vit", (8, 10))):
        module = tiny.configured(family, "ste")
        [predicted] = tiny.trainer().predict(module, tiny.loader(family))
        assert predicted.shape == shape
        if family == "vit":
            assert torch.allclose(predicted.sum(1), torch.ones(8))
        else:
            assert predicted.mean().item() == pytest.approx(
                evaluated(module, tiny.loader(family))["val/loss"], rel=1e-6
            )


def test_a_sequence_of_the_full_length_is_seen_in_full():
    """The loss of the last token depends on the first one."""
    module: LlamaModule = tiny.configured("llama", "fp").eval()
    batch = tiny.batch("llama", 1)
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, 0] = (batch["input_ids"][0, 0] + 1) % 64
    with torch.no_grad():
        assert module.predict_step(batch, 0)[0, -1] != module.predict_step(changed, 0)[0, -1]

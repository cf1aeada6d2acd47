"""Training on conversations: only labels count, and a packed row is what its conversations are alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import tiny
from chats import byte_tokenizer
from stableqat.data import TextDataModule
from stableqat.modules.teacher import Distillation

SMALL = {**tiny.LLAMA, "vocab_size": 258, "max_position_embeddings": 256, "num_key_value_heads": 2}
TOKENIZER = byte_tokenizer()
MODELS = {
    "llama": SMALL,
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}


def questions(number):
    return [
        {"role": "user", "content": f"{number}?"},
        {"role": "assistant", "content": "yes" if number % 2 else f"no, {number * 37 % 100}"},
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    lines = [json.dumps({"messages": questions(number)}) + "\n" for number in range(1000)]
    (folder / "chats.jsonl").write_text("".join(lines))
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return folder


def data(source, **options):
    options = {"block_size": 128, "batch_size": 4, "seed": 0} | options
    made = TextDataModule(
        str(source / "chats.jsonl"),
        tokenizer=str(source / "tokenizer"),
        cache_dir=str(source / "cache"),
        **options,
    )
    made.prepare_data()
    made.setup("fit")
    return made


def by_hand(model, number):
    """Losses of the tokens that the assistant writes in a conversation, which is read by itself."""
    ids = torch.tensor([TOKENIZER.apply_chat_template(questions(number), return_dict=False)])
    answer = questions(number)[1]["content"]
    # ... <|im_start|> assistant \n ANSWER <|im_end|> \n
    stop = ids.shape[1] - 1
    start = stop - len(answer) - 1
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    return F.cross_entropy(logits[start - 1 : stop - 1], ids[0, start:stop], reduction="none")


def numbers(tokens):
    """The conversations in a row, by their questions."""
    text = TOKENIZER.decode(tokens)
    parts = text.split("<|im_start|>user\n")[1:]
    return [int(part.partition("?")[0]) for part in parts]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_mean_over_the_assistants_tokens(source, model, lean, packing):
    module = tiny.configured("llama", "fp", config=MODELS[model], lean_loss=lean)
    datamodule = data(source, packing=packing)
    batch = next(iter(datamodule.train_dataloader()))
    found = [number for row in batch["input_ids"] for number in numbers(row)]
    assert (len(found) > 8) is packing
    losses = torch.cat([by_hand(module.model, number) for number in found])
    assert module.loss(batch).item() == pytest.approx(losses.mean().item(), abs=1e-5)
    module.eval().validation_step(batch, 0)
    assert module.val_loss.compute()["loss"].item() == pytest.approx(losses.mean().item(), abs=1e-5)
    assert module.val_loss.counts.sum() == len(losses)


@pytest.mark.parametrize("model", MODELS)
def test_packed_logits_are_those_of_each_conversation_alone(source, model):
    module = tiny.configured("llama", "fp", config=MODELS[model])
    batch = next(iter(data(source).train_dataloader()))
    with torch.no_grad():
        packed = module(batch["input_ids"], batch["position_ids"])
        seen = module(batch["input_ids"])
        for row, logits, across in zip(batch["input_ids"], packed, seen, strict=True):
            place = 0
            for number in numbers(row):
                ids = torch.tensor([TOKENIZER.apply_chat_template(questions(number), return_dict=False)])
                part = slice(place, place + ids.shape[1])
                alone = module(ids)[0]
                torch.testing.assert_close(logits[part], alone, atol=1e-5, rtol=0)
                if place:
                    assert (across[part] - alone).abs().max() > 1e-4
                place += ids.shape[1]


def test_a_teacher_reads_the_same_rows(source, tmp_path):
    config = MODELS["llama"]
    teacher = tiny.configured("llama", "fp", seed=1, config=config)
    teacher.model.save_pretrained(tmp_path / "teacher")
    module = tiny.configured(
        "llama",
        "fp",
        config=config,
        teacher=Distillation(source=str(tmp_path / "teacher"), weight=1.0, hidden_weight=1.0),
    )
    module.trainer = tiny.trainer()
    module.setup("fit")
    losses = {}
    for packing in (False, True):
        batches = list(data(source, packing=packing, batch_size=1).val_dataloader())
        count = [int((batch["labels"] != -100).sum()) for batch in batches]
        total = sum(module.loss(batch).item() * n for batch, n in zip(batches, count, strict=True))
        losses[packing] = total / sum(count)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_processes_weigh_their_losses_by_their_labels(source, monkeypatch):
    module = tiny.configured("llama", "fp", config=MODELS["llama"])
    batch = next(iter(data(source, packing=False).train_dataloader()))
    batch["labels"][0, :-1] = -100  # so that the halves differ in their labels
    batch["labels"][0, 40] = 7
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    counts = [int((half["labels"] != -100).sum()) for half in halves]
    assert counts[0] != counts[1]
    trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(reduce=lambda _, reduce_op: torch.tensor(sum(counts) / 2))
    )
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    mean = sum(module.training_step(half, 0) for half in halves) / 2
    assert mean.item() == pytest.approx(module.loss(batch).item(), rel=1e-6)
    assert sum(module.loss(half) for half in halves).item() / 2 != pytest.approx(mean.item(), rel=1e-3)


def test_a_run_starts_at_the_loss_computed_by_hand(source):
    module = tiny.configured("llama", "fp", config=MODELS["llama"])
    datamodule, losses = data(source, batch_size=2), tiny.Losses()
    assert sum(len(rows.conversations) for rows in datamodule.splits.values()) == 1000
    first = next(iter(datamodule.train_dataloader()))
    found = [number for row in first["input_ids"] for number in numbers(row)]
    expected = torch.cat([by_hand(module.model, number) for number in found]).mean().item()
    tiny.trainer(max_steps=2, callbacks=[losses]).fit(module, datamodule=datamodule)
    assert losses.values[0] == pytest.approx(expected, abs=1e-5)
    assert len(losses.values) == 2

"""Evaluation in the midst of training leaves no trace in it."""

import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import tiny
from stableqat.callbacks import Evaluate
from stableqat.data import TextDataModule
from stableqat.errors import UserError
from stableqat.events import read_run

pytest.importorskip("lm_eval")

CONFIG = tiny.LLAMA | {"vocab_size": 300, "max_position_embeddings": 64, "attention_dropout": 0.2}


class Generators(L.Callback):
    """Draws from every generator where no one seeds it: after a validation."""

    def __init__(self):
        self.drawn = []

    def on_validation_end(self, trainer, pl_module):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))

    def on_train_batch_end(self, trainer, *_):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))


def train(place, folder, *callbacks, method="stableqat", **options):
    data = TextDataModule(
        str(place / "text.jsonl"), block_size=16, batch_size=4, vocab_size=300, cache_dir=str(place / "cache")
    )
    losses, generators = tiny.Losses(), Generators()
    module = tiny.module("llama", method, config=CONFIG)
    L.seed_everything(3, verbose=False)
    trainer = tiny.trainer(
        max_steps=6,
        limit_val_batches=1,
        val_check_interval=2 * options.get("accumulate_grad_batches", 1),
        callbacks=[*callbacks, losses, generators],
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", version="run", default_hp_metric=False),
        **options,
    )
    trainer.fit(module, data)
    modes = {name: part.training for name, part in module.named_modules()}
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return losses.values, generators.drawn, modes, weights, read_run(folder / "run", ("eval/",)).scalars


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (0, {}, [2, 4, 6]),
        (3, {"accumulate_grad_batches": 2}, [3, 6]),
        (4, {"precision": "bf16-mixed"}, [4]),
    ],
)
def test_a_training_cannot_tell(every, options, steps, place, tasks, tmp_path):
    evaluate = Evaluate(
        data=[str(place / "further.txt")],
        tasks="words",
        tasks_path=str(tasks),
        every_n_steps=every,
        stride=4,
        limit=5,
    )
    told = train(place, tmp_path / "with", evaluate, **options)
    plain = train(place, tmp_path / "without", **options)
    assert told[0] == plain[0]  # losses, bit for bit
    assert told[1] == plain[1]
    assert told[2] == plain[2]
    for name, weight in plain[3].items():
        assert torch.equal(told[3][name], weight), name
    assert plain[4] == {}
    scalars = told[4]
    assert set(scalars) >= {"eval/perplexity/further.txt", "eval/words/acc", "eval/words/acc_norm"}
    for series in scalars.values():
        assert list(series) == steps
    assert len(set(scalars["eval/loss/further.txt"].values())) == len(steps)


def test_texts_of_the_same_name(place, tmp_path):
    for folder, text in (("one", "grid scale " * 20), ("two", "step rate " * 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(text)
    texts = [str(tmp_path / folder / "text.txt") for folder in ("one", "two")]
    scalars = train(place, tmp_path, Evaluate(data=texts, every_n_steps=6))[4]
    assert scalars["eval/loss/one/text.txt"][6] != scalars["eval/loss/two/text.txt"][6]


def test_off_unless_asked(place, tmp_path):
    assert train(place, tmp_path, Evaluate())[4] == {}


def test_fewer_documents_than_processes(tasks, monkeypatch):
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    data = SimpleNamespace(tokenizer=object(), block_size=16)
    trainer = SimpleNamespace(datamodule=data, global_rank=0, world_size=5, global_step=0)
    module = SimpleNamespace(model=SimpleNamespace())
    evaluate = Evaluate(tasks="words", tasks_path=str(tasks), limit=4)
    with pytest.raises(UserError, match=r"words has 4 documents \(limit; it has 12\) for 5 processes"):
        evaluate.on_fit_start(trainer, module)
    # of a sharded model all processes evaluate the same
    monkeypatch.setattr("torch.distributed.fsdp.FSDPModule", SimpleNamespace)
    evaluate.on_fit_start(trainer, module)


def test_what_is_missing_ends_the_run_before_it_begins(place, tasks, tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        train(place, tmp_path, Evaluate(data=[str(tmp_path / "nothing.txt")]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "word.yaml").write_text("task: word\n")
    with pytest.raises(UserError, match="word cannot be loaded"):
        train(place, tmp_path, Evaluate(tasks="word", tasks_path=str(tmp_path / "tasks")))
    for wrong in ({"every_n_steps": -1}, {"limit": 0}):
        with pytest.raises(UserError, match=r"^evaluate\.\w+: must be at least"):
            Evaluate(**wrong)
    with pytest.raises(UserError, match="needs a language model"):
        tiny.trainer(callbacks=[Evaluate(data=["x"])], limit_val_batches=1).fit(
            tiny.module("vit"), tiny.loader("vit"), tiny.loader("vit")
        )

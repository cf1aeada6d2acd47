"""No step waits for the device, apart from those that are logged."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from stableqat import callbacks
from stableqat.cli.progress import TrainingProgress

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Reads(TorchDispatchMode):
    """Counts the values that the host reads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Steps(L.Callback):
    """Notes what is read before a step's backward ends, and from there to the next batch."""

    def __init__(self, reads):
        self.reads, self.counts, self.before = reads, [], 0

    def note(self):
        self.counts.append(self.reads.count - self.before)
        self.before = self.reads.count

    def on_train_batch_start(self, *_):
        self.note()

    def on_before_optimizer_step(self, *_):
        self.note()


@pytest.mark.parametrize(("family", "method"), [("llama", "fp"), ("llama", "stableqat"), ("vit", "dsq")])
def test_a_step_reads_the_loss_of_the_step_before_and_nothing_else(family, method, tmp_path):
    reads = Reads()
    steps = Steps(reads)
    module = tiny.module(family, method, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    made = tiny.trainer(
        max_steps=8,
        log_every_n_steps=4,
        logger=L.pytorch.loggers.TensorBoardLogger(tmp_path),
        gradient_clip_val=1.0,
        enable_checkpointing=True,
        enable_progress_bar=True,
        callbacks=[
            callbacks.DivergenceGuard(),
            callbacks.Interruption(),
            callbacks.QuantizerMonitor(),
            callbacks.Throughput(),
            callbacks.BestCheckpoint(),
            callbacks.LastCheckpoint(every_n_train_steps=100),
            TrainingProgress(),
            steps,
        ],
    )
    data = tiny.loader(family, count=32, batch_size=4)
    with reads:
        made.fit(module, data)
    fifth_to_seventh = steps.counts[1 + 2 * 4 : 1 + 2 * 7]  # the fourth and the eighth are logged
    assert fifth_to_seventh == [1, 0] * 3

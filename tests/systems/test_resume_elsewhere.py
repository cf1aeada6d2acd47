"""A run that is killed within its epoch goes on elsewhere: the same rows, none twice, none left out.

The data are a mixture, raw and tokenized, with a budget that ends the run. It moves from two processes to
one, which takes the rows of a step in one batch or accumulates over two; back; or to two sharded ones.
"""

import json
import random
from functools import cache
from itertools import chain
from pathlib import Path

import forked
import pytest
import torch

from stableqat.data.prepare.command import tokenize
from stableqat.data.tokenizer import train_bpe

BLOCK, ROWS, STEPS, SAVED = 32, 8, 9, 4
TOKENS = BLOCK * (ROWS * STEPS + 3)  # three rows fill no batch


def document(number: int) -> str:
    draw = random.Random(number)
    return " ".join(f"{draw.getrandbits(48):x}" for _ in range(20))


def write(path: Path, numbers: range) -> Path:
    path.write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in numbers))
    return path


#: How a step's rows are shared out: the processes, the rows of a batch, and further flags.
LAYOUTS = {
    "ddp": (2, ROWS // 2, ["--trainer.strategy", "ddp"]),
    "fsdp2": (2, ROWS // 2, ["--trainer.strategy", "fsdp2"]),
    "one": (1, ROWS, []),
    "accumulating": (1, ROWS // 2, ["--trainer.accumulate_grad_batches", "2"]),
}


class Runs:
    """Runs that several tests look at, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw, other = write(folder / "raw.jsonl", range(30)), write(folder / "other.jsonl", range(100, 140))
        tokenizer = folder / "tokenizer"
        train_bpe([document(n) for n in range(30)], 300).save_pretrained(tokenizer)
        done = tokenize(
            input=str(other),
            out=str(folder / "set"),
            tokenizer=str(tokenizer),
            block_size=BLOCK,
            num_proc=1,
            validation_fraction=0.1,
        )
        assert done == 0
        self.source = f"{{{raw}: 1, {folder / 'set'}: 2}}"
        self.whole = cache(self._whole)
        self.killed = cache(self._killed)

    def arguments(self, version: str, layout: str, *flags: str) -> list[str]:
        processes, batch_size, further = LAYOUTS[layout]
        configs = [f"configs/llama/{name}.yaml" for name in ("base", "debug", "stableqat")]
        return [
            "fit",
            *[part for config in configs for part in ("-c", config)],
            *["--data.source", self.source, "--data.tokens", str(TOKENS), "--data.block_size", str(BLOCK)],
            *f"--data.seed 3 --data.cache_dir {self.folder / 'cache'}".split(),
            *["--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"],
            *f"--trainer.limit_val_batches 0 --last.every_n_train_steps {SAVED}".split(),
            *f"--trainer.logger.save_dir {self.folder} --trainer.logger.name llama".split(),
            *["--trainer.logger.version", version],
            *["--trainer.callbacks+=seen.Seen", "--trainer.callbacks.path", str(self.folder / version)],
            *["--trainer.devices", str(processes), "--data.batch_size", str(batch_size), *further, *flags],
        ]

    def rows(self, version: str, processes: int) -> list[tuple[int, ...]]:
        """All rows in the global order, each after its step: sample p is of process p % processes."""
        files = [Path(f"{self.folder / version}.{rank}") for rank in range(processes)]
        ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        found = []
        for batches in zip(*ranks, strict=True):
            (step,) = {batch["step"] for batch in batches}
            of_processes = zip(*(batch["rows"] for batch in batches), strict=True)
            found += [(step, *row) for row in chain.from_iterable(of_processes)]
        return found

    def finish(self, version: str, layout: str, *flags: str) -> list[tuple[int, ...]]:
        processes = LAYOUTS[layout][0]
        forked.succeed(self.arguments(version, layout, *flags), self.folder / "log", processes)
        assert self._last(version)[1] == STEPS
        return self.rows(version, processes)

    def _whole(self) -> list[tuple[int, ...]]:
        return self.finish("whole", "ddp")

    def _killed(self, layout: str) -> Path:
        version, processes = f"{layout}-killed", LAYOUTS[layout][0]
        cut = ["--trainer.callbacks+=probes.Cut", "--trainer.callbacks.step", str(SAVED + 1)]
        run = self.arguments(version, layout, *cut)
        assert forked.command(run, self.folder / "log", processes) == [-9] * processes
        path, step = self._last(version)
        assert step == SAVED
        return path

    def _last(self, version: str) -> tuple[Path, int]:
        path = self.folder / "llama" / version / "checkpoints" / "last.ckpt"
        return path, torch.load(path, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("elsewhere"))


def test_the_budget_ends_the_run_and_no_row_comes_twice(runs):
    rows = runs.whole()
    assert [row[0] for row in rows] == [step for step in range(STEPS) for _ in range(ROWS)]
    assert len({row[1:] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("start", "then"),
    [
        ("ddp", "one"),
        ("ddp", "accumulating"),
        ("ddp", "fsdp2"),
        pytest.param("accumulating", "ddp", marks=pytest.mark.slow),
    ],
)
def test_the_rows_after_the_cut_are_those_of_the_undisturbed_run(start, then, runs):
    checkpoint = runs.killed(start)
    processes = LAYOUTS[start][0]
    assert runs.rows(f"{start}-killed", processes)[: SAVED * ROWS] == runs.whole()[: SAVED * ROWS]
    rows = runs.finish(f"{start}-{then}", then, "--ckpt_path", str(checkpoint))
    assert rows == runs.whole()[SAVED * ROWS :]


def test_another_mixture_does_not_resume(runs):
    flags = ["--data.source", runs.source.replace(": 2", ": 1"), "--ckpt_path", str(runs.killed("ddp"))]
    assert forked.command(runs.arguments("refused", "one", *flags), runs.folder / "log") == [2]
    said = (runs.folder / "log").read_text()
    assert "ratio of sources is 1:2, this run's is 1:1 (data settings differ); resume with" in said

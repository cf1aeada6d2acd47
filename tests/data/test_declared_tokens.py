"""The paper's recipe on a small corpus: what a run takes of it is declared, checked and logged."""

from pathlib import Path

import pytest

from stableqat.cli.main import main
from stableqat.events import read_run

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.config": "{model_type: llama, vocab_size: 300, hidden_size: 16, intermediate_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}",
    "data.tokens": "2K",
    "data.tokens_per_step": 280,
    "data.block_size": 40,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.accumulate_grad_batches": 7,
    "trainer.val_check_interval": 1000,
    "trainer.limit_val_batches": 2,
    "last.every_n_train_steps": 1000,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenized sources with one tokenizer, some thousands of tokens each."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("slimpajama", "fineweb-edu"):
        raw = folder / f"raw-{name}"
        raw.mkdir()
        text = "".join(f'{{"text": "{name} {i} says {i * i} and {i % 7} more words"}}\n' for i in range(500))
        (raw / "train.jsonl").write_text(text)
    first, second = folder / "slimpajama", folder / "fineweb-edu"
    common = ["--block_size", "40"]
    made = ["data", "tokenize", "--input", str(folder / "raw-slimpajama"), "--out", str(first)]
    assert main([*made, "--tokenizer", "train:300", *common]) == 0
    made = ["data", "tokenize", "--input", str(folder / "raw-fineweb-edu"), "--out", str(second)]
    assert main([*made, "--tokenizer", str(first / "tokenizer"), *common]) == 0
    return folder


def fit(corpora: Path, folder: Path, **changed: object) -> int:
    sources = f"{{{corpora}/slimpajama: 1, {corpora}/fineweb-edu: 1}}"
    settings = SMALL | {"data.source": sources, "trainer.logger.save_dir": folder}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    files = [ROOT / "configs" / "llama" / f"{name}.yaml" for name in ("base", "paper/train", "stableqat")]
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return main(["fit", *(part for file in files for part in ("-c", str(file))), *flags])


def test_a_recipe_ends_with_its_budget_and_says_what_it_took(corpora: Path, tmp_path: Path) -> None:
    assert fit(corpora, tmp_path, trainer__logger__version="v") == 0
    run = read_run(tmp_path / "paper" / "v")
    assert run.last("hp/steps") == 8  # 2,000 tokens are 50 rows of 40, 7 steps of 7 rows and one of 1
    assert (run.hparams["tokens_per_step"], run.hparams["training_tokens"]) == (280, 2000)
    assert (run.hparams["lr"], run.hparams["warmup_steps"], run.hparams["scale_lr_multiplier"]) == (
        1e-4,
        0,
        1,
    )


@pytest.mark.parametrize(
    ("changed", "steps", "tokens"),
    [
        ({"trainer__max_epochs": 3, "data__repeat": "true"}, 24, 3 * 2000),
        ({"trainer__max_epochs": -1, "trainer__max_steps": 12, "data__repeat": "true"}, 12, 2000 + 4 * 280),
        ({"trainer__max_epochs": 3, "trainer__limit_train_batches": 16}, 9, 3 * 16 * 40),
    ],
    ids=["epochs", "steps", "parts of an epoch"],
)
def test_several_epochs_are_counted_to_the_token(
    corpora: Path, tmp_path: Path, changed: dict[str, object], steps: int, tokens: int
) -> None:
    assert fit(corpora, tmp_path, trainer__logger__version="v", **changed) == 0
    run = read_run(tmp_path / "paper" / "v")
    assert (run.last("hp/steps"), run.hparams["training_tokens"]) == (steps, tokens)


def test_a_run_that_ends_with_its_time_declares_no_tokens_in_all(corpora: Path, tmp_path: Path) -> None:
    endless = {"trainer__max_epochs": -1, "trainer__max_time": "00:00:00:01", "data__repeat": "true"}
    assert fit(corpora, tmp_path, trainer__logger__version="v", model__lr_scheduler="null", **endless) == 0
    run = read_run(tmp_path / "paper" / "v")
    assert run.last("hp/steps") > 0
    assert run.hparams["tokens_per_step"] == 280
    assert "training_tokens" not in run.hparams


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"trainer__accumulate_grad_batches": 3},
            "tokens_per_step 280 is declared, but a step takes 120: batch_size 1 x block_size 40 x "
            "processes 1 x accumulate_grad_batches 3; change one of them",
        ),
        (
            {"trainer__max_steps": 8},
            "tokens 2000 is declared, but trainer.max_steps 8 takes 2240: lower max_steps (-1 with "
            "max_epochs 1 ends with the budget), or set repeat: true",
        ),
        (
            {"trainer__max_epochs": 3},
            "tokens 2000 is declared, but trainer.max_epochs 3 takes 6000: lower max_epochs (1 ends with "
            "the budget), or set repeat: true",
        ),
        (
            {"trainer__max_epochs": -1, "model__lr_scheduler": "null", "trainer__max_time": "00:00:00:01"},
            "tokens 2000 is declared, but trainer.max_epochs -1 takes more: lower max_epochs (1 ends with "
            "the budget), or set repeat: true",
        ),
        (
            {"data__tokens_per_step": "many"},
            "tokens_per_step: must be a number such as 300000, 20M or 1.5B, not many",
        ),
    ],
)
def test_what_is_declared_is_checked(
    corpora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, object],
    message: str,
) -> None:
    assert fit(corpora, tmp_path, **changed) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"stableqat: {message}"

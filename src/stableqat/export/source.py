"""What to export: the model of a run, a checkpoint or a model folder, with validation data and tokenizer.

A run stands for its best checkpoint. Data and tokenizer come from the run's `config.yaml`; without it, or if
that data is gone, file and model are compared on a fixed random batch, and the report says so. A folder that
a prepared or converted model was saved to brings its tokenizer, if one was saved with it.
"""

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stableqat.data.order import EvaluationOrder
from stableqat.data.tokenizer import check_tokenizer, check_vocabulary, load_tokenizer
from stableqat.errors import UserError
from stableqat.export.packed import DTYPES
from stableqat.kinds import kinds
from stableqat.model_folder import is_model_folder, quantize_again, read_grids, unreported
from stableqat.modules import LlamaModule, QATModule
from stableqat.runs import NoDataError, Run, open_run

ROWS = 16  # in the batch on which file and model are compared
LOGITS = 2**28  # at most, for that batch: a gigabyte, of which there are a few copies


@dataclass(frozen=True)
class Source:
    """A trained model, with what belongs to it.

    Attributes:
        module: The model, in evaluation mode, on the CPU.
        checkpoint: File or folder that it comes from.
        settings: How it was trained, for the model card.
        quantizers: The kinds of its quantizers, see `stableqat.kinds`.
        step: Optimizer steps that it was trained for; None if unknown.
        batch: Rows of its validation data, or random ones.
        batch_of: Where the batch comes from, in words.
        tokenizer: A language model's tokenizer; None if it is not found.
        val_loss: The run's last validation loss; None if it has none.
        images: How the run resizes and normalises images, as timm's `pretrained_cfg`; None if unknown.
        classes: Names of the classes of images, by label; None if unknown.
    """

    module: QATModule
    checkpoint: Path
    settings: dict[str, Any]
    quantizers: list[dict[str, Any]]
    step: int | None
    batch: dict[str, Tensor]
    batch_of: str
    tokenizer: Any
    val_loss: float | None
    images: dict[str, Any] | None = None
    classes: list[str] | None = None

    @property
    def dtype(self) -> str | None:
        """Type of the weights that it started from; None if unknown."""
        of_start = getattr(getattr(self.module, "config", None), "dtype", None)
        return next((name for name, each in DTYPES.items() if each is of_start), None)


def load_source(source: str, tokenizer: str | None) -> Source:
    """Load what to export.

    Args:
        source: Run folder, checkpoint, or folder of a prepared or converted model.
        tokenizer: Tokenizer to put beside it; None takes the run's or the folder's.

    Raises:
        UserError: If there is no such run, or its checkpoint is damaged or holds something else.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if is_model_folder(source):
        return _of_folder(source, tokenizer)
    run = open_run(source)
    module = run.load()
    batch, batch_of, classes = _rows(run, module)
    found: Any = None
    if module.family == "images" and tokenizer is not None:
        raise UserError("tokenizer: only language models have one; leave it out")
    if module.family == "text":
        with suppress(UserError) if tokenizer is None else nullcontext():
            found = run.load_tokenizer(module, tokenizer)
    return Source(
        module,
        run.checkpoint,
        module.describe(),
        _kinds(module, "method"),
        run.step,
        batch,
        batch_of,
        found,
        run.val_loss,
        run.preprocessing,
        classes,
    )


def _rows(run: Run, module: QATModule) -> tuple[dict[str, Tensor], str, list[str] | None]:
    """Return rows on which to compare file and model, where they come from in words, and names of classes."""
    try:
        datamodule = run.data()
    except NoDataError as error:
        return _random_rows(module), f"random rows: {error}", None
    classes = None
    try:
        batch, validated = _validation_rows(datamodule, run.validated_rows)
        classes = getattr(datamodule, "class_names", None)
        if _suits(batch, module):
            return (batch := _bounded(batch, module)), _part(batch, validated), classes
        reason = "the run's data does not fit its model"
    except (UserError, OSError) as error:
        reason = f"the run's data cannot be read ({error})"
    return _random_rows(module), f"random rows: {reason}", classes


def _of_folder(source: str, tokenizer: str | None) -> Source:
    folder = Path(source).expanduser()
    record = read_grids(folder)
    module = LlamaModule(config=str(folder), init_from=str(folder))
    with unreported():
        module.configure_model()
    model: Any = module.model
    prepared = quantize_again(model, folder, record)
    module.adapt(model)
    module.eval()
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = str(folder)
    found: Any = None
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
        check_vocabulary(found, module.config.vocab_size, tokenizer)
    batch = _random_rows(module)
    told = "random rows: a model folder names no data"
    # a converted folder holds values, which any method could have trained
    more = ["method"] if prepared else []
    settings = {key: module.describe()[key] for key in more}
    return Source(module, folder, settings, _kinds(module, *more), None, batch, told, found, None, None)


def _kinds(module: QATModule, *more: str) -> list[dict[str, Any]]:
    assert module.model is not None
    keys = ("pattern", "layers", *more, "bits", "grid", "granularity", "input_quantizer", "input_bits")
    return [{k: kind[k] for k in keys if k in kind} for kind in kinds(module.model, module.surgery)]


def _bounded(batch: dict[str, Tensor], module: QATModule) -> dict[str, Tensor]:
    """Keep as many rows as have no more logits than `LOGITS`; of a single row with more, its first tokens."""
    if "input_ids" not in batch:
        return batch
    model: Any = module.model
    tokens = min(batch["input_ids"].shape[1], LOGITS // model.config.vocab_size)
    rows = max(1, LOGITS // (tokens * model.config.vocab_size))
    return {key: value[:rows, :tokens] for key, value in batch.items()}


def _validation_rows(datamodule: Any, validated: int | None) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Return the first rows that the run validated on, and the shape of all of them."""
    datamodule.prepare_data()
    datamodule.setup("validate")
    rows = datamodule.splits["validation"]
    there = min(validated or len(rows), len(rows))
    (keys,) = EvaluationOrder(min(ROWS, there), ROWS)
    taken = rows[keys]
    return taken, (there, *taken["labels"].shape[1:])


def _part(batch: dict[str, Tensor], validated: tuple[int, ...]) -> str:
    shape = tuple(batch["labels"].shape)
    if shape == validated:
        return "validation data of the run"
    tokens = "" if shape[1:] == validated[1:] else f" ({shape[1]} of {validated[1]} tokens)"
    return f"the first {shape[0]} of {validated[0]} rows{tokens} of the run's validation data"


def _suits(batch: dict[str, Tensor], module: QATModule) -> bool:
    """Whether a batch fits a model: of its kind, with tokens of its vocabulary."""
    if module.input_key not in batch or module.family == "images":
        return module.input_key in batch
    model: Any = module.model
    return int(batch["input_ids"].max()) < model.config.vocab_size


def _random_rows(module: QATModule) -> dict[str, Tensor]:
    return _bounded(module.example_batch(4), module)

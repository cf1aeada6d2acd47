"""Evaluates during training as `stableqat evaluate` does afterwards, without any effect on the training.

It measures perplexity on further texts and tasks of lm-evaluation-harness, after each validation or every n
steps. Modes and random generators are restored, so losses equal, bit for bit, those of the run without
evaluations. Evaluations take time; `limit` keeps tasks short.
"""

from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from stableqat.callbacks.throughput import untimed
from stableqat.errors import UserError, check_range

if TYPE_CHECKING:
    from stableqat.evaluate.perplexity import Windows
    from stableqat.evaluate.processes import Share


class Evaluate(L.Callback):
    """Log `eval/*` of a language model while it trains; off unless `data` or `tasks` is set.

    Args:
        data: Texts: files, folders, tokenized sets or Hub names. Uses the test split, else validation, else
            everything.
        tasks: Tasks of lm-evaluation-harness, such as piqa,boolq; default stands for the usual eight.
        tasks_path: Folder with your own task files (YAML). They can run Python, so only the command line may
            set it.
        every_n_steps: Optimizer steps between evaluations; 0 evaluates after each validation.
        stride: See `stableqat evaluate`; null takes blocks that do not overlap.
        limit: Number of documents per task, the first ones; null takes all.
        batch_size: Blocks or requests per forward pass and process.
    """

    def __init__(
        self,
        data: list[str] | None = None,
        tasks: str | None = None,
        tasks_path: str | None = None,
        every_n_steps: int = 0,
        stride: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        check_range("evaluate.every_n_steps", every_n_steps, 0)
        check_range("evaluate.stride", stride, 1, null=True)
        check_range("evaluate.limit", limit, 1, null=True)
        check_range("evaluate.batch_size", batch_size, 1)
        self.data = data or []
        self.tasks = tasks
        self.tasks_path = tasks_path
        self.every_n_steps = every_n_steps
        self.stride = stride
        self.limit = limit
        self.batch_size = batch_size
        self._tokenizer: Any = None
        self._texts: dict[str, Windows] = {}
        self._tasks: dict[str, Any] = {}
        self._seen_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read texts and tasks, so that missing ones are refused before training.

        Raises:
            UserError: If data or tasks are not found, a task has fewer documents than there are processes, or
                the model is not a language model.
        """
        if not self.data and self.tasks is None:
            return
        from stableqat.evaluate.model import labels
        from stableqat.evaluate.perplexity import blocks, strided
        from stableqat.evaluate.processes import Share
        from stableqat.evaluate.tasks import check_documents, load_tasks, task_names
        from stableqat.evaluate.text import read_text

        datamodule = getattr(trainer, "datamodule", None)
        self._tokenizer = getattr(datamodule, "tokenizer", None)
        if self._tokenizer is None:
            raise UserError("evaluate: needs a language model with a text data module; remove data and tasks")
        size = datamodule.block_size  # type: ignore[union-attr]
        with Share(trainer.global_rank, trainer.world_size).first_alone():
            for source, name in labels(self.data).items():
                rows, stride = read_text(source, self._tokenizer, block_size=size).rows, self.stride
                self._texts[name] = blocks(rows, size) if stride is None else strided(rows, size, stride)
            if self.tasks is not None:
                self._tasks = load_tasks(task_names(self.tasks), self.tasks_path)
        if self._tasks:
            check_documents(self._tasks, self.limit, _share(trainer, pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from here, as earlier steps of a resumed run are evaluated already."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Evaluate after every n-th optimizer step."""
        step, self._seen_step = self._seen_step, trainer.global_step
        stepped = step != trainer.global_step
        if self.every_n_steps and stepped and not trainer.global_step % self.every_n_steps:
            self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate after each validation."""
        if not self.every_n_steps and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._texts and not self._tasks:
            return
        from stableqat.evaluate.isolation import isolated
        from stableqat.evaluate.perplexity import perplexity
        from stableqat.evaluate.report import figures
        from stableqat.evaluate.tasks import run_tasks, scores

        model: Any = pl_module.model
        options: dict[str, Any] = {"batch_size": self.batch_size, "share": _share(trainer, pl_module)}
        record: dict[str, Any] = {}
        context = trainer.precision_plugin.forward_context()
        with untimed(trainer), context, isolated(model), torch.no_grad():
            record["perplexity"] = {
                name: perplexity(model, windows, device=pl_module.device, **options)
                for name, windows in self._texts.items()
            }
            if self._tasks:
                results = run_tasks(model, self._tokenizer, self._tasks, limit=self.limit, **options)
                record["tasks"] = {} if results is None else scores(results)
        values = {f"eval/{name}": value for name, value, _ in figures(record)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def _share(trainer: L.Trainer, pl_module: L.LightningModule) -> "Share":
    from torch.distributed.fsdp import FSDPModule

    from stableqat.evaluate.processes import Share

    # all processes compute a sharded model together
    sharded = isinstance(pl_module.model, FSDPModule)
    return Share() if sharded else Share(trainer.global_rank, trainer.world_size)

"""A run on disk: one `Run` answers everything that evaluation, export and the next training ask of it.

A run folder stands for its best checkpoint. What a checkpoint does not hold, its data and what it started
from, comes from the `config.yaml` of its folder. `write_run` makes such a folder from any model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from stableqat import data
from stableqat.checkpoints.names import BEST, CHECKPOINTS, CONFIG, LAST, TOKENIZER, find_checkpoint
from stableqat.checkpoints.read import check_sums, read_checkpoint
from stableqat.checkpoints.write import StreamedCheckpointIO
from stableqat.construct import arguments
from stableqat.data.tokenizer import check_vocabulary, clash, keep_tokenizer, load_tokenizer
from stableqat.errors import UserError, one_line
from stableqat.files import check_source
from stableqat.modules import QATModule
from stableqat.modules.hyperparameters import FULL_ACTIVATIONS, ONLY_FOR_TRAINING, rebuild
from stableqat.modules.start import state_dict_follows
from stableqat.trust import read_settings


class NoDataError(UserError):
    """The data of a run is unknown or gone; the message is only the reason."""


def open_run(source: str) -> "Run":
    """Find a run's best checkpoint, or the checkpoint that a path names, without reading it.

    Args:
        source: Run folder or checkpoint.

    Raises:
        UserError: If there is no checkpoint, or it is sharded.
    """
    check_source(source, local=True)
    path = Path(source).expanduser()
    best = path / CHECKPOINTS / BEST
    found = best if best.exists() else find_checkpoint(str(path))
    if found is None:
        raise UserError(f"{source}: neither a run folder nor a checkpoint (.ckpt) of this suite; name one")
    if found.is_dir():
        raise UserError(f"{found} is sharded; make one file of it first: stableqat consolidate {found}")
    return Run(found)


class Run:
    """A checkpoint and its run; each part is read when it is first asked for.

    Args:
        checkpoint: The checkpoint; a sharded one has settings and a tokenizer, but cannot be loaded.

    Attributes:
        checkpoint: The checkpoint.
        folder: The run's folder; None for a checkpoint outside of any run.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        folder = checkpoint.absolute().parent.parent
        self.folder = folder if (folder / CONFIG).is_file() else None

    # -- what the checkpoint holds --------------------------------------------------------------

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of the checkpoint, with its tensors mapped from the disk.

        Raises:
            UserError: If the file is damaged, or holds something else.
        """
        return read_checkpoint(self.checkpoint)

    @property
    def step(self) -> int:
        """Number of optimizer steps that the checkpoint was trained for."""
        return int(self.content["global_step"])

    @property
    def validated_rows(self) -> int | None:
        """How many rows, from the start of the validation split, the last loss covers; None if unknown."""
        rows = self._record.get("validation_rows")
        return rows if isinstance(rows, int) and rows > 0 else None

    @property
    def val_loss(self) -> float | None:
        """The last validation loss; None if there was none."""
        loss = self._record.get("hp/val_loss")
        return loss if loss is not None and isfinite(loss) else None

    @property
    def _record(self) -> dict[str, Any]:
        record = self.content["callbacks"].get("RunRecord")
        return record if isinstance(record, dict) else {}

    # -- its model ------------------------------------------------------------------------------

    @cached_property
    def described(self) -> QATModule:
        """The training system on the meta device: the architecture with its quantizers, without weights.

        Raises:
            UserError: If the checkpoint is damaged, or of something else.
        """
        with self._consistent(), torch.device("meta"), state_dict_follows():
            return self._build()

    def load(self) -> QATModule:
        """The trained model, verified, in evaluation mode, on the CPU; each call loads it anew.

        Raises:
            UserError: If the checkpoint is damaged, or of something else.
        """
        check_sums(self.checkpoint)
        state = self.content["state_dict"]
        with self._consistent():
            with state_dict_follows():
                module = self._build()
            for key, tensor in module.state_dict().items():  # torch would cast silently
                if (
                    key in state
                    and tensor.is_floating_point() != (held := state[key].dtype).is_floating_point
                ):
                    raise UserError(
                        f"{self.checkpoint}: {key} holds {held}, not {tensor.dtype}; take another"
                    )
            module.load_state_dict(state)
        return module

    def load_start(self, *, quantized: bool) -> QATModule:
        """The model that the run started from: in full precision, or with weights rounded to nearest.

        Activations stay in full precision: their scales come from training data.

        Args:
            quantized: Whether to initialize the run's quantizers on the weights of the start.

        Raises:
            UserError: If the start is not found.
        """
        full = FULL_ACTIVATIONS if quantized else {**FULL_ACTIVATIONS, "quantizer": None}
        return self._build(init_from=self.start, **full)

    def _build(self, **changes: Any) -> QATModule:
        module = rebuild(QATModule, self.checkpoint, self.content, **(ONLY_FOR_TRAINING | changes))
        with torch.device("meta"):
            described = sum(parameter.numel() for parameter in module.build_model().parameters())
        held = sum(tensor.numel() for tensor in self.content["state_dict"].values())
        if described > 2 * held:  # before memory is allocated for it
            numbers = f"its settings describe {described:,} parameters, and it holds {held:,}"
            raise UserError(f"{self.checkpoint}: {numbers}; take another one")
        module.configure_model()
        return module.eval()

    @contextmanager
    def _consistent(self) -> Iterator[None]:
        """Report in one line that the checkpoint does not match its settings or this version."""
        try:
            yield
        except UserError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"damaged, or written by another version: {one_line(error)}"
            raise UserError(f"{self.checkpoint}: {reason}") from error

    # -- what its folder holds ------------------------------------------------------------------

    @cached_property
    def _config(self) -> dict[str, Any]:
        return {} if self.folder is None else read_settings(self.folder / CONFIG)

    def settings(self, part: str) -> dict[str, Any]:
        """A part of the run's settings: plain values, including `init_args`; empty if unknown.

        Args:
            part: model, data or trainer.

        Raises:
            UserError: If the settings are not those of a run.
        """
        found = self._config.get(part) or {}
        if not (isinstance(found, dict) and isinstance(found.get("init_args") or {}, dict)):
            raise UserError(f"{self.folder}/{CONFIG}: {part}: must be a mapping; take another run")
        return found and {**found, "init_args": found.get("init_args") or {}}

    @property
    def start(self) -> str | None:
        """The `init_from` that the run was trained with."""
        found = self.settings("model").get("init_args", {}).get("init_from")
        return None if found is None else str(found)

    def data(self, **changes: Any) -> Any:
        """The data module that the run's settings name.

        Args:
            changes: Arguments of the data module that replace the run's.

        Raises:
            NoDataError: If the data is unknown or gone.
        """
        if self.folder is None:
            raise NoDataError("the checkpoint is in no run folder")
        settings = self.settings("data")
        home, _, name = str(settings.get("class_path")).rpartition(".")
        if not (home.split(".")[0] == "stableqat" and name in data.__all__):
            raise NoDataError("the run's data is not of this suite")
        cls = getattr(data, name)
        kept = arguments(cls, settings["init_args"], f"{self.folder}/{CONFIG}: data")
        try:
            if cls is data.TextDataModule:
                changes = {"tokenizer": self.tokenizer, **changes}
            return cls(**{**kept, "num_workers": 0, **changes})
        except UserError as error:
            raise NoDataError(f"the run's data cannot be read ({error})") from error

    @property
    def tokenizer(self) -> str | None:
        """Folder, file or Hub name of the tokenizer, in the run or named by its settings; None if unknown.

        Raises:
            UserError: If the run has none, because it was imported from files without one.
        """
        if self.folder is None:
            return None
        if (self.folder / TOKENIZER).is_dir():
            return str(self.folder / TOKENIZER)
        settings = self.settings("data")
        if not settings:
            raise UserError(f"{self.folder} has no tokenizer")
        named = settings["init_args"].get("tokenizer")
        if not isinstance(named, str | None):
            raise UserError(f"{self.folder}/{CONFIG}: data.tokenizer: must be text or null; take another run")
        return named

    def load_tokenizer(self, module: QATModule, given: str | None) -> Any:
        """The tokenizer to use with the run's language model.

        Args:
            module: The run's module, on any device.
            given: The tokenizer that the user asks for; None takes the run's.

        Raises:
            UserError: If there is none, or it does not fit the model.
        """
        try:
            own = self._own_tokenizer()
        except UserError:
            if given is None:
                raise
            own = None
        found = own if given is None else load_tokenizer(given)
        model: Any = module.model
        check_vocabulary(found, model.config.vocab_size, given or str(self.checkpoint))
        if own is not None and (reason := clash(found, own)):
            raise UserError(f"tokenizer: {given} cannot be that of {self.checkpoint}: {reason}; leave it out")
        return found

    def _own_tokenizer(self) -> Any:
        if (named := self.tokenizer) is not None:
            return load_tokenizer(named)
        try:
            datamodule = self.data()
            if not isinstance(datamodule, data.TextDataModule):
                raise NoDataError("its data is not text")
        except NoDataError as error:
            reason = f"has no tokenizer ({error})"
            raise UserError(f"{self.checkpoint}: {reason}; name one with --tokenizer") from error
        return datamodule.tokenizer

    @property
    def image_arguments(self) -> dict[str, Any] | None:
        """The arguments of the run's image data module; None if its data is not images."""
        settings = self.settings("data")
        if not str(settings.get("class_path")).endswith("ImageDataModule"):
            return None
        return arguments(data.ImageDataModule, settings["init_args"], f"{self.folder}/{CONFIG}: data")

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How the run resizes and normalises images; None if its data is not images."""
        kept = self.image_arguments
        return None if kept is None else data.ImageDataModule.evaluation_settings(kept)

    @property
    def image_size(self) -> int | None:
        """The size of the run's images, if its settings name it."""
        return self.settings("data").get("init_args", {}).get("image_size")


def write_run(
    folder: Path,
    module: QATModule,
    *,
    place: Path,
    tokenizer: Any = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Make a run from a model, as if before its first step: verbs and `init_from` take it like any other.

    If it is resumed, it begins without optimizer states.

    Args:
        folder: An empty folder to write to.
        module: The configured training system.
        place: The final path of the folder, which its settings name.
        tokenizer: The tokenizer of a language model, to keep in the run.
        data: Settings of the data module, as `class_path` and `init_args`. By default, a `TextDataModule` if
            there is a tokenizer.

    Raises:
        OSError: If the folder cannot be written.
    """
    values = {**module.hparams, **module.resolved(), "init_from": None}
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        module.CHECKPOINT_HYPER_PARAMS_KEY: values,
    }
    StreamedCheckpointIO().save_checkpoint(checkpoint, folder / CHECKPOINTS / LAST)
    if tokenizer is not None:
        keep_tokenizer(tokenizer, folder / TOKENIZER)
        data = data or {"class_path": "stableqat.data.TextDataModule", "init_args": {}}
    named = {key: value for key, value in values.items() if not key.startswith("_") and value is not None}
    logger = {"save_dir": str(place.parent), "name": "", "version": place.name, "default_hp_metric": False}
    settings = {
        "model": {"class_path": values["_class_path"], "init_args": named},
        **({} if data is None else {"data": data}),
        "trainer": {
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
        },
    }
    (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))

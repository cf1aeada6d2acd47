"""What is evaluated: the model of a run or checkpoint, of an exported folder, or of the hub.

All become what they are to transformers or timm, computing in float32 as they were trained or written; of a
run the quantized weights, not the latent ones.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stableqat.data.tokenizer import load_tokenizer
from stableqat.errors import UserError
from stableqat.evaluate.quiet import quiet
from stableqat.modules import QATModule
from stableqat.modules.architecture import first_line, pretrained_config
from stableqat.modules.start import find_checkpoint
from stableqat.trained import data_of, load_untrained, open_trained, run_of, start_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to evaluate and what belongs to it.

    Attributes:
        source: As the user named it.
        model: Causal language model of transformers or vision transformer of timm, in evaluation mode.
        checkpoint: File that it came from; None for a folder.
        step: Optimizer steps that it was trained for.
        run: Folder of the run that it belongs to; None for a start or a folder.
        about: What it is.
    """

    source: str
    model: nn.Module
    checkpoint: Path | None = None
    step: int | None = None
    run: Path | None = None
    about: str = ""

    @property
    def is_language_model(self) -> bool:
        """Whether it predicts tokens."""
        return hasattr(self.model, "get_output_embeddings")

    def tokenizer(self, given: str | None) -> Any:
        """The one that is given, the run's, or the folder's.

        Raises:
            UserError: If there is none.
        """
        if given is not None:
            return load_tokenizer(given)
        if self.checkpoint is None:
            return load_tokenizer(self.source)
        datamodule, why_not = data_of(self.checkpoint)
        if datamodule is None:
            raise UserError(f"{self.source}: has no tokenizer ({why_not}); name one with --tokenizer")
        return datamodule.tokenizer


def is_run(source: str) -> bool:
    """Whether a source is a run or checkpoint of this suite."""
    return find_checkpoint(str(Path(source).expanduser())) is not None


def label(source: str) -> str:
    """A source in a table, a picture or a tag."""
    return Path(source).name or source


def subjects(source: str, baselines: bool) -> Iterator[Subject]:
    """The model of a source, then what it started from, one at a time.

    Args:
        source: Run folder, checkpoint, exported folder, or hub name.
        baselines: Also the full-precision start of a quantized run, as it is and rounded to nearest.

    Raises:
        UserError: If it cannot be loaded.
    """
    if not is_run(source):
        yield _folder(source)
        return
    path, read, module = open_trained(source)
    step = int(read.get("global_step", 0))
    yield Subject(source, _inner(module), path, step, run_of(path), _about(module))
    start = start_of(path)
    if baselines and module.quantizer is not None and start is None:
        logger.warning("%s: started from random weights, so there is no baseline", source)
    elif baselines and module.quantizer is not None:
        for quantized in (False, True):
            module = load_untrained(path, read, str(start), quantized=quantized)
            told = f"rounded to nearest, {_about(module)}" if quantized else "full precision"
            yield Subject(source, _inner(module), path, 0, about=f"its start, {told}")


def _inner(module: QATModule) -> nn.Module:
    assert module.model is not None
    return module.model.eval()


def _about(module: QATModule) -> str:
    told = module.describe()
    if "bits" not in told:
        return "full precision"
    return f"{told['method']}, {told['bits']} bits, {told['grid']}"


def _folder(source: str) -> Subject:
    config = Path(source).expanduser() / "config.json"
    try:
        keys = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config} is no JSON ({error}); copy it again") from error
    if "architecture" in keys:  # timm's
        import timm

        try:
            model = timm.create_model(f"local-dir:{config.parent}", pretrained=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{source}: timm cannot load it: {first_line(error)}") from error
        return Subject(source, model.eval(), about="timm folder")
    if Path(source).expanduser().exists() and not keys:
        raise UserError(
            f"{source}: neither a run, a checkpoint nor a folder with config.json; GGUF and ONNX files run "
            "elsewhere: evaluate the run, whose weights they equal"
        )
    return Subject(source, _pretrained(source).eval(), about="folder" if keys else "hub")


def _pretrained(source: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        pretrained_config("source", source)
    except UserError as error:
        raise UserError(str(error).removeprefix("source: ")) from error
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"{source}: transformers cannot load it: {first_line(error)}") from error
    model, info = loaded
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(f"{source}: {missing[0]} is not in its files; they are of another architecture")
    return model

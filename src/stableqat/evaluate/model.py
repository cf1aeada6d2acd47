"""What is evaluated: the model of a run or checkpoint, of an exported folder, or of the hub.

All become what they are to transformers or timm, computing in float32 as they were trained or written; of a
run the quantized weights, not the latent ones.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stableqat.checkpoints.names import find_checkpoint
from stableqat.data.image import PREPROCESSING
from stableqat.data.tokenizer import check_vocabulary, load_tokenizer
from stableqat.errors import UserError, first_line
from stableqat.evaluate.quiet import quiet
from stableqat.modules import QATModule
from stableqat.modules.config import pretrained_config
from stableqat.modules.start import check_start
from stableqat.modules.vit import image_size
from stableqat.runs import Run, open_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to evaluate and what belongs to it.

    Attributes:
        source: As the user named it.
        model: Causal language model of transformers or vision transformer of timm, in evaluation mode.
        tokenizer: Of a language model; None for a vision transformer.
        checkpoint: File that it came from; None for a folder.
        step: Optimizer steps that it was trained for.
        run: Folder of the run that it belongs to; None for a start or a folder.
        about: What it is.
        images: How a vision transformer wants images resized and normalised, as `ImageDataModule` takes it;
            empty where nobody says.
    """

    source: str
    model: nn.Module
    tokenizer: Any = None
    checkpoint: Path | None = None
    step: int | None = None
    run: Path | None = None
    about: str = ""
    images: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A source that is there, before its weights are read.

    Attributes:
        source: As the user named it.
        tokenizer: Of a language model; None for a vision transformer.
        loaders: Each loads a model when it is called: the source's, then its baselines.
    """

    source: str
    tokenizer: Any
    loaders: list[Callable[[], Subject]]


def is_run(source: str) -> bool:
    """Whether a source is, by its looks, a run or checkpoint of this suite; `open_run` looks inside."""
    try:
        return find_checkpoint(str(Path(source).expanduser())) is not None
    except UserError:  # no last.ckpt in a run, which may have its best one, or no such .ckpt
        return True


def labels(sources: Iterable[str], of_run: str | None = None) -> dict[str, str]:
    """Sources in a table, a picture or a tag, each as short as it is still told from the others.

    Args:
        sources: Paths and hub names.
        of_run: What of a run is meant, where not the run itself: its validation data, for example.

    Returns:
        By source: its name, its parent and name, or all of it.
    """
    ladders = {}
    for source in sources:
        parts = Path(source).parts or (source,)
        if of_run is not None and is_run(source):
            parts = (*parts, of_run)
        ladders[source] = (parts[-1], str(Path(*parts[-2:])), source)
    taken = Counter(label for ladder in ladders.values() for label in set(ladder))
    return {
        source: next((label for label in ladder if taken[label] == 1), source)
        for source, ladder in ladders.items()
    }


def find(source: str, *, tokenizer: str | None = None, baselines: bool = False) -> Found:
    """Find a source and what belongs to it, so that a mistake shows before anything is measured.

    Args:
        source: Run folder, checkpoint, exported folder, or hub name.
        tokenizer: The one to take instead of the run's or the folder's.
        baselines: Also the full-precision start of a quantized run, as it is and rounded to nearest.

    Raises:
        UserError: If it is nothing to evaluate, or its tokenizer or its start is not to be had.
    """
    return _find_run(source, tokenizer, baselines) if is_run(source) else _find_folder(source, tokenizer)


def _find_run(source: str, tokenizer: str | None, baselines: bool) -> Found:
    run = open_run(source)
    own = None
    if run.described.family == "text":
        with quiet():
            own = run.load_tokenizer(run.described, tokenizer)
    loaders: list[Callable[[], Subject]] = [partial(_trained, source, run, own)]
    module, start = run.described, run.start
    if baselines and module.quantizer is not None and start is None:
        logger.warning("%s: started from random weights, so there is no baseline", source)
    elif baselines and module.quantizer is not None:
        try:
            check_start(module, str(start))
        except UserError as error:
            raise UserError(
                f"baselines: what {source} started from is not to be had "
                f"({str(error).removeprefix('init_from: ')}); put it back, or leave baselines out"
            ) from error
        loaders += [partial(_untrained, source, run, own, quantized) for quantized in (False, True)]
    return Found(source, own, loaders)


def _trained(source: str, run: Run, tokenizer: Any) -> Subject:
    module = run.load()
    model, images = _inner(module), _images(run, module)
    return Subject(source, model, tokenizer, run.checkpoint, run.step, run.folder, _about(module), images)


def _untrained(source: str, run: Run, tokenizer: Any, quantized: bool) -> Subject:
    module = run.load_start(quantized=quantized)
    told = f"rounded to nearest, {_about(module)}" if quantized else "full precision"
    images = _images(run, module)
    return Subject(
        source, _inner(module), tokenizer, run.checkpoint, 0, about=f"its start, {told}", images=images
    )


def _inner(module: QATModule) -> nn.Module:
    assert module.model is not None
    return module.model.eval()


def _images(run: Run, module: QATModule) -> dict[str, Any]:
    return {**(run.preprocessing or {}), "image_size": image_size(module.model) or run.image_size}


def _about(module: QATModule) -> str:
    told = module.describe()
    if "bits" not in told:
        return "full precision"
    return f"{told['method']}, {told['bits']} bits, {told['grid']}"


def _find_folder(source: str, tokenizer: str | None) -> Found:
    config = Path(source).expanduser() / "config.json"
    try:
        keys = json.loads(config.read_text()) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config} is no JSON ({error}); copy it again") from error
    if not isinstance(keys, dict) or not isinstance(keys.get("architecture", ""), str):
        raise UserError(f"{config} describes no model; copy it again")
    if "architecture" in keys:
        return Found(source, None, [partial(_timm, source, config.parent)])
    if Path(source).expanduser().exists() and not keys:
        raise UserError(
            f"{source}: neither a run, a checkpoint nor a folder with config.json; GGUF and ONNX files run "
            "elsewhere: evaluate the run, whose weights they equal"
        )
    try:
        config = pretrained_config("source", source)
    except UserError as error:
        raise UserError(str(error).removeprefix("source: ")) from error
    own = load_tokenizer(tokenizer or source)
    check_vocabulary(own, config.vocab_size, tokenizer or source)
    return Found(source, own, [partial(_pretrained, source, own, "folder" if keys else "hub")])


def _timm(source: str, folder: Path) -> Subject:
    import timm

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{source}: timm cannot load it: {first_line(error)}") from error
    own = timm.data.resolve_data_config(model=model)
    images = {key: own[key] for key in PREPROCESSING} | {"image_size": own["input_size"][-1]}
    return Subject(source, model.eval(), about="timm folder", images=images)


def _pretrained(source: str, tokenizer: Any, about: str) -> Subject:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # the folder's own may name a kernel of the hub
            )
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise UserError(f"{source}: transformers cannot load it: {first_line(error)}") from error
    model, info = loaded
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(f"{source}: {missing[0]} is not in its files; they are of another architecture")
    return Subject(source, model.eval(), tokenizer, about=about)

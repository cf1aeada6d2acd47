"""The models to evaluate: of a run or checkpoint, of an exported folder, or of the Hub.

Each becomes a plain transformers or timm model that computes in float32, as it was trained or written; a
run's model computes with its quantized weights, not the latent ones.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from stableqat.checkpoints.names import find_checkpoint
from stableqat.data.image import PREPROCESSING
from stableqat.data.tokenizer import check_vocabulary, load_tokenizer
from stableqat.errors import UserError, first_line
from stableqat.evaluate.isolation import quiet
from stableqat.kinds import describe
from stableqat.model_folder import is_prepared, quantize_again, read_grids, unreported
from stableqat.modules.config import pretrained_config
from stableqat.modules.start import Start, check_start
from stableqat.modules.vit import image_size
from stableqat.runs import Run, open_run

logger = logging.getLogger(__name__)

# what timm and transformers raise over files that they cannot load
UNLOADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    SafetensorError,
)


@dataclass(frozen=True)
class Model:
    """A model to evaluate, with what belongs to it.

    Attributes:
        source: The source, as the user names it.
        network: Causal language model of transformers or vision transformer of timm, in evaluation mode.
        about: What it is, in words.
        tokenizer: Tokenizer of a language model; None for a vision transformer.
        run: The run that it belongs to; None for a folder or a model of the Hub.
        trained: Whether it is the run's trained model, not what the run started from.
        images: How to resize and normalise a vision transformer's images, as arguments of `ImageDataModule`;
            empty if unknown.
    """

    source: str
    network: nn.Module
    about: str
    tokenizer: Any = None
    run: Run | None = None
    trained: bool = False
    images: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Literal["text", "images"]:
        """What the model reads."""
        return "images" if self.tokenizer is None else "text"


@dataclass(frozen=True)
class Source:
    """Models that are found but not yet loaded.

    Attributes:
        name: The source, as the user names it.
        family: What its models read.
        loaders: Functions that load one model each: the source's own, then its baselines.
    """

    name: str
    family: Literal["text", "images"]
    loaders: list[Callable[[], Model]]


def is_run(source: str) -> bool:
    """Whether a source looks like a run or checkpoint of this suite, which `open_run` reads."""
    try:
        return find_checkpoint(str(Path(source).expanduser())) is not None
    except UserError:  # a run without last.ckpt, which may have a best one, or no such .ckpt
        return True


def labels(sources: Iterable[str], of_run: str | None = None) -> dict[str, str]:
    """The shortest distinct name of each source, for a table, a picture or a tag.

    Args:
        sources: Paths and names on the Hub.
        of_run: What a run stands for, such as its validation data; None means the run itself.

    Returns:
        By source: its name, its parent and name, or its full path.
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


def find(source: str, *, tokenizer: str | None = None, baselines: bool = False) -> Source:
    """Find a source and what belongs to it, so that mistakes show before anything is measured.

    Args:
        source: Run folder, checkpoint, exported folder, or name on the Hub.
        tokenizer: Tokenizer to use instead of the run's or the folder's.
        baselines: Whether to add what a quantized run started from, in full precision and rounded to nearest.

    Raises:
        UserError: If there is nothing to evaluate, or the tokenizer or the start is not found.
    """
    return _find_run(source, tokenizer, baselines) if is_run(source) else _find_folder(source, tokenizer)


def _find_run(source: str, tokenizer: str | None, baselines: bool) -> Source:
    run = open_run(source)
    module, own = run.described, None
    if module.family == "text":
        with quiet():
            own = run.load_tokenizer(module, tokenizer)
    loaders: list[Callable[[], Model]] = [partial(_of_run, source, run, own)]
    baselines = baselines and module.quantizer is not None
    if baselines and run.start is None:
        logger.warning("%s: started from random weights, so it has no baselines", source)
    elif baselines:
        try:
            check_start(module, Start(str(run.start)))
        except UserError as error:
            raise UserError(
                f"baselines: the start of {source} cannot be loaded "
                f"({str(error).removeprefix('init_from: ')}); put it back, or leave baselines out"
            ) from error
        loaders += [partial(_of_run, source, run, own, start) for start in ("full precision", "quantized")]
    return Source(source, module.family, loaders)


def _of_run(source: str, run: Run, tokenizer: Any, start: str | None = None) -> Model:
    """Load a run's trained model, or its start in full precision or quantized."""
    module = run.load() if start is None else run.load_start(quantized=start == "quantized")
    about = _in_words(module.describe())
    if start is not None:
        about = f"its start, {'rounded to nearest, ' if start == 'quantized' else ''}{about}"
        if start == "quantized" and (run.described.input_quantizer or run.described.attention_quantizer):
            about += ", activations in full precision"
    assert module.model is not None
    network = module.model.eval()
    images = {**(run.preprocessing or {}), "image_size": image_size(network) or run.image_size}
    return Model(source, network, about, tokenizer, run, start is None, images)


def _find_folder(source: str, tokenizer: str | None) -> Source:
    config = Path(source).expanduser() / "config.json"
    try:
        keys = json.loads(config.read_text()) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config}: not readable as JSON ({error}); copy it again") from error
    if not isinstance(keys, dict) or not isinstance(keys.get("architecture", ""), str):
        raise UserError(f"{config}: does not describe a model; copy it again")
    if "architecture" in keys:  # timm's
        return Source(source, "images", [partial(_timm, source, config.parent)])
    if Path(source).expanduser().exists() and not keys:
        raise UserError(
            f"{source}: not a run, a checkpoint or a folder with config.json; for a GGUF or ONNX file, "
            "name the run that it was exported from"
        )
    try:
        config = pretrained_config("source", source)
    except UserError as error:
        raise UserError(str(error).removeprefix("source: ")) from error
    own = load_tokenizer(tokenizer or source)
    check_vocabulary(own, config.vocab_size, tokenizer or source)
    return Source(source, "text", [partial(_transformers, source, own, "folder" if keys else "hub")])


def _timm(source: str, folder: Path) -> Model:
    import timm

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except UNLOADABLE as error:
        raise UserError(f"{source}: timm cannot load it: {first_line(error)}") from error
    own = timm.data.resolve_data_config(model=model)
    images = {key: own[key] for key in PREPROCESSING} | {"image_size": own["input_size"][-1]}
    return Model(source, model.eval(), "timm folder", images=images)


def _transformers(source: str, tokenizer: Any, about: str) -> Model:
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), unreported():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # the folder may name a kernel on the Hub
            )
    except UNLOADABLE as error:
        raise UserError(f"{source}: transformers cannot load it: {first_line(error)}") from error
    model, info = loaded
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(
            f"{source}: {missing[0]} is missing from its files; copy it again, or correct its config.json"
        )
    if is_prepared(info["unexpected_keys"]):
        if not Path(source).expanduser().is_dir():
            raise UserError(f"{source}: has quantizers, which are read from a folder only; download it")
        folder = Path(source).expanduser()
        quantize_again(model, folder, read_grids(folder))
        about = _in_words(describe(model))
    return Model(source, model.eval(), about, tokenizer)


def _in_words(settings: dict[str, Any]) -> str:
    """How a model is quantized."""
    if "bits" not in settings:
        return "full precision"
    widths = f", {settings['widths']}" if "widths" in settings else ""
    return f"{settings['method']}, {settings['bits']} bits, {settings['grid']}{widths}"

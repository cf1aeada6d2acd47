"""What the start of a model brings to its data: the tokenizer, or the preprocessing of images.

With other tokens, or pixels of another scale, a model silently computes nonsense. So the data's null
settings are taken from what the model starts from: a run, a checkpoint, a model folder, a name on the Hub,
or timm's entry for the architecture. An explicit setting wins and is reported; a tokenizer that cannot be
the model's is refused.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from stableqat.checkpoints.names import find_checkpoint
from stableqat.cli.resume import as_saved
from stableqat.construct import find_class
from stableqat.data import ImageDataModule
from stableqat.data.prepared import prepared_manifest
from stableqat.data.tokenizer import clash, load_tokenizer, tokenizer_hash
from stableqat.errors import LISTED, UserError
from stableqat.modules.vit_config import architecture, label_names, preprocessing, takes_one_size
from stableqat.runs import Run


def inherit(settings: Namespace) -> list[str]:
    """Fill the data's settings from what the model starts from.

    Args:
        settings: The verb's settings, with `ckpt_path` resolved; changed in place.

    Returns:
        One line per setting that was taken.

    Raises:
        UserError: If data and model contradict each other.
    """
    arguments = settings.data.get("init_args") or Namespace()
    taken = []
    if "tokenizer" in arguments:
        asked = arguments.tokenizer is not None
        for key, source in _starts(settings):
            taken += _take_tokenizer(arguments, key, source, asked)
    model = settings.model.get("init_args") or Namespace()
    if "model_name" in model:
        taken += _take_architecture(arguments, model)
    if "mean" in arguments and model.get("model_name") is not None and arguments.get("source") is not None:
        starts = _starts(settings)
        taken += _take_preprocessing(arguments, model, *next(starts, (None, None)))
        for key, source in starts:
            taken += _compare_pixels(arguments, model.model_name, key, source)
    if "num_classes" in model:
        taken += _take_classes(settings.data, model)
    return taken


def _starts(settings: Namespace) -> Iterator[tuple[str, str]]:
    """The models that read the data: the setting that names each, and its value."""
    model = settings.model.get("init_args") or Namespace()
    if settings.get("ckpt_path") is not None:
        yield "ckpt_path", settings.ckpt_path
    elif model.get("init_from") is not None:
        yield "model.init_from", model.init_from
    teacher = model.get("teacher")
    if teacher is not None and teacher.get("source") is not None:
        yield "model.teacher.source", teacher["source"]


def _take_tokenizer(arguments: Namespace, key: str, source: str, asked: bool) -> list[str]:
    named, checkpoint = arguments.tokenizer, find_checkpoint(source, key)
    if named is None:
        named = next((f"{each}/tokenizer" for each in _sources(arguments) if prepared_manifest(each)), None)
    try:
        own = _tokenizer_of(source, checkpoint)
    except UserError as error:
        if named is None:
            raise UserError(f"{key}: {error}; name it with --data.tokenizer") from error
        return []
    if named is None and own is not None:
        arguments.tokenizer = own
        return [f"data.tokenizer: {own}, which {key} brings"]
    if named is None and (key != "model.init_from" or checkpoint is not None):
        return [f"{key}: {source} has no tokenizer; the data's own, or --data.tokenizer, is used"]
    if named in (None, own) or own is None:
        return []
    return _compare(named, own, key, source, asked)


def _take_architecture(arguments: Namespace, model: Namespace) -> list[str]:
    """Name a vision transformer as its start does, with the arguments that shape it."""
    source = model.get("init_from")
    if model.model_name is not None or source is None:
        return []
    if (found := architecture(source, "model.init_from")) is None:
        raise UserError(
            f"model.model_name: {source} does not say which timm model it is; name it, such as "
            "--model.model_name vit_small_patch16_224"
        )
    model["model_name"], options = found
    told: dict[str, Any] = {"model_name": model.model_name}
    if model.get("model_args") is None and options:
        if arguments.get("image_size") is not None and "img_size" in options:
            options = {**options, "img_size": arguments.image_size}
        model["model_args"] = told["model_args"] = options
    return [f"model.{_told(told)}, which model.init_from brings"]


def _take_classes(data: Namespace, model: Namespace) -> list[str]:
    """Count the classes of the data, and keep the start's classifier only if they may be its own."""
    asks = model.get("new_classifier", False) is None and model.get("init_from") is not None
    had = _classes_of(model.init_from) if asks else None
    if model.num_classes is not None and (had is None or not data.class_path.endswith("ImageDataModule")):
        return []
    datamodule: Any = find_class(data.class_path, [ImageDataModule], "data")(**data.init_args.as_dict())
    names, lines = datamodule.class_names, []
    if model.num_classes is None:
        model["num_classes"] = len(names)
        lines.append(f"model.num_classes: {len(names)}, those of the data ({_few(names)})")
    numbers = [str(label) for label in range(len(names))]  # of classes whose names are unknown
    if had is not None and len(had) == len(names) and names != had and numbers not in (names, had):
        model["new_classifier"] = True
        lines.append(f"model.new_classifier: true, as the start's classes are others ({_few(had)})")
    return lines


def _classes_of(source: str) -> list[str] | None:
    """The names of a start's classes, in their order; None if they are unknown."""
    if (checkpoint := find_checkpoint(source, "model.init_from")) is None:
        return label_names(source)
    with suppress(UserError, OSError):  # the data may be gone
        datamodule = Run(checkpoint).data()
        return datamodule.class_names if isinstance(datamodule, ImageDataModule) else None
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _take_preprocessing(
    arguments: Namespace, model: Namespace, key: str | None, source: str | None
) -> list[str]:
    brought, own = _preprocessing_of(model.model_name, key, source)
    whose = f"{key} brings" if own else f"timm has for {model.model_name}"
    lines = _take_size(arguments, model, brought.pop("image_size", None), fixed=key == "ckpt_path")
    taken, other = {}, {}
    for name, value in brought.items():
        given = arguments.get(name)
        if given is None:
            arguments[name] = taken[name] = value
        elif source is not None and as_saved(given) != as_saved(value):
            other[name] = f"{as_saved(given)} (the model: {as_saved(value)})"
    if taken:
        lines.append(f"data.{_told({name: as_saved(value) for name, value in taken.items()})}, which {whose}")
    if other:
        lines.append(f"data.{_told(other)}: not what the model was trained with; leave it out to use its own")
    return lines


def _preprocessing_of(name: str, key: str | None, source: str | None) -> tuple[dict[str, Any], bool]:
    """How a model's images were prepared, and whether it says so itself, not timm of its architecture."""
    checkpoint = None if source is None else find_checkpoint(source, key)
    run = None if checkpoint is None else Run(checkpoint)
    if run is not None and (own := run.preprocessing) is not None:
        return {**own, "image_size": run.image_size}, True
    pretrained = source if checkpoint is None else None
    return preprocessing(pretrained, name), pretrained is not None


def _compare_pixels(arguments: Namespace, name: str, key: str, source: str) -> list[str]:
    """Say where a teacher was trained with pixels of another scale than the student's."""
    found = architecture(source, key)
    brought, _ = _preprocessing_of(name if found is None else found[0], key, source)
    other = {
        name: f"{as_saved(arguments[name])} (the teacher: {as_saved(brought[name])})"
        for name in sorted(brought.keys() & {"mean", "std"})
        if as_saved(arguments[name]) != as_saved(brought[name])
    }
    return [f"data.{_told(other)}: {source} was trained with other pixels"] if other else []


def _take_size(arguments: Namespace, model: Namespace, brought: int | None, fixed: bool) -> list[str]:
    """Match the images' size to the model's, and a model's to the size that is asked for."""
    options, lines = model.get("model_args") or {}, []
    usual = preprocessing(None, model.model_name).get("image_size")
    size = options.get("img_size") or arguments.image_size or brought or usual
    if (
        "img_size" not in options
        and not fixed
        and size != usual
        and takes_one_size(model.model_name, options)
    ):
        model["model_args"] = {**options, "img_size": size}
        whose = "the data" if arguments.image_size else "the start"
        lines.append(f"model.model_args.img_size: {size}, that of {whose}")
    if arguments.image_size is None:
        arguments.image_size = size[-1] if isinstance(size, list | tuple) else size
    return lines


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _sources(arguments: Namespace) -> list[str]:
    source = arguments.get("source")
    return [source] if isinstance(source, str) else list(source or [])


def _tokenizer_of(source: str, checkpoint: Path | None) -> str | None:
    """Where a model's tokenizer is; None if that is unknown.

    Raises:
        UserError: If its run has none.
    """
    if checkpoint is not None:
        return Run(checkpoint).tokenizer
    try:
        load_tokenizer(source)
    except UserError:  # loading the model reports a source that does not exist
        return None
    return str(Path(source).expanduser()) if Path(source).exists() else source


def _compare(named: str, own: str, key: str, source: str, asked: bool) -> list[str]:
    """Refuse a tokenizer that cannot be the model's, or one that the user has not asked for."""
    given, trained = load_tokenizer(named), load_tokenizer(own)
    if tokenizer_hash(given) == tokenizer_hash(trained):
        return []
    if not asked:
        raise UserError(
            f"data.tokenizer: {named} of the data or the start is not the one that {key} {source} was "
            f"trained with; tokenize again with {own}, use another model, or add --data.tokenizer {named}"
        )
    if reason := clash(given, trained):
        raise UserError(
            f"data.tokenizer: {named} does not fit {key} {source}: {reason}; leave it out to use the model's "
            "own"
        )
    return [f"data.tokenizer: {named} is not the one that {key} {source} was trained with, used as asked"]

"""What vision transformers of timm say of themselves: their architecture, and how images are prepared."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from stableqat.checkpoints.names import find_checkpoint
from stableqat.checkpoints.read import read_rest
from stableqat.errors import UserError, first_line
from stableqat.files import as_it_stands, is_missing

_REMEDY = "name a run, a checkpoint, a weight file or a Hub model"


def architecture(source: str, key: str = "init_from") -> tuple[str, dict[str, Any]] | None:
    """The timm model that weights are of, with its arguments; None if they do not say.

    The number of classes is not among them: it is the data's.

    Args:
        source: Run folder, checkpoint, weight file, which may say so in its metadata, model folder or hub
            name.
        key: The setting that names it, for messages.
    """
    import timm

    if (checkpoint := find_checkpoint(source, key)) is not None:
        saved = read_rest(checkpoint)["hyper_parameters"]
        return (saved["model_name"], saved.get("model_args") or {}) if saved.get("model_name") else None
    path = Path(source).expanduser()
    if not path.exists():
        weight_file(source)
        try:
            _, name, options = timm.models.load_model_config_from_hf(source)
        except (OSError, RuntimeError, ValueError) as error:
            raise unreachable(source, error) from error
        return name, _shaping(options)
    config = _read(path if path.is_dir() else path.parent, "config.json")
    if isinstance(name := config.get("architecture"), str):
        return name, _shaping(config.get("model_args"))
    with _header(source) as header:
        name = None if header is None else (header.metadata() or {}).get("architecture")
    return None if name is None else (name, {})


def _shaping(options: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if key != "num_classes"}


def label_names(source: str) -> list[str] | None:
    """The names of the classes, in their order, that pretrained weights bring; None if they bring none.

    Args:
        source: Weight file, model folder or hub name.
    """
    import timm

    path, config = Path(source).expanduser(), {}
    if path.exists():
        config = _read(path if path.is_dir() else path.parent, "config.json")
    else:
        with suppress(OSError, RuntimeError, ValueError):  # `check_pretrained` reports it
            config = timm.models.load_model_config_from_hf(source)[0]
    names = config.get("label_names")
    return [str(name) for name in names] if isinstance(names, list) else None


def preprocessing(source: str | None, model_name: str) -> dict[str, Any]:
    """How images were resized and normalised for pretrained weights, and their size.

    Args:
        source: Weight file, model folder or hub name; None asks timm about the architecture.
        model_name: Name of a timm model; its settings are the default for a local source without any.

    Returns:
        Those known of mean, std, interpolation, crop_pct, crop_mode and image_size.
    """
    import timm

    if source is not None:
        path = Path(source).expanduser()
        if not path.exists():
            try:
                return _of_pretrained_cfg(timm.models.load_model_config_from_hf(source)[0])
            except (OSError, RuntimeError, ValueError):  # `check_pretrained` reports it
                return {}
        if known := _of_folder(path if path.is_dir() else path.parent):
            return known
    registered = timm.get_pretrained_cfg(model_name)
    known = {} if registered is None else _of_pretrained_cfg(registered.to_dict())
    if source is not None and (size := _size_of_positions(source)) is not None:
        known["image_size"] = size
    return known


def takes_one_size(model_name: str, model_args: dict[str, Any]) -> bool:
    """Whether an architecture takes images of one size only, which `img_size` sets."""
    import timm

    registered = timm.get_pretrained_cfg(model_name)
    return bool(registered and registered.fixed_input_size) and not model_args.get("dynamic_img_size")


@contextmanager
def _header(source: str) -> Iterator[Any]:
    """Open the safetensors file of a local source; None if there is none, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    file, opened = weight_file(source), None
    with ExitStack() as stack:
        if file is not None and file.suffix == ".safetensors":
            with suppress(OSError, SafetensorError):  # loading the weights says what is wrong
                opened = stack.enter_context(safe_open(file, "pt"))
        yield opened


def _size_of_positions(source: str) -> int | None:
    """The images' size in pixels that the position embeddings of a weight file are for; None if unknown."""
    with _header(source) as header:
        if header is None or not {"pos_embed", "patch_embed.proj.weight"} <= set(header.keys()):
            return None
        positions = header.get_slice("pos_embed").get_shape()[1]  # of the class token and the like, too
        return math.isqrt(positions) * header.get_slice("patch_embed.proj.weight").get_shape()[-1]


def _of_pretrained_cfg(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    known = {key: config[key] for key in keys if config.get(key) is not None}
    if size := config.get("input_size"):
        known["image_size"] = size[-1]
    return known


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        keys = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _of_folder(folder: Path) -> dict[str, Any]:
    """The settings in timm's `config.json` or transformers' `preprocessor_config.json`."""
    config = _read(folder, "config.json")
    if "architecture" in config:
        return _of_pretrained_cfg(config.get("pretrained_cfg") or config)
    config = _read(folder, "preprocessor_config.json")
    if "image_mean" not in config or "image_std" not in config:
        return {}
    known = {"mean": config["image_mean"], "std": config["image_std"]}
    resized, cropped = (_side(config.get(key)) for key in ("size", "crop_size"))
    if not config.get("do_center_crop", cropped is not None):
        cropped = resized
    if resized and cropped:
        known |= {"image_size": cropped, "crop_pct": cropped / resized}
    if (filter_of_pillow := config.get("resample")) in (0, 2, 3):
        known["interpolation"] = {0: "nearest", 2: "bilinear", 3: "bicubic"}[filter_of_pillow]
    return known


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else None


def weight_file(source: str) -> Path | None:
    """Return the file of a local source that holds its weights; None for a name on the Hub."""
    path = Path(source)
    if is_missing(source):
        raise UserError(f"init_from: {source} does not exist{as_it_stands(source)}; {_REMEDY}")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
        if not files:
            raise UserError(f"init_from: {source} holds no .safetensors or .pth file; name a folder with one")
        return files[0]
    return path if path.is_file() else None


def unreachable(source: str, error: Exception) -> UserError:
    """Return the error of a source that is neither local nor on the Hub."""
    return UserError(
        f"init_from: {source} was not found locally (there is no such folder) or as a timm model on the Hub; "
        f"{_REMEDY} ({first_line(error)})"
    )

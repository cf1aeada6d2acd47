"""What rounding does to a model, one layer at a time and as a whole.

One pass through the blocks: each layer of a block is rounded alone, and a forward pass of the held-out rows
begins at this block, with what flows into it. The same pass carries the held-out rows through models that are
rounded throughout, one per width and method.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stableqat.diagnose.layers import Record, Rounded, Settings, measure_layers
from stableqat.diagnose.verdict import METHODS
from stableqat.errors import UserError
from stableqat.evaluate.processes import Share
from stableqat.files import whole_file, writing
from stableqat.landscape.batches import losses_of
from stableqat.landscape.curvature import mean_loss
from stableqat.landscape.space import Losses, WeightSpace
from stableqat.layers.full_precision import full_precision
from stableqat.layers.latent import latent_weights
from stableqat.layers.linear import quantized_layers
from stableqat.modules import QATModule
from stableqat.ptq.layerwise import moments_of
from stableqat.ptq.stream import Batch, Stream
from stableqat.ptq.unfinished import Unfinished
from stableqat.terminal import progress

Streams = dict[str, Stream]
"""The held-out rows in models that are rounded throughout, by width and method."""


def measure(
    module: QATModule,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: Settings,
    *,
    device: torch.device,
    unfinished: Unfinished,
) -> Record:
    """Measure a model, whose weights return to where they are.

    Args:
        module: The configured training system, with quantizers of the narrowest width.
        calibration: Data for GPTQ.
        held_out: Data for the losses.
        settings: How.
        device: Where to compute; the whole model is there.
        unfinished: What an interrupted call has left, and where this one leaves what it finishes.

    Returns:
        `loss`, in full precision; `layers`, a record per layer; `model`, by width and method the loss of the
        model that is rounded throughout.

    Raises:
        UserError: If the inputs of a layer are not finite, or a quantized weight lies outside of the blocks.
    """
    assert module.model is not None
    module.to(device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in held_out]
    spaces = {name: WeightSpace(module.model, [name]) for name in _inside_blocks(module)}
    with full_precision(module.model):
        losses = losses_of(module, batches)
        record: Record = {"loss": mean_loss(losses).item(), "layers": []}
        data, held = Stream(module, calibration, device), Stream(module, batches, device)
        models = {
            f"{bits}.{method}": Stream(module, batches, device)
            for bits in settings.factories
            for method in METHODS
        }
        done = _resume(unfinished, record, models)
        with progress(len(spaces), len(record["layers"])) as show:
            for block, _ in zip(held.blocks(), data.blocks(), strict=True):
                number = block.number
                if number < done:
                    continue
                told = partial(
                    _tell, show, len(record["layers"]), f"block {number + 1} of {len(held.modules)}"
                )
                told(0, "inputs")
                moments = moments_of(block, data, Share())
                own = _resumed(held, losses, number)
                records, rounded = measure_layers(block, held, own, moments, spaces, settings, told)
                record["layers"] += records
                _flow(models, number, rounded, spaces)
                _keep(unfinished, number, record, models)
        record["model"] = _losses(models, losses)
    return record


def _tell(show: Callable[[float, str], None], before: int, block: str, count: int, name: str) -> None:
    show(before + count, f"{block}, {name.rpartition('.')[2]}")


def _inside_blocks(module: QATModule) -> list[str]:
    assert module.model is not None
    blocks = list(module.blocks(module.model))
    inside = {layer for block in blocks for layer in quantized_layers(block).values()}
    found = {name for name, layer in quantized_layers(module.model).items() if layer in inside}
    if strangers := [name for name in latent_weights(module.model) if name not in found]:
        raise UserError(
            f"skip: {strangers[0]} is no linear layer of a transformer block, and no other is measured; add "
            "it to --skip"
        )
    return list(found)


def _resumed(stream: Stream, losses: Losses, number: int) -> Losses:
    """The same losses, whose forward passes begin at a block."""

    def of(index: int) -> Tensor:
        with stream.resumed(number, index):
            return losses[index]()

    return [partial(of, index) for index in range(len(losses))]


def _flow(models: Streams, number: int, rounded: dict[str, Rounded], spaces: dict[str, WeightSpace]) -> None:
    """Let the rows of each rounded model flow through a block."""
    for key, stream in models.items():
        bits, method = key.split(".")
        with ExitStack() as stack:
            for name, weights in rounded.items():
                stack.enter_context(spaces[name].kept())
                spaces[name].set([weights[int(bits), method].dequantize()])
            stream.flow(number)


def _losses(models: Streams, losses: Losses) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key, stream in models.items():
        bits, method = key.split(".")
        own = _resumed(stream, losses, len(stream.modules))
        found.setdefault(bits, {})[method] = mean_loss(own).item()
    return found


def _keep(unfinished: Unfinished, number: int, record: Record, models: Streams) -> None:
    """Keep what is measured so far, and how far the rows of rounded models have come."""
    state = {f"{key}.{i}": x.cpu() for key, stream in models.items() for i, x in enumerate(stream.hidden)}
    file = unfinished.folder / f"block-{number}.safetensors"
    with writing(str(unfinished.folder), "what is measured so far is kept; make room"):
        with whole_file(file) as part:
            save_file(state, part, metadata={"layers": json.dumps(record["layers"])})
        if number:
            file.with_name(f"block-{number - 1}.safetensors").unlink()
    unfinished.holds = True


def _resume(unfinished: Unfinished, record: Record, models: Streams) -> int:
    """Take up what an interrupted call has kept.

    Returns:
        The number of blocks that are measured.
    """
    numbers = [int(path.stem.partition("-")[2]) for path in unfinished.folder.glob("block-*.safetensors")]
    if not numbers:
        return 0
    file = unfinished.folder / f"block-{max(numbers)}.safetensors"
    try:
        with safe_open(str(file), "pt") as held:
            record["layers"] = json.loads(held.metadata()["layers"])
            for key, stream in models.items():
                for index, x in enumerate(stream.hidden):
                    stream.hidden[index] = held.get_tensor(f"{key}.{index}").to(x).view_as(x)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; remove {unfinished.folder}") from error
    return max(numbers) + 1

"""Where a model starts: `init_from` is resolved and its full-precision weights are loaded.

Accepted, in this order: a run folder of this suite (its last checkpoint), a checkpoint of this suite, one
file or sharded, then whatever the family reads itself: a local model folder or file, a hub name. Of a
checkpoint that was trained with quantizers the latent weights are taken, and said so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stableqat.checkpoints.names import find_checkpoint
from stableqat.checkpoints.read import check_sums, read_checkpoint
from stableqat.errors import UserError
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.modules.hyperparameters import ONLY_FOR_TRAINING, rebuild
from stableqat.quantizers.inputs import input_quantizers

if TYPE_CHECKING:
    from stableqat.modules.base import QATModule

logger = logging.getLogger(__name__)

_STATE_DICT_FOLLOWS: ContextVar[bool] = ContextVar("state_dict_follows", default=False)


@contextmanager
def state_dict_follows(follows: bool = True) -> Iterator[None]:
    """Inside, `configure_model` neither loads a start nor initialises scales: a checkpoint will."""
    token = _STATE_DICT_FOLLOWS.set(follows)
    try:
        yield
    finally:
        _STATE_DICT_FOLLOWS.reset(token)


def will_be_loaded() -> bool:
    """Whether this is inside of `state_dict_follows`."""
    return _STATE_DICT_FOLLOWS.get()


class Start:
    """What a model starts from; if it is a checkpoint of this suite, it is read once.

    Args:
        source: Run folder, checkpoint, local model folder or file, or hub name.

    Attributes:
        checkpoint: The checkpoint; None for what a family reads itself.

    Raises:
        UserError: If the source is a checkpoint or a run's folder, and there is no checkpoint.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.checkpoint = find_checkpoint(source, "init_from")

    @cached_property
    def content(self) -> dict[str, Any]:
        """What is in the checkpoint.

        Raises:
            UserError: If it is damaged, or holds something else.
        """
        assert self.checkpoint is not None
        return read_checkpoint(self.checkpoint)

    @cached_property
    def model(self) -> nn.Module:
        """The checkpoint's model: its quantizers, and the weights that they quantize, are on the CPU.

        Raises:
            UserError: If its module cannot be made, or a quantizer is damaged.
        """
        from stableqat.modules.base import QATModule

        assert self.checkpoint is not None
        with torch.device("meta"), state_dict_follows():
            module = rebuild(QATModule, self.checkpoint, self.content, **ONLY_FOR_TRAINING)
            module.configure_model()
        model, state = module.model, self.content["state_dict"]
        layers = quantized_layers(model)
        quantizers = {f"{name}.weight_quantizer": layer.weight_quantizer for name, layer in layers.items()}
        for name, made in {**quantizers, **input_quantizers(model)}.items():
            prefix = f"model.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            try:
                made.to_empty(device="cpu").load_state_dict(own)
            except RuntimeError as error:
                raise UserError(f"{self.source}: the quantizer {name} is damaged") from error
        for name, layer in layers.items():
            layer.weight = nn.Parameter(state[f"model.{name}.weight"], requires_grad=False)
        return model

    @property
    def layers(self) -> dict[str, QuantLinear]:
        """The quantized layers of `model`."""
        return quantized_layers(self.model)

    @torch.no_grad()
    def latent_weights(self) -> dict[str, Tensor]:
        """The full-precision weights of the checkpoint, by the model's names.

        Raises:
            UserError: As `layers`.
        """
        state = self.content["state_dict"]
        weights = {k.removeprefix("model."): v for k, v in state.items() if "_quantizer." not in k}
        if any(not weight.is_floating_point() for weight in weights.values()):  # frozen and stored
            for name, layer in self.layers.items():
                weights[f"{name}.weight"] = layer.weight_quantizer.latent(layer.weight).detach()
        return weights


def load_start(module: "QATModule", start: Start) -> nn.Module:
    """Build a module's architecture with the weights of its start.

    Args:
        module: The training system; it knows how to build its architecture and its family's formats.
        start: What it starts from.

    Returns:
        The model in float32, not yet quantized.

    Raises:
        UserError: If the start is missing, damaged or of another architecture.
    """
    source = start.source
    if start.checkpoint is None:
        return module.load_pretrained(source)
    model = module.build_model()
    state = start.content["state_dict"]
    weights = start.latent_weights()
    if len(weights) < len(state) and module.init_quantizers == "weights":
        logger.warning("init_from: %s was trained with quantizers; its latent weights are taken", source)
    load_weights(model, module.fit_state(model, weights, source), source)
    return model


def check_start(module: "QATModule", start: Start) -> None:
    """Refuse a start that `load_start` would refuse, by names and shapes alone.

    Raises:
        UserError: As `load_start`.
    """
    source = start.source
    if start.checkpoint is None:
        module.check_pretrained(source)
        return
    with torch.device("meta"):
        model = module.build_model()
    check_sums(start.checkpoint)
    state = start.latent_weights()
    compare_weights(model, module.fit_state(model, state, source), source)


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a state dict into a model, exactly.

    Raises:
        UserError: As `compare_weights`.
    """
    compare_weights(model, state, source)
    model.load_state_dict(state, strict=False)


def compare_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes of a model and a state dict.

    Raises:
        UserError: Naming the first difference, if the file is of another architecture.
    """
    own = model.state_dict()
    tied = _tied(model)
    differences = [f"{k} has shape {tuple(state[k].shape)}, the model {tuple(own[k].shape)}"
                   for k in own if k in state and state[k].shape != own[k].shape]  # fmt: skip
    differences += [
        f"{k} is missing in the file" for k in own if k not in state and not tied.get(k, set()) & set(state)
    ]
    differences += [f"{k} is not in the model" for k in state if k not in own]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{source}: weights of another architecture: {differences[0]}{more}; check the model's settings"
        )


def _tied(model: nn.Module) -> dict[str, set[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() for name in group if len(group) > 1}

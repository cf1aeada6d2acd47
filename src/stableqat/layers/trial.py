"""A trial forward finds weights that a model reads without calling their layers: they are quantized too.

Some models multiply with `layer.weight` themselves (a fused projection of query, key and value, a state-space
block, a fused kernel) and would keep using the latent values. The trial runs the model in training and in
evaluation mode and leaves no trace: random states, buffers, gradients, flags and attributes stay as they
were, and no hook runs. From then on, a module that reads a weight sees the fake-quantized one in its
forwards; where that is impossible, the model is refused.
"""

import copy
import logging
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from stableqat.errors import UserError, one_line
from stableqat.layers.experts import AroundForward
from stableqat.layers.linear import QuantLinear, quantized_layers

logger = logging.getLogger(__name__)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALL = nn.Module._call_impl.__code__  # the frame that runs a module's hooks around its forward


@dataclass
class Calls:
    """How a model uses its quantized layers.

    Attributes:
        reads: Layers whose weight a module reads itself, by name of the module; both names are relative to
            the model.
        idle: Layers that are neither called nor read.
    """

    reads: dict[str, set[str]] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def tell(self) -> None:
        """Warn about layers that nothing uses: they are quantized but never trained."""
        if self.idle:
            first = ", ".join(sorted(self.idle)[:3])
            logger.warning("%d quantized layers were not called in a trial: %s", len(self.idle), first)


def try_calls(model: nn.Module, *args: Any, **kwargs: Any) -> Calls:
    """Run a model once in evaluation and once in training mode to see how it uses its quantized layers.

    Args:
        model: A model with quantized layers, on any device, meta included.
        args: Inputs of its forward.
        kwargs: Inputs of its forward by name.

    Raises:
        UserError: If the model uses or changes a weight in a way that cannot be quantized; names the layer.
        Exception: Whatever the forward raises.
    """
    names = {layer: name for name, layer in quantized_layers(model).items()}
    calls = Calls(idle=set(names.values()))
    for training in (False, True):
        for closely in (False, True):
            inputs = _copied((args, kwargs))
            with _untouched(model), _Trial(names, closely) as trial:
                trial.run(model, training, inputs)
            if not trial.read and len(trial.called) == len(names):
                break  # nearly always: no need to look at every operation
        trial.refuse()
        modules = {module: name for name, module in model.named_modules()}
        for layer, reader in trial.used.values():
            calls.reads.setdefault(modules[reader], set()).add(names[layer])
        calls.idle -= {names[layer] for layer in trial.reached}
    return calls


def show_weights(model: nn.Module, calls: Calls) -> list[tuple[nn.Module, "_Shown"]]:
    """Let each module that reads a layer's weight itself see the fake-quantized one.

    Args:
        model: The model, or another one of the same structure.
        calls: What `try_calls` found.

    Returns:
        The modules that read weights, each with the hooks that show them.
    """
    made = []
    for name, layers in calls.reads.items():
        prefix, reader = f"{name}." if name else "", model.get_submodule(name)
        shown = _Shown(sorted(layer.removeprefix(prefix) for layer in layers))
        shown.attach(reader)
        made.append((reader, shown))
    return made


def forget_calls(model: nn.Module) -> None:
    """Remove the hooks that `check_calls` and `show_weights` left in a model."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(owner := getattr(hook, "__self__", None), _Shown | _FirstForward):
                owner.detach()


def is_shown(module: nn.Module) -> bool:
    """Whether `show_weights` lets a module see fake-quantized weights."""
    return any(isinstance(getattr(h, "__self__", None), _Shown) for h in module._forward_pre_hooks.values())


def check_calls(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
) -> Calls | None:
    """`try_calls` and `show_weights`; without an example they run on the first real input.

    Args:
        model: A model with quantized layers.
        example: Positional and named inputs of its forward; None takes those that the model declares.

    Returns:
        What was found; None if the first forward will show.

    Raises:
        UserError: As in `try_calls`, or if the model does not take the given example.
    """
    calls = None
    if (inputs := example or example_inputs(model)) is not None:
        try:
            calls = try_calls(model, *inputs[0], **inputs[1])
        except UserError:
            raise
        except Exception as error:
            if example is not None:
                raise UserError(f"example_inputs: the model refuses them ({one_line(error)})") from error
            logger.debug("the model does not take the inputs that it declares", exc_info=True)
    if calls is None:
        _FirstForward(model).attach(model)
        return None
    show_weights(model, calls)
    where = {p.device.type for p in model.parameters()}
    if "cuda" not in where and "meta" not in where:  # a kernel on a GPU may read what a CPU calls
        _FirstForward(model, seen=where).attach(model)
    return calls


def example_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs of a forward that a model of transformers or timm declares; None for any other model."""
    first = next(model.parameters(), None)
    if first is None:
        return None
    options: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if kind == "input_ids":
        given = {k: v.to(first.device) for k, v in model.dummy_inputs.items()}  # type: ignore[operator, union-attr]
        if isinstance(entries := getattr(config, "vocab_size", None), int):
            given = {k: v if v.is_floating_point() or v.is_meta else v % entries for k, v in given.items()}
        if first.is_meta:  # without a cache, transformers reads the values of the positions
            given["use_cache"] = True
        return (), given
    if kind == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (2, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return (), {kind: torch.zeros(shape, **options)}
    if kind == "input_values":
        return (), {kind: torch.zeros(2, 16_000, **options)}
    if isinstance(told := getattr(model, "pretrained_cfg", None), dict) and "input_size" in told:
        convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = told["input_size"][0] if convolution is None else convolution.in_channels
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or told["input_size"][1:]
        return (torch.zeros(2, channels, *size, **options),), {}
    return None


class _Trial(TorchDispatchMode):
    """Lets layers compute with their latent weights, which is cheap, and notes which are called or read."""

    def __init__(self, names: dict[QuantLinear, str], closely: bool) -> None:
        super().__init__()
        self.names, self.closely, self.quiet = names, closely, False
        self.called: set[QuantLinear] = set()
        self.read: dict[int, tuple[Tensor, QuantLinear, nn.Module]] = {}  # by storage of what was given
        self.used: dict[int, tuple[QuantLinear, nn.Module]] = {}
        self.written: set[QuantLinear] = set()
        self.consumed: set[QuantLinear] = set()
        self.latents = {_storage(layer.latent): layer for layer in names}

    @property
    def reached(self) -> set[QuantLinear]:
        """The layers that were called, or whose weight was used."""
        return self.called | {layer for layer, _ in self.used.values()}

    def __enter__(self) -> "_Trial":
        for layer in self.names:
            if type(layer) is QuantLinear:
                vars(layer)["_trial"] = self
                layer.__class__ = _Watched
        return super().__enter__() if self.closely else self

    def __exit__(self, *exception: Any) -> None:
        if self.closely:
            super().__exit__(*exception)
        for layer in self.names:
            if type(layer) is _Watched:
                layer.__class__ = QuantLinear  # type: ignore[assignment]
                vars(layer).pop("_trial", None)

    def run(self, model: nn.Module, training: bool, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        for module in model.modules():
            module.training = training
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            model(*inputs[0], **inputs[1])

    def refuse(self) -> None:
        """Refuse a use of a weight for which it is not enough to show the fake-quantized one."""
        latent, plain = "would keep using latent values", "would not quantize its input"
        unseen = {layer for layer, _ in self.used.values() if layer.input_quantizer is not None}
        uses = [(self.consumed - self.reached, "uses", latent), (self.written, "changes", latent)]
        for layers, what, would in (*uses, (unseen, "uses", plain)):
            for name in (self.names[layer] for layer in layers):
                raise UserError(
                    f"layer {name}: the model {what} its weight without calling the layer, and {would}; add "
                    f"{name.split('.')[-1]} to skip"
                )

    def give(self, layer: QuantLinear) -> Tensor:
        """The weight for a module that reads it; to look at its type or shape alone is not a use."""
        reader = self._reader(layer)
        if reader is None:
            return layer.latent
        self.quiet = True
        given = layer.latent.detach().clone()
        self.quiet = False
        self.read[given.untyped_storage()._cdata] = given, layer, reader
        return given

    def _reader(self, layer: QuantLinear) -> nn.Module | None:
        """The innermost module in the call stack that holds the layer."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code is _CALL:
                module = frame.f_locals["self"]
                if module is not layer and any(each is layer for each in module.modules()):
                    return module
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.quiet:
            for tensor in tree_leaves((args, kwargs or {})):
                if isinstance(tensor, Tensor) and (key := _storage(tensor)) is not None:
                    if key in self.read:
                        _, layer, reader = self.read[key]
                        self.used[key] = layer, reader
                        if func._schema.is_mutable and tensor is args[0]:
                            self.written.add(layer)
                    elif key in self.latents:
                        self.consumed.add(self.latents[key])
        return func(*args, **(kwargs or {}))


class _Watched(QuantLinear):
    """A quantized layer in a trial."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return vars(self)["_trial"].give(self)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.value(), self.bias)

    def value(self) -> Tensor:
        vars(self)["_trial"].called.add(self)
        return self.latent


class _Shown(AroundForward):
    """While a module's forward runs, the `weight` of its layers is the fake-quantized one.

    An instance attribute hides the parameter, which stays where optimizers and state dicts find it.

    Args:
        layers: Names of the layers, relative to the module.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = layers

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: compute what the module will read."""
        for name in self.layers:
            layer = module.get_submodule(name)
            object.__setattr__(layer, "weight", layer.value())  # type: ignore[operator]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an exception."""
        for name in self.layers:
            vars(module.get_submodule(name)).pop("weight", None)


class _FirstForward(AroundForward):
    """Runs the trial on the first input that a model, or a part of it, is called with.

    Args:
        model: The model.
        seen: Types of devices that it was already tried on.
    """

    def __init__(self, model: nn.Module, seen: Iterable[str] = ()) -> None:
        super().__init__()
        self.seen = set(seen)
        self.left = set(quantized_layers(model).values())
        self.done: set[nn.Module] = set()

    def attach(self, model: nn.Module) -> None:
        """Wait at every module that holds a quantized layer: the one that is called first holds the most."""
        for module in model.modules():
            if not isinstance(module, QuantLinear) and any(m in self.left for m in module.modules()):
                hook = module.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
                self.handles.append(hook)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: try the module with these inputs, once."""
        if module in self.done or _recorded() or "_is_replica" in vars(module):
            return
        own = set(quantized_layers(module).values())
        where = {p.device.type for p in module.parameters()}
        sharded = any(isinstance(p, DTensor) for p in module.parameters())
        if own & self.left and not (where <= self.seen or sharded):
            try:
                for reader, shown in show_weights(module, try_calls(module, *args, **kwargs)):
                    if reader is module:  # its call has begun, and looks for no more hooks
                        shown.before(module, args, kwargs)
            except UserError:
                raise
            except Exception:  # it cannot be run twice, or not in the other mode
                logger.debug("a trial forward failed", exc_info=True)
        self.left -= own
        self.done.update(module.modules())
        if not self.left:
            self.detach()


def _recorded() -> bool:
    """Whether the operations of a forward are recorded in a graph, which a trial would end up in."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Inside, nothing leaves a trace in a model or in random states, and no hook runs."""
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    contents = [(value, value.copy()) for _, each in attributes for value in each.values()
                if type(value) in (dict, OrderedDict, list, set)]  # fmt: skip
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gpus = {p.device.index for p in model.parameters() if p.is_cuda}
    states = random.getstate(), np.random.get_state()
    cached = torch.is_autocast_cache_enabled()
    for module in modules:
        vars(module).update({name: OrderedDict() for name in _HOOKS})
    torch.set_autocast_cache_enabled(False)  # a copy made here would have no gradient
    try:
        with torch.random.fork_rng(list(gpus)):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        with torch.no_grad():
            for buffer, state in buffers:
                buffer.copy_(state)


def _copied(inputs: Any) -> Any:
    """A copy of the inputs, which a forward may change."""
    if all(isinstance(x, Tensor | str | int | float | None) for x in tree_leaves(inputs)):
        return tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
    return copy.deepcopy(inputs)


def _storage(tensor: Tensor) -> int | None:
    """The same number for tensors that share memory, also on the meta device."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else None

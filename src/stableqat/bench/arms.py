"""The arms of a benchmark: the untouched model, each method, and any rival's linear layer.

All arms share the Parameters of one model, so their weights are equal and take the memory of one model. A
rival is a factory from `nn.Linear` to a module, in the user's own file; it replaces exactly the layers that
the surgery quantizes. torchao's layer takes part if torchao is installed.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stableqat.errors import UserError, did_you_mean, one_line
from stableqat.layers.calibration import calibrate_inputs
from stableqat.layers.latent import store_weights
from stableqat.layers.linear import quantized_layers
from stableqat.quantizers import QuantizerFactory
from stableqat.quantizers.factory import methods
from stableqat.quantizers.inputs import LSQPlus

if TYPE_CHECKING:
    from stableqat.modules import QATModule

FULL_PRECISION = "FP"
TORCHAO = "torchao"
Factory = Callable[[nn.Linear], nn.Module]


@dataclass
class Arm:
    """A model to measure.

    Attributes:
        name: Its row.
        model: The model; None if a rival's layers cannot be built.
        rival: Whether it is a rival, whose errors are results in its row.
        failure: Why there is no model.
        path: The implementation that fake-quantizes its weights.
    """

    name: str
    model: nn.Module | None
    rival: bool = False
    failure: str | None = None
    path: str | None = None


def method_factories(names: Sequence[str], bits: int) -> dict[str, QuantizerFactory]:
    """Return quantizer factories by method name; `all` stands for every method but the controls.

    Raises:
        UserError: If a name is unknown, or a method does not support this width.
    """
    known: dict[str, Any] = methods()
    for name in names:
        if name not in known and name != "all":
            raise UserError(f"methods: {name} is unknown; {did_you_mean(name, [*known, 'all'])}")
    usual = [name for name, cls in known.items() if not cls.is_control]
    chosen = dict.fromkeys(usual if "all" in names else names)
    factories: dict[str, QuantizerFactory] = {name: partial(known[name], bits=bits) for name in chosen}
    for factory in factories.values():
        factory(torch.empty(8, 8, device="meta"))  # refuses unsupported bits
    return factories


def rival_factories(places: Sequence[str], bits: int, taken: Sequence[str]) -> dict[str, Factory]:
    """Return the rivals by name, torchao first if it is installed.

    Args:
        places: FILE.py:FACTORY, one per rival.
        bits: Width for torchao; the user's factories choose their own.
        taken: Names of other arms.

    Raises:
        UserError: If a file or factory is missing, cannot be called or does not return a module.
    """
    rivals: dict[str, Factory] = {TORCHAO: partial(_torchao, bits=bits)} if find_spec("torchao") else {}
    files: dict[Path, ModuleType] = {}
    for place in places:
        file, _, name = place.rpartition(":")
        if not file or not name:
            raise UserError(f"rival: {place}: write FILE.py:FACTORY")
        path = Path(file).resolve()
        if path not in files:
            files[path] = _imported(file, path)
        factory = getattr(files[path], name, None)
        if factory is None:
            there = [key for key, value in vars(files[path]).items() if callable(value)]
            raise UserError(f"rival: {file} has no {name}; {did_you_mean(name, there)}")
        if not callable(factory):
            raise UserError(f"rival: {name} in {file} is not a function from nn.Linear to a module")
        label = name if name not in {FULL_PRECISION, TORCHAO, *taken, *rivals} else f"{path.stem}:{name}"
        if label in rivals:
            raise UserError(f"rival: {place} is named twice")
        _check_returns_module(place, factory)
        rivals[label] = factory
    return rivals


def build_arms(
    model: nn.Module,
    module: "QATModule",
    methods: dict[str, QuantizerFactory],
    rivals: dict[str, Factory],
    input_bits: Sequence[int] = (),
) -> list[Arm]:
    """Make arms of full precision, of each method and of each rival, all assembled for training.

    Input quantizers are those of the overlays; `calibrate_arms` sets them.

    Args:
        model: The plain model, whose Parameters all arms share.
        module: Its training system.
        methods: Quantizers by name, at least one.
        rivals: Factories of linear layers by name.
        input_bits: Widths of inputs; each makes another arm of each method.

    Raises:
        UserError: If there is no layer to quantize, or a width is out of range.
    """
    module.check_architecture(next(iter(methods.values())))
    full = sharing(model)
    module.assemble(full, None)
    arms = [Arm(FULL_PRECISION, full)]
    layers: list[str] = []
    for name, quantizer in methods.items():
        for width in (None, *input_bits):
            module.input_quantizer = None if width is None else partial(LSQPlus, bits=width)
            quantized = sharing(model)
            report = module.assemble(quantized, quantizer)
            assert report is not None
            _own_what_is_frozen(quantized)
            layers = report.swapped
            path = quantized_layers(quantized)[layers[0]].implementation
            arms.append(Arm(name if width is None else f"{name}, {width}-bit inputs", quantized, path=path))
    module.input_quantizer = None
    return arms + [_rival_arm(name, factory, model, module, layers) for name, factory in rivals.items()]


def calibrate_arms(arms: Sequence[Arm], batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
    """Set the input quantizers of arms that have some.

    Args:
        arms: All arms.
        batch: What to calibrate on.
        loss: The training loss of a model.
    """
    for arm in arms:
        if arm.model is not None:
            calibrate_inputs(arm.model, [batch], partial(loss, arm.model))


def sharing(model: nn.Module) -> nn.Module:
    """Copy a plain model on the same Parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _own_what_is_frozen(model: nn.Module) -> None:
    """Give an arm weights of its own where its method freezes them, so that the other arms' still train."""
    for layer in quantized_layers(model).values():
        if not layer.weight_quantizer.trains_weight:
            shared = layer.weight.requires_grad_(True)
            layer.weight = nn.Parameter(shared.detach(), requires_grad=False)
    store_weights(model)


def _rival_arm(name: str, factory: Factory, model: nn.Module, module: "QATModule", layers: list[str]) -> Arm:
    replaced = sharing(model)
    try:
        for layer in layers:
            linear = replaced.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            made = factory(linear)
            if not isinstance(made, nn.Module):
                raise TypeError(f"{name} returned a {type(made).__name__} for {layer}, not a module")
            replaced.set_submodule(layer, made.to(linear.weight.device).train())
        module.assemble(replaced, None)
    except Exception as error:  # whatever foreign code raises
        return Arm(name, None, rival=True, failure=reason(error))
    return Arm(name, replaced, rival=True)


def reason(error: BaseException) -> str:
    """Put an exception in words for a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {one_line(error)}"


def _torchao(linear: nn.Linear, *, bits: int) -> nn.Module:
    """Make torchao's weight-only QAT layer: symmetric, one scale per row, from its largest weight."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), "per_channel", is_symmetric=True)
    return FakeQuantizedLinear.from_linear(linear, weight_config=config)


def _imported(file: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"rival: {file}: there is no such file")
    if path.suffix != ".py":
        raise UserError(f"rival: {file} is not a Python file")
    spec = spec_from_file_location(f"rival_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.compile look up a function's module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # lets it import files beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever foreign code raises
        raise UserError(f"rival: {file} cannot be imported: {reason(error)}") from error
    return module


def _check_returns_module(place: str, factory: Factory) -> None:
    """Refuse a factory that forgets to return; what fails on real layers is a result in its row."""
    try:
        made = factory(nn.Linear(64, 64))
    except Exception:  # its row says so if the real layers fail too
        return
    if not isinstance(made, nn.Module):
        raise UserError(f"rival: {place} returns a {type(made).__name__}; it must return a module")

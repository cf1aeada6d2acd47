"""Quantization-aware training with any trainer: prepare a model, train it, convert it.

`prepare` swaps a model's linear layers for quantized ones in place, `convert` leaves plain layers that
compute the same. Between the two, `stableqat.parameter_groups` feeds an optimizer. The training systems of
this suite are built from the same pieces.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from stableqat.errors import UserError
from stableqat.layers.calibration import calibrate_inputs
from stableqat.layers.embedding import QuantEmbedding
from stableqat.layers.experts import make_plain
from stableqat.layers.latent import store_weights
from stableqat.layers.linear import QuantLinear, quantized_inputs, quantized_layers
from stableqat.layers.trial import check_calls, forget_calls, is_shown
from stableqat.quantizers import Quantizer, QuantizerFactory, QuantizerSpec
from stableqat.quantizers.choice import Choice, matches
from stableqat.quantizers.factory import NamedSpec, make_factory, methods
from stableqat.quantizers.inputs import (
    InputQuantizer,
    InputQuantizerFactory,
    InputQuantizerSpec,
    make_input_quantizer,
)
from stableqat.surgery import (
    HEADS,
    SurgeryReport,
    check_skip,
    make_quantizer,
    put_back,
    quantize_linears,
)

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

Calibration = Iterable[Any] | Callable[[Any], object]
"""Calibration batches, or what runs a model on them, see `calibrate`."""

_CONVERTED = "_stableqat_converted"
GRIDS = "stableqat"  # key of a transformers config for the grids of the layers
INPUTS = "quantized_inputs"  # in it, the layers whose inputs are quantized


def prepare(
    model: Model,
    quantizer: NamedSpec = "stableqat",
    skip: str | Sequence[str] = HEADS,
    *,
    input_quantizer: InputQuantizerSpec | None = None,
    calibration: Calibration | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> Model:
    """Prepare a model for quantization-aware training: swap its linear layers for quantized ones, in place.

    The experts of a mixture are quantized too, whether they are linear layers or fused in one parameter.
    Weights and biases stay the same Parameters; each quantized layer gains a `weight_quantizer` with a
    learned `scale`, set from the weight. Make the optimizer afterwards, from `parameter_groups`. A module
    that reads a layer's weight itself gets the fake-quantized one.

    Args:
        model: Any module, its weights loaded, in float32. To resume from a checkpoint of a prepared model,
            prepare the model in the same way, then load the state dict.
        quantizer: A method by name (ste, dsq, paretoq, stableqat), or a factory of quantizers: a class of
            `stableqat.quantizers`, or a `functools.partial` of one. A mapping assigns quantizers to layers by
            shell patterns as in `skip`: the first pattern that matches wins, and None leaves the layer in
            full precision.
        skip: Linear layers that stay in full precision: one shell pattern or several, each matching a full
            name or a part between dots. Default: heads. Embeddings and convolutions are never quantized.
        input_quantizer: Makes the quantizer of a quantized layer's input from its number of features, as
            `functools.partial(stableqat.quantizers.inputs.LSQ, bits=8)`; a mapping assigns them to layers by
            pattern. None leaves inputs as they are.
        calibration: Sets the scales of input quantizers, as `calibrate` does later. Not needed where a state
            dict follows.
        example_inputs: Inputs of the model's forward: a tensor, a tuple of positional inputs or a dictionary
            of named ones. A trial forward finds weights that are used without calling their layers. None
            takes the inputs that a transformers or timm model declares, or waits for the first forward. For
            any other model, pass them before you compile it.
        options: Options of the quantizer: `bits=2`, `group_size=128`, `grid="stretched"`; in a mapping, they
            apply to the methods given by name.

    Returns:
        The same model.

    Raises:
        UserError: If the method or an option is unknown, no layer is left to quantize, the model is already
            prepared in another way, or a weight to quantize is also used by another module, or without
            calling its layer. The model is then unchanged.
    """
    prepare_and_report(
        model,
        quantizer,
        skip,
        input_quantizer=input_quantizer,
        calibration=calibration,
        example_inputs=example_inputs,
        **options,
    )
    return model


def prepare_and_report(
    model: nn.Module,
    quantizer: NamedSpec,
    skip: str | Sequence[str],
    *,
    input_quantizer: InputQuantizerSpec | None = None,
    calibration: Calibration | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> SurgeryReport:
    """`prepare`, returning its report."""
    skip = [skip] if isinstance(skip, str) else skip
    check_calibration(input_quantizer, calibration)
    factory = make_factory(quantizer, options)
    check_skip(model, skip)
    _refuse_adapters(model, skip)
    refuse_another(model, factory, skip, input_quantizer)
    linears = {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if type(m) is not QuantLinear and isinstance(m, nn.Linear)
    }
    report = quantize_linears(model, factory, skip, input_quantizer=input_quantizer, tied=False)
    try:
        report.check()
        if report.swapped and (calls := check_calls(model, _example(example_inputs))):
            calls.tell()
        if calibration is not None:
            calibrate(model, calibration)
        _record_grids(model)
    except UserError:
        forget_calls(model)
        put_back(model, {name: linears[name] for name in report.swapped if name in linears})
        raise
    store_weights(model)
    layers = [x for x in quantized_layers(model).values() if x.weight.is_floating_point()]
    if half := next((x.weight.dtype for x in layers if x.weight.dtype.itemsize < 4), None):
        logger.warning(
            "weights are %s, which loses small updates; load them as float32 and train with autocast",
            half,
        )
    return report


def check_calibration(input_quantizer: InputQuantizerSpec | None, calibration: Calibration | None) -> None:
    """Refuse calibration of nothing."""
    if calibration is not None and input_quantizer is None:
        raise UserError("calibration: sets the scales of input quantizers; name an input_quantizer, too")


def calibrate(model: Model, calibration: Calibration) -> Model:
    """Set the scales of a prepared model's input quantizers, to the least squared error over all batches.

    Call it before the first step, and not after loading a checkpoint, which brings the scales. In a
    distributed run every process calls it, with as many batches of its own, and all take the same scales.

    Args:
        model: A model that was prepared with an `input_quantizer`, in the autocast region that it trains in.
        calibration: Inputs of its forward, batch by batch: tensors, tuples of positional inputs or
            dictionaries of named ones; or a function that is given the model and runs it on all batches.

    Returns:
        The same model.

    Raises:
        UserError: If what flows into a layer is constant, or not finite; names the layer.
    """
    modes = {module: module.training for module in model.modules()}

    def run(batch: Any) -> None:
        args, kwargs = _inputs(batch)
        model(*args, **kwargs)

    model.eval()
    try:
        if callable(calibration):
            calibrate_inputs(model, [model], calibration)
        else:
            calibrate_inputs(model, calibration, run)
    finally:
        for module, training in modes.items():
            module.training = training
    return model


def convert(model: Model) -> Model:
    """Replace quantized layers with plain ones, in place, whose weights are the deployed values.

    In evaluation the model computes the same as before, bit for bit. Any library loads what it saves, and
    `stableqat export` packs the folder that `save_pretrained` of a Llama or Qwen3 writes, because its config
    names each layer's grid. The latent weights are lost: to continue training, convert a `copy.deepcopy`. An
    embedding that shares the weight of a quantized head becomes plain too.

    Args:
        model: A model with quantized layers.

    Returns:
        The same model.

    Raises:
        UserError: If the model has no quantized layer, a layer quantizes its input, or an adapter computes
            with a latent weight, as DoRA does on a prepared model. The model is then unchanged.
    """
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]
    if not layers:
        raise UserError("the model has no quantized layer to convert; prepare it first")
    for name, layer in layers:
        if layer.input_quantizer is not None:
            raise UserError(
                f"layer {name} quantizes its input, which a plain layer does not: keep the prepared model, "
                "or prepare it without an input_quantizer"
            )
    names = {name for name, _ in layers}
    beside = [name for name in dict(_adapters(model)) if f"{name}.base_layer" in names]
    for name in beside:
        adapter = model.get_submodule(name)
        if getattr(adapter, "lora_magnitude_vector", None) and not is_shown(adapter):  # DoRA
            raise UserError(
                f"layer {name}: its adapter was trained on the latent weight, which convert replaces; add "
                "DoRA adapters before the model is prepared, or use LoRA"
            )
    if beside:
        logger.warning("%s has an adapter: keep it apart; a merged weight leaves its grid", beside[0])
    _record_grids(model)
    forget_calls(model)
    make_plain(model)
    plain = {layer: layer.to_linear() for layer in dict.fromkeys(layer for _, layer in layers)}
    for name, layer in layers:
        model.set_submodule(name, plain[layer])
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            model.set_submodule(name, module.to_embedding())
    vars(model)[_CONVERTED] = True
    return model


def was_converted(model: nn.Module) -> bool:
    """Whether a model, or a part of it, went through `convert`."""
    return any(_CONVERTED in vars(module) for module in model.modules())


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return None if inputs is None else _inputs(inputs)


def _inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def refuse_another(
    model: nn.Module,
    quantizer: QuantizerSpec,
    skip: Sequence[str],
    input_quantizer: InputQuantizerSpec | None = None,
) -> None:
    """Refuse a model with a layer that is already quantized in another way than is asked for."""
    choice: Choice[QuantizerFactory] = Choice(quantizer, skip)
    inputs = None if input_quantizer is None else Choice[InputQuantizerFactory](input_quantizer, ())
    made_inputs = quantized_inputs(model)
    for name, layer in quantized_layers(model).items():
        if choice.left(name, quantized=False):
            continue
        factory, own = choice.of(name), layer.weight_quantizer.describe()
        asked: dict[str, Any] = {"method": "none"}
        if factory is not None:
            asked = make_quantizer(layer.latent.to("meta"), factory).describe()
        if name in made_inputs:
            own |= made_inputs[name].describe()
        made = None if inputs is None else inputs.of(name)
        of_input = make_input_quantizer(made, layer.in_features, layer.latent.device)
        if isinstance(of_input, InputQuantizer):
            asked |= of_input.describe()
        if asked != own:
            key = next(key for key in {**asked, **own} if asked.get(key) != own.get(key))
            raise UserError(
                f"layer {name}: quantized already, with {key} {own.get(key)} instead of {asked.get(key)}; "
                "prepare the model as it was loaded, or add the layer to skip"
            )


def _adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Linear layers beside a `base_layer`, as peft has them: names of the module and of the layer in it."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            for below, layer in module.named_modules():
                if isinstance(layer, nn.Linear) and below.split(".")[0] != "base_layer":
                    yield name, below


def _refuse_adapters(model: nn.Module, skip: Sequence[str]) -> None:
    """Refuse to quantize adapters: one of a pair starts at zero, and would stay there."""
    left = [
        (name, below)
        for name, below in _adapters(model)
        if not any(matches(f"{name}.{below}" if name else below, pattern) for pattern in skip)
    ]
    if left:
        own = dict.fromkeys(below.split(".")[0] for _, below in left)
        raise UserError(
            f"layer {'.'.join(left[0])}: an adapter, which would stay at zero in few bits; merge adapters "
            f"before the model is prepared, or keep them beside it: skip {', '.join(own)} and the heads"
        )


def _record_grids(model: nn.Module) -> None:
    """Record the grids in the config of each model that is saved with one, by the names of its layers."""
    recorded: list[Any] = []
    for module in model.modules():  # the outermost first: the parts of a model share its config
        config = getattr(module, "config", None)
        if config is None or not hasattr(module, "save_pretrained") or any(config is c for c in recorded):
            continue
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for name, layer in quantized_layers(module).items():
            made = layer.weight_quantizer
            per_channel = made.group_size is not None or made.scale.shape[0] == layer.out_features
            kind = (_method(made), made.grid.name, made.bits, made.group_size, per_channel)
            kinds.setdefault(kind, []).append(name)
        keys = ("method", "grid", "bits", "group_size", "per_channel", "layers")
        record = [dict(zip(keys, (*k, names), strict=True)) for k, names in kinds.items()]
        if inputs := quantized_inputs(module):
            record.append({INPUTS: list(inputs)})  # a reader that does not know the entry refuses the model
        setattr(config, GRIDS, record)
        recorded.append(config)


def _method(quantizer: Quantizer) -> str:
    """A quantizer's class: by its name if it is of this package."""
    cls = type(quantizer)
    return cls.__name__ if methods().get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"

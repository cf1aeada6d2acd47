"""Quantization-aware training with any trainer: prepare a model, train it, convert it.

`prepare` swaps a model's linear layers for quantized ones in place, `convert` leaves plain layers that
compute the same. Between the two, `stableqat.parameter_groups` feeds an optimizer. The training systems of
this suite are built from the same pieces.
"""

import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from stableqat import quantizers
from stableqat.errors import UserError
from stableqat.layers.experts import fused_experts, make_plain
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.layers.trial import check_calls, forget_calls
from stableqat.quantizers import Quantizer, QuantizerFactory
from stableqat.surgery import HEADS, SurgeryReport, matches, put_back, quantize_linears

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_CONVERTED = "_stableqat_converted"
GRIDS = "stableqat"  # key of a transformers config under which `convert` leaves the grids of the layers


def prepare(
    model: Model,
    quantizer: str | QuantizerFactory = "stableqat",
    skip: str | Sequence[str] = HEADS,
    *,
    example_inputs: Any = None,
    **options: Any,
) -> Model:
    """Make a model train for low bits: its linear layers are swapped for quantized ones, in place.

    So are the experts of a mixture, be they linear layers or fused in one parameter. Weights and biases stay
    the same Parameters; each quantized layer gains a `weight_quantizer` with a learned `scale`, set from the
    weight. Make the optimizer afterwards, from `parameter_groups`. Where the model multiplies with a layer's
    weight itself, it is given the fake-quantized one.

    Args:
        model: Any module, its weights loaded, in float32. To go on from a checkpoint of a prepared model,
            prepare it in the same way and load the state dict then.
        quantizer: A method by name (ste, dsq, paretoq, stableqat), or what makes the quantizer of a weight:
            a class of `stableqat.quantizers`, or a `functools.partial` of one.
        skip: Linear layers that stay as they are: shell patterns, each for a full name or a part between
            dots, or one such pattern. Heads by default; embeddings and convolutions are never touched.
        example_inputs: What the model's forward takes: a tensor, a tuple of positional or a dictionary of
            named inputs. A trial forward shows which weights are used in another way than by calling their
            layers. None takes what a model of transformers or timm tells of its inputs, or waits for the
            first forward. Give them before you compile a model of another kind.
        options: Options of the quantizer: `bits=2`, `group_size=128`, `grid="stretched"`.

    Returns:
        The same model.

    Raises:
        UserError: If the method or an option is unknown, nothing is left to quantize, the model is prepared
            otherwise already, or a weight that would be quantized is used by another module as well, or in a
            way that would go on with its latent values. The model is then as it was.
    """
    prepare_and_report(model, quantizer, skip, example_inputs=example_inputs, **options)
    return model


def prepare_and_report(
    model: nn.Module,
    quantizer: str | QuantizerFactory,
    skip: str | Sequence[str],
    *,
    example_inputs: Any = None,
    **options: Any,
) -> SurgeryReport:
    """`prepare`, for those who keep its report."""
    skip = [skip] if isinstance(skip, str) else skip
    factory = make_factory(quantizer, options)
    _check(model, skip)
    _refuse_adapters(model, skip)
    refuse_another(model, factory, skip)
    linears = {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if type(m) is not QuantLinear and isinstance(m, nn.Linear)
    }
    report = quantize_linears(model, factory, skip, tied=False)
    try:
        report.check()
        if report.swapped and (calls := check_calls(model, _example(example_inputs))):
            calls.tell()
    except UserError:
        put_back(model, {name: linears[name] for name in report.swapped if name in linears})
        raise
    layers = quantized_layers(model).values()
    if half := next((x.weight.dtype for x in layers if x.weight.dtype.itemsize < 4), None):
        logger.warning(
            "weights are %s: small updates are lost in them; load them as float32 and train with autocast",
            half,
        )
    return report


def convert(model: Model) -> Model:
    """Make a quantized model plain again, in place: linear layers whose weights are the deployed values.

    What it computes in evaluation stays the same, bit for bit; any library loads what it saves, and
    `stableqat export` packs the folder that `save_pretrained` of a Llama or Qwen3 makes: the config says
    which layers lie on which grid. The latent weights are gone then: convert a `copy.deepcopy` to go on
    training. An embedding that shares the weight of a quantized head becomes plain with it.

    Args:
        model: A model with quantized layers.

    Returns:
        The same model.

    Raises:
        UserError: If there is nothing to convert.
    """
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]
    if not layers:
        raise UserError("the model has no quantized layer to convert; prepare it first")
    names = {name for name, _ in layers}
    if beside := [name for name, _ in _adapters(model) if f"{name}.base_layer" in names]:
        logger.warning("%s has an adapter: keep it apart, merged the weight leaves its grid", beside[0])
    _record_grids(model)
    forget_calls(model)
    make_plain(model)
    plain = {layer: layer.to_linear() for layer in dict.fromkeys(layer for _, layer in layers)}
    for name, layer in layers:
        model.set_submodule(name, plain[layer])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and _follows_a_head(module):
            model.set_submodule(name, _plain_embedding(module))
    vars(model)[_CONVERTED] = True
    return model


def was_converted(model: nn.Module) -> bool:
    """Whether `convert` made a model, or a part of it, plain."""
    return any(_CONVERTED in vars(module) for module in model.modules())


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def make_factory(quantizer: str | QuantizerFactory, options: dict[str, Any]) -> QuantizerFactory:
    """What makes the quantizer of a weight.

    Raises:
        UserError: If the method or an option is unknown.
    """
    factory = _factory(quantizer)
    _check_options(factory, options)
    return partial(factory, **options) if options else factory


def refuse_another(model: nn.Module, factory: QuantizerFactory, skip: Sequence[str]) -> None:
    """Refuse to keep a layer that is quantized in another way than the one that is asked for."""
    for name, layer in quantized_layers(model).items():
        if any(matches(name, pattern) for pattern in skip):
            continue
        asked, own = factory(layer.latent.to("meta")).describe(), layer.weight_quantizer.describe()
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
    for name, below in _adapters(model):
        if not any(matches(f"{name}.{below}" if name else below, pattern) for pattern in skip):
            raise UserError(
                f"layer {name}.{below}: an adapter, which would stay at zero in few bits; merge adapters "
                f"before the model is prepared, or keep them beside it: add {below.split('.')[0]} to skip"
            )


def _factory(quantizer: str | QuantizerFactory) -> QuantizerFactory:
    if isinstance(quantizer, Quantizer):
        raise UserError(
            f"quantizer: every weight gets one of its own; give the class {type(quantizer).__name__} and its "
            "options, not an instance"
        )
    if not isinstance(quantizer, str):
        return quantizer
    made = {name.lower(): getattr(quantizers, name) for name in quantizers.__all__}
    methods = {n: c for n, c in made.items() if isinstance(c, type) and issubclass(c, Quantizer)}
    methods.pop("quantizer")
    if quantizer.lower() not in methods:
        near = difflib.get_close_matches(quantizer.lower(), methods, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(methods)}"
        raise UserError(f"quantizer: {quantizer} is unknown; {hint}")
    return methods[quantizer.lower()]


def _check_options(factory: QuantizerFactory, options: dict[str, Any]) -> None:
    """Refuse what a method does not take; what another function takes is its own matter."""
    method = factory.func if isinstance(factory, partial) else factory
    if not (isinstance(method, type) and issubclass(method, Quantizer)):
        return
    known: list[str] = []
    for each in method.__mro__:
        parameters = inspect.signature(each).parameters.values()
        known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if each is Quantizer or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    known = sorted(set(known) - {"weight", "surrogate"})  # a method brings the latter
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(known)}"
            raise UserError(f"{option}: {method.__name__} has no such option; {hint}")


def _record_grids(model: nn.Module) -> None:
    """Leave the grids in the config of each model that is saved with one, by names within that model."""
    recorded: list[Any] = []
    for module in model.modules():  # the outermost first: the parts of a model share its config
        config = getattr(module, "config", None)
        if config is None or not hasattr(module, "save_pretrained") or any(config is c for c in recorded):
            continue
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for name, layer in quantized_layers(module).items():
            made = layer.weight_quantizer
            per_channel = made.group_size is not None or made.scale.shape[0] == layer.out_features
            kinds.setdefault((made.grid.name, made.bits, made.group_size, per_channel), []).append(name)
        keys = ("grid", "bits", "group_size", "per_channel", "layers")
        setattr(config, GRIDS, [dict(zip(keys, (*k, names), strict=True)) for k, names in kinds.items()])
        recorded.append(config)


def _follows_a_head(embedding: nn.Embedding) -> bool:
    return any(isinstance(head, QuantLinear) for head in getattr(embedding, "_head", ()))


def _plain_embedding(embedding: nn.Embedding) -> nn.Embedding:
    plain = nn.Embedding(
        embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta"
    )
    plain.weight = embedding.weight
    return plain.train(embedding.training)


def _check(model: nn.Module, skip: Sequence[str]) -> None:
    """Refuse a `skip` that leaves nothing, or names what is not there."""
    linears = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    linears += [f"{name}.{key}" if name else key for name, _, key in fused_experts(model)]
    if all(any(matches(name, pattern) for pattern in skip) for name in linears):
        raise UserError(
            f"skip: {', '.join(skip)} leaves none of the model's {len(linears)} linear layers to quantize"
        )
    for pattern in skip:
        if pattern not in HEADS and not any(matches(name, pattern) for name in linears):
            raise UserError(f"skip: {pattern} matches no linear layer; correct it or leave it out")

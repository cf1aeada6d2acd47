"""Surgery: swap a model's linear layers for quantized ones, in place, and report what was done.

A layer keeps its Parameters, names and hooks, see `QuantLinear`; running the surgery twice changes nothing.
Only layers that compute what `nn.Linear` does are swapped: a subclass with its own computation stays as it
is. One factory makes all quantizers, or a mapping from layer patterns to factories gives layers different
widths and methods; the first pattern that matches wins.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from stableqat.errors import UserError, counted
from stableqat.layers.eligibility import computed_from, is_plain
from stableqat.layers.experts import as_rows, fused_experts, make_plain, quantize_experts, quantized_experts
from stableqat.layers.group import group_layers
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.quantizers import Quantizer, QuantizerFactory, QuantizerSpec
from stableqat.quantizers.choice import Choice, matches
from stableqat.quantizers.inputs import InputQuantizer, InputQuantizerSpec, make_input_quantizer
from stableqat.terminal import progress

logger = logging.getLogger(__name__)

HEADS = ("lm_head", "head", "head_dist", "classifier", "score")  # as transformers and timm name them


@dataclass
class SurgeryReport:
    """What `quantize_linears` did.

    Attributes:
        swapped: Names of the layers that are now quantized, followed by the parameters of fused experts.
        fused: Number of these parameters.
        skipped: Names of the linear layers left alone, each with the reason.
        quantized_weights: Number of quantized weights.
        matrix_weights: Number of weights in matrices and convolutions, without embeddings, which are looked
            up, and heads that are left alone.
        others: Names of modules other than linear layers whose matrices are not quantized, each with its
            share of `matrix_weights`.
        patterns: For a mapping, the pattern that chose, by layer, in the order of the mapping; also where it
            chose full precision.
        kinds: Method, width and grid of each quantizer, by layer, with those of its input.
    """

    swapped: list[str] = field(default_factory=list)
    fused: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    quantized_weights: int = 0
    matrix_weights: int = 0
    others: dict[str, float] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """Share of the matrix weights that are quantized."""
        return self.quantized_weights / max(self.matrix_weights, 1)

    def check(self) -> None:
        """Warn if less than half of the weights are quantized.

        Raises:
            UserError: If there are weights and none is quantized.
        """
        if self.matrix_weights and not self.quantized_weights:
            reasons = dict.fromkeys(self.skipped.values()) | dict.fromkeys(self.others)
            raise UserError(
                f"none of the model's weights would be quantized: its matrices are in "
                f"{', '.join(list(reasons)[:3])}; only layers that compute what nn.Linear does are"
            )
        if self.quantized_share < 0.5:
            left = "; ".join(self.left_alone()[:3])
            logger.warning("less than half of the model is quantized: %s; left alone: %s", self, left)

    def __str__(self) -> str:
        layers = counted(len(self.swapped) - self.fused, "linear layer")
        fused = f" and {counted(self.fused, 'parameter')} of fused experts" if self.fused else ""
        share = f"{self.quantized_share:.1%} of the matrix weights outside embeddings and heads"
        return f"{layers}{fused} quantized, {share}"

    def left_alone(self) -> list[str]:
        """What is not quantized, in a line per reason, and the largest matrices outside linear layers."""
        lines = []
        for why in dict.fromkeys(self.skipped.values()):
            first, *more = [name for name, reason in self.skipped.items() if reason == why]
            lines.append(f"{first}{f' and {len(more)} more' if more else ''} ({why})")
        largest = sorted(self.others, key=self.others.__getitem__, reverse=True)[:3]
        return [*lines, *(f"{name} ({self.others[name]:.1%} of the weights)" for name in largest)]

    def lines(self) -> str:
        """The whole report, one line per layer."""
        left = {**self.skipped, **{name: f"{part:.2%} of the weights" for name, part in self.others.items()}}
        by = {name: f" ({pattern})" for name, pattern in self.patterns.items()}
        chosen = [f"  {name}: {self.kinds[name]}{by.get(name, '')}" for name in self.swapped]
        parts = [str(self), "", "quantized:", *chosen]
        return "\n".join([*parts, "", "left alone:", *[f"  {k}: {why}" for k, why in left.items()], ""])

    def count(self, model: nn.Module, quantized: set[Tensor]) -> None:
        """Fill in the numbers of weights.

        Args:
            model: The model after surgery.
            quantized: Its weights that are quantized.
        """
        uncounted = {p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
        for name, module in model.named_modules():
            head = isinstance(module, nn.Linear) and not {*HEADS}.isdisjoint(name.split("."))
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or head:
                uncounted.update(set(module.parameters(recurse=False)) - quantized)
        others: dict[str, int] = {}
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                # tables of positions and tokens have a first dimension of one
                few = parameter.ndim < 2 or parameter.shape[0] == 1 or key.endswith("bias")
                if few or parameter in uncounted:
                    continue
                uncounted.add(parameter)  # once
                self.matrix_weights += parameter.numel()
                if parameter in quantized:
                    self.quantized_weights += parameter.numel()
                elif not isinstance(module, nn.Linear):
                    others[name] = others.get(name, 0) + parameter.numel()
        self.others = {name: number / self.matrix_weights for name, number in others.items()}


def quantize_linears(
    model: nn.Module,
    quantizer: QuantizerSpec,
    skip: Sequence[str] = (),
    *,
    input_quantizer: InputQuantizerSpec | None = None,
    initialize: bool = True,
    recompute: bool | None = None,
    tied: bool = True,
) -> SurgeryReport:
    """Replace the linear layers of `model` in place, and quantize the matrices of fused experts.

    The caller checks whether the model reads weights itself instead of calling their layers, as `prepare` and
    the training systems do.

    Args:
        model: Any module, also on the meta device.
        quantizer: Makes a layer's quantizer from its weight; or a mapping of such factories by layer pattern:
            the first pattern that matches wins, and null leaves the layer in full precision.
        skip: Shell patterns; a layer is left alone if one matches its full name or a part between dots.
        input_quantizer: Makes the quantizer of a quantized layer's input from its number of features, or a
            mapping as above, where null leaves inputs as they are. Calibration sets its scales.
        initialize: Set the scales from the weights. False leaves them unset (NaN), for a state dict
            that follows.
        recompute: See `QuantLinear`.
        tied: Let embeddings share a quantized weight. They look up latent values until they are made to
            follow, as the training systems of this suite do.

    Returns:
        Which layers were swapped, which were not, and why.

    Raises:
        UserError: If a quantizer refuses a weight, another module uses the weight too, the weight is computed
            in every forward, or no pattern matches a layer (naming the layer); if a pattern chooses no layer;
            or if `model` is itself a layer. The model is then unchanged.
    """
    if isinstance(model, nn.Linear):
        raise UserError("a single Linear cannot be swapped in place; wrap it, or use QuantLinear.from_linear")
    report, choice = SurgeryReport(), Choice[QuantizerFactory](quantizer, skip)
    inputs = None if input_quantizer is None else Choice(input_quantizer, (), "input_quantizer")
    chosen: dict[str, nn.Linear] = {}
    factories: dict[str, QuantizerFactory] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        if why := choice.left(name, quantized=isinstance(module, QuantLinear)):
            report.skipped[name] = why
        elif (made_of := computed_from(module)) is not None:
            raise UserError(
                f"layer {name}: its weight is computed from {made_of} in every forward (pruning, weight or "
                f"spectral norm); make it permanent first, or add {name.split('.')[-1]} to skip"
            )
        elif not is_plain(module):
            report.skipped[name] = f"a {type(module).__name__}, not a plain Linear"
        elif (factory := choice.of(name)) is None:
            report.skipped[name] = f"quantizer: {choice.pattern(name)} is null"
        else:
            chosen[name], factories[name] = module, factory
    _refuse_shared(model, chosen, tied)
    replacements: dict[nn.Linear, QuantLinear] = {}
    with progress(len(chosen)) as show:
        for number, (name, linear) in enumerate(chosen.items(), 1):
            if linear not in replacements:  # one module under two names stays one module
                try:
                    made = make_quantizer(linear.weight, factories[name], initialize)
                except UserError as error:
                    raise UserError(f"layer {choice.named(name)}: {error}") from error
                makes = None if inputs is None else inputs.of(name)
                of_input = make_input_quantizer(makes, linear.in_features, linear.weight.device)
                replacements[linear] = QuantLinear.from_linear(linear, made, of_input)
                replacements[linear].recompute = recompute
            show(number, f"quantized {number} of {counted(len(chosen), 'layer')}")
    experts = _quantizers_of_experts(model, choice, initialize, report)
    choice.check()
    if inputs is not None:
        inputs.check()
        if experts:
            raise UserError(
                f"input_quantizer: {next(iter(experts))} belongs to fused experts, whose inputs are not "
                "quantized; add it to skip, or leave input_quantizer out"
            )
    for name, linear in chosen.items():  # once every weight has its quantizer: all layers or none
        model.set_submodule(name, layer := replacements[linear])
        _freeze(linear.weight, layer.weight_quantizer)
    for module, key, quantizer in experts.values():
        quantize_experts(module, key, quantizer)
        _freeze(module.get_parameter(key), quantizer)
    report.swapped, report.fused = [*chosen, *experts], len(experts)
    made_by_name = {name: replacements[linear].weight_quantizer for name, linear in chosen.items()}
    made_by_name |= {name: of_experts for name, (_, _, of_experts) in experts.items()}
    report.kinds = {name: made.kind_in_words for name, made in made_by_name.items()}
    for name, linear in chosen.items():
        if isinstance(of_input := replacements[linear].input_quantizer, InputQuantizer):
            report.kinds[name] += f", input {of_input.in_words}"
    if isinstance(quantizer, Mapping):
        report.patterns = {name: p for p in quantizer for name, own in choice.chosen.items() if own == p}
    group_layers(model, list(replacements.values()))
    _leave_fast_path(model)
    of_experts = {cast(Tensor, m._parameters[key]) for m, key, _ in quantized_experts(model).values()}
    report.count(model, of_experts | {layer.latent for layer in quantized_layers(model).values()})
    if not any(parameter.is_meta for parameter in model.parameters()):  # or the model is only looked at
        logger.info("%s", report)
        for left in report.left_alone():
            logger.info("left alone: %s", left)
    return report


def put_back(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Undo a surgery.

    Args:
        model: The model.
        linears: The layers before the surgery, by name.
    """
    make_plain(model, deploy=False)
    for name, linear in linears.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantLinear):
            if layer._group is not None:
                layer._group.dissolve()
            if not layer.weight_quantizer.trains_weight:
                linear.weight.requires_grad_(True)
            model.set_submodule(name, linear)


def check_skip(model: nn.Module, skip: Sequence[str], optional: Sequence[str] = HEADS) -> None:
    """Refuse a `skip` that leaves nothing to quantize, or a pattern in it that selects nothing.

    Args:
        model: The model, before or after surgery.
        skip: The patterns.
        optional: Patterns that may select nothing, as a default has them for other models.

    Raises:
        UserError: Naming the pattern.
    """
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    names += [name for name, _, _ in fused_experts(model)]
    if not names:
        raise UserError("the model has no linear layer to quantize")
    if all(any(matches(name, pattern) for pattern in skip) for name in names):
        raise UserError(
            f"skip: {', '.join(skip)} leaves none of the {counted(len(names), 'linear layer')} to quantize; "
            "skip fewer, or train without a quantizer"
        )
    for pattern in skip:
        if pattern not in optional and not any(matches(name, pattern) for name in names):
            raise UserError(f"skip: {pattern} matches no linear layer; correct it or leave it out")


def _quantizers_of_experts(
    model: nn.Module, choice: Choice, initialize: bool, report: SurgeryReport
) -> dict[str, tuple[nn.Module, str, Quantizer]]:
    """Module, parameter name and new quantizer of the fused experts to quantize, by full name."""
    made = {}
    for name, module, key in fused_experts(model):
        if why := choice.left(name, quantized=name in quantized_experts(model)):
            report.skipped[name] = why
        elif (factory := choice.of(name)) is None:
            report.skipped[name] = f"quantizer: {choice.pattern(name)} is null"
        else:
            rows = as_rows(module, module.get_parameter(key))
            try:
                made[name] = module, key, make_quantizer(rows, factory, initialize)
            except UserError as error:
                raise UserError(f"layer {choice.named(name)}: {error}") from error
    return made


def _refuse_shared(model: nn.Module, layers: dict[str, nn.Linear], tied: bool) -> None:
    users: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        if not (tied and isinstance(module, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, set()).add(module)
    for name, layer in layers.items():
        if others := users.get(layer.weight, set()) - {layer}:
            other = next(n for n, m in model.named_modules() if m in others)
            raise UserError(
                f"layer {name}: {other} has the same weight and would keep using its latent values; add "
                f"{name.split('.')[-1]} to skip"
            )


def _leave_fast_path(model: nn.Module) -> None:
    """Make the conditions of torch's fused encoder fail: it reads weights without calling their layers."""
    encoders = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    for module in model.modules():
        if isinstance(module, encoders) and quantized_layers(module):
            vars(module).update(activation_relu_or_gelu=0, use_nested_tensor=False)


def _freeze(weight: Tensor, quantizer: Quantizer) -> None:
    if not quantizer.trains_weight:
        weight.requires_grad_(False)


def make_quantizer(weight: Tensor, factory: QuantizerFactory, initialize: bool = True) -> Quantizer:
    """Call a factory, which may be a user's.

    Args:
        weight: The weight.
        factory: Makes its quantizer.
        initialize: Set the scales from the weight; False leaves them unset (NaN).

    Raises:
        UserError: If it makes no quantizer.
    """
    unset = not (initialize or weight.is_meta)
    quantizer = factory(weight.to("meta") if unset else weight)
    if not isinstance(quantizer, Quantizer):
        made = type(quantizer).__name__
        raise UserError(f"quantizer: the factory returns {made}; it must return a Quantizer")
    if not unset:
        return quantizer
    quantizer.to_empty(device=weight.device)
    for parameter in quantizer.parameters():
        if parameter.is_floating_point():
            nn.init.constant_(parameter, torch.nan)  # to be noticed if no state dict follows
    return quantizer

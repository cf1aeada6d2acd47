"""Swap a model's linear layers for quantized ones, in place, keeping everything else.

`QuantLinear` computes `F.linear(input_quantizer(x), weight_quantizer(weight), bias)` on the very
Parameters of the layer it replaces, so ties, optimizers and state-dict keys survive; a quantizer only adds
keys of its own beside, and hooks of forward and backward stay. What is swapped computes what `nn.Linear`
does: a subclass with a computation of its own is not ours to replace. Running the surgery twice changes
nothing. While weights stay as they are, in evaluation or between the micro-steps of an accumulated gradient,
`hold_weights` keeps what they become.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from stableqat.errors import UserError
from stableqat.layers.eligibility import computed_from, is_plain
from stableqat.layers.experts import as_rows, fused_experts, make_plain, quantize_experts, quantized_experts
from stableqat.layers.group import group_layers
from stableqat.layers.linear import QuantLinear, quantized_layers
from stableqat.quantizers import Quantizer, QuantizerFactory

logger = logging.getLogger(__name__)

HEADS = ("lm_head", "head", "head_dist", "classifier", "score")  # as transformers and timm name them


@dataclass
class SurgeryReport:
    """What `quantize_linears` did.

    Attributes:
        swapped: Names of the layers, and at the end of the parameters of fused experts, that are quantized
            now.
        fused: Number of the latter.
        skipped: Names of linear layers left alone, each with the reason.
        unmatched: Skip patterns that matched no linear layer.
        quantized_weights: Number of quantized weights.
        matrix_weights: Number of weights in matrices and convolutions. Embeddings, which are looked up, and
            heads that stay as they are do not count.
        others: Names of modules whose matrices are not quantized and are in no linear layer, each with its
            share of `matrix_weights`.
    """

    swapped: list[str] = field(default_factory=list)
    fused: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    quantized_weights: int = 0
    matrix_weights: int = 0
    others: dict[str, float] = field(default_factory=dict)

    @property
    def quantized_share(self) -> float:
        """Which share of the matrix weights is quantized."""
        return self.quantized_weights / max(self.matrix_weights, 1)

    def check(self) -> None:
        """Warn where less than half of the weights is quantized.

        Raises:
            UserError: If there are weights, and none is quantized.
        """
        if self.matrix_weights and not self.quantized_weights:
            reasons = dict.fromkeys(self.skipped.values()) | dict.fromkeys(self.others)
            raise UserError(
                f"none of the model's weights would be quantized: its matrices are in "
                f"{', '.join(list(reasons)[:3])}; only layers that compute what nn.Linear does are"
            )
        if self.quantized_share < 0.5:
            logger.warning("less than half of the model is quantized: %s", self)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
        quantized, left = len(self.swapped) - self.fused, len(self.skipped)
        fused = f" and {self.fused} parameters of fused experts" if self.fused else ""
        largest = sorted(self.others, key=self.others.__getitem__, reverse=True)
        others = "".join(f"; {name} ({self.others[name]:.1%} of the weights)" for name in largest[:3])
        more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
        return (
            f"{quantized} linear layers{fused} quantized, {self.quantized_share:.1%} of the matrix weights "
            f"outside embeddings and heads; {left} left alone: {reasons or 'none'}{others}{more}"
        )

    def lines(self) -> str:
        """All of it, a line for each layer."""
        left = {**self.skipped, **{name: f"{part:.2%} of the weights" for name, part in self.others.items()}}
        parts = [str(self).partition(";")[0], "", "quantized:", *[f"  {name}" for name in self.swapped]]
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
                # a first dimension of one is that of a table of positions or a token
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
    quantizer: QuantizerFactory,
    skip: Sequence[str] = (),
    *,
    initialize: bool = True,
    recompute: bool | None = None,
    tied: bool = True,
) -> SurgeryReport:
    """Replace the linear layers of `model` in place, and quantize the matrices of fused experts.

    Whether the model calls the layers, or reads their weights itself, the caller checks, as `prepare`
    and the training systems do.

    Args:
        model: Any module; may live on the meta device.
        quantizer: Makes a layer's quantizer from its weight.
        skip: Shell patterns; a layer is left alone if one matches its full name or a part between dots.
        initialize: Set the scales from the weights. False leaves them unset (NaN), for a state dict
            that follows.
        recompute: See `QuantLinear`.
        tied: Let embeddings share a quantized weight. They look up latent values until something makes them
            follow, as the training systems of this suite do.

    Returns:
        Which layers were swapped, which were not, and why.

    Raises:
        UserError: With the layer's name, if a quantizer refuses its weight, another module uses the weight
            as well, or something computes it in every forward; if `model` is itself a layer. The model is
            then as it was.
    """
    if isinstance(model, nn.Linear):
        raise UserError("a single Linear cannot be swapped in place; wrap it, or use QuantLinear.from_linear")
    report = SurgeryReport()
    chosen: dict[str, nn.Linear] = {}
    used_patterns: set[str] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        matching = [p for p in skip if matches(name, p)]
        used_patterns.update(matching)
        if isinstance(module, QuantLinear):
            report.skipped[name] = "quantized already"
        elif matching:
            report.skipped[name] = f"skip: {matching[0]}"
        elif (made_of := computed_from(module)) is not None:
            raise UserError(
                f"layer {name}: its weight is computed from {made_of} in every forward (pruning, weight or "
                f"spectral norm); make it permanent first, or add {name.split('.')[-1]} to skip"
            )
        elif not is_plain(module):
            report.skipped[name] = f"a {type(module).__name__}, not a plain Linear"
        else:
            chosen[name] = module
    _refuse_shared(model, chosen, tied)
    replacements: dict[nn.Linear, QuantLinear] = {}
    for name, linear in chosen.items():
        if linear not in replacements:  # one module under two names stays one module
            try:
                made = _make_quantizer(linear.weight, quantizer, initialize)
            except UserError as error:
                raise UserError(f"layer {name}: {error}") from error
            replacements[linear] = QuantLinear.from_linear(linear, made)
            replacements[linear].recompute = recompute
    experts = _quantizers_of_experts(model, quantizer, skip, initialize, report, used_patterns)
    for name, linear in chosen.items():  # once every weight has its quantizer: all layers or none
        model.set_submodule(name, replacements[linear])
    for module, key, made in experts.values():
        quantize_experts(module, key, made)
    report.swapped, report.fused = [*chosen, *experts], len(experts)
    group_layers(model, list(replacements.values()))
    report.unmatched = [p for p in skip if p not in used_patterns]
    _leave_fast_path(model)
    of_experts = {cast(Tensor, m._parameters[key]) for m, key, _ in quantized_experts(model).values()}
    report.count(model, of_experts | {layer.latent for layer in quantized_layers(model).values()})
    logger.info("%s", report)
    return report


def put_back(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Undo a surgery.

    Args:
        model: The model.
        linears: The layers that were there before, by name.
    """
    make_plain(model, deploy=False)
    for name, linear in linears.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantLinear):
            if layer._group is not None:
                layer._group.dissolve()
            model.set_submodule(name, linear)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `skip` means a layer: it matches the full name or a part between dots."""
    return any(fnmatchcase(part, pattern) for part in (name, *name.split(".")))


def _quantizers_of_experts(
    model: nn.Module,
    factory: QuantizerFactory,
    skip: Sequence[str],
    initialize: bool,
    report: SurgeryReport,
    used_patterns: set[str],
) -> dict[str, tuple[nn.Module, str, Quantizer]]:
    """Module, parameter's name and new quantizer of the fused experts to quantize, by full name."""
    made = {}
    for prefix, module, key in fused_experts(model):
        name = f"{prefix}.{key}" if prefix else key
        matching = [p for p in skip if matches(name, p)]
        used_patterns.update(matching)
        if name in quantized_experts(model):
            report.skipped[name] = "quantized already"
        elif matching:
            report.skipped[name] = f"skip: {matching[0]}"
        else:
            try:
                made[name] = module, key, _make_quantizer(as_rows(module, key), factory, initialize)
            except UserError as error:
                raise UserError(f"layer {name}: {error}") from error
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
                f"layer {name}: {other} has the same weight and would go on with its latent values; add "
                f"{name.split('.')[-1]} to skip"
            )


def _leave_fast_path(model: nn.Module) -> None:
    """Torch's fused encoder reads weights without calling their layers: let its own conditions fail."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and quantized_layers(
            module
        ):
            vars(module).update(activation_relu_or_gelu=0, use_nested_tensor=False)


def _make_quantizer(weight: Tensor, factory: QuantizerFactory, initialize: bool) -> Quantizer:
    if initialize or weight.is_meta:
        return factory(weight)
    quantizer = factory(weight.to("meta")).to_empty(device=weight.device)
    for parameter in quantizer.parameters():
        nn.init.constant_(parameter, torch.nan)  # loud, should no state dict follow
    return quantizer

"""Swap a model's linear layers for quantized ones, in place, keeping everything else.

`QuantLinear` computes `F.linear(input_quantizer(x), weight_quantizer(weight), bias)` on the very
Parameters of the layer it replaces, so ties, optimizers and state-dict keys survive; a quantizer only adds
keys of its own beside, and hooks of forward and backward stay. What is swapped computes what `nn.Linear`
does: a subclass with a computation of its own is not ours to replace. Running the surgery twice changes
nothing. While weights stay as they are, in evaluation or between the micro-steps of an accumulated gradient,
`hold_weights` keeps what they become.
"""

import logging
from collections.abc import Hashable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stableqat import ops
from stableqat.errors import UserError
from stableqat.experts import as_rows, fused_experts, make_plain, quantize_experts, quantized_experts
from stableqat.linears import SurgeryReport, computed_from, is_plain
from stableqat.quantizers import Quantizer, QuantizerFactory

logger = logging.getLogger(__name__)

MOST_IN_GROUP = ops.TOGETHER  # quantized layers of a block
FEW_ROWS = 2048  # up to here a step on a GPU waits for launches, beyond it for arithmetic


class QuantLinear(nn.Linear):
    """A linear layer whose weight is fake-quantized.

    The latent weight stays a full-precision Parameter under its own name. What it becomes is computed in
    every forward, unless it is held.

    Attributes:
        weight_quantizer: Quantizer of the weight.
        input_quantizer: Module applied to the activations, or None.
        recompute: Recompute the fake-quantized weight in the backward instead of saving it (a held one is
            there anyway). None does on a GPU, where it costs next to nothing, except where a block's
            layers are fake-quantized together: at small batches, and where activations outweigh weights.
    """

    weight_quantizer: Quantizer
    input_quantizer: nn.Module | None
    recompute: bool | None
    _group: "_Group | None"
    _place: int  # among the layers of its group
    _held: tuple[Tensor, list[tuple[Tensor, int]]] | None  # value, and of which parameters in which versions

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: nn.Module | None = None
    ) -> "QuantLinear":
        """Wrap the Parameters of `linear`, without copying them, and its forward and backward hooks.

        Args:
            linear: The layer to replace.
            weight_quantizer: Quantizer of its weight.
            input_quantizer: Module applied to the activations; None leaves them alone.

        Returns:
            The quantized layer.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer, layer.input_quantizer = weight_quantizer, input_quantizer
        layer.recompute = layer._group = layer._held = None
        _keep_hooks(linear, layer)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The plain layer on the same Parameters, the weight set to its deployed value.

        Raises:
            UserError: If activations are quantized, too, which no weight can hold.
        """
        if self.input_quantizer is not None:
            raise UserError("a layer that quantizes its input cannot become a plain Linear")
        if self._group is not None:
            self._group.dissolve()
        self.release()
        self.weight.copy_(self.weight_quantizer.quantize(self.weight).dequantize())
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        _keep_hooks(self, linear)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        if (value := self._value_of_group()) is not None:
            return F.linear(input, value, self.bias)
        return self.weight_quantizer.linear(
            input, self.latent, self.bias, recompute=self.recompute, value=self.held_value()
        )

    def value(self) -> Tensor:
        """The fake-quantized weight, for whatever multiplies with it without calling the layer."""
        if (value := self._value_of_group()) is not None:
            return value
        if not self.weight_quantizer.fuses:
            return self.weight_quantizer(self.latent)
        return self.weight_quantizer.many([self.bundle()], [self.held_value()])[0]

    def bundle(self) -> ops.Weight:
        """The weight with its quantizer's parameters."""
        # called for every layer in every step: without the module's search for attributes
        quantizer = cast(Quantizer, self._modules["weight_quantizer"])
        return quantizer.bundle(self.latent)

    @property
    def latent(self) -> Tensor:
        """The latent weight, also while a module that reads `weight` is shown the fake-quantized one."""
        weight = self._parameters.get("weight")  # not there if it is parametrized, or a replica's
        return self.weight if weight is None else weight

    def _value_of_group(self) -> Tensor | None:
        group = self._group
        if group is None or group.values is None:
            return None
        value = group.values[self._place]
        # a region inside the block may have switched autocast or gradients
        usable = value.dtype == ops.compute_dtype(self.latent)
        usable = usable and (value.requires_grad or not torch.is_grad_enabled())
        if usable and not torch.compiler.is_compiling():
            # inside a checkpoint that the block has not entered, the recomputation would not find it again
            usable = _saving() == group.saving
        return value if usable else None

    @property
    def implementation(self) -> str:
        """What fake-quantizes the weight where it is now: triton or torch."""
        return self.weight_quantizer.implementation(self.latent)

    @torch.inference_mode(False)  # so that training may use it, too
    @torch.no_grad()
    def hold(self) -> None:
        """Keep the fake-quantized weight for forwards to come, until `release` or until a parameter changes.

        The value has the type of the autocast region of this call. A quantizer with a forward of its own,
        which may be stochastic, is not held.
        """
        if self.weight_quantizer.fuses and self.held_value() is None:
            self._held = self.weight_quantizer(self.latent), self._versions()

    def release(self) -> None:
        """Forget what `hold` kept."""
        self._held = None

    def held_value(self) -> Tensor | None:
        """What `hold` kept, while it is right."""
        if self._held is None:
            return None
        value, made_of = self._held
        # a compiled graph cannot ask for versions: whoever holds releases before weights change
        if torch.compiler.is_compiling():
            return value
        now = self._versions()
        if len(now) == len(made_of) and all(
            p is q and v == w for (p, v), (q, w) in zip(made_of, now, strict=True)
        ):
            return value
        self.release()
        return None

    def _versions(self) -> list[tuple[Tensor, int]]:
        parameters = (self.latent, *self.weight_quantizer.parameters())
        return [(p, 0 if p.is_inference() else p._version) for p in parameters]

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        self.release()  # moved to another device or type
        return super()._apply(fn, recurse)


class _Group:
    """Fake-quantizes the weights of a block in one operation, just before the block's forward.

    At small batches a training step takes the time of its calls and launches, not that of its arithmetic.
    The values are kept for the backward, so this is for where their memory is no matter: few rows, whose
    step is bound by launches, or more activations than weights.

    Args:
        layers: The block's quantized layers.
    """

    def __init__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self.elements = sum(layer.weight.numel() for layer in layers)
        self.values: tuple[Tensor, ...] | None = None
        self.saving: Any = None
        for place, layer in enumerate(layers):
            layer._group, layer._place = self, place
        self.hooks: tuple[RemovableHandle, ...] = ()

    def attach(self, block: nn.Module) -> None:
        """Run around the forward of a block, until `dissolve`."""
        self.hooks = (
            block.register_forward_pre_hook(self.before, with_kwargs=True),
            block.register_forward_hook(self.after, always_call=True),
        )

    def dissolve(self) -> None:
        """Leave each layer to itself."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer._group = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: compute what the layers will use."""
        self.values = None
        if "_is_replica" in vars(module):
            return  # of DataParallel: it has weights of its own, and all replicas share this group
        layers, first = self.layers, self.layers[0]
        input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
        if input is None or not self._pays(input) or any(layer.recompute is True for layer in layers):
            return
        weights = [layer.bundle() for layer in layers]
        if first.implementation != "triton" or any(isinstance(weight.x, DTensor) for weight in weights):
            return
        held = [layer.held_value() for layer in layers]
        if torch.compiler.is_compiling() and any(value is not None for value in held):
            return  # each layer's own graph node takes its held value
        self.values = first.weight_quantizer.many(weights, held)
        if not torch.compiler.is_compiling():
            self.saving = _saving()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also after an exception: values and their graph last no longer than the forward."""
        self.values = None

    def _pays(self, input: Tensor) -> bool:
        elements = input.numel()
        rows = elements // input.shape[-1] if input.is_floating_point() else elements
        return rows <= FEW_ROWS or elements >= self.elements


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
    _group(model, list(replacements.values()))
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


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `skip` means a layer: it matches the full name or a part between dots."""
    return any(fnmatchcase(part, pattern) for part in (name, *name.split(".")))


def hold_weights(model: nn.Module) -> None:
    """Compute the fake-quantized weight of each layer once, for all forwards until `release_weights`.

    For as long as weights stay as they are: evaluation, micro-steps of an accumulated gradient. It takes the
    memory of the weights in the compute type. An eager forward notices a parameter that changed in place
    and computes afresh; fused optimizers and writes to `.data` leave no trace, and a compiled forward does
    not look, so call `release_weights` before them. A model sharded by FSDP2 is left alone: each rank
    would keep all of it.

    Args:
        model: Holds the layers; call it in the autocast region that the forwards run in.
    """
    if not any(isinstance(m, FSDPModule) for m in model.modules()):
        for layer in quantized_layers(model).values():
            layer.hold()


def release_weights(model: nn.Module) -> None:
    """Forget what `hold_weights` kept."""
    for layer in quantized_layers(model).values():
        layer.release()


def _saving() -> Any:
    """The hooks that saved tensors go through here: a checkpoint's, for example."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _group(model: nn.Module, layers: list[QuantLinear]) -> None:
    """Let layers that are quantized alike be fake-quantized together.

    A group lies in one block, the largest module with few enough of them.
    """
    left: dict[Hashable, set[QuantLinear]] = {}
    for layer in layers:
        left.setdefault(layer.weight_quantizer.kind, set()).add(layer)
    left.pop(None, None)
    for alike in left.values():
        for module in model.modules():
            within = [each for each in module.modules() if each in alike]
            if 1 < len(within) <= MOST_IN_GROUP:
                _Group(within).attach(module)
                alike.difference_update(within)


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


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    # the very dicts: whoever registered a hook can still remove it
    kept = ("_forward_", "_backward_", "_is_full_backward_")
    vars(new).update({name: value for name, value in vars(old).items() if name.startswith(kept)})


def _make_quantizer(weight: Tensor, factory: QuantizerFactory, initialize: bool) -> Quantizer:
    if initialize or weight.is_meta:
        return factory(weight)
    quantizer = factory(weight.to("meta")).to_empty(device=weight.device)
    for parameter in quantizer.parameters():
        nn.init.constant_(parameter, torch.nan)  # loud, should no state dict follow
    return quantizer

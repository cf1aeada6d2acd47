"""The `Quantizer` strategy: one per weight, it owns the grid, the learned scale and the surrogate.

Two orthogonal choices make a method: the grid (where are the levels?) and the surrogate (what replaces the
derivative of round?). A subclass names a pair and its defaults; users can override both, so that a comparison
changes one thing only. `value = scale * (code - zero_point)`.

To add a method: one file with a subclass here, one import line in `__init__`, one overlay per family. A
soft or stochastic method overrides `forward`; one that rounds a tensor other than the weight overrides
`latent` and `set_latent`; `progress`, `penalty` and `after_step` follow training. No method overrides
`quantize`, which gives what is deployed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from stableqat import ops
from stableqat.errors import LARGEST, UserError, check_known, check_range
from stableqat.quantizers.options import scale_shape, special_grid, width_of
from stableqat.quantizers.oscillation import Freezing
from stableqat.quantizers.position import Position
from stableqat.quantizers.quantized_weight import QuantizedWeight
from stableqat.quantizers.shard import local

FLOOR = 1e-4  # of the initial scale

Role = Literal["scale", "weight", "factor"]


class Quantizer(nn.Module, ABC):
    """Base of all methods: a grid, a learned scale with its floor, a surrogate.

    The parameter `scale` is the distance between levels, `(out, 1)`, `(out, groups)` or `(1, 1)`. It is
    allocated from shapes alone and set from the weight's values: at once or, if the weight is on the meta
    device, by `initialize` after loading. The forward never uses less than `scale_floor` (1e-4 of the initial
    scale), and the gradient still reaches the scale there.

    Args:
        weight: The latent weight that this quantizer is for, `(out, ...)`.
        surrogate: Replaces the derivative of round, and holds the mask.
        bits: Storage width of a code, 1 to 8; 1 means the binary grid.
        levels: Number of levels, in place of bits; 3 is ternary.
        grid: integer, stretched, ternary or binary. Default: the method's own for this width.
        scale_init: signed_mse, mse, max, lsq or absmax_as_step; docs/methods.md has the formulas.
        per_channel: One scale per row, or one for the whole tensor if false.
        group_size: One scale per run of this many inputs in a row.
        dampening: End value of the penalty that draws weights to their levels; 0 for none (docs/methods.md).
        freezing: End value of the frequency above which oscillating weights are frozen, such as 0.01; null
            freezes none.

    Raises:
        UserError: If an option is unknown or out of range, the grid does not exist at this width, or
            `group_size` does not divide the inputs.
    """

    scale: nn.Parameter
    scale_floor: nn.Parameter
    position: Position | None = None  # where training is, once `stableqat.follow` says so
    is_control = False  # True: a control for another method
    trains_weight = True  # False: surgery freezes the layer's weight; the method trains its own parameters

    @abstractmethod  # a method brings its surrogate
    def __init__(
        self,
        weight: Tensor,
        *,
        surrogate: ops.Surrogate,
        bits: int | None = None,
        levels: int | None = None,
        grid: ops.GridName | None = None,
        scale_init: ops.ScaleInit = "signed_mse",
        per_channel: bool = True,
        group_size: int | None = None,
        dampening: float = 0.0,
        freezing: float | None = None,
    ) -> None:
        super().__init__()
        check_range("dampening", dampening, 0, LARGEST)
        check_range("freezing", freezing, 0, 1, null=True)
        if freezing is not None and not self.trains_weight:
            raise UserError(f"freezing: {type(self).__name__} does not train the weight; leave it out")
        check_known("mask", surrogate.mask, get_args(ops.Mask))
        check_known("scale_init", scale_init, get_args(ops.ScaleInit))
        width = width_of(bits, levels, grid)
        self.grid = ops.make_grid(grid or special_grid(width, levels) or self.default_grid(width), width)
        self.surrogate = surrogate
        self.scale_init = scale_init
        self.group_size = group_size
        self.weight_shape = tuple(weight.shape)
        self.dampening = dampening
        self.freezing = None if freezing is None else Freezing(freezing, weight)
        shape = scale_shape(weight, per_channel, group_size)
        self.allocate(shape, dtype=torch.float32, device=weight.device)
        if not weight.is_meta:
            self.initialize(weight)

    @classmethod
    def default_grid(cls, bits: int) -> ops.GridName:
        """The method's default grid for `bits` >= 2."""
        return "integer"

    @property
    def bits(self) -> int:
        """Storage width of a code."""
        return self.grid.bits

    def allocate(self, shape: tuple[int, int], **options: Any) -> None:
        """Create the parameters, unset (NaN); a method with more parameters extends this.

        Make state shaped like the weight (`weight_shape`) a frozen parameter, so that FSDP shards it, and let
        `initialize` set it to finite values: a run ends if a parameter is not finite.

        Args:
            shape: Shape of the scale.
            options: `dtype` and `device` of the parameters.
        """
        self.scale = nn.Parameter(torch.full(shape, torch.nan, **options))
        # a frozen parameter, not a buffer: FSDP shards it row by row together with its scale
        self.scale_floor = nn.Parameter(torch.full(shape, torch.nan, **options), requires_grad=False)

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set the scale, and its floor, from the values of a weight.

        Args:
            weight: Latent weight with values, shaped like the one given to the constructor.

        Raises:
            UserError: If the weight holds NaN or infinity.
        """
        assert not weight.is_meta
        if not torch.isfinite(weight).all():
            raise UserError("the weight holds NaN or infinity; start from another checkpoint")
        shape = cast(tuple[int, int], tuple(self.scale.shape))
        scale = ops.initial_scale(weight, shape, self.grid, self.scale_init)
        self.scale.copy_(scale)
        self.scale_floor.copy_(scale * FLOOR)
        if self.freezing is not None:
            self.freezing.reset()

    def surrogate_param(self) -> Tensor | None:
        """The surrogate's learned parameter, shaped like `scale`; None if it learns nothing."""
        return None

    def roles(self) -> dict[str, Role]:
        """How an optimizer treats each parameter of this quantizer, by name.

        Returns:
            "scale" for the scales' learning rate and no decay, "factor" for that of low-rank factors and no
            decay, "weight" to train like the model's weights.
        """
        return {name: "scale" for name, _ in self.named_parameters()}

    def latent(self, weight: Tensor) -> Tensor:
        """The tensor that is rounded: the weight itself, unless a method adds to it or rotates it.

        Args:
            weight: The layer's weight, `(out, ...)`.
        """
        return weight

    def set_latent(self, weight: Tensor, latent: Tensor) -> None:
        """Set the weight, in place, so that `latent` returns the given tensor.

        A method overrides both or neither.

        Args:
            weight: The layer's weight.
            latent: Its new latent weight, of this process's shard.
        """
        local(weight).copy_(latent)

    def stored(self, weight: Tensor) -> Tensor:
        """A weight that does not train, as its layer keeps it: a method may take a smaller type."""
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """The deployed codes, int8, of this process's shard.

        Args:
            weight: The layer's weight, `(out, ...)`.
        """
        return ops.quantize_codes(local(self.latent(weight)), self.effective_scale(), grid=self.grid)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight.

        Args:
            weight: Latent weight, `(out, ...)`.

        Returns:
            Values on the grid, shaped like `weight`, in the compute type.
        """
        return ops.fake_quantize(
            self.latent(weight),
            self.scale,
            scale_floor=self.scale_floor,
            grid=self.grid,
            surrogate=self.surrogate,
            surrogate_param=self.surrogate_param(),
        )

    @property
    def progress(self) -> float:
        """Share of training that is done, in [0, 1]; 0 without a clock, see `stableqat.follow`.

        It is constant between two optimizer steps: through accumulated micro-batches, and where the backward
        recomputes the forward.
        """
        return 0.0 if self.position is None else self.position.progress

    def penalty(self, weight: Tensor) -> Tensor | None:
        """A term that training minimises in addition to the loss, summed over the weight; None for none.

        Args:
            weight: This process's shard of the layer's weight, with gradients.
        """
        return None

    def after_step(self, weight: Tensor, lr: float, progress: float) -> None:
        """Act on the weight, in place, after an optimizer step.

        Args:
            weight: This process's shard of the layer's weight.
            lr: Learning rate of its step.
            progress: Share of training that is done, including this step.
        """

    def linear(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        recompute: bool | None = None,
        value: Tensor | None = None,
        of_input: ops.Activation | None = None,
    ) -> Tensor:
        """`F.linear(input, self(weight), bias)`, in one operation unless a subclass has its own `forward`.

        Args:
            input: Activations, `(..., in)`.
            weight: Latent weight, `(out, in)`.
            bias: `(out,)` or None.
            recompute: Recompute the fake-quantized weight in the backward instead of saving it; None
                recomputes on a GPU.
            value: The fake-quantized weight, if it is already known, without its gradient.
            of_input: How to quantize the activations; None leaves them as they are.

        Returns:
            `(..., out)`.
        """
        if not self.fuses:
            return ops.product(input, self(weight), bias, of_input=of_input)
        return ops.product(
            input,
            self.operands(weight),
            bias,
            grid=self.grid,
            surrogate=self.surrogate,
            recompute=recompute,
            value=value,
            of_input=of_input,
        )

    def operands(self, weight: Tensor) -> ops.Operands:
        """A weight with this quantizer's parameters."""
        own = self._parameters  # called for every layer in every step: skips nn.Module's slow lookup
        scale, floor = own.get("scale"), own.get("scale_floor")
        scale = self.scale if scale is None else scale  # missing if parametrized, or in a replica
        floor = self.scale_floor if floor is None else floor
        return ops.Operands(weight, scale, floor, self.surrogate_param())

    @property
    def kind(self) -> Hashable:
        """Equal for quantizers whose weights `many` can take together; None for a method's own forward."""
        return (self.grid, self.surrogate) if self.fuses else None

    def many(self, weights: Sequence[ops.Operands], values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The forward of several quantizers of this kind, in one operation.

        Args:
            weights: The `operands` of each weight.
            values: Fake-quantized weights that are already known; None for the others.
        """
        return ops.fake_quantize_many(weights, grid=self.grid, surrogate=self.surrogate, values=values)

    def implementation(self, weight: Tensor) -> str:
        """Which implementation fake-quantizes a weight, triton or torch; see `ops.implementation`."""
        return ops.implementation(local(weight), self.surrogate)

    @property
    def fuses(self) -> bool:
        """Whether the forward is the plain one, which kernels compute and layers may hold."""
        return type(self).forward is Quantizer.forward and type(self).latent is Quantizer.latent

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """The deployed form of a weight, or of this process's shard of it.

        Args:
            weight: Latent weight, `(out, ...)`.

        Returns:
            Codes, scale, zero point and bits; `dequantize` equals the evaluation forward bit for bit.
        """
        codes, dtype = self.codes(weight), self.latent(weight).dtype
        zero_point = float(self.grid.zero_point)
        return QuantizedWeight(codes, self.effective_scale(), zero_point, self.bits, self.grid.name, dtype)

    @torch.no_grad()
    def settle(self, weight: Tensor, quantized: QuantizedWeight) -> None:
        """Set weight and parameters so that `quantize` returns these codes and scales, bit for bit.

        Latent weights that already have their code stay; the others move onto their level.

        Args:
            weight: The layer's weight, set in place.
            quantized: Codes on this quantizer's grid, with scales shaped like its own.

        Raises:
            UserError: If grid, shapes or types cannot hold them; weight and parameters are then unchanged.
        """
        grid, codes, scale = self.grid, quantized.codes, quantized.scale
        own = local(self.scale)
        if quantized.zero_point != grid.zero_point or ((codes < grid.q_min) | (codes > grid.q_max)).any():
            raise UserError(f"the {self.bits}-bit {grid} grid does not hold these codes; use their own grid")
        if codes.shape != local(weight).shape or scale.shape != own.shape:
            raise UserError(
                f"codes {tuple(codes.shape)} with scales {tuple(scale.shape)} do not fit a weight "
                f"{tuple(weight.shape)} with scales {tuple(own.shape)}"
            )
        if not (torch.isfinite(scale).all() and (scale != 0).all()):
            raise UserError("a scale is zero or not a number")
        changed = [local(tensor) for tensor in (weight, *self.parameters())]
        before = [tensor.clone() for tensor in changed]
        own.copy_(scale)
        floor = local(self.scale_floor)
        acts = ops.acting_scale(own, floor) == own
        floor.copy_(torch.where(acts, floor, own * FLOOR))  # also where it is unset
        if self.freezing is not None:
            self.freezing.reset()
        latent, has_code = local(self.latent(weight)), self.codes(weight) == codes
        levels = ops.dequantize_codes(codes, own, grid.zero_point, latent.dtype)
        for target in (None, torch.where(has_code, latent, levels), levels):  # rotating back may spoil one
            if target is not None:
                self.set_latent(weight, target)
            made = self.quantize(weight)
            if torch.equal(made.codes, codes) and torch.equal(made.scale.to(scale.dtype), scale):
                return
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        raise UserError(f"{levels.dtype} weights with {own.dtype} scales cannot hold these codes and scales")

    def effective_scale(self) -> Tensor:
        """The scale that the forward uses, never below its floor; of this process's shard."""
        return ops.acting_scale(local(self.scale.detach()), local(self.scale_floor))

    def describe(self) -> dict[str, str | int | float]:
        """Flat hyper-parameters that name this quantizer in a table or in TensorBoard."""
        whole = "channel" if self.scale.shape[0] > 1 else "tensor"
        dampening = {"dampening": self.dampening} if self.dampening else {}
        freezing = {"freezing": self.freezing.threshold} if self.freezing else {}
        return {
            "method": type(self).__name__,
            "bits": self.bits,
            "grid": self.grid.name,
            "mask": self.surrogate.mask,
            "scale_init": self.scale_init,
            "granularity": f"group {self.group_size}" if self.group_size else whole,
            **vars(self.surrogate),
            **dampening,
            **freezing,
        }

    @property
    def kind_in_words(self) -> str:
        """Method, width and grid, for a line of a report."""
        return f"{type(self).__name__} {self.bits}-bit {self.grid}"

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        shape = tuple(self.scale.shape)
        return f"bits={self.bits}, grid={self.grid}, mask={self.surrogate.mask}, scale={shape}"


QuantizerFactory = Callable[[Tensor], Quantizer]
"""Makes the quantizer of one weight: a class with its options bound, `functools.partial(STE, bits=2)`."""

QuantizerSpec = QuantizerFactory | dict[str, QuantizerFactory | None]
"""One factory for all layers, or factories by layer pattern; None leaves a layer in full precision."""

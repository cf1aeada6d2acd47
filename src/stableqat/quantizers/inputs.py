"""Quantizers of a layer's input: LSQ, LSQ+ and a scale per token.

`LSQ` (Esser et al. 2020, arXiv 1902.08153) and `LSQPlus` (Bhalgat et al. 2020, arXiv 2004.09576) learn one
scale per tensor, which calibration sets; what a GELU leaves, a short negative side and a long positive one,
asks for the latter's offset. `PerToken` learns nothing and follows each token's largest magnitude, as
runtimes with dynamic int8 products do. The trade-off: a static scale costs nothing at run time, but one
outlier stretches it for all tokens.

To add one: a subclass here with `activation`, and `calibrate` if it has something to set.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import log
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stableqat import ops
from stableqat.errors import UserError, check_known
from stableqat.quantizers.base import FLOOR, local

SurrogateName = Literal["ste", "dsq", "stableqat"]

_LEAVE = "leave its input as it is, by null in a mapping"


class InputQuantizer(nn.Module, ABC):
    """Base of the quantizers of inputs: a width, a surrogate, and what calibration sets.

    Parameters have one element each and start unset (NaN). They are never set in a forward: `calibrate` sets
    them before the first step, from counts that are the same in all processes. They train like the scales of
    weights, with LSQ's factor `1 / sqrt(n q_max)` on their gradient, `n` being the number of features: it
    depends neither on the batch nor on how processes divide it.

    Args:
        features: Number of features of the input.
        bits: Width of a code, 2 to 8.
        surrogate: Stands for the derivative of round: ste, dsq or stableqat, with its published settings.
        mask: Which activations receive a gradient: range (those within the codes), levels (the same here) or
            none (all).

    Raises:
        UserError: If an option is unknown or out of range.
    """

    def __init__(
        self, features: int, *, bits: int, surrogate: SurrogateName = "ste", mask: ops.Mask = "range"
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or bits != int(bits) or not 2 <= bits <= 8:
            raise UserError(f"bits: must be a whole number from 2 to 8, not {bits}")
        check_known("surrogate", surrogate, get_args(SurrogateName))
        check_known("mask", mask, get_args(ops.Mask))
        kinds = {"ste": ops.Identity, "dsq": ops.Tanh, "stableqat": ops.Fourier}
        self.features, self.bits, self.surrogate_name = features, int(bits), surrogate
        self.surrogate: ops.Surrogate = kinds[surrogate](mask)
        self.grid = ops.make_grid("integer", self.bits)
        self._checked = False

    @abstractmethod
    def operands(self) -> ops.InputOperands:
        """The tensors of the operation."""

    def unsigned(self) -> "InputQuantizer":
        """Let codes start at 0, for inputs that are never negative; what calibration sets sees it itself."""
        self.grid = ops.Grid("integer", self.bits, 0, 2**self.bits - 1, 0)
        return self

    def set_from(self, values: Tensor, counts: Tensor) -> None:
        """Set the parameters; what learns nothing has none to set.

        Args:
            values: The values that occur in calibration, finite and not all equal, in float64 on the CPU.
            counts: How often each does.
        """

    def activation(self) -> ops.Activation:
        """How the operation quantizes an input.

        Raises:
            UserError: If the parameters are not set.
        """
        if not (self._checked or torch.compiler.is_compiling()):
            self._check()
        return ops.Activation(self.operands(), self.grid, self.surrogate)

    def forward(self, input: Tensor) -> Tensor:
        """Fake-quantize an activation, `(..., features)`."""
        return ops.quantize_input(input, self.activation())

    def calibrate(self, counts: Tensor) -> None:
        """Set the parameters from what flows into the layer.

        Args:
            counts: `ops.count_values` of all calibration batches of all processes.

        Raises:
            UserError: If nothing flows into it, or NaN or infinity, or the same value everywhere.
        """
        values, times = ops.counted_values(counts)
        if not len(values):
            raise UserError(f"nothing flowed into it in calibration; {_LEAVE}")
        if not values.isfinite().all():
            raise UserError(
                "NaN or infinity flowed into it in calibration; take other data, another start, or "
                "trainer.precision bf16-mixed or 32-true"
            )
        if values.min() == values.max():
            raise UserError(
                f"its input is {values[0].item():.4g} everywhere in calibration, which gives no scale; take "
                f"other data, or {_LEAVE}"
            )
        with torch.no_grad():
            self.set_from(values, times)
        self._checked = True

    @property
    @torch.no_grad()
    def is_set(self) -> bool:
        """Whether all parameters have values; a collective call if they are sharded."""
        own = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.parameters()]
        return all(bool(p.isfinite().all()) for p in own)

    def describe(self) -> dict[str, str | int | float]:
        """Flat hyper-parameters that name this quantizer in a table or in TensorBoard."""
        return {
            "input_quantizer": type(self).__name__,
            "input_bits": self.bits,
            "input_surrogate": self.surrogate_name,
            "input_mask": self.surrogate.mask,
        }

    @property
    def in_words(self) -> str:
        """Method and width, for a line of a report."""
        return f"{type(self).__name__} {self.bits}-bit"

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"bits={self.bits}, surrogate={self.surrogate_name}"

    def _check(self) -> None:
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        if not self.is_set:
            raise UserError(
                "the scales of input quantizers are not set: call stableqat.calibrate(model, batches) before "
                "the first forward, give PrepareQAT a calibration, or load a checkpoint of a run"
            )
        self._checked = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._checked = False


class LearnedScale(InputQuantizer):
    """A scale per tensor, which calibration sets and training learns.

    Args:
        features: Number of features of the input.
        options: Those of `InputQuantizer`.
    """

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.scale = _unset()
        # frozen parameters, not buffers: FSDP shards them as it does the scale
        self.scale_floor = _unset(frozen=True)
        self.a_logit = _unset() if self.surrogate_name == "dsq" else None

    def set_scale(self, scale: float) -> None:
        """Set the scale and what follows from it."""
        _fill(self.scale, scale)
        _fill(self.scale_floor, scale * FLOOR)
        if self.a_logit is not None:
            a = cast(ops.Tanh, self.surrogate).a
            _fill(self.a_logit, log(a / (1 - a)))


class LSQ(LearnedScale):
    """One learned scale; the codes are unsigned where calibration sees nothing negative, otherwise signed.

    Args:
        features: Number of features of the input.
        options: Those of `InputQuantizer`.
    """

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.lowest = _unset(frozen=True)

    def operands(self) -> ops.InputOperands:
        """See `InputQuantizer.operands`."""
        return ops.InputOperands(self.scale, self.scale_floor, self.lowest, param=self.a_logit)

    def set_from(self, values: Tensor, counts: Tensor) -> None:
        """See `InputQuantizer.set_from`: the scale of least squared error."""
        levels = 2**self.bits
        low = 0 if values.min() >= 0 else -levels // 2
        scale, _ = ops.least_scale(values, counts, low, low + levels - 1)
        _fill(self.lowest, low)
        self.set_scale(scale)


class LSQPlus(LearnedScale):
    """One learned scale and a learned offset, the value of code 0, for inputs that are not symmetric.

    Args:
        features: Number of features of the input.
        options: Those of `InputQuantizer`.
    """

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.offset = _unset()

    def operands(self) -> ops.InputOperands:
        """See `InputQuantizer.operands`."""
        return ops.InputOperands(self.scale, self.scale_floor, offset=self.offset, param=self.a_logit)

    def set_from(self, values: Tensor, counts: Tensor) -> None:
        """See `InputQuantizer.set_from`: scale and offset of least squared error."""
        scale, offset = ops.least_scale_and_offset(values, counts, 2**self.bits)
        _fill(self.offset, offset)
        self.set_scale(scale)


class PerToken(InputQuantizer):
    """Each token has the scale of its largest magnitude; nothing is learned, and nothing calibrated.

    The gradient takes a token's scale as a constant.

    Args:
        features: Number of features of the input.
        bits: Width of a code, 2 to 8.
        surrogate: Stands for the derivative of round: ste, or stableqat; dsq has nothing to learn with.
    """

    def __init__(self, features: int, *, bits: int, surrogate: SurrogateName = "ste") -> None:
        if surrogate == "dsq":
            raise UserError("surrogate: dsq learns a sharpness per scale, and PerToken has none")
        super().__init__(features, bits=bits, surrogate=surrogate, mask="none")  # nothing is clipped

    def operands(self) -> ops.InputOperands:
        """See `InputQuantizer.operands`."""
        return ops.InputOperands()


InputQuantizerFactory = Callable[[int], InputQuantizer]
"""Makes a layer's input quantizer from its number of features: `functools.partial(LSQ, bits=8)`."""

InputQuantizerSpec = InputQuantizerFactory | dict[str, InputQuantizerFactory | None]
"""One factory for all quantized layers, or factories by layer pattern; None leaves the input as it is."""


def make_input_quantizer(
    factory: InputQuantizerFactory | None,
    features: int,
    device: torch.device,
    key: str = "input_quantizer",
) -> nn.Module | None:
    """Call a factory, which may be a user's and make any module.

    Args:
        factory: Makes the quantizer of an input from its number of features; None makes none.
        features: This number.
        device: Where the module is made.
        key: The setting, for messages.

    Raises:
        UserError: If it makes no module, or refuses an option.
    """
    if factory is None:
        return None
    try:
        with device:
            made = factory(features)
    except UserError as error:
        raise UserError(f"{key}.{error}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{key}: the factory returns {type(made).__name__}; it must return a module")
    return made


def input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """The quantizers of a model's activations by their own names: of inputs of layers, and in attention."""
    return {name: module for name, module in model.named_modules() if isinstance(module, InputQuantizer)}


def _unset(*, frozen: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), torch.nan, dtype=torch.float32), requires_grad=not frozen)


def _fill(parameter: nn.Parameter, value: float) -> None:
    local(parameter).fill_(value)  # on one of the processes that share it, and on no other

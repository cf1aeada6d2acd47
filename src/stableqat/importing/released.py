"""What the layers of the released StableQAT and ParetoQ codes compute, and how ours deploy the same.

`weight_clip_val`, which the codes clamp to at least 1e-5, is the step of the integer grid (all widths of
StableQAT's code, 3 and 4 bits of ParetoQ's), the level of the binary grid, and the range of ParetoQ's
stretched and ternary grids, whose sides have 2^(bits-1) and 1.5 steps. The released layers divide and round
in the type of the weights; in bfloat16 that decides the level of up to 0.7% of them. The import moves such a
weight to the level that the released layer gives it, so the values agree bit for bit up to one rounding: ours
are scale times level in float32, theirs are that product in the type of the checkpoint.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stableqat import ops
from stableqat.errors import UserError
from stableqat.layers.linear import quantized_layers
from stableqat.modules.start import load_weights
from stableqat.ops import Fourier
from stableqat.quantizers import DSQ, STE, ParetoQ, Quantizer, StableQAT

CLIP, SHARPNESS = "weight_clip_val", "alpha_dsq"
LEAST = 1e-5


@dataclass(frozen=True)
class ReleasedLayer:
    """The quantized layer of a released code.

    Attributes:
        code: stableqat or paretoq.
        bits: As the code counts them, 0 for ternary.
        method: The method of this suite that trains the same way.
        options: Its options.
        by_reciprocal: Whether the layer multiplies by 1 / clip value instead of dividing.
    """

    code: str
    bits: int
    method: type[Quantizer]
    options: dict[str, Any] = field(default_factory=dict)
    by_reciprocal: bool = False

    @classmethod
    def read(
        cls, code: str, bits: int | None, config: dict[str, Any], extras: dict[str, Any], dsq: bool
    ) -> "ReleasedLayer":
        """Derive the layer from what its code saved.

        Args:
            code: stableqat or paretoq.
            bits: As the user gives them; None takes those of config.json.
            config: Keys of the architecture.
            extras: Keys that the code adds to config.json.
            dsq: Whether the layers have a sharpness.

        Raises:
            UserError: If the bits are unknown, or differ between layers.
        """
        width = _bits(bits, extras.get("w_bits"))
        options: dict[str, Any] = {"levels": 3} if width == 0 else {"bits": width}
        if code == "paretoq":
            return cls(code, width, ParetoQ, options)
        if dsq:
            return cls(code, width, DSQ, options)
        efficient = extras.get("efficient")
        if not (efficient is None or isinstance(efficient, bool)):
            raise UserError(f"config.json: efficient: must be true or false, not {efficient!r:.60}")
        reciprocal = bool(efficient) and config["model_type"] == "llama"  # Qwen3's layers ignore it
        amplitude = _amplitude(extras.get("sine_soft_q"))
        if amplitude is None:
            return cls(code, width, STE, options, reciprocal)
        return cls(code, width, StableQAT, {**options, "amplitude": amplitude}, reciprocal)

    def values(self, weight: Tensor, clip: Tensor, sharpness: Tensor | None) -> Tensor:
        """Return what the layer multiplies by, `(out, in)`.

        Args:
            weight: Latent weight, `(out, in)`.
            clip: Its `weight_clip_val`, `(out, 1)`.
            sharpness: DSQ's `alpha_dsq`, `(1,)`.
        """
        alpha = clip.clamp(min=LEAST)
        if self.bits == 1:
            return weight.sign() * alpha
        if self._takes_a_range:
            shift, per_side = (0.0, 1.5) if self.bits == 0 else (0.5, 2.0 ** (self.bits - 1))
            share = (weight / alpha).clamp(-0.99, 0.99)
            return ((share * per_side - shift).round() + shift) / per_side * alpha
        low, high = (-1, 1) if self.bits == 0 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        v = weight * (1 / alpha) if self.by_reciprocal else weight / alpha
        code = v.round().clamp(low, high) if sharpness is None else _soft_code(v, low, high, sharpness)
        return (code * alpha).to(weight.dtype)

    def step(self, clip: Tensor) -> Tensor:
        """Return the distance between levels, `(out, 1)`, in float32.

        Args:
            clip: `weight_clip_val`, `(out, 1)`.
        """
        alpha = clip.clamp(min=LEAST)
        if self._takes_a_range:
            # ternary: the one level itself; otherwise division by a power of two is exact
            return (torch.ones_like(alpha) / 1.5 * alpha if self.bits == 0 else alpha / 2).float()
        return alpha.float() * (2 if self.bits == 1 else 1)

    @property
    def _takes_a_range(self) -> bool:
        return self.code == "paretoq" and self.bits in (0, 2)


def _soft_code(v: Tensor, low: int, high: int, sharpness: Tensor) -> Tensor:
    """Round like the released DSQ: down, or up where the tanh over its range is positive."""
    below = (v - low).floor() + low
    a = sharpness.float().clamp(max=2)  # and so all that follows
    phi = ((v - (below + 0.5)) * (2 / a - 1).log()).tanh() * (1 / (1 - a))
    return (below + (phi / (phi.max() - phi.min()) + 0.5).round()).clamp(low, high)


@dataclass
class Transfer:
    """What became of a checkpoint's weights; `str` puts it in words.

    Attributes:
        what: The method and its grid.
        layers: Number of quantized layers.
        weights: Number of their weights.
        moved: Number of weights moved to the level that the released layer gives them.
        off_grid: Number of weights whose released value is not a level (sign(0) of a binary layer); they move
            to the nearest.
    """

    what: str
    layers: int = 0
    weights: int = 0
    moved: int = 0
    off_grid: int = 0

    def __str__(self) -> str:
        text = f"{self.what}, {self.layers} layers; {self.moved} of {self.weights} weights "
        text += "moved to the level that the released layer gives them"
        if self.off_grid:
            text += f"; {self.off_grid} on none of its levels (a sign of 0) moved to the nearest"
        return text


@torch.no_grad()
def transfer(state: dict[str, Tensor], model: nn.Module, released: ReleasedLayer, source: str) -> Transfer:
    """Load a released checkpoint into a quantized model, so that it deploys what the released layers do.

    Args:
        state: Tensors of the checkpoint; consumed.
        model: The model with its quantized layers.
        released: The layer that the checkpoint was trained with.
        source: The checkpoint, for messages.

    Raises:
        UserError: Naming the layer, if a tensor is missing, has another shape or is not finite.
    """
    layers = quantized_layers(model)
    if not any(name.endswith(f".{CLIP}") for name in state):
        raise UserError(
            f"{source}: has no {CLIP}, so its layers are not quantized; start from it with model.init_from"
        )
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)  # the embedding's, saved twice
    keys = (CLIP, "weight", *([SHARPNESS] if released.method is DSQ else []))
    for name in layers:
        _check(name, keys, state, source)
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {key} holds NaN or infinity; take an earlier checkpoint")
    method = f"{released.method.__name__}, {next(iter(layers.values())).weight_quantizer.extra_repr()}"
    report = Transfer(method.split(", mask")[0])
    ours: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight, clip = state[f"{name}.weight"], state.pop(f"{name}.{CLIP}")
        sharpness = state.pop(f"{name}.{SHARPNESS}", None)
        quantizer: Any = layer.weight_quantizer
        ours |= {f"{name}.weight_quantizer.{key}": value for key, value in quantizer.state_dict().items()}
        if weight.shape != layer.weight.shape:
            continue  # refused below
        theirs = released.values(weight, clip, sharpness)
        if not torch.isfinite(theirs).all():
            raise UserError(f"{source}: {name}: the released layer computes NaN; take an earlier checkpoint")
        scale, latent = released.step(clip), weight.float()
        settled = latent.clone()
        codes = ops.quantize_codes(theirs.float(), scale, grid=quantizer.grid)
        quantizer.settle(settled, replace(quantizer.quantize(latent), codes=codes, scale=scale))
        if sharpness is not None:
            quantizer.a_logit.copy_(torch.logit(sharpness.float(), 1e-3).expand(scale.shape))
        off_grid = quantizer.quantize(settled).dequantize().to(theirs.dtype) != theirs
        report.layers += 1
        report.weights += latent.numel()
        report.moved += int(((settled != latent) & ~off_grid).sum())
        report.off_grid += int(off_grid.sum())
        state[f"{name}.weight"] = settled
    load_weights(model, state | ours, source)
    return report


@torch.no_grad()
def check_computes(module: nn.Module, source: str) -> None:
    """Refuse a model that computes NaN, because of a constant in its config.json or the size of its weights.

    Args:
        module: The language model.
        source: The checkpoint, for messages.

    Raises:
        UserError: If the logits of a few tokens are not finite.
    """
    if not torch.isfinite(module(torch.arange(4)[None])).all():
        raise UserError(
            f"{source}: the model computes NaN or infinity; look at rms_norm_eps and rope_parameters in "
            "config.json, or take an earlier checkpoint"
        )


def _check(name: str, keys: tuple[str, ...], state: dict[str, Tensor], source: str) -> None:
    if missing := [key for key in keys if f"{name}.{key}" not in state]:
        raise UserError(
            f"{source}: {name}.{missing[0]} is missing; import takes checkpoints that quantize every "
            "linear layer but lm_head"
        )
    if state[f"{name}.weight"].ndim != 2:
        raise UserError(f"{source}: {name}.weight is not a matrix; get the checkpoint again")
    clip, rows = state[f"{name}.{CLIP}"], len(state[f"{name}.weight"])
    if tuple(clip.shape) != (rows, 1):
        raise UserError(
            f"{source}: {name}.{CLIP} has shape {tuple(clip.shape)}, not one value per row, ({rows}, 1)"
        )


def _amplitude(saved: Any) -> float | None:
    """Return the amplitude of the Fourier surrogate; None if it is off.

    The released code gives each of several amplitudes its own harmonic; ours has one amplitude.
    """
    saved = {"enable": True} if saved is None else saved
    key = "config.json: sine_soft_q"
    if not isinstance(saved, dict) or not isinstance(saved.get("enable"), bool):
        raise UserError(f"{key}: must be a mapping with enable: true or false, not {saved!r:.60}")
    amplitudes = saved.get("amplitude")
    if not saved["enable"]:
        return None
    if amplitudes is None:
        return 0.21
    if not isinstance(amplitudes, list) or len(amplitudes) != 1 or type(amplitudes[0]) not in (int, float):
        raise UserError(f"{key}.amplitude: must be a list of one number, not {amplitudes!r:.60}")
    try:
        Fourier("range", amplitudes[0], 1)
    except UserError as error:
        raise UserError(f"{key}.{error}") from error
    return amplitudes[0]


def _bits(asked: int | None, saved: Any) -> int:
    if isinstance(saved, list | dict):
        raise UserError(f"config.json: w_bits is {saved!s:.60}; layers of mixed bits cannot be imported")
    if saved is not None and type(saved) is not int:
        raise UserError(f"config.json: w_bits: must be a whole number, not {saved!r:.60}; correct it")
    if asked is None and saved is None:
        raise UserError("bits: config.json has no w_bits; say with --bits what the model was trained for")
    if asked is not None and saved is not None and asked != saved:
        raise UserError(f"bits: {asked}, but the checkpoint's config.json says w_bits {saved}; leave it out")
    bits = saved if asked is None else asked
    if bits not in (0, 1, 2, 3, 4):
        raise UserError(f"bits: the released codes have 1 to 4, and 0 for ternary, not {bits!s:.20}")
    return bits

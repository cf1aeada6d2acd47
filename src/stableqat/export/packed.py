"""The one form between a trained model and every file format: codes, scales, zero point, bits.

A file stores scales in a shorter type than training does. Rounding them after the last evaluation would ship
a model that nobody measured, so `pack` rounds them inside the model, whose forward is then what the file must
equal. The codes stay those of training: QAT leaves many weights so close to a threshold that rounding a scale
by 0.05% would move them to another level.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.errors import UserError
from stableqat.export.gguf_header import Header
from stableqat.layers.attention import describe_attention
from stableqat.layers.embedding import QuantEmbedding
from stableqat.layers.linear import QuantLinear, quantized_inputs, quantized_layers
from stableqat.modules import QATModule
from stableqat.quantizers import STE, QuantizedWeight
from stableqat.quantizers.inputs import InputQuantizer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class PackedModel:
    """What a format writes.

    Attributes:
        module: The trained model, whose forward uses the file's scales.
        layers: Quantized weights by layer name; an embedding's is under the embedding, tied or not.
        dtype: Type of the parameters that are not quantized.
        scale_dtype: Type of the scales.
        batch: Inputs on which the file is compared with the model.
        template: Header of a GGUF of llama.cpp's converter, whose metadata is kept; or None.
        int8_activations: Whether an ONNX file lets the runtime round activations to int8.
        storage_bits: Bits in which compressed-tensors, and onnx beside quantized inputs, store a code; None
            takes the fewest.
        images: How images are resized and normalised, as timm's `pretrained_cfg`; None takes timm's own.
        classes: Names of a vision transformer's classes, by label; None if unknown.
        tokenizer: A language model's tokenizer, or None.
        target: Where llama.cpp runs a GGUF.
    """

    module: QATModule
    layers: dict[str, QuantizedWeight]
    dtype: torch.dtype
    scale_dtype: torch.dtype
    batch: dict[str, Tensor]
    template: Header | None = None
    int8_activations: bool = False
    storage_bits: int | None = None
    images: dict[str, Any] | None = None
    classes: list[str] | None = None
    tokenizer: Any = None
    target: Literal["cpu", "gpu"] = "cpu"

    @property
    def model(self) -> Any:
        """The transformers or timm model inside."""
        return self.module.model

    @property
    def family(self) -> str:
        """llama, qwen3 or vit."""
        config = getattr(self.model, "config", None)
        return "vit" if config is None else config.model_type

    @property
    def tied(self) -> bool:
        """Whether embedding and head share their weight."""
        return self.family != "vit" and bool(self.model.config.tie_word_embeddings)

    @property
    def input(self) -> Tensor:
        """The batch's token ids or images."""
        return self.batch[self.module.input_key]

    @property
    def inputs(self) -> dict[str, InputQuantizer]:
        """The quantizers of inputs by layer name."""
        return quantized_inputs(self.model)

    def elsewhere(self, *formats: str) -> str:
        """The end of a refusal: which of these formats to take, if any holds the model."""
        if self.inputs:
            return "no other format holds quantized inputs: export a run without model.input_quantizer"
        return f"take {' or '.join(['hf'] if self.family == 'vit' else formats)}"

    def rest(self) -> dict[str, Tensor]:
        """Parameters and buffers that are not quantized, in their type, without a tied head."""
        left = {k: v for k, v in self.model.state_dict().items() if "_quantizer." not in k}
        left = {k: v for k, v in left.items() if k.removesuffix(".weight") not in self.layers}
        if self.tied:
            left.pop("lm_head.weight")
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in left.items()}

    def values(self) -> dict[str, Tensor]:
        """The quantized weights as plain float32 tensors."""
        return {f"{name}.weight": weight.dequantize() for name, weight in self.layers.items()}

    def baked(self) -> dict[str, Tensor]:
        """All weights as plain float32 tensors."""
        return {k: v.float() if v.is_floating_point() else v for k, v in self.rest().items()} | self.values()

    def plain(self) -> nn.Module:
        """A new model with these weights: plain layers, no quantizers, no hooks."""
        with torch.random.fork_rng([]):
            model = self.module.build_model().eval()
        state = model.state_dict()  # a tied head comes with the embedding
        for name, tensor in self.baked().items():
            state[name].copy_(tensor)
        return model

    def plain_linears(self) -> list[str]:
        """Names of the linear layers that are not quantized."""
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in linears if name not in self.layers]


def quantize_embeddings(module: QATModule, bits: int) -> None:
    """Round embedding and head to nearest, each row with the scale of least squared error.

    Args:
        module: A language model whose head and embedding are not quantized.
        bits: Width, 4 or 8.

    Raises:
        UserError: If the model has no embedding, or trained its head quantized.
    """
    model: Any = module.model
    if module.family == "images":
        raise UserError("embedding_bits: a vision transformer has no token embedding; leave it out")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        raise UserError("embedding_bits: the head was trained quantized and is packed as it is; leave it out")
    tied = head.weight is embedding.weight
    head = QuantLinear.from_linear(head, STE(head.weight, bits=bits))
    model.set_output_embeddings(head)
    # an untied embedding gets its own quantizer, in a layer that is only looked up
    own = head if tied else QuantLinear.from_linear(_as_linear(embedding), STE(embedding.weight, bits=bits))
    quantized = QuantEmbedding.from_embedding(embedding, own)
    model.set_input_embeddings(quantized)


def check_quantizers(model: nn.Module) -> None:
    """Refuse what no format holds.

    Raises:
        UserError: If nothing is quantized, or more than weights and inputs, or inputs by a foreign module.
    """
    layers = quantized_layers(model)
    if not layers:
        raise UserError("no layer is quantized: this was trained in full precision; export a quantized run")
    if attention := describe_attention(model).get("attention"):
        raise UserError(
            f"this run quantizes what attention multiplies ({attention}), and no format here holds that: a "
            "runtime chooses the width of its cache itself; export a run without model.attention_quantizer "
            "and model.cache_bits"
        )
    for name, layer in layers.items():
        made = layer.input_quantizer
        if made is not None and not isinstance(made, InputQuantizer):
            raise UserError(
                f"layer {name}: no format knows the codes of its input quantizer, a {type(made).__name__}; "
                "take LSQ, LSQPlus, PerToken or another InputQuantizer"
            )


def pack(module: QATModule, dtype: torch.dtype, scale_dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """Round scales and all other parameters to a file's types inside a model, and read its codes.

    Args:
        module: The trained model, changed in place.
        dtype: Type of the parameters that are not quantized.
        scale_dtype: Type of the scales.

    Returns:
        Quantized weights by layer name.

    Raises:
        UserError: If no format holds the model, or a weight or scale is not finite or out of range.
    """
    model: Any = module.model
    check_quantizers(model)
    layers = _layers(model)
    for name, layer in layers.items():
        _snap(name, layer, scale_dtype)
    latent = {id(layer.weight) for layer in layers.values()}
    own = {id(p) for layer in layers.values() for p in layer.weight_quantizer.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(f"{name} holds NaN or infinity: the run diverged; take an earlier checkpoint")
            if id(parameter) not in latent | own:
                parameter.copy_(parameter.to(dtype))
                if not torch.isfinite(parameter).all():
                    raise UserError(f"{name} is beyond the range of {_short(dtype)}; take --dtype bf16")
    quantized = {name: layer.weight_quantizer.quantize(layer.weight) for name, layer in layers.items()}
    return {name: replace(weight.by_row(), dtype=torch.float32) for name, weight in quantized.items()}


@torch.no_grad()
def evaluate(module: QATModule, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """Return the logits of a batch, in float32, and its mean loss in nats.

    The logits are those of whole rows, as readers of files compute them; in the loss, conversations of a row
    do not see one another, as in training.
    """
    logits = module.eval()(batch[module.input_key]).float()
    scored, labels = logits, batch["labels"]
    if module.family == "text":
        if "position_ids" in batch:
            scored = module(batch[module.input_key], batch["position_ids"]).float()
        scored, labels = scored[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits, F.cross_entropy(scored, labels, ignore_index=-100).item()


def _layers(model: Any) -> dict[str, QuantLinear]:
    """Return quantized layers by the name that a file has for their weight."""
    layers = quantized_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantEmbedding):
            (head,) = module._head
            layers = {n: layer for n, layer in layers.items() if layer is not head} | {name: head}
    return layers


@torch.no_grad()
def _snap(name: str, layer: QuantLinear, dtype: torch.dtype) -> None:
    quantizer = layer.weight_quantizer
    trained = quantizer.quantize(layer.weight)
    scale = trained.scale
    if not (torch.isfinite(scale).all() and torch.isfinite(layer.weight).all()):
        raise UserError(f"layer {name} holds NaN or infinity: the run diverged; take an earlier checkpoint")
    halves = 1 if quantizer.grid.zero_point == 0 else 2  # s/2 must be in the file, too
    ranges = {
        each: (torch.finfo(each).smallest_normal * halves, torch.finfo(each).max) for each in DTYPES.values()
    }
    low, high = ranges[dtype]
    smallest, largest = scale.abs().min(), scale.abs().max()
    if smallest < low or largest > high:
        wrong = smallest if smallest < low else largest
        remedy = "the run collapsed or diverged: take an earlier checkpoint"
        if ranges[torch.bfloat16][0] <= wrong <= ranges[torch.bfloat16][1]:
            remedy = "take --scale_dtype bf16, in a format other than gguf"
        raise UserError(
            f"layer {name}: a scale of {wrong:.2e} lies outside {_short(dtype)}'s normal range "
            f"({low:.1e} to {high:.1e}); {remedy}"
        )
    try:
        quantizer.settle(layer.weight, replace(trained, scale=scale.to(dtype).float()))
    except UserError as error:
        raise UserError(f"layer {name}: {error}") from error


def _as_linear(embedding: nn.Embedding) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
    linear.weight = embedding.weight
    return linear


def _short(dtype: torch.dtype) -> str:
    return next(short for short, each in DTYPES.items() if each is dtype)

"""Engines that decode one token at a time: torch, tinygemm, GemLite, onnxruntime.

All run one `Step`: a token, its position and a cache of fixed length go in, logits come out. A low-bit engine
holds the codes of a `QuantizedWeight` unchanged, so its layers must compute what the dequantized weight
computes; an engine that does not raises an error and is not timed. tinygemm is torchao's int4 kernel, which
ships with torch and has a CPU twin.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableqat.export.onnx import place_operators
from stableqat.quantizers import QuantizedWeight

BITS = {"onnxruntime": (2, 4, 8), "tinygemm": (4,), "gemlite": (2, 4, 8)}  # codes stored at that width
_GROUPS = (256, 128, 64, 32)  # of tinygemm
_LAYER_TOLERANCE = 0.02  # of the largest output: bfloat16 keeps 8 bits


class WrongResultError(Exception):
    """An engine computes something else than its weight says."""


class Runner(Protocol):
    """A model on an engine."""

    weight_bytes: int

    def prompt(self, tokens: Sequence[int]) -> Tensor:
        """Fill the cache token by token; return the last logits in float32."""

    def decode(self, tokens: int) -> float:
        """Decode greedily from the prompt; return milliseconds per token."""


class Step(nn.Module):
    """A language model as a function of one token.

    Args:
        model: A transformers model for causal language modelling.
        in_place: Whether to write into the given cache or into a new one.
    """

    def __init__(self, model: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.model, self.in_place = model, in_place
        taken = signature(model.forward).parameters
        self.keyword = "cache" if "cache" in taken else "past_key_values"  # as earlier releases say

    def forward(self, token: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Return logits `(1, vocabulary)` and the cache: keys and values, layer by layer."""
        past = _Cache(list(cache), position, self.in_place)
        seen = torch.arange(cache[0].shape[2], device=token.device) <= position
        output = self.model(
            input_ids=token,
            position_ids=position[None],
            attention_mask=seen[None, None, None],
            use_cache=True,
            **{self.keyword: past},
        )
        return output.logits[:, -1], *past.entries


class _Cache:
    """What an attention layer needs of a cache, on plain tensors that a graph can take."""

    def __init__(self, entries: list[Tensor], position: Tensor, in_place: bool) -> None:
        self.entries, self.position = entries, position
        self.write = Tensor.index_copy_ if in_place else Tensor.index_copy

    def get_seq_length(self) -> int:
        """Satisfy earlier releases of transformers, which derive positions from it; `Step` passes them."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> list[Tensor]:
        for place, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.entries[place] = self.write(self.entries[place], 2, self.position, new)
        return self.entries[2 * layer : 2 * layer + 2]


class TorchRunner:
    """A model in torch: eager on a CPU, compiled and as one CUDA graph on a GPU.

    Args:
        model: On its device; its layers may be those of a low-bit engine.
        length: Tokens that the cache holds.
    """

    def __init__(self, model: Any, length: int) -> None:
        tensors = [*model.parameters(), *model.buffers()]  # a tied weight comes once
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        self.step: Callable[..., tuple[Tensor, ...]] = Step(model, in_place=True).eval()
        self.device = next(model.parameters()).device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.cache = _empty_cache(model, length)
        self.start = (self.token.clone(), self.position.clone())
        with torch.inference_mode():
            self.advance = self._captured() if self.device.type == "cuda" else self._advance

    @torch.inference_mode()
    def prompt(self, tokens: Sequence[int]) -> Tensor:
        """See `Runner.prompt`."""
        self.position.zero_()
        for token in tokens:
            self.token.fill_(token)
            logits = self.advance()
        self.start = (self.token.clone(), self.position.clone())
        return logits.float().cpu()

    @torch.inference_mode()
    def decode(self, tokens: int) -> float:
        """See `Runner.decode`."""
        for state, start in zip((self.token, self.position), self.start, strict=True):
            state.copy_(start)
        self._wait()
        began = time.perf_counter()
        for _ in range(tokens):
            self.advance()
        self._wait()
        return (time.perf_counter() - began) / tokens * 1e3

    def _advance(self) -> Tensor:
        logits, *_ = self.step(self.token, self.position, *self.cache)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits

    def _captured(self) -> Callable[[], Tensor]:
        self.step = torch.compile(self.step, dynamic=False)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets Triton tune
                self.position.zero_()
                self._advance()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._advance()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class OnnxRunner:
    """A model in onnxruntime on the CPU, float32 between the layers, with as many threads as torch has.

    Args:
        model: A float32 model, which is used up.
        length: Tokens that the cache holds.
        packed: Weights for the operator MatMulNBits, by layer name.
        int8_activations: See `MatMulNBits`.
    """

    def __init__(
        self,
        model: Any,
        length: int,
        packed: Mapping[str, QuantizedWeight] | None = None,
        *,
        int8_activations: bool = False,
    ) -> None:
        import onnxruntime

        place_operators(model, packed or {}, int8_activations=int8_activations)
        self.cache = [_value(tensor) for tensor in _empty_cache(model, length)]
        example = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        program: Any = torch.onnx.export(
            Step(model, in_place=False).eval(),
            (*example, *_empty_cache(model, length)),
            input_names=["token", "position", *(f"past.{i}" for i in range(len(self.cache)))],
            output_names=["logits", *(f"present.{i}" for i in range(len(self.cache)))],
            opset_version=21,
            dynamo=True,
            verbose=False,
        )
        operators = [node for node in program.model.graph if node.op_type == "MatMulNBits"]
        assert len(operators) == len(packed or {})
        held = list(program.model.graph.initializers.values())
        self.weight_bytes = sum(each.const_value.nbytes for each in held)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "step.onnx")
            program.save(file, external_data=True)  # protobuf ends at two gigabytes
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for each in held:  # the exporter keeps its last graph alive
            each.const_value = None
        self.names = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.start = (0, 0)

    def prompt(self, tokens: Sequence[int]) -> Tensor:
        """See `Runner.prompt`."""
        for position, token in enumerate(tokens):
            logits, self.cache = self._advance(token, position, self.cache)
        self.start = (int(logits.argmax()), len(tokens))
        return torch.from_numpy(logits)

    def decode(self, tokens: int) -> float:
        """See `Runner.decode`."""
        (token, position), cache = self.start, self.cache
        began = time.perf_counter()
        for place in range(position, position + tokens):
            logits, cache = self._advance(token, place, cache)
            token = int(logits.argmax())
        return (time.perf_counter() - began) / tokens * 1e3

    def _advance(self, token: int, position: int, cache: list[Any]) -> tuple[Any, list[Any]]:
        place = [_value(torch.tensor([[token]])), _value(torch.tensor([position]))]
        inputs = dict(zip(self.names, [*place, *cache], strict=True))
        logits, *cache = self.session.run_with_ort_values(self.outputs, inputs)
        return logits.numpy(), cache


class TinyGemm(nn.Module):
    """A linear layer on torch's int4 kernel, weights `scale * (code - 8) + zero` with bfloat16 scales.

    Args:
        weight: A 4-bit weight.
        bias: Added to the product.
        device: Where it runs; the kernels of CPU and GPU pack differently.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        rows, inputs = weight.codes.shape
        self.on_gpu = device.type == "cuda"
        fitting = [size for size in _GROUPS if weight.group_size % size == 0]
        multiple = 128 if self.on_gpu else 32
        if not fitting or inputs % multiple or rows % 16:
            raise ValueError(f"tinygemm wants inputs in {multiple}s and rows in 16s, not {rows} x {inputs}")
        self.group, self.rows = fitting[0], rows
        codes = (weight.codes.to(torch.int32) + 8).to(device)
        scale = weight.scale_of_blocks(self.group)
        pairs = torch.stack([scale, -scale * weight.zero_point], dim=-1).to(torch.bfloat16)
        if self.on_gpu:
            halves = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(halves.contiguous(), 8)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("codes", packed)
        self.register_buffer("scale_and_zero", pairs.transpose(0, 1).contiguous().to(device))
        self.bias = None if bias is None else bias.to(device, torch.bfloat16)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`."""
        multiply = torch.ops.aten._weight_int4pack_mm
        if not self.on_gpu:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        product = multiply(input.flatten(0, -2), self.codes, self.group, self.scale_and_zero)
        product = product.unflatten(0, input.shape[:-1])
        return product if self.bias is None else product + self.bias


def gemlite_linear(weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> nn.Module:
    """Make a linear layer on GemLite's Triton kernels, `(code - zero) * scale`, one scale per row or group.

    Args:
        weight: A weight of 2, 4 or 8 bits.
        bias: Added to the product.
        device: A GPU.
    """
    import gemlite

    # partial sums in float32: bfloat16 ones are off by up to 3% of the largest output
    gemlite.set_native_atomic_bfp16(False)
    rows, inputs = weight.codes.shape
    lowest = -(2 ** (weight.bits - 1))
    codes = (weight.codes.to(torch.int16) - lowest).to(device, torch.uint8)
    scale = weight.scale.to(device, torch.bfloat16)
    bfloat16 = gemlite.DType.BF16
    linear = gemlite.GemLiteLinear(
        weight.bits,
        group_size=weight.group_size,
        in_features=inputs,
        out_features=rows,
        input_dtype=bfloat16,
        output_dtype=bfloat16,  # torch.compile relies on it: the operator promises the input's type
    )
    zero = weight.zero_point - lowest
    zero = int(zero) if zero == int(zero) else torch.full_like(scale, zero)
    own_bias = None if bias is None else bias.to(device, torch.bfloat16)
    linear.pack(codes.contiguous(), scale, zero, own_bias, fma_mode=False)
    return linear


def swap_layers(
    model: Any,
    packed: Mapping[str, QuantizedWeight],
    make: Callable[[QuantizedWeight, Tensor | None, torch.device], nn.Module],
    device: torch.device,
) -> Any:
    """Put an engine's layers into a bfloat16 model, and check each against its dequantized weight.

    Args:
        model: Changed in place and moved to the device.
        packed: Weights by layer name.
        make: Makes the engine's layer from weight, bias and device.
        device: Where it runs.

    Raises:
        WrongResultError: If a layer computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in packed.items():
        bias = model.get_submodule(name).bias
        layer = make(weight, bias, device)
        input = torch.randn(1, weight.codes.shape[1], generator=generator).to(device, torch.bfloat16)
        with torch.inference_mode():
            mine = layer(input).float()
            right = F.linear(input.float(), weight.dequantize(), None if bias is None else bias.float())
        error = ((mine - right).abs().max() / right.abs().max()).item()
        if not error <= _LAYER_TOLERANCE:  # NaN is wrong, too
            raise WrongResultError(f"{name} is off by {error:.1%} of its largest output")
        model.set_submodule(name, layer)
    return model.to(device)


def _empty_cache(model: Any, length: int) -> list[Tensor]:
    config, like = model.config, next(model.parameters())
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    return [like.new_zeros(shape) for _ in range(2 * config.num_hidden_layers)]


def _value(tensor: Tensor) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.detach().cpu().numpy())

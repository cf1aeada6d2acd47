"""Latency and memory of one stream of decoded tokens, at low bits beside bfloat16.

Weights are random: codes of one grid with one scale per row, the same for every engine. Each engine's logits
are compared with those of the dequantized model, computed in float32 without a cache; an engine that is off
is not timed. Each engine takes turns with bfloat16 and is then dropped, so two models at a time are in
memory. Embedding, head and whatever else the surgery skips stay in full precision.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from stableqat.bench import engines
from stableqat.bench.architecture import Architecture
from stableqat.bench.arms import reason
from stableqat.bench.engines import BITS, OnnxRunner, Runner, TinyGemm, TorchRunner, WrongResultError
from stableqat.bench.report import header
from stableqat.errors import UserError
from stableqat.export.packed import PackedModel, pack
from stableqat.quantizers import STE, QuantizedWeight

BASELINE = "torch bf16"
NEW_TOKENS = 32
NOTES = (
    "Medians over rounds (smallest-largest). Ratios are to bfloat16's time of the same round; bfloat16's own"
    " shows what chance does. A round is {new} tokens, greedily on from a prompt of {prompt} that is in the"
    " cache already; batch 1. Weights: what the engine is given,"
    " embedding and head in its own float type; what it packs again inside is not seen. Logits off: largest"
    " difference to the dequantized model in float32 over the largest logit. MB = 10^6 bytes."
)
_PROMPT = 128
_CHECKED = 8  # tokens after which logits are compared
_INSTALL = {"onnxruntime": "stableqat[export]", "gemlite": "gemlite"}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.2}  # by the type of the activations
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """A width on an engine.

    Attributes:
        name: Its row.
        engine: The engine that multiplies.
        bits: Width of the weights; None if they are not quantized.
        activations: Type of the activations.
        build: Makes the runner from a float32 model, its packed weights and the cache's length.
    """

    name: str
    engine: str
    bits: int | None
    activations: str
    build: Callable[[Any, dict[str, QuantizedWeight], int], Runner]


def measure_decode(
    architecture: Architecture,
    widths: Sequence[int],
    grid: Literal["integer", "stretched"],
    prompt: int | None,
    rounds: int,
    device: torch.device,
    tell: Tell,
) -> dict[str, Any]:
    """Build, check and time every engine of this machine at every width that it supports.

    Args:
        architecture: A language model.
        widths: Bits of the quantized weights.
        grid: Their grid.
        prompt: Tokens before the first timed one; None takes 128.
        rounds: Timed rounds.
        device: CPU or GPU.
        tell: Reports progress.

    Returns:
        `settings`, `decode` (results by arm) and `left_out` (a line per thing that no engine can do).

    Raises:
        UserError: If no engine here supports a width, or the model is not a language model.
    """
    module: Any = architecture.module()
    if module.family != "text":
        raise UserError(f"decode: {architecture.name} is not a language model; remove --decode")
    limit = module.config.max_position_embeddings - NEW_TOKENS
    prompt = min(_PROMPT, limit) if prompt is None else prompt
    if not _CHECKED <= prompt <= limit:
        raise UserError(
            f"tokens: {architecture.name} takes a prompt of {_CHECKED} to {limit} tokens, which {NEW_TOKENS} "
            f"more follow, not {prompt}"
        )
    arms, left_out = _arms(widths, device)
    for line in [*left_out, f"{len(arms)} arms: {'; '.join(arm.name for arm in arms)}"]:
        tell(line)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(module.config.vocab_size, (prompt,), generator=generator).tolist()
    results: dict[str, dict[str, Any]] = {}
    baseline: Runner | None = None
    for bits, group in groupby(arms, lambda arm: arm.bits):
        with device:
            packed = _packed(architecture, bits, grid)
            want = _logits(packed, tokens[:_CHECKED])
        for arm in group:
            record: dict[str, Any] = {"engine": arm.engine, "bits": bits, "activations": arm.activations}
            results[arm.name] = record
            runner: Runner | None = None
            try:
                runner = _warm(arm, packed, tokens, want, device, record)
                baseline = baseline or runner
                record |= _take_turns(runner, baseline, rounds)
            except Exception as error:  # whatever an engine raises is a result in its row
                if baseline is None:
                    raise
                record["failed"] = reason(error)
            finally:
                runner = None  # before the next model is built
            tell(f"{arm.name}: {record.get('failed') or _spread(record['ms'], 3) + ' ms per token'}")
        del packed
    settings = {
        "model": architecture.name,
        "grid": grid,
        "prompt": prompt,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
    }
    return {"settings": settings, "seeds": [0], "decode": results, "left_out": left_out}


def markdown(result: dict[str, Any]) -> str:
    """Write the result in Markdown, from the JSON alone."""
    settings, arms = result["settings"], result["decode"]
    lines = [
        f"# {settings['model']}, decoding of one stream, {settings['grid']} grid",
        "",
        *(f"- {line}" for line in header(result)),
        "",
    ]
    columns = ["arm", "ms per token", "ratio to bf16", "ratio to unquantized, same engine", "tokens/s"]
    columns += ["weights MB", "GPU MB held", "logits off"]
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" + " ---: |" * (len(columns) - 1)]
    lines += [f"| {' | '.join(_cells(name, arms))} |" for name in arms]
    failed = [f"{name} failed: {record['failed']}" for name, record in arms.items() if "failed" in record]
    if remarks := [*failed, *result["left_out"]]:
        lines += ["", *(f"- {remark}" for remark in remarks)]
    return "\n".join([*lines, "", NOTES.format(new=settings["new_tokens"], prompt=settings["prompt"])]) + "\n"


def _cells(name: str, arms: dict[str, Any]) -> Iterator[str]:
    record = arms[name]
    times = record.get("ms")
    home = "onnxruntime" if record["engine"] == "onnxruntime" else "torch"  # of layers left as they are
    own = _ratios(next(each for each in arms.values() if each["bits"] is None and each["engine"] == home))
    yield f"{name} (failed)" if "failed" in record else name
    yield _spread(times, 3)
    yield _spread(_ratios(record), 2)
    yield _spread([ratio / median(own) for ratio in _ratios(record)] if own else [], 2)
    yield f"{1e3 / median(times):,.1f}" if times else "-"
    for size in (record.get("weight_bytes"), record.get("gpu_bytes")):
        yield f"{size / 1e6:,.2f}" if size is not None else "-"
    yield f"{record['difference']:.1e}" if "difference" in record else "-"


def _ratios(record: dict[str, Any]) -> list[float]:
    return [mine / base for mine, base in zip(record.get("ms", []), record.get("bf16_ms", []), strict=True)]


def _spread(values: list[float] | None, digits: int) -> str:
    if not values:
        return "-"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _arms(widths: Sequence[int], device: torch.device) -> tuple[list[Arm], list[str]]:
    """Return what can run here, and a line per thing that cannot."""
    names = ("tinygemm", "gemlite") if device.type == "cuda" else ("onnxruntime", "tinygemm")
    if impossible := [width for width in widths if not any(width in BITS[name] for name in names)]:
        have = "; ".join(f"{name} {', '.join(map(str, BITS[name]))}" for name in names)
        raise UserError(f"decode: no engine on the {device.type} runs {impossible[0]} bits; there are {have}")
    missing = [name for name in names if name in _INSTALL and find_spec(name) is None]
    left_out = [f"{name} is not installed: pip install {_INSTALL[name]}" for name in missing]
    arms = [Arm(BASELINE, "torch", None, "bfloat16", partial(_torch, device=device))]
    for width in dict.fromkeys(widths):
        for name in (each for each in names if each not in missing):
            if width not in BITS[name]:
                left_out.append(f"{name} does not run {width} bits, only {', '.join(map(str, BITS[name]))}")
            elif name == "onnxruntime":
                arms.append(Arm(f"{name} {width} bits", name, width, "float32", _onnx))
                rounded = partial(_onnx, int8_activations=True)
                arms.append(Arm(f"{name} {width} bits, int8 activations", name, width, "int8", rounded))
            else:
                make = TinyGemm if name == "tinygemm" else engines.gemlite_linear
                build = partial(_torch, device=device, make=make)
                arms.append(Arm(f"{name} {width} bits", name, width, "bfloat16", build))
    if "onnxruntime" in names and "onnxruntime" not in missing:  # the largest comes last
        arms.append(Arm("onnxruntime fp32", "onnxruntime", None, "float32", _onnx))
    return arms, left_out


def _torch(
    model: Any, packed: dict[str, QuantizedWeight], length: int, device: torch.device, make: Any = None
) -> Runner:
    model = model.to(torch.bfloat16)
    if make is not None:
        model = engines.swap_layers(model, packed, make, device)
    return TorchRunner(model.to(device), length)


def _onnx(
    model: Any, packed: dict[str, QuantizedWeight], length: int, *, int8_activations: bool = False
) -> Runner:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    return OnnxRunner(model, length, packed, int8_activations=int8_activations)


def _packed(
    architecture: Architecture, bits: int | None, grid: Literal["integer", "stretched"]
) -> PackedModel:
    """Make the random model, packed at a width; nothing is packed without one."""
    extra = {} if bits is None else {"quantizer": partial(STE, bits=bits, grid=grid)}
    module = architecture.module(**extra)
    torch.manual_seed(0)
    module.configure_model()
    layers = {} if bits is None else pack(module, torch.float32, torch.bfloat16)
    return PackedModel(module, layers, torch.float32, torch.bfloat16, {})


@torch.inference_mode()
def _logits(packed: PackedModel, tokens: list[int]) -> Tensor:
    model: Any = packed.plain()
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1].cpu()


def _warm(
    arm: Arm,
    packed: PackedModel,
    tokens: list[int],
    want: Tensor,
    device: torch.device,
    record: dict[str, Any],
) -> Runner:
    """Build and check an engine; one that fails leaves nothing that would count as the next one's memory."""
    before = _held(device)
    with device:
        model = packed.plain()
    runner = arm.build(model, packed.layers, len(tokens) + NEW_TOKENS)
    del model
    record |= {"weight_bytes": runner.weight_bytes, "gpu_bytes": None}
    logits = runner.prompt(tokens[:_CHECKED])
    record["difference"] = ((logits - want).abs().max() / want.abs().max()).item()
    if not record["difference"] <= _TOLERANCE[arm.activations]:  # NaN is wrong, too
        raise WrongResultError(f"logits are off by {record['difference']:.1e} of the largest")
    runner.prompt(tokens)
    runner.decode(NEW_TOKENS)
    if device.type == "cuda":
        record["gpu_bytes"] = _held(device) - before
    return runner


def _take_turns(runner: Runner, baseline: Runner, rounds: int) -> dict[str, list[float]]:
    """Time both in milliseconds per token; they take turns in going first."""
    times: dict[str, list[float]] = {"ms": [], "bf16_ms": []}
    turns = [("ms", runner), ("bf16_ms", baseline)]
    for _ in range(rounds):
        for key, each in turns:
            times[key].append(each.decode(NEW_TOKENS))
        turns.reverse()
    return times


def _held(device: torch.device) -> int:
    """Return the bytes on a GPU that something still refers to."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

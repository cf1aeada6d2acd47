"""`stableqat bench`: time and memory of each method's step, beside the untouched model's.

All arms run in one process on the same weights and inputs and take turns pass by pass, so a ratio compares
passes within seconds of each other. Results go to a JSON file after every mode, and at the end to a table and
a picture made from it.
"""

import datetime
import inspect
import json
import platform
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stableqat.errors import UserError, check_range
from stableqat.files import new_results, whole_file
from stableqat.terminal import terminal

if TYPE_CHECKING:
    from stableqat.bench.architecture import Architecture

_PACKAGES = (
    "stableqat",
    "torch",
    "triton",
    "transformers",
    "timm",
    "lightning",
    "torchao",
    "onnxruntime",
    "gemlite",
)


def bench(
    *,
    model: str,
    batch: int,
    tokens: int | None = None,
    methods: Sequence[str] = ("all",),
    bits: int = 4,
    input_bits: Sequence[int] = (),
    rival: Sequence[str] = (),
    modes: Sequence[Literal["eager", "compiled", "graphed"]] = (),
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] | None = None,
    rounds: int = 10,
    seeds: int = 3,
    device: str | None = None,
    kernels: bool = True,
    decode: Sequence[int] = (),
    grid: Literal["integer", "stretched"] = "integer",
    gather: int = 0,
    out: str | None = None,
) -> int:
    """Measures time and memory of quantization-aware training beside the same model in full precision.

    Args:
        model: Name of a model, such as llama-3.2-1b or deit-small, or its YAML file. Weights are random.
        batch: Rows or images per step.
        tokens: Tokens per row, for language models only. Default: 2048.
        methods: Methods by name, or all.
        bits: Width of the methods, and of torchao's layer, which is measured if torchao is installed.
        input_bits: Measure each method also with inputs of so many bits (LSQ+), besides inputs as they are.
        rival: FILE.py:FACTORY, your own function that takes an nn.Linear and returns the module to replace
            it; each is an arm.
        modes: eager; compiled, block by block, as fit does on several GPUs; graphed, compiled blocks replayed
            as CUDA graphs, as fit does on one. Full precision runs in the same modes. Default: eager and
            compiled on a CPU, eager and graphed on a GPU.
        precision: As for Lightning's Trainer. Default: bf16-mixed on a GPU, 32-true on a CPU.
        rounds: Timed passes per arm.
        seeds: Number of different inputs, used in turn.
        device: cuda or cpu. Default: a GPU if there is one.
        kernels: On a GPU, also measure fake quantization alone as a share of a copy's bandwidth.
        decode: Measure decoding at these bits instead: one stream (batch 1) after a prompt of `tokens`
            (default 128), with the low-bit engines that are installed, beside bfloat16.
        grid: With `decode`, the grid of the weights; some engines take longer for half-integers (stretched).
        gather: Measure FSDP2 on so many processes of this machine instead, one per GPU: time, memory and
            bytes of a step by what it gathers. `batch` is that of a process, and the method StableQAT unless
            `methods` names another.
        out: New JSON file; table (.md) and picture (.png) go beside it. Default: a file in the folder bench,
            named after the model, shape, precision and device.

    Returns:
        0, also if a rival fails or an arm does not fit into memory: its row says so.
    """
    changed = _changed(dict(locals()))
    command = _command(changed)
    for key, number in {"batch": batch, "rounds": rounds, "seeds": seeds}.items():
        check_range(key, number, 1)
    for width in input_bits:
        check_range("input_bits", width, 2, 8)
    from stableqat.bench.architecture import read_architecture

    architecture = read_architecture(model)
    if decode:
        if batch != 1:
            raise UserError(f"batch: must be 1 with --decode, which measures one stream, not {batch}")
        if training := changed.keys() & {
            "methods",
            "bits",
            "input_bits",
            "rival",
            "modes",
            "precision",
            "seeds",
            "kernels",
        }:
            raise UserError(f"{min(training)}: applies to training steps only; remove it with --decode")
        return _bench_decode(command, architecture, decode, grid, tokens, rounds, _device(device), out)
    if grid != "integer":
        raise UserError("grid: applies to decoding only; remove it, or add --decode")
    if gather:
        return _bench_gather(command, changed, architecture, gather, tokens, bits, _device(device), out)
    from stableqat.bench.arms import build_arms, calibrate_arms, method_factories, rival_factories
    from stableqat.bench.kernels import measure_kernels
    from stableqat.bench.measure import measure
    from stableqat.bench.workload import Workload

    where = _device(device)
    on_gpu = where.type == "cuda"
    modes = modes or ("eager", "graphed" if on_gpu else "compiled")
    if "graphed" in modes and not on_gpu:
        raise UserError("modes: graphed needs a CUDA device; remove it")
    precision = precision or ("bf16-mixed" if on_gpu else "32-true")
    factories = method_factories(methods, bits)
    rivals = rival_factories(rival, bits, list(factories))
    workload = Workload(
        architecture, batch=batch, tokens=tokens, precision=precision, device=where, seeds=seeds
    )
    shape = f"{batch}x{workload.tokens}" if workload.tokens else f"{batch}"
    name = _device_name(where)
    target = _target(out, f"{architecture.name}-{shape}-{precision}-{name if on_gpu else 'cpu'}")

    tell = _teller()
    untouched = workload.build_model()
    inputs = workload.batches()
    arms = build_arms(untouched, workload.module, factories, rivals, list(dict.fromkeys(input_bits)))
    calibrate_arms(arms, inputs[0], workload.loss)
    tell(f"{len(arms)} arms of {architecture.name} on {name}: {', '.join(arm.name for arm in arms)}")
    result: dict[str, Any] = {
        **_circumstances(command, where),
        "settings": {
            "model": architecture.name,
            "batch": batch,
            "tokens": workload.tokens,
            "precision": precision,
            "bits": bits,
            "loss": workload.kind_of_loss,
            "rounds": rounds,
            "parameters": sum(parameter.numel() for parameter in untouched.parameters()),
            "items": workload.items,
            "unit": workload.unit,
        },
        "seeds": list(workload.seeds),
        "modes": {},
        "kernels": None,
    }
    for mode in dict.fromkeys(modes):
        result["modes"][mode] = measure(mode, arms, workload, inputs, rounds, tell)
        _write_json(target, result)
    if kernels and on_gpu:
        tell("kernels alone")
        result["kernels"] = measure_kernels(factories, where)
        _write_json(target, result)
    from stableqat.bench import report
    from stableqat.bench.plot import draw

    with whole_file(target.with_suffix(".png")) as part:
        draw(result, part)
    _publish(target, report.markdown(result), list(report.terminal(result)), ".md", ".png")
    return 0


def _bench_decode(
    command: str,
    architecture: "Architecture",
    widths: Sequence[int],
    grid: Literal["integer", "stretched"],
    tokens: int | None,
    rounds: int,
    where: Any,
    out: str | None,
) -> int:
    from stableqat.bench.decode import markdown, measure_decode

    device = _device_name(where) if where.type == "cuda" else "cpu"
    bits = "-".join(map(str, widths))
    kind = "" if grid == "integer" else f"-{grid}"
    target = _target(out, f"{architecture.name}-decode-{bits}-bits{kind}-{device}")
    measured = measure_decode(architecture, widths, grid, tokens, rounds, where, _teller())
    result = {**_circumstances(command, where), **measured}
    _write_json(target, result)
    text = markdown(result)
    _publish(target, text, [text], ".md")
    return 0


def _bench_gather(
    command: str,
    changed: dict[str, Any],
    architecture: "Architecture",
    processes: int,
    tokens: int | None,
    bits: int,
    where: Any,
    out: str | None,
) -> int:
    import torch

    from stableqat.bench.arms import method_factories
    from stableqat.bench.gather import Settings, markdown, measure_gathers
    from stableqat.bench.workload import Workload

    on_gpu = where.type == "cuda"
    check_range("gather", processes, 2, torch.cuda.device_count() if on_gpu else inf)
    if other := changed.keys() & {"input_bits", "rival", "modes", "seeds", "kernels"}:
        raise UserError(f"{min(other)}: does not apply to gathers; remove it with --gather")
    methods = method_factories(changed.get("methods", ("StableQAT",)), bits)
    if len(methods) > 1:
        raise UserError("methods: name one with --gather")
    precision: Any = changed.get("precision") or ("bf16-mixed" if on_gpu else "32-true")
    name, batch, rounds = _device_name(where), changed["batch"], changed.get("rounds", 10)
    workload = Workload(
        architecture, batch=batch, tokens=tokens, precision=precision, device=where, seeds=2 * processes
    )
    workload.module.check_architecture(next(iter(methods.values())))
    tokens = workload.tokens
    shape = f"{processes}x{batch}" + (f"x{tokens}" if tokens else "")
    target = _target(
        out, f"{architecture.name}-gather-{bits}-bits-{shape}-{precision}-{name if on_gpu else 'cpu'}"
    )
    method = next(iter(methods.items()))
    settings = Settings(architecture, batch, tokens, precision, method, rounds, processes, where.type)
    result = {
        **_circumstances(command, where),
        "settings": {
            "model": architecture.name,
            "processes": processes,
            "batch": batch,
            "tokens": tokens,
            "precision": precision,
            "bits": bits,
            "rounds": rounds,
        },
        "seeds": list(workload.seeds),
        "arms": measure_gathers(settings),
    }
    _write_json(target, result)
    text = markdown(result)
    _publish(target, text, [text], ".md")
    return 0


def _circumstances(command: str, where: Any) -> dict[str, Any]:
    """Command, date, device and versions."""
    import torch

    name = _device_name(where)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name if where.type == "cuda" else f"{name}, {torch.get_num_threads()} thread(s)",
        "versions": _versions(torch.version.cuda),
    }


def _device_name(where: Any) -> str:
    import torch

    return torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()


def _publish(target: Path, text: str, pieces: Sequence[Any], *companions: str) -> None:
    """Write the table and show it; a terminal shows the pieces in its place."""
    with whole_file(target.with_suffix(".md")) as part:
        part.write_text(text)
    console = terminal()
    for piece in pieces if console.is_terminal else [text]:
        console.print(piece, soft_wrap=isinstance(piece, str))
    console.print(f"written: {', '.join([str(target), *(target.with_suffix(s).name for s in companions)])}")


def _changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    defaults = inspect.signature(bench).parameters
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return {key: value for key, value in plain.items() if value != defaults[key].default}


def _command(changed: dict[str, Any]) -> str:
    """The command line that sets these arguments."""
    words = ["stableqat", "bench"]
    for name, value in changed.items():
        values = (
            value if isinstance(value, tuple) else [str(value).lower() if isinstance(value, bool) else value]
        )
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _device(name: str | None) -> Any:
    from stableqat.evaluate.processes import choose_device

    device = choose_device(name)
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device: must be cuda or cpu, not {name}")
    return device


def _processor() -> str:
    try:
        described = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        described = None
    return described[1].strip() if described else platform.processor() or platform.machine()


def _versions(cuda: str | None) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions | ({"cuda": cuda} if cuda else {})


def _target(out: str | None, name: str) -> Path:
    out = out or f"bench/{re.sub('[^a-z0-9.]+', '-', name.lower())}.json"
    return new_results(out, ".md", ".png")


def _teller() -> Callable[[str], None]:
    """Reports progress on stderr."""
    console, began = terminal(stderr=True), time.monotonic()
    return lambda text: console.print(f"{time.monotonic() - began:6.1f} s  {text}")


def _write_json(target: Path, result: dict[str, Any]) -> None:
    with whole_file(target) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")

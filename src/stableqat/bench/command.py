"""`stableqat bench`: time and memory of each method's step, beside the untouched model's.

All arms run in one process on the same weights and inputs, taking turns pass by pass; a ratio compares passes
within seconds of each other. Results go to a JSON file after every mode, and at the end to a table and a
picture made from it.
"""

import datetime
import inspect
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stableqat.errors import UserError, check_range
from stableqat.files import whole_file
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
    rival: Sequence[str] = (),
    modes: Sequence[Literal["eager", "compiled", "graphed"]] = ("eager", "compiled"),
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] | None = None,
    rounds: int = 10,
    seeds: int = 3,
    device: str | None = None,
    kernels: bool = True,
    decode: Sequence[int] = (),
    grid: Literal["integer", "stretched"] = "integer",
    out: str | None = None,
) -> int:
    """Measures time and memory of quantization-aware training beside the same model in full precision.

    Args:
        model: Name of a model, such as llama-3.2-1b or deit-small, or its YAML file. Weights are
            random.
        batch: Rows or images per step.
        tokens: Tokens per row, default 2048; language models only.
        methods: Methods by name, or all.
        bits: Width of the methods, and of torchao's layer, which is measured if torchao is installed.
        rival: FILE.py:FACTORY, a function in a file of yours that takes an nn.Linear and returns the module
            to put in its place; each is an arm.
        modes: eager; compiled, the whole model by torch.compile; graphed, forward and backward as one CUDA
            graph. Full precision runs in the same modes.
        precision: As Lightning's Trainer names it; default bf16-mixed on a GPU and 32-true on a CPU.
        rounds: Timed passes of each arm.
        seeds: Number of different inputs, used in turn.
        device: cuda or cpu; default a GPU if there is one.
        kernels: On a GPU, also measure fake quantization alone as a share of a copy's bandwidth.
        decode: Measure decoding at these bits instead, one stream (batch 1) after a prompt of `tokens`
            (default 128), with the low-bit engines that are installed, beside bfloat16.
        grid: Grid of the decoded weights, with `decode`: half-integers (stretched) may cost an engine more.
        out: New JSON file; table (.md) and picture (.png) go beside it. Default: a file in the folder bench,
            named after the model, shape, precision and device.

    Returns:
        0, also if a rival fails or an arm does not fit into memory: its row says so.
    """
    given = dict(locals())
    command = _command(given)
    for key, number in {"batch": batch, "rounds": rounds, "seeds": seeds}.items():
        check_range(key, number, 1)
    from stableqat.bench.architecture import read_architecture

    architecture = read_architecture(model)
    if decode:
        _refuse_training_options(given)
        return _bench_decode(command, architecture, decode, grid, tokens, rounds, _device(device), out)
    if grid != "integer":
        raise UserError("grid: applies to decoding only; remove it, or add --decode")
    from stableqat.bench.arms import build_arms, method_factories, rival_factories
    from stableqat.bench.kernels import measure_kernels
    from stableqat.bench.measure import measure
    from stableqat.bench.workload import Workload

    where = _device(device)
    on_gpu = where.type == "cuda"
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
    arms = build_arms(untouched, workload.module, factories, rivals)
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
    _publish(target, result)
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
    with whole_file(target.with_suffix(".md")) as part:
        part.write_text(text)
    console = terminal()
    console.print(text)
    console.print(f"written: {target}, {target.with_suffix('.md').name}")
    return 0


def _refuse_training_options(given: dict[str, Any]) -> None:
    if given["batch"] != 1:
        raise UserError(f"batch: must be 1 with --decode, which measures one stream, not {given['batch']}")
    defaults = inspect.signature(bench).parameters
    for key in ("methods", "bits", "rival", "modes", "precision", "seeds", "kernels"):
        value, default = given[key], defaults[key].default
        if (tuple(value) if isinstance(value, list) else value) != default:
            raise UserError(f"{key}: applies to training steps only; remove it with --decode")


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


def _publish(target: Path, result: dict[str, Any]) -> None:
    """Table and picture, to files and to the terminal."""
    from stableqat.bench import report
    from stableqat.bench.plot import draw

    text = report.markdown(result)
    with whole_file(target.with_suffix(".md")) as part:
        part.write_text(text)
    with whole_file(target.with_suffix(".png")) as part:
        draw(result, part)
    console = terminal()
    if console.is_terminal:
        for piece in report.terminal(result):
            console.print(piece, soft_wrap=isinstance(piece, str))
    else:
        console.print(text)
    console.print(f"written: {target}, {target.with_suffix('.md').name}, {target.with_suffix('.png').name}")


def _command(arguments: dict[str, Any]) -> str:
    """The command line of these arguments, without defaults."""
    words = ["stableqat", "bench"]
    for name, parameter in inspect.signature(bench).parameters.items():
        value = arguments[name]
        listed = not isinstance(value, str) and isinstance(value, Sequence)
        if (tuple(value) if listed else value) != parameter.default:
            values = value if listed else [str(value).lower() if isinstance(value, bool) else value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise UserError(f"device: must be cuda or cpu, not {name}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device: PyTorch sees no {name} here; take cpu, or remove it")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _processor() -> str:
    import platform

    try:
        described = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        described = None
    return described[1].strip() if described else platform.processor() or platform.machine()


def _versions(cuda: str | None) -> dict[str, str]:
    import platform

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions | ({"cuda": cuda} if cuda else {})


def _target(out: str | None, name: str) -> Path:
    """The JSON file to write; it and its companions do not exist, and its folder is writable."""
    target = Path(out) if out else Path("bench", re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")
    if target.suffix != ".json":
        raise UserError(f"out: {out} must end in .json; the table (.md) and the picture (.png) go beside it")
    for path in (target, target.with_suffix(".md"), target.with_suffix(".png")):
        if path.exists():
            raise UserError(f"out: {path} already exists; move it, or name another file")
    try:
        if out is None:
            target.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {target.parent} cannot be created ({error.strerror}); name a file") from error
    if not target.parent.is_dir():
        raise UserError(f"out: {target.parent} is not a folder; create it, or name another")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"out: {target.parent} is not writable; name another folder")
    return target


def _teller() -> Callable[[str], None]:
    """Reports progress on stderr."""
    console, began = terminal(stderr=True), time.monotonic()
    return lambda text: console.print(f"{time.monotonic() - began:6.1f} s  {text}")


def _write_json(target: Path, result: dict[str, Any]) -> None:
    with whole_file(target) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")

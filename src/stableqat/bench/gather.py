"""FSDP2 on several processes: time, memory and bytes of a step, by what its all-gathers carry.

Arms are full precision gathered in float32, in bfloat16 and, if torchao is installed, in its float8, and a
method gathered as float32 weights or as codes with scales. A step is forward, backward and the optimizer;
its blocks are compiled on a GPU, as `fit` does on several. Every process holds its shards of all arms, which
take turns step by step. Losses of the method's two arms show that both train alike.
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from stableqat.bench.architecture import Architecture
from stableqat.bench.arms import reason
from stableqat.bench.measure import timed
from stableqat.bench.report import header
from stableqat.bench.workload import Precision, Workload
from stableqat.files import whole_file
from stableqat.layers.gathered import gathered_weights, pull_back
from stableqat.layers.linear import quantized_layers
from stableqat.modules.compiled import compile_blocks
from stableqat.modules.parallel import shard
from stableqat.quantizers import QuantizerFactory

LINK = 50e9  # bytes per second at 400 Gbit/s
NOTES = (
    "Medians over rounds (smallest-largest) of the first process. Gathered: what a process has after a step's"
    " all-gathers; its time at 400 Gbit/s per process among many is arithmetic. Reductions of float32"
    " gradients come on top and are the same for all. Memory: of one process, with parameters and optimizer"
    " states. Losses: of the first two steps, on the same batches. GB = 10^9 bytes."
)
_WARM_UP = 4
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Settings:
    """What a benchmark of gathers measures.

    Attributes:
        architecture: The model.
        batch: Rows or images per step and process.
        tokens: Tokens per row.
        precision: As for Lightning's Trainer.
        method: Name and quantizer of the method.
        rounds: Timed steps per arm.
        processes: Number of processes, each on a device of its own if devices are GPUs.
        device: cuda or cpu.
    """

    architecture: Architecture
    batch: int
    tokens: int | None
    precision: Precision
    method: tuple[str, QuantizerFactory]
    rounds: int
    processes: int
    device: str


class Counting:
    """The all-gather of FSDP2, and how many bytes its results take."""

    def __init__(self) -> None:
        self.gathered = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a result."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Gather."""
        self.gathered += output_tensor.nbytes
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name up to torch 2.13
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


@dataclass
class Arm:
    """A sharded model that trains.

    Attributes:
        step: Compute a training step on the batch of this number; returns its loss.
        counting: Its all-gathers.
        result: Its row.
    """

    step: Callable[[int], torch.Tensor]
    counting: Counting
    result: dict[str, Any] = field(default_factory=dict)


def measure_gathers(settings: Settings) -> dict[str, dict[str, Any]]:
    """Run all arms in processes of one group.

    Args:
        settings: What to measure.

    Returns:
        By arm: `step_ms` by round, `peak_bytes` (null on a CPU), `gathered_bytes` of a step and `losses`; or
        `failed` with the reason.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder)
        torch.multiprocessing.spawn(_process, (settings, place), nprocs=settings.processes)
        result: dict[str, dict[str, Any]] = json.loads((place / "result.json").read_text())
    return result


def _process(rank: int, settings: Settings, folder: Path) -> None:
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=settings.processes,
        device_id=device if on_gpu else None,
    )
    results = measure(settings, device)
    if not rank:
        with whole_file(folder / "result.json") as part:
            part.write_text(json.dumps(results))
    dist.destroy_process_group()


def measure(settings: Settings, device: torch.device) -> dict[str, dict[str, Any]]:
    """Run all arms, in one of the group's processes; see `measure_gathers`."""
    name, quantizer = settings.method
    makers: dict[str, Callable[..., Any]] = {
        "FP, float32": partial(_shard, quantizer=None),
        "FP, bfloat16": _shard_in_bfloat16,
        f"{name}, float32": partial(_shard, quantizer=quantizer),
        f"{name}, codes": partial(_shard, quantizer=quantizer, codes=True),
    }
    if find_spec("torchao") is not None:
        makers["FP, torchao float8"] = partial(_shard_in_float8, quantizer=quantizer)
    arms: dict[str, Arm] = {}
    results: dict[str, dict[str, Any]] = {}
    for each, make in makers.items():
        try:
            arms[each] = _built(make, settings, device)
            results[each] = arms[each].result
        except Exception as error:
            if "torchao" not in each:
                raise
            results[each] = {"failed": reason(error)}
    for number in range(settings.rounds):
        turn = number % len(arms)
        for each in [*arms, *arms][turn : turn + len(arms)]:
            arm = arms[each]
            dist.barrier()
            arm.result["step_ms"] += timed(device, partial(arm.step, number))
    return results


def _built(make: Callable[..., Any], settings: Settings, device: torch.device) -> Arm:
    """Make an arm, warm it up, and note its losses, bytes and memory."""
    on_gpu = device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    workload = Workload(
        settings.architecture,
        batch=settings.batch,
        tokens=settings.tokens,
        precision=settings.precision,
        device=device,
        seeds=settings.processes * 2,
    )
    model, counting = workload.build_model(), Counting()
    mesh = dist.init_device_mesh(
        device.type, (settings.processes, 1), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    with workload.autocast():
        made = make(model, workload, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(counting)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE, fused=True if on_gpu else None
    )
    weights, batches = gathered_weights(model), workload.batches()

    def step(number: int) -> torch.Tensor:
        loss = workload.loss(model, batches[(2 * dist.get_rank() + number) % len(batches)])
        loss.backward()
        pull_back(weights)
        optimizer.step()
        optimizer.zero_grad()
        if made is not None:
            made()
        return loss.detach()

    arm = Arm(step, counting)
    arm.result["losses"] = [step(number).item() for number in range(_WARM_UP)][:2]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    counting.gathered = 0
    step(0)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    arm.result |= {"step_ms": [], "peak_bytes": peak, "gathered_bytes": counting.gathered}
    return arm


def _compile(model: nn.Module, workload: Workload) -> None:
    if workload.device.type == "cuda":
        compile_blocks(workload.module.blocks(model), required=False)


def _shard(
    model: nn.Module, workload: Workload, mesh: Any, quantizer: QuantizerFactory | None, codes: bool = False
) -> None:
    workload.module.assemble(model, quantizer)
    _compile(model, workload)
    dtype = torch.bfloat16 if workload.precision == "bf16-mixed" else next(model.parameters()).dtype
    shard(model, workload.module.blocks(model), mesh, dtype if codes else None)


def _shard_in_bfloat16(model: nn.Module, workload: Workload, mesh: Any) -> None:
    workload.module.assemble(model, None)
    _compile(model, workload)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in (*workload.module.blocks(model), model):
        fully_shard(unit, mesh=mesh["data_parallel"], mp_policy=policy)


def _shard_in_float8(
    model: nn.Module, workload: Workload, mesh: Any, quantizer: QuantizerFactory
) -> Callable[[], None]:
    from torchao.float8 import (
        Float8LinearConfig,
        convert_to_float8_training,
        precompute_float8_dynamic_scale_for_fsdp,
    )

    with torch.device("meta"):
        like = workload.module.build_model()
    workload.module.assemble(like, quantizer, initialize=False)
    names = quantized_layers(like).keys()
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=workload.device.type != "cuda")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    workload.module.assemble(model, None)
    _compile(model, workload)
    for unit in (*workload.module.blocks(model), model):
        fully_shard(unit, mesh=mesh["data_parallel"])
    return partial(precompute_float8_dynamic_scale_for_fsdp, model)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result.

    Args:
        result: Circumstances, settings and `arms`.
    """
    arms, settings = result["arms"], result["settings"]
    done = {name: arm for name, arm in arms.items() if "failed" not in arm}
    base = next(arm for name, arm in done.items() if not name.startswith("FP") and "float32" in name)
    lines = [
        *(f"{line}  " for line in header(result)),
        "",
        f"{settings['model']}, {settings['processes']} processes, {settings['bits']} bits.",
        "",
        "| gathered | step, ms | ratio | GB per step | of float32 | ms at 400 Gbit/s | peak GB | losses |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, arm in arms.items():
        if "failed" in arm:
            lines.append(f"| {name} | {arm['failed']} | | | | | | |")
            continue
        times, gathered = arm["step_ms"], arm["gathered_bytes"]
        peak = "" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 1e9:.1f}"
        step = f"{median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
        ratio = median(a / b for a, b in zip(times, base["step_ms"], strict=True))
        losses = ", ".join(f"{loss:.6f}" for loss in arm["losses"])
        share = gathered / base["gathered_bytes"]
        lines.append(
            f"| {name} | {step} | {ratio:.3f} | {gathered / 1e9:.3f} | {share:.3f} | "
            f"{1e3 * gathered / LINK:.1f} | {peak} | {losses} |"
        )
    return "\n".join([*lines, "", NOTES, ""])

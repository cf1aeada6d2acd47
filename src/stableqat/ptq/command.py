"""`stableqat ptq`: rounds a model without training, into a run that everything else takes.

The grids, scales and layers are those of training, so a run that starts from it (`--model.init_from RUN
--model.init_quantizers start`) starts with exactly what it deploys.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stableqat.errors import UserError, check_range
from stableqat.files import check_source, new_folder, writing
from stableqat.terminal import progress, quiet_libraries, terminal

RECORD = "ptq.json"  # in the run's folder: how it was made, and what rounding did to each layer
CALIBRATED = ("gptq", "adaround", "lapq")


def ptq(
    source: str,
    *,
    out: str,
    method: Literal["rtn", "mse", "gptq", "adaround", "lapq"] = "gptq",
    bits: int | None = None,
    levels: int | None = None,
    grid: Literal["integer", "stretched"] | None = None,
    group_size: int | None = None,
    skip: Sequence[str] | None = None,
    data: str | None = None,
    samples: int = 128,
    block_size: int | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    steps: int = 1000,
    evaluations: int = 2000,
    batch_size: int = 4,
    seed: int = 0,
    device: str | None = None,
) -> int:
    """Rounds a model without training, and writes it as a run.

    Args:
        source: Run, checkpoint, transformers or timm folder, or Hub name of a language model.
        out: New run folder, such as lightning_logs/ptq/llama-2bit.
        method: rtn rounds to nearest, with scales that reach the largest weight; mse rounds to nearest, with
            scales of the least squared error; gptq and adaround minimise the error of each layer's output,
            from mse's scales; lapq sets all scales by the model's loss.
        bits: Width of a code, 1 to 8.
        levels: 3 for the ternary grid, instead of bits.
        grid: Default: integer.
        group_size: Inputs that share a scale. Default: a whole row.
        skip: Layers to leave alone, as shell patterns. Default: the heads, or what the run left alone.
        data: Text or images to calibrate on: file, folder, tokenized set or Hub name. For gptq, adaround and
            lapq.
        samples: Rows or images to calibrate on.
        block_size: Tokens per row. Default: 2048, at most what the model takes.
        damping: For gptq: added to the diagonal of the second moment, as a share of its mean.
        act_order: For gptq: round inputs in the order of falling second moments.
        steps: For adaround: steps per layer.
        evaluations: For lapq: how often the loss may be computed.
        batch_size: Rows per forward pass.
        seed: Draws the rows.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one. Blocks are moved to it one by one.

    Returns:
        0.
    """
    if bits is None and levels is None:
        raise UserError("bits: missing; give the width of a code, such as --bits 4")
    if method in CALIBRATED and data is None:
        raise UserError(f"data: missing; {method} calibrates on text or images of the model's kind")
    counts = {"samples": samples, "batch_size": batch_size, "steps": steps, "evaluations": evaluations}
    for key, count in counts.items():
        check_range(key, count, 1)
    check_range("damping", damping, 0)
    check_range("block_size", block_size, 2, null=True)
    check_source(source)
    quiet_libraries()
    # torch is slow to import; mistakes above are refused without it
    from functools import partial

    from stableqat.evaluate.processes import choose_device
    from stableqat.ptq.rounding import Settings, round_model
    from stableqat.ptq.subject import find_subject
    from stableqat.quantizers import STE
    from stableqat.runs import write_run

    place = choose_device(device)
    options: dict[str, Any] = {"bits": bits, "levels": levels, "grid": grid, "group_size": group_size}
    given = {key: value for key, value in options.items() if value is not None}
    factory = partial(STE, scale_init="max" if method == "rtn" else "signed_mse", **given)
    settings = Settings(
        method=method,
        data=data,
        samples=samples,
        block_size=block_size,
        damping=damping,
        act_order=act_order,
        steps=steps,
        evaluations=evaluations,
        batch_size=batch_size,
        seed=seed,
    )
    with new_folder(out) as part:
        subject = find_subject(source, factory, skip)
        subject.module.configure_model()
        with progress(None) as show:
            record = round_model(subject, settings, place, show)
        with writing(f"out: {out}", "nothing is left of it, name another folder"):
            target = Path(out).expanduser()
            write_run(part, subject.module, place=target, tokenizer=subject.tokenizer, data=subject.data)
            (part / RECORD).write_text(json.dumps({"source": source, **record}, indent=1))
    lines = [f"{out}: {record['in_words']}"]
    if "loss" in record:
        losses = ", ".join(f"{loss:.4g} {what}" for what, loss in record["loss"].items())
        lines.append(f"loss on the calibration data: {losses}")
    terminal().print("\n".join([*lines, f"next: stableqat evaluate {out}"]))
    return 0

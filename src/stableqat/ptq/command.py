"""`stableqat ptq`: rounds a model without training, into a run that everything else takes.

The grids, scales and layers are those of training, so a run that starts from it (`--model.init_from RUN
--model.init_quantizers start`) starts with exactly what it deploys. torchrun divides the calibration data:
`torchrun --nproc-per-node 4 --no-python stableqat ptq ...`.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from stableqat.errors import UserError, check_range, counted
from stableqat.files import check_source, new_folder, remove, writing
from stableqat.terminal import quiet_libraries, terminal

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
    skip: Sequence[str] = (),
    data: str | None = None,
    text_column: str = "text",
    samples: int = 128,
    block_size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    damping: float = 0.01,
    act_order: bool = True,
    steps: int = 1000,
    evaluations: int = 2000,
    bias_correction: bool = False,
    device: str | None = None,
) -> int:
    """Rounds a model without training, and writes it as a run.

    An interrupted run leaves OUT.partial, from which the same command goes on.

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
        data: Text or images to calibrate on: file, folder, tokenized set or Hub name; its training split, or
            all of it. For gptq, adaround, lapq and bias_correction.
        text_column: Column that holds the text.
        samples: Rows or images to calibrate on.
        block_size: Tokens per row. Default: 2048, at most what the model takes.
        batch_size: Rows per forward pass.
        seed: Draws the rows.
        damping: For gptq: added to the diagonal of the Hessian, as a share of its mean.
        act_order: For gptq: round inputs in the order of falling second moments. Without it, the scales of
            groups follow the weights that earlier groups have changed.
        steps: For adaround: steps per layer.
        evaluations: For lapq: how often the loss may be computed.
        bias_correction: Add to the biases what rounding takes from the mean of each output.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one. Blocks are moved to it one by one; for
            lapq, the whole model.

    Returns:
        0.
    """
    if bits is None and levels is None:
        raise UserError("bits: missing; give the width of a code, such as --bits 4")
    if data is None and (method in CALIBRATED or bias_correction):
        asker = method if method in CALIBRATED else "bias_correction"
        raise UserError(f"data: missing; {asker} calibrates on text or images of the model's kind")
    counts = {"samples": samples, "batch_size": batch_size, "steps": steps, "evaluations": evaluations}
    for key, count in counts.items():
        check_range(key, count, 1)
    check_range("damping", damping, 0)
    check_range("block_size", block_size, 2, null=True)
    check_source(source)
    options: dict[str, Any] = {"bits": bits, "levels": levels, "grid": grid, "group_size": group_size}
    given = {key: value for key, value in options.items() if value is not None}
    quiet_libraries()
    # torch is slow to import; mistakes above are refused without it
    from functools import partial

    from stableqat.evaluate.processes import processes
    from stableqat.ptq.outcome import Outcome, in_words, kinds
    from stableqat.ptq.rounding import Settings, round_model
    from stableqat.ptq.subject import calibration_batches, find_subject, fingerprint
    from stableqat.ptq.unfinished import unfinished
    from stableqat.quantizers import STE
    from stableqat.runs import write_run

    settings = Settings(method, damping, act_order, bias_correction, steps, evaluations)
    factory = partial(STE, scale_init="max" if method == "rtn" else "signed_mse", **given)
    drawn: dict[str, Any] = {
        "text_column": text_column,
        "samples": samples,
        "block_size": block_size,
        "batch_size": batch_size,
        "seed": seed,
    }
    record = {"source": source, "data": data, "skip": list(skip), **given, **vars(settings), **drawn}
    with processes(device) as (share, place), new_folder(out) if share.rank == 0 else nullcontext() as part:
        with share.first_alone():
            subject = find_subject(source, factory, skip, data)
            batches = [] if data is None else calibration_batches(subject, data, **drawn)
        module = subject.module
        if data is not None and len(batches) < share.count:
            found = f"{counted(len(batches), 'batch')} of {batch_size} for {share.count} processes"
            raise UserError(f"samples: {found}; raise it")
        outcome = Outcome({}, [])
        with unfinished(out, record | {"fingerprint": fingerprint(module, batches)}, share) as kept:
            if data is not None:
                mine = batches[share.rank :: share.count]
                outcome = round_model(module, mine, settings, device=place, share=share, unfinished=kept)
            if part is None:
                return 0
            with writing(f"out: {out}", "make room, and give the same command"):
                target = Path(out).expanduser()
                write_run(part, module, place=target, tokenizer=subject.tokenizer, data=subject.data)
                made = {"loss": outcome.loss, "layers": [vars(layer) for layer in outcome.layers]}
                (part / RECORD).write_text(json.dumps(record | made, indent=1))
    remove(kept.folder)
    terminal().print("\n".join([f"{out}: {kinds(module)}, rounded by {method}", *in_words(outcome)]))
    terminal().print(f"next: stableqat evaluate {out} --data {data or 'DATA'}")
    return 0

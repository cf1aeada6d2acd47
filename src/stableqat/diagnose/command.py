"""`stableqat diagnose`: which layers and widths need training, and mixed widths for a size budget.

What is measured goes into one file of the folder, from which everything else there is made. The folder of an
earlier diagnosis is therefore a source, too: another budget or tolerance needs no new measurement.
"""

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stableqat.diagnose.report import FILE, write_report
from stableqat.errors import UserError, check_known, check_range
from stableqat.files import check_source, new_folder, remove, writing
from stableqat.terminal import quiet_libraries, terminal

if TYPE_CHECKING:
    from stableqat.ptq.stream import Batch

ROW_TOKENS = 256  # unless the user says so


def diagnose(
    source: str,
    *,
    out: str,
    data: str | None = None,
    bits: Sequence[str] = ("2", "3", "4", "8"),
    grid: Literal["integer", "stretched"] | None = None,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    size_budget: Sequence[float] = (),
    tolerance: float = 0.1,
    quantizer: str = "StableQAT",
    text_column: str = "text",
    samples: int = 64,
    held_out: int = 4,
    block_size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    damping: float = 0.01,
    directions: int = 1,
    rise: float = 0.1,
    device: str | None = None,
) -> int:
    """Measures what rounding each layer does to a model's loss, and chooses mixed widths for a size budget.

    An interrupted diagnosis leaves OUT.partial, from which the same command goes on.

    Args:
        source: Run, checkpoint, transformers or timm folder, or Hub name of a language model; or the folder
            of an earlier diagnosis, whose measurements are taken.
        out: New folder for tables, pictures and mappings.
        data: Text or images of the model's kind: file, folder, tokenized set or Hub name; its training split,
            or all of it.
        bits: Widths of a code, 1 to 8, such as 2,3,4,8.
        grid: Default: that of the quantizer.
        group_size: Inputs that share a scale. Default: a whole row.
        skip: Layers to leave alone, as shell patterns. Default: the heads, or what the run left alone.
        size_budget: Bits per weight of mixed widths, on average over the quantized layers. A mapping is
            written for each. Default: the widths but the narrowest and the widest.
        tolerance: Rise of the loss, in nats, that is accepted of the whole model. A layer's share is that of
            its weights; rounding is enough where the loss rises no more.
        quantizer: Class of stableqat.quantizers that is to train; its grids and scales are measured.
        text_column: Column that holds the text.
        samples: Rows or images to calibrate GPTQ on.
        held_out: Further rows or images, for the losses.
        block_size: Tokens per row. Default: 256, at most what the model takes.
        batch_size: Rows per forward pass.
        seed: Draws the rows.
        damping: Of GPTQ: added to the diagonal of the Hessian, as a share of its mean.
        directions: Random directions per layer, along which the basin's width is measured; 0 takes it from
            the curvature, in half the time.
        rise: Of the loss, at which the basin ends.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one.

    Returns:
        0.
    """
    widths = _widths(bits)
    counts = {"samples": samples, "held_out": held_out, "batch_size": batch_size}
    for key, count in counts.items():
        check_range(key, count, 1)
    check_range("directions", directions, 0)
    check_range("damping", damping, 0)
    check_range("tolerance", tolerance, 0)
    check_range("rise", rise, 1e-12)
    check_range("block_size", block_size, 2, null=True)
    check_source(source)
    quiet_libraries()
    settings: dict[str, Any] = {"source": source, "data": data, "bits": widths, "skip": list(skip)}
    settings |= {"quantizer": quantizer, "grid": grid, "group_size": group_size, "text_column": text_column}
    settings |= {**counts, "block_size": block_size, "seed": seed, "damping": damping}
    settings |= {"directions": directions, "rise": rise}
    known = _known(source)
    if known is not None:
        _check_same(source, settings, known["settings"])
        widths = known["settings"]["bits"]
    elif data is None:
        raise UserError("data: missing; give text or images of the model's kind")
    for budget in size_budget:
        if not budget >= widths[0]:
            raise UserError(
                f"size_budget: {budget:g} bits per weight, but the narrowest width is {widths[0]}; raise it, "
                "or add a narrower one to --bits"
            )
    with new_folder(out) as part:
        partial = None
        if known is None:
            known, partial = _measured(settings, out, device)
        with writing(f"out: {out}", "make room, and give the same command"):
            lines = write_report(part, known, size_budget, tolerance, out)
    if partial is not None:
        remove(partial)
    terminal().print("\n".join(lines))
    return 0


def _widths(bits: Sequence[str]) -> list[int]:
    words = [word.strip() for each in bits for word in str(each).split(",")]
    if strangers := [word for word in words if word not in set("12345678")]:
        raise UserError(
            f"bits: {strangers[0]!r} is no width of a code; give numbers from 1 to 8, such as 2,3,4,8"
        )
    return sorted({int(word) for word in words})


def _check_same(source: str, asked: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse settings that measurements were not made with; what the user leaves out is no matter."""
    defaults = {key: each.default for key, each in signature(diagnose).parameters.items()}
    defaults |= {"source": source, "bits": _widths(defaults["bits"]), "skip": []}
    for key, value in asked.items():
        if value not in (defaults[key], known[key]):
            raise UserError(
                f"{key}: {source} was measured with {known[key]}, not {value}; leave it out, or name the "
                "model to measure again"
            )


def _known(source: str) -> dict[str, Any] | None:
    """What an earlier diagnosis holds; None for any other source."""
    file = Path(source).expanduser() / FILE
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return {key: found[key] for key in ("settings", "family", "skip", "measured")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not what a diagnosis holds; name its model instead") from error


def _measured(settings: dict[str, Any], out: str, device: str | None) -> tuple[dict[str, Any], Path]:
    """Measure, and return it with the folder that an interruption would have left."""
    # torch is slow to import; mistakes so far are refused without it
    from functools import partial

    from stableqat.diagnose.layers import Settings
    from stableqat.diagnose.measure import measure
    from stableqat.evaluate.processes import Share, choose_device
    from stableqat.ptq.subject import find_subject, fingerprint
    from stableqat.ptq.unfinished import unfinished

    place, make = choose_device(device), _class(settings["quantizer"])
    options = {key: settings[key] for key in ("grid", "group_size") if settings[key] is not None}
    factories: dict[int, Any] = {bits: partial(make, bits=bits, **options) for bits in settings["bits"]}
    subject = find_subject(
        settings["source"], factories[settings["bits"][0]], settings["skip"], settings["data"]
    )
    module = subject.module
    calibration, held_out = _drawn(subject, settings)
    how = Settings(factories, *(settings[key] for key in ("damping", "directions", "rise", "seed")))
    told = settings | {"fingerprint": fingerprint(module, [*calibration, *held_out])}
    with unfinished(out, told, Share()) as kept:
        found = measure(module, calibration, held_out, how, device=place, unfinished=kept)
    skip = None if tuple(module.skip) == tuple(module.heads) else list(module.skip)
    return {"settings": settings, "family": module.family, "skip": skip, "measured": found}, kept.folder


def _class(name: str) -> Any:
    """The class of a quantizer that trains the weight itself."""
    from inspect import isabstract

    from stableqat import quantizers

    named = {each: getattr(quantizers, each) for each in quantizers.__all__}
    classes = {each: found for each, found in named.items() if isinstance(found, type)}
    known = {
        each: found
        for each, found in classes.items()
        if issubclass(found, quantizers.Quantizer) and found.trains_weight and not isabstract(found)
    }
    check_known("quantizer", name, known)
    return known[name]


def _drawn(subject: Any, settings: dict[str, Any]) -> "tuple[list[Batch], list[Batch]]":
    """Batches to calibrate on, and those of other rows for the losses."""
    import torch

    from stableqat.ptq.subject import calibration_batches

    names = ("text_column", "block_size", "seed")
    rows = calibration_batches(
        subject,
        settings["data"],
        samples=settings["samples"] + settings["held_out"],
        batch_size=1,
        most_tokens=ROW_TOKENS,
        **{key: settings[key] for key in names},
    )

    def batches(part: "list[Batch]") -> "list[Batch]":
        size = settings["batch_size"]
        groups = [part[at : at + size] for at in range(0, len(part), size)]
        return [{key: torch.cat([row[key] for row in group]) for key in group[0]} for group in groups]

    return batches(rows[: settings["samples"]]), batches(rows[settings["samples"] :])

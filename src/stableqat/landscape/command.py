"""`stableqat landscape`: where runs lie in the loss around the weights they started from.

It asks whether rounding leaves a basin and training re-enters it, see docs/geometry.md. What is measured of a
run is kept part by part, so that an interrupted call resumes; tables and pictures are made from what is kept.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stableqat.errors import UserError, check_range
from stableqat.files import check_source, whole_file, writing
from stableqat.terminal import quiet_libraries, terminal

if TYPE_CHECKING:
    from stableqat.runs import Run


def landscape(
    runs: Sequence[str],
    *,
    out: str,
    parts: Sequence[Literal["ends", "lines", "inward", "map", "basin"]] = (
        "ends",
        "lines",
        "inward",
        "map",
        "basin",
    ),
    batches: int = 4,
    batch_size: int | None = None,
    block_size: int | None = None,
    points: int = 13,
    grid: int = 15,
    layers: int = 8,
    directions: int = 3,
    rise: float = 0.1,
    lanczos: int = 12,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str | None = None,
) -> int:
    """Measures the loss around the weights of runs: where rounding leads, and where training.

    The same command resumes an interrupted one, and measures runs and parts that are new.

    Args:
        runs: Runs that were trained from a start (init_from), or folders that hold runs, such as a study's.
            Runs that `stableqat ptq` made of the same start are drawn into the maps.
        out: Folder for the figures of each run (.json), the table (.csv) and the pictures.
        parts: What to measure: ends, the losses at start and end, latent and deployed; lines, the loss
            between them beside its quadratic prediction; inward, whether descent leads to the other end;
            map, a plane through the start, its rounding and the deployed model; basin, its radius per layer.
        batches: Validation batches that every loss is the mean of.
        batch_size: Rows per batch. Default: the run's.
        block_size: Tokens per row. Default: the run's.
        points: Points of a line.
        grid: Points along each side of a map.
        layers: How many layers to measure the basin of, evenly spread over the model.
        directions: Random directions per layer; the radius is their median.
        rise: Of the loss, at which the basin ends.
        lanczos: Products with the Hessian per layer, for its top eigenvector.
        dtype: fp32, or bf16 for lines and maps; curvature and radius are always in float32.
        device: cpu, cuda or cuda:1. Default: a GPU if there is one.

    Returns:
        0.
    """
    counts = {"batches": (batches, 1), "points": (points, 2), "grid": (grid, 2), "layers": (layers, 1)}
    counts |= {"directions": (directions, 1), "lanczos": (lanczos, 1)}
    for key, (number, least) in counts.items():
        check_range(key, number, least)
    check_range("batch_size", batch_size, 1, null=True)
    check_range("block_size", block_size, 2, null=True)
    check_range("rise", rise, 1e-12)
    for source in runs:
        check_source(source, local=True)
    quiet_libraries()
    # torch is slow to import; mistakes above are refused without it
    from stableqat.evaluate.processes import choose_device
    from stableqat.landscape.parts import Settings
    from stableqat.landscape.plot import draw

    settings = Settings(
        batches, batch_size, block_size, points, grid, layers, directions, rise, lanczos, dtype
    )
    place, folder, console = choose_device(device), Path(out).expanduser(), terminal()
    trained, rounded = _found(runs)
    with writing(f"out: {out}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        records = {}
        for name, run in trained.items():
            file = folder / f"{name}.json"
            record = _kept(file, asdict(settings))
            for part in _measured(record, run, settings, parts, place, rounded):
                with whole_file(file) as unfinished:
                    unfinished.write_text(json.dumps(record, indent=1))
                console.print(f"{name}: {part}")
            records[name] = record
        table = [_row(name, record, trained[name], settings.rise) for name, record in records.items()]
        with whole_file(folder / "landscape.csv") as unfinished:
            unfinished.write_text(_comma_separated(table))
        pictures = draw(records, {name: run.folder for name, run in trained.items()}, folder)
    console.print("\n".join(_lines(table)))
    console.print(f"\nwritten to {folder}: landscape.csv, {', '.join(path.name for path in pictures)}")
    return 0


def _found(sources: Sequence[str]) -> "tuple[dict[str, Run], dict[str, Run]]":
    """The runs that were trained and those that were only rounded, by name."""
    from stableqat.checkpoints.names import CHECKPOINTS
    from stableqat.evaluate.model import is_run, labels
    from stableqat.runs import open_run

    console = terminal(stderr=True)
    found: dict[str, Run] = {}
    for source in sources:
        if is_run(source):
            found[source] = open_run(source)
            continue
        for folder in sorted(path.parent for path in Path(source).expanduser().rglob("config.yaml")):
            if not (folder / CHECKPOINTS).is_dir():  # a run that only validated, for example
                continue
            try:
                found[str(folder)] = open_run(str(folder))
            except UserError as error:
                console.print(f"{error}; it is left out")
    trained: dict[str, Run] = {}
    rounded: dict[str, Run] = {}
    names = labels(found)
    for path, run in found.items():
        if run.content["hyper_parameters"].get("quantizer") is None:
            console.print(f"{path}: is in full precision; it is left out")
        else:
            (trained if run.step else rounded)[names[path].replace("/", "-")] = run
    if not trained:
        raise UserError("runs: none was trained with quantizers; name runs of stableqat fit or sweep")
    return trained, rounded


def _kept(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has measured of a run, with the same settings."""
    if not file.exists():
        return {"settings": settings}
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        before = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not a record of this command; name another --out") from error
    if different := [key for key in settings if before.get(key) != settings[key]]:
        key = different[0]
        raise UserError(
            f"{key}: {file} was measured with {before.get(key)}, not {settings[key]}; name another --out"
        )
    return record


def _measured(
    record: dict[str, Any],
    run: "Run",
    settings: Any,
    parts: Sequence[str],
    place: Any,
    rounded: dict[str, Any],
) -> Any:
    """Add the parts that a record lacks, and yield the name of each once it is there."""
    from stableqat.landscape.anchors import find_anchors
    from stableqat.landscape.batches import validation_batches
    from stableqat.landscape.parts import PARTS

    drawn = record.get("map", {}).get("runs")
    missing = [part for part in parts if part not in record or (part == "map" and drawn != sorted(rounded))]
    if not missing:
        return
    changes = {key: getattr(settings, key) for key in ("batch_size", "block_size")}
    data = run.data(**{key: value for key, value in changes.items() if value is not None})
    anchors = find_anchors(run, validation_batches(data, settings.batches, place), place, rounded)
    for part in missing:
        record[part] = _finite(PARTS[part](anchors, run, settings))
        yield part


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: null for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _row(name: str, record: dict[str, Any], run: "Run", rise: float) -> dict[str, Any]:
    """A run's line of the table: None where it is not measured, or not finite."""
    from statistics import median

    from stableqat.landscape.trajectory import first_entry

    row: dict[str, Any] = {"run": name}
    if "ends" in record:
        losses = record["ends"]["loss"]
        row |= {"start": losses["start"], "rounded": losses["start_deployed"]}
        row |= {"latent": losses["trained"], "deployed": losses["trained_deployed"]}
        row["codes changed"] = record["ends"]["codes_changed"]
    if "lines" in record:
        row["actual / predicted"] = record["lines"]["start to its rounding"]["ratio"]
    if "inward" in record:
        row["inward at w"] = record["inward"]["start_at_weights"]
        row["inward at Q(w)"] = record["inward"]["start_at_deployed"]
    if "basin" in record:
        found = record["basin"].values()
        radii = [each["random"] for each in found if each["random"] is not None]
        row["radius / step"] = median(radii) if radii else None
    row["first entry"] = None if run.folder is None else first_entry(run.folder, rise)
    return row


def _comma_separated(table: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(text, keys)
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _lines(table: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown."""
    keys = list(dict.fromkeys(key for row in table for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in table]
    return [f"| {' | '.join(line)} |" for line in (keys, ["---"] * len(keys), *cells)]


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"

"""Read event files: the scalars and hyper-parameters that a run logged.

An event file is a sequence of records: 8 bytes of length, 4 of checksum, the message, 4 of checksum. This
module reads them itself, because TensorBoard's own readers take ten to fifty times as long for the many
per-layer scalars of a run. A resumed run has several files that overlap: from the step where a later file
begins, it replaces what earlier files say of a tag. Steps decide which file is the earlier one, before clocks
do: a run resumes from a step that it has reached. If a run was validated again in its own folder, only what
was trained there counts.
"""

import contextlib
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableqat.terminal import plain

log = logging.getLogger(__name__)

# What a comparison reads. Means over the layers are listed by name: in runs of earlier versions the tags of
# layers begin in the same way.
MEANS = ("flip_rate", "oscillation", "scale_drift", "clipped", "snr_db", "grad_cosine")
OVERLAY = "overlay"  # a run of means that `stableqat publish` makes for TensorBoard
COMPARED = ("hp/", "val/", "train/", "perf/", *(f"quant/{what}" for what in MEANS))


@dataclass
class Run:
    """What one run logged.

    Attributes:
        folder: Folder of the run.
        hparams: Hyper-parameters as the HParams tab shows them; empty if none were logged.
        scalars: Tag to {step: value}, steps ascending.
        problems: What could not be read, one line each.
    """

    folder: Path
    hparams: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def last(self, tag: str) -> float | None:
        """The value of the last step; None if the tag was never logged."""
        series = self.scalars.get(tag)
        return series[max(series)] if series else None


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs in and under `folder`, except hidden ones and overlays."""
    files = folder.rglob("events.out.tfevents.*")
    found = {file.parent for file in files if file.is_file()}
    overlays = {path for path in found if path.name == OVERLAY}
    found = {path for path in found if not overlays & {path, path.parent}}
    return sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def read_run(folder: Path, tags: tuple[str, ...] = ("hp/", "val/")) -> Run:
    """Read and merge all event files in the folder of a run.

    Args:
        folder: Folder that holds the event files.
        tags: Beginnings of the scalar tags to read.
    """
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.util.tensor_util import make_ndarray

    run = Run(folder)
    wanted = [tag.encode() for tag in (*tags, SESSION_START_INFO_TAG)]
    for file in _event_files(folder):
        seen: dict[str, dict[int, float]] = {}
        try:
            for event in _events(file, lambda message: any(tag in message for tag in wanted)):
                for value in event.summary.value:
                    if value.tag == SESSION_START_INFO_TAG:
                        run.hparams = _hparams(value)
                    elif not value.tag.startswith(tags) or value.tensor.string_val:
                        continue  # not asked for, or text
                    elif value.HasField("simple_value"):
                        seen.setdefault(value.tag, {})[event.step] = value.simple_value
                    elif value.HasField("tensor"):
                        seen.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
        except OSError as error:
            run.problems.append(plain(f"{file}: {error}"))
        for tag, series in seen.items():
            kept = {s: v for s, v in run.scalars.get(tag, {}).items() if s < min(series)}
            run.scalars[tag] = dict(sorted((kept | series).items()))
    return run


def hparams_events(folder: Path) -> Iterator[Any]:
    """The events of a run that make the HParams tab, as far as they can be read."""
    for file in _event_files(folder):
        yield from _hparams_events(file)


def _hparams_events(file: Path) -> Iterator[Any]:
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    with contextlib.suppress(OSError):
        yield from _events(file, lambda message: PLUGIN_NAME.encode() in message)


def _event_files(folder: Path) -> list[Path]:
    """The event files of a run in order, without later validations of a run that was trained there."""
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG

    files = sorted(folder.glob("events.out.tfevents.*"), key=_age)
    if len(files) == 1:
        return files
    verbs = {}
    for file in files:
        values = (value for event in _hparams_events(file) for value in event.summary.value)
        starts = (value for value in values if value.tag == SESSION_START_INFO_TAG)
        verbs[file] = next((_hparams(value).get("subcommand") for value in starts), None)
    return _in_order([file for file in files if "fit" not in verbs.values() or verbs[file] != "validate"])


def _in_order(files: list[Path]) -> list[Path]:
    """Event files, given by their clocks, in the order in which they were begun.

    The next one is the first by the clock that begins at a step already reached; if none does, the one that
    begins at the earliest step.
    """
    steps = {file: _steps(file) for file in files}
    ordered: list[Path] = []
    reached = 0
    while left := [file for file in files if file not in ordered]:
        first = min(left, key=lambda file: steps[file][0])
        ordered.append(next((file for file in left if steps[file][0] <= reached), first))
        reached = max(reached, steps[ordered[-1]][1])
    return ordered


def _steps(file: Path) -> tuple[int, int]:
    """The first and the last step that a file has values for, as far as it can be read; 0 without any."""
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    steps = []
    with contextlib.suppress(OSError):
        for event in _events(file, lambda message: PLUGIN_NAME.encode() not in message):
            if event.summary.value:
                steps.append((event.step, event.summary.value[0].tag.startswith("hp/")))
    begins = [step for step, record in steps if step or not record]  # a record may be opened at step 0
    return min(begins, default=0), max((step for step, _ in steps), default=0)


def _hparams(value: Any) -> dict[str, Any]:
    """The hyper-parameters in a summary that begins a session."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    info = _parsed(HParamsPluginData, value.metadata.plugin_data.content).session_start_info
    return {plain(key): _plain(each) for key, each in sorted(info.hparams.items())}


def _plain(value: Any) -> Any:
    """A protobuf value as a Python one; protobuf has only doubles, so whole numbers become int again."""
    found = getattr(value, str(value.WhichOneof("kind")))
    if isinstance(found, str):
        return plain(found)
    return int(found) if isinstance(found, float) and found.is_integer() else found


def _age(file: Path) -> tuple[int, int, str]:
    """Sorts event files by the clock: their names hold the second in which they were begun, and a count."""
    parts = file.name.split(".")
    second, number = (int(part) if part.isdigit() else 0 for part in (parts[3], parts[-1]))
    return second, number, file.name


def _events(file: Path, wanted: Callable[[bytes], bool]) -> Iterator[Any]:
    """The events of a file whose messages are wanted.

    Raises:
        OSError: If the file cannot be read, is damaged or was cut short.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    yield from (_parsed(Event, message) for message in _records(file) if wanted(message))


def _parsed(kind: Any, message: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise OSError(error) from error


def _records(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    position = 0
    while position < len(data):
        end = position + 16
        if end <= len(data):
            end += struct.unpack_from("<Q", data, position)[0]
        if end > len(data):
            raise OSError(f"cut short or damaged at byte {position} of {len(data)}, the rest is not read")
        yield data[position + 12 : end - 4]
        position = end

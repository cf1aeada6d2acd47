"""Event files to data: the scalars and hyper-parameters that a run logged.

An event file is a row of records: 8 bytes of length, 4 of checksum, the message, 4 of checksum. They
are read here directly, because TensorBoard's own readers take ten to fifty times as long over the
many per-layer scalars of a run. A resumed run has several files that overlap: where a file begins,
what earlier files say of the same tag from that step on is dropped, so that the last word counts. Which are
the earlier ones, steps say before clocks do: a run resumes from a step that it has reached. A run that was
validated again in its own folder remains the run that was trained there.
"""

import contextlib
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableqat.terminal import plain

log = logging.getLogger(__name__)

# What a comparison reads. Means over the layers go by name, since the tags of the layers begin alike.
MEANS = ("flip_rate", "oscillation", "scale_drift", "clipped", "snr_db", "grad_cosine")
OVERLAY = "overlay"  # a run that `stableqat publish` makes for TensorBoard, of means
COMPARED = ("hp/", "val/", "train/", *(f"quant/{what}" for what in MEANS))


@dataclass
class Run:
    """What one run logged.

    Attributes:
        folder: Folder of the run.
        hparams: Hyper-parameters as the HParams tab shows them; empty where none were logged.
        scalars: Tag to {step: value}, steps ascending.
        problems: What could not be read, a line each.
    """

    folder: Path
    hparams: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def last(self, tag: str) -> float | None:
        """The value of the last step, None where the tag was never logged."""
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
    """Reads all event files of a run's folder, merged.

    Args:
        folder: Folder that holds the event files.
        tags: Beginnings of the scalar tags to read.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.util.tensor_util import make_ndarray

    run = Run(folder)
    wanted = [tag.encode() for tag in (*tags, SESSION_START_INFO_TAG)]
    for file in _event_files(folder):
        seen: dict[str, dict[int, float]] = {}
        try:
            for message in _records(file):
                if not any(tag in message for tag in wanted):
                    continue
                event = Event.FromString(message)
                for value in event.summary.value:
                    if value.tag == SESSION_START_INFO_TAG:
                        run.hparams = _hparams(value)
                    elif value.tag.startswith(tags) and value.HasField("simple_value"):
                        seen.setdefault(value.tag, {})[event.step] = value.simple_value
                    elif value.tag.startswith(tags) and value.HasField("tensor"):
                        seen.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
        except (OSError, EOFError, DecodeError) as error:
            run.problems.append(plain(f"{file}: {error}"))
        for tag, series in seen.items():
            kept = {s: v for s, v in run.scalars.get(tag, {}).items() if s < min(series)}
            run.scalars[tag] = dict(sorted((kept | series).items()))
    return run


def hparams_events(folder: Path) -> Iterator[Any]:
    """The events of a run's folder that the HParams tab is made of, as far as they can be read."""
    for file in _event_files(folder):
        yield from _hparams_events(file)


def _hparams_events(file: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    with contextlib.suppress(OSError, EOFError, DecodeError):
        for message in _records(file):
            if PLUGIN_NAME.encode() in message:
                yield Event.FromString(message)


def _event_files(folder: Path) -> list[Path]:
    """The event files of a run in order, without later validations of what was trained there."""
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
    """Event files, sorted by their clocks, as they were begun.

    The next is the earliest by the clock that begins no later than what came before it has reached; if
    all do, the one that begins first.
    """
    steps = {file: _steps(file) for file in files}
    ordered: list[Path] = []
    reached = 0
    while len(ordered) < len(files):
        left = [file for file in files if file not in ordered]
        begins = {file: steps[file][0] for file in left}
        following = next(
            (file for file in left if begins[file] <= reached), min(left, key=begins.__getitem__)
        )
        ordered.append(following)
        reached = max(reached, steps[following][1])
    return ordered


def _steps(file: Path) -> tuple[int, int]:
    """The first and the last step of which a file says something, as far as it can be read; 0 without any."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    steps = []
    with contextlib.suppress(OSError, EOFError, DecodeError):
        for message in _records(file):
            if PLUGIN_NAME.encode() not in message and (event := Event.FromString(message)).summary.value:
                steps.append((event.step, event.summary.value[0].tag.startswith("hp/")))
    begins = [step for step, record in steps if step or not record]  # a record may be opened at step 0
    return min(begins, default=0), max((step for step, _ in steps), default=0)


def _hparams(value: Any) -> dict[str, Any]:
    """The hyper-parameters that a summary holds as what begins a session."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    info = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
    return {plain(key): _plain(each) for key, each in sorted(info.hparams.items())}


def _plain(value: Any) -> Any:
    """A protobuf value as a Python one; it knows doubles only, so whole numbers become int again."""
    found = getattr(value, str(value.WhichOneof("kind")))
    if isinstance(found, str):
        return plain(found)
    return int(found) if isinstance(found, float) and found.is_integer() else found


def _age(file: Path) -> tuple[int, int, str]:
    """Event files in the order in which they were begun: their names say the second, and end in a count."""
    parts = file.name.split(".")
    second, number = (int(part) if part.isdigit() else 0 for part in (parts[3], parts[-1]))
    return second, number, file.name


def _records(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    position = 0
    while position < len(data):
        end = position + 16
        if end <= len(data):
            end += struct.unpack_from("<Q", data, position)[0]
        if end > len(data):
            raise EOFError(f"cut short or damaged at byte {position} of {len(data)}, the rest is not read")
        yield data[position + 12 : end - 4]
        position = end

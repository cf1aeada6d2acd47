"""What an interrupted `stableqat ptq` leaves, so that the same command goes on from there.

A folder beside the run, OUT.partial, holds the settings, a file for each finished block, and every loss in
the order in which it was computed: LAPQ's search is a function of its losses, so replaying them leads it back
to where it was.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stableqat.errors import UserError
from stableqat.evaluate.processes import Share
from stableqat.files import lock_folder, remove, whole_file, writing
from stableqat.ptq.layerwise import LayerRecord
from stableqat.ptq.stream import Block

logger = logging.getLogger(__name__)

SETTINGS, LOSSES, RECORDS = "settings.json", "losses.txt", "layers"
_REMEDY = "what is finished so far is kept; make room"


class Unfinished:
    """The folder.

    Args:
        folder: The folder.
        writes: Whether this process is the one that writes.

    Attributes:
        holds: Whether anything is finished.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self._writes = folder, writes
        lines = (folder / LOSSES).read_text().split("\n")[:-1] if (folder / LOSSES).exists() else []
        self._losses = iter([float(line) for line in lines])  # without a line that is cut short
        self.holds = bool(lines) or any(folder.glob("block-*"))

    def replayed(self, loss: Callable[[], float]) -> Callable[[], float]:
        """The same function, whose first values are the ones of the interrupted run."""

        def value() -> float:
            known = next(self._losses, None)
            if known is not None:
                return known
            computed = loss()
            if self._writes:
                with writing(str(self.folder), _REMEDY), (self.folder / LOSSES).open("a") as file:
                    file.write(f"{computed!r}\n")
            self.holds = True
            return computed

        return value

    def kept(self, block: Block, finish: Callable[[Block], list[LayerRecord]]) -> list[LayerRecord]:
        """Let a block be as the interrupted run has left it, or else finish it and keep it.

        Args:
            block: The block.
            finish: Rounds its layers.
        """
        file = self.folder / f"block-{block.number}.safetensors"
        if file.exists():
            return _load(file, block)
        records = finish(block)
        if self._writes:
            state = {key: tensor.cpu().contiguous() for key, tensor in block.module.state_dict().items()}
            told = {RECORDS: json.dumps([asdict(record) for record in records])}
            with writing(str(self.folder), _REMEDY), whole_file(file) as part:
                save_file(state, part, metadata=told)
        self.holds = True
        return records


def _load(file: Path, block: Block) -> list[LayerRecord]:
    try:
        with safe_open(file, "pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            records = json.loads(opened.metadata()[RECORDS])
        block.module.load_state_dict(state)
        return [LayerRecord(**record) for record in records]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; remove it, and its block is rounded again") from error


@contextmanager
def unfinished(out: str, settings: dict[str, Any], share: Share) -> Iterator[Unfinished]:
    """Open the folder of an unfinished run, or begin one.

    If the body fails, the folder stays, unless it holds nothing; otherwise the caller removes it.

    Args:
        out: The run's folder.
        settings: What decides the result, as plain values.
        share: This process's share of the work; the first process writes.

    Raises:
        UserError: If another command began the folder, or is at work in it.
    """
    run = Path(os.path.abspath(Path(out).expanduser()))
    folder, first = run.with_name(f"{run.name}.partial"), share.rank == 0
    lock = None
    try:
        with share.first_alone(), writing(f"out: {folder}", "name another folder"):
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                if (lock := lock_folder(folder)) is None:
                    raise UserError(f"out: another process is at work in {folder}; wait for it")
                if not any(folder.iterdir()):
                    with whole_file(folder / SETTINGS) as part:
                        part.write_text(json.dumps(settings, indent=1))
            _check(folder, settings)
            made = Unfinished(folder, first)
        if made.holds:
            logger.warning("%s: going on from what is finished there", folder)
        try:
            yield made
        except BaseException:
            if first and made.holds:
                logger.warning("%s holds what is finished; the same command goes on from there", folder)
            elif first:
                remove(folder)
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse what another command began."""
    try:
        begun = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        begun = None
    if not isinstance(begun, dict):
        raise UserError(
            f"out: {folder} is not what an interrupted command leaves; move it away, or name another"
        )
    for key, value in settings.items():
        if begun.get(key) != value:
            told = f"{key} {begun.get(key)}, not {value}" if key != "fingerprint" else "other weights or data"
            raise UserError(f"out: {folder} was begun with {told}; give the same, or remove the folder")

"""What a sweep records in the folder of each run: `sweep.json`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableqat.errors import UserError
from stableqat.files import whole_file

FILE = "sweep.json"
FINAL = ("done", "diverged")
ENDED = (*FINAL, "failed")


@dataclass
class Record:
    """The content of `sweep.json` in the folder of a point.

    Attributes:
        status: running (or cut, where no sweep runs), done, diverged or failed.
        settings: What decides the outcome, see `Point.settings`.
        seconds: Time spent on the point in all attempts.
        error: Why it failed.
    """

    status: str
    settings: dict[str, Any]
    seconds: float = 0.0
    error: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record in the folder of a point; None without one."""
        file = folder / FILE
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read: move the folder away to run this point again") from error

    def write(self, folder: Path) -> None:
        """Replace the record in one move."""
        with whole_file(folder / FILE) as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

"""Who works on a point: the process that holds the lock on its claim file.

The operating system releases the lock when its holder ends, however it ends, so nothing has to expire or be
cleaned up. Locks of this kind also work between machines that share a folder (NFS, Lustre mounted with
`flock`, GPFS).
"""

import errno
import fcntl
from pathlib import Path
from typing import IO

from stableqat.errors import UserError
from stableqat.files import writing

FOLDER = ".claims"


class Claim:
    """A claim on one point.

    Args:
        point: Folder of the point; the claim is next to it, in a hidden folder of the study.
    """

    def __init__(self, point: Path) -> None:
        self.path = point.parent / FOLDER / point.name
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Try to take the point for this process, and return whether that worked.

        Raises:
            UserError: If the folder cannot be written, or its file system has no locks.
        """
        with writing(str(self.path.parent), "set another folder as logs"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "w")  # noqa: SIM115 - stays open, and so locked, until `release`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            fault = f"this file system has no locks ({error.strerror})"
            raise UserError(f"{self.path.parent}: {fault}; set logs to a folder on another") from error
        self._file = file
        return True

    def release(self) -> None:
        """Give the point back if this process holds it."""
        if self._file is not None:
            self._file.close()
            self._file = None

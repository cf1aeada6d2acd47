"""Who works on a point: the process that holds the lock on its claim file.

The operating system gives the lock back when its holder ends, however it ends, so that nothing is left to
expire or to clean up. Locks of this kind hold between the machines of a shared folder, too (NFS, Lustre
mounted with `flock`, GPFS).
"""

import errno
import fcntl
from pathlib import Path
from typing import IO

from stableqat.errors import UserError

FOLDER = ".claims"


class Claim:
    """A claim on one point.

    Args:
        point: Folder of the point; the claim lies beside it, in a hidden folder of the study.
    """

    def __init__(self, point: Path) -> None:
        self.path = point.parent / FOLDER / point.name
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Whether the point is this process's now.

        Raises:
            UserError: If the folder cannot be written, or its file system has no locks.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "w")  # noqa: SIM115 - stays open, and so locked, until `release`
        except OSError as error:
            raise UserError(
                f"{self.path.parent} can't be written ({error.strerror}): set another folder as logs"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise UserError(
                f"{self.path.parent}: this file system has no locks ({error.strerror}): set logs to another"
            ) from error
        self._file = file
        return True

    def release(self) -> None:
        """Give the point back, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None

"""Locks of files, by which processes of one or of many machines do not write to one place.

The system releases a lock when the file is closed, however its process has ended.
"""

import fcntl
import time
from pathlib import Path
from typing import IO

from mpl_fast.errors import OutputError

POLL_SECONDS = 0.05


def lock(
    file: IO[bytes] | IO[str] | int, folder: Path, *, shared: bool = False, seconds: float = 0.0
) -> bool:
    """Locks an open file, or changes its lock; False if another process has it for so many seconds.

    `folder` is what the lock is for. Raises `OutputError` where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    ends = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= ends:
                return False
            time.sleep(POLL_SECONDS)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be locked: {error.strerror}: mount its file system with flock "
                "(Lustre: -o flock), use a folder on another one, or, if no other process can be "
                "writing there, give --lock false"
            ) from None

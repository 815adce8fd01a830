"""Locks on open files, also where the file system has none.

The kernel frees such a lock when its holder ends, whatever the reason. Some network file systems (Lustre without
``flock``, NFS without its lock service) refuse them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from functools import cache

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)


def take_lock(fd: int, path: str | os.PathLike[str], wait: bool = False) -> bool | None:
    """Take the exclusive lock of an open file.

    Args:
        fd: descriptor of the file or folder.
        path: its path, for the warning.
        wait: whether to wait for another process that has it.

    Returns:
        Whether this process has the lock; `None` if the file system has no locks, with one warning in this process.

    Raises:
        OSError: another error of the system.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn(str(os.path.dirname(os.path.abspath(path))))
        return None
    return True


@cache
def _warn(folder: str) -> None:
    log.warning("warning: the file system of %s has no locks: nothing stops two processes from writing there", folder)

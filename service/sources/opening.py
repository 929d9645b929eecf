"""Files of strangers' folders, opened once and without following links.

A path is resolved and held against the allow list, and a moment later something else may lie there: a link to a file
that only this process may read. So the resolved path, which has no links, is opened part by part, and none of them may
be one; what is read later is read by the descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without waiting: a pipe would be opened only when somebody writes to it.
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux shows a process its descriptors: what is opened there is what they are of, wherever it lies by now."""


def open_file(path: Path) -> int:
    """A descriptor of the regular file at an absolute path that has no links.

    Raises: OSError, also for a link on the way, and for a folder, a pipe or a device.
    """
    folder = os.open(path.anchor, FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Opening a device may do something.
        _check_regular(os.stat(path.name, dir_fd=folder, follow_symlinks=False))
        descriptor = os.open(path.name, FILE, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        _check_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")

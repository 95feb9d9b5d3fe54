"""A file that is written as a whole or not at all.

A library, used by tau2_mock.py, tau2_results.py and tau2_report.py.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Writes the parts: a reader sees the old file or the new one, on disk. Raises OSError with the path;
    BlockingIOError when another process is writing it."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                file.truncate(0)  # what a killed run has left
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)  # still ours: we hold its lock
                raise
    except OSError as error:  # the user knows the file, not the partial one
        raise OSError(error.errno, error.strerror, str(path)) from None

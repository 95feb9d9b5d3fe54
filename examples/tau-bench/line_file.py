"""A JSONL file that only grows, by whole lines: what was added is on disk, and a half line is never kept.

A library: used by teacher_traces.py and tau2_results.py for what must outlive an interrupted run.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import Any

BEGIN = b'{"settings": {'  # of the first line, in every file that is kept in this way


class LineFile:
    """The file at `path`, made where there is none and held by a lock. Raises OSError, with the path;
    BlockingIOError when another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = 0  # bytes behind the last whole line
        self.file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_at_its_path():
                raise BlockingIOError  # another process held it, and has removed it
        except BaseException:
            self.file.close()
            raise

    def read(self) -> list[bytes]:
        """The lines that are there. A torn last one counts as not written: the next write cuts it off. Raises
        ValueError when a torn line is all there is, and not the beginning of ours."""
        self.file.seek(0)
        whole, _, torn = self.file.read().rpartition(b"\n")
        self.torn = len(torn)
        if not whole and torn[: len(BEGIN)] != BEGIN[: len(torn)]:
            raise ValueError("the line is not ours")
        return whole.split(b"\n") if whole else []  # not splitlines: JSON leaves U+2028 as it is

    def clear(self) -> None:
        self.file.truncate(0)
        self.torn = 0

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def remove(self) -> None:
        """To be called before `close`: the lock is still held."""
        if self._is_at_its_path():
            self.path.unlink()

    def _is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def write(self, value: dict[str, Any]) -> None:
        """The whole line, or none of it: a full disk must not leave a part that the next line would be added to."""
        data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        self.file.truncate(self.size - self.torn)
        self.torn = 0
        before = self.file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):  # a disk that is filling up takes a part and says so
                written += self.file.write(data[written:])
        except OSError as error:
            self.file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    async def add(self, value: dict[str, Any]) -> None:
        """Returns when the line is on disk. The disk is waited for in a thread: other episodes go on meanwhile."""
        self.write(value)
        await asyncio.to_thread(os.fsync, self.file.fileno())

    def close(self) -> None:
        self.file.close()

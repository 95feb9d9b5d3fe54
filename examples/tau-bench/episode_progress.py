"""How many of a run's episodes are finished, while it runs.

A library, used by evaluate_tau2.py and teacher_traces.py.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 30  # between lines in a log


class Progress:
    """A bar on a terminal, a line now and then in a log; both with the count of good episodes, which `good` names."""

    def __init__(self, total: int, good: str):
        self.total, self.good = total, good
        self.finished, self.good_ones, self.told = 0, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="episode", disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, is_good: bool) -> None:
        """Counts one more finished episode."""
        self.finished, self.good_ones = self.finished + 1, self.good_ones + is_good
        self.bar.set_postfix_str(f"{self.good_ones} {self.good}", refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.told > LOG_SECONDS and self.finished < self.total:
            self.told = time.monotonic()
            print(f"{self.finished} of {self.total} episodes, {self.good_ones} {self.good}", flush=True)

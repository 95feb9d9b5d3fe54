"""Imports that stay until the process ends, without the garbage collector.

with lasting():
    from slime_local.engine import Engine
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """The collector neither runs meanwhile nor looks at what came in ever again: its passes over torch and its like
    take a quarter of a second of each start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()

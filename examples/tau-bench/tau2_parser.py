"""argparse with its mistakes in one line, and the flag that was likely meant.

A library: the scripts here make their parsers of it, subcommands included.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn

UNKNOWN = "unrecognized arguments: "


class ArgumentParser(argparse.ArgumentParser):
    """Ends a mistake with one line `error: ...` and exit code 2, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}{self._meant(message)} (--help lists them)\n")

    def _meant(self, message: str) -> str:
        """The flag that is like the first unknown one; "" where there is none."""
        unknown = [word.partition("=")[0] for word in message.removeprefix(UNKNOWN).split() if word.startswith("--")]
        if not message.startswith(UNKNOWN) or not unknown:
            return ""
        likely = difflib.get_close_matches(unknown[0], list(self._flags()), n=1)
        return f"; did you mean {likely[0]}?" if likely else ""

    def _flags(self) -> Iterator[str]:
        """Those of the subcommands too: it is the outer parser that meets an unknown flag."""
        for action in self._actions:  # argparse has no public list
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from (flag for one in inner._actions for flag in one.option_strings)

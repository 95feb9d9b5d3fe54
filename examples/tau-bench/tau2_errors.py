"""The error whose text is meant for the user, and other errors in one line of text.

A library: `main` of every script here prints a BadInput and exits with 2.
"""

from __future__ import annotations


class BadInput(Exception):
    """What the user gave cannot be used; the message says what, where and what to do."""


def one_line(error: BaseException) -> str:
    """The class of an error and its text, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]

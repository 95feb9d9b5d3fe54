"""The plug-ins' settings, read and checked in one place: attributes `tau2_NAME` of the host's args, which come from
the YAML of --custom-config-path. What each means stands where it is used: generate_with_tau.py,
tau2_reward_shaping.py, tau2_curriculum.py.

A library. Both hosts set whatever the YAML holds, of whatever type, so a value is taken for what it is worth here: a
number may be written as text (YAML reads 1e-3 as one), and a key without a value leaves the default.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from tau2_errors import BadInput

MATCHINGS = ("sound", "official")
PREFIX = "tau2_"
MOST_RETRIES = 100  # of an episode: more would only hide that something is broken


@dataclass(frozen=True)
class Settings:
    """Every setting of the plug-ins, with its default."""

    domain: str = "telecom"
    prompt: str = "official"
    user: str = "scripted"
    user_args: dict[str, Any] = field(default_factory=dict)
    user_concurrency: int = 32
    max_steps: int = 200
    max_errors: int = 10
    max_turn_tokens: int = 1024
    redraw_ids: float = 0.0
    data: str | None = None
    retries: int = 1
    generate_timeout: float = 900.0
    teacher_samples: int = 0
    teacher_style: str = "checks"
    partial_alpha: float = 0.5
    partial_matching: str = "sound"
    customer_tool_penalty: float = 0.0
    curriculum_tries: int = 8
    curriculum_window: int = 16
    curriculum_revisit: float = 0.05
    curriculum_start: tuple[str, ...] = ()


def read_settings(args: Any) -> Settings:
    """All of them. Raises BadInput for the first that cannot be used, for a name that none has, and for the flag of
    the host that no setting makes usable."""
    names = [name for name in vars(args) if name.startswith(PREFIX)]
    if unknown := [name for name in names if name.removeprefix(PREFIX) not in NAMES]:
        known = [PREFIX + name for name in NAMES]
        likely = [*difflib.get_close_matches(unknown[0], known, n=1)]
        meant = f"did you mean {likely[0]}? " if likely else ""
        raise BadInput(f"unknown setting(s) {', '.join(unknown)}; {meant}The plug-ins know: {', '.join(known)}")
    # No flag of slime has the name of a setting, so such an attribute is a key of the YAML.
    if bare := [name for name in NAMES if name in vars(args)]:
        raise BadInput(f"{bare[0]} in --custom-config-path sets nothing: did you mean {PREFIX}{bare[0]}?")
    if getattr(args, "partial_rollout", False):
        raise BadInput("--partial-rollout cannot be used: an episode cannot go on in another environment")
    return Settings(**{name: setting(args, name) for name in NAMES})


def setting(args: Any, name: str) -> Any:
    """One of them: a field of Settings. Raises BadInput when its value cannot be used."""
    value = getattr(args, PREFIX + name, None)
    if value is None:
        return getattr(DEFAULTS, name)
    try:
        return READERS[name](value)
    except _Unusable as wanted:
        shown = "" if name == "user_args" else f" {str(value)[:40]!r}:"  # its text may hold a key
        raise BadInput(f"{PREFIX}{name} is{shown} {wanted}") from None


# ---------------------------------------------------------------------------------------------------------------------
# How a value is read


class _Unusable(Exception):
    """The message says what to give."""


def _number(value: Any) -> int | float:
    """A finite number, or text of one. True is no number here: of `retries: true` nobody can tell how many."""
    try:
        if isinstance(value, str):
            value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        if type(value) in (int, float) and math.isfinite(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise ValueError


def _whole(least: int, most: float = math.inf) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        try:
            number = _number(value)
        except ValueError:
            number = math.nan
        if type(number) is not int or not least <= number <= most:
            up_to = "" if most == math.inf else f" and at most {most}"
            raise _Unusable(f"give a whole number of at least {least}{up_to}")
        return number

    return read


def _real(fits: Callable[[float], bool], wanted: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(_number(value))
        except (ValueError, OverflowError):
            number = math.nan
        if not fits(number):
            raise _Unusable(f"give {wanted}")
        return number

    return read


def _share(value: Any) -> float:
    between = _real(lambda share: 0 <= share <= 1, "true, false, or a share between 0 and 1")
    return float(value) if isinstance(value, bool) else between(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Unusable("give a name")
    return value


def _path(value: Any) -> str:
    if not str(value).strip() or isinstance(value, bool | int | float | list | dict):
        raise _Unusable("give the path of a file")
    return str(value)


def _paths(value: Any) -> tuple[str, ...]:
    return tuple(_path(one) for one in (value if isinstance(value, list | tuple) else [value]))


def _matching(value: Any) -> str:
    if value not in MATCHINGS:
        raise _Unusable(f"choose one of: {', '.join(MATCHINGS)}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping, or JSON text of one."""
    try:
        found = json.loads(value or "{}") if isinstance(value, str) else value
        return {str(name): one for name, one in found.items()}
    except (ValueError, AttributeError, RecursionError):
        raise _Unusable("no mapping of the customer's arguments") from None


READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("domain", "prompt", "user", "teacher_style"), _text),
    "user_args": _mapping,
    **dict.fromkeys(("user_concurrency", "max_steps", "max_errors", "max_turn_tokens"), _whole(1)),
    "redraw_ids": _share,
    "data": _path,
    "retries": _whole(0, MOST_RETRIES),
    "teacher_samples": _whole(0),
    "generate_timeout": _real(lambda seconds: seconds > 0, "a number of seconds above 0"),
    **dict.fromkeys(("partial_alpha", "customer_tool_penalty"), _real(lambda x: x >= 0, "a number of at least 0")),
    "partial_matching": _matching,
    **dict.fromkeys(("curriculum_tries", "curriculum_window"), _whole(1)),
    "curriculum_revisit": _real(lambda chance: 0 < chance <= 1, "a number above 0 and at most 1"),
    "curriculum_start": _paths,
}
NAMES = tuple(one.name for one in fields(Settings))
DEFAULTS = Settings()

"""Resolve the dotted paths that slime's plug-in flags take; the names of slime's own functions lead to ours."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from slime_local.errors import UsageError

EQUIVALENTS = {
    "slime.rollout.sglang_rollout.generate_rollout": "slime_local.rollout.generate_rollout",
    "slime.rollout.sft_rollout.generate_rollout": "slime_local.sft_rollout.generate_rollout",
    "slime.rollout.data_source.RolloutDataSource": "slime_local.data.RolloutDataSource",
    "slime.rollout.data_source.RolloutDataSourceWithBuffer": "slime_local.data.RolloutDataSource",
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": (
        "slime_local.filters.check_reward_nonzero_std"
    ),
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback": (
        "slime_local.filters.check_reward_nonzero_std_with_fallback"
    ),
}
SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"


@cache
def load_function(path: str) -> Callable[..., Any]:
    """The function or class at `module.name`. Raises UsageError that says why it cannot be imported."""
    path = EQUIVALENTS.get(path, path)
    if path.split(".")[0] == "slime":
        known = ", ".join(EQUIVALENTS)
        raise UsageError(f"{path}: slime is not installed, and slime_local has no equivalent of it (it has: {known})")
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UsageError(f"{path!r} is not a dotted path: give module.function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a plug-in's import may fail in any way; the user needs the reason, not our traceback
        raise UsageError(_import_failure(path, module_name, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path}: module {module_name} ({module.__file__}) has no function {name}")
    return function


@contextmanager
def may_end_job(path: str) -> Iterator[None]:
    """A RuntimeError is slime's way for the plug-in at `path` to end the job: its words are for the user."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def _import_failure(path: str, module_name: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]:
        return f"{path} cannot be imported: no module {error.name}; add its folder to PYTHONPATH"
    return f"{path} cannot be imported: {reason}"

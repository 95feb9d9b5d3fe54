"""slime on a machine without CUDA, for test_slime.py: its parser, and its rollout manager in this process.

Everything of slime runs as it is. What is replaced lies at its outermost edge:

- `torchvision`, which SGLang's arguments import and whose wheel wants CUDA: a package of empty classes.
- `torch.cuda.get_device_properties`: Megatron's argument check asks for the GPU's generation. The answer is Hopper.
- `start_rollout_servers`: SGLang engines and their router are not started; slime talks to our own server.
- `logging_utils.log`, the way to W&B and TensorBoard: what arrives there is kept in a list.

and slime's logging set-up is left out, because it would take pytest's handlers away.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


def slime_checkout() -> Path:
    """The folder that slime was installed from."""
    import slime

    return Path(slime.__file__).resolve().parent.parent


def can_parse() -> str:
    """Why slime's parser cannot run here; empty where it can."""
    missing = [name for name in ("megatron", "sglang", "sglang_router") if importlib.util.find_spec(name) is None]
    if not missing and importlib.util.find_spec("megatron.training") is None:
        missing = ["megatron.training (the PyPI package has none: put a checkout on PYTHONPATH)"]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "transformers was imported without torchvision: run test_slime.py by itself" if too_late else ""


class Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class EmptyModule(types.ModuleType):
    """A module out of which every name can be imported."""

    __getattr__ = Anything.__getattr__
    __version__ = "0.28.0"  # transformers compares it


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of STUBBED, with all their modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STUBBED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# transformers asks once which packages there are, so the stubs come before it.
STUBBED = {name for name in ("torchvision",) if importlib.util.find_spec(name) is None}
too_late = bool(STUBBED) and "transformers" in sys.modules
if not too_late:
    sys.meta_path.append(Stubs())


@contextmanager
def edge() -> Iterator[None]:
    """The replacements of the parser's environment, while the block runs."""
    import torch
    from slime.observability import logging_utils

    hopper = types.SimpleNamespace(major=9, minor=0)
    with (
        patch.object(torch.cuda, "get_device_properties", lambda *device: hopper),
        patch.object(logging_utils, "_LOGGER_CONFIGURED", True),
        patch.dict("os.environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "SLIME_HOST_IP": "127.0.0.1"}),
    ):
        yield


def parse(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """slime's args for `argv`, and the flags that its parsers know (they pass over all others in silence)."""
    known: set[str] = set()
    original = argparse.ArgumentParser.parse_known_args

    def noting(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        known.update(parser._option_string_actions)
        return original(parser, *args, **kwargs)

    with (
        edge(),
        patch.object(sys, "argv", ["train.py", *argv]),
        patch.object(argparse.ArgumentParser, "parse_known_args", noting),
    ):
        from slime.utils.arguments import parse_args

        return parse_args(), known


@contextmanager
def rollout_manager(args: argparse.Namespace, ranks: int = 2) -> Iterator[Any]:
    """slime's RolloutManager in this process, for `ranks` data-parallel ranks. `.logged` holds its metrics."""
    with edge():
        from slime.observability import logging_utils
        from slime.ray import rollout
        from slime.rollout.sglang_rollout import GenerateState

        logged: list[dict] = []
        GenerateState.clear_instances()
        with (
            patch.object(rollout, "start_rollout_servers", lambda args, pg: ({}, [])),
            patch.object(logging_utils, "log", lambda args, metrics, step_key: logged.append(metrics)),
        ):
            manager = rollout.RolloutManager.__ray_metadata__.modified_class(args, None)
            manager.logged = logged
            manager.set_train_parallel_config(
                {"dp_size": ranks, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
            )
            yield manager
            manager.dispose()


SPLIT = (
    "tokens response_lengths rewards truncated loss_masks rollout_log_probs sample_indices rollout_ids "
    "rollout_mask_sums"
).split()
WHOLE = ("raw_reward", "total_lengths")  # every rank gets all of them


def train_data(boxes: list[Any]) -> dict[int, dict[str, Any]]:
    """What the ranks were given, by the sample's place in the rollout."""
    import ray

    found: dict[int, dict[str, Any]] = {}
    for rank in (ray.get(box.inner) for box in boxes):
        for row, place in enumerate(rank["partition"]):
            assert place not in found, "a sample went to two ranks"
            found[place] = {key: rank[key][row] for key in SPLIT} | {key: rank[key][place] for key in WHOLE}
    return found

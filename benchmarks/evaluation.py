"""Evaluation of the 40 test tasks, greedy, beside the first version of this repository.

    python benchmarks/evaluation.py --checkpoint runs/local/sft/hf      # --quick: 4 tasks, short turns
    python benchmarks/evaluation.py --baseline COMMIT ...                # another version beside

Both versions run their own evaluate_tau2.py with their own engine, from the start of the command to its result, on the
same model folder, one after the other. The first version's files are taken from git into a temporary folder. Without
--checkpoint it is SmolLM2 as it comes, whose dialogues are unlike a trained model's: shorter, and never solved.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    EXIT_NO_PEER,
    ROOT,
    Seconds,
    child_environment,
    free_port,
    measure,
    parser,
    ratio,
    smollm2_dir,
    write_result,
)

BASELINE = "cf9d47f"  # the first commit whose evaluator ran a checkpoint on its own engine
SHOWN = ("pass_at_1", "avg_reward", "avg_partial_score", "total_tasks")


def checkout(commit: str, folder: Path) -> Path:
    """The files of a commit, without a git work tree."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False)
    if packed.returncode:
        print(f"no commit {commit} here: {packed.stderr.decode().strip()}", file=sys.stderr)
        raise SystemExit(EXIT_NO_PEER)
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def evaluate(root: Path, words: list[str], results: list[dict[str, Any]]) -> Seconds:
    """Seconds of the whole command; its result is appended to `results`."""
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "result.json"
        script = root / "examples" / "tau-bench" / "evaluate_tau2.py"
        command = [sys.executable, str(script), *words, "--sglang-port", str(free_port()), "--output-path", str(path)]
        environment = child_environment(PYTHONPATH=f"{root}:{script.parent}")
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{script}: exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        results.append(json.loads(path.read_text()))
        return Seconds(seconds)


def rewards(result: dict[str, Any]) -> dict[str, float]:
    return {row["task_id"]: row["reward"] for row in result["results"]}


def run(args: argparse.Namespace, baseline: Path) -> None:
    model = Path(args.checkpoint).resolve() if args.checkpoint else smollm2_dir()
    words = ["--checkpoint", str(model), "--prompt", "short"]
    words += ["--num-tasks", str(args.tasks)] if args.tasks else []
    words += ["--max-turn-tokens", str(args.turn_tokens)] if args.turn_tokens else []
    results: dict[str, list[dict[str, Any]]] = {"first version": [], "ours": []}
    roots = {"first version": baseline, "ours": ROOT}
    sides = {name: functools.partial(evaluate, root, words, results[name]) for name, root in roots.items()}
    seconds = measure(sides, repeats=args.repeats, warmup=0)
    last = {name: found[-1] for name, found in results.items()}
    first, ours = (rewards(last[name]) for name in ("first version", "ours"))
    name = Path(args.checkpoint).name if args.checkpoint else "SmolLM2-135M as it comes"
    write_result(
        "evaluation" if args.checkpoint else "evaluation-untrained",
        f"evaluation of {len(ours)} tasks, greedy, beside the first version of this repository ({name})",
        seconds,
        ratio=ratio(seconds, "first version", "ours"),
        target=3,
        quick=args.quick,
        details={
            "baseline": args.baseline,
            "results": {side: {key: result.get(key) for key in SHOWN} for side, result in last.items()},
            "tasks_with_the_same_reward": sum(first.get(task) == reward for task, reward in ours.items()),
        },
        folder=args.results,
    )


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--checkpoint", help="HF folder; a trained one says more (default: SmolLM2 as it comes)")
    made.add_argument("--baseline", default=BASELINE, metavar="COMMIT", help="the other version (%(default)s)")
    made.add_argument("--tasks", type=int, help="so many tasks (default: all 40)")
    made.add_argument("--turn-tokens", type=int, help="at most so many tokens a turn (default: the evaluator's)")
    made.add_argument("--repeats", type=int, default=1, help="runs of each side (%(default)s)")
    args = made.parse_args()
    if args.quick:
        args.tasks, args.turn_tokens = args.tasks or 4, args.turn_tokens or 32
    with tempfile.TemporaryDirectory() as folder:
        run(args, checkout(args.baseline, Path(folder) / "first"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

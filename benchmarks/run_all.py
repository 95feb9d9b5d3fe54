"""Runs every benchmark as its own process, one after the other, and prints the README's performance table.

    python benchmarks/run_all.py             # all of them; --quick: smaller sizes, under 10 minutes
    python benchmarks/run_all.py episode decode
    python benchmarks/run_all.py --table     # only prints the table of benchmarks/results/*.json

Close everything else that computes. A benchmark whose other side is not installed is listed as not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import EXIT_NO_PEER, RESULTS, aim, compared, number, verdict

HERE = Path(__file__).resolve().parent
NO_BENCHMARK = ("common", "domains", "partial_credit", "run_all")
LIMIT, QUICK_LIMIT = 3600, 300  # seconds one benchmark may take


def main() -> int:
    args = _parser().parse_args()
    wanted = args.names or scripts()
    unknown = sorted(set(wanted) - set(scripts()))
    if unknown:
        print(f"run_all: no benchmark {', '.join(unknown)}; there are: {', '.join(scripts())}", file=sys.stderr)
        return 2
    failed = {} if args.table else run_each(wanted, args)
    print("\n" + table(load(args.results)))
    for name, why in failed.items():
        print(f"did not run: {name}: {why}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="benchmarks to run; without: all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files (%(default)s)")
    return parser


def scripts() -> list[str]:
    return [path.stem for path in sorted(HERE.glob("*.py")) if path.stem not in NO_BENCHMARK]


def run_each(names: list[str], args: argparse.Namespace) -> dict[str, str]:
    """Runs the benchmarks in order. Returns why each that did not end well did not."""
    failed = {}
    for position, name in enumerate(names, 1):
        print(f"[{position}/{len(names)}] {name}", flush=True)
        began = time.perf_counter()
        why = run_one(name, args)
        print(f"    {why or 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
        if why:
            failed[name] = why
    return failed


def run_one(name: str, args: argparse.Namespace) -> str:
    """The empty string, or why the benchmark gave no result."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--results", str(args.results)]
    limit = QUICK_LIMIT if args.quick else LIMIT
    try:
        done = subprocess.run(
            command + ["--quick"] * args.quick, stderr=subprocess.PIPE, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return last if done.returncode == EXIT_NO_PEER else f"exit code {done.returncode}: {last}"


def load(folder: Path) -> list[dict[str, Any]]:
    """The results, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(results: list[dict[str, Any]]) -> str:
    """The README's performance table in Markdown."""
    rows = ["| question | measured | ratio or value | target | reached |", "|---|---|---|---|---|"]
    return "\n".join(rows + [f"| {' | '.join(cells(result))} |" for result in results])


def cells(result: dict[str, Any]) -> list[str]:
    sides = [f"{side} {number(values['median'])} {result['unit']}" for side, values in result["sides"].items()]
    question = result["question"] + (" (quick run)" if result["quick"] else "")
    reached = {"reached": "yes", "not reached": "no", "": ""}[verdict(result)]
    texts = [question, ", ".join(sides), compared(result), aim(result).removeprefix("target "), reached]
    return [text.replace("|", "\\|") for text in texts]


if __name__ == "__main__":
    sys.exit(main())

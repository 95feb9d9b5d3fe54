"""The table at the end of run_local.sh: base, SFT, RFT and GRPO side by side, with the floor and the noise.

    python examples/tau-bench/summarize.py --run-dir runs/local

reads RUN_DIR/eval_{base,sft,rft,grpo,redrawn}.json (evaluate_tau2.py; "redrawn" is the last checkpoint with names,
numbers and ids drawn anew) and RUN_DIR/minutes.tsv, and writes RUN_DIR/summary.json:
{"stages": {"base": {numbers, "stage_minutes"}, ...}, "floor", "customer", "prompt", "minutes"}.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tau2_errors import BadInput
from tau2_parser import ArgumentParser
from tau2_results import read_result, write_json

STAGES = ("base", "sft", "rft", "grpo", "redrawn")
ISSUES = ("service_issue", "mobile_data_issue", "mms_issue")  # telecom's order; other domains' follow by name
EPISODES = {"results", "simulations", "tasks", "info"}  # stay where they are
# What all stages of a table have in common; `redrawn` may have new ids.
SHARED = ("domain", "task_split", "total_tasks", "num_trials", "customer", "prompt", "temperature", "redraw_ids")
NEEDED = {
    "metrics": dict,
    "pass_at_1": int | float,
    "avg_partial_score": int | float,
    "floor_always_transfer": int | float | None,
    "total_tasks": int,
    "by_issue_type": dict,
    "customer": dict,
    "prompt": str,
    "domain": str,
    "task_split": str,
}


def read_stages(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The evaluation of each stage, with the minutes that the stage took. Raises BadInput when none is there, and for
    evaluations that one table cannot hold."""
    minutes = read_minutes(run_dir / "minutes.tsv")
    stages = {}
    for stage in STAGES:
        path = run_dir / f"eval_{stage}.json"
        if path.exists():
            stages[stage] = {**read_numbers(path), "stage_minutes": minutes[stage] + minutes[f"eval_{stage}"]}
    if not stages:
        raise BadInput(f"no eval_{{{','.join(STAGES)}}}.json in {run_dir}: run run_local.sh first")
    check_alike(run_dir, stages)
    return stages


def check_alike(run_dir: Path, stages: dict[str, dict[str, Any]]) -> None:
    """Raises BadInput for a stage that was evaluated in another way than the first."""
    first, *others = stages
    for other in others:
        names = [name for name in SHARED if (name, other) != ("redraw_ids", "redrawn")]
        a, b = stages[first], stages[other]
        if told := [f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in names if a.get(name) != b.get(name)]:
            raise BadInput(
                f"{run_dir}: eval_{first}.json and eval_{other}.json cannot stand in one table ({'; '.join(told)}): "
                "evaluate one of them again, as the other"
            )


def read_numbers(path: Path) -> dict[str, Any]:
    """A result of evaluate_tau2.py without its episodes. Raises BadInput for any other file."""
    try:
        result = read_result(path)
        wrong = [name for name, kind in NEEDED.items() if not isinstance(result.get(name, ...), kind)]
        if not wrong and not _is_interval(result["metrics"].get("pass_at_1")):
            wrong = ["metrics.pass_at_1"]
        if wrong:
            raise BadInput(f"{path}: not a result of evaluate_tau2.py ({wrong[0]})")
    except BadInput as error:
        raise BadInput(f"{error}: remove it and evaluate again") from None
    return {key: value for key, value in result.items() if key not in EPISODES}


def _is_interval(estimate: Any) -> bool:
    ends = [estimate.get("low", ""), estimate.get("high", "")] if isinstance(estimate, dict) else [""]
    return ends == [None, None] or all(isinstance(end, int | float) for end in ends)


def read_minutes(path: Path) -> dict[str, float]:
    """Minutes per stage from lines "stage<TAB>seconds"; an interrupted stage has several, which add up."""
    minutes: dict[str, float] = defaultdict(float)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        stage, _, seconds = line.partition("\t")
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", seconds):
            raise BadInput(f"{path}: {line[:40]!r} is no stage and its seconds: remove the line")
        minutes[stage] += float(seconds) / 60
    return minutes


def summary(stages: dict[str, dict[str, Any]], minutes: dict[str, float]) -> dict[str, Any]:
    last = list(stages.values())[-1]
    return {
        "stages": stages,
        "floor": last["floor_always_transfer"],
        "customer": last["customer"],
        "prompt": last["prompt"],
        "minutes": round(sum(minutes.values()), 1),
        "minutes_by_step": {step: round(value, 1) for step, value in minutes.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The stages as aligned rows."""
    issues = issue_types(result["stages"].values())
    head = ["", "pass@1", "95 % interval", "partial", *(issue.removesuffix("_issue") for issue in issues), "minutes"]
    rows = [head]
    for stage, row in result["stages"].items():
        solved = [_solved(row["by_issue_type"].get(issue)) for issue in issues]
        low, high = (row["metrics"]["pass_at_1"][end] for end in ("low", "high"))
        numbers = [f"{row['pass_at_1']:.3f}", "-" if low is None else f"[{low:.3f}, {high:.3f}]"]
        rows.append([stage, *numbers, f"{row['avg_partial_score']:.3f}", *solved, f"{row['stage_minutes']:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def issue_types(stages: Iterable[dict[str, Any]]) -> list[str]:
    """Telecom's three, or those that the stages have."""
    stages = list(stages)
    if any(stage["domain"].startswith("telecom") for stage in stages):
        return list(ISSUES)
    return sorted({issue for stage in stages for issue in stage["by_issue_type"]})


def _solved(issue: dict[str, Any] | None) -> str:
    return "-" if not isinstance(issue, dict) else f"{issue.get('successes')}/{issue.get('total')}"


def print_report(result: dict[str, Any], path: Path) -> None:
    last = list(result["stages"].values())[-1]
    print(table(result))
    floor = "-" if result["floor"] is None else f"{result['floor']:.3f}"
    print(f"floor (always transfer): {floor}   minutes in all: {result['minutes']}")
    print(f"customer: {json.dumps(result['customer'])}   prompt: {result['prompt']}")
    sampling = "greedy" if last.get("temperature") == 0 else f"temperature {last.get('temperature')}"
    trials = f"{last['num_trials']} trials each, " if last.get("num_trials", 1) != 1 else ""
    print(
        f"{last['total_tasks']} {last['domain']} {last['task_split']} tasks, {trials}{sampling}. "
        f"Customer {result['customer'].get('kind')}, {result['prompt']} prompt: these numbers do not compare with "
        "published tau2 scores."
    )
    print(f"written to {path}")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of run_local.sh")
    args = parser.parse_args(argv)
    try:
        result = summary(read_stages(args.run_dir), read_minutes(args.run_dir / "minutes.tsv"))
        write_json(args.run_dir / "summary.json", result)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.run_dir}: {error.strerror or error}", file=sys.stderr)
        return 2
    print_report(result, args.run_dir / "summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One agent under each mood of the scripted customer: what a harder customer costs it.

    python examples/tau-bench/sensitivity.py --checkpoint runs/local/sft/hf --prompt short --output-dir runs/moods
    python examples/tau-bench/sensitivity.py --agent teacher --output-dir runs/moods_teacher --moods terse asks_back

takes the flags of evaluate_tau2.py and runs one evaluation a mood (OUTPUT_DIR/MOOD.json) with one server for all of
them; the same command continues an interrupted run. Each mood is compared with the plain customer, task by task, as
`evaluate_tau2.py compare` does it. The table is printed and written to OUTPUT_DIR/sensitivity.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate_tau2
from model_server import running_server
from tau2_compare import compare, p_value
from tau2_errors import BadInput
from tau2_moods import CHOICES, MOODS
from tau2_parser import ArgumentParser
from tau2_results import read_result, write_json

PLAIN = MOODS[0]
OURS = ("--output-path", "--save-to", "--user", "--user-llm", "--user-args", "--user-llm-args")


def main(argv: Sequence[str] | None = None) -> int:
    return evaluate_tau2.reporting_errors(run, sys.argv[1:] if argv is None else list(argv))


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those of evaluate_tau2.py."""
    parser = ArgumentParser(
        prog="sensitivity.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="All other flags are those of evaluate_tau2.py run.",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results, made where missing")
    parser.add_argument("--moods", nargs="+", default=list(MOODS), metavar="MOOD", help=f"of {', '.join(CHOICES)}")
    ours, rest = parser.parse_known_args(argv)
    if unknown := [mood for mood in ours.moods if mood not in CHOICES]:
        raise BadInput(f"unknown mood {unknown[0][:40]!r}; choose among: {', '.join(CHOICES)}")
    if given := [flag for flag in rest if flag.partition("=")[0] in OURS]:
        raise BadInput(f"{given[0].partition('=')[0]} is set here for each mood: leave it out")
    ours.moods = list(dict.fromkeys([PLAIN, *ours.moods]))
    return ours, rest


def run(argv: Sequence[str]) -> int:
    ours, rest = parse_args(argv)
    evaluations = {mood: _evaluation(ours.output_dir, mood, rest) for mood in ours.moods}
    try:
        ours.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output-dir {ours.output_dir}: cannot be made ({error.strerror})") from None
    for args in evaluations.values():
        evaluate_tau2.check_args(args, mood_is_set=True)
        evaluate_tau2.episode_config(args)
    with _one_server(evaluations):
        for mood, args in evaluations.items():
            print(f"\n== {mood}", flush=True)
            if code := evaluate_tau2.run(args):
                return code
    found = table({mood: read_result(args.output_path) for mood, args in evaluations.items()})
    write_json(ours.output_dir / "sensitivity.json", {"moods": found})
    print("\n" + text(found))
    print(f"\nwritten to {ours.output_dir / 'sensitivity.json'}")
    return 0


def _evaluation(folder: Path, mood: str, rest: Sequence[str]) -> argparse.Namespace:
    """The flags of one mood's evaluation; the plain customer's are those of every other evaluation."""
    customer = {} if mood == PLAIN else {"mood": mood}
    own = ["--output-path", str(folder / f"{mood}.json"), "--user-args", json.dumps(customer)]
    return evaluate_tau2.parse_args([*rest, *own])


@contextlib.contextmanager
def _one_server(evaluations: dict[str, argparse.Namespace]):
    """Each evaluation would start a server of its own; where one answers, all use that. None for what is finished."""
    owed = [args for args in evaluations.values() if not Path(args.output_path).exists()]
    with contextlib.ExitStack() as stack:
        if owed and owed[0].agent == evaluate_tau2.CHECKPOINT:
            stack.enter_context(running_server(owed[0]))
        yield


def table(results: dict[str, dict]) -> list[dict[str, Any]]:
    """A row a mood: mood, customer, tasks, pass_at_1 and avg_partial_score (value, low, high), avg_agent_turns,
    floor_always_transfer, end_reasons, and difference: of pass@1 to the plain customer's, as tau2_compare gives
    it; None for that customer itself."""
    pairs = {pair["b"]: pair for pair in compare(list(results.values()), list(results), anyway=True)["pairs"]}
    return [
        {
            "mood": mood,
            "customer": result["customer"],
            "tasks": result["total_tasks"],
            "pass_at_1": result["metrics"]["pass_at_1"],
            "difference": pairs[mood]["pass_at_1"] if mood in pairs else None,
            "avg_partial_score": result["metrics"]["avg_partial_score"],
            "avg_agent_turns": result["avg_agent_turns"],
            "floor_always_transfer": result["floor_always_transfer"],
            "end_reasons": result["end_reasons"],
        }
        for mood, result in results.items()
    ]


def text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'mood':<10}  {'pass@1':<22}  {'difference to plain':<34}  {'partial':<22}  turns"]
    for row in rows:
        passed, partial = evaluate_tau2.interval(row["pass_at_1"]), evaluate_tau2.interval(row["avg_partial_score"])
        told = _difference(row["difference"])
        lines.append(f"{row['mood']:<10}  {passed:<22}  {told:<34}  {partial:<22}  {row['avg_agent_turns']:.1f}")
    floor = rows[0]["floor_always_transfer"]
    lines.append(f"{rows[0]['tasks']} tasks; always-transfer floor {'unknown' if floor is None else f'{floor:.3f}'}")
    return "\n".join(lines)


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    span = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f}{span} {p_value(found['p'])}"


if __name__ == "__main__":
    sys.exit(main())

"""How many groups of a stored run gain a gradient from partial credit, which the binary reward does not give:

    PYTHONPATH=examples/tau-bench python benchmarks/partial_credit.py RUN [RUN ...] [--alpha 0.5] [--matching official]

RUN: a folder of --save-debug-rollout-data files (of slime or slime_local), or a result of evaluate_tau2.py with
several trials, whose trials of a task count as a group. The files hold the groups that were kept: run without a
dynamic filter, or read rollout/groups/* in the log, which count dropped ones too.
"""

import argparse
import enum
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rollout_traces import load_samples, rollout_files
from tau2_episode import EndReason
from tau2_errors import BadInput
from tau2_results import read_result
from tau2_reward_shaping import ALPHA, MATCHINGS, by_group, group_metrics


class Stored(SimpleNamespace):
    """A sample out of a file, with what the reward plug-in reads."""

    class Status(enum.Enum):
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"


def read_groups(run: Path) -> list[list[Stored]]:
    """Groups of one RUN. Raises BadInput."""
    if not run.exists():
        raise BadInput(f"{run} does not exist: give a folder of rollouts, or a result of evaluate_tau2.py")
    if run.suffix == ".json":
        return by_group(_of_evaluation(row) for row in read_result(run)["results"])
    files = rollout_files(run) if run.is_dir() else [run]
    if not files:
        raise BadInput(f"{run}: no files of --save-debug-rollout-data there")
    return [group for file in files for group in by_group(map(_of_rollout, load_samples(file)))]


def _of_rollout(sample: dict[str, Any]) -> Stored:
    by_value = {status.value: status for status in Stored.Status}
    status = by_value.get(sample["status"], Stored.Status.COMPLETED)
    names = ("group_index", "reward", "remove_sample", "metadata")
    return Stored(status=status, **{name: sample[name] for name in names})


def _of_evaluation(row: dict[str, Any]) -> Stored:
    cut_off = EndReason(row["end_reason"]).is_truncated
    return Stored(
        status=Stored.Status.TRUNCATED if cut_off else Stored.Status.COMPLETED,
        group_index=row["task_id"],
        reward=row["reward"],
        remove_sample=False,
        metadata={"tau2": row},
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the groups that gain a gradient from partial credit.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--alpha", type=float, default=ALPHA)
    parser.add_argument("--matching", choices=MATCHINGS, default="sound")
    args = parser.parse_args(argv)
    settings = SimpleNamespace(tau2_partial_alpha=args.alpha, tau2_partial_matching=args.matching)
    try:
        for run in args.runs:
            print_counts(run, group_metrics(settings, read_groups(run)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_counts(run: Path, found: dict[str, int]) -> None:
    counts = {name.removeprefix("groups/"): count for name, count in found.items()}
    print(f"{run}: {counts['all']} groups, {counts['mixed']} in which the binary reward has a gradient")
    for outcome in ("failed", "solved"):
        gained = counts[f"{outcome}_with_gradient"]
        print(f"  {counts[outcome]} {outcome} by all; the shaped one has a gradient in {gained}")
    print(f"  {counts['broken']} with fewer than two episodes")


if __name__ == "__main__":
    sys.exit(main())

"""Two or more evaluations of the same tasks, paired: what differs, how sure that is, which tasks flipped.

    python examples/tau-bench/evaluate_tau2.py compare base.json sft.json grpo.json
    python examples/tau-bench/evaluate_tau2.py compare sft.json grpo.json --output-path comparison.json

Every later run is compared with the first, task by task and trial by trial. The interval draws tasks (bootstrap), the
p-value swaps the runs within each task (randomisation); only where both agree are two runs told apart. Runs with
different customers, prompts or limits are refused, for their difference would not be the model's: `--anyway` compares
them and says what differs. So are runs of different seeds where the seed decides who a task's customer is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tau2_errors import BadInput
from tau2_metrics import Difference, episode_key, flips, paired_difference
from tau2_parser import ArgumentParser
from tau2_results import check_output, read_result, write_json

# Settings that belong to the benchmark and not to the model.
SHARED = ("domain", "prompt", "user", "user_args", "max_steps", "max_errors", "max_turn_tokens", "max_context_len")
SHARED += ("redraw_ids", "tau2", "format")
NOTED = "context_limit"  # as SHARED, in results that note it: older ones, and agents without a context, do not
QUANTITIES = {"pass_at_1": "solved", "avg_reward": "reward", "avg_partial_score": "partial_score"}
NAMES = {"pass_at_1": "pass@1", "avg_reward": "average reward", "avg_partial_score": "partial score"}
SHOWN_FLIPS = 20


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    found = compare([read_result(path) for path in args.results], labels(args.results), args.anyway)
    print("\n\n".join(text(pair) for pair in found["pairs"]))
    if args.output_path:
        write_json(Path(args.output_path), found)
        print(f"\nwritten to {args.output_path}")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="evaluate_tau2.py compare", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="OUTPUT.json of evaluations, the first to compare with"
    )
    parser.add_argument("--anyway", action="store_true", help="compare runs of different customers, prompts or limits")
    parser.add_argument("--output-path", help="the comparison as JSON")
    args = parser.parse_args(argv)
    if len(args.results) < 2:
        raise BadInput("compare needs two results or more")
    if args.output_path:
        check_output("--output-path", args.output_path, args.results)
    return args


def labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: eval_sft, eval_grpo, or run1/eval, run2/eval."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]


def compare(results: Sequence[dict], names: Sequence[str], anyway: bool = False) -> dict[str, Any]:
    """{"pairs": [...]}: each later result against the first, JSON values. Raises BadInput for what cannot be paired.

    A pair: a, b (names), tasks, trials, left_out (episodes that only one of them has), differences in the settings,
    pass_at_1, avg_reward and avg_partial_score (each a Difference as JSON), flips, verdict.
    """
    first, *others = results
    return {
        "pairs": [_pair(first, other, names[0], name, anyway) for other, name in zip(others, names[1:], strict=True)]
    }


def _pair(a: dict, b: dict, name_a: str, name_b: str, anyway: bool) -> dict[str, Any]:
    differing = differing_settings(a, b)
    if differing and not anyway:
        told = "; ".join(f"{key} {one!r} and {other!r}" for key, (one, other) in differing.items())
        raise BadInput(
            f"{name_a} and {name_b} differ in more than the model ({told}): --anyway compares them all the same"
        )
    keys_a, keys_b = (set(map(episode_key, result["results"])) for result in (a, b))
    if not keys_a & keys_b:
        raise BadInput(f"{name_a} and {name_b} have no task and trial in common")
    found = {name: paired_difference(a["results"], b["results"], key) for name, key in QUANTITIES.items()}
    changed = flips(a["results"], b["results"])
    return {
        "a": name_a,
        "b": name_b,
        "tasks": found["pass_at_1"].tasks,
        "episodes": len(keys_a & keys_b),
        "left_out": len(keys_a ^ keys_b),
        "differing_settings": differing,
        "values": {
            name: [_mean(r["results"], key, keys_a & keys_b) for r in (a, b)] for name, key in QUANTITIES.items()
        },
        **{name: difference.json() for name, difference in found.items()},
        "flips": changed,
        "verdict": verdict(found["pass_at_1"], name_a, name_b, len(changed)),
    }


def differing_settings(a: dict, b: dict) -> dict[str, list]:
    """{name: [of a, of b]} of what belongs to the benchmark, not to the model, and differs between two results."""
    pairs = {name: [a["settings"].get(name), b["settings"].get(name)] for name in shared_names(a, b)}
    if pairs["user"][0] == pairs["user"][1] and pairs["user_args"][0] == pairs["user_args"][1]:
        pairs["customer"] = [a["customer"], b["customer"]]  # its version; another customer is told by the settings
    pairs["graded by"] = [result.get("versions", {}).get("tau2") for result in (a, b)]  # rescore may be another
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def shared_names(a: dict, b: dict) -> list[str]:
    """The settings that two results must share."""
    names, both = list(SHARED), (a["settings"], b["settings"])
    if any(map(seed_draws_customer, both)):
        names.append("seed")
    if all(NOTED in settings for settings in both):
        names.append(NOTED)
    return names


def seed_draws_customer(settings: dict[str, Any]) -> bool:
    """Whether the seed decides who a task's customer is: its name and numbers, or its mood, wordings and slips."""
    user_args = settings.get("user_args")
    in_a_mood = isinstance(user_args, dict) and user_args.get("mood", "plain") != "plain"
    return bool(settings.get("redraw_ids")) or in_a_mood


def _mean(rows: Sequence[dict], key: str, wanted: set) -> float:
    values = [row[key] for row in rows if episode_key(row) in wanted]
    return sum(values) / len(values)


def verdict(difference: Difference, a: str, b: str, changed: int) -> str:
    """What the data say about pass@1, in words."""
    if not changed:
        return f"{a} and {b} solve the same tasks: no difference in any of {difference.tasks}"
    if difference.told_apart:
        better, worse = (b, a) if difference.value > 0 else (a, b)
        return (
            f"{better} solves more than {worse}: pass@1 {abs(difference.value):.3f} higher ({p_value(difference.p)})"
        )
    told = f"the data cannot tell {a} and {b} apart on pass@1"
    if difference.detectable:  # not so where every task differs by as much
        told += f": {difference.tasks} tasks show differences of about {difference.detectable:.2f}"
    if difference.needed:
        told += f"; one of {abs(difference.value):.3f} would take some {difference.needed:,} tasks like these"
    return told


def text(pair: dict[str, Any]) -> str:
    """A pair as lines for the terminal."""
    lines = [f"{pair['b']} - {pair['a']}: {pair['tasks']} tasks, {pair['episodes']} paired episodes"]
    if pair["left_out"]:
        lines.append(f"  left out: {pair['left_out']} episodes that only one of them has")
    for key, (one, other) in pair["differing_settings"].items():
        lines.append(f"  DIFFERENT {key}: {one!r} and {other!r}; what follows is not the model's doing alone")
    for name in QUANTITIES:
        lines.append(_quantity(NAMES[name], pair["values"][name], pair[name]))
    up = [flip for flip in pair["flips"] if flip["b"] > flip["a"]]
    lines.append(f"  flipped: {len(up)} tasks better with {pair['b']}, {len(pair['flips']) - len(up)} worse")
    for flip in pair["flips"][:SHOWN_FLIPS]:
        lines.append(f"    {flip['a']}/{flip['trials']} -> {flip['b']}/{flip['trials']}  {flip['task_id']}")
    if len(pair["flips"]) > SHOWN_FLIPS:
        lines.append(f"    and {len(pair['flips']) - SHOWN_FLIPS} more")
    return "\n".join([*lines, f"  {pair['verdict']}"])


def _quantity(name: str, values: Sequence[float], difference: dict[str, Any]) -> str:
    line = f"  {name:<16}{values[0]:.3f} -> {values[1]:.3f}   {difference['value']:+.3f}"
    if difference["low"] is not None:
        line += f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{line}   {p_value(difference['p'])}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"

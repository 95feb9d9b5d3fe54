"""Numbers over evaluated episodes: pass@k, pass^k, means with intervals, groups, paired differences.

A library: used by evaluate_tau2.py, tau2_compare.py and tau2_report.py. A row is one episode as evaluate_tau2.py
writes it: a dict with task_id, trial, solved, reward, partial_score and what else `episode_row` adds.

Trials of one task are not independent, so every interval treats the task as the unit: tasks are drawn with replacement
(percentile bootstrap, Efron & Tibshirani 1993, chapter 13), each with all its trials.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
DRAWS = 10_000
AT_ONCE = 500  # draws in memory together
MANY_CHANGES = 4  # so many and more are one group
POWER_Z = 0.84  # of 80 % power: the 0.80 quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; `low` and `high` are None where the tasks tell none, as a single one."""

    value: float
    low: float | None
    high: float | None

    def json(self) -> dict[str, float | None]:
        return {name: None if value is None else round(value, 6) for name, value in asdict(self).items()}


# ---------------------------------------------------------------------------------------------------------------------
# One run


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one or more of k trials drawn from n, c of them solved, is solved (arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Chance that all of k trials drawn from n, c of them solved, are solved: tau-bench's pass^k, arXiv 2406.12045."""
    return math.comb(c, k) / math.comb(n, k)


def episode_key(row: dict) -> tuple[str, int]:
    """(task_id, trial): which episode of an evaluation a row is."""
    return row["task_id"], row["trial"]


def by_task(rows: Iterable[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["task_id"]].append(row)
    return dict(groups)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value a task, each in 0..1, with its interval.

    Where all tasks have 0, or all 1, the bootstrap has no width: the exact bound of Clopper and Pearson stands there.
    Where all have the same other value there is no interval.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Estimate(mean, None, None)
    if set(values) <= {0.0} or set(values) <= {1.0}:
        bound = ((1 - CONFIDENCE) / 2) ** (1 / n)
        return Estimate(mean, bound, 1.0) if mean else Estimate(mean, 0.0, 1.0 - bound)
    if len(set(values)) == 1:
        return Estimate(mean, None, None)
    return Estimate(mean, *_bootstrap(values))


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the mean; the same numbers every time."""
    data, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    means = [data[rng.integers(len(data), size=(AT_ONCE, len(data)))].mean(axis=1) for _ in range(DRAWS // AT_ONCE)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def task_means(rows: Iterable[dict], key: str) -> list[float]:
    """The mean of row[key] over each task's trials."""
    return [statistics.fmean(row[key] for row in found) for found in by_task(rows).values()]


def metrics(rows: Sequence[dict]) -> dict[str, Any]:
    """Every headline number with its interval; pass@k and pass^k for k = 1..trials, where trials are even."""
    tasks = by_task(rows)
    trials = min(len(found) for found in tasks.values())
    counts = [(len(found), sum(row["solved"] for row in found)) for found in tasks.values()]
    ks = range(1, trials + 1)
    return {
        "confidence": CONFIDENCE,
        "pass_at_1": estimate(task_means(rows, "solved")).json(),
        "pass_at_k": {str(k): estimate([pass_at_k(n, c, k) for n, c in counts]).json() for k in ks},
        "pass_hat_k": {str(k): estimate([pass_hat_k(n, c, k) for n, c in counts]).json() for k in ks},
        "avg_reward": estimate(task_means(rows, "reward")).json(),
        "avg_partial_score": estimate(task_means(rows, "partial_score")).json(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Groups and behaviour


def sub_issues(task_id: str) -> list[str]:
    """The faults that a telecom task combines: "[mms_issue]bad_vpn|airplane_mode_on[PERSONA:Easy]" has two."""
    match = re.match(r"\[\w+\](.+?)(?:\[PERSONA:\w+\])?$", task_id)
    return match.group(1).split("|") if match else []


def persona(task_id: str) -> str | None:
    match = re.search(r"\[PERSONA:(\w+)\]$", task_id)
    return match.group(1) if match else None


def grouped(rows: Iterable[dict], name_of: Callable[[dict], str | None]) -> dict[str, dict[str, Any]]:
    """Solved episodes, pass@1 with its interval and the partial score per group; rows of no group are left out."""
    groups = defaultdict(list)
    for row in rows:
        name = name_of(row)
        if name is not None:
            groups[name].append(row)
    return {name: _group(groups[name]) for name in sorted(groups)}


def _group(rows: list[dict]) -> dict[str, Any]:
    passed = estimate(task_means(rows, "solved"))
    return {
        "total": len(rows),
        "tasks": len(by_task(rows)),
        "successes": sum(row["solved"] for row in rows),
        "pass_at_1": passed.value,
        "low": passed.low,
        "high": passed.high,
        "avg_partial_score": statistics.fmean(row["partial_score"] for row in rows),
    }


def breakdowns(rows: Sequence[dict]) -> dict[str, Any]:
    """by_issue_type; for telecom by_sub_issues (how many faults a task combines) and by_persona, for the other domains
    by_changes (how many gold actions change something)."""
    return {
        "by_issue_type": grouped(rows, lambda row: row["issue_type"]),
        "by_sub_issues": grouped(rows, lambda row: str(len(sub_issues(row["task_id"]))) if persona_of(row) else None),
        "by_persona": grouped(rows, persona_of),
        "by_changes": grouped(rows, changes),
    }


def changes(row: dict) -> str | None:
    """The number of gold actions besides look-ups, of a task that does not list its faults in its id; else None."""
    if sub_issues(row["task_id"]) or "checks" not in row:
        return None
    count = sum(not check.get("look_up") for check in row["checks"]["action_checks"])
    return str(count) if count < MANY_CHANGES else f"{MANY_CHANGES}+"


def persona_of(row: dict) -> str | None:
    return persona(row["task_id"])


def behaviour(rows: Sequence[dict]) -> dict[str, Any]:
    """How the episodes went: end reasons (counts), means an episode, tokens in all."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    return {
        "avg_steps": mean("steps"),
        "avg_agent_turns": mean("agent_turns"),
        "avg_tool_errors": mean("tool_errors"),
        "avg_customer_tool_calls": mean("customer_tool_calls"),
        "end_reasons": dict(Counter(row["end_reason"] for row in rows).most_common()),
        "tokens": dict(sum((Counter(row["tokens"]) for row in rows), Counter())),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


@dataclass(frozen=True)
class Difference:
    """Paired difference B - A of one quantity over the tasks that both have.

    p: how often differences at least as large arise when A and B are swapped at random within each task (sign-flip
    randomisation test), for the interval of the bootstrap is too narrow where few tasks differ. `needed`: tasks that
    would show a difference of this size with 80 % power; `detectable`: the difference that so many tasks would show.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    tasks: int
    needed: int | None
    detectable: float

    @property
    def told_apart(self) -> bool:
        """Whether the data show a difference: the interval leaves 0 out, and so does the randomisation test."""
        return self.low is not None and (self.low > 0 or self.high < 0) and self.p < 1 - CONFIDENCE

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "told_apart": self.told_apart}


def paired_difference(a: Sequence[dict], b: Sequence[dict], key: str) -> Difference:
    """B - A of the mean of row[key]. Raises ValueError when no (task, trial) is in both."""
    values = list(_task_differences(a, b, key).values())
    if not values:
        raise ValueError("no task and trial is in both runs")
    mean, n = statistics.fmean(values), len(values)
    spread = statistics.stdev(values) if n > 1 else 0.0
    z = 1.96 + POWER_Z
    return Difference(
        mean,
        *(_bootstrap(values) if n > 1 else (None, None)),
        p=_sign_flip_p(values),
        tasks=n,
        needed=math.ceil((z * spread / mean) ** 2) if mean and spread else None,
        detectable=z * spread / math.sqrt(n),
    )


def _task_differences(a: Sequence[dict], b: Sequence[dict], key: str) -> dict[str, float]:
    """Per task, the mean difference over the trials that both have."""
    first = {episode_key(row): row[key] for row in a}
    found = defaultdict(list)
    for row in b:
        if episode_key(row) in first:
            found[row["task_id"]].append(row[key] - first[episode_key(row)])
    return {task: statistics.fmean(values) for task, values in found.items()}


def _sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided; tasks without a difference have no say."""
    data = np.asarray([value for value in values if value], dtype=float)
    if not len(data):
        return 1.0
    rng = np.random.default_rng(0)
    sums = [(data * rng.choice((-1.0, 1.0), size=(AT_ONCE, len(data)))).sum(axis=1) for _ in range(DRAWS // AT_ONCE)]
    as_large = int((np.abs(np.concatenate(sums)) >= abs(data.sum()) - 1e-9).sum())
    return (1 + as_large) / (1 + DRAWS)


def flips(a: Sequence[dict], b: Sequence[dict]) -> list[dict[str, Any]]:
    """Tasks whose number of solved trials differs, over the trials that both have: largest change first."""
    pairs = set(map(episode_key, a)) & set(map(episode_key, b))
    counts = []
    for rows in (a, b):
        counts.append(Counter(row["task_id"] for row in rows if row["solved"] and episode_key(row) in pairs))
    trials = Counter(task for task, _ in pairs)
    changed = [task for task in trials if counts[0][task] != counts[1][task]]
    changed.sort(key=lambda task: (-abs(counts[1][task] - counts[0][task]), task))
    return [{"task_id": task, "a": counts[0][task], "b": counts[1][task], "trials": trials[task]} for task in changed]

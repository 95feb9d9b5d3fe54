"""Inputs of the report for its tests: episodes of the scripted agents in the shape of evaluate_tau2.py's output."""

import asyncio
import json
import math
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from evaluate_tau2 import episode_row
from tau2_episode import EpisodeConfig, load_tasks, run_episode
from tau2_teacher import AGENTS


def tasks_of_each_kind(per_kind: int, split: str = "test") -> list:
    kinds = defaultdict(list)
    for task in load_tasks("telecom", split):
        kinds[task.id.split("]")[0]].append(task)
    return [task for kind in sorted(kinds) for task in kinds[kind][:per_kind]]


def episodes(tasks: list, shares: dict[str, float], trials: int = 1, seed: int = 0) -> list[dict]:
    """Rows with their simulation, one per task and trial; each episode's agent is drawn by `shares`."""
    rng = random.Random(seed)
    wanted = [(task, trial) for trial in range(trials) for task in tasks]

    async def run() -> list[dict]:
        found = []
        for task, trial in wanted:
            agent = AGENTS[rng.choices(list(shares), list(shares.values()))[0]]()
            episode = await run_episode(task, agent, EpisodeConfig(prompt="short"), seed=300 + trial)
            row = episode_row(episode, agent, trial)
            found.append({**row, "tokens": {"prompt": 900, "generated": 210, "cached": 700}, "run": 0, "minutes": 0.1})
        return found

    return asyncio.run(run())


def result(tasks: list, rows: list[dict], **changes) -> dict:
    """The evaluation's OUTPUT.json of these rows. The intervals are only plausible ones."""
    trials = 1 + max(row["trial"] for row in rows)
    simulations = [{**row["simulation"], "trial": row["trial"]} for row in rows]
    return {
        "checkpoint": "runs/local/sft/hf",
        "domain": "telecom",
        "task_split": "test",
        "total_tasks": len(tasks),
        "total_episodes": len(rows),
        "successes": sum(row["solved"] for row in rows),
        "pass_at_1": _mean(rows, "solved"),
        "avg_reward": _mean(rows, "reward"),
        "avg_steps": _mean(rows, "steps"),
        "avg_partial_score": _mean(rows, "partial_score"),
        "metrics": _metrics(rows, trials),
        "by_issue_type": _groups(rows, lambda row: row["issue_type"]),
        "by_sub_issues": _groups(rows, lambda row: str(row["task_id"].count("|") + 1)),
        "by_persona": _groups(rows, lambda row: row["task_id"].split("PERSONA:")[1].rstrip("]")),
        "end_reasons": dict(Counter(row["end_reason"] for row in rows)),
        "floor_always_transfer": 0.3,
        "agent": "checkpoint",
        "customer": {"kind": "scripted", "version": "1"},
        "prompt": "short",
        "seed": 300,
        "num_trials": trials,
        "temperature": 0.7 if trials > 1 else 0.0,
        "max_steps": 200,
        "max_turn_tokens": 96,
        "redraw_ids": False,
        "tokens": {"prompt": 36000, "generated": 8400},
        "minutes": 1.4,
        "timestamp": "2026-01-02T03:04:05.678",
        "info": {},
        "versions": {"python": "3.11.7", "tau2": "26.3", "torch": "2.9.0", "git": "0123456789ab"},
        "tasks": [task.model_dump(mode="json") for task in tasks],
        "simulations": simulations,
        "results": [{key: value for key, value in row.items() if key != "simulation"} for row in rows],
        **changes,
    }


def save(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def training_log(path: Path, rollouts: int = 8) -> Path:
    """A metrics.jsonl with the keys of a GRPO run of slime_local."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rollouts):
        share = 0.5 + 0.4 * i / rollouts
        train = {"loss": 0.02 - 0.001 * i, "kl_loss": 0.001 * i, "ppo_kl": 0.0002 * i, "grad_norm": 0.8}
        train |= {"train_rollout_logprob_abs_diff": 0.004 + 0.0002 * i, "step": i}
        rollout = {"raw_reward": share, "pass_rate": share, "shaped_reward": 1.4 * share, "partial_score": share}
        rollout |= {"stop/user_stop": share, "step": i} | ({"stop/max_steps": 1 - share} if i % 2 else {})
        lines.append({"step": i, **{f"train/{key}": value for key, value in train.items()}})
        lines.append({"step": i, **{f"rollout/{key}": value for key, value in rollout.items()}})
        if i % 4 == 3:
            lines.append({"step": i, "eval/pool": share, "eval/pool/response_len/mean": 900.0, "eval/step": i})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _mean(rows: list[dict], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _interval(value: float, count: int) -> dict:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.001) / count)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def _metrics(rows: list[dict], trials: int) -> dict:
    solved = defaultdict(list)
    for row in rows:
        solved[row["task_id"]].append(row["solved"])
    at_k, hat_k = {}, {}
    for k in range(1, trials + 1):
        chances = [(math.comb(sum(not s for s in one), k), math.comb(sum(one), k)) for one in solved.values()]
        total = math.comb(trials, k)
        at_k[str(k)] = _interval(statistics.fmean(1 - none / total for none, _ in chances), len(solved))
        hat_k[str(k)] = _interval(statistics.fmean(every / total for _, every in chances), len(solved))
    means = {"pass_at_1": "solved", "avg_reward": "reward", "avg_partial_score": "partial_score"}
    found = {name: _interval(_mean(rows, key), len(solved)) for name, key in means.items()}
    return {"confidence": 0.95, "pass_at_k": at_k, "pass_hat_k": hat_k, **found}


def _groups(rows: list[dict], name_of) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[name_of(row)].append(row)
    found = {}
    for name, members in groups.items():
        value = _mean(members, "solved")
        bounds = {key: bound for key, bound in _interval(value, len(members)).items() if key != "value"}
        scores = {"pass_at_1": value, "avg_partial_score": _mean(members, "partial_score")}
        found[name] = {"total": len(members), "successes": sum(row["solved"] for row in members), **scores, **bounds}
    return found

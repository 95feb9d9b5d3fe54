"""Inputs of the report for its tests: episodes of the scripted agents in a result as evaluate_tau2.py writes it."""

import asyncio
import json
import random
from collections import defaultdict
from pathlib import Path

from evaluate_tau2 import about, agent_info, episode_row, measure_floor, numbers, parse_args, settings, versions
from tau2_domains import load_tasks
from tau2_episode import EpisodeConfig, run_episode
from tau2_results import tau2_results
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


def result(tasks: list, rows: list[dict], checkpoint: str = "runs/local/sft/hf") -> dict:
    """The OUTPUT.json of these rows, by the evaluator's own functions, as if a checkpoint had made them."""
    trials = 1 + max(row["trial"] for row in rows)
    flags = ["--prompt", "short", "--num-trials", str(trials), "--agent", "teacher", "--max-turn-tokens", "96"]
    args = parse_args([*flags, "--output-path", "x.json"])
    told = about(args, rows[0]["user"], settings(args)) | {"agent": "checkpoint", "checkpoint": checkpoint}
    config = EpisodeConfig(prompt="short")
    return {
        **told,
        **numbers(rows, measure_floor("telecom", tasks)),
        "minutes": 1.4,
        "versions": versions(),
        "results": [{key: value for key, value in row.items() if key != "simulation"} for row in rows],
        **tau2_results(rows, tasks, config, agent_info(args), trials, args.seed),
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

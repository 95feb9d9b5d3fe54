"""What is logged of rollouts and evaluations, under slime's names."""

import statistics
import zlib
from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

from slime_local.sample import Sample

REPETITION_WINDOW = 10_000
REPETITION_RATIO = 10


def rollout_metrics(args: Any, samples: list[Sample], seconds: float) -> dict[str, float]:
    """`rollout/...` of the samples and `perf/...` of the time they took."""
    metrics = {f"rollout/{name}": value for name, value in sample_metrics(args, samples).items()}
    return metrics | {f"perf/{name}": value for name, value in _speed(samples, seconds).items()}


def eval_metrics(args: Any, data: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    """`eval/NAME`, the mean reward of each data set, and what else is known of it."""
    metrics = {}
    for name, result in data.items():
        metrics[f"eval/{name}"] = statistics.fmean(result["rewards"])
        if "samples" in result:
            details = sample_metrics(args, result["samples"])
            metrics |= {f"eval/{name}/{key}": value for key, value in details.items()}
        if "truncated" in result:
            metrics[f"eval/{name}-truncated_ratio"] = statistics.fmean(result["truncated"])
        if args.log_passrate:
            rates = pass_rates(result["rewards"], args.n_samples_per_eval_prompt)
            metrics |= {f"eval/{name}-{key}": value for key, value in rates.items()}
    return metrics


def train_data_metrics(args: Any, data: dict[str, list[Any]]) -> dict[str, float]:
    """Means over the samples that are trained."""
    names = {
        "raw_reward": "raw_reward",
        "rewards": "rewards",
        "response_lengths": "response_lengths",
        "truncated": "truncated",
    }
    metrics = {f"rollout/{name}": statistics.fmean(data[key]) for name, key in names.items() if key in data}
    metrics["rollout/total_lengths"] = statistics.fmean(map(len, data["tokens"]))
    if args.log_passrate and "raw_reward" in data:
        rates = pass_rates(data["raw_reward"], args.n_samples_per_prompt)
        metrics |= {f"passrate/{key}": value for key, value in rates.items()}
    return metrics


def sample_metrics(args: Any, samples: list[Sample]) -> dict[str, float]:
    """Lengths, endings, cache use and groups without a difference."""
    lengths = [sample.effective_response_length for sample in samples]
    metrics = {f"response_len/{name}": value for name, value in summary(lengths).items()}
    metrics["truncated_ratio"] = statistics.fmean(sample.status is Sample.Status.TRUNCATED for sample in samples)
    metrics["repetition_frac"] = statistics.fmean(has_repetition(sample.response) for sample in samples)
    return metrics | _cache_use(samples) | _equal_groups(args, samples) | _reward_categories(args, samples)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, largest and smallest."""
    return {
        "mean": statistics.fmean(values),
        "median": float(statistics.median(values)),
        "max": float(max(values)),
        "min": float(min(values)),
    }


def pass_rates(rewards: list[float], group_size: int) -> dict[str, float]:
    """Unbiased pass@1, pass@2, pass@4 ... from groups of equal size; a reward of 1 passes."""
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards) - group_size + 1, group_size)]
    sizes = [2**i for i in range(group_size.bit_length())] if group_size > 1 else []
    solved = [sum(reward == 1 for reward in group) for group in groups]
    return {f"pass@{k}": statistics.fmean(_pass_at_k(group_size, n, k) for n in solved) for k in sizes}


def _pass_at_k(samples: int, solved: int, k: int) -> float:
    return 1.0 - comb(samples - solved, k) / comb(samples, k)


def has_repetition(text: str) -> bool:
    """Whether the end of a long text compresses as only repetition does."""
    if len(text) <= REPETITION_WINDOW:
        return False
    end = text[-REPETITION_WINDOW:].encode()
    return len(end) / len(zlib.compress(end)) > REPETITION_RATIO


def _speed(samples: list[Sample], seconds: float) -> dict[str, float]:
    lengths = [sample.response_length for sample in samples]
    effective = [sample.effective_response_length for sample in samples]
    waits = [sample.non_generation_time for sample in samples]
    metrics = {
        "rollout_time": seconds,
        "tokens_per_gpu_per_sec": sum(lengths) / seconds,
        "effective_tokens_per_gpu_per_sec": sum(effective) / seconds,
        "longest_sample_tokens_per_sec": max(lengths) / seconds,
    }
    if max(waits) > 0:
        metrics |= {f"non_generation_time/{name}": value for name, value in summary(waits).items()}
    return metrics


def _cache_use(samples: list[Sample]) -> dict[str, float]:
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    prompt = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    return {
        "prefix_cache_hit_rate": cached / prompt if prompt else 0.0,
        "avg_cached_tokens_per_sample": cached / len(samples),
    }


def _equal_groups(args: Any, samples: list[Sample]) -> dict[str, float]:
    groups: dict[Any, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample.get_reward_value(args))
    equal = [rewards[0] for rewards in groups.values() if len(set(rewards)) == 1]
    counts = Counter(str(round(reward, 1)) for reward in equal if reward is not None)
    return {f"zero_std/count_{reward}": count for reward, count in counts.items()}


def _reward_categories(args: Any, samples: list[Sample]) -> dict[str, float]:
    if args.log_reward_category is None:
        return {}
    counts = Counter(sample.reward[args.log_reward_category] for sample in samples)
    return {f"error_cat/{name}": count / len(samples) for name, count in counts.items()}

"""Partial credit for GRPO, and what the rollout log says about episodes; slime plug-ins, reached by these flags:

    --custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process
    --custom-rollout-log-function-path tau2_reward_shaping.log_rollout
    --custom-eval-rollout-log-function-path tau2_reward_shaping.log_eval_rollout
    --dynamic-sampling-filter-path tau2_reward_shaping.check_shaped_reward_spread    (optional)
    --rollout-all-samples-process-path tau2_reward_shaping.process_all_samples       (optional)

`sample.reward` is tau2's binary reward and stays as it is. The trained reward is

    R = reward + alpha * partial - min(penalty * calls, 0.25)

    alpha: tau2_partial_alpha, 0.5      penalty: tau2_customer_tool_penalty, 0 (off)

where `partial` (0..1) is the share of the task's checks that are met, weighted .7 action, .1 communicate, .2 assertion
and renormalised over the kinds of checks that the task has. Telecom has no communicate checks: .778 action, .222
assertion. Retail and airline have no assertions: .875 action, .125 communicate, or all of the one that there is. Gold
actions that only look something up are left out (telecom has none): another order of look-ups is as good, and tau2's
reward there, the final database and what was said, does not ask for them.

What partial credit is not: an assertion that holds before anybody did anything (a transfer task's) gives its share for
nothing. It does so for every sample of the group alike, and the group's mean takes it out again. Action checks give
nothing for free: a check counts only for a call by the right side, without a tool error, with all arguments, once per
call, and for none at all where the agent then gave an unsolved customer to a human whom the task does not need: every
write tool and a hand-over would otherwise earn more than the hand-over ("sound" matching). tau2_partial_matching:
official selects tau2's own matcher for comparison; it can be gamed.

Nor has an episode that a limit cut off (context full, a turn too long, too many steps) any partial credit. tau2
rewards it with 0 unread, and with credit a loop that asks for everything until the context is full beats a wrong
goodbye: measured, a weak policy had half of its episodes cut off, five rollouts later all (EXPERIMENTS.md).

`calls` counts the agent's calls of tools that only the customer's phone has. What they cost is bounded, so that with
alpha 0.5 whatever is solved (0.75 or more) stays above whatever is not (0.5 or less).

A group whose rewards are all equal trains nothing. The filter drops groups without a spread of R, so that slime
samples others in their place (--over-sampling-batch-size says how many at a time); slime's own
check_reward_nonzero_std looks at the binary reward and also drops what only partial credit tells apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from tau2_settings import DEFAULTS, MATCHINGS, setting

logger = logging.getLogger(__name__)

ALPHA = DEFAULTS.partial_alpha
MOST_PENALTY = 0.25
WEIGHTS = {"action": 0.7, "communicate": 0.1, "assertion": 0.2}
GROUP_NORMALISED = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
STD_NORMALISED = ("grpo", "gspo", "cispo")
STD_EPSILON = 1e-6  # slime's
SPREAD = 1e-6  # a smaller difference of rewards is none
LOST_GROUPS = "groups_without_episode"  # attribute of args: {number of a group: why}
LOST_BATCHES = 3  # of groups on end without an episode: what lasts that long is no passing fault


# ---------------------------------------------------------------------------------------------------------------------
# The score of one episode


def partial_score(checks: dict | None, matching: str = "sound") -> float:
    """Weighted share of met checks, 0..1; 0.0 when there are none after an infrastructure failure.

    Where the task itself has none (nothing is to be changed or said), 1.0 for a dialogue that ended with the database
    as it was.

    checks: an episode's `checks` (see tau2_checks.py). matching: "sound", or "official" for tau2's own action matcher.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"unknown matching {matching!r}; choose one of: {', '.join(MATCHINGS)}")
    checks = checks or {}
    sound = matching == "sound"
    given_up = sound and checks.get("given_up", False)
    actions = [check for check in checks.get("action_checks") or [] if not (sound and check.get("look_up"))]
    met = {
        "action": [check[matching] and not given_up for check in actions],
        "communicate": [check["met"] for check in checks.get("communicate_checks") or []],
        "assertion": [check["met"] for check in checks.get("env_assertions") or []],
    }
    present = {kind: sum(values) / len(values) for kind, values in met.items() if values}
    total = sum(WEIGHTS[kind] for kind in present)
    if not present:
        return float(checks.get("db_match") is True)
    return sum(WEIGHTS[kind] * share for kind, share in present.items()) / total


def shaped_reward(reward: float, checks: dict | None, alpha: float = ALPHA, matching: str = "sound") -> float:
    """R = reward + alpha * partial, without a penalty."""
    return reward + alpha * partial_score(checks, matching)


def trained_reward(args: Any, sample: Any) -> float:
    """R of a sample that holds an episode, with the alpha, matching and penalty of `args`; not yet normalised.
    What a limit cut off has no partial credit."""
    record = _record(sample)
    checks = None if sample.status is type(sample).Status.TRUNCATED else record.get("checks")
    penalty = setting(args, "customer_tool_penalty") * record.get("customer_tool_calls", 0)
    alpha, matching = setting(args, "partial_alpha"), setting(args, "partial_matching")
    return shaped_reward(_binary(args, sample), checks, alpha, matching) - min(penalty, MOST_PENALTY)


def _binary(args: Any, sample: Any) -> float:
    return _number(sample.get_reward_value(args) if hasattr(args, "reward_key") else sample.reward)


# ---------------------------------------------------------------------------------------------------------------------
# slime's reward plug-in


def tau2_reward_post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """(raw_rewards, rewards), both of len(samples): the binary rewards, and the shaped ones normalised per group.

    Groups are the samples of one prompt (`group_index`), of whatever sizes. Samples that hold no episode (aborted or
    failed) get 0.0 and stay out of their group's mean and standard deviation. The raw rewards are only logged: in
    place of such a sample's, and of the teacher's (tau2_demonstrations.py), stands the mean of the others, so that the
    log shows how the model does. Raises RuntimeError when no episode can run (see `refuse_lost`).
    """
    refuse_lost(args, samples, whole_batch=True)
    own = [_binary(args, sample) for sample in samples if is_own_episode(sample)]
    filling = statistics.fmean(own) if own else 0.0
    raw = [_binary(args, sample) if is_own_episode(sample) else filling for sample in samples]
    shaped = [trained_reward(args, sample) if is_episode(sample) else 0.0 for sample in samples]
    return raw, _normalise(args, samples, shaped)


def is_episode(sample: Any) -> bool:
    """Whether the sample holds an episode that can be counted. One that --rollout-sample-filter-path keeps out of the
    loss (`remove_sample`) does: it has its place in its group's mean and deviation, as slime says of that flag."""
    status = type(sample).Status
    return sample.status not in (status.ABORTED, status.FAILED)


def is_own_episode(sample: Any) -> bool:
    """Whether it holds an episode that the model played: one of the teacher's is trained on and says nothing of it."""
    return is_episode(sample) and not _is_taught(sample)


def _normalise(args: Any, samples: Sequence[Any], shaped: list[float]) -> list[float]:
    estimator = getattr(args, "advantage_estimator", "grpo")
    if not getattr(args, "rewards_normalization", True) or estimator not in GROUP_NORMALISED:
        return shaped
    by_std = estimator in STD_NORMALISED and getattr(args, "grpo_std_normalization", True)
    rewards = [0.0] * len(samples)
    for members in _groups(samples).values():
        values = [shaped[i] for i in members]
        mean = statistics.mean(values)  # exact, unlike fmean: equal rewards give advantages of exactly 0
        scale = statistics.stdev(values) + STD_EPSILON if by_std and len(values) > 1 else 1.0
        for i, value in zip(members, values, strict=True):
            rewards[i] = (value - mean) / scale
    return rewards


def _groups(samples: Sequence[Any]) -> dict[Any, list[int]]:
    """Positions of the episodes of each prompt. A sample of no group is compared with nothing: its advantage is 0."""
    groups = defaultdict(list)
    for i, sample in enumerate(samples):
        if is_episode(sample):
            key = ("alone", i) if sample.group_index is None else sample.group_index
            groups[key].append(i)
    return groups


def _record(sample: Any) -> dict:
    """What generate_with_tau wrote about the episode."""
    return (sample.metadata or {}).get("tau2") or {}


def _is_taught(sample: Any) -> bool:
    """Whether the scripted teacher played it (tau2_demonstrations.py)."""
    return bool(_record(sample).get("taught"))


def _number(reward: Any) -> float:
    return float(reward) if reward is not None else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# When nothing runs


def refuse_lost(args: Any, samples: Sequence[Any], whole_batch: bool = False) -> None:
    """Raise RuntimeError, with which both hosts end the run, when groups without a single episode do not end.

    A filter would have others drawn in their place for ever, and without one every rollout would train nothing. They
    may be LOST_BATCHES batches on end; a whole batch that a mistake in the input kept from running is enough, for no
    later one can mend that. Counted in `args`, which is the run's own, by the groups' numbers: what the filter has
    seen, the batch may hold again.

    samples: of one group (of a filter) or of a batch."""
    if not samples or any(is_episode(sample) for sample in samples):
        vars(args).pop(LOST_GROUPS, None)
        return
    lost: dict[Any, str] = vars(args).setdefault(LOST_GROUPS, {})
    lost |= {_number_of(group): _why_lost(group) for group in by_group(samples)}
    mistaken = whole_batch and all(_record(sample).get("bad_input") for sample in samples)
    if mistaken or len(lost) >= _most_lost(args):
        why, count = Counter(lost.values()).most_common(1)[0]
        raise RuntimeError(f"no episode could run in {len(lost)} groups on end; {count} of them: {why}")


def _number_of(group: Sequence[Any]) -> Any:
    return ("alone", group[0].index) if group[0].group_index is None else group[0].group_index


def _why_lost(group: Sequence[Any]) -> str:
    record = _record(group[0])
    if mistake := record.get("bad_input"):
        return str(mistake)
    reason, detail = record.get("end_reason", "aborted"), str(record.get("detail") or "")
    return f"{reason}: {detail[:300]}" if detail else str(reason)


def _most_lost(args: Any) -> float:
    """In groups; those in flight count, which one passing fault may hit together."""
    names = ("rollout_batch_size", "over_sampling_batch_size")
    sizes = [size for name in names if (size := getattr(args, name, None))]
    return LOST_BATCHES * max(sizes) if sizes else float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# slime's dynamic sampling filter, and its hook that sees every group


def check_shaped_reward_spread(args: Any, samples: Sequence[Any], **_: Any) -> Any:
    """Keep a group in which the trained rewards of two episodes differ; what holds no episode is left out.

    Raises RuntimeError when groups without an episode do not end (see `refuse_lost`).
    A slime DynamicFilterOutput under slime, elsewhere an object with the same fields."""
    refuse_lost(args, samples)
    kind = group_kind(args, samples)
    return _filter_output(kind.has_gradient, None if kind.has_gradient else f"no_spread_{kind.outcome}")


def check_shaped_reward_spread_with_fallback(args: Any, samples: Sequence[Any], **_: Any) -> Any:
    """The same, but no further round of sampling is started for a group without spread."""
    output = check_shaped_reward_spread(args, samples)
    output.keep_when_insufficient = True
    return output


def _filter_output(keep: bool, reason: str | None) -> Any:
    """slime takes the reason only from its own class."""
    slime = sys.modules.get("slime.rollout.filter_hub.base_types")
    make = slime.DynamicFilterOutput if slime else SimpleNamespace
    return make(keep=keep, reason=reason, keep_when_insufficient=False)


def process_all_samples(args: Any, groups: Sequence[Sequence[Any]], data_source: Any) -> None:
    """Called at the end of a rollout with every finished group, dropped ones too: keeps their metrics for log_rollout,
    and tells a data source that wants to know (tau2_curriculum) what was solved.

    data_source: the source itself, or a method of it."""
    args.all_groups_metrics = group_metrics(args, groups)
    source = getattr(data_source, "__self__", data_source)
    if hasattr(source, "record_outcomes"):
        source.record_outcomes(sample for group in groups for sample in group if is_own_episode(sample))
        args.all_groups_metrics |= source.metrics()


def group_kind(args: Any, samples: Sequence[Any]) -> SimpleNamespace:
    """`outcome` of a group for the model: failed (none solved), solved (all), mixed, or broken (fewer than two
    episodes, or none of its own). `has_gradient`: whether the trained rewards differ, the teacher's among them."""
    kept = [sample for sample in samples if is_episode(sample)]
    trained = [trained_reward(args, sample) for sample in kept]
    binary = [_binary(args, sample) for sample in kept if is_own_episode(sample)]
    if len(kept) < 2 or not binary:
        outcome = "broken"
    elif max(binary) - min(binary) > SPREAD:
        outcome = "mixed"
    else:
        outcome = "solved" if binary[0] > SPREAD else "failed"
    return SimpleNamespace(outcome=outcome, has_gradient=len(kept) > 1 and max(trained) - min(trained) > SPREAD)


def group_metrics(args: Any, groups: Iterable[Sequence[Any]]) -> dict[str, int]:
    """Counts of groups by outcome: groups/all, groups/failed, groups/solved, groups/mixed, groups/broken. The binary
    reward has no gradient in the failed and the solved ones; groups/failed_with_gradient and
    groups/solved_with_gradient are those of them in which the trained reward has one."""
    kinds = [group_kind(args, group) for group in groups]
    metrics = {"groups/all": len(kinds)}
    for outcome in ("failed", "solved", "mixed", "broken"):
        metrics[f"groups/{outcome}"] = sum(kind.outcome == outcome for kind in kinds)
    for outcome in ("failed", "solved"):
        found = sum(kind.outcome == outcome and kind.has_gradient for kind in kinds)
        metrics[f"groups/{outcome}_with_gradient"] = found
    return metrics


def by_group(samples: Iterable[Any]) -> list[list[Any]]:
    """The samples of each prompt; one without a group is a group of its own."""
    groups = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[("alone", i) if sample.group_index is None else sample.group_index].append(sample)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# slime's logging plug-ins


def log_rollout(
    rollout_id: int, args: Any, samples: Sequence[Any], rollout_extra_metrics: dict, rollout_time: float
) -> bool:
    """Add this module's metrics to the rollout's; False: slime goes on with its own logging, which writes both.

    The groups/ counts are of all groups where process_all_samples saw them, else of those that were kept."""
    args.logged_rollout_id = rollout_id  # slime's contract test asks for this trace of the call
    groups = vars(args).pop("all_groups_metrics", None) or group_metrics(args, by_group(samples))
    metrics = {f"rollout/{key}": value for key, value in {**episode_metrics(args, samples), **groups}.items()}
    _hand_over(args, rollout_id, rollout_extra_metrics, metrics, "rollout/step")
    return False


def log_eval_rollout(rollout_id: int, args: Any, data: dict[str, dict], extra_metrics: dict | None) -> bool:
    """The same for evaluation data sets: {name: {"rewards", "truncated", "samples"}}.

    What broke is taken out of `data`, of which both hosts compute the headline next: its reward of 0 is no failure."""
    args.logged_eval_rollout_id = rollout_id
    metrics = {}
    for name, result in list(data.items()):
        found = episode_metrics(args, result.get("samples") or [])
        metrics |= {f"eval/{name}/{key}": value for key, value in found.items()}
        _leave_out_broken(args, name, data)
    _hand_over(args, rollout_id, extra_metrics, metrics, "eval/step")
    return False


def _leave_out_broken(args: Any, name: str, data: dict[str, dict]) -> None:
    """Take what holds no episode out of a data set's lists, in place; a data set without any out of `data`: the hosts
    would divide by 0, and there is no number to log."""
    result = data[name]
    samples = list(result.get("samples") or [])
    broken = [sample for sample in samples if not is_episode(sample)]
    if not broken:
        return
    reasons = Counter(_record(sample).get("end_reason", "aborted") for sample in broken)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    logger.warning("eval %s: %d of %d episodes broken and left out (%s)", name, len(broken), len(samples), told)
    kept = _whole_prompts(args, samples)
    if not any(kept):
        del data[name]
        return
    for key in ("rewards", "truncated", "samples"):
        if key in result:
            result[key][:] = [value for value, keep in zip(result[key], kept, strict=True) if keep]


def _whole_prompts(args: Any, samples: Sequence[Any]) -> list[bool]:
    """Which samples an evaluation counts: the episodes. With --log-passrate those of prompts without a broken one
    only, for the hosts cut the list into groups of one size to compute pass@k."""
    kept = [is_episode(sample) for sample in samples]
    size = getattr(args, "n_samples_per_eval_prompt", None) or 1
    if not getattr(args, "log_passrate", False) or size == 1 or len(kept) % size:
        return kept
    return [all(kept[place - place % size :][:size]) for place in range(len(kept))]


def _hand_over(args: Any, rollout_id: int, extra: dict | None, metrics: dict, step_key: str) -> None:
    """Into the dict that slime logs next; where slime gave none, they go out on their own."""
    if extra is not None:
        extra.update(metrics)
        return
    logger.info("%s %d: %s", step_key.split("/")[0], rollout_id, metrics)
    if metrics and importlib.util.find_spec("slime") and hasattr(args, "use_wandb"):
        home = "slime.observability" if importlib.util.find_spec("slime.observability") else "slime.utils"  # v0.3.1
        log = importlib.import_module(f"{home}.logging_utils").log
        step = importlib.import_module(f"{home}.metric_utils").compute_rollout_step(args, rollout_id)
        log(args, {**metrics, step_key: step}, step_key=step_key)


def episode_metrics(args: Any, samples: Iterable[Any]) -> dict[str, float]:
    """Means over the samples that hold an episode of the model's own, end reasons over all but the teacher's.

    Keys: stop/REASON (fractions that add up to 1), aborted (count), pass_rate, pass_rate/ISSUE_TYPE, partial_score,
    shaped_reward (the trained one), turns, steps, tool_errors, customer_tool_calls, customer_tool_calls/share (of the
    episodes with any), seconds/generation, seconds/customer, seconds/other; where the teacher played, taught (count)
    and taught/pass_rate.
    """
    everything = list(samples)
    taught = [sample for sample in everything if _is_taught(sample)]
    samples = [sample for sample in everything if not _is_taught(sample)]
    records = [_record(sample) for sample in samples]
    reasons = Counter(record.get("end_reason", "unknown") for record in records)
    metrics = {f"stop/{reason}": count / len(samples) for reason, count in sorted(reasons.items())}
    metrics["aborted"] = sum(not is_episode(sample) for sample in samples)
    kept = [(s, r) for s, r in zip(samples, records, strict=True) if is_episode(s) and r.get("reward") is not None]
    if taught:
        solved = [bool(_record(sample).get("solved")) for sample in taught]
        metrics |= {"taught": len(taught), "taught/pass_rate": statistics.fmean(solved)}
    return metrics | (_means(args, kept) if kept else {})


def _means(args: Any, kept: list[tuple[Any, dict]]) -> dict[str, float]:
    matching = setting(args, "partial_matching")
    by_type = defaultdict(list)
    for _, record in kept:
        by_type[record.get("issue_type", "other")].append(bool(record["solved"]))
    records = [record for _, record in kept]
    metrics = {
        "pass_rate": statistics.fmean(bool(r["solved"]) for r in records),
        "partial_score": statistics.fmean(partial_score(r["checks"], matching) for r in records),
        "shaped_reward": statistics.fmean(trained_reward(args, s) for s, _ in kept),
        "turns": statistics.fmean(r["agent_turns"] for r in records),
        "steps": statistics.fmean(r["steps"] for r in records),
        "tool_errors": statistics.fmean(r["tool_errors"] for r in records),
        "customer_tool_calls": statistics.fmean(r.get("customer_tool_calls", 0) for r in records),
        "customer_tool_calls/share": statistics.fmean(r.get("customer_tool_calls", 0) > 0 for r in records),
        "seconds/generation": statistics.fmean(r["agent_seconds"] for r in records),
        "seconds/customer": statistics.fmean(r["user_seconds"] for r in records),
        "seconds/other": statistics.fmean(max(0.0, s.non_generation_time - r["user_seconds"]) for s, r in kept),
    }
    return metrics | {f"pass_rate/{kind}": statistics.fmean(solved) for kind, solved in sorted(by_type.items())}

"""One sample = one tau2 episode, token ids in and token ids out; slime's generate plug-in:

    --custom-generate-function-path generate_with_tau.generate

Settings are attributes of slime's args, set in the YAML of --custom-config-path; each has a default, and
tau2_settings.py reads and checks them all:

    tau2_prompt: official            "short" is a 90-word prompt for small models
    tau2_domain: telecom             of rows whose metadata name none
    tau2_user: scripted              or llm (gemini/gemini-2.5-flash-lite), or a model's litellm name; recited for
                                     retail and airline, where there is no scripted one
    tau2_user_args: {}               {mood: NAME} of the scripted customer (tau2_moods.py), or the model's litellm
                                     arguments; timeout and num_retries are of one reply. No keys
    tau2_user_concurrency: 32        calls of it at a time
    tau2_max_steps: 200              messages of both sides, as tau2 counts them
    tau2_max_errors: 10
    tau2_max_turn_tokens: 1024       of one agent turn
    tau2_redraw_ids: false           new names, numbers and ids for every prompt group; 0.5: for half of them
    tau2_data: null                  tasks JSONL, for rows whose metadata hold no task
    tau2_retries: 1                  new tries of an episode that the machinery broke
    tau2_generate_timeout: 900       seconds for one /generate call
    tau2_teacher_samples: 0          of each group, that the scripted teacher plays: see tau2_demonstrations.py
    tau2_teacher_style: checks       or checklist
    tau2_partial_alpha: 0.5          tau2_partial_matching, tau2_customer_tool_penalty: see tau2_reward_shaping.py
    tau2_curriculum_tries: 8         and others: see tau2_curriculum.py

--rollout-max-response-len bounds the whole response of a sample (the agent's turns and what came between them), and
--rollout-max-context-len prompt and response together; both are checked before each call. What reaches a limit ends as
truncated, with reward 0; its partial score is logged and earns nothing.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from openai_tool_adapter import load_chat_template
from tau2_demonstrations import TaughtAgent, check_teacher, is_taught
from tau2_domains import tasks_by_id
from tau2_episode import (
    EndReason,
    Episode,
    EpisodeConfig,
    check_customer,
    customer_checked,
    episode_to_row,
    run_episode,
)
from tau2_errors import BadInput
from tau2_settings import Settings, read_settings
from token_agent import TokenAgent, TokenLimits, model_context

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# The plug-in


async def generate(args: Any, sample: Any, sampling_params: dict, evaluation: bool = False) -> Any:
    """Run the sample's task as one episode and write ids, mask, log-probs, reward and record into `sample`.

    Nothing but cancellation leaves this function: an exception would end slime's whole job. What broke is logged, and
    the sample becomes one that counts for nothing (status ABORTED or FAILED, remove_sample, masked).
    """
    try:
        return await _generate(args, sample, sampling_params, evaluation)
    except BadInput as error:
        logger.error("sample %s: %s", sample.index, error)
        return _remove(args, sample, {"bad_input": str(error), "detail": str(error)})
    except Exception as error:
        logger.exception("sample %s: the episode could not be run", sample.index)
        return _remove(args, sample, {"detail": f"{type(error).__name__}: {error}"[:500]})


async def _generate(args: Any, sample: Any, sampling_params: dict, evaluation: bool) -> Any:
    settings = read_settings(args)
    config, task = episode_config(settings, sample.metadata or {}), find_task(settings, sample)
    taught = not evaluation and is_taught(args, settings, sample)
    await customer_checked(config)
    config = replace(config, redraw_ids=redraws_ids(args, settings, sample, task))
    began = time.perf_counter()
    for _ in range(1 + settings.retries):
        agent = _make_agent(args, settings, sample, sampling_params, evaluation, taught)
        episode = await run_episode(task, agent, config, episode_seed(args, sample), lambda: _slime_is_aborting(args))
        if not episode.end_reason.is_infrastructure or episode.end_reason is EndReason.GENERATION_ABORTED:
            break
        logger.warning("sample %s: %s: %s", sample.index, episode.end_reason.value, episode.detail)
    sample.non_generation_time = max(0.0, time.perf_counter() - began - episode.agent_seconds)
    return _finish(args, sample, agent, episode, {"redraw_ids": config.redraw_ids, "taught": taught})


def check_args(args: Any) -> None:
    """What can be told before a rollout starts; a driver that checks its command calls this. Raises BadInput."""
    settings = read_settings(args)
    config = episode_config(settings, _first_metadata(args))
    config.validate()
    if settings.data:
        _tasks_by_index(settings.data)
    for path in _eval_paths(args):
        eval_trials(args, path)
    check_teacher(args, settings, config.domain)
    check_customer(config)


def _eval_paths(args: Any) -> list[str | None]:
    """The own generate functions of the evaluation data sets whose samples come here; None: that of the run."""
    of_run = getattr(args, "custom_generate_function_path", None)
    datasets = getattr(args, "eval_datasets", None) or []
    paths = [getattr(dataset, "custom_generate_function_path", None) for dataset in datasets]
    return [path for path in paths if str(path or of_run).endswith("generate_with_tau.generate")]


def _first_metadata(args: Any) -> dict:
    """The metadata of the first row of --prompt-data, which names the domain; {} where that cannot be told."""
    try:
        path = str(args.prompt_data).partition("@[")[0]
        with Path(path).open(encoding="utf-8") as file:
            return dict(json.loads(file.readline())["metadata"])
    except (AttributeError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def episode_config(settings: Settings, metadata: dict) -> EpisodeConfig:
    """The episode's settings from the plug-in's and the row's metadata."""
    return EpisodeConfig(
        domain=metadata.get("domain") or settings.domain,
        prompt=settings.prompt,
        user=settings.user,
        user_args=dict(settings.user_args),
        max_steps=settings.max_steps,
        max_errors=settings.max_errors,
        redraw_ids=settings.redraw_ids > 0,
        user_concurrency=settings.user_concurrency,
    )


def episode_seed(args: Any, sample: Any) -> int:
    """The samples of one prompt get one seed, so a group meets the same customer with the same (re-drawn) ids.

    In an evaluation there are no groups: there a trial has one seed, as in evaluate_tau2.py, so that who a prompt's
    customers are does not depend on how many trials it has."""
    number = sample.group_index
    if number is None:
        number = (sample.index or 0) % eval_trials(args, getattr(sample, "generate_function_path", None))
    return int(getattr(args, "rollout_seed", 0) or 0) + int(number)


def eval_trials(args: Any, generate_path: str | None) -> int:
    """How many samples an evaluation has of a prompt. Raises BadInput where that cannot be told.

    generate_path: the data set's own generate function, all that a sample says about its data set."""
    datasets = [
        dataset
        for dataset in getattr(args, "eval_datasets", None) or []
        if getattr(dataset, "custom_generate_function_path", None) == generate_path
    ]
    counts = sorted({dataset.n_samples_per_eval_prompt or 1 for dataset in datasets})
    if len(counts) > 1:
        raise BadInput(
            f"evaluation data sets with {' and '.join(map(str, counts))} samples of a prompt: a sample does not say "
            "which it is of, and who its customer is depends on that; give them one n_samples_per_eval_prompt"
        )
    return counts[0] if counts else getattr(args, "n_samples_per_eval_prompt", None) or 1


def redraws_ids(args: Any, settings: Settings, sample: Any, task: Any) -> bool:
    """Whether this sample's group gets new ids: drawn by the seed that the group shares. In an evaluation all tasks
    share one, so the task decides there too."""
    drawn_by = f"redraw_ids:{episode_seed(args, sample)}"
    if sample.group_index is None:
        drawn_by += f":{task.get('id') if isinstance(task, dict) else task.id}"
    return random.Random(drawn_by).random() < settings.redraw_ids


def find_task(settings: Settings, sample: Any) -> Any:
    """The row's task: in its metadata, by its task_id, or by its index in tau2_data. Raises BadInput."""
    metadata = sample.metadata or {}
    if metadata.get("task"):
        return metadata["task"]
    if metadata.get("task_id"):
        tasks = tasks_by_id(episode_config(settings, metadata).domain)
        if metadata["task_id"] not in tasks:
            raise BadInput(f"no task has the id {metadata['task_id']!r}")
        return tasks[metadata["task_id"]]
    if not settings.data:
        raise BadInput("the row's metadata hold neither task nor task_id, and tau2_data names no tasks file")
    tasks = _tasks_by_index(settings.data)
    if sample.prompt not in tasks:
        raise BadInput(f"{settings.data} has no row with index {sample.prompt!r}; use --input-key index")
    return tasks[sample.prompt]


@lru_cache(maxsize=8)
def _tasks_by_index(path: str) -> dict[int, dict]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return {row["index"]: row["metadata"]["task"] for row in rows}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: not a tasks file of tau2_mock.py ({error!r})") from error


def _make_agent(
    args: Any, settings: Settings, sample: Any, sampling_params: dict, evaluation: bool, taught: bool
) -> TokenAgent:
    folder = getattr(args, "hf_checkpoint", None)
    if not folder:
        raise BadInput("--hf-checkpoint is not set: the tokenizer is read from there")
    template_kwargs = getattr(args, "apply_chat_template_kwargs", None) or {}
    make = partial(TaughtAgent, style=settings.teacher_style) if taught else TokenAgent
    return make(
        load_chat_template(str(folder), json.dumps(template_kwargs, sort_keys=True)),
        f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate",
        sampling_params,
        token_limits(args, settings, sampling_params, evaluation),
        session_id=sample.session_id,
        timeout=settings.generate_timeout,
        payload={"return_routed_experts": True} if getattr(args, "use_rollout_routing_replay", False) else None,
        should_stop=lambda: _slime_is_aborting(args),
    )


def token_limits(args: Any, settings: Settings, sampling_params: dict, evaluation: bool) -> TokenLimits:
    """The limits that slime's flags set; without a context flag, the context is the model's own."""
    context = getattr(args, "eval_max_context_len", None) if evaluation else None
    context = context or getattr(args, "rollout_max_context_len", None) or model_context(str(args.hf_checkpoint))
    response = sampling_params.get("max_new_tokens") or getattr(args, "rollout_max_response_len", None)
    return TokenLimits(settings.max_turn_tokens, response, context)


def _slime_is_aborting(args: Any) -> bool:
    """Whether slime has begun to end this rollout. slime is looked at only where it already runs."""
    module = sys.modules.get("slime.rollout.sglang_rollout")
    if module is None:
        return False
    try:
        return bool(module.GenerateState(args).aborted)
    except Exception:  # slime is imported but not the host, so it has no state (and cannot make one from these args)
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Into the sample


def _finish(args: Any, sample: Any, agent: TokenAgent, episode: Episode, how: dict) -> Any:
    """how: what the record says of it besides: with redrawn ids or not, by the teacher or not."""
    record = {**_record(agent, episode), **how}
    if episode.end_reason.is_infrastructure:
        return _remove(args, sample, record)
    _clear(sample)
    sample.tokens = list(agent.prompt_ids)
    _append_turns(args, sample, agent)
    sample.response = agent.template.tokenizer.decode(agent.response_ids, skip_special_tokens=False)
    sample.reward = float(episode.reward)
    status = type(sample).Status
    sample.status = status.TRUNCATED if episode.end_reason.is_truncated else status.COMPLETED
    sample.metadata = {**(sample.metadata or {}), "tau2": record}
    return sample


def _append_turns(args: Any, sample: Any, agent: TokenAgent) -> None:
    """Through the sample's own method, which also keeps weight versions, cache counts and replay data."""
    if not hasattr(sample, "append_response_tokens"):  # slime before that method
        sample.tokens += agent.response_ids
        sample.response_length = len(agent.response_ids)
        sample.loss_mask, sample.rollout_log_probs = agent.loss_mask, agent.log_probs
        return
    for turn in agent.turns:
        if turn.before:
            sample.append_response_tokens(args, tokens=turn.before, trainable=False)
        sample.append_response_tokens(
            args, tokens=turn.sampled, log_probs=turn.log_probs, trainable=True, meta_info=turn.meta_info
        )


def _record(agent: TokenAgent, episode: Episode) -> dict:
    """What the reward plug-in, the log and trace generation read. The system message is known by its profile."""
    return {
        **episode_to_row(episode),
        "messages": episode.messages[1:],
        "tokens": agent.usage(),
        "turn_tokens": [len(turn.sampled) for turn in agent.turns],
        "asides": agent.asides,
    }


def _clear(sample: Any) -> None:
    sample.tokens, sample.response, sample.response_length = [], "", 0
    sample.loss_mask, sample.rollout_log_probs, sample.weight_versions = [], [], []
    sample.remove_sample = False
    for name in ("rollout_routed_experts", "rollout_top_p_token_ids", "rollout_top_p_token_offsets"):
        if hasattr(sample, name):
            setattr(sample, name, None)


def _remove(args: Any, sample: Any, record: dict) -> Any:
    """slime's form of a sample without an episode: one masked token, no weight in the loss, no reward."""
    _clear(sample)
    sample.tokens, sample.response_length = [0, 0], 1
    sample.loss_mask, sample.rollout_log_probs = [0], [0.0]
    _fill_replayed(args, sample)
    sample.reward = 0.0
    sample.remove_sample = True
    record.setdefault("end_reason", EndReason.ENVIRONMENT_FAILED.value)
    # What was stopped may be run again (slime's fully asynchronous rollout does); what failed would fail for ever.
    stopped = record["end_reason"] == EndReason.GENERATION_ABORTED.value
    sample.status = type(sample).Status.ABORTED if stopped else type(sample).Status.FAILED
    sample.metadata = {**(sample.metadata or {}), "tau2": {**record, "reward": None, "solved": False}}
    return sample


def _fill_replayed(args: Any, sample: Any) -> None:
    """What slime replays in training it asks of every sample of a batch, or the whole batch fails: the experts of each
    token before the last, and a nucleus for each response token. Of a masked token it may be any: not expert 0
    throughout, which slime takes for a capture that failed."""
    if getattr(args, "use_rollout_routing_replay", False):
        import torch  # both hosts have it; nothing else here needs it

        experts = torch.arange(args.moe_router_topk, dtype=torch.int32)
        sample.rollout_routed_experts = experts.repeat(1, args.num_layers, 1)
    if getattr(args, "rollout_top_p", 1.0) != 1.0 and hasattr(sample, "rollout_top_p_token_ids"):
        sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets = [0], [0, 1]

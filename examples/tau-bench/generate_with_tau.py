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
    tau2_partial_alpha: 0.5          tau2_partial_matching, tau2_customer_tool_penalty: see tau2_reward_shaping.py
    tau2_curriculum_tries: 8         and others: see tau2_curriculum.py

--rollout-max-response-len bounds the whole response of a sample (the agent's turns and what came between them), and
--rollout-max-context-len prompt and response together; both are checked before each call. What reaches a limit ends as
truncated, with reward 0; its partial score is logged and earns nothing.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from http_client import RequestFailed, close_session, post_json  # noqa: F401 (for who imports this)
from openai_tool_adapter import ChatTemplate, load_chat_template, parse_turn
from tau2_domains import tasks_by_id
from tau2_episode import (
    AgentTurn,
    EndEpisode,
    EndReason,
    Episode,
    EpisodeConfig,
    check_customer,
    customer_checked,
    episode_to_row,
    run_episode,
)
from tau2_errors import BadInput
from tau2_settings import DEFAULTS, Settings, read_settings

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FIRST_WAIT = 0.5  # seconds, doubled after each failed attempt
TURN_TOKENS = DEFAULTS.max_turn_tokens
GENERATE_TIMEOUT = DEFAULTS.generate_timeout
LARGEST_LOG_PROB = 1e-3  # rounding of 0
ROUTING_HEADER = "X-SMG-Routing-Key"


# ---------------------------------------------------------------------------------------------------------------------
# The client of /generate


class GenerationError(Exception):
    """The server could not answer; the message says what it said."""


async def post_generate(
    url: str, payload: dict, headers: dict | None = None, timeout: float = GENERATE_TIMEOUT
) -> dict:
    """POST to /generate. Raises GenerationError.

    What another attempt can mend is tried three times in all; any other error status is final (slime's own client
    repeats a 400 sixty times).
    """
    try:
        return await post_json(url, payload, headers, timeout, attempts=ATTEMPTS, first_wait=FIRST_WAIT)
    except RequestFailed as error:
        raise GenerationError(str(error)) from error


def sampling_seed(seed: int, task_id: str, trial: int) -> int:
    """Of an episode's first turn; the turns after it count on, because one seed would repeat its random numbers."""
    return zlib.crc32(f"{seed}:{trial}:{task_id}".encode()) & 0x3FFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# The agent


@dataclass
class TurnTokens:
    """One agent turn: the template's ids before it (mask 0; empty in the first turn, which follows the prompt), the
    sampled ids (mask 1), their log-probs, and the server's meta_info without the log-probs."""

    before: list[int]
    sampled: list[int]
    log_probs: list[float]
    meta_info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TokenLimits:
    """In tokens: of one turn, of all that follows the prompt, and of prompt and response together; None: no limit."""

    turn: int = TURN_TOKENS
    response: int | None = None
    context: int | None = None


class TokenAgent:
    """A policy behind an SGLang `/generate` address; keeps the exact ids of the episode.

    The prompt is rendered once. From then on ids are only appended: those sampled, as they came, and those of the new
    messages alone. `sampling_params` is copied. `should_stop` is asked before each call. Where `weight_version` is
    given, an answer of other weights ends the episode as generation_failed.
    """

    def __init__(
        self,
        template: ChatTemplate,
        url: str,
        sampling_params: dict,
        limits: TokenLimits = TokenLimits(),
        *,
        session_id: str | None = None,
        timeout: float = GENERATE_TIMEOUT,
        payload: dict | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        weight_version: str | None = None,
    ):
        self.template, self.url, self.limits, self.timeout = template, url, limits, timeout
        self.sampling_params = dict(sampling_params)
        stops = self.sampling_params.get("stop_token_ids") or []
        self.sampling_params["stop_token_ids"] = sorted({*stops, template.end_id})
        self.headers = {ROUTING_HEADER: session_id or str(uuid.uuid4())}
        self.payload, self.should_stop = dict(payload or {}), should_stop
        self.weight_version = weight_version
        self.vocab = model_vocab(template.tokenizer.name_or_path) or len(template.tokenizer)
        self.prompt_ids: list[int] = []
        self.turns: list[TurnTokens] = []
        self.asides = 0
        self._messages: list[dict] = []
        self._tools: list[dict] = []

    # -- the episode's side (the Agent protocol)

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        self._messages, self._tools = list(messages), list(tools)

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        if self.should_stop():
            raise EndEpisode(EndReason.GENERATION_ABORTED, "stopped between turns")
        before = self._render(new_messages)
        room = self._room(len(before))
        turn = await self._sample(before, room)
        self.turns.append(turn)
        self._check_finished(turn, room)
        parsed = parse_turn(self.template.decode(turn.sampled), self._tools, self.template.control_tokens)
        self.asides += bool(parsed.aside)
        return parsed.turn

    # -- what was said, in tokens

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response so far: exactly what the next call sends before the new messages."""
        return self.prompt_ids + self.response_ids

    @property
    def response_ids(self) -> list[int]:
        return [token for turn in self.turns for token in (*turn.before, *turn.sampled)]

    @property
    def loss_mask(self) -> list[int]:
        """1 on sampled ids, 0 on the template's; as long as response_ids."""
        return [flag for turn in self.turns for flag in (*[0] * len(turn.before), *[1] * len(turn.sampled))]

    @property
    def log_probs(self) -> list[float]:
        """Of the sampled ids, 0.0 on the template's; as long as response_ids."""
        return [value for turn in self.turns for value in (*[0.0] * len(turn.before), *turn.log_probs)]

    def no_room(self) -> str | None:
        """Of an episode that has ended: what was wrong when the prompt left no room for a single turn."""
        if self.turns or not self.prompt_ids:
            return None
        return f"the prompt has {len(self.prompt_ids)} tokens, no room for a turn within {self.limits}"

    def usage(self) -> dict[str, int]:
        """Tokens over all calls: read (`prompt`), of those found in the engine's cache, and generated."""
        keys = {"prompt": "prompt_tokens", "cached": "cached_tokens", "generated": "completion_tokens"}
        return {name: sum(int(turn.meta_info.get(key) or 0) for turn in self.turns) for name, key in keys.items()}

    # -- one call

    def _render(self, new_messages: Sequence[dict]) -> list[int]:
        """Ids to put before the next turn; the first time that is the prompt, kept apart."""
        if not self.prompt_ids:
            self.prompt_ids = self.template.prompt([*self._messages, *new_messages], self._tools)
            return []
        ids = self.template.following(new_messages)
        # A turn that another stop token ended is closed for the template, untrained.
        return ids if self.turns[-1].sampled[-1] == self.template.end_id else [self.template.end_id, *ids]

    def _room(self, new: int) -> int:
        """How many tokens the next turn may have. Ends the episode when there is no room for one."""
        response = sum(len(turn.before) + len(turn.sampled) for turn in self.turns) + new
        left = [self.limits.turn]
        if self.limits.response is not None:
            left.append(self.limits.response - response)
        if self.limits.context is not None:
            left.append(self.limits.context - len(self.prompt_ids) - response)
        if min(left) < 1:
            raise EndEpisode(EndReason.CONTEXT_FULL, f"{len(self.prompt_ids)} prompt and {response} response tokens")
        return min(left)

    async def _sample(self, before: list[int], room: int) -> TurnTokens:
        params = {**self.sampling_params, "max_new_tokens": room}
        if params.get("min_new_tokens"):
            params["min_new_tokens"] = min(params["min_new_tokens"], room)  # more than the most is an error to SGLang
        if params.get("sampling_seed") is not None:
            params["sampling_seed"] += len(self.turns)  # one seed would repeat its random numbers in every turn
        payload = {
            "input_ids": self.token_ids + before,
            "sampling_params": params,
            "return_logprob": True,
            **self.payload,
        }
        try:
            answer = await post_generate(self.url, payload, self.headers, self.timeout)
            sampled, log_probs, meta_info = _read_answer(answer, self.vocab)
            self._check_answer(sampled, meta_info, room)
        except GenerationError as error:
            raise EndEpisode(EndReason.GENERATION_FAILED, str(error)) from error
        return TurnTokens(before, sampled, log_probs, meta_info)

    def _check_answer(self, sampled: list[int], meta_info: dict, room: int) -> None:
        if len(sampled) > room:
            raise GenerationError(f"the server gave {len(sampled)} tokens where {room} were asked for")
        version = meta_info.get("weight_version")
        if self.weight_version is not None and version is not None and str(version) != str(self.weight_version):
            raise GenerationError(f"the server has other weights now (version {version}, not {self.weight_version})")

    def _check_finished(self, turn: TurnTokens, room: int) -> None:
        """Ends the episode when the model was aborted or did not close its turn."""
        finish = turn.meta_info["finish_reason"]["type"]
        if finish == "abort":
            raise EndEpisode(EndReason.GENERATION_ABORTED, "aborted by the server")
        if not turn.sampled:
            raise EndEpisode(EndReason.GENERATION_FAILED, "the server sampled no token")
        if finish == "length" and turn.sampled[-1] != self.template.end_id:
            reason = EndReason.RESPONSE_CUT if room == self.limits.turn else EndReason.CONTEXT_FULL
            raise EndEpisode(reason, f"the turn did not end within {len(turn.sampled)} tokens")


def _read_answer(answer: dict, vocab: int) -> tuple[list[int], list[float], dict]:
    """Sampled ids (below `vocab`) and their log-probs from meta_info.output_token_logprobs, the one place that pairs
    them, and the rest of meta_info. Raises GenerationError for any other answer: it must not be trained on."""
    try:
        meta_info = dict(answer["meta_info"])
        pairs = meta_info.pop("output_token_logprobs", None) or []
        log_probs, ids = [float(pair[0]) for pair in pairs], [pair[1] for pair in pairs]
        finish, counted = meta_info["finish_reason"]["type"], meta_info.get("completion_tokens")
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
            int(meta_info.get(name) or 0)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise GenerationError(f"the answer of /generate has an unknown form ({str(error)[:100]!r})") from error
    if not isinstance(finish, str):
        raise GenerationError("the answer of /generate has a finish reason that is no text")
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise GenerationError(f"the server gave a token id that is not one of the model's {vocab}")
    if not all(math.isfinite(value) and value <= LARGEST_LOG_PROB for value in log_probs):
        raise GenerationError("the server gave a log-prob that is not finite, or above 0")
    if type(counted) is int and counted != len(ids):
        raise GenerationError(f"the server counted {counted} tokens and gave {len(ids)} log-probs")
    return ids, log_probs, meta_info


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
    await customer_checked(config)
    config = replace(config, redraw_ids=redraws_ids(args, settings, sample, task))
    began = time.perf_counter()
    for _ in range(1 + settings.retries):
        agent = _make_agent(args, settings, sample, sampling_params, evaluation)
        episode = await run_episode(task, agent, config, episode_seed(args, sample), lambda: _slime_is_aborting(args))
        _judge_silent(agent, episode)
        if not episode.end_reason.is_infrastructure or episode.end_reason is EndReason.GENERATION_ABORTED:
            break
        logger.warning("sample %s: %s: %s", sample.index, episode.end_reason.value, episode.detail)
    sample.non_generation_time = max(0.0, time.perf_counter() - began - episode.agent_seconds)
    return _finish(args, sample, agent, episode, config.redraw_ids)


def check_args(args: Any) -> None:
    """What can be told before a rollout starts; a driver that checks its command calls this. Raises BadInput."""
    settings = read_settings(args)
    config = episode_config(settings, _first_metadata(args))
    config.validate()
    if settings.data:
        _tasks_by_index(settings.data)
    for path in _eval_paths(args):
        eval_trials(args, path)
    check_customer(config)


def _eval_paths(args: Any) -> list[str | None]:
    """The own generate functions of the evaluation data sets whose samples come here; None: that of the run."""
    of_run = getattr(args, "custom_generate_function_path", None)
    datasets = getattr(args, "eval_datasets", None) or []
    paths = [getattr(dataset, "custom_generate_function_path", None) for dataset in datasets]
    return [path for path in paths if str(path or of_run).endswith("generate_with_tau.generate")]


def _judge_silent(agent: TokenAgent, episode: Episode) -> None:
    """A customer that ends the dialogue before the agent's first turn has failed: nothing was asked of the agent."""
    if not agent.turns and not (episode.end_reason.is_infrastructure or episode.end_reason.is_truncated):
        episode.end_reason = EndReason.USER_FAILED
        episode.detail = "the customer ended the dialogue before the agent's first turn"


def _first_metadata(args: Any) -> dict:
    """Of the first row of --prompt-data, which names the domain; {} where that cannot be told."""
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


def _make_agent(args: Any, settings: Settings, sample: Any, sampling_params: dict, evaluation: bool) -> TokenAgent:
    folder = getattr(args, "hf_checkpoint", None)
    if not folder:
        raise BadInput("--hf-checkpoint is not set: the tokenizer is read from there")
    template_kwargs = getattr(args, "apply_chat_template_kwargs", None) or {}
    return TokenAgent(
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


@lru_cache(maxsize=8)
def model_context(folder: str) -> int | None:
    """max_position_embeddings of an HF folder's config.json; None where there is none."""
    return _from_config(folder, "max_position_embeddings")


@lru_cache(maxsize=8)
def model_vocab(folder: str) -> int | None:
    """vocab_size of an HF folder's config.json, often more than its tokenizer has; None where there is none."""
    return _from_config(folder, "vocab_size")


def _from_config(folder: str, name: str) -> int | None:
    try:
        value = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return value if type(value) is int and value > 0 else None


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


def _finish(args: Any, sample: Any, agent: TokenAgent, episode: Episode, redrawn: bool) -> Any:
    record = {**_record(agent, episode), "redraw_ids": redrawn}
    if episode.end_reason.is_infrastructure:
        return _remove(args, sample, record)
    if not agent.turns:
        problem = agent.no_room() or f"{episode.end_reason.value} before the agent's first turn: raise tau2_max_steps"
        logger.error("sample %s: %s", sample.index, problem)
        return _remove(args, sample, {**record, "bad_input": problem})
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

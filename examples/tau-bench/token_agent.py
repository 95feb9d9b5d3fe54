"""A policy behind SGLang's /generate, ids in and ids out: the agent of rollouts and of a checkpoint's evaluation.

Here trained tokens are the sampled ones: the prompt is rendered once, sampled ids are appended as they came, and of
new messages only the template's own text is tokenised, with mask 0.

A library: used by generate_with_tau.py and evaluate_tau2.py.
"""

from __future__ import annotations

import json
import math
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from http_client import RequestFailed, post_json
from openai_tool_adapter import ChatTemplate, parse_turn
from tau2_episode import AgentTurn, EndEpisode, EndReason, NoRoom
from tau2_settings import DEFAULTS

ATTEMPTS = 3
FIRST_WAIT = 0.5  # seconds, doubled after each failed attempt
TURN_TOKENS = DEFAULTS.max_turn_tokens
GENERATE_TIMEOUT = DEFAULTS.generate_timeout
LARGEST_LOG_PROB = 1e-3  # rounding of 0
ROUTING_HEADER = "X-SMG-Routing-Key"


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
    """The seed of an episode's first turn; later turns count on, because one seed would repeat its random numbers."""
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
        """The log-probs of the sampled ids, 0.0 on the template's; as long as response_ids."""
        return [value for turn in self.turns for value in (*[0.0] * len(turn.before), *turn.log_probs)]

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
            raise NoRoom(f"{len(self.prompt_ids)} prompt and {response} response tokens within {self.limits}")
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
# What the model's folder says


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

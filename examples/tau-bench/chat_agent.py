"""An agent behind any OpenAI-compatible chat-completions endpoint with tools: vLLM, SGLang, llama.cpp, OpenAI, ...

    python examples/tau-bench/evaluate_tau2.py --agent chat --agent-llm NAME \\
        --agent-base-url http://127.0.0.1:8000/v1 --output-path chat.json

The key is read from the environment (OPENAI_API_KEY, or what --agent-key-env names); a server of one's own may need
none. --agent-llm-args holds further fields of the request, such as {"top_p": 0.9}; null leaves one of ours out
({"max_tokens": null, "max_completion_tokens": 2048}). Two of them are not sent: `timeout` (seconds of one call, 300)
and `num_retries` (4); a run may go on with others. The endpoint is asked once, with a tool, before any episode.

The endpoint renders and tokenises, so ids and log-probs are unknown: for rollouts there is TokenAgent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from http_client import RequestFailed, UnusableAnswer, close_session, post_json
from openai_tool_adapter import ParsedTurn, parse_turn, read_call
from tau2_episode import AgentToolCall, AgentTurn, EndEpisode, EndReason, NoRoom
from tau2_errors import BadInput
from tau2_llm_customer import PREFLIGHT_RETRIES, mask, recorded_args, wrong_arguments
from token_agent import sampling_seed

CHAT = "chat"
KEY_VARIABLE = "OPENAI_API_KEY"
DEFAULTS = {"timeout": 300, "num_retries": 4}
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")  # of one answer; where both are sent, the first counts
OURS = ("model", "messages", "tools", "stream", "n", "api_base", "base_url")
FINISHED = (None, "stop", "tool_calls", "function_call", "eos", "end_turn", "length", "content_filter", "abort")
PREFLIGHT_TOKENS, PREFLIGHT_SECONDS = 256, 60
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what providers accept in a dialogue

# How endpoints say that the dialogue is too long, with status 400, 413 or 422; they share no code.
_CONTEXT_FULL = re.compile(
    r"context[_ -]?(length|window|size)|(prompt|input) is too long|too many (input )?tokens|maximum number of tokens",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------------------------------
# The endpoint


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked and with what. `params` are fields of every request; the key is looked up for each call,
    so that no object holds it."""

    base_url: str
    model: str
    params: dict[str, Any]
    key_variable: str = KEY_VARIABLE
    timeout: float = DEFAULTS["timeout"]
    num_retries: int = DEFAULTS["num_retries"]

    async def complete(self, messages: list[dict], tools: list[dict], **fields: Any) -> dict:
        """{"message", "finish_reason", "usage"} of one completion; `fields` replace params. Raises RequestFailed."""
        ours = {"model": self.model, "messages": messages, **({"tools": tools} if tools else {})}
        body = {**ours, **self.params, **fields}
        return await post_json(
            f"{self.base_url}/chat/completions",
            {name: value for name, value in body.items() if value is not None},
            {"Authorization": f"Bearer {key}"} if (key := self.key()) else None,
            self.timeout,
            attempts=1 + self.num_retries,
            read=_read_completion,
        )

    def sent(self) -> dict[str, Any]:
        """What every request holds besides the dialogue: null leaves a field out."""
        return {name: value for name, value in self.params.items() if value is not None}

    def token_limit(self) -> int | None:
        """The most tokens of one answer; None where the endpoint decides."""
        return next((self.params[name] for name in TOKEN_LIMITS if self.params.get(name) is not None), None)

    def key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()


def _read_completion(answer: Any) -> dict:
    """The one choice of a completion, in the form that the rest relies on. Raises UnusableAnswer."""
    try:
        choice = answer["choices"][0]
        _refuse_error(choice)
        message = json.loads(_whole_characters(json.dumps(dict(choice["message"]), ensure_ascii=False)))
        calls = message.get("tool_calls") or _legacy_calls(message)
        message["tool_calls"] = [dict(call) for call in calls]
        return {
            "message": message,
            "finish_reason": choice.get("finish_reason"),
            "usage": dict(answer.get("usage") or {}),
        }
    except UnusableAnswer:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UnusableAnswer(f"the answer is no chat completion: {json.dumps(answer)[:1000]}") from None


def _legacy_calls(message: dict) -> list[dict]:
    """The call of a server that still answers with `function_call`, as a list of calls."""
    call = message.get("function_call")
    return [{"type": "function", "function": call}] if call else []


def _refuse_error(choice: dict) -> None:
    """Raises UnusableAnswer for an error within an answer of status 200, which is no turn of the model: OpenRouter's
    `error`, DeepSeek's insufficient_system_resource, and what else is no way in which a turn ends."""
    if choice.get("error"):
        raise UnusableAnswer(f"the answer holds an error: {json.dumps(choice['error'])[:1000]}")
    if choice.get("finish_reason") not in FINISHED:
        raise UnusableAnswer(f"the answer ended with {str(choice['finish_reason'])[:100]!r}")


def _whole_characters(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and a file cannot."""
    return text.encode(errors="replace").decode()


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class ChatAgent:
    """A policy behind an endpoint. `seed` is of the episode's first turn; None for greedy decoding."""

    def __init__(self, endpoint: Endpoint, seed: int | None = None):
        self.endpoint, self.seed = endpoint, seed
        self.asides = 0
        self.turns = 0
        self._usage: Counter = Counter()
        self._messages: list[dict] = []
        self._tools: list[dict] = []

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        self._messages, self._tools = list(messages), list(tools)

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        self._messages += self._with_own_ids(new_messages)
        answer = await self._ask()
        _check_finished(answer, self.endpoint)
        parsed = read_message(answer["message"], self._tools)
        self.turns += 1
        self.asides += bool(parsed.aside)
        self._messages += _as_history(answer["message"], parsed, self.turns)
        return parsed.turn

    def usage(self) -> dict[str, int]:
        """Tokens over all calls, as the endpoint counts them: read (`prompt`), of those cached, and generated."""
        return {name: self._usage[name] for name in ("prompt", "cached", "generated")}

    def _with_own_ids(self, new_messages: list[dict]) -> list[dict]:
        """Tool results, which come in the calls' order, under the ids that the endpoint gave its calls. What an empty
        turn is answered belongs to no call: a user's message is the form that every server takes."""
        if new_messages[0]["role"] != "tool":
            return new_messages
        calls = self._messages[-1].get("tool_calls")
        if not calls:
            return [{"role": "user", "content": message["content"]} for message in new_messages]
        return [
            {"role": "tool", "tool_call_id": call["id"], "content": message["content"]}
            for call, message in zip(calls, new_messages, strict=True)
        ]

    async def _ask(self) -> dict:
        fields = {} if self.seed is None else {"seed": self.seed + self.turns}
        try:
            answer = await self.endpoint.complete(self._messages, self._tools, **fields)
        except RequestFailed as error:
            end = _why_failed(error)
        else:
            self._usage.update(_count_tokens(answer["usage"]))
            return answer
        raise end


def _why_failed(error: RequestFailed) -> EndEpisode:
    if error.status in (400, 413, 422) and _CONTEXT_FULL.search(str(error)):
        return NoRoom(str(error))
    return EndEpisode(EndReason.GENERATION_FAILED, str(error))


def _count_tokens(usage: dict) -> dict[str, int]:
    details = usage.get("prompt_tokens_details") or {}
    counts = {
        "prompt": usage.get("prompt_tokens"),
        "cached": details.get("cached_tokens") if isinstance(details, dict) else 0,
        "generated": usage.get("completion_tokens"),
    }
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def _check_finished(answer: dict, endpoint: Endpoint) -> None:
    """Ends the episode when the model did not close its turn."""
    finish = answer["finish_reason"]
    if finish == "abort":
        raise EndEpisode(EndReason.GENERATION_ABORTED, "aborted by the server")
    if finish == "content_filter":
        raise EndEpisode(EndReason.RESPONSE_CUT, "the endpoint's content filter cut the turn")
    if finish == "length":
        generated = _count_tokens(answer["usage"]).get("generated")
        limit = endpoint.token_limit()
        if generated == 0:
            raise NoRoom("the endpoint generated nothing, for the dialogue fills its context")
        is_full = generated is not None and limit is not None and generated < limit
        reason = EndReason.CONTEXT_FULL if is_full else EndReason.RESPONSE_CUT
        raise EndEpisode(reason, f"the turn did not end within {'its' if generated is None else generated} tokens")


def read_message(message: dict, tools: list[dict]) -> ParsedTurn:
    """An assistant message as a turn, judged as `parse_turn` judges a text. A call that the server could not parse and
    left in the text is a call too."""
    parsed = parse_turn(_text(message), tools)
    thought = _thought(message)
    if not message["tool_calls"]:
        return replace(parsed, aside=parsed.aside or thought)
    calls = [_read_call(call, tools) for call in message["tool_calls"]]
    beside = parsed.turn.content or parsed.beside
    return ParsedTurn(AgentTurn(tool_calls=calls), beside or parsed.aside or thought, beside)


def _thought(message: dict) -> str:
    """What servers that keep thoughts out of the text write beside it."""
    found = [message.get(name) for name in ("reasoning_content", "reasoning")]
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def _text(message: dict) -> str:
    """The message's text, also of one in parts; a refusal is what the model says."""
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _read_call(call: dict, tools: list[dict]) -> AgentToolCall:
    function = call.get("function")
    if not isinstance(function, dict):
        return read_call(function, tools, json.dumps(call))
    arguments = function.get("arguments")
    # Some servers write nothing, or null, for a call without arguments.
    arguments = {} if arguments in (None, "", "null") else arguments
    return read_call({"name": function.get("name"), "arguments": arguments}, tools, json.dumps(function))


def _as_history(message: dict, parsed: ParsedTurn, number: int) -> list[dict]:
    """The message as it is sent back; none where it was empty. The model's own words, but calls in a form that every
    server reads again: ids that are there and differ, names of ordinary characters, arguments that are an object."""
    turn, text = parsed.turn, _text(message)
    if parsed.is_empty or not turn.tool_calls:
        return [{"role": "assistant", "content": text}] if text.strip() else []
    said = message["tool_calls"] or [{}] * len(turn.tool_calls)
    ids = [call.get("id") for call in said]
    if len(set(map(str, ids))) < len(ids) or not all(isinstance(id_, str) and id_ for id_ in ids):
        ids = [f"call{number:03d}{i:02d}" for i in range(len(ids))]
    calls = [
        {"id": id_, "type": "function", "function": _function(call.get("function"), read)}
        for id_, call, read in zip(ids, said, turn.tool_calls, strict=True)
    ]
    return [{"role": "assistant", "content": parsed.beside or None, "tool_calls": calls}]


def _function(said: Any, read: AgentToolCall) -> dict[str, str]:
    said = said if isinstance(said, dict) else {}
    name, arguments = said.get("name"), said.get("arguments")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        name = read.asked_for if TOOL_NAME.fullmatch(read.asked_for or "") else read.name
    return {"name": name, "arguments": arguments if _is_object(arguments) else json.dumps(read.arguments)}


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# For the evaluator


@dataclass(frozen=True)
class ModelFlags:
    """The values of --WHO-llm, --WHO-base-url, --WHO-llm-args and --WHO-key-env."""

    llm: str | None
    base_url: str | None
    llm_args: dict[str, Any]
    key_env: str


def model_flags(args: argparse.Namespace, who: str) -> ModelFlags:
    """The flags that begin with --`who`."""
    return ModelFlags(**{name: getattr(args, f"{who}_{name}") for name in ModelFlags.__dataclass_fields__})


def json_object(text: str) -> dict:
    """The object that a flag's text holds. Raises ArgumentTypeError, which does not repeat the text: it may hold a
    key."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def add_flags(parser: argparse.ArgumentParser, who: str = "agent") -> None:
    """Adds the flags of ModelFlags."""

    def add(name: str, **options: Any) -> None:
        parser.add_argument(f"--{who}-{name}", **options)

    add("llm", metavar="NAME", help=f"the {who}: the name of a model at a chat-completions endpoint")
    add("base-url", metavar="URL", help="its endpoint, such as http://127.0.0.1:8000/v1")
    add(
        "llm-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="further fields of its requests; timeout and num_retries are of one call",
    )
    add("key-env", default=KEY_VARIABLE, metavar="NAME", help="the environment variable that holds its key")


def identity(args: argparse.Namespace, who: str = "agent") -> dict[str, Any]:
    """What tells one such model from another, for the settings of rows."""
    flags = model_flags(args, who)
    return {"name": flags.llm, "base_url": _base_url(flags.base_url), "args": recorded_args(flags.llm_args)}


def make_chat_agents(
    args: argparse.Namespace, who: str = "agent"
) -> tuple[Callable[[str, int], ChatAgent], Callable[[], None]]:
    """(make_agent(task_id, trial), preflight()). Both raise BadInput for flags or an endpoint that cannot be used."""
    endpoint = make_endpoint(args, who)
    # An endpoint that is told no temperature samples with one of its own.
    is_seeded = endpoint.params["temperature"] != 0 and "seed" not in endpoint.params

    def make(task_id: str, trial: int) -> ChatAgent:
        return ChatAgent(endpoint, sampling_seed(args.seed, task_id, trial) if is_seeded else None)

    return make, lambda: asyncio.run(check_endpoint(endpoint))


def make_endpoint(args: argparse.Namespace, who: str = "agent") -> Endpoint:
    """The endpoint that the flags name, which begin with --`who`. Raises BadInput."""
    flags = model_flags(args, who)
    for name in ("llm", "base_url"):
        if not getattr(flags, name):
            needs = f"--agent {CHAT}" if who == "agent" else f"--{who}-llm"
            raise BadInput(f"{needs} needs --{who}-{name.replace('_', '-')}")
    if args.max_context_len is not None:
        raise BadInput(f"--max-context-len is the endpoint's own with --agent {CHAT}: leave it out")
    settings = {**DEFAULTS, **flags.llm_args}
    whose = f"--{who}-llm-args: the {who}'s"
    if problem := wrong_arguments(whose, settings, OURS, flags.key_env) or _wrong_sampling(whose, settings):
        raise BadInput(problem)
    if settings.get("seed") is not None:
        raise BadInput(f"--{who}-llm-args: seeds come from --seed, one for each turn; null sends none")
    _check_key(flags.key_env, f"--{who}-key-env")
    timeout, num_retries = settings.pop("timeout"), settings.pop("num_retries")
    params = {"temperature": args.temperature, "max_tokens": args.max_turn_tokens, **settings}
    return Endpoint(
        _base_url(flags.base_url, f"--{who}-base-url"),
        flags.llm,
        params,
        flags.key_env,
        timeout,
        num_retries,
    )


def _wrong_sampling(whose: str, settings: dict[str, Any]) -> str:
    """What is wrong with what a result records of the sampling; "" when nothing is."""
    temperature = settings.get("temperature")
    if temperature is not None and not (type(temperature) in (int, float) and 0 <= temperature < math.inf):
        return f"{whose} argument temperature must be a number, 0 or more, or null to leave it out"
    for name in TOKEN_LIMITS:
        if settings.get(name) is not None and type(settings[name]) is not int:
            return f"{whose} argument {name} must be a whole number, or null to leave it out"
    return ""


def _base_url(url: str, flag: str = "--agent-base-url") -> str:
    """The address without a slash at its end. Raises BadInput, which repeats nothing that could be a key."""
    address = urlsplit(url)
    if address.username or address.password or address.query or mask(url) != url:
        raise BadInput(f"{flag} holds a user, a query or a key: keys are read from the environment only")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise BadInput(f"{flag} {url}: give an address such as http://127.0.0.1:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


def _check_key(variable: str, flag: str) -> None:
    if mask(variable) != variable or not re.fullmatch(r"\w+", variable):
        raise BadInput(f"{flag} takes the name of an environment variable, not a key")
    key = os.environ.get(variable, "").strip()
    if variable != KEY_VARIABLE and not key:
        raise BadInput(f"{flag} {variable}: this variable is not set")
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"the key in {variable} holds characters that no key has")


_PROBE = {
    "type": "function",
    "function": {
        "name": "check_status_bar",
        "description": "Looks at the phone's status bar.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


async def check_endpoint(endpoint: Endpoint) -> None:
    """One completion with a tool. Raises BadInput when it fails or when the endpoint ignores tools."""
    ask = [{"role": "user", "content": "Call the tool check_status_bar now, without any text."}]
    brief = replace(
        endpoint,
        params=_at_most(endpoint.params, PREFLIGHT_TOKENS),
        timeout=min(endpoint.timeout, PREFLIGHT_SECONDS),
        num_retries=min(endpoint.num_retries, PREFLIGHT_RETRIES),
    )
    try:
        answer = await brief.complete(ask, [_PROBE])
        if not read_message(answer["message"], [_PROBE]).turn.tool_calls:
            _check_reads_tools(answer, await brief.complete(ask, []), endpoint)
    except RequestFailed as error:
        problem = _explain(error, endpoint)
    else:
        return
    finally:
        await close_session()
    raise BadInput(problem)


def _at_most(params: dict, tokens: int) -> dict:
    limits = [name for name in TOKEN_LIMITS if params.get(name) is not None]
    return {**params, **{name: min(params[name], tokens) for name in limits}}


def _check_reads_tools(with_tool: dict, without: dict, endpoint: Endpoint) -> None:
    """A weak model may not call the tool that it is asked to call, but it must have read more than without it."""
    read, plain = (_count_tokens(answer["usage"]).get("prompt") for answer in (with_tool, without))
    if read is None or read == plain:
        raise BadInput(
            f"{endpoint.model} at {endpoint.base_url} ignores tools: it was asked to call one and wrote text instead; "
            "start the server with tool calling (vLLM: --enable-auto-tool-choice --tool-call-parser NAME; SGLang: "
            "--tool-call-parser NAME; llama.cpp: --jinja)"
        )


def _explain(error: RequestFailed, endpoint: Endpoint) -> str:
    where, text = f"{endpoint.model} at {endpoint.base_url}", str(error)
    if error.status in (401, 403):
        state = "is refused" if endpoint.key() else "is not set"
        return f"{where}: the key in {endpoint.key_variable} {state} ({text})"
    if error.status == 404:
        return f"{where}: no such model or address ({text})"
    return f"{where} cannot be used: {text}"

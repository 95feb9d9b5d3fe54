"""The customer played by a model: tau2's own user simulator over litellm, with what a network needs around it.

A call runs in a thread of its own, so that it never blocks the event loop, under a time-out that holds even where
litellm's own does not. What another try can mend (429, 5xx, time-outs, broken connections, empty replies, broken tool
calls) is tried again, later and later; what it cannot (a refused key, an unknown model, a bad request) fails at once.
Keys come from the environment only and reach no message: every error is reworded here and its keys are masked.

litellm is imported on first use, because that takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from retry_wait import seconds_to_wait

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gemini/gemini-2.5-flash-lite"
DEFAULTS = {"temperature": 0.0, "timeout": 60, "num_retries": 4}  # `timeout`: seconds of one call
WAITING = ("timeout", "num_retries")  # arguments that change no answer that is recorded
CONCURRENCY = 32  # calls at a time, in one event loop
FIRST_WAIT = 1.0  # seconds before another try; doubled each time
GRACE = 5.0  # seconds that a call may take beyond `timeout`, in which litellm should have given up
PREFLIGHT_RETRIES = 2

# Where a provider's key is read from; the first name is the one that messages give. litellm knows the others.
KEY_VARIABLES = {
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
    "openrouter": ("OPENROUTER_API_KEY",),
    "mistral": ("MISTRAL_API_KEY",),
    "groq": ("GROQ_API_KEY",),
    "deepseek": ("DEEPSEEK_API_KEY",),
}
PLAIN_NAMES = {"openai": re.compile(r"(chat)?gpt-|o\d\b"), "anthropic": re.compile("claude")}
OURS = ("model", "messages", "tools", "tool_choice", "stream", "max_retries")
RETRIED_STATUSES = (408, 409, 425, 429)  # beside 5xx

_SECRET_ARGUMENT = re.compile(r"key|secret|password|credential|authorization|(^|[_-])token$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)(_ID)?$", re.IGNORECASE)
_SECRET_LOOKS = re.compile(
    r"\bbearer\s+[^\s\"',}]+|(?<=[?&]key=)[^\s&\"']+|\bsk-[\w*-]{6,}|\bAIza[\w*-]{6,}", re.IGNORECASE
)
_ADDRESS_WITH_MORE = re.compile(r"://[^/\s]*@|://\S*\?")  # a user or a query, in which keys are handed over
_NO_CONNECTION = re.compile(r"connection (error|refused|reset)|name or service not known", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; a shorter value of a variable is no key, and is not masked


class UnusableCustomer(Exception):
    """The customer cannot be used as it is given; the message says which setting, key or model is wrong."""


class UnreachableCustomer(UnusableCustomer):
    """It does not answer now, and may later."""


class CustomerFailed(Exception):
    """The customer's model gave no usable reply; the message holds no key. `final`: nor will it give one later."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


# ---------------------------------------------------------------------------------------------------------------------
# The customer
# ---------------------------------------------------------------------------------------------------------------------


class LLMCustomer:
    """tau2's own user simulator. `reply` is a coroutine."""

    def __init__(
        self,
        model: str,
        args: dict[str, Any],
        instructions: str,
        tools: list | None,
        seed: int,
        concurrency: int = CONCURRENCY,
    ) -> None:
        _litellm()
        from tau2.user.user_simulator import UserSimulator

        self.model, self.args, self.concurrency = model, {**DEFAULTS, **args}, concurrency
        call_args = _call_args(model, self.args)
        self.simulator = UserSimulator(tools=tools, instructions=instructions, llm=model, llm_args=call_args)
        self.simulator.set_seed(seed)
        self.state = self.simulator.get_init_state()

    async def reply(self, message: Any) -> Any:
        """The next UserMessage. Raises CustomerFailed."""
        step = functools.partial(self._step, message)
        answer, self.state = await _ask(step, self.model, self.args, self.concurrency)
        return answer

    def _step(self, message: Any) -> tuple[Any, Any]:
        """One step of the simulator, on a copy of its state: a step that fails, or that ends after it was given up,
        leaves no trace."""
        state = self.state.model_copy(update={"messages": list(self.state.messages)})
        answer, state = self.simulator.generate_next_message(message, state)
        if not answer.tool_calls and not (answer.content or "").strip():
            raise ValueError("an empty reply")
        return answer, state

    def describe(self) -> dict[str, Any]:
        """What a number has to be read with."""
        return describe(self.model, self.args, has_phone=self.simulator.tools is not None)


def describe(model: str, args: dict[str, Any], has_phone: bool) -> dict[str, Any]:
    """Model, arguments that change its answers, and the version of tau2's guidelines, of which a customer with a phone
    has its own. Raises UnusableCustomer."""
    _litellm()
    from tau2.user.user_simulator import get_global_user_sim_guidelines

    guidelines = get_global_user_sim_guidelines(use_tools=has_phone)
    version = hashlib.sha256(guidelines.encode()).hexdigest()[:8]
    return {"kind": "llm", "model": model, "args": recorded_args({**DEFAULTS, **args}), "prompt_version": version}


def recorded_args(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's calls without those of WAITING: with other values of these a run can go on."""
    return {name: value for name, value in args.items() if name not in WAITING}


def _call_args(model: str, args: dict[str, Any]) -> dict[str, Any]:
    """litellm's arguments for one try: the retries are ours."""
    call_args = {**args, "num_retries": 0, "max_retries": 0}
    if _address(args) and _provider(model) == "openai" and not os.environ.get("OPENAI_API_KEY"):
        call_args["api_key"] = "none"  # the client insists on one; a server of one's own does not
    return call_args


# ---------------------------------------------------------------------------------------------------------------------
# Before an episode
# ---------------------------------------------------------------------------------------------------------------------


def check_settings(model: str, args: dict[str, Any]) -> None:
    """Raises UnusableCustomer for arguments that cannot work, or that hold a key. Looks nothing up."""
    variable = (KEY_VARIABLES.get(_provider(model)) or ("",))[0]
    if problem := wrong_arguments("the customer's", {**DEFAULTS, **args}, OURS, variable):
        raise UnusableCustomer(problem)


def wrong_arguments(whose: str, args: dict[str, Any], ours: tuple[str, ...], key_variable: str = "") -> str:
    """What is wrong with the arguments of a model's calls, of which `ours` may not be given; "" when nothing is."""
    if found := [name for name in ours if name in args]:
        return f"{whose} arguments cannot hold {', '.join(found)}"
    if secret := _secret_argument(args):
        where = f", here from {key_variable}" if key_variable else ""
        return f"{whose} arguments hold a key ({secret}): keys are read from the environment only{where}"
    if not _is_number(args["timeout"]) or not 0 < args["timeout"] < math.inf:
        return f"{whose} argument timeout must be a number of seconds above 0"
    if not isinstance(args["num_retries"], int) or args["num_retries"] < 0:
        return f"{whose} argument num_retries must be a whole number, 0 or more"
    return ""


def _secret_argument(args: dict[str, Any]) -> str:
    """The name of the argument that holds a key; "" when there is none."""
    for name, value in args.items():
        if _SECRET_ARGUMENT.search(name):
            return name
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and (inner := _secret_argument(item)):
                return f"{name}.{inner}"
            if isinstance(item, str) and (mask(item) != item or _ADDRESS_WITH_MORE.search(item)):
                return name
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_key(model: str, args: dict[str, Any]) -> None:
    """Raises UnusableCustomer naming the environment variable of the model's key when it is not set.

    A customer at an address of its own may need none: the preflight tells."""
    if _address(args):
        return
    known = KEY_VARIABLES.get(_provider(model))
    if known is None:
        missing = _ask_litellm_for_key(model)
    else:
        missing = [] if any(os.environ.get(name) for name in known) else [known[0]]
    if missing:
        raise UnusableCustomer(f"the customer {model} needs {' and '.join(missing)} in the environment")


def _ask_litellm_for_key(model: str) -> list[str]:
    litellm = _litellm()
    try:
        litellm.get_llm_provider(model)
    except Exception as error:  # litellm's own class; its text runs over several lines
        raise UnusableCustomer(
            f"unknown customer {model!r}: give scripted, llm (which is {DEFAULT_MODEL}) or the litellm name of a "
            'model, such as openai/NAME with the argument {"api_base": "http://HOST:PORT/v1"} for a server of your own'
        ) from error
    return list(litellm.validate_environment(model)["missing_keys"])


def check(model: str, args: dict[str, Any]) -> None:
    """Settings, key, and one completion with a tool (once in a process). Blocks. Raises UnusableCustomer."""
    check_settings(model, args)
    check_key(model, args)
    _preflight(model, args).result()


async def check_once(model: str, args: dict[str, Any]) -> None:
    """`check` off the event loop; from the second call on it costs nothing. Raises UnusableCustomer, but for one that
    does not answer now (a server that still loads, a rate limit): the episodes ask longer than the preflight does."""
    check_settings(model, args)
    if _preflight_key(model, args) not in _preflights:
        await _in_thread(functools.partial(check_key, model, args), None, CONCURRENCY)
    with contextlib.suppress(UnreachableCustomer):
        await asyncio.wrap_future(_preflight(model, args))


_preflights: dict[str, Future] = {}
_preflights_lock = threading.Lock()


def _preflight_key(model: str, args: dict[str, Any]) -> str:
    return json.dumps([model, args], sort_keys=True, default=str)


def _preflight(model: str, args: dict[str, Any]) -> Future:
    """The preflight of this customer, begun by whoever asks first."""
    key = _preflight_key(model, args)
    with _preflights_lock:
        if key not in _preflights:
            _preflights[key] = _start_thread(lambda: asyncio.run(_complete_with_a_tool(model, args)))[0]
        return _preflights[key]


async def _complete_with_a_tool(model: str, args: dict[str, Any]) -> None:
    litellm = _litellm()
    args = {**DEFAULTS, **args}
    args["num_retries"] = min(args["num_retries"], PREFLIGHT_RETRIES)
    function = {
        "name": "check_status_bar",
        "description": "Looks at the phone's status bar.",
        "parameters": {"type": "object", "properties": {}},
    }
    call = functools.partial(
        litellm.completion,
        model=model,
        messages=[{"role": "user", "content": "Say OK."}],
        tools=[{"type": "function", "function": function}],
        tool_choice="auto",
        **_call_args(model, args),
    )
    try:
        await _ask(call, model, args, CONCURRENCY)
    except CustomerFailed as error:
        problem, kind = str(error), UnusableCustomer if error.final else UnreachableCustomer
    else:
        return
    raise kind(f"the customer cannot be reached: {problem}")


@functools.cache
def _litellm() -> Any:
    """litellm, quiet: its own log and its HTTP client's hold addresses with keys."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    try:
        import litellm
    except ImportError as error:
        raise UnusableCustomer(f"an LLM customer needs litellm ({error}): pip install 'litellm<1.82.7'") from error
    litellm.suppress_debug_info = True
    litellm.drop_params = True  # as tau2 sets it: what a provider does not know (a seed) is left out
    for name in ("LiteLLM", "httpx", "httpcore", "openai"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm


# ---------------------------------------------------------------------------------------------------------------------
# One question, tried until it is answered
# ---------------------------------------------------------------------------------------------------------------------


async def _ask(call: Callable[[], Any], model: str, args: dict[str, Any], concurrency: int) -> Any:
    """The result of call(), after num_retries further tries at most. Raises CustomerFailed."""
    tries = 1 + args["num_retries"]
    for number in range(1, tries + 1):
        try:
            async with _slots(concurrency):
                return await _in_thread(call, args["timeout"] + GRACE, concurrency)
        except Exception as error:
            problem, hopeless, wait = explain(error, model, args), _is_final(error), _wait(error, number)
        if hopeless or number == tries:
            break
        logger.warning("%s; trying again in %.1f s", problem, wait)
        await asyncio.sleep(wait)
    # Raised here and not above, so that litellm's own words, which may hold a key, are not chained to it.
    raise CustomerFailed(problem if number == 1 else f"{problem} ({number} tries)", final=hopeless)


_slots_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _slots(concurrency: int) -> asyncio.Semaphore:
    """The semaphore of this event loop: it belongs to one."""
    slots = _slots_of.setdefault(asyncio.get_running_loop(), {})
    return slots.setdefault(concurrency, asyncio.Semaphore(concurrency))


_left_behind: set[threading.Thread] = set()


async def _in_thread(call: Callable[[], Any], seconds: float | None, limit: int) -> Any:
    """call() in a thread; raises TimeoutError after `seconds`, or when `limit` earlier calls were given up and hang.

    The threads are daemons and not an executor's: one that hangs takes no other call's place and does not keep the
    process from ending."""
    _left_behind.difference_update([thread for thread in _left_behind if not thread.is_alive()])
    if len(_left_behind) >= limit:
        raise TimeoutError(f"{len(_left_behind)} earlier call(s) that were given up still hang")
    result, thread = _start_thread(call)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(result), seconds)
    except TimeoutError:
        raise TimeoutError(f"no reply within {seconds:g} s") from None
    finally:
        if not result.done():
            _left_behind.add(thread)


def _start_thread(call: Callable[[], Any]) -> tuple[Future, threading.Thread]:
    result: Future = Future()
    result.set_running_or_notify_cancel()  # so that nobody who stops waiting can cancel it for the others

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="tau2-customer", daemon=True)
    thread.start()
    return result, thread


# ---------------------------------------------------------------------------------------------------------------------
# What went wrong
# ---------------------------------------------------------------------------------------------------------------------


def _status(error: Exception) -> int | None:
    status = getattr(error, "status_code", None)
    return int(status) if str(status).isdigit() else None


def _is_final(error: Exception) -> bool:
    """Whether another try is in vain. What the reading of a reply raises has no status and is tried again."""
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in RETRIED_STATUSES
    return refused or isinstance(error, (ImportError, UnusableCustomer))


def _wait(error: Exception, number: int) -> float:
    headers = getattr(error, "litellm_response_headers", None) or {}
    return seconds_to_wait(number, FIRST_WAIT, str(headers.get("retry-after", "")))


def explain(error: Exception, model: str, args: dict[str, Any]) -> str:
    """One line that names the model, its address and what is wrong, without keys."""
    status, text = _status(error), mask(" ".join(str(error).split()))[:300]
    where = f"{model} at {_address(args)}" if _address(args) else model
    if isinstance(error, ImportError):
        return f"{where}: this litellm cannot call a model with tools ({text}): pip install 'litellm<1.82.7'"
    if status in (401, 403) or (status == 400 and re.search("api.?key", text, re.IGNORECASE)):
        key = (KEY_VARIABLES.get(_provider(model)) or ("its environment variable",))[0]
        return f"{where}: the key in {key} is refused (HTTP {status}): {text}"
    if status == 404:
        return f"{where}: no such model or address (HTTP 404): {text}"
    if status == 408:
        return f"{where}: no reply within {args.get('timeout')} s"
    if _NO_CONNECTION.search(text):
        return f"{where}: no connection ({text})"
    if status is not None:
        return f"{where}: HTTP {status}: {text}"
    if isinstance(error, TimeoutError):
        return f"{where}: {text}"
    return f"{where}: the reply cannot be used ({type(error).__name__}: {text})"


def mask(text: str) -> str:
    """The text without what is, or looks like, a key."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return _SECRET_LOOKS.sub("***", text)


def _provider(model: str) -> str:
    """ "gemini" of "gemini/NAME"; "" for a plain name of a provider that only litellm knows."""
    if "/" in model:
        return model.partition("/")[0]
    return next((provider for provider, pattern in PLAIN_NAMES.items() if pattern.match(model)), "")


def _address(args: dict[str, Any]) -> str:
    return args.get("api_base") or args.get("base_url") or ""

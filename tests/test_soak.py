"""Thousands of episodes with faults among them: none lost, none counted twice, nothing left behind.

    python -m pytest tests/test_soak.py                 200 episodes
    python -m pytest tests/test_soak.py -m slow -s      5,000 at 64 at a time; TAU2_SOAK_EPISODES sets another number

The episodes are the plug-in's own (TokenAgent over HTTP, tau2's orchestrator, the scripted customer); the stand-in
engine says what the teacher would say, and misbehaves in one request of ten.
"""

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
from fake_generate import serving
from fault_table import record
from test_faults import SERVER_FAULTS, FaultyModel

import token_agent
from generate_with_tau import generate
from http_client import close_session
from openai_tool_adapter import load_chat_template
from slime_local.sample import Sample
from tau2_domains import load_tasks
from tau2_reward_shaping import episode_metrics, tau2_reward_post_process

PARAMS = {"temperature": 0.7, "max_new_tokens": 4096, "stop_token_ids": None, "no_stop_trim": True}
QUICK_FAULTS = [name for name in SERVER_FAULTS if name not in ("refused", "hangs", "100 kB of tokens")]
CONCURRENCY, GROUP, FAULT_RATE = 64, 4, 0.1
MEGABYTE = 2**20


class SoakModel(FaultyModel):
    """Every tenth request gets a fault of its own; a session that is over is forgotten."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.rng, self.faults, self.count = random.Random(0), Counter(), 0

    def hits(self, number: int, key: str) -> bool:
        self.count += 1
        self.requests.clear()
        self.headers.clear()
        if self.rng.random() >= FAULT_RATE:
            return False
        name = self.rng.choice(QUICK_FAULTS)
        self.faults[name] += 1
        self.fault = SERVER_FAULTS[name]
        return True


def memory() -> float:
    """Resident megabytes of this process."""
    gc.collect()
    return psutil.Process().memory_info().rss / MEGABYTE


def left_behind() -> dict[str, int]:
    """Threads, and sockets that are not closed."""
    return {"threads": threading.active_count(), "sockets": len(psutil.Process().net_connections())}


async def soak(args, model: SoakModel, episodes: int) -> tuple[list[Sample], list[float]]:
    """All samples, and the memory after each tenth of them."""
    tasks = [task.model_dump(mode="json") for task in load_tasks("telecom", "test")]
    room, done, sizes = asyncio.Semaphore(CONCURRENCY), [], []

    async def one(index: int) -> None:
        async with room:
            group = index // GROUP
            metadata = {"domain": "telecom", "task": tasks[group % len(tasks)]}
            sample = Sample(group_index=group, index=index, session_id=str(index), prompt=0, metadata=metadata)
            finished = await generate(args, sample, PARAMS)
            model.sessions.pop(str(index), None)
            done.append(slim(finished))
            if len(done) % max(1, episodes // 10) == 0:
                sizes.append(memory())

    try:
        await asyncio.gather(*(one(index) for index in range(episodes)))
    finally:
        await close_session()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not others, others
    return done, sizes


def slim(sample: Sample) -> Sample:
    """Checked, and without its text, so that what grows is not the test's own list."""
    trained = sum(sample.loss_mask)
    assert len(sample.loss_mask) == len(sample.rollout_log_probs) == sample.response_length
    assert trained == 0 if sample.remove_sample else trained > 0
    record = sample.metadata["tau2"]
    assert sample.remove_sample or record["tokens"]["generated"] == trained
    for name in ("messages", "checks" if sample.remove_sample else "messages"):
        record.pop(name, None)
    sample.tokens, sample.loss_mask, sample.rollout_log_probs, sample.response = [], [], [], ""
    sample.metadata.pop("task")
    return sample


def check_soak(smol_dir, episodes: int) -> str:
    template = load_chat_template(str(smol_dir))
    model = SoakModel(template, model_path=str(smol_dir))
    before = left_behind()
    began = time.monotonic()
    with serving(model) as (host, port):
        args = SimpleNamespace(hf_checkpoint=str(smol_dir), sglang_router_ip=host, sglang_router_port=port)
        args.tau2_prompt, args.rollout_seed = "short", 1
        samples, sizes = asyncio.run(soak(args, model, episodes))
    assert left_behind() == before
    minutes = (time.monotonic() - began) / 60
    assert sorted(sample.index for sample in samples) == list(range(episodes))  # none lost, none twice
    metrics = episode_metrics(SimpleNamespace(), samples)
    lost = [sample for sample in samples if sample.remove_sample]
    ends = {sample.metadata["tau2"]["end_reason"] for sample in lost}
    assert ends <= {"generation_failed", "generation_aborted"} and metrics["aborted"] == len(lost)
    assert sum(value for name, value in metrics.items() if name.startswith("stop/")) == pytest.approx(1)
    assert metrics["pass_rate"] == 1.0  # what was not lost is as without faults
    _, rewards = tau2_reward_post_process(SimpleNamespace(), samples)
    assert set(rewards) == {0.0}  # every group's episodes earned the same, whatever was lost of it
    assert 0.08 < model.faults.total() / model.count < 0.12
    growth = max(sizes[5:]) - max(sizes[:3])
    assert growth < 100, sizes
    faults = model.faults.total()
    said = f"{episodes:,} episodes, {model.count:,} requests, {faults:,} faults: {len(lost)} episodes are "
    said += f"removed, none lost or counted twice; memory {sizes[0]:.0f} -> {sizes[-1]:.0f} MB; "
    return f"{said}no thread, task or socket left ({minutes:.1f} min)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(token_agent, "FIRST_WAIT", 0.01)


def test_a_short_soak(smol_dir):
    check_soak(smol_dir, 60)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_soak(smol_dir):
    said = check_soak(smol_dir, int(os.environ.get("TAU2_SOAK_EPISODES", 5000)))
    print(said, flush=True)
    record("GRPO rollout", f"soak: {CONCURRENCY} at a time, a fault in one request of ten", said)

"""The engine and its server: exact log-probs, kept KV, batching, aborts, new weights, refusals."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import aiohttp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slime_local import kernels
from slime_local.engine import Engine, room_of_its_own, sample
from slime_local.model import load_model
from slime_local.prefixes import common_prefix
from slime_local.sampling import RequestError, SamplingParams
from slime_local.server import serve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir, torch.float32, "cpu").requires_grad_(False)


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch, model, tokenizer):
    monkeypatch.setenv(kernels.SWITCH, "0" if request.param == "torch" else "1")
    engine = Engine(model, tokenizer, max_context=256, max_running=4)
    yield engine
    engine.close()


def request(ids, **params):
    return {"input_ids": ids, "sampling_params": {"max_new_tokens": 8, "ignore_eos": True, **params}}


def reference_logprobs(model, prompt, output, temperature=1.0):
    """Log-probs of `output` after `prompt` from one full forward pass."""
    ids = torch.tensor(prompt + output)
    logits = model.logits(model(ids, [len(ids)])) / temperature
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(output)[:, None])[:, 0]


def logprobs(answer):
    return torch.tensor([pair[0] for pair in answer["meta_info"]["output_token_logprobs"]])


@pytest.mark.skipif(not kernels.available(torch.float32, torch.bfloat16, CPU), reason="no bf16 vectors here")
async def test_log_probs_with_products_in_bf16_are_the_trainers(tiny_model_dir, tokenizer):
    """Engine and trainer multiply the same rounded numbers; what differs is the order of fp32 sums, which now and
    then rounds another way."""
    model = load_model(tiny_model_dir, torch.float32, "cpu", torch.bfloat16)
    engine = Engine(model.requires_grad_(False), tokenizer, max_context=256, max_running=4)
    try:
        ids, gaps = list(range(20)), []
        for turn in range(5):
            answer = await engine.generate(request(ids, temperature=1.0, sampling_seed=turn))
            gaps.append(logprobs(answer) - reference_logprobs(model, ids, answer["output_ids"]))
            ids = ids + answer["output_ids"] + [turn, 3, 5]
    finally:
        engine.close()
    gaps = torch.cat(gaps).abs()
    assert gaps.mean() < 2e-3 and gaps.max() < 2e-2


async def test_log_probs_over_turns_equal_a_full_forward(model, engine):
    """Several turns with kept KV, at another temperature, beside other requests."""

    async def episode(start):
        ids = [start + i for i in range(20)]
        for turn in range(4):
            answer = await engine.generate(request(ids, temperature=0.7, sampling_seed=start + turn))
            expected = reference_logprobs(model, ids, answer["output_ids"], 0.7)
            torch.testing.assert_close(logprobs(answer), expected, atol=1e-4, rtol=1e-4)
            assert answer["meta_info"]["cached_tokens"] >= (len(ids) - 7 if turn else 0)
            ids = ids + answer["output_ids"] + [start, turn + 1, 7, 8, 9, 10]

    await asyncio.gather(*(episode(100 * n) for n in range(1, 5)))


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), min_size=1, max_size=12))
def test_any_batch_is_exact(model, tokenizer, prompts):
    """More prompts than slots, shared prefixes, any lengths: each answer is what a full forward says."""
    engine = Engine(model, tokenizer, max_context=64, max_running=3)

    async def run():
        return await asyncio.gather(*(engine.generate(request(p, temperature=0.0)) for p in prompts))

    try:
        for prompt, answer in zip(prompts, asyncio.run(run()), strict=True):
            expected = reference_logprobs(model, prompt, answer["output_ids"])
            torch.testing.assert_close(logprobs(answer), expected, atol=1e-4, rtol=1e-4)
            assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"]
    finally:
        engine.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process's size there")
def test_the_room_of_a_slot_goes_back_to_the_system_at_once():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    room = room_of_its_own([2, 3, 50_000_000], torch.empty(0, dtype=torch.bfloat16))
    assert room.shape == (2, 3, 50_000_000) and room.dtype == torch.bfloat16
    view = room.fill_(1)[1]
    del room
    assert resident() > before + 500_000_000
    del view
    assert resident() < before + 100_000_000


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells a process's mappings there")
def test_the_room_of_a_slot_can_have_huge_pages():
    """Shared mappings have none where /sys/kernel/mm/transparent_hugepage/shmem_enabled says never."""
    room = room_of_its_own([1 << 20], torch.empty(0))
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions = line.split()[:2]
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= room.data_ptr() < end:
            assert permissions == "rw-p"
            return
    raise AssertionError("its mapping is not listed")


async def test_a_new_episode_starts_from_the_shared_prefix(engine):
    system = list(range(200, 260))
    await engine.generate(request([*system, 1, 2, 3]))
    first = await engine.generate(request([*system, 4, 5, 6]))
    assert first["meta_info"]["cached_tokens"] == len(system)


async def test_requests_that_arrive_together_read_their_shared_prefix_once(engine):
    system = list(range(300, 360))
    answers = await asyncio.gather(*(engine.generate(request([*system, i, i + 1])) for i in range(4)))
    assert sorted(a["meta_info"]["cached_tokens"] for a in answers) == [0, 60, 60, 60]


async def test_slots_are_used_again_for_other_episodes_with_a_shared_prefix(model, engine):
    system = list(range(400, 440))
    for start in (0, 100, 200):  # more episodes than slots, in waves
        prompts = [[*system, start + i, start + i + 50] for i in range(4)]
        for prompt, answer in zip(
            prompts, await asyncio.gather(*map(engine.generate, map(request, prompts))), strict=True
        ):
            expected = reference_logprobs(model, prompt, answer["output_ids"])
            torch.testing.assert_close(logprobs(answer), expected, atol=1e-4, rtol=1e-4)


async def test_a_long_prompt_is_read_in_chunks(model, tokenizer):
    engine = Engine(model, tokenizer, max_context=256, max_running=2, max_step_tokens=16)
    prompt = list(range(100))
    answers = await asyncio.gather(engine.generate(request(prompt)), engine.generate(request(prompt[::-1])))
    engine.close()
    for ids, answer in zip((prompt, prompt[::-1]), answers, strict=True):
        expected = reference_logprobs(model, ids, answer["output_ids"])
        torch.testing.assert_close(logprobs(answer), expected, atol=1e-4, rtol=1e-4)


async def test_new_weights_empty_the_cache(tiny_model_dir, tokenizer):
    model = load_model(tiny_model_dir, torch.float32, "cpu").requires_grad_(False)
    engine = Engine(model, tokenizer, max_context=128, max_running=2)
    prompt = list(range(30))
    await engine.generate(request(prompt))
    for parameter in model.parameters():
        parameter.mul_(1.3)
    engine.update_weights(model)
    answer = await engine.generate(request(prompt, temperature=0.0))
    engine.close()
    assert answer["meta_info"]["weight_version"] == "1"
    assert answer["meta_info"]["cached_tokens"] == 0
    expected = reference_logprobs(model, prompt, answer["output_ids"])
    torch.testing.assert_close(logprobs(answer), expected, atol=1e-4, rtol=1e-4)


async def test_seeded_sampling_repeats_whatever_runs_beside_it(engine):
    wanted = request([5, 6, 7], sampling_seed=11)
    alone = await engine.generate(wanted)
    crowd = await asyncio.gather(engine.generate(wanted), *(engine.generate(request([i])) for i in range(3)))
    assert crowd[0]["output_ids"] == alone["output_ids"]


async def test_finish_reasons(model, tokenizer, engine):
    cut = await engine.generate(request([1, 2, 3], max_new_tokens=3))
    assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    token = cut["output_ids"][0]
    stopped = await engine.generate(request([1, 2, 3], temperature=0.0))
    token = stopped["output_ids"][2]
    stopped = await engine.generate(request([1, 2, 3], temperature=0.0, stop_token_ids=[token]))
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert stopped["output_ids"][-1] == token
    full = await engine.generate(request(list(range(250)), max_new_tokens=100))
    assert full["meta_info"]["finish_reason"]["type"] == "length"
    assert len(full["output_ids"]) == 6


async def test_the_policy_cannot_stop_before_min_new_tokens(engine):
    wish = (await engine.generate(request([1, 2, 3], temperature=0.0)))["output_ids"][0]
    params = {"temperature": 0.0, "stop_token_ids": [wish]}
    assert (await engine.generate(request([1, 2, 3], **params)))["output_ids"] == [wish]
    answer = await engine.generate(request([1, 2, 3], **params, min_new_tokens=5))
    assert wish not in answer["output_ids"][:5] and torch.isfinite(logprobs(answer)).all()


@pytest.mark.parametrize("foreign", [99_999, 2**70, -1, -(2**70)])
async def test_stop_ids_of_another_model_end_nothing(engine, foreign):
    """Neither the engine's thread, which works for others, nor a turn; and they take no token of this model away."""
    params = {"temperature": 0.0, "min_new_tokens": 3, "max_new_tokens": 5, "ignore_eos": True}
    innocent = asyncio.create_task(engine.generate(request([1, 2, 3], max_new_tokens=100, ignore_eos=True)))
    plain = await engine.generate(request([5, 6], **params, stop_token_ids=[]))
    answer = await engine.generate(request([5, 6], **params, stop_token_ids=[foreign]))
    assert answer["output_ids"] == plain["output_ids"]
    torch.testing.assert_close(logprobs(answer), logprobs(plain), atol=1e-5, rtol=1e-5)
    assert len((await innocent)["output_ids"]) == 100 and engine.failure is None


async def test_of_foreign_end_ids_none_is_masked(engine, model):
    """-1 would be the last entry of the vocabulary."""
    last = model.config.vocab_size - 1
    engine.eos = {2, last + 1}
    logits = torch.zeros(1, last + 1)
    engine._sample([engine._request(request([1, 2], min_new_tokens=2, stop_token_ids=[-1, 7]))], logits)
    assert torch.isinf(logits[0]).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("several", [True, False])
async def test_every_end_id_of_the_folder_ends_a_turn(tiny_model_dir, tokenizer, tmp_path, several):
    """SGLang's: those of config.json and those of generation_config.json."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")

    @contextlib.contextmanager
    def engine_with(ends):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        engine = Engine(load_model(folder, torch.float32, "cpu").requires_grad_(False), tokenizer, max_context=64)
        yield engine
        engine.close()

    payload = request([1, 2, 3], temperature=0.0, ignore_eos=False)
    with engine_with(None) as engine:
        assert engine.eos == {tokenizer.eos_token_id}
        end = (await engine.generate(payload))["output_ids"][0]
    with engine_with([tokenizer.eos_token_id, end, 10**6] if several else end) as engine:
        answer = await engine.generate(payload)
        later = await engine.generate(request([1, 2, 3], temperature=0.0, ignore_eos=False, min_new_tokens=4))
    assert answer["output_ids"] == [end]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
    assert len(later["output_ids"]) >= 4 and end not in later["output_ids"][:4]


async def test_a_last_permitted_token_ends_by_its_length(engine):
    """SGLang looks at the length first, whatever the token is."""
    token = (await engine.generate(request([1, 2, 3], temperature=0.0)))["output_ids"][0]
    params = {"temperature": 0.0, "stop_token_ids": [token]}
    answer = await engine.generate(request([1, 2, 3], **params, max_new_tokens=1))
    assert answer["output_ids"] == [token]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
    answer = await engine.generate(request([1, 2, 3], **params, max_new_tokens=2))
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}


async def test_abort_returns_what_was_sampled(engine):
    task = asyncio.create_task(engine.generate(request([1, 2, 3], max_new_tokens=200)))
    await asyncio.sleep(0.05)
    engine.abort()
    answer = await task
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) < 200
    assert (await engine.generate(request([1, 2, 3])))["output_ids"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([], "JSON object"),
        ({}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [10**9]}, "integers from 0"),
        ({"input_ids": [True]}, "integers from 0"),
        ({"input_ids": [1.5]}, "integers from 0"),
        ({"input_ids": list(range(256))}, "context is 256"),
        ({"input_ids": [1], "stream": True}, "stream"),
        (request([1], temperature=-1), "temperature"),
        (request([1], temperature=float("nan")), "temperature"),
        (request([1], top_p=0), "top_p"),
        (request([1], max_new_tokens=0), "max_new_tokens"),
        (request([1], repetition_penalty=1.1), "repetition_penalty"),
        (request([1], temprature=0.1), "temprature"),
        (request([1], regex="a+"), "regex"),
        (request([1], no_stop_trim=False), "no_stop_trim"),
        (request([1], skip_special_tokens="yes"), "skip_special_tokens"),
        (request([1], ignore_eos=2**70), "ignore_eos"),
        (request([1], min_new_tokens=-3), "min_new_tokens"),
        (request([1], min_new_tokens=2**70), "min_new_tokens"),
        (request([1], max_new_tokens=2**70), "max_new_tokens"),
        (request([1], top_k=2**70), "top_k"),
        (request([1], temperature=2**70), "temperature"),
        (request([1], sampling_seed=2**70), "sampling_seed"),
    ],
)
async def test_bad_requests_are_refused(engine, payload, message):
    with pytest.raises(RequestError, match=message):
        await engine.generate(payload)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(200, 1)
    uniforms = [i / 200 for i in range(200)]
    ids, _ = sample(logits, [SamplingParams(top_k=2)] * 200, uniforms)
    assert set(ids) == {0, 1}
    ids, _ = sample(logits, [SamplingParams(top_p=0.9)] * 200, uniforms)
    assert set(ids) == {0, 1, 2}
    ids, found = sample(logits, [SamplingParams()] * 200, uniforms)
    assert [ids.count(i) for i in range(4)] == pytest.approx([100, 60, 30, 10], abs=2)
    assert found[0] == pytest.approx(torch.log(torch.tensor(0.5)).item(), abs=1e-5)


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("top_k", [-1, 5])
def test_a_temperature_next_to_nothing_is_greedy(monkeypatch, switch, top_k):
    """SGLang's rule; numbers so small end in a division by 0."""
    monkeypatch.setenv(kernels.SWITCH, switch)
    logits = torch.randn(1, 1000)
    greedy = sample(logits.clone(), [SamplingParams(temperature=0.0)], [0.3])
    assert greedy[0] == [logits.argmax().item()]
    for temperature in (9e-7, 1e-30, 1e-38, 1e-42, 1e-46, 1e-320):
        found = sample(logits.clone(), [SamplingParams(temperature=temperature, top_k=top_k)], [0.3])
        assert found[0] == greedy[0] and found[1] == pytest.approx(greedy[1], abs=1e-5)
    ids, found = sample(logits.clone(), [SamplingParams(temperature=1e-6, top_k=top_k)], [0.3])
    assert ids == greedy[0] and found == [0.0]


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30), st.integers(0, 30))
def test_common_prefix(a, b, limit):
    n = common_prefix(a, b, limit)
    assert a[:n] == b[:n] and n <= limit
    assert n == limit or n == min(len(a), len(b)) or a[n] != b[n]


def call(address, path, body=None):
    url = f"http://{address[0]}:{address[1]}{path}"
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_speaks_sglangs_protocol(engine):
    with serve(engine, model_path="some/model") as address:
        assert address[0] == "127.0.0.1"
        status, body = call(address, "/generate", request([1, 2, 3], max_new_tokens=4))
        answer = json.loads(body)
        assert status == 200 and len(answer["meta_info"]["output_token_logprobs"]) == 4
        assert call(address, "/health")[0] == 200
        assert json.loads(call(address, "/model_info")[1])["model_path"] == "some/model"
        assert json.loads(call(address, "/workers")[1])["workers"][0]["url"].endswith(str(address[1]))
        assert call(address, "/abort_request", {"abort_all": True})[0] == 200
        assert call(address, "/generate", b"{not json")[0] == 400
        status, body = call(address, "/generate", {"input_ids": []})
        assert status == 400 and b"input_ids" in body
        assert call(address, "/generate", b"x" * (17 * 2**20))[0] == 413


class Asked:
    """In place of an engine: keeps what the server asks of it, and answers nothing."""

    failure = None

    def __init__(self):
        self.aborted, self.left, self.begun = [], threading.Event(), threading.Event()

    def abort(self, rid):
        self.aborted.append(rid)

    async def generate(self, payload):
        try:
            self.begun.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.left.set()
            raise


def test_which_requests_are_aborted():
    """SGLang's rule: `abort_all`, or no name, means all."""
    asked = Asked()
    with serve(asked) as address:
        for body in ({}, {"rid": ""}, {"abort_all": True, "rid": "a"}, {"abort_all": False, "rid": "a"}, {"rid": "a"}):
            assert call(address, "/abort_request", body)[0] == 200
    assert asked.aborted == [None, None, None, "a", "a"]


async def test_of_a_client_that_has_gone_the_request_ends():
    asked = Asked()
    with serve(asked) as address:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.post(f"http://{address[0]}:{address[1]}/generate", json={}), 0.5)
        assert asked.begun.is_set() and await asyncio.to_thread(asked.left.wait, 10)


# ---- A rollout beside the engine -----------------------------------------------------------------------------


def test_what_a_rollout_leaves_unanswered_is_aborted(model, tokenizer):
    """And what comes while the trainer trains waits: neither ends the run when the weights change."""
    engine = Engine(model, tokenizer, max_context=256, max_running=2, own_thread=False)
    payloads = [request([1, 2, 3], max_new_tokens=200) for _ in range(3)]

    def impatient():
        requests = [engine._request(payload) for payload in payloads]
        for one in requests:
            engine.submit(one)
        while not engine.running:
            time.sleep(0.001)
        return requests

    for one in engine.run_beside(impatient):
        assert one.future.result(0)["meta_info"]["finish_reason"]["type"] == "abort"
    stray = engine._request(request([1, 2, 3]))
    engine.submit(stray)
    engine.update_weights()
    engine.run_beside(lambda: stray.future.result(20))


def test_a_rollout_is_not_waited_for_when_the_engine_fails(model, tokenizer, monkeypatch):
    """A plug-in that turns every failure into an aborted sample would begin new episodes for ever."""
    engine = Engine(model, tokenizer, max_context=256, max_running=2, own_thread=False)
    monkeypatch.setattr(engine, "_step", lambda: 1 / 0)
    ended = threading.Event()

    def tolerant():
        engine.submit(engine._request(request([1, 2, 3])))
        ended.wait(60)

    with pytest.raises(ZeroDivisionError):
        engine.run_beside(tolerant)
    assert not ended.is_set()
    ended.set()


@pytest.mark.parametrize("case", ["no folder", "busy port"])
def test_the_server_command_names_bad_input_at_once(case, tiny_model_dir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folder = tmp_path if case == "no folder" else tiny_model_dir
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "slime_local.server", "--model-path", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert ("not a Hugging Face model folder" if case == "no folder" else "in use") in done.stderr

"""Rollouts over a stand-in /generate server: order, filters, abort, evaluation, and the training data."""

import asyncio
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from slime_local.errors import UsageError
from slime_local.flags import parse_args
from slime_local.loop import is_due
from slime_local.metrics import pass_rates, rollout_metrics
from slime_local.rollout import generate_rollout, sampling_seed
from slime_local.sample import Sample
from slime_local.train_data import (
    convert_samples_to_train_data,
    flatten,
    load_debug_samples,
    post_process_rewards,
    save_debug_samples,
)

MINIMAL = ["--rollout-batch-size", "2", "--num-rollout", "1", "--rollout-max-response-len", "8"]


class Source:
    """Endless groups of empty prompts."""

    def __init__(self, group_size: int):
        self.group_size, self.groups = group_size, 0

    def get_samples(self, count: int) -> list[list[Sample]]:
        return [self._group() for _ in range(count)]

    def _group(self) -> list[Sample]:
        number = self.groups
        self.groups += 1
        size = self.group_size
        return [Sample(group_index=number, index=number * size + i, prompt="p") for i in range(size)]


@pytest.fixture
def plugin(monkeypatch):
    """Register functions as a plug-in module; gives their dotted paths."""

    def register(**functions) -> dict[str, str]:
        name = f"plugin_{len(registered)}_{id(functions)}"
        registered.append(name)
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        return {key: f"{name}.{key}" for key in functions}

    registered: list[str] = []
    return register


def parse(*words: str, n: int = 2, **attributes):
    args = parse_args([*MINIMAL, "--n-samples-per-prompt", str(n), *words])
    for name, value in attributes.items():
        setattr(args, name, value)
    return args


def finish(sample: Sample, reward: float | None = 1.0) -> Sample:
    sample.tokens, sample.response_length, sample.response = [1, 2, 3], 2, "ab"
    sample.loss_mask, sample.rollout_log_probs = [1, 1], [-0.5, -0.5]
    sample.reward, sample.status = reward, Sample.Status.COMPLETED
    return sample


@contextmanager
def stand_in_server(slow: float = 0.0) -> Iterator[types.SimpleNamespace]:
    """A server that speaks /generate and /abort_request, in its own thread."""
    state = types.SimpleNamespace(requests=[], aborts=0)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def generate(request):
        body = await request.json()
        state.requests.append(body)
        waited, aborts = 0.0, state.aborts
        while waited < slow and state.aborts == aborts:
            await asyncio.sleep(0.01)
            waited += 0.01
        reason = "stop" if state.aborts == aborts else "abort"
        pairs = [[-0.25, 7, None], [-0.5, 8, None]]
        meta = {"finish_reason": {"type": reason}, "output_token_logprobs": pairs, "weight_version": "1"}
        return web.json_response({"text": "xy", "output_ids": [7, 8], "meta_info": meta})

    async def abort(request):
        state.aborts += 1
        return web.Response()

    async def start():
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_post("/abort_request", abort)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, site._server.sockets[0].getsockname()[1]

    runner, state.port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield state
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


# ---- Rollouts ------------------------------------------------------------------------------------------------


def test_without_a_plug_in_the_server_answers_the_prompt(plugin, tiny_model_dir):
    async def reward(args, sample):
        return float(len(sample.response))

    paths = plugin(reward=reward)
    with stand_in_server() as server:
        args = parse("--custom-rm-path", paths["reward"], "--hf-checkpoint", str(tiny_model_dir))
        args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", server.port
        output = generate_rollout(args, 0, Source(2))
    samples = flatten(output.samples)
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    first = samples[0]
    assert first.tokens[-2:] == [7, 8] and first.rollout_log_probs == [-0.25, -0.5] and first.loss_mask == [1, 1]
    assert first.reward == 2.0 and first.status is Sample.Status.COMPLETED and first.weight_versions == ["1"]
    params = [request["sampling_params"] for request in server.requests]
    assert all(p["max_new_tokens"] == 8 and p["temperature"] == 1.0 for p in params)
    assert len({p["sampling_seed"] for p in params}) == 4


def test_the_plug_in_gets_its_own_params_and_evaluation_only_when_it_asks(plugin):
    calls = []

    async def generate(args, sample, sampling_params):
        sampling_params["temperature"] = sample.index  # must not reach the others
        calls.append((sample.index, sample.session_id, dict(sampling_params)))
        return finish(sample)

    args = parse("--custom-generate-function-path", plugin(generate=generate)["generate"])
    generate_rollout(args, 3, Source(2))
    assert all(params["temperature"] == index for index, _, params in calls)
    assert len({session for _, session, _ in calls}) == 4
    seeds = {index: params["sampling_seed"] for index, _, params in calls}
    assert seeds[1] == sampling_seed(args.rollout_seed, 3, 1), "the same after a resume"
    first = dict(seeds)
    calls.clear()
    generate_rollout(args, 4, Source(2))
    assert {index: params["sampling_seed"] for index, _, params in calls} != first


def test_slimes_own_seeds_on_request(plugin):
    seeds = {}

    async def generate(args, sample, sampling_params):
        seeds[sample.index] = sampling_params["sampling_seed"]
        return finish(sample)

    path = plugin(generate=generate)["generate"]
    args = parse("--custom-generate-function-path", path, "--sglang-enable-deterministic-inference")
    generate_rollout(args, 0, Source(2))
    assert seeds == {0: 42, 1: 43, 2: 42, 3: 43}


def test_groups_without_a_difference_are_replaced(plugin):
    async def generate(args, sample, sampling_params):
        alike = sample.group_index in (0, 2)
        return finish(sample, 1.0 if alike else float(sample.index % 2))

    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    args = parse(
        "--custom-generate-function-path",
        plugin(generate=generate)["generate"],
        "--dynamic-sampling-filter-path",
        path,
    )
    with stand_in_server() as server:
        args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", server.port
        output = generate_rollout(args, 0, Source(2))
    groups = [group[0].group_index for group in output.samples]
    assert len(groups) == 2 and not {0, 2} & set(groups) and groups == sorted(groups)
    assert output.metrics == {"rollout/dynamic_filter/drop_zero_std_1.0": 2}


def test_a_filter_with_fallback_starts_no_second_round(plugin):
    async def generate(args, sample, sampling_params):
        return finish(sample, 0.0)

    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback"
    source = Source(2)
    generated = plugin(generate=generate)["generate"]
    args = parse("--custom-generate-function-path", generated, "--dynamic-sampling-filter-path", path)
    assert len(generate_rollout(args, 0, source).samples) == 2
    assert source.groups == 2


def test_what_is_left_of_over_sampling_is_aborted(plugin, tiny_model_dir):
    async def generate(args, sample, sampling_params):
        if sample.group_index < 2:
            return finish(sample)
        from slime_local.generate import generate as over_http

        return await over_http(args, sample, sampling_params)

    with stand_in_server(slow=30.0) as server:
        words = ["--over-sampling-batch-size", "4", "--hf-checkpoint", str(tiny_model_dir)]
        args = parse("--custom-generate-function-path", plugin(generate=generate)["generate"], *words)
        args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", server.port
        output = generate_rollout(args, 0, Source(2))
    assert [group[0].group_index for group in output.samples] == [0, 1]
    assert server.aborts >= 1


def test_concurrency_is_limited(plugin):
    running, most = 0, 0

    async def generate(args, sample, sampling_params):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return finish(sample)

    path = plugin(generate=generate)["generate"]
    generate_rollout(parse("--custom-generate-function-path", path, "--sglang-server-concurrency", "3"), 0, Source(2))
    assert most == 3


def test_group_rewards_hooks_and_the_sample_filter(plugin):
    async def generate(args, sample, sampling_params):
        return finish(sample, None)

    async def rate(args, samples):
        return [float(sample.index) for sample in samples]

    async def hook(args, sample, rollout_id):
        sample.metadata["seen"] = rollout_id

    def drop_first(args, groups):
        groups[0][0].remove_sample = True

    paths = plugin(generate=generate, rate=rate, hook=hook, drop_first=drop_first)
    args = parse(
        *("--custom-generate-function-path", paths["generate"], "--custom-rm-path", paths["rate"], "--group-rm"),
        *("--rollout-sample-hook-path", paths["hook"], "--rollout-sample-filter-path", paths["drop_first"]),
    )
    samples = flatten(generate_rollout(args, 5, Source(2)).samples)
    assert [sample.reward for sample in samples] == [0.0, 1.0, 2.0, 3.0]
    assert all(sample.metadata == {"seen": 5} for sample in samples)
    assert convert_samples_to_train_data(args, samples)["loss_masks"] == [[0, 0], [1, 1], [1, 1], [1, 1]]


def test_a_failing_plug_in_ends_the_rollout_with_its_error(plugin):
    async def generate(args, sample, sampling_params):
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        path = plugin(generate=generate)["generate"]
        generate_rollout(parse("--custom-generate-function-path", path), 0, Source(2))


def test_a_sample_without_a_reward_is_reported(plugin):
    async def generate(args, sample, sampling_params):
        return finish(sample, None)

    path = plugin(generate=generate)["generate"]
    with pytest.raises(UsageError, match="sets no reward"):
        generate_rollout(parse("--custom-generate-function-path", path), 0, Source(2))
    with pytest.raises(UsageError, match=r"sample 9 .* without a reward"):
        post_process_rewards(parse(), [Sample(index=9)])


def test_evaluation_runs_every_row_n_times_with_its_own_settings(plugin, tmp_path, tiny_model_dir):
    seen = []

    async def generate(args, sample, sampling_params, evaluation=False):
        seen.append((evaluation, sample.group_index, sample.session_id, sampling_params["temperature"]))
        sample = finish(sample, float(sample.prompt))
        sample.status = Sample.Status.TRUNCATED if sample.prompt else Sample.Status.COMPLETED
        return sample

    path = tmp_path / "e.jsonl"
    path.write_text('{"input": 0}\n{"input": 1}\n{"input": 1}\n')
    args = parse(
        *("--custom-generate-function-path", plugin(generate=generate)["generate"], "--eval-temperature", "0"),
        *("--eval-prompt-data", "e", str(path), "--n-samples-per-eval-prompt", "2"),
        *("--hf-checkpoint", str(tiny_model_dir)),
    )
    data = generate_rollout(args, 0, None, evaluation=True).data["e"]
    assert data["rewards"] == [0, 0, 1, 1, 1, 1] and data["truncated"] == [False] * 2 + [True] * 4
    assert [sample.index for sample in data["samples"]] == list(range(6))
    assert set(seen) == {(True, None, None, 0.0)}, "as slime evaluates"


# ---- Training data -------------------------------------------------------------------------------------------


def graded(rewards: list[float], groups: list[int]) -> list[Sample]:
    samples = [Sample(index=i, group_index=group) for i, group in enumerate(groups)]
    return [finish(sample, reward) for sample, reward in zip(samples, rewards, strict=True)]


def test_rewards_are_normalised_within_their_group():
    samples = graded([0.0, 1.0, 5.0, 9.0], [0, 0, 1, 1])
    raw, rewards = post_process_rewards(parse(), samples)
    assert raw == [0.0, 1.0, 5.0, 9.0]
    expected = torch.tensor([-0.5, 0.5, -2.0, 2.0]) / (torch.tensor([0.5**0.5] * 2 + [8**0.5] * 2) + 1e-6)
    torch.testing.assert_close(torch.tensor(rewards), expected)
    _, centred = post_process_rewards(parse("--disable-grpo-std-normalization"), samples)
    assert centred == [-0.5, 0.5, -2.0, 2.0]
    assert post_process_rewards(parse("--disable-rewards-normalization"), samples)[1] == raw


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2)), min_size=1, max_size=12))
def test_groups_of_any_size_never_reach_into_each_other(pairs):
    groups = [group for group, _ in pairs]
    _, rewards = post_process_rewards(parse(), graded([reward for _, reward in pairs], groups))
    for group in set(groups):
        alone = [pair for pair in pairs if pair[0] == group]
        _, expected = post_process_rewards(parse(), graded([reward for _, reward in alone], [group] * len(alone)))
        assert [r for r, other in zip(rewards, groups, strict=True) if other == group] == expected


def test_training_data_has_slimes_keys():
    samples = graded([0.0, 1.0, 1.0, 1.0], [0, 0, 1, 1])
    samples[1].remove_sample = True
    samples[2].status = Sample.Status.TRUNCATED
    samples[3].metadata["raw_reward"] = 7.0
    data = convert_samples_to_train_data(parse(), samples)
    assert data["tokens"] == [[1, 2, 3]] * 4 and data["response_lengths"] == [2] * 4
    assert data["loss_masks"] == [[1, 1], [0, 0], [1, 1], [1, 1]]
    assert data["truncated"] == [0, 0, 1, 0] and data["raw_reward"] == [0.0, 1.0, 1.0, 7.0]
    assert data["rollout_log_probs"] == [[-0.5, -0.5]] * 4
    assert data["sample_indices"] == [0, 1, 2, 3] and data["rollout_ids"] == [0, 1, 2, 3]
    samples[0].loss_mask = [1]
    with pytest.raises(UsageError, match="sample 0: loss_mask has 1 entries for a response of 2"):
        convert_samples_to_train_data(parse(), samples)


def test_siblings_of_one_episode_share_a_rollout_id():
    first, second, third = graded([1.0, 1.0, 0.0], [0, 0, 0])
    first.rollout_id = second.rollout_id = 0
    samples = flatten([[[first, second], [third]]])
    assert convert_samples_to_train_data(parse(), samples)["rollout_ids"] == [0, 0, 1]
    second.rollout_id = None
    with pytest.raises(UsageError, match="without one rollout_id"):
        flatten([[[first, second], third]])


def test_the_plug_in_replaces_normalisation_and_its_lengths_are_checked(plugin):
    paths = plugin(double=lambda args, samples: ([1.0], [2.0]))
    args = parse("--custom-reward-post-process-path", paths["double"])
    assert convert_samples_to_train_data(args, graded([0.0], [0]))["rewards"] == [2.0]
    with pytest.raises(UsageError, match="2 samples came back"):
        convert_samples_to_train_data(args, graded([0.0, 1.0], [0, 0]))


def test_debug_files_hold_plain_values(tmp_path):
    samples = graded([0.0, 1.0, 1.0, 1.0], [0, 0, 1, 1])
    template = str(tmp_path / "d" / "{rollout_id}.pt")
    path = save_debug_samples(template, 3, samples)
    assert torch.load(path, weights_only=True)["rollout_id"] == 3
    assert load_debug_samples(template, 3) == samples
    assert [sample.index for sample in load_debug_samples(template, 3, share=0.5)] == [0, 3]
    with pytest.raises(UsageError, match="no file"):
        load_debug_samples(template, 4)


# ---- Numbers -------------------------------------------------------------------------------------------------


def test_metrics_have_slimes_names():
    samples = graded([0.0, 1.0, 1.0, 1.0], [0, 0, 1, 1])
    samples[0].status = Sample.Status.TRUNCATED
    metrics = rollout_metrics(parse(), samples, seconds=2.0)
    assert metrics["rollout/response_len/mean"] == 2.0 and metrics["rollout/truncated_ratio"] == 0.25
    assert metrics["rollout/zero_std/count_1.0"] == 1 and metrics["perf/tokens_per_gpu_per_sec"] == 4.0
    assert pass_rates([1, 0, 0, 0], 4) == {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0}


def test_periodic_actions_fall_where_slimes_do():
    assert [i for i in range(7) if is_due(i, 3, None, 7)] == [2, 5, 6]
    assert [i for i in range(7) if is_due(i, 3)] == [2, 5]
    assert [i for i in range(6) if is_due(i, 4, per_epoch=3)] == [2, 3, 5]
    assert not is_due(0, None, 1, 1)

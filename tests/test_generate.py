"""The generate plug-in against a stand-in server: exact ids, masks and log-probs, and every way an episode can end."""

import asyncio
import copy
from types import SimpleNamespace

import pytest
from fake_generate import FakeModel, serving

import generate_with_tau
import token_agent
from generate_with_tau import check_args, generate, redraws_ids
from http_client import close_session
from openai_tool_adapter import ChatTemplate, load_chat_template
from slime_local.flags import EvalDataset, load_flags
from slime_local.rollout import _eval_samples
from slime_local.sample import Sample
from tau2_domains import issue_type, load_tasks
from tau2_episode import EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_mock import make_rows, write_jsonl
from tau2_settings import NAMES, Settings, read_settings
from tau2_users import ScriptedCustomer
from token_agent import TokenAgent, TokenLimits

TASKS = {issue_type(task.id): task for task in load_tasks("telecom", "test")}
PARAMS = {"temperature": 0.7, "max_new_tokens": 4096, "stop_token_ids": None, "no_stop_trim": True}


@pytest.fixture(autouse=True)
async def closed():
    yield
    await close_session()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(token_agent, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def template(smol_dir):
    return load_chat_template(str(smol_dir))


@pytest.fixture
def model(template):
    return FakeModel(template)


@pytest.fixture
def args(model, smol_dir):
    with serving(model) as (host, port):
        yield SimpleNamespace(
            hf_checkpoint=str(smol_dir),
            sglang_router_ip=host,
            sglang_router_port=port,
            tau2_prompt="short",
            rollout_seed=1,
        )


def make_sample(kind="mms_issue", **fields):
    metadata = {"domain": "telecom", "task": TASKS[kind].model_dump(mode="json")}
    return Sample(group_index=3, index=12, prompt=0, session_id="abc", metadata=metadata, **fields)


def assert_removed(sample):
    assert (sample.tokens, sample.response_length, sample.loss_mask) == ([0, 0], 1, [0])
    assert (sample.rollout_log_probs, sample.reward, sample.remove_sample) == ([0.0], 0.0, True)
    stopped = sample.metadata["tau2"]["end_reason"] == "generation_aborted"
    assert sample.status is (Sample.Status.ABORTED if stopped else Sample.Status.FAILED)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(TASKS))
async def test_a_solved_episode_fills_the_sample_that_it_was_given(args, model, kind):
    sample = make_sample(kind)
    assert await generate(args, sample, PARAMS) is sample
    assert sample.reward == 1.0 and sample.status is Sample.Status.COMPLETED
    assert sample.group_index == 3 and sample.session_id == "abc" and not sample.remove_sample
    assert len(sample.loss_mask) == len(sample.rollout_log_probs) == sample.response_length
    assert (
        sample.metadata["tau2"]["end_reason"] in ("user_stop", "transfer") and sample.metadata["domain"] == "telecom"
    )
    assert sample.metadata["tau2"]["tokens"]["generated"] == sum(sample.loss_mask)
    assert sample.weight_versions[-1] == "7" and sample.prefix_cache_info.cached_tokens > 0
    assert sample.non_generation_time > 0
    assert PARAMS == {"temperature": 0.7, "max_new_tokens": 4096, "stop_token_ids": None, "no_stop_trim": True}


async def test_trained_ids_are_the_sampled_ids(args, model, template):
    """Prompt + response is what the server saw and said; mask 1 exactly on what it said; log-probs are its own."""
    sample = make_sample()
    await generate(args, sample, PARAMS)
    assert not model.broken_prefixes
    ((_, said),) = model.sessions.values()
    assert sample.tokens == said
    prompt = len(sample.tokens) - sample.response_length
    assert sample.tokens[:prompt] == model.requests[0]["input_ids"]
    expected_mask, expected_log_probs = [], []
    for request, following in zip(model.requests, [*model.requests[1:], {"input_ids": said}], strict=True):
        start = len(request["input_ids"])
        assert following["input_ids"][:start] == request["input_ids"]
        turn = sample.tokens[start : sample.tokens.index(template.end_id, start) + 1]
        expected_mask += [0] * (start - prompt - len(expected_mask)) + [1] * len(turn)
        expected_log_probs += [0.0] * (start - prompt - len(expected_log_probs))
        expected_log_probs += [-0.001 * (i + 1) for i in range(len(turn))]
    assert sample.loss_mask == expected_mask
    assert sample.rollout_log_probs == pytest.approx(expected_log_probs)
    assert sample.response == template.tokenizer.decode(sample.tokens[prompt:])


async def test_the_newline_after_a_turn_is_not_trained(args, template):
    sample = make_sample("service_issue")
    await generate(args, sample, PARAMS)
    response = sample.tokens[-sample.response_length :]
    ends = [i for i, token in enumerate(response[:-1]) if token == template.end_id and sample.loss_mask[i]]
    assert ends and all(sample.loss_mask[i + 1] == 0 for i in ends)


async def test_exactness_with_qwen3s_tokenizer_and_template(qwen3_tokenizer):
    """Its template writes a last agent turn differently and groups tool results: neither may change what was sent."""
    template = ChatTemplate(qwen3_tokenizer)
    model = FakeModel(template)
    with serving(model) as (host, port):
        for task in TASKS.values():
            agent = TokenAgent(template, f"http://{host}:{port}/generate", PARAMS)
            episode = await run_episode(task, agent, EpisodeConfig(prompt="official"))
            assert episode.reward == 1.0 and not model.broken_prefixes
            assert agent.token_ids == model.sessions[agent.headers["X-SMG-Routing-Key"]][1]
            assert len(agent.response_ids) == len(agent.loss_mask) == len(agent.log_probs)
            assert sum(agent.loss_mask) == agent.usage()["generated"]


async def test_a_rollout_and_an_sft_row_hold_the_same_words(args, model, template):
    """The text of a rollout is the full render of its messages: SFT and rollout speak one dialect."""
    sample = make_sample()
    await generate(args, sample, PARAMS)
    from tau2_domains import agent_tools, system_prompt

    messages = [{"role": "system", "content": system_prompt("telecom", "short")}, *sample.metadata["tau2"]["messages"]]
    full = template.tokenizer.apply_chat_template(messages, tools=agent_tools("telecom"), tokenize=False)
    assert template.tokenizer.decode(sample.tokens) == full.removesuffix("\n")


# ---------------------------------------------------------------------------------------------------------------------


async def test_a_cut_turn_ends_the_episode_as_truncated(args, model, template):
    ids = template.tokenizer.encode("Please check your network")
    model.behave = lambda number, payload: model.answer(ids, payload["input_ids"], "length") if number == 3 else None
    sample = await generate(args, make_sample(), PARAMS)
    assert sample.status is Sample.Status.TRUNCATED and sample.reward == 0.0 and not sample.remove_sample
    assert sample.metadata["tau2"]["end_reason"] == "response_cut"
    assert sample.tokens[-len(ids) :] == ids and sample.loss_mask[-len(ids) :] == [1] * len(ids)
    assert sample.metadata["tau2"]["checks"] is not None


async def test_the_response_budget_is_checked_before_a_call_and_never_exceeded(args, model):
    sample = await generate(args, make_sample(), {**PARAMS, "max_new_tokens": 150})
    assert sample.status is Sample.Status.TRUNCATED and sample.metadata["tau2"]["end_reason"] == "context_full"
    assert 0 < sample.response_length <= 150
    for request in model.requests:
        used = len(request["input_ids"]) - len(model.requests[0]["input_ids"])
        assert request["sampling_params"]["max_new_tokens"] <= 150 - used


async def test_no_more_tokens_are_demanded_than_there_is_room_for(args, model):
    """SGLang answers 400 where min_new_tokens is above max_new_tokens."""
    args.tau2_max_turn_tokens = 96
    for given, asked in ((5, 5), (100, 96)):
        model.requests.clear()
        await generate(args, make_sample(), {**PARAMS, "min_new_tokens": given})
        assert {request["sampling_params"]["min_new_tokens"] for request in model.requests} == {asked}


async def test_the_context_budget(args, model):
    await generate(args, make_sample(), PARAMS)
    prompt = len(model.requests[0]["input_ids"])
    args.rollout_max_context_len = prompt + 100
    sample = await generate(args, make_sample(), PARAMS)
    assert sample.metadata["tau2"]["end_reason"] == "context_full" and len(sample.tokens) <= prompt + 100
    args.rollout_max_context_len = prompt
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    assert f"no room for a turn ({prompt} prompt" in sample.metadata["tau2"]["bad_input"]


async def test_the_turn_cap_is_asked_for(args, model):
    args.tau2_max_turn_tokens = 96
    await generate(args, make_sample(), PARAMS)
    assert {request["sampling_params"]["max_new_tokens"] for request in model.requests} == {96}


async def test_an_aborted_call_removes_the_sample(args, model):
    model.behave = lambda number, payload: model.answer([5], payload["input_ids"], "abort") if number == 2 else None
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    assert sample.metadata["tau2"]["end_reason"] == "generation_aborted" and len(model.requests) == 2


async def test_slimes_abort_is_seen_between_turns(args, model, monkeypatch):
    state = SimpleNamespace(aborted=False)
    module = SimpleNamespace(GenerateState=lambda args: state)
    monkeypatch.setitem(generate_with_tau.sys.modules, "slime.rollout.sglang_rollout", module)

    def abort_later(number, payload):
        state.aborted = number >= 2

    model.behave = abort_later
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    assert len(model.requests) == 2


async def test_a_removed_sample_has_what_slime_replays_in_training(args, model):
    """slime converts a whole batch, and asks each of its samples for the experts and the nucleus of its tokens."""
    model.behave = lambda number, payload: 400
    vars(args).update(use_rollout_routing_replay=True, num_layers=3, moe_router_topk=2, rollout_top_p=0.9)
    sample = make_sample()
    sample.rollout_top_p_token_ids = None  # a field of slime's samples
    assert_removed(await generate(args, sample, PARAMS))
    experts = sample.rollout_routed_experts
    assert tuple(experts.shape) == (len(sample.tokens) - 1, 3, 2)
    assert all(int(experts[:, layer].count_nonzero()) for layer in range(3)), "all zero is a failed capture to slime"
    assert sample.rollout_top_p_token_offsets == [0, len(sample.rollout_top_p_token_ids)]
    assert len(sample.rollout_top_p_token_offsets) == sample.response_length + 1
    model.behave = lambda number, payload: None  # run again it has nothing left of them
    again = await generate(args, sample, PARAMS)
    assert again.reward == 1.0 and again.rollout_top_p_token_ids is None and again.rollout_routed_experts is None


async def test_a_server_error_is_tried_again(args, model):
    model.behave = lambda number, payload: 503 if number in (1, 3, 4) else None
    sample = await generate(args, make_sample(), PARAMS)
    assert sample.reward == 1.0


@pytest.mark.parametrize("status, calls", [(400, 2), (500, 6)])
async def test_what_stays_broken_is_removed_after_bounded_tries(args, model, status, calls):
    """A 400 is final for the call; the episode itself is tried once more (tau2_retries)."""
    model.behave = lambda number, payload: status
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    assert len(model.requests) == calls
    record = sample.metadata["tau2"]
    assert record["end_reason"] == "generation_failed" and str(status) in record["detail"]


async def test_a_hanging_server_is_given_up(args, model):
    model.delay, args.tau2_generate_timeout, args.tau2_retries = 5.0, 0.1, 0
    assert_removed(await asyncio.wait_for(generate(args, make_sample(), PARAMS), 5))


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "x"},
        {"meta_info": {}},
        {"meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[None, 5]]}},
        {"meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": []}},
    ],
)
async def test_an_answer_of_another_form_is_never_trained(args, model, answer):
    model.behave = lambda number, payload: copy.deepcopy(answer)
    assert_removed(await generate(args, make_sample(), PARAMS))


async def test_no_server_at_all(args, unused_tcp_port):
    args.sglang_router_port = unused_tcp_port
    assert_removed(await generate(args, make_sample(), PARAMS))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hf_checkpoint": None}, "hf-checkpoint"),
        ({"hf_checkpoint": "/no/such/folder"}, "/no/such/folder"),
        ({"tau2_prompt": "shrt"}, "shrt"),
        ({"partial_rollout": True}, "partial-rollout"),
        ({"tau2_max_steps": 0}, "max_steps"),
        ({"tau2_max_steps": 1}, "max_steps must be at least 2"),
    ],
)
async def test_a_mistake_in_the_settings_is_named_and_nothing_is_raised(args, change, named):
    vars(args).update(change)
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    assert named in sample.metadata["tau2"]["bad_input"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"tau2_promt": "short"}, "tau2_promt"),
        ({"tau2_prompt": "shrt"}, "shrt"),
        ({"partial_rollout": True}, "partial-rollout"),
        ({"tau2_data": "/no/such.jsonl"}, "/no/such.jsonl"),
    ],
)
def test_settings_can_be_checked_before_a_rollout(change, named):
    check_args(SimpleNamespace(tau2_prompt="short", tau2_max_turn_tokens=96))
    with pytest.raises(BadInput, match=named):
        check_args(SimpleNamespace(**change))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("retries", ["x", -1, 2.5, True, "1k", 101, [1]]),
        ("generate_timeout", ["5m", 0, -1, True, float("inf"), float("nan"), 10**400]),
        ("max_turn_tokens", ["1k", 0, True, 96.5]),
        ("max_steps", ["many", 0, 1e9]),
        ("max_errors", [False]),
        ("user_concurrency", ["all", 0]),
        ("redraw_ids", ["half", 2]),
        ("partial_alpha", [True, "x", -0.5]),
        ("customer_tool_penalty", [[0.1]]),
        ("partial_matching", [["sound"], 1]),
        ("prompt", [1, "", ["short"]]),
        ("user", [True, {}]),
        ("domain", [5]),
        ("data", [True, ["a.jsonl"]]),
        ("curriculum_tries", ["8x", 0]),
        ("curriculum_start", [[1], {}]),
    ],
)
async def test_no_setting_of_another_type_or_range_reaches_an_episode(args, model, name, values):
    """Each would break every episode, and a filter would have others drawn in their place for ever."""
    for value in values:
        vars(args)[f"tau2_{name}"] = value
        with pytest.raises(BadInput, match=f"^tau2_{name} is .*(give|choose)"):
            check_args(args)
        sample = await generate(args, make_sample(), PARAMS)
        assert_removed(sample)
        assert f"tau2_{name} is" in sample.metadata["tau2"]["bad_input"]
    assert not model.requests


def test_settings_are_taken_as_yaml_gives_them():
    given = {"retries": "2", "generate_timeout": "6e1", "redraw_ids": True, "user_args": None, "curriculum_start": "a"}
    found = read_settings(SimpleNamespace(**{f"tau2_{name}": value for name, value in given.items()}))
    assert (found.retries, found.generate_timeout, found.redraw_ids) == (2, 60.0, 1.0)
    assert (found.user_args, found.curriculum_start, found.max_steps) == ({}, ("a",), 200)
    assert read_settings(type("Args", (), {})()) == Settings()


@pytest.mark.parametrize("name", ["redraw_ids", "tau2_redraw_id", "user"])
def test_a_setting_that_is_misspelt_is_refused_with_the_likely_one(name):
    right = "tau2_user" if name == "user" else "tau2_redraw_ids"
    with pytest.raises(BadInput, match=rf"{name}\b.*[Dd]id you mean {right}\?"):
        read_settings(SimpleNamespace(**{name: 0.5}))
    assert not {flag.dest for flag in load_flags()} & set(NAMES), "a flag of slime would be taken for a bare setting"


async def test_a_customer_that_hangs_up_at_once_has_failed_and_the_input_has_not(args, model, monkeypatch):
    monkeypatch.setattr(ScriptedCustomer, "reply", lambda self, message: self._text("###STOP###"))
    sample = await generate(args, make_sample(), PARAMS)
    assert_removed(sample)
    record = sample.metadata["tau2"]
    assert record["end_reason"] == "user_failed" and "bad_input" not in record and not model.requests
    assert "before the agent's first turn" in record["detail"]


async def test_slimes_contract_with_bare_args():
    sample = await generate(type("Args", (), {})(), Sample(index=0, prompt="prompt"), {"temperature": 0.3})
    assert_removed(sample)
    assert "task_id" in sample.metadata["tau2"]["bad_input"]


async def test_cancellation_passes(args, model):
    model.delay = 5.0
    task = asyncio.create_task(generate(args, make_sample(), PARAMS))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---------------------------------------------------------------------------------------------------------------------


async def test_evaluation_mode_has_no_group_and_no_session_and_shares_its_parameters(args, model):
    shared = {**PARAMS, "temperature": 0.0}
    samples = [make_sample() for _ in range(3)]
    for index, sample in enumerate(samples):
        sample.group_index, sample.session_id, sample.index = None, None, index
    done = await asyncio.gather(*(generate(args, sample, shared, evaluation=True) for sample in samples))
    assert [sample.reward for sample in done] == [1.0, 1.0, 1.0]
    assert len({header["X-SMG-Routing-Key"] for header in model.headers}) == 3
    assert shared == {**PARAMS, "temperature": 0.0}


def evaluation_samples(args, tasks, *counts):
    """slime_local's samples of an evaluation; a data set for each number of samples of a prompt."""
    args.rollout_seed, args.eval_max_prompt_len = 42, None
    args.eval_datasets = [
        EvalDataset(f"set {n}", str(tasks), input_key="index", metadata_key="metadata", n_samples_per_eval_prompt=n)
        for n in counts
    ]
    return [_eval_samples(args, dataset) for dataset in args.eval_datasets]


async def test_who_the_customers_of_an_evaluation_are_does_not_depend_on_the_number_of_samples(args, tmp_path):
    write_jsonl(tmp_path / "tasks.jsonl", make_rows("telecom", "test", TASKS.values()))
    vars(args).update(tau2_user_args={"mood": "mixed"}, tau2_redraw_ids=0.5)
    met = {}
    for count in (1, 2):
        (samples,) = evaluation_samples(args, tmp_path / "tasks.jsonl", count)
        done = await asyncio.gather(*(generate(args, sample, PARAMS, evaluation=True) for sample in samples))
        records = [sample.metadata["tau2"] for sample in done]
        met[count] = [(r["task_id"], r["seed"], r["user"], r["redraw_ids"]) for r in records]
    assert met[2][::2] == met[1] and {seed for _, seed, _, _ in met[1]} == {42}
    assert {seed for _, seed, _, _ in met[2][1::2]} == {43}, "the second trial, as in evaluate_tau2.py"


def test_data_sets_with_different_numbers_of_samples_are_refused(args, tmp_path):
    write_jsonl(tmp_path / "tasks.jsonl", make_rows("telecom", "test", TASKS.values()))
    args.custom_generate_function_path = "generate_with_tau.generate"
    evaluation_samples(args, tmp_path / "tasks.jsonl", 1, 4)
    with pytest.raises(BadInput, match=r"1 and 4 samples of a prompt.*give them one n_samples_per_eval_prompt"):
        check_args(args)
    args.eval_datasets[0].custom_generate_function_path = "other.generate"
    check_args(args)


def test_a_share_of_an_evaluation_is_drawn_task_by_task(args):
    samples = [Sample(index=i) for i in range(40)]
    tasks = load_tasks("telecom", "test")
    settings = Settings(redraw_ids=0.5)
    drawn = [redraws_ids(args, settings, one, task) for one, task in zip(samples, tasks, strict=True)]
    assert 10 < sum(drawn) < 30


async def test_the_session_id_is_the_routing_key(args, model):
    await generate(args, make_sample(), PARAMS)
    assert {header["X-SMG-Routing-Key"] for header in model.headers} == {"abc"}


async def test_a_seed_moves_on_with_the_turns(args, model):
    await generate(args, make_sample(), {**PARAMS, "sampling_seed": 40})
    seeds = [request["sampling_params"]["sampling_seed"] for request in model.requests]
    assert seeds == list(range(40, 40 + len(seeds)))


async def test_a_group_meets_one_customer_and_another_group_another(args, model):
    args.tau2_redraw_ids = True
    samples = [make_sample(), make_sample(), make_sample()]
    samples[2].group_index = 4
    for i, sample in enumerate(samples):
        sample.session_id = str(i)
        await generate(args, sample, PARAMS)
    prompts = [sample.tokens[: -sample.response_length] for sample in samples]
    assert prompts[0] == prompts[1] != prompts[2]
    assert [sample.reward for sample in samples] == [1.0, 1.0, 1.0]


async def test_a_share_of_the_groups_gets_new_ids_and_the_record_says_which(args, model):
    args.tau2_redraw_ids = 0.5
    found = {}
    for group in range(8):
        for index in (2 * group, 2 * group + 1):
            sample = make_sample()
            sample.group_index, sample.index, sample.session_id = group, index, str(index)
            await generate(args, sample, PARAMS)
            prompt = tuple(sample.tokens[: -sample.response_length])
            found.setdefault(group, set()).add((sample.metadata["tau2"]["redraw_ids"], prompt))
    assert all(len(group) == 1 for group in found.values())
    groups = [group.pop() for group in found.values()]
    stock = {prompt for redrawn, prompt in groups if not redrawn}
    redrawn = [prompt for is_redrawn, prompt in groups if is_redrawn]
    assert len(stock) == 1 and len(set(redrawn)) == len(redrawn) > 1 and not stock & set(redrawn)


@pytest.mark.parametrize("value", [1.5, -0.1, "some", float("nan"), [True]])
def test_a_share_of_new_ids_that_is_none_is_refused(args, value):
    args.tau2_redraw_ids = value
    with pytest.raises(BadInput, match=r"tau2_redraw_ids is .* give true, false, or a share"):
        generate_with_tau.check_args(args)


async def test_tasks_are_found_by_id_and_by_index(args, tmp_path):
    task = TASKS["service_issue"]
    by_id = make_sample()
    by_id.metadata = {"domain": "telecom", "task_id": task.id}
    assert (await generate(args, by_id, PARAMS)).reward == 1.0
    args.tau2_data = tmp_path / "tasks.jsonl"
    row = generate_with_tau.json.dumps({"index": 5, "metadata": {"task": task.model_dump(mode="json")}})
    args.tau2_data.write_text(row + "\n")
    by_index = make_sample()
    by_index.metadata, by_index.prompt = {}, 5
    assert (await generate(args, by_index, PARAMS)).metadata["tau2"]["task_id"] == task.id
    by_index.metadata, by_index.prompt = {}, 6
    assert "index 6" in (await generate(args, by_index, PARAMS)).metadata["tau2"]["bad_input"]


async def test_a_broken_call_is_answered_to_the_model_and_not_shown_to_the_customer(args, model, template):
    text = '<tool_call>\n{"name": "get_customer_by_phone", "arguments": {"phone_number": }}\n</tool_call>'
    ids = [*template.tokenizer.encode(text), template.end_id]
    model.behave = lambda number, payload: model.answer(ids, payload["input_ids"]) if number == 1 else None
    sample = await generate(args, make_sample(), {**PARAMS, "max_new_tokens": 8000})
    messages = sample.metadata["tau2"]["messages"]
    assert messages[3]["role"] == "tool" and "not valid JSON" in messages[3]["content"]
    assert sample.metadata["tau2"]["tool_errors"] >= 1
    assert sample.tokens[sample.tokens.index(ids[0]) :] and sample.loss_mask[: len(ids)] == [1] * len(ids)


async def test_a_turn_that_another_stop_token_ended_is_closed_untrained(args, model, template):
    end_of_text = template.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [*template.tokenizer.encode("Okay."), end_of_text]
    limits = TokenLimits(response=400)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    model.behave = lambda number, payload: model.answer(ids, payload["input_ids"])
    agent = TokenAgent(template, url, PARAMS, limits)
    episode = await run_episode(TASKS["mms_issue"], agent, EpisodeConfig(prompt="short"))
    assert agent.turns[1].before[0] == template.end_id and agent.loss_mask[len(ids)] == 0
    assert all("<|" not in (message["content"] or "") for message in episode.messages)


async def test_many_episodes_share_one_loop(args, model):
    samples = [make_sample() for _ in range(64)]
    for index, sample in enumerate(samples):
        sample.session_id, sample.group_index = str(index), index
    done = await asyncio.gather(*(generate(args, sample, PARAMS) for sample in samples))
    assert all(sample.reward == 1.0 for sample in done) and not model.broken_prefixes


def test_nothing_of_the_hosts_is_imported():
    """The folder works when it is copied elsewhere: no slime, no slime_local at import time."""
    import subprocess
    import sys

    code = "import sys, generate_with_tau, tau2_reward_shaping; print({m.split('.')[0] for m in sys.modules})"
    folder = generate_with_tau.Path(generate_with_tau.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert "'aiohttp'" in result.stdout and "'slime'" not in result.stdout and "'slime_local'" not in result.stdout


def test_a_rollouts_defaults_are_those_of_an_episode():
    """Written twice: the reward plug-in reads its settings without importing the episode."""
    assert generate_with_tau.episode_config(Settings(), {}) == EpisodeConfig()

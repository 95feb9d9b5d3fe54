"""The agent behind a chat-completions endpoint, against a stand-in that misbehaves: turns, faults, keys, resuming."""

import json
import logging
import socket
import time
from email.utils import formatdate

import pytest
from fake_openai import FakeAgent, serving_openai

import chat_agent
import http_client
from chat_agent import ChatAgent, Endpoint, read_message
from evaluate_tau2 import main
from http_client import close_session
from openai_tool_adapter import parse_turn
from retry_wait import LONGEST_ASKED, LONGEST_WAIT, asked_seconds, seconds_to_wait
from tau2_domains import agent_tools, load_tasks
from tau2_episode import INVALID_TOOL_CALL, EndReason, EpisodeConfig, run_episode
from tau2_llm_customer import KEY_VARIABLES

pytestmark = pytest.mark.usefixtures("own_signal_handler")

TASK = load_tasks("telecom", "test")[0]
KEY = "canary-of-no-known-form-0123456789"
TOOLS = agent_tools("telecom")
PHONE = '{"phone_number": "555-123-2002"}'


@pytest.fixture(autouse=True)
async def impatient(monkeypatch):
    for names in KEY_VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.01)
    yield
    await close_session()


@pytest.fixture
def provider():
    return FakeAgent()


@pytest.fixture
def base(provider):
    with serving_openai(provider) as address:
        yield address


@pytest.fixture
def evaluate(base, tmp_path):
    """Runs main() against the stand-in; gives (exit code, result or None)."""
    output = tmp_path / "eval.json"

    def run(*flags, llm="a-model", url=base):
        agent = ["--agent", "chat", "--agent-llm", llm, "--agent-base-url", url]
        code = main([*agent, "--prompt", "short", "--output-path", str(output), *flags])
        return code, json.loads(output.read_text()) if output.exists() else None

    run.output, run.rows = output, tmp_path / "eval.rows.jsonl"
    return run


async def play(base, seed=None, task=TASK, **settings):
    params = {"temperature": 0.0, "max_tokens": 500}
    agent = ChatAgent(Endpoint(base, "a-model", params, **{"timeout": 5, "num_retries": 2, **settings}), seed)
    return await run_episode(task, agent, EpisodeConfig(prompt="short")), agent


def misbehave(provider, how, first=2, last=10**6):
    provider.behave = lambda number, body: how if first <= number <= last else None


def call(name, arguments, call_id="c"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def choice(content=None, *calls, finish="stop"):
    message = {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}
    return {"index": 0, "finish_reason": finish, "message": message}


# -- an episode ------------------------------------------------------------------------------------------------------


async def test_a_solved_episode(provider, base):
    episode, agent = await play(base)
    assert episode.reward == 1.0 and not provider.odd_turns and set(provider.keys) == {None}
    first, last = provider.requests[0], provider.requests[-1]
    assert first["tools"] == TOOLS and first["messages"] == episode.messages[:3] and "seed" not in first
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("a-model", 0.0, 500)
    assert last["messages"][: len(first["messages"])] == first["messages"]
    usage, turns = agent.usage(), episode.agent_turns
    assert (
        turns == len(provider.requests) and usage["generated"] == 7 * turns and usage["prompt"] > usage["cached"] > 0
    )


async def test_a_seed_moves_on_with_the_turns(provider, base):
    await play(base, seed=40)
    assert [request["seed"] for request in provider.requests] == list(range(40, 40 + len(provider.requests)))


async def test_null_leaves_a_field_out(provider, base):
    endpoint = Endpoint(base, "a-model", {"max_tokens": None, "max_completion_tokens": 9, "top_p": 0.5})
    await run_episode(TASK, ChatAgent(endpoint), EpisodeConfig(prompt="short"))
    assert "max_tokens" not in provider.requests[0] and provider.requests[0]["max_completion_tokens"] == 9


# -- one turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("get_customer_by_phone", '{"phone_number": '),
        ("get_customer_by_phone", "[1]"),
        ("get_customer_by_phone", "{}"),
        ("get_customer_by_phone", '{"number": "1"}'),
        ("get_customer_by_phone", '{"phone_number": "1", "x": 2}'),
        ("fly", "{}"),
        ("no name of any tool: ünï 💥", "{}"),
        ("get_customer_by_phone", "[" * 100_000),
        (None, "{}"),
    ],
)
async def test_a_call_that_cannot_be_executed_is_an_error_and_the_dialogue_goes_on(provider, base, name, arguments):
    misbehave(provider, choice(None, call(name, arguments)), 2, 2)
    episode, _ = await play(base)
    assert (episode.reward, episode.tool_errors) == (1.0, 1) and len(provider.odd_turns) > 0
    sent = provider.requests[2]["messages"]
    assert sent[-1]["content"].startswith("Error: ") and sent[-1]["tool_call_id"] == sent[-2]["tool_calls"][0]["id"]


@pytest.mark.parametrize(
    "name, arguments",
    [("fly", "{}"), ("get_customer_by_phone", '{"number": "1"}'), ("get_customer_by_phone", "{}")],
)
def test_calls_are_judged_as_those_of_token_agents(name, arguments):
    text = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    (expected,) = parse_turn(text, TOOLS).turn.tool_calls
    (found,) = read_message({"content": None, "tool_calls": [call(name, arguments)]}, TOOLS).turn.tool_calls
    assert (found.name, found.error) == (expected.name, expected.error) and found.name == INVALID_TOOL_CALL


@pytest.mark.parametrize("arguments", ["", None, "{}", {}, "null"])
def test_a_call_without_arguments_however_it_is_written(arguments):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    (found,) = read_message({"content": "", "tool_calls": [call("f", arguments)]}, tools).turn.tool_calls
    assert (found.name, found.arguments, found.error) == ("f", {}, None)


async def test_text_beside_a_call_is_not_delivered(provider, base):
    misbehave(provider, choice("Turn airplane mode off.", call("get_customer_by_phone", PHONE)), 1, 1)
    episode, agent = await play(base)
    assert agent.asides == 1
    assert all("airplane mode off" not in (message.content or "") for message in episode.simulation.messages[:4])
    assert provider.requests[1]["messages"][3]["content"] == "Turn airplane mode off.", "but the model remembers it"


@pytest.mark.parametrize("ids", [("x", "y"), ("same", "same"), ("", None)])
async def test_parallel_calls_are_kept_in_order(provider, base, ids):
    calls = [
        call("get_details_by_id", json.dumps({"id": i}), id_) for i, id_ in zip(("L1002", "P1002"), ids, strict=True)
    ]
    misbehave(provider, choice(None, *calls), 1, 1)
    episode, _ = await play(base)
    *_, turn, first, second = provider.requests[1]["messages"]
    assert "L1002" in first["content"] and "P1002" in second["content"] and episode.reward == 1.0
    assert [made["id"] for made in turn["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    if ids == ("x", "y"):
        assert [first["tool_call_id"], second["tool_call_id"]] == ["x", "y"]


@pytest.mark.parametrize("content", [None, "", " \n", [], "<think>what now?</think>"])
async def test_an_empty_turn_is_an_error_and_the_dialogue_goes_on(provider, base, content):
    misbehave(provider, choice(content), 2, 2)
    episode, _ = await play(base)
    assert (episode.reward, episode.tool_errors) == (1.0, 1)
    before, sent = provider.requests[1]["messages"], provider.requests[2]["messages"]
    said = [{"role": "assistant", "content": content}] if content and content.strip() else []
    assert sent[len(before) : -1] == said, "nothing is sent back that was never said"
    assert sent[-1]["role"] == "user" and "empty" in sent[-1]["content"]


@pytest.mark.parametrize("name, arguments", [("fly", {}), ("get_customer_by_phone", json.loads(PHONE))])
async def test_a_call_that_the_server_left_in_the_text(provider, base, name, arguments):
    text = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    misbehave(provider, choice(f"<think>hm</think>Let me see. {text}"), 2, 2)
    episode, agent = await play(base)
    assert (episode.reward, episode.tool_errors, agent.asides) == (1.0, name == "fly", 1)
    *_, turn, _ = provider.requests[2]["messages"]
    assert turn["content"] == "Let me see.", "the call goes back once"
    assert [made["function"]["name"] for made in turn["tool_calls"]] == [name]


async def test_a_call_of_the_old_form(provider, base):
    message = {"role": "assistant", "content": None, "function_call": call("get_customer_by_phone", PHONE)["function"]}
    misbehave(provider, {"index": 0, "finish_reason": "function_call", "message": message}, 1, 1)
    episode, _ = await play(base)
    assert (episode.reward, episode.tool_errors) == (1.0, 0)
    assert episode.messages[3]["tool_calls"][0]["function"]["name"] == "get_customer_by_phone"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_a_thought_that_the_server_keeps_apart_is_counted(provider, base, name):
    for said in (choice("Hello."), choice(None, call("get_customer_by_phone", PHONE))):
        said["message"][name] = "The customer wants help."
        misbehave(provider, said, len(provider.requests) + 1, len(provider.requests) + 1)
        assert (await play(base))[1].asides == 1


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}, "Hello"),
        ({"content": None, "refusal": "I can't."}, "I can't."),
        ({"content": "<think>hm</think>Hello"}, "Hello"),
    ],
)
def test_texts_of_other_forms(message, text):
    assert read_message({"tool_calls": [], **message}, TOOLS).turn.content == text


async def test_half_a_surrogate_pair_can_be_written(provider, base):
    misbehave(provider, choice("Please \ud83d help", call("\udc00", "{}"), finish="stop"), 1, 2)
    episode, _ = await play(base)
    assert episode.reward == 1.0
    json.dumps([episode.messages, episode.simulation.model_dump(mode="json")], ensure_ascii=False).encode()


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, reason",
    [
        (choice("Please", finish="length"), EndReason.CONTEXT_FULL),  # 7 of 500 tokens
        (choice("Please", finish="content_filter"), EndReason.RESPONSE_CUT),
        (choice("Please", finish="abort"), EndReason.GENERATION_ABORTED),
        ((400, "This model's maximum context length is 4096 tokens."), EndReason.CONTEXT_FULL),
        ((400, "the request exceeds the available context size"), EndReason.CONTEXT_FULL),
        (
            (400, "The input (9000 tokens) is longer than the model's context length (8192 tokens)."),
            EndReason.CONTEXT_FULL,
        ),
        ((400, "prompt is too long: 9 tokens > 8 maximum"), EndReason.CONTEXT_FULL),
        ((400, "tool_choice is unknown"), EndReason.GENERATION_FAILED),
        ((401, "who are you?"), EndReason.GENERATION_FAILED),
        ((404, "no such model"), EndReason.GENERATION_FAILED),
        ((307, "elsewhere"), EndReason.GENERATION_FAILED),
    ],
)
async def test_what_ends_an_episode_at_once(provider, base, how, reason):
    misbehave(provider, how, 3)
    episode, _ = await play(base)
    assert episode.end_reason is reason and len(provider.requests) == 3
    assert (episode.reward is None) == reason.is_infrastructure


async def test_a_turn_of_full_length_is_cut(provider, base):
    misbehave(provider, choice("Please", finish="length"), 3)
    agent = ChatAgent(Endpoint(base, "a-model", {"max_tokens": 7}))
    episode = await run_episode(TASK, agent, EpisodeConfig(prompt="short"))
    assert episode.end_reason is EndReason.RESPONSE_CUT and episode.reward == 0.0 and episode.checks


def with_error():
    """OpenRouter's, of a provider behind it."""
    return {**choice("", finish="error"), "error": {"code": 502, "message": "Upstream error"}}


ERRORS_OF_200 = [
    with_error(),
    {**with_error(), "finish_reason": "stop"},
    choice("", finish="insufficient_system_resource"),
    choice("Please", finish="unheard_of"),
    choice("Please", finish=["stop"]),
]


@pytest.mark.parametrize("how", ERRORS_OF_200)
async def test_an_error_within_status_200_is_no_turn_of_the_model(provider, base, how):
    misbehave(provider, how, 3, 3)
    assert (await play(base))[0].reward == 1.0 and not provider.odd_turns
    misbehave(provider, how, 3)
    episode, _ = await play(base)
    assert (episode.end_reason, episode.reward) == (EndReason.GENERATION_FAILED, None)
    assert "Upstream" in episode.detail if "error" in how else "ended with" in episode.detail


@pytest.mark.parametrize("finish", [None, "stop", "tool_calls", "function_call", "eos", "end_turn"])
async def test_ways_to_end_a_turn(provider, base, finish):
    misbehave(provider, choice("Hello.", finish=finish), 1, 1)
    assert (await play(base))[0].reward == 1.0


def test_an_endpoint_whose_context_cannot_hold_the_prompt_is_no_model_that_failed(evaluate, provider, capsys):
    misbehave(provider, (400, "This model's maximum context length is 4096 tokens."), 2)
    assert evaluate("--num-tasks", "2") == (2, None)
    one_line(capsys, "no room for a turn", "4096 tokens")


TRANSIENT = [429, 500, 503, 408, "drop", "no choices", "hang", "trickle"]


@pytest.mark.parametrize("how", TRANSIENT)
async def test_what_a_retry_mends_leaves_no_trace(provider, base, how):
    misbehave(provider, how, 3, 3)
    episode, agent = await play(base, timeout=0.5 if how in ("hang", "trickle") else 5)
    assert (episode.reward, episode.detail) == (1.0, "") and not provider.odd_turns
    assert provider.requests[2] == provider.requests[3] and agent.usage()["generated"] == 7 * episode.agent_turns


@pytest.mark.parametrize("how", [429, 500, "drop", "no choices", "hang", "trickle"])
async def test_what_stays_broken_ends_the_episode_without_a_reward(provider, base, how):
    misbehave(provider, how)
    episode, _ = await play(base, timeout=0.2 if how in ("hang", "trickle") else 5)
    assert (episode.end_reason, episode.reward) == (EndReason.GENERATION_FAILED, None)
    assert len(provider.requests) == 1 + 3 and "3 attempts" in episode.detail


async def test_an_answer_that_is_no_json_is_not_taken_for_a_turn(provider, base):
    misbehave(provider, "html")
    episode, _ = await play(base)
    assert episode.end_reason is EndReason.GENERATION_FAILED and "not JSON" in episode.detail


async def test_an_answer_without_an_end_is_given_up(provider, base, monkeypatch):
    monkeypatch.setattr(http_client, "LARGEST_ANSWER", 5000)
    misbehave(provider, choice("x" * 10_000))
    episode, _ = await play(base)
    assert episode.end_reason is EndReason.GENERATION_FAILED and "larger" in episode.detail


async def test_no_server_at_all(unused_tcp_port):
    episode, _ = await play(f"http://127.0.0.1:{unused_tcp_port}/v1", num_retries=0)
    assert episode.end_reason is EndReason.GENERATION_FAILED and str(unused_tcp_port) in episode.detail


async def test_the_server_says_when_to_come_back(provider, base):
    misbehave(provider, 429, 2, 2)
    provider.retry_after = "1"
    began = time.monotonic()
    assert (await play(base))[0].reward == 1.0 and time.monotonic() - began >= 1.0


def test_a_wait_is_bounded_and_may_be_a_date(caplog):
    assert asked_seconds("7") == 7 and asked_seconds(" 2.5 ") == 2.5
    assert 25 < asked_seconds(formatdate(time.time() + 30, usegmt=True)) <= 30
    nothing = ("soon", "", "²", "-5", "1e3", "Mon, 01 Jan 0000 00:00:00 GMT")
    assert {asked_seconds(text) for text in nothing} == {0.0}
    assert seconds_to_wait(1, 1.0, "120") == 120 and not caplog.text
    assert seconds_to_wait(1, 1.0, "100000") == LONGEST_ASKED and "asks to wait 100000 s" in caplog.text
    assert seconds_to_wait(30, 1.0) == LONGEST_WAIT


# -- before any episode ----------------------------------------------------------------------------------------------


def test_the_preflight_is_one_completion_with_one_tool(evaluate, provider):
    code, _ = evaluate("--num-tasks", "1", "--max-turn-tokens", "300")
    assert code == 0
    preflight, *episode = provider.requests
    assert len(preflight["messages"]) == len(preflight["tools"]) == 1 and preflight["max_tokens"] == 256
    assert all(request["messages"][0]["role"] == "system" and request["max_tokens"] == 300 for request in episode)


def one_line(capsys, *parts):
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert all(part in captured.err for part in parts), captured.err


@pytest.mark.parametrize(
    "how, requests, named",
    [
        (401, 1, "OPENAI_API_KEY is not set"),
        ((404, "The model `a-model` does not exist."), 1, "no such model"),
        ((400, '"auto" tool choice requires --enable-auto-tool-choice'), 1, "--enable-auto-tool-choice"),
        (500, 3, "500"),
        ("html", 1, "not JSON"),
    ],
)
def test_a_preflight_that_fails_is_one_line(evaluate, provider, capsys, how, requests, named):
    misbehave(provider, how, 1)
    code, _ = evaluate()
    assert code == 2 and len(provider.requests) == requests
    one_line(capsys, named, "a-model")


def test_after_a_preflight_that_failed_another_model_may_be_named(evaluate, provider):
    misbehave(provider, 404, 1, 1)
    assert evaluate("--num-tasks", "1", llm="a-modle")[0] == 2
    assert evaluate("--num-tasks", "1")[0] == 0


def test_a_refused_connection_is_one_line(evaluate, capsys, unused_tcp_port):
    assert evaluate(url=f"http://127.0.0.1:{unused_tcp_port}/v1")[0] == 2
    one_line(capsys, f"127.0.0.1:{unused_tcp_port}", "Cannot connect")


def test_an_endpoint_that_ignores_tools_is_refused(evaluate, provider, capsys):
    provider.reads_tools = False
    assert evaluate()[0] == 2
    one_line(capsys, "ignores tools", "--enable-auto-tool-choice")


def test_a_weak_model_that_does_not_call_the_probe_is_evaluated(evaluate, provider):
    provider.calls_the_probe = False
    code, result = evaluate("--num-tasks", "1")
    assert code == 0 and result["pass_at_1"] == 1.0


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--agent-llm", ""], "--agent-llm"),
        (["--agent-base-url", ""], "--agent-base-url"),
        (["--agent-base-url", "127.0.0.1:8000"], "http://127.0.0.1:8000/v1"),
        (["--agent-base-url", f"http://me:{KEY}@127.0.0.1/v1"], "environment"),
        (["--agent-base-url", f"http://127.0.0.1/v1?api_key={KEY}"], "environment"),
        (["--agent-llm-args", json.dumps({"api_key": KEY})], "environment"),
        (["--agent-llm-args", json.dumps({"extra": {"Authorization": KEY}})], "environment"),
        (["--agent-llm-args", '{"model": "x"}'], "model"),
        (["--agent-llm-args", '{"stream": true}'], "stream"),
        (["--agent-llm-args", '{"seed": 1}'], "--seed"),
        (["--agent-llm-args", '{"timeout": 0}'], "timeout"),
        (["--agent-llm-args", '{"timeout": Infinity}'], "timeout"),
        (["--agent-llm-args", '{"num_retries": -1}'], "num_retries"),
        (["--agent-llm-args", '{"temperature": "1.0"}'], "temperature"),
        (["--agent-llm-args", '{"temperature": -1}'], "temperature"),
        (["--agent-llm-args", '{"max_completion_tokens": 1.5}'], "max_completion_tokens"),
        (["--agent-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--agent-key-env", "sk-abcdefghijklmnop"], "not a key"),
        (["--max-context-len", "100"], "--max-context-len"),
    ],
)
def test_bad_flags(evaluate, provider, capsys, tmp_path, flags, named):
    assert evaluate(*flags)[0] == 2
    captured = capsys.readouterr()
    assert named in captured.err and captured.err.count("\n") == 1
    assert KEY not in captured.err + captured.out and "sk-" not in captured.err
    assert not list(tmp_path.iterdir()) and not provider.requests


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [401, 429, 500, None])
@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "MY_SERVER_PASS"])
def test_a_key_reaches_no_file_and_no_message(evaluate, provider, tmp_path, monkeypatch, caplog, capfd, how, variable):
    """The provider repeats the key in its errors, as some do."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(variable, KEY)
    misbehave(provider, how, 4, 60)
    code, _ = evaluate("--agent-key-env", variable, "--num-tasks", "3", "--max-concurrency", "1")
    out, err = capfd.readouterr()
    assert code == (1 if how else 0) and set(provider.keys) == {f"Bearer {KEY}"}
    assert not how or "***" in err
    files = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in out + err + caplog.text + files


async def test_a_key_is_in_no_traceback(provider, base, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint(base, "a-model", {}, num_retries=0)
    for how in (401, 500):
        misbehave(provider, how, 1)
        with pytest.raises(http_client.RequestFailed) as error:
            await endpoint.complete([], [])
        assert error.value.__cause__ is None and error.value.__context__ is None
        assert KEY not in repr(error.value) and KEY not in repr(endpoint)


# -- the evaluator ---------------------------------------------------------------------------------------------------


def test_all_test_tasks_are_solved_as_the_teacher_solves_them(evaluate, provider, capsys):
    code, result = evaluate()
    assert code == 0 and (result["total_tasks"], result["successes"]) == (40, 40)
    assert result["agent"] == "chat" and result["agent_llm"] == "a-model" and not provider.odd_turns
    assert result["tokens"]["generated"] == 7 * (len(provider.requests) - 1)
    assert "a-model" in capsys.readouterr().out


def test_trials_are_sampled_with_seeds_of_their_own(evaluate, provider):
    code, _ = evaluate("--num-tasks", "2", "--num-trials", "2", "--temperature", "0.7")
    first = [r["seed"] for r in provider.requests if len(r["messages"]) == 3]
    assert code == 0 and len(set(first)) == 4 and {r["temperature"] for r in provider.requests} == {0.7}


@pytest.mark.parametrize(
    "arguments, temperature, limit, is_seeded",
    [
        ({"temperature": 1.0, "max_tokens": 33, "timeout": 60}, 1.0, 33, True),
        ({"temperature": 0}, 0, 1024, False),
        ({"temperature": None, "max_tokens": None, "max_completion_tokens": 2048}, None, 2048, True),
        ({"max_tokens": None}, 0.7, None, True),
    ],
)
def test_the_result_records_what_is_sent(evaluate, provider, arguments, temperature, limit, is_seeded):
    _, result = evaluate(*("--num-tasks", "1", "--temperature", "0.7"), *("--agent-llm-args", json.dumps(arguments)))
    _, *requests = provider.requests
    for recorded in (result, result["settings"]):
        assert (recorded["temperature"], recorded["max_turn_tokens"]) == (temperature, limit)
    sent = {name: value for name, value in requests[0].items() if name not in ("model", "messages", "tools", "seed")}
    assert result["info"]["agent_info"]["llm_args"] == sent and sent.get("temperature") == temperature
    assert [("seed" in request) for request in requests] == [is_seeded] * len(requests)


def test_a_temperature_among_the_arguments_is_sampled_with_seeds(evaluate, provider):
    assert evaluate("--num-tasks", "2", "--agent-llm-args", '{"temperature": 1.0}')[0] == 0
    assert len({r["seed"] for r in provider.requests if len(r["messages"]) == 3}) == 2


def test_what_stays_broken_is_owed_and_the_same_command_runs_only_that(evaluate, provider, capsys):
    misbehave(provider, 400, 20)
    code, result = evaluate("--num-tasks", "4", "--max-concurrency", "1")
    assert code == 1 and result is None and "generation_failed" in capsys.readouterr().err
    there = len(evaluate.rows.read_text().splitlines()) - 1
    provider.behave = lambda number, body: None
    before = len(provider.requests)
    code, result = evaluate("--num-tasks", "4", "--max-concurrency", "1")
    assert code == 0 and 0 < there < 4 and result["pass_at_1"] == 1.0
    assert sum(len(r["messages"]) == 3 for r in provider.requests[before:]) == 4 - there


@pytest.mark.parametrize(
    "change", [{"llm": "b-model"}, {"url": "http://127.0.0.1:1/v1"}, {"args": ["--agent-llm-args", '{"top_p": 0.5}']}]
)
def test_rows_of_another_model_are_refused_and_untouched(evaluate, provider, capsys, change):
    evaluate("--num-tasks", "1")
    before, asked = evaluate.rows.read_bytes(), len(provider.requests)
    assert evaluate("--num-tasks", "1", *change.pop("args", []), **change)[0] == 2
    assert "other settings" in capsys.readouterr().err and evaluate.rows.read_bytes() == before
    assert len(provider.requests) == asked


def test_a_run_goes_on_with_more_patience(evaluate):
    assert evaluate("--num-tasks", "1", "--agent-llm-args", '{"timeout": 5, "num_retries": 0}')[0] == 0
    code, result = evaluate("--num-tasks", "2", "--agent-llm-args", '{"timeout": 60}')
    assert code == 0 and result["settings"]["model"]["args"] == {}


def test_rows_with_line_separators_in_a_text_are_read_again(evaluate, provider):
    misbehave(provider, choice("Hello\u2028there\x85!"), 2, 2)
    _, first = evaluate("--num-tasks", "1")
    code, second = evaluate("--num-tasks", "1")
    assert code == 0 and first["results"] == second["results"]


def test_a_complete_run_asks_nobody(evaluate, provider, monkeypatch):
    _, first = evaluate("--num-tasks", "1")
    asked = len(provider.requests)
    _, second = evaluate("--num-tasks", "1")
    assert len(provider.requests) == asked and first["results"] == second["results"]


def test_a_server_that_accepts_and_says_nothing(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(chat_agent, "PREFLIGHT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert evaluate(url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1")[0] == 2
    one_line(capsys, "Timeout")

"""The customer played by a model, against a stand-in provider that misbehaves in every way that counts."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from fake_generate import FakeModel, serving
from fake_openai import FakeProvider, serving_openai

import evaluate_tau2
import generate_with_tau
import tau2_llm_customer
import teacher_traces
from http_client import close_session
from openai_tool_adapter import load_chat_template
from slime_local.sample import Sample
from tau2_domains import load_tasks
from tau2_episode import EndReason, EpisodeConfig, check_customer, episode_to_row, run_episode
from tau2_errors import BadInput
from tau2_llm_customer import KEY_VARIABLES, explain, mask
from tau2_reward_shaping import tau2_reward_post_process
from tau2_teacher import ScriptedTeacher
from tau2_users import make_customer

pytestmark = pytest.mark.usefixtures("own_signal_handler")

TASKS = load_tasks("telecom", "test")
TASK = next(task for task in load_tasks("telecom", "full") if "[service_issue]airplane_mode_on[" in task.id)
KEY = "sk-abcdefghijklmnop0123456789"
MODEL = "openai/some-model"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for names in KEY_VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tau2_llm_customer, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(tau2_llm_customer, "GRACE", 0.3)
    monkeypatch.setattr(tau2_llm_customer, "_preflights", {})
    monkeypatch.setattr(tau2_llm_customer, "_left_behind", set())


@pytest.fixture
def provider():
    return FakeProvider([TASK, *TASKS])


@pytest.fixture
def base(provider):
    with serving_openai(provider) as address:
        yield address


def config_for(base, model=MODEL, concurrency=32, **args):
    args = {"api_base": base, "timeout": 5, "num_retries": 1, **args}
    return EpisodeConfig(user=model, user_args=args, user_concurrency=concurrency)


async def play(config, task=TASK, **options):
    return await run_episode(task, ScriptedTeacher(), config, **options)


def misbehave(provider, how, first=2, last=10**6):
    provider.behave = lambda number, body: how if first <= number <= last else None


# -- an episode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TASK, TASKS[0], TASKS[20], TASKS[39]], ids=lambda task: task.id[:24])
async def test_an_episode_with_a_model_as_the_customer(provider, base, task):
    episode = await play(config_for(base), task)
    assert episode.reward == 1.0 and episode.end_reason in (EndReason.USER_STOP, EndReason.TRANSFER)
    assert not provider.broken_histories
    sent = provider.requests[-1]
    assert sent["model"] == "some-model" and sent["temperature"] == 0.0 and sent["tool_choice"] == "auto"
    assert {tool["function"]["name"] for tool in sent["tools"]} >= {"toggle_airplane_mode", "check_status_bar"}
    assert set(provider.keys) == {"Bearer none"}, "no key in the environment, none invented"
    user = episode_to_row(episode)["user"]
    assert (user["kind"], user["model"], user["args"]) == ("llm", MODEL, {"temperature": 0.0, "api_base": base})


TRANSIENT = [429, 500, 502, 503, 408, "drop", "html", "empty", "blank", "no choices", "broken", "list", "hang"]


@pytest.mark.parametrize("how", TRANSIENT)
async def test_what_a_retry_mends_leaves_no_trace(provider, base, how):
    """Once, in the middle; the reply after it continues the same dialogue."""
    timeout = 0.5 if how == "hang" else 5
    misbehave(provider, how, 3, 3)
    episode = await play(config_for(base, timeout=timeout))
    assert (episode.reward, episode.detail) == (1.0, "")
    third, fourth = provider.requests[2:4]
    assert third["messages"] == fourth["messages"] and not provider.broken_histories


@pytest.mark.parametrize("how", [429, 500, "drop", "empty", "broken", "hang"])
async def test_what_stays_broken_ends_the_episode_without_a_reward(provider, base, how):
    misbehave(provider, how)
    episode = await play(config_for(base, timeout=0.2 if how == "hang" else 5))
    assert (episode.end_reason, episode.reward, episode.checks) == (EndReason.USER_FAILED, None, None)
    assert len(provider.requests) == 1 + 2 and "2 tries" in episode.detail and MODEL in episode.detail


@pytest.mark.parametrize(
    "status, named", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, MODEL), (400, "400")]
)
async def test_what_no_retry_mends_fails_at_once(provider, base, status, named):
    misbehave(provider, status)
    episode = await play(config_for(base, num_retries=5))
    assert episode.end_reason is EndReason.USER_FAILED and len(provider.requests) == 2
    assert named in episode.detail and base in episode.detail and "\n" not in episode.detail


async def test_no_server_at_all(unused_tcp_port):
    episode = await play(config_for(f"http://127.0.0.1:{unused_tcp_port}/v1"))
    assert episode.end_reason is EndReason.USER_FAILED and episode.reward is None
    assert "no connection" in episode.detail


async def test_the_server_says_when_to_come_back(provider, base):
    misbehave(provider, 429, 2, 2)
    provider.retry_after = "1"
    began = time.monotonic()
    assert (await play(config_for(base))).reward == 1.0
    assert time.monotonic() - began >= 1.0


async def test_a_step_that_was_given_up_changes_nothing_when_it_ends_after_all(provider, base):
    misbehave(provider, None)
    config = config_for(base)
    customer = make_customer(config.user, config.user_args, TASK, lambda: None, seed=0)
    from tau2.data_model.message import AssistantMessage

    late = customer._step(AssistantMessage(role="assistant", content="Hi! How can I help you today?"))
    assert late[1].messages and customer.state.messages == []


# -- time ------------------------------------------------------------------------------------------------------------


async def test_a_hanging_customer_stalls_nobody_and_is_given_up(provider, base):
    misbehave(provider, "hang")
    task = asyncio.create_task(play(config_for(base, timeout=0.6, num_retries=0)))
    turns_of_the_loop = 0
    while not task.done():
        await asyncio.sleep(0.01)
        turns_of_the_loop += 1
    assert task.result().end_reason is EndReason.USER_FAILED
    assert turns_of_the_loop > 5, "the event loop went on"


async def test_bytes_that_never_end_are_cut_off_and_those_left_behind_are_counted(provider, base):
    """litellm's time-out is between bytes, so it never comes."""
    misbehave(provider, "trickle", 1)
    config = config_for(base, concurrency=2, timeout=0.3, num_retries=0)
    for _ in range(2):
        episode = await asyncio.wait_for(play(config), 20)  # the bytes go on for 30 seconds
        assert "no reply within" in episode.detail
    asked = len(provider.requests)
    assert "2 earlier call(s) that were given up still hang" in (await play(config)).detail
    assert len(provider.requests) == asked


async def test_the_end_of_a_rollout_does_not_wait_for_a_hanging_customer(provider, base):
    misbehave(provider, "hang")
    began = time.monotonic()
    config = config_for(base, timeout=60, num_retries=4)
    # the reply would take 60 seconds
    episode = await asyncio.wait_for(play(config, should_stop=lambda: time.monotonic() - began > 0.5), 30)
    assert episode.end_reason is EndReason.GENERATION_ABORTED


async def test_cancelling_does_not_wait_either(provider, base):
    misbehave(provider, "hang")
    task = asyncio.create_task(play(config_for(base, timeout=60)))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)  # the reply would take 60 seconds


async def test_calls_at_a_time_are_limited(provider, base):
    provider.delay = 0.02
    config = config_for(base, concurrency=3)
    episodes = await asyncio.gather(*(play(config, seed=seed) for seed in range(8)))
    assert [episode.reward for episode in episodes] == [1.0] * 8 and not provider.broken_histories
    assert 2 <= provider.most_running <= 3  # how many overlap below the limit is the machine's affair


def test_a_process_ends_although_a_customer_hangs(provider, base):
    """Threads of an executor would be waited for."""
    misbehave(provider, "trickle", 1)
    code = f"""
import tau2_llm_customer as c
c.GRACE = 0.2
try:
    c.check({MODEL!r}, {{"api_base": {base!r}, "timeout": 1, "num_retries": 0}})
except c.UnusableCustomer as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "no reply within 1.2 s" in done.stdout


# -- before any episode ----------------------------------------------------------------------------------------------


def test_the_preflight_is_one_completion_with_one_tool_and_runs_once(provider, base):
    config = config_for(base)
    check_customer(config)
    check_customer(config)
    (request,) = provider.requests
    assert len(request["tools"]) == 1 and len(request["messages"]) == 1


@pytest.mark.parametrize(
    "how, requests, named",
    [(401, 1, "OPENAI_API_KEY"), (404, 1, "no such model"), (400, 1, "400"), (500, 3, "500"), ("hang", 3, "no reply")],
)
def test_a_preflight_that_fails_says_why(provider, base, how, requests, named):
    misbehave(provider, how, 1)
    with pytest.raises(BadInput, match=named) as error:
        check_customer(config_for(base, timeout=0.2, num_retries=5))
    assert len(provider.requests) == requests and MODEL in str(error.value) and "\n" not in str(error.value)


def test_the_default_model_is_asked_over_plain_http(provider, base, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-key-of-the-test")
    config = EpisodeConfig(user="llm", user_args={"api_base": base})
    assert config.user == "gemini/gemini-2.5-flash-lite"
    check_customer(config)
    assert provider.keys == ["AIza-key-of-the-test"] and provider.requests[0]["tools"]
    assert "AIza" not in caplog.text and "httpx" not in caplog.text, "its log names addresses, and keys in them"


@pytest.mark.parametrize(
    "user, variable",
    [
        ("llm", "GEMINI_API_KEY"),
        ("gpt-4.1-mini", "OPENAI_API_KEY"),
        ("openai/gpt-4.1", "OPENAI_API_KEY"),
        ("claude-sonnet-4-5", "ANTHROPIC_API_KEY"),
        ("xai/grok-4", "XAI_API_KEY"),
    ],
)
def test_a_missing_key_is_named(user, variable):
    with pytest.raises(BadInput, match=variable):
        check_customer(EpisodeConfig(user=user))


def test_a_key_in_the_environment_is_enough_for_the_first_check(monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", "x")
    tau2_llm_customer.check_key("gemini/gemini-2.5-flash-lite", {})
    monkeypatch.setenv("GOOGLE_API_KEY", "")
    with pytest.raises(tau2_llm_customer.UnusableCustomer):
        tau2_llm_customer.check_key("gemini/gemini-2.5-flash-lite", {})


def test_an_unknown_customer_is_named():
    with pytest.raises(BadInput, match=r"skripted.*scripted, llm"):
        check_customer(EpisodeConfig(user="skripted"))


def test_a_missing_key_costs_no_import(tmp_path):
    """Within the first second: before tau2 and litellm are loaded."""
    code = f"""
import sys, evaluate_tau2
code = evaluate_tau2.main(["--agent", "teacher", "--user", "llm", "--output-path", {str(tmp_path / "o.json")!r}])
print(code, "litellm" in sys.modules, "tau2" in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GEMINI_API_KEY", "GOOGLE_API_KEY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert done.stderr.startswith("error: ") and "GEMINI_API_KEY" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        {"api_key": KEY},
        {"extra_headers": {"Authorization": "Basic abc"}},
        {"aws_secret_access_key": "x"},
        {"azure_ad_token": "x"},
        {"api_base": "http://me:pass@host/v1"},
        {"api_base": f"http://host/v1?key={KEY}"},
        {"api_base": f"http://host/v1?api-version=1&code={KEY[3:]}"},
        {"extra_headers": [{"Authorization": "Basic abc"}]},
        {"fallbacks": ["http://me:pass@host/v1"]},
        {"user": KEY},
    ],
)
def test_a_key_among_the_arguments_is_refused_and_not_repeated(args, tmp_path, capsys):
    text = json.dumps(args)
    flags = ["--user", MODEL, "--user-args", text]
    assert evaluate_tau2.main(["--agent", "teacher", *flags, "--output-path", str(tmp_path / "o.json")]) == 2
    with pytest.raises(BadInput, match="environment") as error:
        generate_with_tau.check_args(SimpleNamespace(tau2_user=MODEL, tau2_user_args=text))
    said = capsys.readouterr().err + str(error.value)
    assert "environment" in said and KEY not in said and "pass@" not in said and not list(tmp_path.iterdir())


def test_ordinary_arguments_are_no_keys():
    EpisodeConfig(user=MODEL, user_args={"max_tokens": 9, "max_completion_tokens": 9, "top_p": 0.9}).validate()


@pytest.mark.parametrize(
    "args", [{"timeout": 0}, {"timeout": "60"}, {"num_retries": -1}, {"model": "x"}, {"stream": 1}]
)
def test_arguments_that_cannot_work(args):
    with pytest.raises(BadInput, match=next(iter(args))):
        EpisodeConfig(user=MODEL, user_args=args).validate()


def test_broken_arguments_are_not_repeated(tmp_path, capsys):
    text = f'{{"api_key": "{KEY}"'
    with pytest.raises(SystemExit):
        evaluate_tau2.main(["--agent", "teacher", "--user-args", text, "--output-path", str(tmp_path / "o.json")])
    with pytest.raises(SystemExit):
        teacher_traces.main(["--local_dir", str(tmp_path), "--user-args", text])
    with pytest.raises(BadInput) as error:
        generate_with_tau.check_args(SimpleNamespace(tau2_user=MODEL, tau2_user_args=text))
    assert KEY not in capsys.readouterr().err + str(error.value)


def test_keys_are_masked(monkeypatch):
    monkeypatch.setenv("SOME_PROVIDER_API_KEY", "a-key-of-no-known-form")
    for text in (f"Bearer {KEY}", f"x?key={KEY}&y", KEY, "AIzaSyA-123456", "a-key-of-no-known-form"):
        masked = mask(f"refused: {text}!")
        assert "***" in masked and masked.startswith("refused: ")
        assert all(part not in masked for part in (KEY, "AIza", "no-known-form"))
    assert mask("a plain text, 3 tokens") == "a plain text, 3 tokens"
    error = ConnectionError(f"cannot reach https://x/v1?key={KEY}")
    assert KEY not in explain(error, "gemini/x", {})


@pytest.mark.parametrize("how", [401, 429])
def test_a_key_reaches_no_file_and_no_message(provider, base, how, monkeypatch, tmp_path, caplog, capfd):
    """The provider repeats the key in its errors, as some do."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    misbehave(provider, how, 4, 60)
    code = evaluate(tmp_path, base, "--num-tasks", "3", "--max-concurrency", "1")
    out, err = capfd.readouterr()
    assert code == 1 and set(provider.keys) == {f"Bearer {KEY}"} and "***" in err
    files = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in out + err + caplog.text + files


# -- where it is used ------------------------------------------------------------------------------------------------


def evaluate(tmp_path, base, *flags, **more):
    args = {"api_base": base, "num_retries": 1, "timeout": 5, **more}
    user = ["--user", MODEL, "--user-args", json.dumps(args)]
    return evaluate_tau2.main(["--agent", "teacher", *user, "--output-path", str(tmp_path / "o.json"), *flags])


def fail_for(provider, task):
    """Every request of this task's customer fails."""
    story = str(task.user_scenario)
    provider.behave = lambda number, body: 500 if story in body["messages"][0]["content"] else None


def test_evaluation_with_a_model_as_the_customer(provider, base, tmp_path, capsys):
    assert evaluate(tmp_path, base, "--num-tasks", "3") == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["pass_at_1"] == 1.0 and result["customer"]["model"] == MODEL
    assert result["customer"]["args"]["api_base"] == base and result["customer"]["prompt_version"]
    assert MODEL in capsys.readouterr().out


def test_a_run_goes_on_with_more_patience_and_is_compared_with_one_that_had_less(provider, base, tmp_path, capsys):
    assert evaluate(tmp_path, base, "--num-tasks", "2") == 0
    paths = [str(tmp_path / name) for name in ("first.json", "o.json")]
    (tmp_path / "o.json").rename(paths[0])
    assert evaluate(tmp_path, base, "--num-tasks", "4", timeout=60, num_retries=4) == 0
    assert "continuing: 2 of 4" in capsys.readouterr().out
    assert evaluate_tau2.main(["compare", *paths]) == 0
    assert evaluate(tmp_path, base, "--num-tasks", "4", temperature=0.5) == 2


def test_a_failing_customer_makes_the_evaluation_incomplete(provider, base, tmp_path, capsys):
    """Tried again, then left out: no row, no headline number; the same command then runs only what is owed."""
    task = TASKS[0]
    fail_for(provider, task)
    assert evaluate(tmp_path, base, "--num-tasks", "3") == 1
    out, err = capsys.readouterr()
    assert "user_failed" in err and "pass@1" not in out and not (tmp_path / "o.json").exists()
    rows = (tmp_path / "o.rows.jsonl").read_text().splitlines()[1:]
    assert len(rows) == 2 and task.id not in {json.loads(row)["task_id"] for row in rows}
    failed = [r for r in provider.requests if str(task.user_scenario) in r["messages"][0]["content"]]
    assert len(failed) == evaluate_tau2.TRIES * 2
    provider.behave = lambda number, body: None
    assert evaluate(tmp_path, base, "--num-tasks", "3") == 0
    assert json.loads((tmp_path / "o.json").read_text())["pass_at_1"] == 1.0


def test_the_customer_is_asked_before_a_server_is_started(provider, base, tmp_path, monkeypatch, capsys):
    def no_server(args):
        raise AssertionError("the server came first")

    misbehave(provider, 401, 1)
    monkeypatch.setattr(evaluate_tau2, "running_server", no_server)
    monkeypatch.setattr(evaluate_tau2, "load_chat_template", no_server)
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    assert evaluate(tmp_path, base, "--agent", "checkpoint", "--checkpoint", str(folder)) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_traces_leave_a_failed_customer_out(provider, base, tmp_path, capsys):
    train = load_tasks("telecom", "train")
    tasks = [train[0], train[-1]]
    provider.scenarios |= {str(task.user_scenario): task.user_scenario for task in tasks}
    rows = [{"index": i, "metadata": {"task": t.model_dump(mode="json")}} for i, t in enumerate(tasks)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fail_for(provider, tasks[0])
    args = json.dumps({"api_base": base, "num_retries": 0})
    flags = ["--local_dir", str(tmp_path), "--tasks", str(file), "--user", MODEL, "--user-args", args]
    assert teacher_traces.main(flags) == 1
    (row,) = (tmp_path / "teacher_traces.jsonl").read_text().splitlines()
    assert json.loads(row)["metadata"]["user"]["model"] == MODEL
    told = capsys.readouterr()
    assert "1 not solved, user_failed" in told.out and "incomplete: 1 episodes broke off" in told.err


@pytest.fixture
def args(smol_dir, base):
    with serving(FakeModel(load_chat_template(str(smol_dir)))) as (host, port):
        yield SimpleNamespace(
            hf_checkpoint=str(smol_dir),
            sglang_router_ip=host,
            sglang_router_port=port,
            tau2_prompt="short",
            tau2_user=MODEL,
            tau2_user_args={"api_base": base, "num_retries": 0, "timeout": 5},
        )


@pytest.fixture(autouse=True)
async def closed():
    yield
    await close_session()


def make_sample():
    metadata = {"domain": "telecom", "task": TASK.model_dump(mode="json")}
    return Sample(group_index=0, index=0, prompt=0, session_id="abc", metadata=metadata)


PARAMS = {"temperature": 0.7, "max_new_tokens": 4096, "stop_token_ids": None, "no_stop_trim": True}


async def test_a_rollout_with_a_model_as_the_customer(provider, args):
    samples = [make_sample() for _ in range(4)]
    for index, sample in enumerate(samples):
        sample.session_id = str(index)
    done = await asyncio.gather(*(generate_with_tau.generate(args, sample, PARAMS) for sample in samples))
    assert [sample.reward for sample in done] == [1.0] * 4
    assert sum(len(request["tools"]) == 1 for request in provider.requests) == 1, "one preflight for all"


async def test_a_sample_whose_customer_fails_is_tried_again_and_removed(provider, args):
    misbehave(provider, 500)
    sample = await generate_with_tau.generate(args, make_sample(), PARAMS)
    assert sample.remove_sample and sample.status is Sample.Status.FAILED
    assert sample.metadata["tau2"]["end_reason"] == "user_failed" and sample.metadata["tau2"]["reward"] is None
    assert len(provider.requests) == 1 + 2, "the preflight, then one try for each of the two episodes"


async def test_a_customer_that_cannot_be_used_ends_the_job_with_one_reason(provider, args):
    misbehave(provider, 401, 1)
    samples = [await generate_with_tau.generate(args, make_sample(), PARAMS) for _ in range(4)]
    assert all(sample.remove_sample and sample.metadata["tau2"]["bad_input"] for sample in samples)
    assert len(provider.requests) == 1
    with pytest.raises(RuntimeError, match="OPENAI_API_KEY"):
        tau2_reward_post_process(args, samples)


@pytest.mark.parametrize("how", [503, 429])
async def test_a_customer_that_does_not_answer_yet_ends_no_job(provider, args, how):
    """A server that still loads, or a rate limit, when the first episode begins."""
    misbehave(provider, how, 1, 1)
    samples = [await generate_with_tau.generate(args, make_sample(), PARAMS) for _ in range(2)]
    assert [sample.reward for sample in samples] == [1.0, 1.0]
    assert sum(len(request["tools"]) == 1 for request in provider.requests) == 1, "one preflight"


def test_the_command_is_checked_with_a_preflight(provider, args):
    generate_with_tau.check_args(args)
    assert len(provider.requests) == 1
    with pytest.raises(BadInput, match="user_concurrency"):
        generate_with_tau.check_args(SimpleNamespace(tau2_user_concurrency=0))
    with pytest.raises(BadInput, match="GEMINI_API_KEY"):
        generate_with_tau.check_args(SimpleNamespace(tau2_user="llm"))

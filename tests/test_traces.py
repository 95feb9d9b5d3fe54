"""Stage 2 data: rows from teacher episodes, and the conversion of the original example's data set."""

import asyncio
import http.server
import itertools
import json
import os
import threading
from collections import Counter

import pytest
from fake_openai import FakeAgent, _tool_call, serving_openai

import http_client
import tau2_mock
import teacher_traces
from tau2_domains import agent_tools, load_split_ids, system_prompt
from tau2_episode import EpisodeConfig, run_episode
from tau2_teacher import ScriptedTeacher

SCRIPT = "examples/tau-bench/teacher_traces.py"
TRAIN = "telecom_train_tasks.jsonl"
TOOLS = {tool["function"]["name"] for tool in agent_tools("telecom")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert tau2_mock.main(["--local_dir", str(folder), "--splits", "train", "test", "small"]) == 0
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make(data, output, *flags):
    assert teacher_traces.main(["--local_dir", str(data), "--output", str(output), *flags]) == 0
    return read(output)


def check_dialogue(messages):
    """System, greeting outside the loss, then turns in an order that tau2 allows, every call answered in turn."""
    system, greeting, *turns = messages
    assert system["role"] == "system"
    assert (greeting["role"], greeting["step_loss_mask"]) == ("assistant", 0)
    assert turns[0]["role"] == "user" and turns[-1]["role"] == "assistant"
    for before, after in itertools.pairwise(turns):
        if before.get("tool_calls"):
            call = before["tool_calls"][0]
            assert (after["role"], after["tool_call_id"], after["name"]) == (
                "tool",
                call["id"],
                call["function"]["name"],
            )
        elif before["role"] == "assistant":
            assert after["role"] == "user"
        else:
            assert after["role"] == "assistant"


# ---------------------------------------------------------------------------------------------------------------------
# Rows from episodes
# ---------------------------------------------------------------------------------------------------------------------


def test_command_writes_a_solved_row_per_train_task(run_script, data):
    result = run_script(SCRIPT, "--local_dir", data)
    assert result.returncode == 0, result.stderr
    assert "74 rows" in result.stdout and "dropped: none" in result.stdout
    rows = read(data / "teacher_traces.jsonl")
    assert sorted(row["metadata"]["task_id"] for row in rows) == sorted(load_split_ids("telecom")["train"])
    for row in rows:
        check_dialogue(row["prompt"])
        assert row["prompt"][0]["content"] == system_prompt("telecom")
        assert row["tools"] == agent_tools("telecom")
        assert row["metadata"]["reward"] == 1.0
        assert row["metadata"]["user"]["kind"] == "scripted"
        calls = [call["function"] for message in row["prompt"] for call in message.get("tool_calls", [])]
        assert calls and all(call["name"] in TOOLS and isinstance(call["arguments"], dict) for call in calls)


def test_rows_are_the_episodes_own_messages(data, tmp_path):
    (row,) = make(data, tmp_path / "one.jsonl", "--num-traces", "1", "--seed", "3", "--prompt", "short")
    tasks = {source["task"]["id"]: source["task"] for source in tau2_mock.read_task_rows(data / TRAIN)}
    config = EpisodeConfig(prompt="short")
    task, seed = tasks[row["metadata"]["task_id"]], row["metadata"]["seed"]
    episode = asyncio.run(run_episode(task, ScriptedTeacher(), config, seed))
    without_mask = [{key: value for key, value in m.items() if key != "step_loss_mask"} for m in row["prompt"]]
    assert without_mask == episode.messages


@pytest.mark.parametrize("flags", [["--redraw-ids", "--mix", "mms_issue=1"], ["--epochs", "1"]])
def test_same_flags_same_bytes(data, tmp_path, flags):
    for name in ("a", "b"):
        make(data, tmp_path / name, "--num-traces", "12", "--prompt", "short", *flags)
    make(data, tmp_path / "c", "--num-traces", "12", "--prompt", "short", "--seed", "1", *flags)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_balance_draws_issue_types_equally(data, tmp_path):
    rows = make(data, tmp_path / "rows", "--num-traces", "30", "--mix", "mms_issue=1", "--prompt", "short")
    kinds = Counter(row["metadata"]["task_id"].split("]")[0] for row in rows)
    assert set(kinds.values()) == {10} and len(kinds) == 3


def test_a_sub_issue_can_be_drawn_more_often(data, tmp_path, capsys):
    mix = "service_issue=1,overdue_bill_suspension=2"
    rows = make(data, tmp_path / "rows", "--num-traces", "40", "--mix", mix, "--prompt", "short")
    unpaid = [row for row in rows if "overdue_bill_suspension" in row["metadata"]["task_id"]]
    assert len(rows) == 40 and len(unpaid) == 16
    flags = ["--num-traces", "4", "--mix", "overdue=1", "--prompt", "short"]
    assert teacher_traces.main(["--local_dir", str(data), "--output", str(tmp_path / "none"), *flags]) == 2
    assert "no task is of the kind 'overdue'; they are: airplane_mode_on, " in capsys.readouterr().err


def test_slips_are_marked_and_everything_else_is_trained(data, tmp_path):
    rows = make(data, tmp_path / "rows", "--num-traces", "20", "--slip", "1", "--prompt", "short")
    masked = [[m for m in row["prompt"][2:] if m.get("step_loss_mask") == 0] for row in rows]
    assert all(len(turns) <= 1 for turns in masked) and sum(map(len, masked)) >= 10
    assert all(turn["role"] == "assistant" for turns in masked for turn in turns)


def test_each_task_is_drawn_once_before_any_twice():
    rows = [{"task": {"id": f"[{kind}_issue]{n}"}} for kind, count in (("a", 5), ("b", 2)) for n in range(count)]
    draws = [row["task"]["id"] for row in teacher_traces.draw_tasks(rows, 14, None, seed=0)]
    assert len(set(draws[:7])) == len(set(draws[7:])) == 7
    assert draws[:7] != draws[7:]
    balanced = [row["task"]["id"] for row in teacher_traces.draw_tasks(rows, 8, {}, seed=0)]
    assert [draw[1] for draw in balanced] == ["a", "b"] * 4
    assert Counter(draw for draw in balanced if draw[1] == "b") == {"[b_issue]0": 2, "[b_issue]1": 2}


def test_redrawn_ids_differ_between_rows(data, tmp_path):
    rows = make(data, tmp_path / "rows", "--num-traces", "6", "--redraw-ids", "--prompt", "short")
    phones = {row["prompt"][3]["tool_calls"][0]["function"]["arguments"]["phone_number"] for row in rows}
    assert len(phones) == 6 and "555-123-2002" not in phones


def test_a_share_of_the_rows_has_redrawn_ids(data, tmp_path, capsys):
    rows = make(data, tmp_path / "rows", "--num-traces", "40", "--redraw-ids", "0.5", "--prompt", "short")
    marked = {n for n, row in enumerate(rows) if row["metadata"]["redraw_ids"]}
    stock = {n for n, row in enumerate(rows) if "555-123-2002" in json.dumps(row["prompt"])}
    assert 10 < len(marked) < 30 and stock == set(range(40)) - marked
    tasks = {source["task"]["id"]: source["task"] for source in tau2_mock.read_task_rows(data / TRAIN)}
    for row in (rows[min(marked)], rows[min(stock)]):  # each can be played again from its metadata
        seed, redrawn = row["metadata"]["seed"], row["metadata"]["redraw_ids"]
        config = EpisodeConfig(prompt="short", redraw_ids=redrawn)
        episode = asyncio.run(run_episode(tasks[row["metadata"]["task_id"]], ScriptedTeacher(), config, seed))
        assert [m["content"] for m in row["prompt"]] == [m["content"] for m in episode.messages]
    with pytest.raises(SystemExit):
        make(data, tmp_path / "none", "--redraw-ids", "1.5")
    assert "1.5 is not between 0 and 1" in capsys.readouterr().err


def test_unsolved_episodes_are_dropped_and_counted(data, tmp_path, monkeypatch, capsys):
    """A teacher that transfers at once earns the reward on the tasks that end in a transfer only."""
    from tau2_teacher import AlwaysTransfer

    class Transferring(AlwaysTransfer):
        slips = ()

        def __init__(self, *_):
            super().__init__()

    monkeypatch.setattr(teacher_traces, "ScriptedTeacher", Transferring)
    rows = make(data, tmp_path / "rows", "--prompt", "short")
    assert len(rows) == 8  # 10.8 % of the train tasks
    assert "dropped: 66 not solved, transfer" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The original example's data set
# ---------------------------------------------------------------------------------------------------------------------


def said(text, thought="Let me think."):
    return {"role": "assistant", "content": f"<thinking>{thought}</thinking>\n{text}"}


def called(name, **arguments):
    return said(json.dumps({"name": name, "arguments": arguments}))


USER = {"role": "user", "content": "My data is slow. I'm John Smith, 555-123-2002."}
LOOKUP = called("get_customer_by_phone", phone_number="555-123-2002")
FOUND = {"role": "tool", "name": "get_customer_by_phone", "content": '{"customer_id": "C1001"}'}


def hub_row(*messages, task_id=None, domain="telecom"):
    task_id = task_id or load_split_ids("telecom")["train"][0]
    system = {"role": "system", "content": "Write your reasoning in <thinking> tags, then JSON."}
    return {"task_id": f"[{domain}]{task_id}", "prompt": [system, *messages], "response": ""}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- A model as teacher ------------------------------------------------------------------------------------------


class CarelessAgent(FakeAgent):
    """The scripted teacher, whose first turn after the report is `slip`, at which it looks again."""

    def __init__(self, slip):
        super().__init__()
        self.slip = slip

    async def _says(self, body):
        messages = body["messages"]
        if messages[0]["role"] != "system":
            return await super()._says(body)
        if len(messages) == 3:
            return {"content": None, "tool_calls": [_tool_call("slip", *self.slip)]}
        return await super()._says({**body, "messages": [*messages[:3], *messages[5:]]})


@pytest.mark.parametrize(
    ("slip", "dropped"),
    [
        (("get_customer_by_phone", '{"phone_number": "1"}'), None),
        (("toggle_airplane_mode", "{}"), "call of a tool of the customer"),
        (("get_customer_by_phone", '{"phone_number": '), "call that cannot be executed"),
    ],
    ids=["refused", "of the customer", "broken"],
)
def test_a_models_mistakes_are_not_trained(data, tmp_path, capsys, slip, dropped):
    flags = ["--local_dir", str(data), "--output", str(tmp_path / "t.jsonl"), "--prompt", "short", "--num-traces", "2"]
    with serving_openai(CarelessAgent(slip)) as url:
        code = teacher_traces.main([*flags, "--teacher-llm", "m", "--teacher-base-url", url])
    if dropped:
        assert code == 2 and f"dropped: 2 {dropped}" in capsys.readouterr().err
        return
    assert code == 0
    for row in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines()):
        turns = [m for m in row["prompt"][2:] if m["role"] == "assistant"]
        assert [turn.get("step_loss_mask") for turn in turns] == [0, *[None] * (len(turns) - 1)]
        assert turns[0]["tool_calls"][0]["function"]["arguments"] == {"phone_number": "1"}


def test_what_the_machinery_broke_is_run_again_by_the_same_command(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.01)
    output, provider = tmp_path / "t.jsonl", FakeAgent()
    provider.behave = lambda number, body: None if number < 16 else 503
    flags = ["--local_dir", str(data), "--output", str(output), "--prompt", "short", "--num-traces", "4"]
    with serving_openai(provider) as url:
        flags += ["--teacher-llm", "m", "--teacher-base-url", url, "--max-concurrency", "1"]
        assert teacher_traces.main(flags) == 1
        assert "incomplete: 2 episodes broke off; the same command" in capsys.readouterr().err
        assert len(output.read_text().splitlines()) == 2
        provider.behave = lambda number, body: None
        asked = len(provider.requests)
        assert teacher_traces.main(flags) == 0
    assert len(output.read_text().splitlines()) == 4 and not (tmp_path / "t.jsonl.partial").exists()
    first_turns = [r for r in provider.requests[asked:] if len(r["messages"]) == 3]
    assert len(first_turns) == 2


def test_hub_file_by_command(run_script, data, tmp_path):
    splits = load_split_ids("telecom")
    bar, test_task = tau2_mock.training_bar("telecom"), splits["test"][0]
    near_task = next(task_id for task_id in splits["full"] if bar(task_id) == "near a test task")
    rows = [
        hub_row(USER, LOOKUP, FOUND, called("respond", content="Please run a speed test."), USER),
        hub_row(USER, said("Please restart your phone.")),
        hub_row(USER, LOOKUP, domain="retail", task_id="[task_3][sample_4]"),
        hub_row(USER, LOOKUP, task_id=test_task),
        hub_row(USER, LOOKUP, task_id=near_task),
        hub_row(USER, LOOKUP, task_id="[mms_issue]no_such_thing[PERSONA:None]"),
        hub_row(USER, called("toggle_airplane_mode")),
    ]
    output = tmp_path / "hub.jsonl"
    flags = ["--from-hub-file", write(tmp_path / "v4.jsonl", rows), "--output", output]
    result = run_script(SCRIPT, "--local_dir", data, *flags)
    assert result.returncode == 0, result.stderr
    assert "dropped: 1 near a test task, 1 other domain, 1 test task, 1 unknown task, 1 unknown tool" in result.stdout
    first, second = read(output)
    for row in (first, second):
        check_dialogue(row["prompt"])
        assert row["prompt"][0]["content"] == system_prompt("telecom")
        assert row["tools"] == agent_tools("telecom")
        assert (row["metadata"]["split"], row["metadata"]["reward"]) == ("train", None)
    function = first["prompt"][3]["tool_calls"][0]["function"]
    assert function == {"name": "get_customer_by_phone", "arguments": {"phone_number": "555-123-2002"}}
    assert first["prompt"][-1] == {"role": "assistant", "content": "Please run a speed test."}
    assert second["prompt"][-1] == {"role": "assistant", "content": "Please restart your phone."}
    assert "thinking" not in json.dumps(first["prompt"])


def test_a_hub_that_does_not_answer_is_asked_once(run_script, tmp_path):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        result = run_script(SCRIPT, "--local_dir", tmp_path / "data", "--from-hub", env={**os.environ, **here})
        hub.shutdown()
    assert result.returncode == 2 and result.stderr.startswith("error: cannot get blended_traces_v4.jsonl of ")
    assert result.stderr.count("\n") == 1 and len(asked) == 1
    assert not (tmp_path / "data").exists()


def test_thinking_is_kept_on_request():
    turn = teacher_traces.convert_turn(said("Hello.", thought="Greet first.")["content"], TOOLS, 0, keep_thinking=True)
    assert turn == {"role": "assistant", "content": "Hello.", "reasoning_content": "Greet first."}


def test_greeting_in_the_data_is_left_out_and_respond_results_are_the_customer():
    messages = [called("respond", message="Hi!"), {"role": "tool", "name": "respond", "content": "My data is slow."}]
    converted = teacher_traces.convert_dialogue([*messages, LOOKUP], TOOLS)
    assert [m["role"] for m in converted] == ["user", "assistant"]
    assert converted[0]["content"] == "My data is slow."


@pytest.mark.parametrize("arguments", ['{"phone_number": "1"}', {"phone_number": "1"}])
def test_arguments_as_object_or_as_json_text(arguments):
    turn = teacher_traces.convert_turn(
        json.dumps({"name": "get_customer_by_phone", "arguments": arguments}), TOOLS, number=4
    )
    assert turn["tool_calls"][0]["function"]["arguments"] == {"phone_number": "1"}
    assert turn["content"] == "" and turn["tool_calls"][0]["id"] == "call_4"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "no message list"),
        ([USER], "no agent turn"),
        ([USER, said('{"name": "get_customer_by_phone", "arguments": {"phone')], "broken JSON in a turn"),
        ([USER, said('{"tool": "get_customer_by_phone"}')], "broken turn"),
        ([USER, {"role": "assistant", "content": "<thinking>never closed"}], "broken turn"),
        ([USER, said("")], "empty turn"),
        ([USER, called("respond", content="")], "empty turn"),
        ([USER, said('{"name": "get_data_usage", "arguments": [1]}')], "arguments are no object"),
        ([USER, said(LOOKUP["content"] + LOOKUP["content"])], "several calls in a turn"),
        ([USER, LOOKUP, USER, LOOKUP], "tool call without result"),
        ([USER, LOOKUP, LOOKUP], "tool call without result"),
        ([USER, FOUND, LOOKUP], "tool result without call"),
        ([LOOKUP, FOUND, said("Hello.")], "agent acts before the customer speaks"),
    ],
)
def test_rows_that_cannot_be_converted(messages, reason):
    with pytest.raises(teacher_traces.Dropped) as dropped:
        teacher_traces.convert_dialogue(messages, TOOLS)
    assert str(dropped.value) == reason


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such.jsonl"], "no_such.jsonl does not exist; make it with: python "),
        (["--tasks", "{data}/telecom_test_tasks.jsonl"], "40 of the tasks are official test tasks"),
        (
            ["--tasks", "{data}/telecom_small_tasks.jsonl"],
            "12 of the tasks are within one fault of an official test task",
        ),
        (["--tasks", "{data}/broken.jsonl"], "{data}/broken.jsonl, line 2 is not JSON"),
        (["--domain", "telco", "--tasks", "{data}/telecom_train_tasks.jsonl"], "unknown domain 'telco'"),
        (["--from-hub-file", "{data}/none.jsonl"], "{data}/none.jsonl does not exist"),
        (["--from-hub-file", "{data}/other.jsonl"], "no row is left to write (dropped: 1 other domain)"),
        (["--output", "{data}/broken.jsonl/rows"], "{data}/broken.jsonl is a file, not a folder"),
        (["--from-hub"], "cannot get blended_traces_v4.jsonl"),
        (["--from-hub", "--slip", "0.5"], "--slip: rows from --from-hub have no use for that"),
        (
            ["--from-rollouts", "x", "--tasks", "y"],
            "--tasks: rows from --from-rollouts without --mend have no use for",
        ),
        (["--from-rollouts", "x", "--style", "checklist"], "--style: rows from --from-rollouts without --mend have"),
        (
            ["--from-rollouts", "x", "--mend", "1", "--redraw-ids"],
            "--redraw-ids: rows from --from-rollouts have no use",
        ),
        (["--keep-thinking", "--per-task", "3"], "--keep-thinking, --per-task: rows from the scripted teacher's "),
        (["--temperature", "0.7"], "--temperature: rows from the scripted teacher's episodes have no use for that"),
        (["--from-hub", "--teacher-llm", "m"], "--teacher-llm: rows from --from-hub have no use for that"),
    ],
)
def test_bad_input(data, tmp_path, capsys, flags, message):
    (data / "broken.jsonl").write_text('{"index": 0, "metadata": {}}\n{"index": 1,\n')
    write(data / "other.jsonl", [hub_row(USER, LOOKUP, domain="airline")])
    output = tmp_path / "rows.jsonl"
    flags = [flag.format(data=data) for flag in flags]
    assert teacher_traces.main(["--output", str(output), "--local_dir", str(data), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(data=data))
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    "flags",
    [["--num-traces", "0"], ["--prompt", "long"], ["--user-args", "[1]"], ["--from-hub", "--from-hub-file", "x"]],
)
def test_bad_flags(run_script, data, flags):
    result = run_script(SCRIPT, "--local_dir", data, *flags)
    assert result.returncode == 2
    assert "error: " in result.stderr

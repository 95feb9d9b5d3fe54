"""The evaluator through its command line and against a stand-in server: numbers, resuming, and what it refuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import free_ports
from fake_generate import FakeModel, serving
from safetensors.torch import load_file, save_file

import evaluate_tau2
import model_server
import tau2_moods
import tau2_users
from evaluate_tau2 import choose_tasks, main, task_stderr
from openai_tool_adapter import load_chat_template
from slime_local import hf_folder
from tau2_teacher import AlwaysTransfer

pytestmark = pytest.mark.usefixtures("own_signal_handler")

SCRIPT = "examples/tau-bench/evaluate_tau2.py"
ORIGINAL_KEYS = (
    "checkpoint domain task_split total_tasks successes pass_at_1 avg_reward avg_steps avg_partial_score results"
).split()


@pytest.fixture
def model(tiny_model_dir):
    return FakeModel(load_chat_template(str(tiny_model_dir)), model_path=str(tiny_model_dir))


@pytest.fixture
def evaluate(model, tiny_model_dir, tmp_path):
    """Runs main() against the stand-in; gives (exit code, result or None)."""
    output = tmp_path / "eval.json"
    with serving(model) as (_, port):

        def run(*flags, agent="checkpoint"):
            server = ["--checkpoint", str(tiny_model_dir), "--sglang-port", str(port)] if agent == "checkpoint" else []
            code = main([*server, "--agent", agent, "--prompt", "short", "--output-path", str(output), *flags])
            return code, json.loads(output.read_text()) if output.exists() else None

        run.output, run.rows = output, tmp_path / "eval.rows.jsonl"
        yield run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent, successes, partial", [("teacher", 40, 1.0), ("always-transfer", 12, 0.3)])
def test_scripted_agents_on_the_40_test_tasks(run_script, tmp_path, agent, successes, partial):
    output = tmp_path / "out.json"
    done = run_script(SCRIPT, "--agent", agent, "--output-path", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(ORIGINAL_KEYS) <= set(result)
    assert (result["total_tasks"], result["successes"], result["pass_at_1"]) == (40, successes, successes / 40)
    assert result["avg_reward"] == result["pass_at_1"] and result["avg_partial_score"] == pytest.approx(partial)
    assert result["floor_always_transfer"] == 0.3 and result["customer"]["kind"] == "scripted"
    assert sum(kind["total"] for kind in result["by_issue_type"].values()) == len(result["results"]) == 40
    assert sum(result["end_reasons"].values()) == 40
    for shown in (f"{successes / 40:.3f}", "floor 0.300", "scripted", "official prompt"):
        assert shown in done.stdout


def test_a_prompt_without_room_for_a_turn_is_told_and_not_scored_0(evaluate, model, capsys):
    code, result = evaluate("--num-tasks", "2", "--max-context-len", "100")
    assert (code, result, model.requests) == (2, None, [])
    assert "no room for a turn" in (told := capsys.readouterr().err) and "--max-context-len" in told


def test_a_checkpoint_that_says_what_the_teacher_says(evaluate, model, capsys):
    code, result = evaluate("--num-tasks", "8")
    assert code == 0 and result["pass_at_1"] == 1.0 and result["total_tasks"] == 8
    assert not model.broken_prefixes
    assert set(result["by_issue_type"]) == {"mms_issue", "mobile_data_issue", "service_issue"}
    assert result["tokens"]["generated"] > 0 and result["tokens"]["cached"] > 0
    assert {request["sampling_params"]["temperature"] for request in model.requests} == {0.0}
    assert all("sampling_seed" not in request["sampling_params"] for request in model.requests)
    assert "8/8" in capsys.readouterr().out


def test_the_model_and_not_the_harness_decides(evaluate, model):
    model.agent = AlwaysTransfer
    code, result = evaluate("--num-tasks", "10")
    assert code == 0 and result["pass_at_1"] == result["floor_always_transfer"] < 1.0


def test_trials_are_sampled_with_seeds_of_their_own(evaluate, model):
    code, result = evaluate("--num-tasks", "2", "--num-trials", "2", "--temperature", "0.7")
    assert code == 0 and result["total_episodes"] == 4 and result["total_tasks"] == 2
    first_turns = {
        request["sampling_params"]["sampling_seed"]
        for request in model.requests
        if len(request["input_ids"]) == min(len(r["input_ids"]) for r in model.requests)
    }
    assert len({(row["task_id"], row["trial"]) for row in rows_of(evaluate.rows)}) == 4 and first_turns


# ---------------------------------------------------------------------------------------------------------------------


def test_an_infrastructure_failure_is_tried_again(evaluate, model, monkeypatch):
    monkeypatch.setattr("token_agent.FIRST_WAIT", 0.01)
    model.behave = lambda number, payload: 400 if number == 2 else None
    code, result = evaluate("--num-tasks", "3")
    assert code == 0 and result["pass_at_1"] == 1.0


def test_what_stays_broken_makes_the_run_incomplete_and_resuming_runs_only_that(evaluate, model, capsys):
    def refuse_from_the_third_task(number, payload):
        return 400 if number > 12 else None

    model.behave = refuse_from_the_third_task
    code, result = evaluate("--num-tasks", "4", "--max-concurrency", "1")
    assert code == 1 and result is None
    captured = capsys.readouterr()
    assert "incomplete" in captured.err and "pass@1" not in captured.out
    there = {row["task_id"] for row in rows_of(evaluate.rows)}
    assert 0 < len(there) < 4
    model.behave = lambda number, payload: None
    before = len(model.sessions)
    code, result = evaluate("--num-tasks", "4", "--max-concurrency", "1")
    assert code == 0 and result["pass_at_1"] == 1.0 and len(result["results"]) == 4
    assert len(model.sessions) - before == 4 - len(there)


def test_a_complete_run_is_not_run_again(evaluate, model):
    _, first = evaluate("--num-tasks", "2")
    calls = len(model.requests)
    _, second = evaluate("--num-tasks", "2")
    assert len(model.requests) == calls and first["results"] == second["results"]


def test_a_torn_last_row_is_owed_again(evaluate):
    _, first = evaluate("--num-tasks", "3", agent="teacher")
    text = evaluate.rows.read_text()
    evaluate.rows.write_text(text[:-100])
    code, second = evaluate("--num-tasks", "3", agent="teacher")
    assert code == 0 and second["pass_at_1"] == first["pass_at_1"]
    assert len(rows_of(evaluate.rows)) == 3


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, tiny_model_dir, model):
    """SIGKILL in the middle; then the same command."""
    model.delay = 0.05
    output = tmp_path / "eval.json"
    with serving(model) as (_, port):
        flags = ["--checkpoint", tiny_model_dir, "--sglang-port", port, "--prompt", "short", "--num-tasks", 6]
        flags += ["--max-concurrency", 1, "--output-path", output]
        command = [sys.executable, SCRIPT, *map(str, flags)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
        rows = tmp_path / "eval.rows.jsonl"
        deadline = time.monotonic() + 300  # of a busy machine
        while not (rows.exists() and len(rows.read_text().splitlines()) > 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = len(rows_of(rows))
        assert 0 < there < 6 and not output.exists()
        model.delay = 0.0
        assert main(list(map(str, flags))) == 0
        undisturbed = tmp_path / "undisturbed.json"
        assert main([*map(str, flags[:-1]), str(undisturbed)]) == 0
    result = json.loads(output.read_text())
    assert result["pass_at_1"] == 1.0 and len(result["results"]) == 6
    assert max(row["run"] for row in rows_of(rows)) == 1
    assert without_time(result) == without_time(json.loads(undisturbed.read_text()))


def without_time(result):
    """A result without what the clock and chance decide: times, and the ids of simulations."""
    chance = {"minutes", "run", "agent_seconds", "user_seconds", "id", "duration", "git_commit", "git"}
    chance |= {"timestamp", "start_time", "end_time"}
    if isinstance(result, dict):
        return {key: without_time(value) for key, value in result.items() if key not in chance}
    return [without_time(value) for value in result] if isinstance(result, list) else result


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--max-steps", "100"], ["--user", "gpt-4.1-mini"]])
def test_rows_of_other_settings_are_refused_and_untouched(evaluate, capsys, flags):
    evaluate("--num-tasks", "2", agent="teacher")
    before = evaluate.rows.read_bytes(), evaluate.output.read_bytes()
    code, _ = evaluate("--num-tasks", "2", *flags, agent="teacher")
    assert code == 2 and flags[0].strip("-").replace("-", "_") in capsys.readouterr().err
    assert (evaluate.rows.read_bytes(), evaluate.output.read_bytes()) == before


def test_another_checkpoint_under_the_same_path_is_noticed(evaluate, tiny_model_dir, capsys, monkeypatch):
    evaluate("--num-tasks", "2")
    monkeypatch.setattr(evaluate_tau2, "fingerprint", lambda folder: "other weights")
    code, _ = evaluate("--num-tasks", "2")
    assert code == 2 and "model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_mended_tokenizer_or_chat_template_is_noticed(evaluate, model, tiny_model_dir, tmp_path, capsys, name):
    folder = tmp_path / "hf"
    shutil.copytree(tiny_model_dir, folder)
    flags = ["--num-tasks", "1", "--checkpoint", str(folder), "--served-as", str(tiny_model_dir)]
    assert evaluate(*flags)[0] == 0
    asked, before = len(model.requests), evaluate.rows.read_bytes()
    with (folder / name).open("a") as file:
        file.write("\n")
    assert evaluate(*flags)[0] == 2 and "tokenizer_and_template" in capsys.readouterr().err
    assert len(model.requests) == asked and evaluate.rows.read_bytes() == before


def test_rows_from_before_the_tokenizer_was_noted_are_refused_and_compared(evaluate, model, capsys):
    code, result = evaluate("--num-tasks", "1")
    assert code == 0
    first, *rows = evaluate.rows.read_text().splitlines(keepends=True)
    old = json.loads(first)
    del old["settings"]["tokenizer_and_template"], result["settings"]["tokenizer_and_template"]
    evaluate.rows.write_text("".join([json.dumps(old) + "\n", *rows]))
    code, _ = evaluate("--num-tasks", "1")
    error = capsys.readouterr().err
    assert code == 2 and "tokenizer_and_template not noted, now '" in error and len(error.splitlines()) == 1
    old_result = evaluate.output.with_name("old.json")
    old_result.write_text(json.dumps(result))
    assert main(["compare", str(old_result), str(evaluate.output)]) == 0
    assert main(["rescore", str(old_result)]) == 0


def test_rows_of_another_version_of_the_customer_are_refused(evaluate, capsys, monkeypatch):
    for module, name in ((tau2_users, "SCRIPTED_VERSION"), (tau2_moods, "MOOD_VERSION")):
        flags = ["--user-args", '{"mood": "mixed"}', "--output-path", str(evaluate.output.with_name(f"{name}.json"))]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0")
            assert evaluate("--num-tasks", "2", *flags, agent="always-transfer")[0] == 0
        assert evaluate("--num-tasks", "4", *flags, agent="always-transfer")[0] == 2
        error = capsys.readouterr().err
        assert "customer {" in error and "choose another --output-path" in error and len(error.splitlines()) == 1


def test_episodes_of_another_customer_than_the_settings_name_are_refused(evaluate, capsys):
    assert evaluate("--num-tasks", "2", agent="always-transfer")[0] == 0
    first, *rows = evaluate.rows.read_text().splitlines(keepends=True)
    version = f'"version": "{tau2_users.SCRIPTED_VERSION}"'
    there = "".join([first, *(row.replace(version, '"version": "1"') for row in rows)])
    evaluate.rows.write_text(there)
    assert evaluate("--num-tasks", "4", agent="always-transfer")[0] == 2
    assert "had the customer" in capsys.readouterr().err and evaluate.rows.read_text() == there


def test_the_customer_of_a_result_is_that_of_the_setting_whatever_was_drawn(evaluate, capsys):
    """One task draws one mood, which is not the evaluation's."""
    mixed, paths = ["--user-args", '{"mood": "mixed"}'], []
    for count in ("1", "6"):
        paths.append(str(evaluate.output.with_name(f"{count}.json")))
        assert evaluate("--num-tasks", count, *mixed, "--output-path", paths[-1], agent="teacher")[0] == 0
        customer = json.loads(Path(paths[-1]).read_text())["customer"]
        assert customer == {
            "kind": "scripted",
            "version": tau2_users.SCRIPTED_VERSION,
            "mood": "mixed",
            "mood_version": tau2_moods.MOOD_VERSION,
        }
    assert main(["compare", *paths]) == 0


def test_rows_of_another_servers_context_are_refused_and_results_of_it_not_compared(evaluate, model, capsys):
    model.max_context = 8000
    code, short = evaluate("--num-tasks", "2")
    assert code == 0 and short["settings"]["context_limit"] == 8000 and short["settings"]["max_context_len"] is None
    (evaluate.output.with_name("short.json")).write_text(json.dumps(short))
    model.max_context = 8192
    before = evaluate.rows.read_bytes()
    assert evaluate("--num-tasks", "4")[0] == 2
    assert "context_limit 8000, now 'of the model'" in capsys.readouterr().err
    assert evaluate.rows.read_bytes() == before
    assert evaluate("--num-tasks", "2")[0] == 0, "nothing is owed"
    other = evaluate.output.with_name("other.json")
    code, _ = evaluate("--num-tasks", "2", "--output-path", str(other))
    assert code == 0
    both = ["compare", str(evaluate.output.with_name("short.json")), str(other)]
    assert main(both) == 2 and "context_limit 8000 and 'of the model'" in capsys.readouterr().err
    del short["settings"]["context_limit"]  # as results were before it was noted
    (evaluate.output.with_name("short.json")).write_text(json.dumps(short))
    assert main(both) == 0 and main(["compare", both[1], both[1]]) == 0


def test_a_flag_that_is_the_limit_is_noted_whatever_the_model_has(evaluate):
    assert evaluate("--num-tasks", "1", "--max-context-len", "8192")[1]["settings"]["context_limit"] == 8192


@pytest.mark.parametrize("text", ["notes, not yours", "notes\nand more", '{"settings": 3}\nx', '{"sett'])
def test_a_foreign_rows_file_is_left_as_it_is(evaluate, capsys, text):
    evaluate.rows.write_text(text)
    code, _ = evaluate("--num-tasks", "1", agent="always-transfer")
    if text == '{"sett':  # a line of ours that a full disk cut
        assert code == 0
    else:
        assert code == 2 and evaluate.rows.read_text() == text and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["issue_type", "end_reason", "steps", "seed"])
def test_a_row_without_what_the_numbers_need_is_refused(evaluate, capsys, missing):
    assert evaluate("--num-tasks", "2", agent="always-transfer")[0] == 0
    first, *rows = evaluate.rows.read_text().splitlines(keepends=True)
    row = json.loads(rows[0])
    del row[missing]
    evaluate.rows.write_text("".join([first, json.dumps(row) + "\n", *rows[1:]]))
    assert evaluate("--num-tasks", "2", agent="always-transfer")[0] == 2
    assert "line 2: not written by this program" in capsys.readouterr().err


def test_a_floor_that_broke_is_none(evaluate, monkeypatch, capsys):
    def reply(self, message):
        raise RuntimeError("no phone")

    monkeypatch.setattr(tau2_users.ScriptedCustomer, "reply", reply)
    assert evaluate_tau2.measure_floor("telecom", evaluate_tau2.load_tasks("telecom", "test")[:2]) is None
    assert "no floor: task" in capsys.readouterr().err


def test_an_evaluation_that_is_refused_leaves_no_rows_behind(evaluate, model, tiny_model_dir, tmp_path, capsys):
    model.model_path = "/models/other"
    assert evaluate("--num-tasks", "1")[0] == 2 and not list(tmp_path.iterdir())
    flags = ["--checkpoint", str(tiny_model_dir), "--server-address", f"127.0.0.1:{free_ports(1)[0]}"]
    assert main([*flags, "--output-path", str(evaluate.output)]) == 2 and not list(tmp_path.iterdir())
    assert "no server answers there" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------


def folder_with(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12" if name.endswith(".txt") else "{}")
    return tmp_path


@pytest.mark.parametrize(
    "files, folder, named",
    [
        ([], "nowhere", ["no such folder"]),
        (["iter_0000012/common.pt"], "iter_0000012", ["convert_torch_dist_to_hf.py --input-dir", "--origin-hf-dir"]),
        (["x/__0_0.distcp"], "x", ["convert_torch_dist_to_hf.py --input-dir"]),
        (["run/latest_checkpointed_iteration.txt"], "run", ["convert_torch_dist_to_hf.py", "run/iter_0000012"]),
        (["hf/config.json"], "hf", ["no weights (*.safetensors), no tokenizer (tokenizer.json)"]),
        (["hf/model.safetensors", "hf/tokenizer.json"], "hf", ["no config.json"]),
        (["README.md"], "README.md", ["is a file: give a Hugging Face model folder"]),
    ],
)
def test_what_is_no_hf_folder_is_refused_with_the_converting_command(run_script, tmp_path, files, folder, named):
    folder_with(tmp_path, *files)
    output = tmp_path / "out.json"
    done = run_script(SCRIPT, "--checkpoint", tmp_path / folder, "--output-path", output)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in named), done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("given", ["sft", "sft/iter_0000012"])
def test_our_own_training_checkpoints_lead_to_the_folder_beside_them(tmp_path, capsys, given):
    """slime's converter reads Megatron's format, which they are not."""
    folder_with(tmp_path, "sft/latest_checkpointed_iteration.txt", "sft/iter_0000012/model.safetensors")
    command = ["--checkpoint", str(tmp_path / given), "--output-path", str(tmp_path / "out.json")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "(train.py --save-hf DIR)" in error and "convert_torch" not in error and len(error.splitlines()) == 1
    folder_with(tmp_path, "sft/hf/config.json")
    assert main(command) == 2
    assert f"use the folder that --save-hf wrote: {tmp_path}/sft/hf\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--agent", "checkpoint"], "--checkpoint"),
        (["--agent", "teacher", "--domain", "telecoms"], "telecom"),
        (["--agent", "teacher", "--task-split", "tests"], "test"),
        (["--agent", "teacher", "--num-tasks", "41"], "40 tasks"),
        (["--agent", "teacher", "--num-tasks", "0"], "40 tasks"),
        (["--agent", "teacher", "--num-trials", "0"], "--num-trials"),
        (["--agent", "teacher", "--max-steps", "0"], "max_steps"),
        (["--agent", "teacher", "--max-steps", "1"], "max_steps must be at least 2"),
        (["--agent", "teacher", "--temperature", "-1"], "--temperature"),
        (["--agent", "always-transfer", "--agent-llm", "gpt-x"], "--agent-llm is of --agent chat"),
        (["--checkpoint", "x", "--agent-base-url", "http://127.0.0.1:8000/v1"], "--agent-base-url is of --agent chat"),
        (["--checkpoint", "x", "--agent-llm-args", '{"top_p": 0.9}'], "--agent-llm-args is of --agent chat"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, named):
    assert main([*flags, "--output-path", str(tmp_path / "out.json")]) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_and_a_foreign_output(tmp_path, capsys):
    assert main(["--agent", "teacher", "--output-path", str(tmp_path / "no" / "out.json")]) == 2
    (tmp_path / "out.json").write_text("mine")
    assert main(["--agent", "teacher", "--output-path", str(tmp_path / "out.json")]) == 2
    assert "choose another" in capsys.readouterr().err and (tmp_path / "out.json").read_text() == "mine"


def test_a_server_of_another_model_is_refused(evaluate, model, capsys):
    model.model_path = "/models/other"
    code, result = evaluate("--num-tasks", "1")
    assert code == 2 and result is None and "--served-as /models/other" in capsys.readouterr().err
    code, result = evaluate("--num-tasks", "1", "--served-as", "/models/other")
    assert code == 0 and result["pass_at_1"] == 1.0


def test_a_path_that_is_not_whole_may_be_another_checkouts(
    evaluate, model, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    """SGLang gives the path as it was typed: runs/hf, and there is a runs/hf here too."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/hf").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    model.model_path = "runs/hf"
    code, result = evaluate("--num-tasks", "1", "--checkpoint", "runs/hf")
    refused = capsys.readouterr().err
    assert code == 2 and result is None and "no whole path" in refused and "--served-as runs/hf" in refused
    code, result = evaluate("--num-tasks", "1", "--checkpoint", "runs/hf", "--served-as", "runs/hf")
    assert code == 0 and result["pass_at_1"] == 1.0
    own = evaluate_tau2.parse_args(["--checkpoint", "runs/hf", "--output-path", "o.json"])
    assert str(tiny_model_dir.resolve()) in model_server.server_command(own)[0], "sensitivity.py asks it several times"


@pytest.fixture
def served_folder(tiny_model_dir, tmp_path, unused_tcp_port):
    """(folder, url) of a one-machine server that was told its folder by a path from where it was started."""
    folder, log = tmp_path / "hf", tmp_path / "server.log"
    shutil.copytree(tiny_model_dir, folder)
    command = [sys.executable, "-m", "slime_local.server", "--model-path", "hf", "--port", str(unused_tcp_port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, start_new_session=True)
    url = f"http://127.0.0.1:{unused_tcp_port}"
    try:
        model_server.wait_until_ready(model_server.Server(url, {}, process, log))
        yield folder, url
    finally:
        model_server.stop(process)


def test_a_server_says_which_folder_and_weights_it_loaded(served_folder, tmp_path, capsys):
    folder, url = served_folder
    info = model_server.ask_model_info(url)
    assert (info["model_path"], info["fingerprint"]) == (str(folder.resolve()), model_server.fingerprint(folder))
    assert model_server.check_serves(info, url, str(folder)) is info
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})  # as --save-hf does
    flags = ["--checkpoint", str(folder), "--sglang-port", url.rpartition(":")[2], "--prompt", "short"]
    flags += ["--num-tasks", "1", "--max-turn-tokens", "8", "--output-path", str(tmp_path / "o.json")]
    for named in ([], ["--served-as", str(folder)]):
        assert main([*flags, *named]) == 2 and "has other weights than" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_server_and_evaluation_take_the_same_fingerprint(tmp_path):
    """Neither may import the other."""
    files = {"config.json": 300, "b.safetensors": 3_000_000, "a.safetensors": 10, "pytorch_model-1.bin": 70_000}
    for name, size in files.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    assert hf_folder.fingerprint(tmp_path) == model_server.fingerprint(tmp_path)


def damage(weights, how):
    data = bytearray(weights.read_bytes())
    data[:8] = {"long": (2**63).to_bytes(8, "little"), "short": (3).to_bytes(8, "little")}.get(how, data[:8])
    if how == "outside":
        data = data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')[:-100]
    weights.write_bytes({"empty": b"", "cut": data[:5]}.get(how, data))


@pytest.mark.parametrize("how", ["whole", "long", "short", "outside", "empty", "cut"])
def test_every_tensor_is_in_the_fingerprint(tiny_model_dir, tmp_path, how):
    """Of a damaged file too, both take the same one."""
    weights = tmp_path / "model.safetensors"
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    names, seen = list(load_file(tiny_model_dir / "model.safetensors")), set()
    for changed in [None, *names] if how == "whole" else [None]:
        tensors = load_file(tiny_model_dir / "model.safetensors")
        if changed:
            tensors[changed].flatten()[-1] += 1
        save_file(tensors, weights, {"format": "pt"})
        damage(weights, how)
        seen.add(model_server.fingerprint(tmp_path))
        assert hf_folder.fingerprint(tmp_path) == model_server.fingerprint(tmp_path)
    assert len(seen) == (1 + len(names) if how == "whole" else 1)


def test_a_server_elsewhere_needs_only_config_and_tokenizer_here(model, tiny_model_dir, tmp_path, capsys):
    folder, output = tmp_path / "no-weights", tmp_path / "o.json"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ["--checkpoint", str(folder), "--prompt", "short", "--num-tasks", "1", "--output-path", str(output)]
    assert main(flags) == 2 and "no weights" in capsys.readouterr().err
    with serving(model) as (host, port):
        flags += ["--server-address", f"{host}:{port}", "--served-as", str(tiny_model_dir)]
        assert main(flags) == 0
    made_of = json.loads(output.read_text())["settings"]["model"]
    assert made_of["served_as"] == str(tiny_model_dir) and made_of["at"] == f"{host}:{port}"


def test_tau2s_own_flag_names(tmp_path):
    flags = "--agent teacher --task-split-name train --num-trials 2 --max-concurrency 4 --max-errors 10 --auto-resume"
    flags += (
        f" --user-llm scripted --agent-llm-args {{}} --user-llm-args {{}} --num-tasks 2 --save-to {tmp_path}/o.json"
    )
    assert main(flags.split()) == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["task_split"] == "train" and result["seeds"] == [300, 301] and result["total_episodes"] == 4


def test_a_port_that_something_else_holds_is_refused(tmp_path, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr(model_server, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--checkpoint", str(tiny_model_dir), "--output-path", str(tmp_path / "out.json")]
        assert main([*flags, "--sglang-port", str(other.getsockname()[1])]) == 2
    assert "is taken" in capsys.readouterr().err


def test_a_server_address_where_nothing_answers(tmp_path, tiny_model_dir, unused_tcp_port, capsys):
    flags = ["--checkpoint", str(tiny_model_dir), "--output-path", str(tmp_path / "out.json")]
    assert main([*flags, "--server-address", f"127.0.0.1:{unused_tcp_port}"]) == 2
    assert "no server answers" in capsys.readouterr().err
    assert main([*flags, "--server-address", "localhost"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_a_server_is_started_and_stopped_again(run_script, tmp_path, tiny_model_dir, unused_tcp_port):
    """The one-machine server with random weights: no success, but every part of the way is real."""
    output = tmp_path / "out.json"
    flags = ["--checkpoint", tiny_model_dir, "--sglang-port", unused_tcp_port, "--prompt", "short"]
    flags += ["--num-tasks", 2, "--max-turn-tokens", 8, "--output-path", output]
    done = run_script(SCRIPT, *flags, timeout=300)
    assert done.returncode == 0, done.stderr + (tmp_path / "out.server.log").read_text()
    result = json.loads(output.read_text())
    assert result["pass_at_1"] == 0.0 and result["end_reasons"] == {"response_cut": 2}
    assert result["tokens"]["generated"] == 16
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", unused_tcp_port), timeout=1)


def test_a_server_that_dies_shows_its_last_words(tmp_path, tiny_model_dir, unused_tcp_port, capsys, monkeypatch):
    words = [sys.executable, "-c", "print('out of memory, sorry'); raise SystemExit(3)"]
    monkeypatch.setattr(model_server, "server_command", lambda args: (words, dict(os.environ)))
    flags = ["--checkpoint", str(tiny_model_dir), "--output-path", str(tmp_path / "out.json")]
    assert main([*flags, "--sglang-port", str(unused_tcp_port)]) == 2
    assert "out of memory, sorry" in capsys.readouterr().err


def test_no_thread_runs_while_a_server_is_forked(tmp_path, tiny_model_dir, unused_tcp_port, monkeypatch):
    """One that was just importing loguru ended the evaluation with "release unlocked lock", once in many starts."""
    before, counted = threading.active_count(), []

    def refuse(*args, **options):
        counted.append(threading.active_count())
        raise OSError("no more processes")

    monkeypatch.setattr(model_server.subprocess, "Popen", refuse)
    flags = ["--checkpoint", str(tiny_model_dir), "--output-path", str(tmp_path / "out.json")]
    assert main([*flags, "--sglang-port", str(unused_tcp_port)]) != 0
    assert counted == [before]


# ---------------------------------------------------------------------------------------------------------------------


def test_tasks_are_chosen_evenly():
    assert choose_tasks(list(range(40)), 4) == [0, 10, 20, 30]
    assert choose_tasks(list(range(40)), 40) == choose_tasks(list(range(40)), None) == list(range(40))


def test_the_error_is_clustered_by_task():
    rows = [{"task_id": task, "solved": task == "a"} for task in ("a", "b") for _ in range(50)]
    assert task_stderr(rows) == pytest.approx(0.5)
    assert task_stderr(rows[:50]) is None

"""compare, rescore and the result file: through the command line, and with tau2's own commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_generate import FakeModel, serving

import summarize
from evaluate_tau2 import main
from openai_tool_adapter import load_chat_template
from tau2_compare import labels
from tau2_domains import tau2_version
from tau2_teacher import AlwaysTransfer, ScriptedTeacher

pytestmark = pytest.mark.usefixtures("own_signal_handler")

COUNT = ["--num-tasks", "12"]
LISTS = json.dumps(dict.fromkeys("results simulations num_trials prompt customer agent".split(), 3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the scripted agents on 12 tasks."""
    folder = tmp_path_factory.mktemp("runs")
    for agent in ("teacher", "always-transfer", "do-nothing"):
        assert main(["--agent", agent, *COUNT, "--output-path", str(folder / f"{agent}.json")]) == 0
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_model_dir):
    """A model that solves some trials of a task and not others: 6 tasks x 4 trials, some of them truncated."""
    agents = iter([ScriptedTeacher, AlwaysTransfer, ScriptedTeacher] * 100)
    model = FakeModel(load_chat_template(str(tiny_model_dir)), lambda: next(agents)(), str(tiny_model_dir))
    output = tmp_path_factory.mktemp("mixed") / "mixed.json"
    flags = ["--checkpoint", tiny_model_dir, "--prompt", "short", "--num-tasks", 7, "--num-trials", 4]
    flags += ["--temperature", 0.7, "--max-steps", 16, "--max-concurrency", 1, "--output-path", output]
    with serving(model) as (_, port):
        assert main([*map(str, flags), "--sglang-port", str(port)]) == 0
    return output


def read(path):
    return json.loads(Path(path).read_text())


# ---------------------------------------------------------------------------------------------------------------------


def test_a_command_that_there_is_not_is_named(capsys):
    assert main(["compar", "a.json", "b.json"]) == 2
    assert "unknown command 'compar': choose of run, compare, report, rescore" in capsys.readouterr().err


def test_compare_says_which_run_is_better_and_which_tasks_flipped(runs, capsys, tmp_path):
    found = tmp_path / "c.json"
    paths = [str(runs / f"{agent}.json") for agent in ("always-transfer", "teacher", "do-nothing")]
    assert main(["compare", *paths, "--output-path", str(found)]) == 0
    out, pairs = capsys.readouterr().out, read(found)["pairs"]
    assert [pair["b"] for pair in pairs] == ["teacher", "do-nothing"] and pairs[1]["a"] == "always-transfer"
    solved = read(paths[0])["successes"]
    assert pairs[0]["pass_at_1"]["value"] == pytest.approx((12 - solved) / 12) and pairs[0]["pass_at_1"]["told_apart"]
    assert len(pairs[0]["flips"]) == 12 - solved and pairs[0]["flips"][0]["task_id"] in out
    assert "teacher solves more than always-transfer" in out


def test_compare_says_when_the_data_cannot_tell(runs, tmp_path, capsys):
    result = read(runs / "teacher.json")
    result["results"][3] |= {"solved": False, "reward": 0.0, "partial_score": 0.5}
    (tmp_path / "worse.json").write_text(json.dumps(result))
    assert main(["compare", str(runs / "teacher.json"), str(tmp_path / "worse.json")]) == 0
    out = capsys.readouterr().out
    assert "cannot tell teacher and worse apart" in out and "would take some" in out
    assert main(["compare", str(runs / "teacher.json"), str(runs / "teacher.json")]) == 0
    assert "solve the same tasks" in capsys.readouterr().out


def test_runs_of_other_customers_or_limits_are_refused_unless_told(runs, tmp_path, capsys):
    other = str(tmp_path / "other.json")
    assert main(["--agent", "teacher", *COUNT, "--max-steps", "150", "--prompt", "short", "--output-path", other]) == 0
    both = ["compare", str(runs / "teacher.json"), other]
    capsys.readouterr()
    assert main(both) == 2
    refused = capsys.readouterr().err
    assert "max_steps 200 and 150" in refused and "prompt" in refused and "--anyway" in refused
    assert main([*both, "--anyway"]) == 0
    assert "DIFFERENT max_steps" in capsys.readouterr().out


def with_settings(path, folder, name, **changed):
    """A copy of the result with other settings."""
    result = read(path)
    result["settings"] |= changed
    (folder / f"{name}.json").write_text(json.dumps(result))
    return str(folder / f"{name}.json")


@pytest.mark.parametrize("limit", ["max_turn_tokens", "max_context_len"])
def test_runs_with_other_token_limits_are_refused(runs, tmp_path, capsys, limit):
    teacher = runs / "teacher.json"
    one, other = (with_settings(teacher, tmp_path, str(value), **{limit: value}) for value in (1024, 96))
    assert main(["compare", one, other]) == 2
    assert f"{limit} 1024 and 96" in capsys.readouterr().err


@pytest.mark.parametrize(
    "chosen",
    [{"redraw_ids": True}, *({"user_args": {"mood": mood}} for mood in ("mixed", "persona", "misreads"))],
)
def test_other_seeds_are_refused_where_they_draw_other_customers(runs, tmp_path, capsys, chosen):
    one, other, same = (
        with_settings(runs / "teacher.json", tmp_path, name, seed=seed, **chosen)
        for name, seed in (("one", 1), ("other", 2), ("same", 1))
    )
    assert main(["compare", one, other]) == 2
    assert "seed 1 and 2" in capsys.readouterr().err
    assert main(["compare", one, same]) == 0


def test_the_plain_customer_with_its_own_ids_is_the_same_with_every_seed(runs, tmp_path):
    other = str(tmp_path / "other.json")
    assert main(["--agent", "teacher", *COUNT, "--seed", "7", "--output-path", other]) == 0
    assert read(other)["settings"]["seed"] == 7
    assert main(["compare", str(runs / "teacher.json"), other]) == 0


def test_equal_differences_tell_no_size_that_would_show(runs, tmp_path, capsys):
    results = [read(runs / "teacher.json") for _ in range(2)]
    for name, result, solved in zip(("none", "all"), results, (False, True), strict=True):
        result |= {key: result[key][:4] for key in ("results", "simulations")}
        for row in result["results"]:
            row |= {"solved": solved, "reward": float(solved), "partial_score": float(solved)}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert main(["compare", str(tmp_path / "none.json"), str(tmp_path / "all.json")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("the data cannot tell none and all apart on pass@1")


def test_a_reader_that_has_gone_is_no_error(runs):
    """`compare ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "evaluate_tau2", "compare", *map(str, sorted(runs.glob("*.json")))]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_common_episodes_are_paired(runs, tmp_path, capsys):
    other = str(tmp_path / "few.json")
    assert main(["--agent", "do-nothing", "--num-tasks", "4", "--output-path", other]) == 0
    assert main(["compare", str(runs / "teacher.json"), other]) == 0
    assert "4 tasks, 4 paired episodes" in capsys.readouterr().out
    train = str(tmp_path / "train.json")
    assert main(["--agent", "do-nothing", "--num-tasks", "2", "--task-split", "train", "--output-path", train]) == 0
    assert main(["compare", str(runs / "teacher.json"), train]) == 2
    assert "no task and trial in common" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"results": []}', LISTS, "null", "[" * 100_000])
@pytest.mark.parametrize("command", [["compare"], ["rescore"]])
def test_what_is_no_result_is_refused_in_one_line(runs, tmp_path, capsys, content, command):
    (tmp_path / "x.json").write_text(content)
    paths = [str(tmp_path / "x.json"), str(runs / "teacher.json")][: 1 + (command == ["compare"])]
    assert main([*command, *paths]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "x.json" in error and len(error.splitlines()) == 1
    assert main([*command, str(tmp_path / "nowhere.json"), *paths[1:]]) == 2


def test_labels_are_as_short_as_they_can_be():
    assert labels(["a/eval_sft.json", "a/eval_grpo.json"]) == ["eval_sft", "eval_grpo"]
    assert labels(["a/eval.json", "b/eval.json"]) == ["a/eval", "b/eval"]
    assert labels(["a/eval.json", "a/eval.json"]) == ["a/eval.json (1)", "a/eval.json (2)"]


# ---------------------------------------------------------------------------------------------------------------------


def test_rescoring_gives_the_same_numbers_without_a_model(mixed, tmp_path, capsys):
    again = tmp_path / "again.json"
    assert main(["rescore", str(mixed), "--output-path", str(again)]) == 0
    assert "0 of 28 episodes have other checks" in capsys.readouterr().out
    old, new = read(mixed), read(again)
    assert new == old and "max_steps" in old["end_reasons"]


def test_rescoring_mends_rewards_that_were_tampered_with(mixed, tmp_path, capsys):
    result = read(mixed)
    honest = result["pass_at_1"]
    for row in result["results"]:
        row |= {"reward": 1.0, "solved": True, "checks": {}}
    result["pass_at_1"] = 1.0
    (tmp_path / "x.json").write_text(json.dumps(result))
    again = tmp_path / "again.json"
    assert main(["rescore", str(tmp_path / "x.json"), "--output-path", str(again)]) == 0
    assert read(again)["pass_at_1"] == honest < 1 and "28 of 28" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["compare", "teacher"], ["rescore"]])
def test_the_result_of_another_evaluation_is_not_overwritten(runs, tmp_path, capsys, command):
    inputs = [str(runs / f"{name}.json") for name in [*command[1:], "do-nothing"]]
    result = (runs / "always-transfer.json").read_bytes()
    (tmp_path / "result.json").write_bytes(result)
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "damaged.rows.jsonl").write_text("")
    for name in ("result", "damaged"):
        assert main([command[0], *inputs, "--output-path", str(tmp_path / f"{name}.json")]) == 2
        assert "holds the result of an evaluation" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == result
    assert main(["rescore", inputs[-1], "--output-path", inputs[-1]]) == 2


def test_a_comparison_may_be_made_again(runs, tmp_path):
    paths = [str(runs / f"{name}.json") for name in ("teacher", "do-nothing")]
    for _ in range(2):
        assert main(["compare", *paths, "--output-path", str(tmp_path / "c.json")]) == 0


def test_runs_that_were_graded_by_another_tau2_are_refused(runs, tmp_path, capsys):
    result = read(runs / "do-nothing.json")
    result["versions"]["tau2"] = "tau2 0.0"
    (tmp_path / "rescored.json").write_text(json.dumps(result))
    assert main(["compare", str(runs / "teacher.json"), str(tmp_path / "rescored.json")]) == 2
    assert f"graded by {tau2_version()!r} and 'tau2 0.0'" in capsys.readouterr().err


def test_simulations_in_another_order_than_their_results_are_refused(runs, tmp_path, capsys):
    result = read(runs / "teacher.json")
    result["simulations"].reverse()
    (tmp_path / "x.json").write_text(json.dumps(result))
    assert main(["rescore", str(tmp_path / "x.json")]) == 2
    assert "not of the same task and trial" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The table of run_local.sh


def stage(runs, folder, name, **changed):
    (folder / f"eval_{name}.json").write_text(json.dumps(read(runs / "teacher.json") | changed))


def test_a_table_holds_stages_that_were_evaluated_alike(runs, tmp_path, capsys):
    for name in ("base", "grpo"):
        stage(runs, tmp_path, name)
    stage(runs, tmp_path, "redrawn", redraw_ids=True)
    assert summarize.main(["--run-dir", str(tmp_path)]) == 0
    assert "12 telecom test tasks, greedy." in capsys.readouterr().out
    for name in ("base", "grpo", "redrawn"):
        stage(runs, tmp_path, name, temperature=0.7, redraw_ids=name == "redrawn")
    assert summarize.main(["--run-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "temperature 0.7" in out and "greedy" not in out


@pytest.mark.parametrize(
    "changed",
    [
        {"customer": {"kind": "llm"}},
        {"task_split": "train"},
        {"total_tasks": 7},
        {"redraw_ids": True},
        {"prompt": "x"},
    ],
)
def test_a_table_of_stages_that_were_evaluated_otherwise_is_refused(runs, tmp_path, capsys, changed):
    stage(runs, tmp_path, "base")
    stage(runs, tmp_path, "grpo", **changed)
    assert summarize.main(["--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"eval_base.json and eval_grpo.json cannot stand in one table ({next(iter(changed))} " in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "summary.json").exists()


def test_a_model_that_nobody_asked_is_not_shown(runs, tmp_path, capsys):
    """--agent-llm beside another agent was once accepted and recorded."""
    (tmp_path / "x.json").write_text(json.dumps(read(runs / "always-transfer.json") | {"agent_llm": "gpt-x"}))
    assert main(["rescore", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "gpt-x" not in out and "always-transfer" in out.splitlines()[0]


def test_rescoring_redrawn_ids(tmp_path, capsys):
    output = tmp_path / "redrawn.json"
    flags = ["--agent", "teacher", "--redraw-ids", "--num-tasks", "4", "--num-trials", "2"]
    assert main([*flags, "--output-path", str(output)]) == 0
    assert "tasks" not in read(output), "tau2 itself would grade re-drawn ids wrongly"
    assert main(["rescore", str(output)]) == 0
    assert "0 of 8 episodes have other checks" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# tau2's own commands


def tau2(*words, answers=""):
    script = "import sys; from tau2.cli import main; sys.exit(main())"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "COLUMNS": "200"}
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, input=answers, capture_output=True, text=True, timeout=120, env=environment)


def test_tau2_grades_the_file_to_the_same_rewards(mixed, tmp_path):
    done = tau2("evaluate-trajs", mixed, "-o", tmp_path)
    assert done.returncode == 0 and "All files processed successfully" in done.stdout, done.stdout + done.stderr
    ours, theirs = read(mixed)["results"], read(tmp_path / "updated_mixed.json")["simulations"]
    rewards = {(run["task_id"], run["trial"]): run["reward_info"]["reward"] for run in theirs}
    assert rewards == {(row["task_id"], row["trial"]): row["reward"] for row in ours}
    assert 0 < sum(rewards.values()) < len(rewards)


def test_tau2s_metrics_are_ours(mixed):
    from tau2.data_model.simulation import Results
    from tau2.metrics.agent_metrics import compute_metrics

    theirs, ours = compute_metrics(Results.load(mixed)), read(mixed)
    for k, value in theirs.pass_hat_ks.items():
        assert ours["metrics"]["pass_hat_k"][str(k)]["value"] == pytest.approx(value, abs=1e-6)
    assert len(theirs.pass_hat_ks) == 4 and 0 < theirs.pass_hat_ks[4] < theirs.pass_hat_ks[1]
    assert ours["avg_reward"] == pytest.approx(theirs.avg_reward)


def test_tau2_view_shows_the_file(mixed):
    leave = "5" if tau2_version().startswith("nvidia") else "6"
    done = tau2("view", "--file", mixed, answers=f"1\n1\n2\n3\n1\n\n{leave}\n")
    assert "Loaded 28 simulations from" in done.stdout, done.stdout + done.stderr
    assert str(read(mixed)["avg_reward"])[:4] in done.stdout and "Trial: 3" in done.stdout
    assert "Hi! How can I help you today?" in done.stdout and "Thanks for using" in done.stdout


def test_the_leaderboard_accepts_a_base_split_of_four_trials(tmp_path):
    output = tmp_path / "base.json"
    flags = ["--agent", "always-transfer", "--task-split", "base", "--num-trials", "4"]
    assert main([*flags, "--output-path", str(output)]) == 0
    done = tau2("submit", "verify-trajs", output)
    assert done.returncode == 0 and "All files passed all checks" in done.stdout, done.stdout
    assert read(output)["floor_always_transfer"] == read(output)["pass_at_1"]

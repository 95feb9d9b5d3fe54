"""Failed episodes that the scripted teacher mends: rows of --from-rollouts RUN --mend N."""

import asyncio

import pytest
from test_rollout_traces import BY_TYPE, NaturalTeacher, make, roll_out, teacher_row, template  # noqa: F401

import mended_traces
import rollout_traces
import teacher_traces
from slime_local.masks import LossMasker
from tau2_domains import issue_type, load_tasks
from tau2_episode import AgentToolCall, AgentTurn, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_teacher import ScriptedTeacher

WRONG = "I will look into it."
MENDED = ["--mend", "1"]


@pytest.fixture(scope="module")
def failed(smol_dir, template):  # noqa: F811
    """A failed sample of each issue type: where the teacher asks for something, the model does not."""
    model = NaturalTeacher(template)
    model.say = lambda text: WRONG if text.startswith("Please") else text
    samples = roll_out(smol_dir, model, BY_TYPE.values(), template)
    assert not any(sample.metadata["tau2"]["solved"] for sample in samples)
    return samples


def agent_turns(row):
    return [message for message in row["prompt"][2:] if message["role"] == "assistant"]


def test_a_mended_row_is_the_teachers_from_the_first_wrong_turn_on(make, failed):  # noqa: F811
    rows, output = make(failed, flags=MENDED)
    assert len(rows) == 3 and "mended: 3 episodes, 0 with the model's mistake" in output
    for row in rows:
        assert row["prompt"] == asyncio.run(teacher_row(row["metadata"]))["prompt"]
        assert row["metadata"]["reward"] == 1.0 and row["metadata"]["split"] == "train"
        source = row["metadata"]["source"]
        assert source["own_turns"] >= 1 and source["mistake"] is None
        said = agent_turns(row)
        assert not any((turn["content"] or "").startswith("Please") for turn in said[: source["own_turns"]])
        assert said[source["own_turns"]]["content"].startswith("Please")


def test_with_its_mistake_kept_it_is_not_trained_and_the_correction_follows(make, failed, smol_dir, template):  # noqa: F811
    rows, output = make(failed, flags=[*MENDED, "--keep-mistakes"])
    assert len(rows) == 3 and "3 with the model's mistake" in output
    masker = LossMasker(template.tokenizer, "qwen3")
    for row in rows:
        said, place = agent_turns(row), row["metadata"]["source"]["mistake"]
        assert [turn["content"] for turn in said].count(WRONG) == 1 and said[place]["content"] == WRONG
        assert said[place]["step_loss_mask"] == 0 and said[place + 1]["content"].startswith("Please")
        ids, mask = masker.mask(row["prompt"], row["tools"])
        trained = template.tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
        assert WRONG not in trained and said[place + 1]["content"] in trained


def test_solved_and_mended_rows_are_mixed_and_the_same_every_time(make, failed, tmp_path, smol_dir, template):  # noqa: F811
    solved = roll_out(smol_dir, NaturalTeacher(template), BY_TYPE.values(), template)
    rows, _ = make(failed, solved, flags=MENDED)
    assert len(rows) == 6 and sum("own_turns" in row["metadata"]["source"] for row in rows) == 3
    first = (tmp_path / "rollout_traces.jsonl").read_bytes()
    make(failed, solved, flags=MENDED)
    assert (tmp_path / "rollout_traces.jsonl").read_bytes() == first


def test_rows_are_drawn_by_kind(make, failed, smol_dir, template):  # noqa: F811
    solved = roll_out(smol_dir, NaturalTeacher(template), BY_TYPE.values(), template)
    mix = ["--mix", "service_issue=2,mms_issue=1,mobile_data_issue=1", "--num-traces", "16"]
    rows, _ = make(failed, solved, flags=[*MENDED, *mix])
    kinds = [issue_type(row["metadata"]["task_id"]) for row in rows]
    assert len(rows) == 16 and kinds.count("service_issue") == 8 and kinds.count("mms_issue") == 4
    assert {"own_turns" in row["metadata"]["source"] for row in rows[:8]} == {True, False}


def test_each_task_gives_at_most_n_different_rows(make, failed):  # noqa: F811
    rows, _ = make(failed, failed, failed, flags=["--mend", "2"])
    assert len(rows) == 3  # the same dialogues again


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--keep-mistakes", "--from-rollouts", "x.json"], "--keep-mistakes belongs to --mend N"),
        (["--mend", "1"], "--mend belongs to --from-rollouts RUN"),
        (["--mend", "1", "--from-rollouts", "x.json", "--domain", "retail"], "follows telecom's policy only"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, flags, told):
    assert teacher_traces.main(["--local_dir", str(tmp_path), *flags]) == 2
    assert told in capsys.readouterr().err


def recorded(task, turns, user=None):
    record = {"task_id": task.id, "prompt": "short", "seed": 0, "user": user or {"kind": "scripted"}}
    messages = [{"role": "assistant", "content": "Hi"}, *turns]
    return rollout_traces.Recorded(record, "telecom", "train", messages, "run", 0)


def test_a_customer_that_cannot_be_asked_again_is_refused():
    task = load_tasks("telecom", "train")[0]
    with pytest.raises(BadInput, match="only the scripted one"):
        mended_traces.mend({task.id: [recorded(task, [], {"kind": "llm"})]}, 1, "checks", 1)


def test_the_last_turn_and_one_that_cannot_be_executed_are_left_out():
    task = BY_TYPE["mms_issue"]
    invalid = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "invalid_tool_call", "arguments": {}}}],
    }
    for turns in ([{"role": "assistant", "content": WRONG}], [invalid, {"role": "assistant", "content": WRONG}]):
        (mended,), dropped = mended_traces.mend({task.id: [recorded(task, turns)]}, 1, "checks", 1, keep_mistakes=True)
        assert mended.mistake is None and mended.own_turns == 0 and mended.episode.solved and not dropped


def test_the_wording_that_the_model_followed_goes_on():
    task = next(task for task in load_tasks("telecom", "train") if issue_type(task.id) == "mms_issue")
    config = EpisodeConfig(prompt="short")
    said = asyncio.run(run_episode(task, ScriptedTeacher("checklist", wording=2), config)).messages[2:]
    own = [m for m in said if m["role"] == "assistant"][:2]
    (mended,), _ = mended_traces.mend({task.id: [recorded(task, own)]}, 1, "checklist", 4)
    assert mended.own_turns == 2 and mended.episode.messages[2:] == said


def test_a_hand_overs_summary_is_free():
    def calls(name, **arguments):
        return AgentTurn(tool_calls=[AgentToolCall(name, arguments)])

    assert mended_traces.same_turn(calls("transfer_to_human_agents", summary="a"), calls("transfer_to_human_agents"))
    assert not mended_traces.same_turn(calls("get_details_by_id", id="a"), calls("get_details_by_id", id="b"))
    assert not mended_traces.same_turn(AgentTurn("a"), calls("get_details_by_id", id="a"))
    assert mended_traces.same_turn(AgentTurn("a "), AgentTurn("a"))

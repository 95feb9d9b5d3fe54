"""The curriculum's data source: which tasks it draws, and that a resumed run draws what an undisturbed one would."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_ARGS
from hypothesis import given, settings
from hypothesis import strategies as st

import tau2_curriculum
from slime_local.sample import Sample
from slime_local.train_data import save_debug_samples
from tau2_curriculum import CurriculumDataSource, check_args
from tau2_errors import BadInput
from tau2_reward_shaping import process_all_samples

HOOK = "tau2_reward_shaping.process_all_samples"
TASKS = [f"task {number}" for number in range(12)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text("".join(json.dumps({"index": i, "metadata": {"task_id": t}}) + "\n" for i, t in enumerate(TASKS)))
    return path


@pytest.fixture(scope="module")
def make_args(rows):
    def make(**changes):
        values = {
            "prompt_data": str(rows),
            "input_key": "index",
            "label_key": None,
            "tool_key": None,
            "metadata_key": "metadata",
            "apply_chat_template": False,
            "rollout_max_prompt_len": None,
            "rollout_seed": 3,
            "rollout_shuffle": True,
            "rollout_global_dataset": True,
            "rollout_all_samples_process_path": HOOK,
            "hf_checkpoint": "unused",
            "n_samples_per_prompt": 4,
            "save": None,
            "load": None,
        }
        return SimpleNamespace(**{**values, **changes})

    # The rows need no tokenizer.
    original = tau2_curriculum._host_source
    tau2_curriculum._host_source = lambda args: source_without_tokenizer(args)
    yield make
    tau2_curriculum._host_source = original


def source_without_tokenizer(args):
    from slime_local.data import RolloutDataSource

    return RolloutDataSource(args, tokenizer=object())


def play(source, count, rate):
    """One rollout: the tasks drawn, after their outcomes were told. rate: how often a task is solved."""
    groups = source.get_samples(count)
    for group in groups:
        for sample in group:
            task = sample.metadata["task_id"]
            sample.reward = float(hash_of(task, sample.index) < rate(task))
            sample.metadata["tau2"] = {"solved": bool(sample.reward), "reward": sample.reward}
            sample.status = Sample.Status.COMPLETED
    process_all_samples(source.args, groups, source.get_samples)
    return [group[0].metadata["task_id"] for group in groups]


def hash_of(*parts):
    return int.from_bytes(repr(parts).encode(), "big") % 1009 / 1009


def by_number(task):
    """Of 12 tasks the first 4 are never solved, the last 4 always, those between half of the time."""
    number = TASKS.index(task)
    return 0.0 if number < 4 else 2.0 if number >= 8 else 0.5


# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_sometimes_solved_is_drawn_most_and_nothing_is_given_up(make_args):
    source = CurriculumDataSource(make_args())
    drawn = [play(source, 3, by_number) for _ in range(400)]
    late = Counter(task for tasks in drawn[40:] for task in tasks)
    assert set(late) == set(TASKS)
    assert min(late[task] for task in TASKS[4:8]) > 3 * max(late[task] for task in TASKS[:4] + TASKS[8:])
    assert source.metrics() == {
        "curriculum/untried": 0,
        "curriculum/always_solved": 4,
        "curriculum/never_solved": 4,
        "curriculum/open": 4,
    }


def test_weights(make_args):
    source = CurriculumDataSource(make_args(tau2_curriculum_tries=2, tau2_curriculum_revisit=0.1))
    assert source.weight("new") == 1.0
    for outcomes, weight in [([1, 0], 1.0), ([1], 4 * (2 / 3) * (1 / 3)), ([0, 0], 0.1), ([1, 1, 1], 0.1)]:
        source.outcomes = {"a": outcomes}
        assert source.weight("a") == pytest.approx(weight)


def test_groups_are_slimes(make_args):
    source = CurriculumDataSource(make_args())
    groups = source.get_samples(14)  # more than there are rows: a second draw
    assert [group[0].group_index for group in groups] == list(range(14)) and len(source) == 12
    assert [sample.index for group in groups for sample in group] == list(range(56))
    assert len({group[0].metadata["task_id"] for group in groups[:12]}) == 12
    assert groups[0][0].metadata is not groups[0][1].metadata
    with pytest.raises(RuntimeError):
        source.add_samples(groups)


def test_a_file_that_holds_tasks_several_times_gives_none_twice_in_one_call(make_args):
    source = CurriculumDataSource(make_args())
    source.rows, source.tasks = source.rows * 4, source.tasks * 4  # as files of tau2_mock.py --mix
    for _ in range(20):
        assert len({group[0].metadata["task_id"] for group in source.get_samples(12)}) == 12
    assert len(source.get_samples(14)) == 14


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_group_index": "x"},
        {"sample_index": -1},
        {"outcomes": []},
        {"outcomes": {"a": ["1", "0"]}},
        {"outcomes": {"a": [2]}},
        {"outcomes": {"a": None}},
    ],
)
def test_a_damaged_state_is_refused(make_args, tmp_path, changes):
    args = make_args(save=str(tmp_path), load=str(tmp_path))
    source = CurriculumDataSource(args)
    play(source, 3, by_number)
    before = source.state_dict()
    with pytest.raises(BadInput, match="no state of a curriculum"):
        source.load_state_dict(before | changes)
    assert source.state_dict() == before
    source.save(0)
    path = tmp_path / "rollout/curriculum_0.json"
    path.write_text(json.dumps(before | changes))
    with pytest.raises(BadInput, match=r"curriculum_0\.json is no state"):
        source.load(0)
    with pytest.raises(BadInput, match="it is no object"):
        source.load_state_dict([])


def test_what_broke_is_no_outcome_and_old_outcomes_are_forgotten(make_args):
    source = CurriculumDataSource(make_args(tau2_curriculum_window=8))
    (group,) = source.get_samples(1)
    for sample in group:
        sample.status, sample.reward, sample.metadata["tau2"] = sample.Status.FAILED, 0.0, {"solved": False}
    process_all_samples(source.args, [group], source)
    assert source.outcomes == {}
    for _ in range(30):
        play(source, 12, lambda task: 0.0)
    assert {len(outcomes) for outcomes in source.outcomes.values()} == {8}


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(0, 7), st.integers(1, 5))
def test_a_resumed_source_draws_what_an_undisturbed_one_does(make_args, rollouts, cut, count):
    whole, first, second = (CurriculumDataSource(make_args()) for _ in range(3))
    expected = [play(whole, count, by_number) for _ in range(rollouts)]
    begun = [play(first, count, by_number) for _ in range(min(cut, rollouts))]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [play(second, count, by_number) for _ in range(rollouts - len(begun))] == expected


def test_the_state_file_is_whole_and_found_again(make_args, tmp_path, caplog):
    args = make_args(save=str(tmp_path), load=str(tmp_path))
    source = CurriculumDataSource(args)
    for rollout_id in range(3):
        play(source, 3, by_number)
        source.save(rollout_id)
    resumed = CurriculumDataSource(args)
    resumed.load(2)
    assert resumed.state_dict() == source.state_dict() and not caplog.records
    (tmp_path / "rollout" / "curriculum_2.json").unlink()  # ended between the checkpoint and this file
    resumed.load(2)
    assert resumed.sample_group_index == 6 and "continuing from curriculum_1.json" in caplog.text
    (tmp_path / "rollout" / "curriculum_1.json").write_text("{")
    with pytest.raises(BadInput, match="is no state of a curriculum"):
        resumed.load(1)
    fresh = CurriculumDataSource(args)
    fresh.load(-1)  # slime's call at the start of a run
    assert fresh.sample_group_index == 0
    assert sorted(os.listdir(tmp_path / "rollout")) == ["curriculum_0.json", "curriculum_1.json"]


def test_earlier_rollouts_are_a_start(make_args, tmp_path):
    record = {"task_id": "task 3", "reward": 0.0, "solved": False, "end_reason": "user_stop"}
    samples = [Sample(index=i, response_length=0, loss_mask=[], metadata={"tau2": record}) for i in range(9)]
    save_debug_samples(f"{tmp_path}/rollouts/{{rollout_id}}.pt", 0, samples)
    source = CurriculumDataSource(make_args(tau2_curriculum_start=[str(tmp_path)]))
    assert source.outcomes == {"task 3": [0] * 9} and source.weight("task 3") == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_all_samples_process_path": None}, "--rollout-all-samples-process-path"),
        ({"prompt_data": None}, "--prompt-data"),
        ({"tau2_curriculum_tries": 0}, "whole number of at least 1"),
        ({"tau2_curriculum_tries": 20}, "tries <= window"),
        ({"tau2_curriculum_revisit": 0}, "above 0"),
        ({"tau2_curriculum_window": "many"}, "tau2_curriculum_window is 'many'"),
        ({"tau2_curriculum_start": "nowhere"}, "does not exist"),
    ],
)
def test_wrong_settings(make_args, changes, message):
    with pytest.raises(BadInput, match=message):
        check_args(make_args(**changes))


# ---------------------------------------------------------------------------------------------------------------------
# A whole run

PLUGIN = """
import os, signal
from pathlib import Path

async def generate(args, sample, sampling_params):
    if Path("kill_me").exists() and sample.group_index >= 7:
        os.kill(os.getpid(), signal.SIGKILL)
    solved = (sample.metadata["number"] + sample.index % 4) % 4 == 0
    sample.tokens, sample.response_length = [1, 2, 3, 4], 2
    sample.loss_mask, sample.rollout_log_probs = [1, 1], [-1.0, -1.0]
    sample.reward, sample.status = float(solved), type(sample).Status.COMPLETED
    sample.metadata["tau2"] = {"solved": solved, "reward": float(solved), "end_reason": "user_stop"}
    return sample
"""


@pytest.mark.slow
def test_a_killed_and_resumed_run_draws_the_same_tasks(tmp_path, tiny_model_dir):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    rows = [{"index": i, "metadata": {"task_id": f"t{i}", "number": i % 7}} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, tiny_model_dir, "whole")
    (tmp_path / "kill_me").touch()
    run(tmp_path, tiny_model_dir, "killed", code=-signal.SIGKILL)
    (tmp_path / "kill_me").unlink()
    run(tmp_path, tiny_model_dir, "killed")
    drawn = [[tasks_of(tmp_path / name / f"{number}.pt") for number in range(4)] for name in ("whole", "killed")]
    assert drawn[0] == drawn[1] and len(drawn[0][3]) == 3


def run(folder, model, name, code=0):
    words = (
        f"--host local --hf-checkpoint {model} --prompt-data rows.jsonl --input-key index --num-rollout 4 "
        "--rollout-batch-size 3 --n-samples-per-prompt 4 --global-batch-size 12 --lr 1e-4 --seed 7 "
        "--custom-generate-function-path plugin.generate --rollout-max-response-len 8 "
        "--data-source-path tau2_curriculum.CurriculumDataSource "
        f"--rollout-all-samples-process-path {HOOK} --save {name} --load {name} --save-interval 1 "
        f"--save-debug-rollout-data {name}/{{rollout_id}}.pt"
    ).split()
    paths = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    command = [sys.executable, str(ROOT / "train.py"), *TINY_ARGS, *words]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr


def tasks_of(path):
    samples = torch.load(path, weights_only=True)["samples"]
    return [sample["metadata"]["task_id"] for sample in samples[::4]]

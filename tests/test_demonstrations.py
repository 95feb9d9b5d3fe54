"""The teacher in GRPO's groups: exact ids, whose sample is whose, and numbers that are the model's own."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import EXAMPLE, ROOT
from fake_generate import FakeModel, serving

import rollout_traces
from generate_with_tau import check_args, generate
from http_client import close_session
from openai_tool_adapter import load_chat_template
from slime_local.masks import LossMasker
from slime_local.sample import Sample
from slime_local.train_data import save_debug_samples
from tau2_domains import agent_tools, issue_type, load_tasks, system_prompt
from tau2_episode import EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_reward_shaping import episode_metrics, group_metrics, process_all_samples, tau2_reward_post_process
from tau2_teacher import ScriptedTeacher

TASKS = {issue_type(task.id): task for task in load_tasks("telecom", "train")}
PARAMS = {"temperature": 0.7, "max_new_tokens": 4096}


@pytest.fixture(scope="module")
def template(smol_dir):
    return load_chat_template(str(smol_dir))


@pytest.fixture
def model(template):
    return FakeModel(template)


@pytest.fixture
async def args(model, smol_dir):
    with serving(model) as (host, port):
        yield SimpleNamespace(
            hf_checkpoint=str(smol_dir),
            sglang_router_ip=host,
            sglang_router_port=port,
            n_samples_per_prompt=4,
            tau2_prompt="short",
            tau2_teacher_samples=1,
            tau2_teacher_style="checklist",
        )
        await close_session()


def make_sample(position, kind="mms_issue", group=5):
    metadata = {"domain": "telecom", "split": "train", "task": TASKS[kind].model_dump(mode="json")}
    return Sample(group_index=group, index=4 * group + position, session_id=f"{group}.{position}", metadata=metadata)


async def roll_out(args, kind="mms_issue"):
    return [await generate(args, make_sample(position, kind), PARAMS) for position in range(4)]


def taught(samples):
    return [sample.metadata["tau2"]["taught"] for sample in samples]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_the_last_samples_of_a_group_are_the_teachers_and_ask_no_server(args, model, count):
    args.tau2_teacher_samples = count
    samples = await roll_out(args)
    assert taught(samples) == [False] * (4 - count) + [True] * count
    assert set(model.sessions) == {f"5.{position}" for position in range(4 - count)}


async def test_an_evaluation_is_the_models_alone(args, model):
    args.n_samples_per_eval_prompt = 4
    for group in (None, 5):
        sample = make_sample(3)
        sample.group_index = group
        await generate(args, sample, PARAMS, evaluation=True)
        assert taught([sample]) == [False]
    assert len(model.sessions) == 1 and len(model.requests) > 2


@pytest.mark.parametrize("kind", sorted(TASKS))
@pytest.mark.parametrize("style", ["checks", "checklist"])
async def test_what_is_trained_is_what_the_teacher_said_in_the_ids_of_sft(args, template, smol_dir, kind, style):
    args.tau2_teacher_style = style
    (sample,) = (await roll_out(args, kind))[3:]
    config = EpisodeConfig(prompt="short")
    episode = await run_episode(TASKS[kind], ScriptedTeacher(style), config, seed=5)
    assert sample.reward == episode.reward == 1.0 and sample.metadata["tau2"]["messages"] == episode.messages[1:]
    assert sample.rollout_log_probs == [0.0] * sample.response_length

    system = {"role": "system", "content": system_prompt("telecom", "short")}
    greeting, *rest = sample.metadata["tau2"]["messages"]
    messages = [system, {**greeting, "step_loss_mask": 0}, *rest]
    ids, mask = LossMasker(template.tokenizer, "qwen3").mask(messages, agent_tools("telecom"))
    assert ids[: len(sample.tokens)] == sample.tokens
    newline = [i > 0 and ids[i - 1] == template.end_id for i in range(len(ids))]  # SFT trains it, a rollout has none
    expected = [flag and not after_end for flag, after_end in zip(mask, newline, strict=True)]
    prompt = len(sample.tokens) - sample.response_length
    assert [0] * prompt + sample.loss_mask == expected[: len(sample.tokens)]


async def test_a_teachers_turn_that_is_too_long_is_cut_like_a_models(args):
    args.tau2_max_turn_tokens = 30
    (sample,) = (await roll_out(args))[3:]
    assert sample.status is Sample.Status.TRUNCATED and sample.reward == 0.0
    assert sample.metadata["tau2"]["end_reason"] == "response_cut"
    assert sample.metadata["tau2"]["turn_tokens"][-1] == 30


# ---------------------------------------------------------------------------------------------------------------------
# Whose numbers are whose


@pytest.fixture
async def failed_group(args, model):
    """The model says nothing of use and the teacher solves the task."""
    words = [*model.template.tokenizer.encode("Goodbye.", add_special_tokens=False), model.template.end_id]
    model.behave = lambda number, payload: model.answer(words, payload["input_ids"])
    return await roll_out(args)


async def test_a_group_that_the_model_fails_learns_from_the_teacher(args, failed_group):
    raw, rewards = tau2_reward_post_process(args, failed_group)
    assert raw == [0.0] * 4  # what is logged is the model's
    assert rewards == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-4)
    assert group_metrics(args, [failed_group]) == {
        "groups/all": 1,
        "groups/failed": 1,
        "groups/solved": 0,
        "groups/mixed": 0,
        "groups/broken": 0,
        "groups/failed_with_gradient": 1,
        "groups/solved_with_gradient": 0,
    }


async def test_a_group_that_the_model_solves_too_learns_nothing(args):
    samples = await roll_out(args)
    assert tau2_reward_post_process(args, samples) == ([1.0] * 4, [0.0] * 4)
    assert group_metrics(args, [samples])["groups/solved"] == 1


async def test_the_teacher_counts_in_no_number_of_the_models(args, failed_group):
    metrics = episode_metrics(args, failed_group)
    assert metrics["pass_rate"] == 0.0 and metrics["taught"] == 1 and metrics["taught/pass_rate"] == 1.0
    assert sum(value for name, value in metrics.items() if name.startswith("stop/")) == pytest.approx(1.0)
    without = episode_metrics(args, failed_group[:3])
    assert {**without, "taught": 1, "taught/pass_rate": 1.0} == metrics

    told = []
    process_all_samples(args, [failed_group], SimpleNamespace(record_outcomes=told.extend, metrics=dict))
    assert told == failed_group[:3]


async def test_rft_keeps_none_of_the_teachers_episodes(args, tmp_path):
    samples = await roll_out(args)
    save_debug_samples(str(tmp_path / "{rollout_id}.pt"), 0, samples)
    rows = list(rollout_traces.read_traces([tmp_path / "0.pt"], "telecom", 9, 0, None, lambda messages: False).rows)
    dropped = rollout_traces.read_traces([tmp_path / "0.pt"], "telecom", 9, 0, None, lambda messages: False).dropped
    assert len(rows) == 1 and dropped["played by the teacher"] == 1 and dropped["duplicate dialogue"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# What the teacher cannot play


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tau2_teacher_samples": 4}, "a group has 4 samples"),
        ({"tau2_teacher_samples": -1}, "give a whole number of at least 0"),
        ({"tau2_teacher_style": "socratic"}, "choose one of: checks, checklist"),
        (
            {"tau2_domain": "retail", "tau2_user": "recited", "tau2_prompt": "official"},
            "for telecom only, not for retail",
        ),
        ({"use_rollout_routing_replay": True}, "no experts and no nucleus"),
        ({"rollout_top_p": 0.9}, "no experts and no nucleus"),
    ],
)
def test_it_is_refused_before_a_rollout(smol_dir, change, message):
    known = {"n_samples_per_prompt": 4, "tau2_teacher_samples": 1, "hf_checkpoint": str(smol_dir)}
    with pytest.raises(BadInput, match=message):
        check_args(SimpleNamespace(**{**known, **change}))


# ---------------------------------------------------------------------------------------------------------------------


def test_train_py_learns_from_the_teacher_what_a_random_model_never_shows(tmp_path, tiny_model_dir):
    """One real GRPO rollout and step: groups of two, one of them taught."""
    rows = [{"index": i, "metadata": make_sample(0, kind).metadata} for i, kind in enumerate(sorted(TASKS))]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yaml = "tau2_prompt: short\ntau2_max_turn_tokens: 96\ntau2_teacher_samples: 1\ntau2_teacher_style: checklist\n"
    (tmp_path / "tau2.yaml").write_text(yaml)
    flags = (
        "--prompt-data tasks.jsonl --input-key index --num-rollout 1 --rollout-batch-size 2 --n-samples-per-prompt 2 "
        "--global-batch-size 4 --custom-generate-function-path generate_with_tau.generate --lr 1e-4 "
        "--custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process --rollout-temperature 1.0 "
        "--custom-rollout-log-function-path tau2_reward_shaping.log_rollout --custom-config-path tau2.yaml "
        "--rollout-max-response-len 2048 --rollout-max-context-len 2048 --sglang-router-port 0 --save run "
        "--save-interval 1 --save-debug-rollout-data rollout_{rollout_id}.pt"
    ).split()
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLE}:{ROOT}"}
    command = [sys.executable, ROOT / "train.py", "--host", "local", "--hf-checkpoint", tiny_model_dir, *flags]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = {name: value for line in lines for name, value in json.loads(line).items()}
    assert logged["rollout/taught"] == 2 and logged["rollout/taught/pass_rate"] == 1.0
    assert logged["rollout/pass_rate"] == logged["rollout/raw_reward"] == 0.0
    assert logged["rollout/groups/failed_with_gradient"] == 2 and logged["train/grad_norm"] > 0

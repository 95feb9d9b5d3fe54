"""Rejection sampling: rows of the model's own solved episodes, from rollouts and from evaluations."""

import asyncio
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from fake_generate import FakeModel, serving

import evaluate_tau2
import rollout_traces
import teacher_traces
from generate_with_tau import generate
from http_client import close_session
from openai_tool_adapter import ChatTemplate, load_chat_template, render_turn
from slime_local.masks import LossMasker
from slime_local.sample import Sample
from slime_local.train_data import save_debug_samples
from tau2_domains import issue_type, load_split_ids, load_tasks, system_prompt
from tau2_episode import AgentToolCall, AgentTurn, EpisodeConfig, run_episode
from tau2_teacher import ScriptedTeacher

SCRIPT = "examples/tau-bench/teacher_traces.py"
TRAIN = load_tasks("telecom", "train")
BY_TYPE = {issue_type(task.id): task for task in TRAIN}
PARAMS = {"temperature": 1.0, "max_new_tokens": 4096}


class NaturalTeacher(FakeModel):
    """Says the teacher's words in the tokenizer's own ids; `say` changes the text of a turn."""

    say = staticmethod(lambda text: text)

    def _odd_ids(self, text):
        return self.template.tokenizer.encode(self.say(text), add_special_tokens=False)


def roll_out(folder, model, tasks, template):
    """Samples of the tasks through the generate plug-in."""
    samples = [
        Sample(
            group_index=number,
            index=number,
            session_id=str(number),
            metadata={"domain": "telecom", "split": "train", "task": task.model_dump(mode="json")},
        )
        for number, task in enumerate(tasks)
    ]

    async def run(address):
        args = SimpleNamespace(
            hf_checkpoint=str(folder), sglang_router_ip=address[0], sglang_router_port=address[1], tau2_prompt="short"
        )
        await asyncio.gather(*(generate(args, sample, PARAMS) for sample in samples))
        await close_session()

    with serving(model) as address:
        asyncio.run(run(address))
    return samples


@pytest.fixture(scope="module")
def template(smol_dir):
    return load_chat_template(str(smol_dir))


@pytest.fixture(scope="module")
def natural(smol_dir, template):
    """A solved sample of each issue type, its turns in the tokenizer's own ids."""
    return roll_out(smol_dir, NaturalTeacher(template), BY_TYPE.values(), template)


@pytest.fixture
def make(tmp_path, smol_dir, capsys):
    """(rows, output) of --from-rollouts over files of these lists of samples."""

    def call(*rollouts, flags=(), code=0):
        for number, samples in enumerate(rollouts):
            save_debug_samples(f"{tmp_path}/run/rollouts/{{rollout_id}}.pt", number, samples)
        command = ["--local_dir", tmp_path, "--from-rollouts", tmp_path / "run", *flags]
        assert teacher_traces.main([str(word) for word in command]) == code
        said = capsys.readouterr()
        output = tmp_path / "rollout_traces.jsonl"
        rows = [json.loads(line) for line in output.read_text().splitlines()] if code == 0 else []
        return rows, said.out + said.err

    return call


def changed(sample, **record):
    """A copy with other entries of its record."""
    copied = copy.deepcopy(sample)
    copied.metadata["tau2"] |= record
    return copied


def trained(masker, row, end_id):
    """The ids that SFT trains, without the newline that it trains after each turn."""
    ids, mask = masker.mask(row["prompt"], row["tools"])
    return [
        token
        for place, (token, bit) in enumerate(zip(ids, mask, strict=True))
        if bit and not (place and ids[place - 1] == end_id)
    ]


def sampled(sample):
    response = sample.tokens[-sample.response_length :]
    return [token for token, bit in zip(response, sample.loss_mask, strict=True) if bit]


# ---------------------------------------------------------------------------------------------------------------------
# What is trained is what was sampled


def test_sft_trains_the_sampled_ids(make, natural, template, smol_dir):
    rows, output = make(natural, flags=["--tokenizer", smol_dir])
    assert len(rows) == len(natural) == 3 and "3 of 3 dialogues have the sampled ids in every turn" in output
    masker = LossMasker(template.tokenizer, "qwen3")
    by_task = {sample.metadata["tau2"]["task_id"]: sample for sample in natural}
    for row in rows:
        sample = by_task[row["metadata"]["task_id"]]
        assert trained(masker, row, template.end_id) == sampled(sample)
        ids, _ = masker.mask(row["prompt"], row["tools"])
        assert ids[: len(sample.tokens)] == sample.tokens  # the whole dialogue, not only the turns


@pytest.mark.parametrize("thinks", [False, True], ids=["instruct", "hybrid"])
def test_sft_trains_the_sampled_ids_with_qwen3(qwen3_tokenizer, thinks):
    tokenizer = copy.deepcopy(qwen3_tokenizer)
    if not thinks:  # as the template of Qwen3-4B-Instruct-2507, which opens no turn with an empty thought
        thinks_last = "{%- if loop.last or (not loop.last and reasoning_content) %}"
        assert thinks_last in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(thinks_last, "{%- if reasoning_content %}")
    template = ChatTemplate(tokenizer)
    for task in BY_TYPE.values():
        episode = asyncio.run(run_episode(task, ScriptedTeacher(), EpisodeConfig(prompt="short")))
        recorded = rollout_traces.Recorded(
            {"task_id": task.id, "prompt": "short", "reward": 1.0, "user": {}, "seed": 0},
            "telecom",
            "train",
            episode.messages[1:],
            "x",
            0,
        )
        opening = "<think>\n\n</think>\n\n" if thinks else ""
        turns = [m for m in episode.messages[2:] if m["role"] == "assistant"]
        said = [tokenizer.encode(opening + text_of(turn) + template.end_text) for turn in turns]
        recorded.sampled = said
        row, kinds = rollout_traces.make_row(recorded, template)
        assert kinds == {"trained": len(turns)}
        assert trained(LossMasker(tokenizer, "qwen3"), row, template.end_id) == [id for turn in said for id in turn]


def text_of(turn):
    calls = [AgentToolCall(**call["function"]) for call in turn.get("tool_calls", [])]
    return render_turn(AgentTurn(content=turn["content"], tool_calls=calls))


@pytest.mark.parametrize(
    "say",
    [
        lambda text: text.replace('", "arguments"', '","arguments"'),  # other spaces in the JSON of a call
        lambda text: "Let me look. " + text if text.startswith("<tool_call>") else text,  # text beside a call
        lambda text: f"<think>hm</think>\n{text}" if text.startswith("<tool_call>") else text,
        lambda text: " " + text,
    ],
    ids=["spacing", "aside", "thought", "space"],
)
def test_a_turn_that_sft_would_render_otherwise_is_not_trained(make, template, smol_dir, say):
    model = NaturalTeacher(template)
    model.say = say
    samples = roll_out(smol_dir, model, BY_TYPE.values(), template)
    rows, output = make(samples, flags=["--tokenizer", smol_dir], code=0 if say("") == "" else 2)
    masker = LossMasker(template.tokenizer, "qwen3")
    by_task = {sample.metadata["tau2"]["task_id"]: sample for sample in samples}
    for row in rows:
        assert row["metadata"]["turns"]["other_ids"] >= 1
        said, shown = sampled(by_task[row["metadata"]["task_id"]]), trained(masker, row, template.end_id)
        turns, kept = split(said, template.end_id), split(shown, template.end_id)
        assert kept and all(turn in turns for turn in kept) and len(kept) < len(turns)
    if not rows:
        assert "3 no turn to train" in output


@pytest.mark.parametrize("thought", ["<think>hm</think>\n", "hm</think>\n"], ids=["sampled", "in the prompt"])
def test_without_a_tokenizer_no_turn_is_trained_without_its_thoughts(make, template, smol_dir, thought):
    model = NaturalTeacher(template)
    model.say = lambda text: thought + text
    samples = roll_out(smol_dir, model, BY_TYPE.values(), template)
    _, output = make(samples, code=2)
    assert "3 text beside a call, or a thought" in output


def test_an_empty_thought_loses_no_row(make, template, smol_dir):
    model = NaturalTeacher(template)
    model.say = lambda text: "<think>\n\n</think>\n\n" + text
    rows, _ = make(roll_out(smol_dir, model, BY_TYPE.values(), template))
    assert len(rows) == 3


def split(ids, end_id):
    turns = [[]]
    for token in ids:
        turns[-1].append(token)
        if token == end_id:
            turns.append([])
    return turns[:-1]


def test_another_cut_of_the_same_text_is_not_trained(make, template, smol_dir):
    samples = roll_out(smol_dir, FakeModel(template), BY_TYPE.values(), template)
    _, output = make(samples, flags=["--tokenizer", smol_dir], code=2)
    assert "3 no turn to train" in output
    rows, output = make(samples)  # without a tokenizer the texts count
    assert len(rows) == 3 and "sampled ids" not in output


# ---------------------------------------------------------------------------------------------------------------------
# Which rows are kept


def test_rows_have_the_form_of_the_teachers(make, natural):
    rows, _ = make(natural)
    for row in rows:
        system, greeting, *turns = row["prompt"]
        assert system == {"role": "system", "content": system_prompt("telecom", "short")}
        assert (greeting["role"], greeting["step_loss_mask"]) == ("assistant", 0) and turns[-1]["role"] == "assistant"
        teacher = asyncio.run(teacher_row(row["metadata"]))
        assert row["prompt"] == teacher["prompt"] and row["tools"] == teacher["tools"]
        assert {key: row["metadata"][key] for key in teacher["metadata"]} == teacher["metadata"]
        assert row["metadata"]["source"]["rollouts"].endswith("run/rollouts/0.pt")


async def teacher_row(metadata):
    task = next(task for task in TRAIN if task.id == metadata["task_id"])
    config = EpisodeConfig(prompt="short")
    episode = await run_episode(task, ScriptedTeacher(), config, metadata["seed"])
    return teacher_traces.make_row(episode, {"split": "train"}, config)


def test_what_is_dropped_is_counted_by_reason(make, natural):
    good, other = natural[0], natural[1]
    test_task = load_split_ids("telecom")["test"][0]
    refused = copy.deepcopy(other)
    called = next(m for m in refused.metadata["tau2"]["messages"] if m["role"] == "tool")
    called["content"] = "Error: no such customer"
    invalid = copy.deepcopy(other)
    call = next(m for m in invalid.metadata["tau2"]["messages"] if m.get("tool_calls"))["tool_calls"][0]
    call["function"] = {"name": "invalid_tool_call", "arguments": {"text": "{"}}
    control = copy.deepcopy(other)
    control.metadata["tau2"]["messages"][1]["content"] += "<|im_end|>"
    removed = copy.deepcopy(other)
    removed.remove_sample, removed.status = True, Sample.Status.FAILED
    samples = [
        good,
        changed(good, seed=5),  # the same dialogue again
        changed(good, solved=False, reward=0.0),
        changed(good, solved=False, reward=0.0, end_reason="context_full"),
        changed(good, reward=None, solved=False, end_reason="generation_aborted"),
        removed,
        changed(good, task_id=test_task),
        changed(good, task_id="[mms_issue]nothing[PERSONA:None]"),
        changed(good, asides=1),
        changed(good, customer_tool_calls=1),
        invalid,
        control,
        refused,
    ]
    rows, output = make(samples)
    for reason in (
        "1 duplicate dialogue",
        f"1 not solved, {good.metadata['tau2']['end_reason']}",
        "1 not solved, context_full",
        "1 no episode, generation_aborted",
        f"1 no episode, {other.metadata['tau2']['end_reason']}",
        "1 test task",
        "1 unknown task",
        "1 text beside a call, or a thought",
        "1 call of a tool of the customer",
        "1 call that cannot be executed",
        "1 control token in a text",
    ):
        assert reason in output
    assert len(rows) == 2 and "1 refused" in output
    (row,) = [row for row in rows if row["metadata"]["task_id"] == other.metadata["tau2"]["task_id"]]
    (turn,) = [m for m in row["prompt"][2:] if m.get("step_loss_mask") == 0]
    assert turn["tool_calls"]


def test_at_most_k_of_a_task_the_shortest_first_and_the_same_bytes_every_time(make, natural, tmp_path):
    good = natural[0]
    longer = []
    for extra in (3, 1, 2):
        copied = copy.deepcopy(good)
        copied.metadata["tau2"]["messages"][-1]["content"] += " Goodbye." * extra
        longer.append(copied)
    rows, output = make([*longer, good], natural[1:], flags=["--per-task", "3"])
    assert "1 over 3 of a task" in output and len(rows) == 5
    ends = [row["prompt"][-1]["content"].count("Goodbye.") for row in rows if task_of(row) == task_of(good)]
    assert ends == [0, 1, 2]
    assert len({task_of(row) for row in rows[:3]}) == 3  # every task once before any twice
    first = (tmp_path / "rollout_traces.jsonl").read_bytes()
    make([*longer, good], natural[1:], flags=["--per-task", "3"])
    assert (tmp_path / "rollout_traces.jsonl").read_bytes() == first


def task_of(thing):
    return thing["metadata"]["task_id"] if isinstance(thing, dict) else thing.metadata["tau2"]["task_id"]


# ---------------------------------------------------------------------------------------------------------------------
# From evaluations


def test_an_evaluation_gives_the_messages_of_its_episodes(tmp_path, run_script, own_signal_handler):
    path = tmp_path / "train.json"
    flags = ["--task-split", "train", "--num-tasks", "6", "--agent", "teacher", "--prompt", "short"]
    assert evaluate_tau2.main([*flags, "--output-path", str(path)]) == 0
    done = run_script(SCRIPT, "--local_dir", tmp_path, "--from-rollouts", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rollout_traces.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["metadata"]["split"] == "train" for row in rows)
    for row in rows:
        teacher = asyncio.run(teacher_row(row["metadata"]))
        assert row["prompt"] == teacher["prompt"]


def test_an_evaluation_on_the_test_split_is_refused(tmp_path, own_signal_handler, capsys):
    path = tmp_path / "test.json"
    flags = ["--num-tasks", "2", "--agent", "always-transfer", "--prompt", "short", "--output-path", str(path)]
    assert evaluate_tau2.main(flags) == 0
    assert teacher_traces.main(["--local_dir", str(tmp_path), "--from-rollouts", str(path)]) == 2
    assert "collect on train" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "does not exist"),
        ("empty/", None, "--save-debug-rollout-data"),
        ("x.pt", b"no torch file", "no file of --save-debug-rollout-data"),
        ("x.json", b"{}", "not a result of evaluate_tau2.py"),
    ],
)
def test_wrong_runs_end_with_one_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    if content is not None:
        path.write_bytes(content)
    assert teacher_traces.main(["--local_dir", str(tmp_path), "--from-rollouts", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_with_classes_is_not_unpickled(tmp_path, capsys):
    path = tmp_path / "0.pt"
    torch.save({"samples": [Sample(index=0)]}, path)
    assert teacher_traces.main(["--local_dir", str(tmp_path), "--from-rollouts", str(path)]) == 2
    assert "plain values" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The count of groups with a gradient


def test_groups_that_gain_a_gradient_are_counted_from_the_files_of_a_run(natural, tmp_path, run_script):
    def group(number, *outcomes):
        found = []
        for solved, met in outcomes:
            checks = {"action_checks": [{"sound": met, "official": True}]}
            sample = changed(natural[0], solved=solved, reward=float(solved), checks=checks)
            sample.group_index, sample.reward = number, float(solved)
            found.append(sample)
        return found

    samples = [
        *group(0, (0, 0), (0, 1)),
        *group(1, (0, 0), (0, 0)),
        *group(2, (1, 1), (0, 0)),
        *group(3, (1, 1), (1, 1)),
    ]
    save_debug_samples(f"{tmp_path}/rollouts/{{rollout_id}}.pt", 0, samples)
    done = run_script("benchmarks/partial_credit.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 groups, 1 in which the binary reward has a gradient" in done.stdout
    assert "2 failed by all; the shaped one has a gradient in 1" in done.stdout
    assert "1 solved by all; the shaped one has a gradient in 0" in done.stdout
    done = run_script("benchmarks/partial_credit.py", tmp_path, "--matching", "official")
    assert "2 failed by all; the shaped one has a gradient in 0" in done.stdout

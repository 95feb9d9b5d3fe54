"""Rows, order, resume, and the ids and masks that SFT trains."""

import json
import random
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slime_local.data import Dataset, RolloutDataSource, load_tokenizer, read_rows
from slime_local.errors import UsageError
from slime_local.masks import LossMasker, response_length
from slime_local.sample import Sample
from slime_local.sft_rollout import generate_rollout

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_line",
            "description": "Look a line up.",
            "parameters": {"type": "object", "properties": {"line_id": {"type": "string"}}, "required": ["line_id"]},
        },
    }
]


def call(name: str, **arguments) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


DIALOGUE = [
    {"role": "system", "content": "You are an agent."},
    {"role": "assistant", "content": "Hi! How can I help you today?", "step_loss_mask": 0},
    {"role": "user", "content": "My phone is dead."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_line", line_id="L1"), call("get_line", line_id="L2")],
    },
    {"role": "tool", "content": '{"status": "active"}'},
    {"role": "tool", "content": '{"status": "off"}'},
    {"role": "assistant", "content": "Line L2 is off."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source_args(path: str, **overrides) -> Namespace:
    defaults = {
        "prompt_data": path,
        "rollout_global_dataset": True,
        "input_key": "q",
        "label_key": None,
        "tool_key": "tools",
        "metadata_key": "metadata",
        "apply_chat_template": False,
        "apply_chat_template_kwargs": {},
        "rollout_max_prompt_len": None,
        "rollout_seed": 42,
        "rollout_shuffle": False,
        "n_samples_per_prompt": 2,
    }
    return Namespace(**{**defaults, **overrides})


def prompts(groups) -> list:
    return [group[0].prompt for group in groups]


def make_source(path: str, **overrides) -> RolloutDataSource:
    return RolloutDataSource(source_args(path, **overrides), tokenizer=object())


# ---- Rows ----------------------------------------------------------------------------------------------------


def test_slices_name_rows(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": i} for i in range(10)])
    assert [row["q"] for row in read_rows(f"{path}@[2:4]")] == [2, 3]
    assert [row["q"] for row in read_rows(f"{path}@[-3:]")] == [7, 8, 9]
    with pytest.raises(UsageError, match="has no rows"):
        read_rows(f"{path}@[20:]")


def test_a_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"q": 1}\n\n{"q": \n')
    with pytest.raises(UsageError, match="line 3 is not JSON"):
        read_rows(str(path))
    path.write_text('{"q": 1}\n[1]\n')
    with pytest.raises(UsageError, match="line 2 is not a JSON object"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [("e.jsonl", "", "has no rows"), ("e.csv", "a", "end in .jsonl or .parquet"), ("b.jsonl", b"\xff\xfe", "UTF-8")],
)
def test_other_unusable_files(tmp_path, name, text, part):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=part):
        read_rows(str(path))
    with pytest.raises(UsageError, match="no data file"):
        read_rows(str(tmp_path / "missing.jsonl"))


def test_rows_become_samples_as_in_slime(tmp_path):
    rows = [{"q": 7, "y": "label", "metadata": {"k": 1}, "tools": json.dumps(TOOLS)}, {"q": "text", "y": "l"}]
    path = write(tmp_path / "d.jsonl", rows)
    first, second = Dataset(path, prompt_key="q", label_key="y", tool_key="tools").samples
    assert first.prompt == 7 and first.label == "label", "the raw JSON value, a number here"
    assert first.metadata == {"k": 1, "tools": TOOLS} and second.metadata == {}
    null_tools = write(tmp_path / "n.jsonl", [{"q": 1, "tools": None}])
    with pytest.raises(ValueError, match="leave the key out"):
        Dataset(null_tools, prompt_key="q", tool_key="tools")


# ---- Order ---------------------------------------------------------------------------------------------------


def test_shuffling_gives_slimes_order(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": i} for i in range(20)])
    source = make_source(path, rollout_shuffle=True)
    first, second = prompts(source.get_samples(20)), prompts(source.get_samples(20))
    for epoch, seen in enumerate((first, second)):
        order = list(range(20))
        random.seed(42 + epoch)  # what slime does
        random.shuffle(order)
        assert seen == order


@settings(max_examples=50)
@given(
    rows=st.integers(1, 7),
    takes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    shuffle=st.booleans(),
)
def test_a_resumed_source_continues_exactly(tmp_path_factory, rows, takes, cut, shuffle):
    path = write(tmp_path_factory.mktemp("source") / "d.jsonl", [{"q": i} for i in range(rows)])
    straight, before, after = (make_source(path, rollout_shuffle=shuffle) for _ in range(3))
    expected = [straight.get_samples(count) for count in takes]
    seen = [before.get_samples(count) for count in takes[:cut]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    seen += [after.get_samples(count) for count in takes[cut:]]
    assert seen == expected
    flat = [sample for groups in expected for group in groups for sample in group]
    assert [sample.index for sample in flat] == list(range(len(flat)))
    assert [sample.group_index for sample in flat] == [i // 2 for i in range(len(flat))]


def test_samples_of_a_group_share_nothing(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": 1, "metadata": {"list": []}}])
    ((first, second),) = make_source(path).get_samples(1)
    first.metadata["list"].append(1)
    assert second.metadata == {"list": []}
    assert make_source(path).get_samples(1)[0][0].metadata == {"list": []}


# ---- Sample --------------------------------------------------------------------------------------------------


def test_appended_tokens_keep_mask_and_log_probs_in_step():
    sample = Sample(tokens=[1, 2])
    meta = {"finish_reason": {"type": "length"}, "weight_version": "3", "cached_tokens": 1, "prompt_tokens": 2}
    sample.append_response_tokens(tokens=[5, 6], log_probs=[-0.1, -0.2], meta_info=meta, text="ab")
    sample.append_response_tokens(tokens=[7], trainable=False)
    assert sample.tokens == [1, 2, 5, 6, 7] and sample.response_length == 3 and sample.response == "ab"
    assert sample.loss_mask == [1, 1, 0] and sample.rollout_log_probs == [-0.1, -0.2, 0.0]
    assert sample.status is Sample.Status.TRUNCATED and sample.weight_versions == ["3"]
    assert sample.effective_response_length == 2
    assert Sample.from_dict(sample.to_dict()) == sample
    with pytest.raises(ValueError, match="1 sampled tokens came with 0"):
        sample.append_response_tokens(tokens=[8])
    with pytest.raises(ValueError, match="did not sample"):
        sample.append_response_tokens(tokens=[8], trainable=False, log_probs=[0.0])


# ---- Masks ---------------------------------------------------------------------------------------------------


def trained_texts(tokenizer, ids, mask) -> list[str]:
    """The decoded runs of trained tokens."""
    runs, current = [], []
    for token, on in zip([*ids, None], [*mask, 0], strict=True):
        if on:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def check_whole_dialogue(tokenizer) -> None:
    ids, mask = LossMasker(tokenizer, "qwen3").mask(DIALOGUE, TOOLS)
    texts = trained_texts(tokenizer, ids, mask)
    assert len(ids) == len(mask) and len(texts) == 3, "the greeting is left out"
    assert all(text.endswith("<|im_end|>\n") for text in texts)
    assert texts[0].count("<tool_call>") == 2 and '"L2"' in texts[0]
    assert texts[1].endswith("Line L2 is off.<|im_end|>\n") and texts[2].endswith("Bye.<|im_end|>\n")
    assert response_length(mask) == len(mask) - mask.index(1)


def test_sft_trains_what_the_assistant_wrote(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    check_whole_dialogue(tokenizer)
    ids, _ = LossMasker(tokenizer, "qwen3").mask(DIALOGUE, TOOLS)
    assert ids == tokenizer.apply_chat_template(DIALOGUE, tools=TOOLS, tokenize=True, return_dict=False)


def test_the_tokenizer_is_the_one_that_a_whole_config_gives(tiny_model_dir):
    """And the model's code is not imported for it."""
    ours, theirs = load_tokenizer(str(tiny_model_dir)), AutoTokenizer.from_pretrained(tiny_model_dir)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.chat_template, ours.special_tokens_map) == (theirs.chat_template, theirs.special_tokens_map)
    for load in ("slime_local.data.load_tokenizer", "openai_tool_adapter.load_chat_template"):
        module = load.rpartition(".")[0]
        lines = f"import sys, {module}; {load}(sys.argv[1]); print('transformers.activations' in sys.modules)"
        command = [sys.executable, "-c", lines, tiny_model_dir]
        assert subprocess.check_output(command, text=True, cwd=ROOT).strip() == "False"


def test_sft_trains_what_the_assistant_wrote_with_qwen3(qwen3_tokenizer):
    check_whole_dialogue(qwen3_tokenizer)


def test_a_turn_with_step_loss_mask_0_is_rendered_and_not_trained(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    plain = [{k: v for k, v in message.items() if k != "step_loss_mask"} for message in DIALOGUE]
    ids, mask = LossMasker(tokenizer, "qwen3").mask(DIALOGUE, TOOLS)
    all_ids, all_mask = LossMasker(tokenizer, "qwen3").mask(plain, TOOLS)
    assert ids == all_ids
    assert sum(all_mask) > sum(mask) and trained_texts(tokenizer, ids, all_mask)[0].startswith("Hi!")


def test_the_sft_rollout_fills_samples(tiny_model_dir, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": DIALOGUE, "tools": TOOLS}])
    args = source_args(path, n_samples_per_prompt=1)
    args.hf_checkpoint, args.loss_mask_type, args.rollout_batch_size = str(tiny_model_dir), "qwen3", 2
    groups = generate_rollout(args, 0, RolloutDataSource(args))
    assert [len(group) for group in groups] == [1, 1]
    (sample,) = groups[0]
    ids, mask = LossMasker(load_tokenizer(str(tiny_model_dir)), "qwen3").mask(DIALOGUE, TOOLS)
    assert sample.tokens == ids and sample.loss_mask == mask[-sample.response_length :]
    assert sample.loss_mask[0] == 1 and sample.reward == 0
    with pytest.raises(UsageError, match="no evaluation rollout"):
        generate_rollout(args, 0, None, evaluation=True)

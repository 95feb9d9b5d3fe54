"""Bad input: every parser against generated cases, and a table of wrong commands.

    python -m pytest tests/test_bad_input.py                      some thousand cases
    python -m pytest tests/test_bad_input.py -m slow              100,000 cases; TAU2_FUZZ_CASES sets another number

A case passes when the parser gives a value or raises the one error whose text is for the user, on one line. Anything
else that is raised would be a traceback for somebody; a hang is ended by the test's own time-out.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, web
from conftest import EXAMPLE, ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from training_setup import VOCAB, save_tiny_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import partial_credit

import evaluate_tau2
import sensitivity
import summarize
import tau2_mock
import tau2_moods
import tau2_results
import tau2_teacher
import teacher_traces
import token_agent
import train
from http_client import close_session
from openai_tool_adapter import load_chat_template, parse_turn, render_turn
from slime_local import checkpoint, server, smollm2
from slime_local.checks import _check_dialogue, _check_row
from slime_local.data import read_rows
from slime_local.engine import Engine
from slime_local.errors import UsageError
from slime_local.flags import HONOURED, load_flags, parse_args
from slime_local.model import load_model
from slime_local.train_data import load_debug_samples
from tau2_domains import agent_tools, load_tasks, read_task
from tau2_episode import AgentTurn, EndEpisode, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_users import ScriptedCustomer
from token_agent import GenerationError, TokenAgent, TokenLimits

pytestmark = [
    pytest.mark.usefixtures("own_signal_handler"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FAST_CASES, SLOW_CASES = 2_000, 100_000
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

# ---- Strategies --------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=20)  # half surrogate pairs, NULs and line separators among them
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)  # a line break is repeated
ODD_NUMBERS = st.sampled_from([1e308, -1e-320, float("nan"), float("inf"), 10**30, -(2**63), 0, -1])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ODD_NUMBERS | ANY_TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=6
)
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["cut", "flip", "insert", "delete"]), st.binary(min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """`data` after some damage."""
    for where, how, new in edits:
        at = int(where * len(data))
        if how == "cut":
            data = data[:at]
        elif how == "flip":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at + len(new) :]
    return data


def damaged(*texts: str | bytes) -> st.SearchStrategy[bytes]:
    """One of the texts, damaged; or bytes that were never meant for it."""
    whole = [text.encode() if isinstance(text, str) else text for text in texts]
    nested = st.sampled_from([b"[" * 5000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 5000, b"\xef\xbb\xbf{}"])
    return st.builds(edited, st.sampled_from(whole), EDITS) | st.binary(max_size=60) | nested


def paths_in(value: Any, path: tuple = ()) -> list[tuple]:
    """Where values sit in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in paths_in(child, (*path, key)))]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def changed(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one part of it replaced by any other."""
    return st.builds(replaced, st.just(value), st.sampled_from(paths_in(value)), JSON)


# ---- The parsers -------------------------------------------------------------------------------------------------


@dataclass
class Fuzzer:
    """`check(case)` fails when the parser raises what it must not, or gives what it must not."""

    cases: st.SearchStrategy
    check: Callable[[Any], None]
    share: float  # of all cases
    close: Callable[[], None] = lambda: None  # after the last case


def one_line(call: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """What call() gives; None where it refuses with one line of text."""
    try:
        return call()
    except refusals as refusal:
        text = str(refusal)
        assert text.strip() and "\n" not in text.strip() and "Traceback" not in text
        return None


def tool_calls(smol_dir, tmp_path) -> Fuzzer:
    tools = agent_tools("telecom")
    names = [tool["function"]["name"] for tool in tools]
    call = {"name": "get_customer_by_phone", "arguments": {"phone_number": "555-123-2002"}}
    named = st.builds(lambda name, arguments: {"name": name, "arguments": arguments}, st.sampled_from(names), JSON)
    bodies = (changed(call) | named | JSON).map(json.dumps) | damaged(json.dumps(call)).map(
        lambda b: b.decode("latin1")
    )
    marks = st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", *CONTROLS, "<tool_call"])
    texts = st.lists(marks | bodies | st.text(max_size=20), max_size=6).map("".join)

    def check(text: str) -> None:
        turn = parse_turn(text, tools, CONTROLS).turn
        assert bool(turn.tool_calls) != bool((turn.content or "").strip())
        assert not any(mark in (turn.content or "") for mark in (*CONTROLS, "<tool_call>", "</tool_call>"))
        for made in turn.tool_calls:
            assert made.error or made.name in names
            if made.error is None:
                json.dumps(made.arguments, ensure_ascii=False).encode()
                assert parse_turn(render_turn(AgentTurn(tool_calls=[made])), tools).turn.tool_calls[0].error is None

    return Fuzzer(texts, check, 0.33)


def customer_hears(smol_dir, tmp_path) -> Fuzzer:
    """The scripted customer understands, or asks again; it never breaks."""
    tasks = load_tasks("telecom", "test")
    told = (
        "reboot airplane mode roaming apn settings data mbps yes no please toggle 555-123-2002 {} <tool_call>".split()
    )
    texts = st.lists(st.sampled_from(told) | st.text(max_size=30), max_size=12).map(" ".join)

    def check(case: tuple[int, list[str]]) -> None:
        number, said = case
        customer = ScriptedCustomer(tasks[number].user_scenario)
        for text in said:
            customer.reply(SimpleNamespace(role="assistant", content=text))
            customer.turn = None

    return Fuzzer(st.tuples(st.integers(0, len(tasks) - 1), st.lists(texts, min_size=1, max_size=2)), check, 0.02)


def task_rows(smol_dir, tmp_path) -> Fuzzer:
    """tau2_mock's files, as traces and rollouts read them."""
    task = load_tasks("telecom", "test")[0].model_dump(mode="json")
    row = {"index": 0, "metadata": {"domain": "telecom", "split": "test", "task_id": task["id"], "task": task}}
    path = tmp_path / "tasks.jsonl"
    small = json.dumps({**row, "metadata": {"task": {"id": "a"}}}) + "\n"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        rows = one_line(lambda: tau2_mock.read_task_rows(path), BadInput)
        assert rows is None or all(isinstance(row["task"]["id"], str) for row in rows)
        for found in rows or []:
            one_line(lambda found=found: read_task(found["task"]), BadInput)

    whole = changed(row).map(json.dumps).map(str.encode)
    return Fuzzer(whole | damaged(small, small * 2), check, 0.08)


def training_rows(smol_dir, tmp_path) -> Fuzzer:
    """Rows of --prompt-data: read, and checked as prompts and as dialogues."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    dialogue = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "{}", "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "content": "done"},
    ]
    row = {"prompt": dialogue, "tools": [{"type": "function", "function": {"name": "f"}}], "metadata": {"a": 1}}
    path = tmp_path / "rows.jsonl"
    args = argparse.Namespace(metadata_key="metadata", apply_chat_template=True, tool_key="tools")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for found in one_line(lambda: read_rows(str(path)), UsageError) or []:
            checked = one_line(
                lambda found=found: _check_row("line", found, "prompt", "--x", None, args) or 1, UsageError
            )
            if checked:
                one_line(lambda found=found: _check_dialogue("line", found["prompt"], None), UsageError)

    return Fuzzer(changed(row).map(json.dumps).map(str.encode) | damaged(json.dumps(row)), check, 0.13)


def rendered_rows(smol_dir, tmp_path) -> Fuzzer:
    """A dialogue that the check let through is rendered, or refused in one line."""
    from slime_local.sample import Sample
    from slime_local.sft_rollout import _fill, _masker

    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    dialogue = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    masker = _masker(str(smol_dir), "qwen3")

    def check(messages: Any) -> None:
        data = json.dumps({"prompt": messages})
        (tmp_path / "r.jsonl").write_text(data)
        rows = one_line(lambda: read_rows(str(tmp_path / "r.jsonl")), UsageError)
        if rows and one_line(lambda: _check_dialogue("line", rows[0]["prompt"], None) or 1, UsageError):
            one_line(lambda: _fill(Sample(index=0, prompt=rows[0]["prompt"]), masker), UsageError)

    return Fuzzer(changed(dialogue), check, 0.01)


def hub_rows(smol_dir, tmp_path) -> Fuzzer:
    """The original example's data set: a row becomes one of ours or is counted as dropped."""
    task_id = teacher_traces.load_split_ids("telecom")["train"][0]
    said = '<thinking>t</thinking>\n{"name": "get_customer_by_phone", "arguments": {"phone_number": "1"}}'
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": said}]
    turns += [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": "ok"}]
    row = {"task_id": f"[telecom]{task_id}", "prompt": turns}
    args = argparse.Namespace(domain="telecom", prompt="short", keep_thinking=True)
    bar = tau2_mock.training_bar("telecom")

    def check(row: Any) -> None:
        if isinstance(row, dict):
            one_line(lambda: teacher_traces.convert_hub_row(row, args, bar), teacher_traces.Dropped)

    return Fuzzer(changed(row), check, 0.06)


def evaluation_rows(smol_dir, tmp_path) -> Fuzzer:
    """OUTPUT.rows.jsonl of an interrupted evaluation."""
    chosen = {"domain": "telecom", "seed": 1}
    row = {"task_id": "t", "trial": 0, "run": 0, "solved": True, "reward": 1.0, "partial_score": 1.0, "minutes": 0.1}
    row |= {"simulation": {}, "user": {}, "checks": {}, "tokens": {}, "issue_type": "i", "end_reason": "transfer"}
    row |= {"seed": 1, "steps": 2, "agent_turns": 1, "tool_errors": 0, "customer_tool_calls": 0}
    text = "".join(json.dumps(line) + "\n" for line in ({"settings": chosen}, row, {**row, "trial": 1}))
    path = tmp_path / "e.rows.jsonl"

    def read() -> None:
        with tau2_results.RowsFile(str(tmp_path / "e.json"), chosen) as rows:
            assert all(isinstance(task, str) and isinstance(trial, int) for task, trial in rows.done)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        one_line(read, BadInput)

    broken = changed(row).map(
        lambda value: (json.dumps({"settings": chosen}) + "\n" + json.dumps(value) + "\n").encode()
    )
    return Fuzzer(damaged(text) | broken, check, 0.06)


def summaries(smol_dir, tmp_path) -> Fuzzer:
    result = {
        "pass_at_1": 0.5,
        "pass_at_1_stderr": 0.1,
        "avg_partial_score": 0.5,
        "floor_always_transfer": 0.3,
        "total_tasks": 2,
        "by_issue_type": {"mms_issue": {"successes": 1, "total": 2}},
        "customer": {"kind": "x"},
        "prompt": "short",
        "domain": "telecom",
        "task_split": "test",
        "metrics": {"pass_at_1": {"value": 0.5, "low": 0.1, "high": 0.9}},
        "agent": "teacher",
        "num_trials": 1,
        "results": [{}],
        "simulations": [{}],
    }
    minutes = "base\t1\neval_base\t20\n"

    def check(case: tuple[bytes, bytes]) -> None:
        (tmp_path / "eval_base.json").write_bytes(case[0])
        (tmp_path / "minutes.tsv").write_bytes(case[1])
        found = one_line(lambda: summarize.read_stages(tmp_path), BadInput)
        if found:
            summarize.table(summarize.summary(found, {}))

    results = changed(result).map(json.dumps).map(str.encode) | damaged(json.dumps(result))
    return Fuzzer(st.tuples(results, st.just(minutes.encode()) | damaged(minutes)), check, 0.05)


def command_flags(smol_dir, tmp_path) -> Fuzzer:
    """train.py --check-only: exit code 0, or 2 with lines that start with `error:`."""
    model = save_tiny_model(tmp_path / "m")
    rows = tmp_path / "r.jsonl"
    rows.write_text('{"q": "a"}\n{"q": "b"}\n')
    yaml = tmp_path / "c.yaml"
    yaml.write_text("rollout_batch_size: 2\n")
    base = ["--host", "local", "--check-only", "--hf-checkpoint", str(model), "--prompt-data", str(rows)]
    base += "--input-key q --rollout-batch-size 2 --num-rollout 2 --custom-rm-path operator.add".split()
    base += ["--n-samples-per-prompt", "2", "--global-batch-size", "4", "--rollout-max-response-len", "4"]
    odd = [
        "0",
        "1",
        "-1",
        "2",
        "3.5",
        "nan",
        "inf",
        "1e400",
        "9" * 5000,
        "",
        "x",
        "None",
        "{}",
        "[1]",
        "@[:]",
        "\ud800",
    ]
    paths = [str(model), str(rows), str(tmp_path / "none"), f"{rows}@[0:1]", str(yaml), "operator.add", "iter_0000003"]
    values = st.sampled_from([*odd, *paths])
    names = st.sampled_from([flag.name for flag in load_flags() if flag.name not in ("--help", "-h")])
    word = st.one_of(names, st.sampled_from(sorted(HONOURED)), values, st.text(max_size=8))

    def check(words: list[str]) -> None:
        if "-h" not in words and "--help" not in words:
            assert run_main(train.main, [*base, *words]) in (0, 2)

    return Fuzzer(st.lists(word, min_size=1, max_size=5), check, 0.03)


def yaml_files(smol_dir, tmp_path) -> Fuzzer:
    """--custom-config-path and --eval-config."""
    custom = "rollout_batch_size: 2\ntau2_prompt: short\ntau2_user_args: {timeout: 3}\n"
    evaluation = "eval:\n  defaults: {temperature: 0}\n  datasets:\n  - {name: a, path: b.jsonl, top_k: 1}\n"
    base = "--hf-checkpoint m --prompt-data p --rollout-batch-size 2 --num-rollout 1".split()
    path = tmp_path / "c.yaml"

    def check(case: tuple[str, bytes]) -> None:
        path.write_bytes(case[1])
        one_line(lambda: parse_args([*base, case[0], str(path)]), UsageError)

    edits = st.builds(edited, st.just(custom.encode()), EDITS), st.builds(edited, st.just(evaluation.encode()), EDITS)
    cases = st.tuples(st.just("--custom-config-path"), edits[0]) | st.tuples(st.just("--eval-config"), edits[1])
    return Fuzzer(cases, check, 0.02)


def evaluation_flags(smol_dir, tmp_path) -> Fuzzer:
    values = ["0", "-1", "nan", "9" * 5000, "", "x", "{}", "[", "telecom", "test", "teacher", "llm", "\ud800", "1e400"]
    names = "--num-tasks --sglang-port --server-address --domain --task-split --agent --prompt --user --user-args "
    names += "--user-concurrency --num-trials --max-concurrency --seed --max-steps --max-errors --temperature "
    names += "--max-turn-tokens --max-context-len --redraw-ids --checkpoint --output-path"
    word = st.sampled_from(names.split()) | st.sampled_from([*values, str(tmp_path)]) | WORDS

    def check(words: list[str]) -> None:
        args = quiet_parse(evaluate_tau2.parse_args, ["--output-path", str(tmp_path / "o.json"), *words])
        if args is not None:
            one_line(lambda: evaluate_tau2.check_args(args) or evaluate_tau2.episode_config(args), BadInput)

    return Fuzzer(st.lists(word, min_size=1, max_size=4), check, 0.04)


def trace_flags(smol_dir, tmp_path) -> Fuzzer:
    names = "--local_dir --output --domain --prompt --tasks --num-traces --epochs --mix --style --slip --redraw-ids "
    names += "--seed --user --user-args --max-concurrency --from-hub-file --keep-thinking"
    values = ["0", "-1", "nan", "9" * 5000, "", "x", "{}", "mms_issue=0", "mms_issue=2", "a=b", "1.5", "\ud800"]
    word = st.sampled_from(names.split()) | st.sampled_from(values) | st.text(max_size=8)

    def check(words: list[str]) -> None:
        quiet_parse(teacher_traces.parse_args, ["--local_dir", str(tmp_path), *words])
        quiet_parse(tau2_mock.parse_args, ["--local_dir", str(tmp_path), *words])

    return Fuzzer(st.lists(word, min_size=1, max_size=4), check, 0.03)


def model_folders(smol_dir, tmp_path) -> Fuzzer:
    """A damaged file in an HF folder: refused, or loaded into a model of the right shape."""
    model = save_tiny_model(tmp_path / "whole")
    files = {
        name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer_config.json")
    }
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "model.safetensors"}}).encode()
    config = json.loads(files["config.json"])
    broken = tmp_path / "broken"

    def check(case: tuple[str, bytes]) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(model, broken)
        (broken / case[0]).write_bytes(case[1])
        loaded = one_line(lambda: load_model(broken, dtype=torch.float32, device="cpu"), UsageError)
        assert loaded is None or loaded.embedding.word_embeddings.weight.shape[0] == VOCAB

    cases = [st.tuples(st.just(name), damaged(data)) for name, data in files.items()]
    cases.append(st.tuples(st.just("config.json"), changed(config).map(json.dumps).map(str.encode)))
    return Fuzzer(st.one_of(cases), check, 0.02)


def checkpoints(smol_dir, tmp_path) -> Fuzzer:
    """A damaged file in a folder of training checkpoints: refused, never half of it taken."""
    whole = tmp_path / "whole"
    state = {"schedule": {}, "random": None, "optimizer_steps": 1, "skipped_steps": 0, "extra": {}}
    checkpoint.write(whole, 3, {"w": torch.ones(4)}, {"w": {"exp_avg": torch.ones(4)}}, state)
    names = (
        checkpoint.TRACKER,
        *(f"iter_0000003/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.pt")),
    )
    broken = tmp_path / "broken"

    def read() -> None:
        found = checkpoint.locate(broken, None, "--load", "--ckpt-step")
        if found is not None and found.iteration is not None:
            dict(checkpoint.read_weights(found, ["w"], None))
            checkpoint.read_optimizer(found)
            checkpoint.read_state(found)

    def check(case: tuple[str, bytes]) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        (broken / case[0]).write_bytes(case[1])
        one_line(read, UsageError)

    cases = [st.tuples(st.just(name), damaged((whole / name).read_bytes())) for name in names]
    return Fuzzer(st.one_of(cases), check, 0.03)


def debug_rollouts(smol_dir, tmp_path) -> Fuzzer:
    """--load-debug-rollout-data."""
    from slime_local.sample import Sample
    from slime_local.train_data import save_debug_samples

    path = save_debug_samples(str(tmp_path / "{rollout_id}.pt"), 0, [Sample(index=0, tokens=[1, 2], response="x")])
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        one_line(lambda: load_debug_samples(str(tmp_path / "{rollout_id}.pt"), 0), UsageError)

    return Fuzzer(damaged(whole), check, 0.02)


def tokenizers(smol_dir, tmp_path) -> Fuzzer:
    """A damaged tokenizer: refused, or one whose template passes its own check."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    small.chat_template = (Path(smol_dir) / "chat_template.jinja").read_text()
    whole = tmp_path / "whole"
    small.save_pretrained(whole)
    names = [path.name for path in whole.iterdir()]
    broken = tmp_path / "broken"

    def check(case: tuple[str, bytes]) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        (broken / case[0]).write_bytes(case[1])
        load_chat_template.cache_clear()
        one_line(lambda: load_chat_template(str(broken)), BadInput)

    cases = [st.tuples(st.just(name), damaged((whole / name).read_bytes())) for name in names]
    return Fuzzer(st.one_of(cases), check, 0.01)


ANSWER = {
    "text": "x",
    "output_ids": [5, 6],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, 5, None], [-0.1, 6, None]],
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "weight_version": "1",
    },
}


def check_answer(answer: Any) -> None:
    found = one_line(lambda: token_agent._read_answer(answer, 49152), GenerationError)
    if found:
        ids, log_probs, meta_info = found
        assert len(ids) == len(log_probs) and all(type(i) is int and 0 <= i < 49152 for i in ids)
        assert all(value <= 1e-3 for value in log_probs) and isinstance(meta_info["finish_reason"]["type"], str)


def server_answers(smol_dir, tmp_path) -> Fuzzer:
    return Fuzzer(changed(ANSWER), check_answer, 0.12)


def requests_to_the_server(smol_dir, tmp_path) -> Fuzzer:
    """/generate and /abort_request of slime_local: an answer or a refusal, and the engine goes on."""
    from slime_local.data import load_tokenizer

    model = load_model(save_tiny_model(tmp_path / "m"), dtype=torch.float32, device="cpu")
    engine = Engine(model, load_tokenizer(str(smol_dir)), max_context=24, max_running=4)
    params = {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "max_new_tokens": 3, "stop": ["a"], "stop_token_ids": [1]}
    request = {"input_ids": [1, 2, 3], "sampling_params": {**params, "sampling_seed": 7}, "rid": "r"}
    bodies = changed(request).map(json.dumps).map(str.encode) | damaged(json.dumps(request))
    calls = Calls(server.make_app(engine, "m"))

    def check(case: tuple[str, bytes]) -> None:
        status, body = calls.post(*case)
        assert status in (200, 400, 503) and engine.failure is None, (status, body)
        assert status != 200 or case[0] != "/generate" or json.loads(body)["meta_info"]["finish_reason"]

    return Fuzzer(
        st.tuples(st.just("/generate"), bodies) | st.tuples(st.just("/abort_request"), bodies),
        check,
        0.02,
        calls.close,
    )


def bytes_of_a_server(smol_dir, tmp_path) -> Fuzzer:
    """What a /generate server may send over the wire: an episode goes on or ends as one that counts for nothing."""
    template = load_chat_template(str(smol_dir))
    answered: list[tuple[int, bytes]] = []

    async def generate(request: web.Request) -> web.Response:
        status, body = answered[-1]
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_post("/generate", generate)
    calls = Calls(app)

    async def act() -> Any:
        agent = TokenAgent(template, f"{calls.url}/generate", {}, TokenLimits(turn=8))
        await agent.start([{"role": "system", "content": "s"}], [])
        try:
            return await agent.act([{"role": "user", "content": "u"}])
        except EndEpisode as end:
            assert end.reason.is_infrastructure or end.reason.is_truncated
            return None

    def check(case: tuple[int, bytes]) -> None:
        answered.append(case)
        turn = calls.run(act())
        assert turn is None or turn.content or turn.tool_calls

    bodies = changed(ANSWER).map(json.dumps).map(str.encode) | damaged(json.dumps(ANSWER))
    return Fuzzer(st.tuples(st.sampled_from([200, 200, 200, 400, 302, 204]), bodies), check, 0.02, calls.close)


class Calls:
    """An aiohttp application and a client of it, in one event loop of their own."""

    def __init__(self, app: web.Application) -> None:
        self.loop = asyncio.new_event_loop()
        self.runner = web.AppRunner(app, access_log=None)
        self.url = self.run(self._start())

    async def _start(self) -> str:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.session = ClientSession()
        host, port = self.runner.addresses[0][:2]
        return f"http://{host}:{port}"

    def close(self) -> None:
        self.run(close_session())
        self.run(self.session.close())
        self.run(self.runner.cleanup())
        self.loop.close()

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        async def post() -> tuple[int, bytes]:
            async with self.session.post(f"{self.url}{path}", data=body) as response:
                return response.status, await response.read()

        return self.run(post())


FUZZERS = {
    fuzzer.__name__: fuzzer
    for fuzzer in (
        tool_calls,
        customer_hears,
        task_rows,
        training_rows,
        rendered_rows,
        hub_rows,
        evaluation_rows,
        summaries,
        command_flags,
        yaml_files,
        evaluation_flags,
        trace_flags,
        model_folders,
        checkpoints,
        debug_rollouts,
        tokenizers,
        server_answers,
        requests_to_the_server,
        bytes_of_a_server,
    )
}


def episodes(smol_dir, tmp_path) -> Fuzzer:
    """Whatever a model writes, its episode ends by the rules and has a reward: only the machinery can break one."""
    task = next(task for task in load_tasks("telecom", "test") if "mms" in task.id)
    tools = agent_tools("telecom")
    names = [tool["function"]["name"] for tool in tools]
    call = {"name": "get_customer_by_phone", "arguments": {"phone_number": "555-123-2002"}}
    lookups = {"name": "get_details_by_id", "arguments": {"id": "L1002"}}
    any_call = st.builds(lambda name, arguments: {"name": name, "arguments": arguments}, st.sampled_from(names), JSON)
    calls = (changed(call) | changed(lookups) | any_call).map(lambda c: f"<tool_call>{json.dumps(c)}</tool_call>")
    texts = calls | ANY_TEXT | st.sampled_from(["x" * 5_000, *CONTROLS, "###STOP###", "toggle_data()", "\x00"])

    class Says:
        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        async def start(self, messages: list, tools: list) -> None:
            pass

        async def act(self, new_messages: list) -> AgentTurn:
            for message in new_messages:
                message["content"].encode()
            text = self.texts.pop() if self.texts else "Goodbye."
            return parse_turn(text.encode(errors="replace").decode(), tools, CONTROLS).turn

    def check(said: list[str]) -> None:
        episode = asyncio.run(run_episode(task, Says(list(said)), EpisodeConfig(max_steps=8, prompt="short")))
        assert not episode.end_reason.is_infrastructure, (episode.end_reason, episode.detail)
        assert episode.reward is not None and episode.checks is not None
        json.dumps(episode.simulation.model_dump(mode="json"), ensure_ascii=False).encode()

    return Fuzzer(st.lists(texts, min_size=1, max_size=3), check, 0.005)


FUZZERS["episodes"] = episodes


def run_main(main: Callable[[list[str]], int], words: list[str]) -> int:
    """main's exit code; what it writes to stderr is lines for the user."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    assert "Traceback" not in err.getvalue()
    if code == 2:
        assert "error: " in err.getvalue(), words
    return code


def quiet_parse(parse: Callable[[list[str]], Any], words: list[str]) -> Any:
    """The parsed args, or None where argparse refuses with exit code 2."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse(words)
        except SystemExit as exit:
            assert exit.code == 2 or "-h" in words or "--help" in words
            return None


def fuzz(fuzzer: Fuzzer, cases: int) -> int:
    """Runs at least `cases` of them; gives how many were run."""
    count = 0

    @settings(
        max_examples=cases,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(fuzzer.cases)
    def every(case: Any) -> None:
        nonlocal count
        count += 1
        fuzzer.check(case)

    try:
        every()
    finally:
        fuzzer.close()
    return count


@pytest.mark.parametrize("name", FUZZERS)
def test_a_parser_gives_a_value_or_one_line(name, smol_dir, tmp_path):
    fuzzer = FUZZERS[name](smol_dir, tmp_path)
    cases = max(20, int(FAST_CASES * fuzzer.share))
    assert fuzz(fuzzer, cases) >= cases


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_cases(smol_dir, tmp_path):
    wanted = int(os.environ.get("TAU2_FUZZ_CASES", SLOW_CASES))
    done = Counter()
    for name, make in FUZZERS.items():
        (tmp_path / name).mkdir()
        fuzzer = make(smol_dir, tmp_path / name)
        done[name] = fuzz(fuzzer, 1 + int(1.02 * wanted * fuzzer.share))
        print(f"{name}: {done[name]} cases", flush=True)
    print(f"in all: {done.total()} cases", flush=True)
    assert done.total() >= wanted


# ---- Wrong commands ----------------------------------------------------------------------------------------------

TRAIN = (
    "--host local --check-only --hf-checkpoint m --prompt-data rl.jsonl --input-key q --rollout-batch-size 2 "
    "--num-rollout 2 --custom-rm-path operator.add --n-samples-per-prompt 2 --global-batch-size 4 "
    "--rollout-max-response-len 4"
).split()
SFT = (
    "--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss --n-samples-per-prompt 1 "
    "--global-batch-size 2 --debug-train-only --disable-compute-advantages-and-returns"
).split()
EVALUATE = "--agent teacher --output-path out.json".split()
MAINS = {
    "train.py": (train.main, TRAIN),
    "tau2_mock.py": (tau2_mock.main, ["--local_dir", "data"]),
    "teacher_traces.py": (teacher_traces.main, ["--local_dir", "data"]),
    "evaluate_tau2.py": (evaluate_tau2.main, EVALUATE),
    **{f"evaluate_tau2.py {name}": (evaluate_tau2.main, [name]) for name in ("compare", "rescore", "report")},
    "sensitivity.py": (sensitivity.main, ["--output-dir", "."]),
    "partial_credit.py": (partial_credit.main, []),
    "summarize.py": (summarize.main, []),
    "tau2_teacher.py": (tau2_teacher.main, []),
    "slime_local.server": (server.main, []),
    "slime_local.smollm2": (smollm2.main, []),
}
WRONG_COMMANDS = [
    ("train.py", "--rollout-batchsize 2", "did you mean --rollout-batch-size?"),
    ("train.py", "--host mars", "choose auto, local or slime"),
    ("train.py", "--host slime --no-such-flag", "--no-such-flag is not a flag of slime"),
    ("train.py", "extra", "belongs to no flag"),
    ("train.py", "--hf-checkpoint nowhere", "no model folder at nowhere"),
    ("train.py", "--hf-checkpoint data", "tools/convert_torch_dist_to_hf.py"),
    ("train.py", "--hf-checkpoint cut", "is cut short or damaged"),
    ("train.py", "--hf-checkpoint no-json", "config.json is not JSON"),
    ("train.py", "--hf-checkpoint no-index", "weight_map does not name"),
    ("train.py", "--num-layers 36", "--num-layers 36 does not fit m, whose num_hidden_layers is 2"),
    ("train.py", "--prompt-data none.jsonl", "no data file none.jsonl"),
    ("train.py", "--prompt-data empty.jsonl", "empty.jsonl has no rows"),
    ("train.py", "--prompt-data notes.txt", "data files end in .jsonl or .parquet"),
    ("train.py", "--prompt-data torn.jsonl", "torn.jsonl line 2 is not JSON"),
    ("train.py", "--prompt-data list.jsonl", "list.jsonl line 1 is not a JSON object"),
    ("train.py", "--prompt-data latin.jsonl", "latin.jsonl is not UTF-8 text"),
    ("train.py", "--prompt-data deep.jsonl", "deep.jsonl line 1 is not JSON that can be read"),
    ("train.py", "--prompt-data half.jsonl", "half.jsonl line 1 holds half of a surrogate pair"),
    ("train.py", "--prompt-data rl.jsonl@[7:9]", "has no rows"),
    ("train.py", "--input-key question", "line 1 has no 'question': choose with --input-key among q"),
    ("train.py", "--label-key answer", "line 1 has no 'answer'"),
    ("train.py", "--rollout-batch-size 0", "--rollout-batch-size 0: it must be 1 or more"),
    ("train.py", "--rollout-batch-size two", "invalid int value: 'two'"),
    ("train.py", "--num-rollout -1", "--num-rollout -1: it must be 0 or more"),
    ("train.py", "--global-batch-size 3", "not a multiple of --global-batch-size 3"),
    ("train.py", "--num-steps-per-rollout 3", "contradicts --num-steps-per-rollout"),
    ("train.py", "--num-steps-per-rollout 0", "it must be 1 or more"),
    ("train.py", "--lr nan", "--lr nan: give a finite number"),
    ("train.py", "--lr -1", "--lr -1.0: it must be 0 or more"),
    ("train.py", "--seed -1", "--seed -1: it must be 0 or more"),
    ("train.py", "--sglang-router-port 70000", "it must be 65535 or less"),
    ("train.py", "--rollout-temperature 0", "must be above 0"),
    ("train.py", "--rollout-top-p 0.5", "--rollout-top-p must be 1.0"),
    ("train.py", "--advantage-estimator ppo", "works under slime only"),
    ("train.py", "--partial-rollout", "works under slime only"),
    ("train.py", "--wandb-key x", "WANDB_API_KEY"),
    ("train.py", "--use-tensorboard", "--use-tensorboard needs --tensorboard-dir"),
    ("train.py", "--save bad.yaml --save-interval 1", "--save bad.yaml: bad.yaml is a file: give a folder"),
    ("train.py", "--save-hf bad.yaml/hf", "--save-hf bad.yaml/hf: bad.yaml is a file: give a folder"),
    ("train.py", "--use-kl-loss", "add --ref-load"),
    ("train.py", "--use-dynamic-batch-size", "needs --max-tokens-per-gpu"),
    ("train.py", "--eval-interval 1", "add --eval-prompt-data NAME PATH"),
    ("train.py", "--eval-prompt-data a b c", "takes pairs: NAME PATH"),
    ("train.py", "--eval-config bad.yaml", "bad.yaml is not YAML"),
    ("train.py", "--eval-config list.yaml", "expected keys and values at the top"),
    ("train.py", "--custom-config-path none.yaml", "none.yaml: no such file"),
    ("train.py", "--custom-config-path type.yaml", "rollout_batch_size 'many' is no value of --rollout-batch-size"),
    ("train.py", "--save out", "--save without --save-interval"),
    ("train.py", "--save-interval 1", "--save-interval without --save"),
    ("train.py", "--save run --save-interval 1", "already holds iteration 3: add --load run"),
    ("train.py", "--load run/iter_0000003", "give --load run --ckpt-step 3"),
    ("train.py", "--load run --ckpt-step 9", "has no iteration 9 (there: 3); choose with --ckpt-step"),
    ("train.py", "--load torn-run", "or choose an older iteration with --ckpt-step"),
    ("train.py", "--load odd-run", "says 'latest', which is no iteration"),
    ("train.py", "--load rl.jsonl", "is a file: give a checkpoint folder"),
    ("train.py", "--custom-rm-path nothere.reward", "no module nothere; add its folder to PYTHONPATH"),
    ("train.py", "--custom-rm-path operator.nothing", "has no function nothing"),
    ("train.py", "--custom-rm-path reward", "give module.function"),
    (
        "train.py",
        "--custom-rm-path generate_with_tau.generate --custom-config-path bare.yaml",
        "mean tau2_redraw_ids?",
    ),
    ("train.py", "--custom-rm-path generate_with_tau.generate --custom-config-path tau.yaml", "setting(s) tau2_promt"),
    (
        "train.py",
        "--custom-rm-path generate_with_tau.generate --custom-config-path retries.yaml",
        "tau2_retries is '1k': give a whole number of at least 0",
    ),
    (
        "train.py",
        "--custom-rm-path generate_with_tau.generate --custom-config-path timeout.yaml",
        "tau2_generate_timeout is '5m': give a number of seconds above 0",
    ),
    ("train.py", "--apply-chat-template-kwargs {", "not JSON"),
    ("train.py", [*SFT, "--prompt-data", "user.jsonl", "--input-key", "p"], "no assistant turn to train"),
    ("train.py", [*SFT, "--prompt-data", "call.jsonl", "--input-key", "p"], "tool_calls with names"),
    ("tau2_mock.py", "--domain phone", "unknown domain 'phone'; choose one of: airline"),
    ("tau2_mock.py", "--splits tests", "unknown split 'tests' of domain 'telecom'; choose from"),
    ("tau2_mock.py", "--min-distance 0", "--min-distance must be at least 1"),
    ("tau2_mock.py", "--min-distance 3", "--min-distance belongs to --splits pool"),
    (
        "tau2_mock.py",
        "--splits pool --min-distance 100",
        "no task is 100 faults away from every test task: lower --min",
    ),
    ("tau2_mock.py", "--splits train pool --min-distance 100", "no task is 100 faults away from every test task"),
    ("tau2_mock.py", "--seed 0", "--seed belongs to --mix"),
    ("tau2_mock.py", "--domain retail --mix a=1", "--mix draws telecom's issue types only"),
    ("tau2_mock.py", "--mix mms_issue", "'mms_issue': give KIND=N,..."),
    ("tau2_mock.py", ["--mix", ""], "'': give KIND=N,..."),
    ("tau2_mock.py", "--mix =2", "'=2': give KIND=N,..."),
    ("tau2_mock.py", "--mix mms_issue=1,mms_issue=2", "'mms_issue' is named twice"),
    ("tau2_mock.py", "--mix no_such=1", "no task is of the kind 'no_such'; they are: airplane_mode_on, "),
    (
        "tau2_mock.py",
        "--splits train --mix airplane_mode_on=1,break_apn_settings=1,lock_sim_card_pin=1,service_issue=1",
        "every task of the kind 'service_issue' counts for airplane_mode_on or break_apn_settings or lock",
    ),
    ("tau2_mock.py", "--local_dir rl.jsonl", "is a file, not a folder"),
    ("tau2_mock.py", f"--local_dir {'x' * 300}", "cannot be a folder"),
    ("tau2_mock.py", "--loca_dir x", "unrecognized arguments: --loca_dir"),
    ("teacher_traces.py", "", "does not exist; make it with: python"),
    ("teacher_traces.py", "--tasks task.jsonl --output m", "m is a folder: give a file"),
    ("teacher_traces.py", f"--tasks task.jsonl --output {'x' * 300}", "cannot be a file: File name too long"),
    ("teacher_traces.py", "--tasks rl.jsonl", "holds no task under metadata.task: is it a file of tau2_mock.py?"),
    ("teacher_traces.py", "--tasks torn.jsonl", "line 2 is not JSON"),
    ("teacher_traces.py", "--tasks odd-task.jsonl", "the task 'x' is not one of tau2's"),
    ("teacher_traces.py", "--num-traces 0", "no whole number from 1 to"),
    ("teacher_traces.py", "--mix mms_issue=0", "'0' is no whole number from 1 to 1,000,000"),
    ("teacher_traces.py", "--mix mms_issue", "'mms_issue': give KIND=N,..."),
    ("teacher_traces.py", "--slip 2", "2 is not between 0 and 1"),
    ("teacher_traces.py", "--style loud", "invalid choice: 'loud'"),
    ("teacher_traces.py", "--user-args {", "not a JSON object"),
    ("teacher_traces.py", "--from-hub-file none.jsonl", "none.jsonl does not exist"),
    ("teacher_traces.py", "--from-rollouts rl.jsonl", "give a folder of rollouts, a .pt file of them"),
    ("teacher_traces.py", "--from-hub-file rl.jsonl", "no row is left to write (dropped: 2 no task_id)"),
    ("teacher_traces.py", "--tasks task.jsonl --user no-such-model", "unknown customer 'no-such-model'"),
    ("evaluate_tau2.py", "--agent checkpoint", "needs --checkpoint DIR"),
    ("evaluate_tau2.py", "--agent checkpoint --checkpoint nowhere", "no such folder"),
    ("evaluate_tau2.py", "--agent checkpoint --checkpoint run", "--save-hf wrote (train.py --save-hf DIR)"),
    ("evaluate_tau2.py", "--checkpoint m", "--checkpoint is of --agent checkpoint"),
    ("evaluate_tau2.py", "--agent checkpoint --checkpoint notes.txt", "is a file: give a Hugging Face model folder"),
    ("evaluate_tau2.py", "--redraw-ids 0.5", "0.5; --redraw-ids takes no value: here all tasks are"),
    ("evaluate_tau2.py", "--agent human", "invalid choice: 'human'"),
    ("evaluate_tau2.py", "--num-tasks 41", "the split has 40 tasks"),
    ("evaluate_tau2.py", "--num-trials 0", "--num-trials must be at least 1"),
    ("evaluate_tau2.py", "--output-path out.txt", "must end in .json"),
    ("evaluate_tau2.py", "--output-path none/out.json", "no folder none"),
    ("evaluate_tau2.py", "--domain retail --agent do-nothing", "the scripted customer exists for the telecom"),
    ("evaluate_tau2.py", "--task-split tests", "unknown split 'tests'"),
    ("evaluate_tau2.py", "--user-args [1]", "not a JSON object"),
    ("evaluate_tau2.py", ["--user", "gpt-4", "--user-args", '{"api_key": "x"}'], "read from the environment only"),
    (
        "evaluate_tau2.py compare",
        "a.json b.json --output-path none/c.json",
        "none/c.json: no folder none",
    ),
    ("evaluate_tau2.py compare", "a.json b.json --output-path data", "--output-path data is a folder"),
    ("evaluate_tau2.py compare", "a.json b.json --output-path ./b.json", "would overwrite what is read"),
    ("evaluate_tau2.py rescore", "a.json --output-path none/x.json", "--output-path none/x.json: no folder none"),
    ("evaluate_tau2.py rescore", "a.json --output-path data", "--output-path data is a folder"),
    ("evaluate_tau2.py report", "a.json --output a.json", "would overwrite what is read: give another file"),
    ("evaluate_tau2.py report", "a.json --metrics-log m.txt --output m.txt", "would overwrite what is read"),
    ("evaluate_tau2.py report", "a.json --output other.jsonl", "give a name that ends in .html"),
    ("evaluate_tau2.py report", "a.json --output data", "--output data is a folder: give a file in it"),
    ("evaluate_tau2.py report", "a.json --output none/r.html", "--output none/r.html: no folder none"),
    (
        "sensitivity.py",
        "--agent checkpoint --checkpoint m --moods terse --num-trials 2",
        "greedy episodes: give --temperature or --redraw-ids\n",
    ),
    ("partial_credit.py", "nowhere", "nowhere does not exist: give a folder of rollouts"),
    ("summarize.py", "", "error: the following arguments are required: --run-dir (--help lists them)"),
    ("tau2_teacher.py", "--stlye checks", "--stlye checks; did you mean --style? (--help lists them)"),
    ("tau2_mock.py", "--seeed 1", "unrecognized arguments: --seeed 1; did you mean --seed?"),
    ("summarize.py", "--run-dir nowhere", "run run_local.sh first"),
    ("summarize.py", "--run-dir odd-summary", "remove it and evaluate again"),
    ("slime_local.server", "", "--model-path"),
    ("slime_local.server", "--model-path nowhere", "no model folder at nowhere"),
    ("slime_local.server", "--model-path cut", "is cut short or damaged"),
    ("slime_local.server", "--model-path m --port 70000", "ports go from 0 to 65535"),
    ("slime_local.server", "--model-path m --host no.such.host.invalid", "cannot listen on"),
    ("slime_local.server", "--model-path m --context-length 1", "--context-length must be 2 or more"),
    ("slime_local.server", "--model-path m --max-running-requests 0", "--max-running-requests 1 or more"),
    ("slime_local.smollm2", "", "--out"),
    ("slime_local.smollm2", "--out old-smol", "remove the folder and run again"),
    ("slime_local.smollm2", "--out rl.jsonl/smol", "cannot be written"),
]
WRONG_SCRIPTS = [
    ("run_sft.sh", {"HOST": "moon"}, "HOST=moon: choose slime or local"),
    ("run_sft.sh", {"MODEL": "gpt"}, "there is no scripts/models/gpt.sh; there are: qwen3"),
    ("run_sft.sh", {"NUM_ROLLOUT": "many"}, "NUM_ROLLOUT=many: give a whole number above 0"),
    ("run_grpo.sh", {"NUM_GPUS": "0"}, "NUM_GPUS=0: give a whole number above 0"),
    ("run_grpo.sh", {"ROLLOUT_BATCH": "-2"}, "ROLLOUT_BATCH=-2: give a whole number above 0"),
    ("run_grpo.sh", {"PYTHON": "python9"}, "set PYTHON to Python 3.11 or newer"),
    ("run_sft.sh", {"PATH": "/usr/bin:/bin"}, "no ray on PATH: run it in slime's image, or HOST=local"),
    ("run_grpo.sh", {"PATH": "/usr/bin:/bin"}, "no ray on PATH: run it in slime's image, or HOST=local"),
    ("run_eval.sh", {}, "set CHECKPOINT to the folder to evaluate"),
    ("run_eval.sh", {"CHECKPOINT": "x/iter_0000001"}, "set SLIME_DIR, or evaluate an HF folder"),
    ("run_local.sh", {"EVAL_TASKS": "all"}, "EVAL_TASKS=all: give a whole number above 0"),
    ("run_local.sh", {"TRIALS": "0"}, "TRIALS=0: give a whole number above 0"),
    ("run_local.sh", {"PORT": "http"}, "PORT=http: give a whole number above 0"),
    ("run_local.sh", {"KL": "much"}, "KL=much: give a number"),
    ("run_local.sh", {"MOOD": "angry"}, f"MOOD=angry: choose one of: {', '.join(tau2_moods.CHOICES)}"),
    ("run_local.sh", {"RUN_DIR": "README.md"}, "RUN_DIR=README.md: no folder that can be made and written here"),
    ("run_local.sh", {"RUN_DIR": "/proc/run"}, "RUN_DIR=/proc/run: no folder that can be made and written here"),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with one file or folder for everything that can be wrong."""
    folder = tmp_path_factory.mktemp("workshop")
    model = save_tiny_model(folder / "m")
    rows = {
        "rl.jsonl": '{"q": "a"}\n{"q": "b"}\n',
        "empty.jsonl": "",
        "notes.txt": "hello\n",
        "torn.jsonl": '{"q": 1}\n{"q": \n',
        "list.jsonl": "[1]\n",
        "deep.jsonl": f'{{"q": {"[" * 9000}{"]" * 9000}}}\n',
        "half.jsonl": '{"q": "\\ud800"}\n',
        "user.jsonl": '{"p": [{"role": "user", "content": "a"}]}\n' * 2,
        "call.jsonl": '{"p": [{"role": "assistant", "content": "", "tool_calls": [{"name": 1}]}]}\n' * 2,
        "odd-task.jsonl": '{"metadata": {"task": {"id": "x"}}}\n',
        "bad.yaml": "a: [\n",
        "list.yaml": "- a\n",
        "type.yaml": "rollout_batch_size: many\n",
        "tau.yaml": "tau2_promt: short\n",
        "bare.yaml": "redraw_ids: 0.5\n",
        "retries.yaml": "tau2_retries: 1k\n",
        "timeout.yaml": "tau2_generate_timeout: 5m\n",
    }
    for name, text in rows.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes('{"q": "é"}\n'.encode("latin-1"))
    task = load_tasks("telecom", "train")[0].model_dump(mode="json")
    (folder / "task.jsonl").write_text(json.dumps({"metadata": {"task": task}}) + "\n")
    for name in ("data", "odd-run", "old-smol", "odd-summary"):
        (folder / name).mkdir()
    for name in ("cut", "no-json", "no-index"):
        shutil.copytree(model, folder / name)
    (folder / "cut/model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-10])
    (folder / "no-json/config.json").write_text("{")
    (folder / "no-index/model.safetensors.index.json").write_text("{}")
    state = {"schedule": {}, "random": None, "optimizer_steps": 1, "skipped_steps": 0, "extra": {}}
    for name in ("run", "torn-run"):
        checkpoint.write(folder / name, 3, {"w": torch.ones(4)}, None, state)
    weights = folder / "torn-run/iter_0000003/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    (folder / "odd-run" / checkpoint.TRACKER).write_text("latest")
    (folder / "old-smol/config.json").write_text("{}")
    (folder / "odd-summary/eval_base.json").write_text("[]")
    return folder


def test_the_table_has_at_least_60_rows():
    rows = {(script, str(words)) for script, words, _ in [*WRONG_COMMANDS, *WRONG_SCRIPTS]}
    assert len(rows) == len(WRONG_COMMANDS) + len(WRONG_SCRIPTS) >= 60
    assert {script for script, _, _ in WRONG_COMMANDS} == set(MAINS)


@pytest.mark.parametrize(("script", "words", "named"), WRONG_COMMANDS)
def test_a_wrong_command_exits_with_2_and_names_the_fix(script, words, named, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    before = sorted(path for path in workshop.rglob("*"))
    main, base = MAINS[script]
    try:
        code = main([*base, *(words.split() if isinstance(words, str) else words)])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    said = capsys.readouterr().err
    assert code == 2 and named in said and "Traceback" not in said, said
    assert "error: " in said.splitlines()[-1]
    assert sorted(path for path in workshop.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(("script", "settings", "named"), WRONG_SCRIPTS)
def test_a_wrong_script_setting_exits_with_2_and_names_the_fix(script, settings, named, tmp_path):
    names = ("HOST", "MODEL", "PROMPT", "PORT", "CHECKPOINT", "SLIME_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"PYTHON": sys.executable, "SLIME_DIR": str(tmp_path), "DATA_DIR": str(tmp_path), **settings}
    command = ["bash", str(EXAMPLE / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())

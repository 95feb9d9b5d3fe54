"""Our plug-ins and commands in slime's own code; skipped, with the reason, where slime is not installed.

    PYTHONPATH=MEGATRON python -m pytest -m "slow or not slow" tests/test_slime.py

with this project's requirements, sglang, sglang-router, ray and `pip install -e` of a slime checkout; MEGATRON is a
Megatron-LM checkout with slime's patch. SGLang wants an older transformers than the one that writes SmolLM2's folder:
run the other tests in the project's own environment first, or name their cache with TAU2_CACHE.
Without CUDA the replacements listed in tests/slime_edge.py stand at the edge.
"""

import asyncio
import copy
import json
import os
import statistics
import subprocess
import sys
import types

import pytest

pytest.importorskip(
    "slime", reason="slime is not installed: pip install -e a checkout of it to run our plug-ins in it"
)

from slime_edge import can_parse, parse, rollout_manager, slime_checkout, train_data  # isort: skip  (before transformers)

import conftest
from conftest import EXAMPLE, ROOT
from fake_generate import FakeModel, serving

from http_client import close_session
from openai_tool_adapter import ChatTemplate, load_chat_template, render_turn
from slime_local.engine import RequestError
from slime_local.flags import HONOURED, REFUSED, load_flags, parse_args
from slime_local.masks import LossMasker
from slime_local.server import serve
from tau2_domains import issue_type, load_tasks
from tau2_episode import EpisodeConfig, run_episode
from tau2_mock import make_rows, write_jsonl
from tau2_reward_shaping import shaped_reward
from tau2_teacher import AlwaysTransfer, DoNothing, ScriptedTeacher
from teacher_traces import make_row
from token_agent import TokenAgent

needs_parser = pytest.mark.skipif(bool(can_parse()), reason=can_parse())

TINY_ARGS = [*conftest.TINY_ARGS, "--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
PLUG_INS = (
    "--custom-generate-function-path generate_with_tau.generate "
    "--custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process "
    "--custom-rollout-log-function-path tau2_reward_shaping.log_rollout "
    "--custom-eval-rollout-log-function-path tau2_reward_shaping.log_eval_rollout"
).split()
QWEN3_4B_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}


# ---------------------------------------------------------------------------------------------------------------------
# slime's plug-in contract tests


def contract_test(file, *flags):
    script = slime_checkout() / "tests" / "plugin_contracts" / file
    if not script.is_file():
        pytest.skip("this slime came without its tests: install it with pip install -e CHECKOUT")
    command = [sys.executable, str(script), *flags, "-p", "no:cacheprovider"]
    return subprocess.run(
        command, cwd=slime_checkout(), capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "flags", "tests"),
    [
        (
            "test_plugin_generate_contracts.py",
            PLUG_INS[:2],
            ["test_custom_generate_function_path_supports_user_override"],
        ),
        (
            "test_plugin_runtime_hook_contracts.py",
            PLUG_INS[2:],
            [
                f"test_runtime_hook_path_aligns_with_expected_format[custom_{hook}]"
                for hook in ("rollout_log", "eval_rollout_log", "reward_post_process")
            ],
        ),
    ],
)
def test_our_functions_pass_slimes_contract_tests(file, flags, tests):
    done = contract_test(file, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{test} PASSED" in done.stdout for test in tests), done.stdout


@pytest.mark.slow
def test_the_contract_tests_take_the_function_that_they_are_given():
    done = contract_test("test_plugin_generate_contracts.py", PLUG_INS[0], "generate_with_tau.token_limits")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The commands that we print, in slime's parser


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smol_dir):
    """Model folders where the scripts expect them; slime's parser reads their config.json."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "qwen3-4B").mkdir()
    (folder / "qwen3-4B" / "config.json").write_text(json.dumps(QWEN3_4B_CONFIG))
    (folder / "run" / "sft").mkdir(parents=True)
    (folder / "run" / "sft" / "hf").symlink_to(smol_dir)
    return folder


def printed(script, folders):
    settings = {"PRINT": "1", "HF_DIR": str(folders / "qwen3-4B"), "PYTHON": sys.executable}
    clean = {key: value for key, value in os.environ.items() if key not in ("HOST", "MODEL", "PROMPT", "CONFIG")}
    command = ["bash", str(EXAMPLE / script)]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=True, cwd=ROOT)
    first, *arguments = done.stdout.splitlines()
    assert first == "python3 train.py"
    return arguments


def arrays_of_run_local(names, folders, smol_dir, quick):
    """MODEL_ARGS, TRAIN_ARGS and other arrays of run_local.sh: the script up to its first function, not set up."""
    text = (EXAMPLE / "run_local.sh").read_text()
    head = text[: text.index("\nsay() {")].replace("bash scripts/setup_env.sh\n", "")
    assert "setup_env" not in head
    head = head.replace('"${BASH_SOURCE[0]}"', f'"{EXAMPLE / "run_local.sh"}"')
    arrays = " ".join(f'"${{{name}_ARGS[@]}}"' for name in ("MODEL", "TRAIN", *names))
    head += f'\nprintf "%s\\n" {arrays}'
    settings = {"RUN_DIR": str(folders / "run"), "MODEL_DIR": str(smol_dir), "QUICK": quick}
    done = subprocess.run(["bash", "-c", head], env=os.environ | settings, capture_output=True, text=True, check=True)
    return [*done.stdout.splitlines(), "--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1"]


@pytest.fixture(
    params=["run_sft.sh", "run_grpo.sh", "run_local.sh SFT TEACHER", "run_local.sh GRPO", "run_local.sh QUICK GRPO"]
)
def command(request, folders, smol_dir, monkeypatch):
    monkeypatch.chdir(ROOT)  # the scripts go there, and name files from there
    script, *what = request.param.split()
    if script != "run_local.sh":
        return printed(script, folders)
    names = [name for name in what if name != "QUICK"]
    return arrays_of_run_local(names, folders, smol_dir, "1" if "QUICK" in what else "0")


# What slime and Megatron derive in their own way.
SLIMES_OWN = {
    "load": "--ref-load while --load holds no checkpoint yet",
    "finetune": "that, to Megatron",
    "no_load_optim": "that, to Megatron",
    "no_load_rng": "that, to Megatron",
    "start_rollout_id": "0 in a new run",
    "position_embedding_type": "rope, which --use-rotary-position-embeddings says",
    "start_weight_decay": "--weight-decay where that is constant",
    "end_weight_decay": "the same",
}


@pytest.mark.slow
@needs_parser
def test_slimes_parser_takes_our_commands_and_reads_them_as_we_do(command):
    theirs, known = parse(command)
    ours = parse_args(command, "slime")
    assert set(ours.given_flags) <= known, "slime passes over what it does not know in silence"
    dests = {flag.name: flag.dest for flag in load_flags()}
    checked = {dests[name] for name in (*HONOURED, *ours.given_flags)} - SLIMES_OWN.keys()
    nothing = object()
    differences = {
        dest: (getattr(ours, dest, nothing), getattr(theirs, dest, nothing))
        for dest in sorted(checked)
        if hasattr(theirs, dest) and getattr(ours, dest, nothing) != getattr(theirs, dest)
    }
    assert not differences
    assert all(hasattr(theirs, dests[flag]) for flag in ours.given_flags)


@pytest.mark.slow
@needs_parser
def test_the_flags_that_our_tables_name_exist_in_slime(folders):
    _, known = parse(printed("run_grpo.sh", folders))
    assert not (HONOURED.keys() | REFUSED.keys()) - known


# ---------------------------------------------------------------------------------------------------------------------
# SFT rows and rollouts, in slime's rendering


class NaturalTeacher(FakeModel):
    """Says the teacher's words in the tokenizer's own ids, as SFT has them; `opening` comes before each turn."""

    opening = ""

    def _odd_ids(self, text):
        return self.template.tokenizer.encode(self.opening + text, add_special_tokens=False)


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
THINKS_LAST = "{%- if loop.last or (not loop.last and reasoning_content) %}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["service_issue", "mobile_data_issue", "mms_issue"])
@pytest.mark.parametrize("prompt", ["official", "short"])
@pytest.mark.parametrize("thinks", [False, True], ids=["instruct", "hybrid"])
async def test_sft_and_rollout_hold_the_same_ids_and_mask_but_for_the_newline_after_a_turn(
    qwen3_tokenizer, kind, prompt, thinks
):
    """slime's SFT also trains the newline that the template puts after <|im_end|>; a rollout never samples it. Nothing
    else differs when the model says what SFT taught it, and slime_local renders as slime does.

    instruct: the template opens no turn with an empty thought, as that of Qwen3-4B-Instruct-2507. hybrid: the first
    Qwen3's own template; SFT teaches the empty thought, and writes one before the greeting, which a prompt has not.
    """
    from slime.utils.mask_utils import MultiTurnLossMaskGenerator

    tokenizer = copy.deepcopy(qwen3_tokenizer)
    assert THINKS_LAST in tokenizer.chat_template
    if not thinks:
        tokenizer.chat_template = tokenizer.chat_template.replace(THINKS_LAST, "{%- if reasoning_content %}")
    template = ChatTemplate(tokenizer)
    model = NaturalTeacher(template)
    model.opening = EMPTY_THOUGHT if thinks else ""
    task = next(task for task in load_tasks("telecom", "train") if issue_type(task.id) == kind)
    config = EpisodeConfig(prompt=prompt)
    with serving(model) as (host, port):
        agent = TokenAgent(template, f"http://{host}:{port}/generate", {"max_new_tokens": 1024})
        episode = await run_episode(task, agent, config)
        await close_session()
    assert episode.reward == 1.0 and len(agent.turns) > 2
    row = make_row(episode, {}, config)
    ids, mask = MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(row["prompt"], row["tools"])
    assert LossMasker(tokenizer, "qwen3").mask(row["prompt"], row["tools"]) == (ids, mask)
    if thinks:
        ids, mask = without_the_first(tokenizer.encode(EMPTY_THOUGHT), ids, mask)
    (newline,) = tokenizer.encode("\n")
    assert ids == [*agent.token_ids, newline]
    ends = [
        place for place, (token, bit) in enumerate(zip(ids, mask, strict=True)) if token == template.end_id and bit
    ]
    assert len(ends) == len(agent.turns) and {ids[end + 1] for end in ends} == {newline}
    for end in ends:
        mask[end + 1] -= 1  # the one difference; it makes this mask 0 there
    assert mask == [*[0] * len(agent.prompt_ids), *agent.loss_mask, 0]


def without_the_first(block, ids, mask):
    """The greeting's empty thought, which nobody trains, taken out."""
    start = ids.index(block[0])
    assert ids[start : start + len(block)] == block and not any(mask[start : start + len(block)])
    return ids[:start] + ids[start + len(block) :], mask[:start] + mask[start + len(block) :]


# ---------------------------------------------------------------------------------------------------------------------
# slime's rollout loop over our server


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One train task of each issue type, as tau2_mock.py writes them."""
    first = {issue_type(task.id): task for task in reversed(load_tasks("telecom", "train"))}
    path = tmp_path_factory.mktemp("tasks") / "telecom.jsonl"
    write_jsonl(path, make_rows("telecom", "train", first.values()))
    assert len(first) == 3
    return path


def rollout_args(model, tasks, address, *flags):
    """slime's own args for rollouts of the tiny model on the tasks."""
    host, port = address
    argv = [*TINY_ARGS, *PLUG_INS, "--hf-checkpoint", model, "--prompt-data", tasks, "--input-key", "index"]
    argv += ["--custom-config-path", EXAMPLE / "local.yaml", "--num-rollout", 1, "--rollout-seed", 42]
    argv += ["--actor-num-gpus-per-node", 1, "--rollout-num-gpus", 1, "--num-gpus-per-node", 1]
    argv += ["--sglang-router-ip", host, "--sglang-router-port", port, "--rollout-temperature", 1.0, *flags]
    return parse([str(word) for word in argv])[0]


class Recorder:
    """Keeps what an engine answered."""

    def __init__(self, engine):
        self.engine, self.turns = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def generate(self, payload):
        answer = await self.engine.generate(payload)
        self.turns.append((payload["input_ids"], answer["meta_info"]["output_token_logprobs"]))
        return answer


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    """Our engine over the random model. Its turns end at one of many stop tokens: it would never say <|im_end|>."""
    import torch
    from transformers import AutoTokenizer

    from slime_local.engine import Engine
    from slime_local.model import load_model

    model = load_model(tiny_model_dir, torch.float32, "cpu").requires_grad_(False)
    engine = Engine(model, AutoTokenizer.from_pretrained(tiny_model_dir), max_context=4096)
    yield engine
    engine.close()


MANY_STOPS = ("--rollout-stop-token-ids", *map(str, range(1000, 7000)))
LIMITS = ("--rollout-max-response-len", "700", "--rollout-max-context-len", "3000")


@pytest.mark.slow
@needs_parser
def test_a_rollout_over_our_engine_becomes_train_data(ray, engine, tiny_model_dir, tasks):
    """Loop, log, reward post-process, conversion and data-parallel split: the trained ids are the sampled ids."""
    recorder = Recorder(engine)
    batch = ("--rollout-batch-size", "3", "--n-samples-per-prompt", "2", "--global-batch-size", "6")
    with serve(recorder, model_path=str(tiny_model_dir)) as address:
        args = rollout_args(tiny_model_dir, tasks, address, *batch, *LIMITS, *MANY_STOPS)
        with rollout_manager(args) as manager:
            data = train_data(manager.generate(0))
    assert sorted(data) == list(range(6))
    assert sum(len(turns_of(recorder, row)) for row in data.values()) == len(recorder.turns) > 12
    for row in data.values():
        check_row(row, turns_of(recorder, row))
    check_log(manager.logged, data)


def turns_of(recorder, row):
    """The calls whose ids, sent and sampled, lie in this row; two samples never sampled the same turns here."""
    tokens = row["tokens"].tolist()
    return [
        (ids, pairs)
        for ids, pairs in recorder.turns
        if tokens[: len(ids) + len(pairs)] == [*ids, *(token for _, token, *_ in pairs)]
    ]


def check_row(row, turns):
    tokens, mask, log_probs = (row[key].tolist() for key in ("tokens", "loss_masks", "rollout_log_probs"))
    prompt = len(tokens) - row["response_lengths"]
    assert len(mask) == len(log_probs) == row["response_lengths"] and prompt == len(turns[0][0])
    sampled = {len(ids) - prompt + i: pair for ids, pairs in turns for i, pair in enumerate(pairs)}
    assert [place for place, bit in enumerate(mask) if bit] == sorted(sampled)
    for place, log_prob in enumerate(log_probs):
        assert log_prob == pytest.approx(sampled[place][0] if place in sampled else 0.0, abs=1e-5)
    assert all(pair[0] < 0 for pair in sampled.values())


def check_log(logged, data):
    """Our metrics and slime's own go out in one call."""
    (metrics,) = [metrics for metrics in logged if "rollout/step" in metrics]
    reasons = [value for key, value in metrics.items() if key.startswith("rollout/stop/")]
    assert sum(reasons) == pytest.approx(1.0) and metrics["rollout/aborted"] == 0
    assert metrics["rollout/pass_rate"] == statistics.fmean(row["raw_reward"] for row in data.values())
    assert metrics["rollout/truncated_ratio"] == statistics.fmean(row["truncated"] for row in data.values())
    trained = [int(row["loss_masks"].sum()) for row in data.values()]
    assert metrics["rollout/response_len/mean"] == pytest.approx(statistics.fmean(trained))
    assert metrics["perf/rollout_time"] > 0 and metrics["perf/non_generation_time/max"] > 0


@pytest.mark.slow
@needs_parser
def test_an_evaluation_leaves_slimes_shared_parameters_alone(ray, engine, tiny_model_dir, tasks, monkeypatch):
    calls = []

    async def noted(args, sample, sampling_params, evaluation=False):
        from generate_with_tau import generate

        before = (sampling_params, json.dumps(sampling_params), sample.group_index, sample.session_id, evaluation)
        sample = await generate(args, sample, sampling_params, evaluation)
        calls.append((*before, json.dumps(sampling_params), sample))
        return sample

    monkeypatch.setitem(sys.modules, "noted_plug_in", types.SimpleNamespace(generate=noted))
    flags = ("--rollout-batch-size", "1", "--n-samples-per-prompt", "1", "--global-batch-size", "1", *MANY_STOPS)
    flags += ("--eval-interval", "1", "--eval-prompt-data", "held", f"{tasks}@[0:2]", "--eval-input-key", "index")
    flags += ("--n-samples-per-eval-prompt", "2", "--eval-temperature", "0.5", "--eval-max-response-len", "500")
    flags += ("--custom-generate-function-path", "noted_plug_in.generate", "--log-passrate", *LIMITS)
    with serve(engine, model_path=str(tiny_model_dir)) as address:
        args = rollout_args(tiny_model_dir, tasks, address, *flags)
        with rollout_manager(args) as manager:
            manager.eval(0)
    assert len(calls) == 4 and len({id(call[0]) for call in calls}) == 1, "slime gives every sample the same dict"
    assert {(*call[2:5], call[1] == call[5]) for call in calls} == {(None, None, True, True)}
    assert {len(call[6].metadata["tau2"]["turn_tokens"]) > 0 for call in calls} == {True}
    assert max(call[6].response_length for call in calls) <= 500
    metrics = {}
    for part in manager.logged:  # slime gives our log function no dict to add to here, so ours go out on their own
        assert part["eval/step"] == 0
        metrics |= part
    assert metrics["eval/held"] == 0.0 and metrics["eval/held-pass@1"] == 0.0 == metrics["eval/held/pass_rate"]
    assert sum(value for key, value in metrics.items() if key.startswith("eval/held/stop/")) == pytest.approx(1.0)


class Players(FakeModel):
    """An engine for our server that plays one part for each place in a group: the teacher, one who hands over, one who
    does nothing, and a model whose second call the server refuses. slime's sampling seed tells the place.

    From the third prompt on, second turns are held back until slime aborts; then they are answered as if nothing was.
    """

    PARTS = (ScriptedTeacher, AlwaysTransfer, DoNothing, None)
    failure, weight_version, max_context = None, 7, 8192

    def __init__(self, template):
        super().__init__(template)
        self.aborted, self.late, self.busy = asyncio.Event(), 0, 0
        self.prompts, self.seed = [], 42

    @property
    def num_requests(self):
        return self.busy

    def abort(self, rid=None):
        self.aborted.set()

    async def generate(self, payload):
        self.late += self.aborted.is_set()
        self.busy += 1
        try:
            return await self._play(payload["input_ids"], payload["sampling_params"]["sampling_seed"] - self.seed)
        finally:
            self.busy -= 1

    async def _play(self, ids, place_and_turn):
        """The seed moves on by one with each turn, so place and turn are told apart by the ids that came before."""
        key = next((k for k in self.sessions if self._continues(k, ids, place_and_turn)), None)
        if key is None:
            key = (len(self.sessions), place_and_turn)
            self.sessions[key] = (self.PARTS[place_and_turn] and self.PARTS[place_and_turn](), [], ids, 0)
            if ids not in self.prompts:
                self.prompts.append(ids)
        agent, said, prompt, turn = self.sessions[key]
        if turn == 1 and agent is None:
            raise RequestError("this part breaks off")
        if turn == 1 and self.prompts.index(prompt) >= 2:
            await self.aborted.wait()
        if agent is not None and turn == 0:
            await agent.start([], [])
        text = {"role": "user", "content": self._last_message(ids[len(said) :])}
        answer = await (agent or DoNothing()).act([text])
        sampled = [*self._odd_ids(render_turn(answer)), self.template.end_id]
        self.sessions[key] = (agent, ids + sampled, prompt, turn + 1)
        return self.answer(sampled, ids, cached=len(said))

    def _continues(self, key, ids, place_and_turn):
        _, said, _, turn = self.sessions[key]
        return turn > 0 and key[1] + turn == place_and_turn and len(ids) > len(said) and ids[: len(said)] == said


@pytest.mark.slow
@needs_parser
def test_groups_are_normalised_without_what_broke_and_an_abort_removes_what_it_meets(
    ray, smol_dir, tiny_model_dir, tasks
):
    players = Players(load_chat_template(str(smol_dir)))
    flags = ("--rollout-batch-size", "2", "--over-sampling-batch-size", "3", "--n-samples-per-prompt", "4")
    flags += ("--global-batch-size", "8", "--sglang-enable-deterministic-inference")
    flags += ("--rollout-max-response-len", "7000", "--rollout-max-context-len", "8192")
    with serve(players, model_path=str(tiny_model_dir)) as address:
        args = rollout_args(tiny_model_dir, tasks, address, *flags)
        with rollout_manager(args) as manager:
            handed, samples = noted_samples(manager)
            data = train_data(manager.generate(0))
    assert len(handed) == 3 and len(samples) == 8
    check_groups(data, samples)
    check_aborted(players, handed, samples)


def noted_samples(manager):
    """Lists that fill: the groups that slime hands out, and the samples that it converts."""
    handed, samples = [], []
    hand_out, convert = manager.data_source.get_samples, manager._convert_samples_to_train_data

    def noting_groups(count):
        groups = hand_out(count)
        handed.extend(groups)
        return groups

    def noting_samples(flat):
        samples.extend(flat)
        return convert(flat)

    manager.data_source.get_samples = noting_groups
    manager._convert_samples_to_train_data = noting_samples
    return handed, samples


def check_groups(data, samples):
    """Every group: three episodes normalised among themselves, and one sample that broke, with no weight."""
    by_group = {}
    for place, sample in enumerate(samples):
        by_group.setdefault(sample.group_index, []).append((sample, data[place]))
    assert len(by_group) == 2
    for members in by_group.values():
        *kept, (broken, row) = members
        assert broken.metadata["tau2"]["end_reason"] == "generation_failed" and broken.remove_sample
        assert (row["tokens"].tolist(), row["loss_masks"].tolist(), row["rewards"]) == ([0, 0], [0], 0.0)
        records = [sample.metadata["tau2"] for sample, _ in kept]
        shaped = [shaped_reward(record["reward"], record["checks"]) for record in records]
        assert kept[0][0].reward == 1.0 and shaped[0] == max(shaped) > min(shaped)
        mean, scale = statistics.mean(shaped), statistics.stdev(shaped) + 1e-6
        assert [row["rewards"] for _, row in kept] == pytest.approx([(value - mean) / scale for value in shaped])
        assert sum(row["rewards"] for _, row in kept) == pytest.approx(0.0, abs=1e-6)
        with_broken = statistics.mean([*shaped, 0.0])
        assert abs(mean - with_broken) > 0.05, "the broken sample would have moved the mean"
        assert all(int(row["loss_masks"].sum()) > 0 for _, row in kept)


def check_aborted(players, handed, samples):
    """The surplus group stood between two turns when slime ended the rollout."""
    used = {sample.index for sample in samples}
    (surplus,) = [group for group in handed if group[0].index not in used]
    assert players.aborted.is_set() and players.late == 0, "nothing is asked of the server after the abort"
    for sample in (surplus[0], surplus[2]):
        assert sample.metadata["tau2"]["end_reason"] == "generation_aborted"
        assert sample.status is type(sample).Status.ABORTED and sample.remove_sample
        assert (sample.tokens, sample.loss_mask, sample.rollout_log_probs) == ([0, 0], [0], [0.0])
        assert sample.reward == 0.0

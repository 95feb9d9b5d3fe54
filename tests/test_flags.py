"""slime's command line: names, types, defaults, what is derived, and what this host says of each flag."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slime_local.checks import _check_sampling, _check_server
from slime_local.errors import UsageError
from slime_local.flags import (
    ALLOWED_VALUES,
    HONOURED,
    MODEL_SHAPE,
    REFUSED,
    check_combinations,
    load_flags,
    parse_args,
)

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = ["--rollout-batch-size", "4", "--num-rollout", "2"]
FLAGS = {flag.name: flag for flag in load_flags()}


def parse(*words: str, host: str = "local"):
    return parse_args([*MINIMAL, *words], host)


def message(*words: str, host: str = "local") -> str:
    with pytest.raises(UsageError) as caught:
        check_combinations(parse(*words, host=host))
    return str(caught.value)


def test_the_list_is_whole_and_every_default_is_slimes():
    assert len(FLAGS) == 1388
    args = parse()
    assert args.eps_clip == 0.2 and args.lr == 1e-6 and args.weight_decay == 0.01 and args.adam_beta2 == 0.999
    assert args.rollout_seed == 42 and args.seed == 1234 and args.clip_grad == 1.0
    assert args.lr_decay_style == "linear" and args.kl_loss_type == "k1" and args.tool_key == "tools"
    assert args.train_env_vars == {} and args.rollout_sample_hook_path == []
    suppressed = {flag.dest for flag in FLAGS.values() if "SUPPRESS" in flag.default}
    assert {flag.dest for flag in FLAGS.values()} - suppressed <= vars(args).keys()


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        (["--lr", "2e-5"], "lr", 2e-5),
        (["--rollout-top-k=-1"], "rollout_top_k", -1),
        (["--rollout-stop", "a", "b"], "rollout_stop", ["a", "b"]),
        (["--apply-chat-template-kwargs", '{"enable_thinking": false}'], "apply_chat_template_kwargs", None),
        (["--no-offload-train"], "offload_train", False),
        (["--disable-rewards-normalization"], "rewards_normalization", False),
        (["--persistent-save-interval", "3", "--save", "x"], "save_interval", 3),
        (["--sglang-context-length", "4k"], "sglang_context_length", 4000),
        (["--rollout-sample-hook-path", "a.b"], "rollout_sample_hook_path", ["a.b"]),
        (["--sglang-attention-backend", "some_newer_backend"], "sglang_attention_backend", "some_newer_backend"),
    ],
)
def test_values_have_slimes_types(words, dest, value):
    expected = {"enable_thinking": False} if value is None else value
    assert getattr(parse(*words), dest) == expected


def test_two_parses_do_not_share_lists():
    parse("--rollout-sample-hook-path", "a.b")
    assert parse().rollout_sample_hook_path == []


def test_an_unknown_flag_is_an_error_with_the_nearest_one():
    assert "--rollout-batchsize is not a flag of slime; did you mean --rollout-batch-size?" in message(
        "--rollout-batchsize", "8"
    )
    assert "--num-roll is not a flag" in message("--num-roll", "3"), "prefixes are not accepted, as in slime"
    assert len(message("--foo-x", "1", "--bar-y").splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--loss-type", "mse"], "invalid choice: 'mse'"),
        (["--train-env-vars", "{x"], "not JSON"),
        (["--use-tis", "8"], "'8' belongs to no flag"),
        (["--advantage-estimator", "ppo"], "--advantage-estimator ppo works under slime only"),
        (["--attention-dropout", "0.1"], "--attention-dropout 0.1 works under slime only"),
        (["--save", "x"], "--save without --save-interval"),
        (["--save-interval", "2"], "--save-interval without --save"),
        (["--eval-interval", "2"], "--eval-interval without data"),
        (["--rollout-temperature", "0"], "--rollout-temperature must be above 0"),
        (["--use-kl-loss"], "need a reference: add --ref-load"),
        (["--use-tis", "--use-rollout-logprobs"], "exclude each other"),
        (["--use-dynamic-batch-size"], "needs --max-tokens-per-gpu"),
        (["--over-sampling-batch-size", "3"], "is below --rollout-batch-size 4"),
        (["--global-batch-size", "3", "--num-steps-per-rollout", "2"], "contradicts --num-steps-per-rollout"),
        (["--eval-prompt-data", "a", "b", "c"], "takes pairs"),
        (["--custom-config-path", "/nowhere.yaml"], "no such file"),
        (["--freeze-params-name-list", "a", "--only-train-params-name-list", "b"], "exclude each other"),
    ],
)
def test_wrong_values_and_combinations(words, part):
    assert part in message(*words)


def test_every_refused_flag_is_refused_here_and_accepted_for_slime():
    for name in REFUSED:
        flag = FLAGS[name]
        value = {"int": ["1"], "float": ["1"], "loads": ["{}"]}.get(flag.type, ["x"])
        value = flag.choices.split("|")[:1] if flag.choices else value
        words = [name, *([] if flag.nargs == "0" else value * (3 if flag.nargs == "3" else 1))]
        if flag.nargs == "3":
            words = [name, "1", "1", "1"]
        assert f"{name} works under slime only" in message(*words)
        if name not in ("--partial-rollout",):
            parse(*words, host="slime")


def test_flags_without_meaning_are_listed_once_and_the_others_not():
    args = parse("--colocate", "--tensor-model-parallel-size", "2", "--colocate", "--lr", "1e-5")
    assert args.ignored_flags == ["--colocate", "--tensor-model-parallel-size"]
    assert parse("--colocate", host="slime").ignored_flags == []


def test_the_tables_name_flags_of_the_list_and_do_not_overlap():
    assert HONOURED.keys() | REFUSED.keys() <= FLAGS.keys()
    assert not HONOURED.keys() & REFUSED.keys()
    assert ALLOWED_VALUES.keys() <= HONOURED.keys()


def source() -> str:
    files = [*ROOT.glob("slime_local/*.py"), ROOT / "train.py"]
    return "\n".join(file.read_text() for file in files)


def test_every_honoured_flag_is_read_somewhere():
    text = source()
    shape = {*MODEL_SHAPE, *(name for name, meaning in HONOURED.items() if meaning.startswith("MODEL_ARGS"))}
    checked_only = shape | {"--attention-dropout", "--hidden-dropout", "--optimizer"}
    names = {name: FLAGS[name].dest for name in HONOURED if name not in checked_only}
    unread = [name for name, dest in names.items() if not re.search(rf'args\.{dest}\b|"{dest}"', text)]
    assert unread == []


def test_every_flag_that_is_read_is_honoured_or_refused():
    read = set(re.findall(r"\bargs\.([a-z_0-9]+)", source()))
    stated = {FLAGS[name].dest for name in [*HONOURED, *REFUSED]}
    dests = {flag.dest for flag in FLAGS.values()}
    cluster = {"actor_num_nodes", "actor_num_gpus_per_node"}  # world_size, which plug-ins may read
    assert (read & dests) - stated - cluster == set()


def test_derived_values():
    args = parse("--n-samples-per-prompt", "4", "--num-steps-per-rollout", "2", "--rollout-max-context-len", "100")
    assert args.global_batch_size == 8 and args.over_sampling_batch_size == 4
    assert args.rollout_max_prompt_len == 99 and args.eval_max_context_len == 100
    assert args.eps_clip_high == args.eps_clip and args.grpo_std_normalization
    assert args.eval_function_path == args.rollout_function_path
    assert not parse().grpo_std_normalization, "off for single samples"
    assert parse("--load-debug-rollout-data", "x").debug_train_only
    assert parse("--dump-details", "d").save_debug_rollout_data == "d/rollout_data/{rollout_id}.pt"


def test_evaluation_settings_fall_back_to_the_rollouts(tmp_path):
    one = parse("--eval-prompt-data", "t", "t.jsonl", "--eval-temperature", "0", "--rollout-top-p", "0.9")
    (dataset,) = one.eval_datasets
    assert (dataset.name, dataset.path, dataset.temperature, dataset.top_p) == ("t", "t.jsonl", 0.0, 0.9)
    config = tmp_path / "eval.yaml"
    config.write_text("eval:\n  defaults: {top_p: 0.5}\n  datasets:\n    a: {path: a.jsonl, temperature: 0.1}\n")
    (dataset,) = parse("--eval-config", str(config)).eval_datasets
    assert (dataset.name, dataset.top_p, dataset.temperature) == ("a", 0.5, 0.1)
    config.write_text("eval:\n  datasets:\n    a: {path: a.jsonl, tempersture: 0.1}\n")
    assert "unknown keys tempersture" in message("--eval-config", str(config))


def test_the_custom_config_sets_any_attribute(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("my_setting: {a: 1}\nrollout_temperature: 0.5\n")
    args = parse("--custom-config-path", str(config))
    assert args.my_setting == {"a": 1} and args.rollout_temperature == 0.5
    config.write_text("a: [")
    assert "is not YAML" in message("--custom-config-path", str(config))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("optimizer: sgd", ["--optimizer", "sgd"]),
        ("attention_dropout: 0.1", ["--attention-dropout", "0.1"]),
        ("ref_update_interval: 1", ["--ref-update-interval", "1"]),
        ("keep_old_actor: true", ["--keep-old-actor"]),
        ("partial_rollout: true", ["--partial-rollout"]),
        ("decoupled_lr: 0.1", ["--decoupled-lr", "0.1"]),
        ("rampup_batch_size: [1, 2, 3]", ["--rampup-batch-size", "1", "2", "3"]),
        ("rm_type: math", ["--rm-type", "math"]),
        ("advantage_estimator: ppo", ["--advantage-estimator", "ppo"]),
        ("loss_type: custom_loss", ["--loss-type", "custom_loss"]),
        ("lr_decay_style: foo", ["--lr-decay-style", "foo"]),
        ("kl_loss_type: kk", ["--kl-loss-type", "kk"]),
    ],
)
def test_what_the_command_line_refuses_the_custom_config_cannot_set(tmp_path, line, words):
    config = tmp_path / "c.yaml"
    config.write_text(f"{line}\nmy_setting: 1\n")
    told = message(*words).split(" (choose from")[0]  # Python's versions quote the choices or not
    assert message("--custom-config-path", str(config)).startswith(f"--custom-config-path {config}: {told}")
    if "invalid choice" in told:
        assert told in message("--custom-config-path", str(config), host="slime")
    else:
        assert parse("--custom-config-path", str(config), host="slime").my_setting == 1


def test_the_custom_config_may_say_what_is_so_anyway(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("optimizer: adam\nkeep_old_actor: false\nrm_type: null\nattention_dropout: 0.0\nfp16: false\n")
    assert parse("--custom-config-path", str(config)).optimizer == "adam"
    config.write_text("optimizer: sgd\nkl_loss_type: kk\n")
    assert len(message("--custom-config-path", str(config)).splitlines()) == 2


# ---- Sampling settings, by the engine's rules ----------------------------------------------------------------


def sampling_fault(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        _check_sampling(parse(*words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rollout-top-p", "0"], "--rollout-top-p 0.0 must be in (0, 1]"),
        (["--rollout-stop", ""], "--rollout-stop [''] must be a list of texts, none empty"),
        (["--eval-top-p", "0"], "--eval-top-p 0.0 must be in (0, 1]"),
        (["--eval-top-p", "-1"], "--eval-top-p -1.0 must be in (0, 1]"),
    ],
)
def test_sampling_flags_that_the_engine_would_refuse(words, told):
    assert sampling_fault(*words, "--eval-prompt-data", "a", "b.jsonl", "c", "d.jsonl").splitlines()[0] == told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("temperature: -1", "temperature -1 must be 0 or more, and finite"),
        ("temperature: .nan", "temperature nan must be 0 or more, and finite"),
        ("top_p: 0", "top_p 0 must be in (0, 1]"),
        ("top_p: 1.5", "top_p 1.5 must be in (0, 1]"),
        ("top_k: -2", "top_k -2 must be -1 or more"),
        ("n_samples_per_eval_prompt: 0", "n_samples_per_eval_prompt 0 must be 1 or more"),
        ("n_samples_per_eval_prompt: true", "n_samples_per_eval_prompt True must be 1 or more"),
        ("max_response_len: 0", "max_response_len 0 must be 1 or more"),
        ("min_new_tokens: -3", "min_new_tokens -3 must be 0 or more"),
        ("repetition_penalty: 1.1", "repetition_penalty 1.1 is not supported here"),
        ("no_stop_trim: false", "no_stop_trim False is not supported here"),
        ("skip_special_tokens: x", "skip_special_tokens x must be true or false"),
        ("stop_token_ids: 5", "stop_token_ids 5 must be a list of token ids"),
        ("stop: ['']", "stop [''] must be a list of texts, none empty"),
        ("rm_type: math", "rm_type works under slime only (--host slime): here give --custom-rm-path, or set the"),
    ],
)
def test_an_evaluation_that_the_engine_would_refuse_is_named_before(tmp_path, line, told):
    config = tmp_path / "eval.yaml"
    config.write_text(f"eval:\n  datasets:\n    a: {{path: a.jsonl}}\n    b:\n      path: b.jsonl\n      {line}\n")
    found = sampling_fault("--eval-config", str(config))
    assert found.startswith(f"--eval-config {config}: data set 'b': {told}") and "\n" not in found
    _check_sampling(parse())


def test_what_the_engine_takes_is_not_refused(tmp_path):
    config = tmp_path / "eval.yaml"
    settings = "stop: abc, stop_token_ids: [999999], temperature: 0, top_p: 0.5, repetition_penalty: 1.0, top_k: 5"
    config.write_text(f"eval:\n  datasets:\n    a: {{path: a.jsonl, max_response_len: 7, {settings}}}\n")
    _check_sampling(parse("--eval-config", str(config), "--rollout-stop-token-ids", "151645", "151643"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sglang-server-concurrency", "1025"], "--sglang-server-concurrency 1025: the server on this machine"),
        (["--sglang-router-ip", "::1"], "--sglang-router-ip ::1: the server on this machine has an IPv4 address"),
    ],
)
def test_what_the_server_of_this_machine_cannot_do(words, told):
    with pytest.raises(UsageError) as caught:
        _check_server(parse(*words))
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    _check_server(parse("--sglang-server-concurrency", "1024", "--sglang-router-ip", "127.0.0.1"))


def test_a_check_loads_no_torch():
    code = "import sys, slime_local.checks; print({'torch', 'transformers', 'aiohttp'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"

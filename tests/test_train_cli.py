"""train.py as a user runs it: checks and their exit codes, SFT and GRPO on a tiny model, resume after a kill."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import free_ports
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = '''
import random

async def reward(args, sample):
    """Reward the choice of token ids, so that groups differ."""
    return float(sum(sample.tokens[-sample.response_length:]) % 5)

def log(rollout_id, args, samples, extra, seconds):
    extra["rollout/from_plugin"] = rollout_id

def check_args(args):
    if getattr(args, "forbidden", None):
        raise ValueError("forbidden is set")
'''
DIALOGUE = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "Say {i}."},
    {"role": "assistant", "content": "{i}, as you wish."},
]
SFT = (
    "--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss "
    "--calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only --loss-mask-type qwen3 "
    "--input-key prompt --rollout-batch-size 2 --global-batch-size 2 --lr 1e-3 --lr-decay-style cosine"
).split()
GRPO = (
    "--custom-rm-path plugin.reward --input-key q --apply-chat-template --rollout-batch-size 2 "
    "--n-samples-per-prompt 2 --global-batch-size 2 --rollout-max-response-len 4 --lr 1e-3"
).split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with rows and a plug-in."""
    sft = [[{**message, "content": message["content"].format(i=i)} for message in DIALOGUE] for i in range(6)]
    write_rows(tmp_path / "sft.jsonl", [{"prompt": messages} for messages in sft])
    write_rows(tmp_path / "rl.jsonl", [{"q": f"Say {i}.", "metadata": {"i": i}} for i in range(6)])
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, words)]


def environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def train(folder: Path, *words: object, timeout: float = 240) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": timeout, "cwd": folder, "stdin": subprocess.DEVNULL}
    return subprocess.run(command(*words), env=environment(folder), check=False, **options)


def train_well(folder: Path, *words: object) -> str:
    result = train(folder, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def errors_of(folder: Path, *words: object) -> str:
    """What a wrong command says. It must say so soon, in lines of its own, and load nothing."""
    result = train(folder, "--host", "local", *words, timeout=60)
    assert result.returncode == 2, result.stdout + result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())
    return result.stderr


def metrics_of(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


# ---- Checks --------------------------------------------------------------------------------------------------


def sft_command(model: Path, *words: object) -> list[object]:
    return [*SFT, "--hf-checkpoint", model, "--prompt-data", "sft.jsonl", "--num-rollout", 2, *words]


def grpo_command(model: Path, *words: object) -> list[object]:
    return [*GRPO, "--hf-checkpoint", model, "--prompt-data", "rl.jsonl", "--num-rollout", 2, *words]


def test_a_right_command_is_checked_and_not_run(folder, tiny_model_dir):
    save = ["--save", folder / "out", "--save-interval", 1]
    result = train(folder, "--check-only", "--host", "local", *sft_command(tiny_model_dir, *save, "--colocate"))
    assert result.returncode == 0, result.stderr
    assert "ignored on one machine: --colocate" in result.stdout
    assert "2 rollouts of 2 x 1 samples, 1 optimizer steps each" in result.stdout
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rollout-batchsize", "2"], "did you mean --rollout-batch-size?"),
        (["--host", "mars"], "choose auto, local or slime"),
        (["--prompt-data", "none.jsonl"], "no data file none.jsonl"),
        (["--input-key", "question"], "line 1 has no 'question'"),
        (["--global-batch-size", "3"], "not a multiple of --global-batch-size 3"),
        (["--loss-type", "policy_loss"], "add --loss-type sft_loss"),
        (["--n-samples-per-prompt", "2"], "--n-samples-per-prompt is 2, not 1"),
        (["--load", "runs/iter_0000009"], "give --load runs --ckpt-step 9"),
        (["--ref-load", "runs/iter_0000009"], "give --ref-load runs --ref-ckpt-step 9"),
        (["--save", "out"], "--save without --save-interval"),
        (["--hf-checkpoint", "nowhere"], "no model folder at nowhere"),
        (["--hf-checkpoint", "."], "convert_torch_dist_to_hf.py --input-dir . --output-dir OUT"),
        (["--num-layers", "36"], "--num-layers 36 does not fit"),
        (["--custom-rollout-log-function-path", "nothere.log"], "no module nothere; add its folder to PYTHONPATH"),
        (["--custom-rollout-log-function-path", "plugin.nolog"], "has no function nolog"),
        (["--data-source-path", "slime.agent.Source"], "slime_local has no equivalent"),
        (["--save-hf", "out/hf_{step}"], "--save-hf out/hf_{step}: {rollout_id} is all that can be filled in"),
        (["--save-debug-rollout-data", "{}.pt"], "{rollout_id} is all that can be filled in"),
        (["--save", "out/grpo", "--save-interval", "1", "--save-hf", "out"], "--save-hf out would replace --save"),
        (["--save-hf", "."], "--save-hf . would replace 'plugin.py' there"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(folder, tiny_model_dir, words, part):
    said = errors_of(folder, *sft_command(tiny_model_dir), *words)
    assert part in said and len(said.splitlines()) == 1


def test_several_problems_are_several_lines(folder, tiny_model_dir):
    words = ["--input-key", "question", "--global-batch-size", "3"]
    assert len(errors_of(folder, *sft_command(tiny_model_dir), *words).splitlines()) == 2


def test_bad_rows_are_named_by_their_line(folder, tiny_model_dir):
    (folder / "sft.jsonl").write_text('{"prompt": []}\n{"prompt": \n')
    assert "sft.jsonl line 2 is not JSON" in errors_of(folder, *sft_command(tiny_model_dir))
    write_rows(folder / "sft.jsonl", [{"prompt": DIALOGUE}, {"prompt": DIALOGUE[:2]}])
    assert "line 2: no assistant turn to train" in errors_of(folder, *sft_command(tiny_model_dir))
    write_rows(folder / "sft.jsonl", [{"prompt": DIALOGUE, "tools": None}])
    assert "line 1: tools is None" in errors_of(folder, *sft_command(tiny_model_dir))
    (folder / "sft.jsonl").write_text("")
    assert "has no rows" in errors_of(folder, *sft_command(tiny_model_dir))


def test_a_plug_in_that_fails_to_import_says_why(folder, tiny_model_dir):
    (folder / "broken.py").write_text("import missing_library\n")
    said = errors_of(folder, *grpo_command(tiny_model_dir, "--custom-generate-function-path", "broken.generate"))
    assert "broken.generate cannot be imported: ModuleNotFoundError: No module named 'missing_library'" in said


def test_a_plug_in_may_check_the_args(folder, tiny_model_dir):
    (folder / "c.yaml").write_text("forbidden: true\n")
    assert "plugin: forbidden is set" in errors_of(
        folder, *grpo_command(tiny_model_dir, "--custom-config-path", "c.yaml")
    )


def test_a_key_that_is_nearly_an_argument_is_named(folder, tiny_model_dir):
    (folder / "c.yaml").write_text("rollout_temprature: 0.5\nmy_own_key: 1\n")
    words = grpo_command(tiny_model_dir, "--custom-config-path", "c.yaml")
    done = train(folder, "--host", "local", "--check-only", *words)
    assert done.returncode == 0 and "rollout_temprature is no argument of slime: did you mean" in done.stderr
    assert "my_own_key" not in done.stderr


def test_a_busy_port_and_too_little_memory(folder, tiny_model_dir, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1" in errors_of(
            folder, *grpo_command(tiny_model_dir, "--sglang-router-port", port)
        )
    from slime_local import checks
    from slime_local.errors import UsageError
    from slime_local.flags import parse_args

    args = parse_args([str(word) for word in grpo_command(tiny_model_dir)])
    assert checks.memory_needed(args) < 1.2e9
    monkeypatch.setattr(checks, "memory_free", lambda: 1_000_000_000)
    with pytest.raises(UsageError, match=r"needs about 1\.1 GB, 1\.0 GB are free"):
        checks.check(args, "local")


def test_frozen_layers_need_less_memory(tiny_model_dir):
    from slime_local.checks import memory_needed
    from slime_local.flags import parse_args

    words = [str(word) for word in grpo_command(tiny_model_dir)]
    everything = memory_needed(parse_args(words))
    frozen = memory_needed(parse_args([*words, "--freeze-params-name-list", "embedding"]))
    assert everything - frozen == 12 * 64 * 49152


def test_the_hf_names_get_the_models_own_names(tiny_model_dir):
    from slime_local.checks import megatron_name, parameter_counts
    from slime_local.model import load_model

    wanted = {name for name, _ in load_model(tiny_model_dir).named_parameters()}
    linears = {name for name in wanted if "norm" not in name}
    mapped = {megatron_name(name) for name, _ in parameter_counts(tiny_model_dir)}
    assert linears <= mapped


# ---- slime ---------------------------------------------------------------------------------------------------


def test_where_slime_is_installed_its_own_train_py_gets_the_flags(folder, tiny_model_dir):
    (folder / "checkout/slime/rollout").mkdir(parents=True)
    (folder / "checkout/slime/__init__.py").touch()
    (folder / "checkout/train.py").write_text("import sys; print('slime got', sys.argv[1:])\n")
    env = environment(folder)
    env["PYTHONPATH"] = f"{folder / 'checkout'}{os.pathsep}{env['PYTHONPATH']}"
    words = [str(word) for word in sft_command(tiny_model_dir, "--use-distributed-optimizer")]
    options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "check": False}
    result = subprocess.run(command("--host", "auto", *words), **options)
    assert result.returncode == 0, result.stderr
    assert f"slime got {words}" in result.stdout and "ignored" not in result.stdout
    given = ["--custom-rm-path", "slime.rollout.on_policy_distillation.reward_func", "--rollout-top-p", "0.9"]
    result = subprocess.run(command(*words, *given), **options)
    assert result.returncode == 0, f"slime has both, and we do not: {result.stderr}"
    result = subprocess.run(command(*words, "--no-such-flag"), **options)
    assert result.returncode == 2 and "slime got" not in result.stdout
    result = train(folder, "--host", "slime", *words)
    assert result.returncode == 2 and "slime is not installed" in result.stderr


# ---- Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_address(folder: Path):
    """The address of a Ray head that lives for one test."""
    pytest.importorskip("ray", reason="ray is not installed (pip install '.[ray]')")
    ports = free_ports(3)
    temporary = f"/tmp/ray-{os.getpid()}"  # short, because Ray's socket paths are limited to 107 bytes
    words = ["start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={temporary}"]
    words += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    log = (folder / "ray.log").open("w")
    process = subprocess.Popen(ray(*words), env=environment(folder), stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_until_it_answers(f"{address}/api/version", process, seconds=90)
        yield address
    finally:
        end_group(process)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def end_group(process: subprocess.Popen) -> None:
    """End a process and what it started: asked first, then without asking."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ray(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


def wait_until_it_answers(url: str, process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


def test_ray_submits_it_as_a_job(folder, tiny_model_dir, ray_address):
    words = sft_command(tiny_model_dir, "--prompt-data", folder / "sft.jsonl")
    job = [*ray("job", "submit", "--address", ray_address, "--"), *command("--host", "local", *words)]
    result = subprocess.run(job, env=environment(folder), capture_output=True, text=True, timeout=200, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "rollout 2/2: loss" in said and "succeeded" in said


# ---- Training ------------------------------------------------------------------------------------------------


def test_sft_learns_and_saves_a_model_that_others_read(folder, tiny_model_dir):
    save = ["--save", "out", "--save-interval", 5, "--save-hf", "hf_{rollout_id}"]
    said = train_well(folder, *sft_command(tiny_model_dir, *save, "--num-epoch", 1, "--num-rollout", 12))
    assert "rollout 12/12: loss" in said and "peak memory" in said and "/generate" not in said
    losses = metrics_of(folder / "out", "train/loss")
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "hf_11")
    AutoTokenizer.from_pretrained(folder / "hf_11")
    assert (folder / "out/latest_checkpointed_iteration.txt").read_text() == "11"
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    again = errors_of(folder, *sft_command(tiny_model_dir, *save))
    assert "already holds iteration 11: add --load out" in again


def test_a_run_that_goes_on_with_other_batches_keeps_its_metrics(folder, tiny_model_dir):
    run = sft_command(tiny_model_dir, "--save", "run", "--load", "run", "--save-interval", 1)
    train_well(folder, *run, "--global-batch-size", 1)
    train_well(folder, *run, "--num-rollout", 3, "--override-opt-param-scheduler")
    assert metrics_of(folder / "run", "train/rollout") == [0, 0, 1, 1, 2]


def test_epochs_count_rollouts(folder, tiny_model_dir):
    words = [word for word in sft_command(tiny_model_dir) if word not in ("--num-rollout", 2)]
    said = train_well(folder, *words, "--num-epoch", 1)
    assert "rollout 3/3" in said


def test_grpo_generates_trains_evaluates_and_records(folder, tiny_model_dir):
    said = train_well(
        folder,
        *grpo_command(tiny_model_dir, "--use-kl-loss", "--kl-loss-coef", 0.1, "--ref-load", tiny_model_dir),
        *("--eval-interval", 2, "--eval-prompt-data", "held", "rl.jsonl@[4:6]", "--eval-temperature", 0),
        *("--custom-rollout-log-function-path", "plugin.log", "--save", "out", "--save-interval", 2),
        *("--save-debug-rollout-data", "debug/{rollout_id}.pt", "--use-tensorboard", "--tensorboard-dir", "tb"),
    )
    assert "eval 0: held" in said and "eval 1: held" in said and "rollout 2/2: reward" in said
    assert len(metrics_of(folder / "out", "train/loss")) == 4, "two optimizer steps in each rollout"
    assert max(metrics_of(folder / "out", "train/train_rollout_logprob_abs_diff")) < 0.05
    assert metrics_of(folder / "out", "rollout/from_plugin") == [0, 1]
    assert {path.name for path in (folder / "debug").iterdir()} == {"0.pt", "1.pt", "eval_0.pt", "eval_1.pt"}
    assert list((folder / "tb").iterdir())
    samples = torch.load(folder / "debug/1.pt", weights_only=True)["samples"]
    assert [sample["weight_versions"] for sample in samples] == [["1"]] * 4, "new weights after each training"
    debug = ["--load-debug-rollout-data", "debug/{rollout_id}.pt"]
    said = train_well(folder, *grpo_command(tiny_model_dir, *debug))
    assert "rollout 2/2" in said and "/generate" not in said


def test_an_sft_run_that_is_killed_continues_exactly(folder, tiny_model_dir):
    check_resume(folder, sft_command(tiny_model_dir, "--rollout-shuffle"))


def test_a_grpo_run_that_is_killed_continues_exactly(folder, tiny_model_dir):
    # One request at a time: with more, which requests share a forward pass depends on the clock, and so do last bits.
    check_resume(folder, grpo_command(tiny_model_dir, "--rollout-shuffle", "--sglang-server-concurrency", 1))


def check_resume(folder: Path, words: list[object]) -> None:
    """Train 6 rollouts at one go, and again with a kill after the second checkpoint; compare every bit."""
    words = [*words, "--num-rollout", 6, "--save-interval", 2]
    train_well(folder, *words, "--save", "whole")
    killed = [*words, "--save", "killed", "--load", "killed"]
    kill_after_iteration(folder, killed, 1)
    said = train_well(folder, *killed)
    assert "continuing at rollout" in said
    whole, again = (load_file(folder / name / "iter_0000005/model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    losses = metrics_of(folder / "killed", "train/loss")
    assert metrics_of(folder / "whole", "train/loss")[-2:] == losses[-2:]


def kill_after_iteration(folder: Path, words: list[object], iteration: int) -> None:
    options = {"cwd": folder, "env": environment(folder), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    tracker = folder / "killed/latest_checkpointed_iteration.txt"
    process = subprocess.Popen(command(*words), **options)
    try:
        while not (tracker.is_file() and tracker.read_text() == str(iteration)):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert int(tracker.read_text()) < 5


BROKEN_PLUGIN = """
import generate_with_tau

async def generate(args, sample, sampling_params, evaluation=False):
    if sample.index % 4 == 3:
        return generate_with_tau._remove(args, sample, {"end_reason": "user_failed"})
    sample.tokens, sample.response_length = [1, 2, 3], 1
    sample.loss_mask, sample.rollout_log_probs = [1], [-1.0]
    sample.reward, sample.status = 1.0, type(sample).Status.COMPLETED
    return sample
"""


@pytest.mark.parametrize("passrate", [[], ["--log-passrate"]])
def test_episodes_that_broke_are_no_failures_in_the_evaluation_of_a_run(folder, tiny_model_dir, passrate):
    (folder / "breaks.py").write_text(BROKEN_PLUGIN)
    words = [*GRPO, "--hf-checkpoint", tiny_model_dir, "--prompt-data", "rl.jsonl", "--num-rollout", 0]
    words += ["--custom-generate-function-path", "breaks.generate", "--eval-interval", 1, "--debug-rollout-only"]
    words += ["--eval-prompt-data", "test", "rl.jsonl", "--n-samples-per-eval-prompt", 2, *passrate]
    words += ["--custom-eval-rollout-log-function-path", "tau2_reward_shaping.log_eval_rollout"]
    done = train(folder, "--host", "local", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eval 0: test 1.000" in done.stdout and "episodes broken and left out (user_failed" in done.stderr

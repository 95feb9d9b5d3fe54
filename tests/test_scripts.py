"""run_sft.sh, run_grpo.sh and run_eval.sh: their commands by slime's rules, and the same arrays on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, ROOT, TINY_ARGS, free_ports

from slime_local.flags import parse_args
from tau2_domains import load_split_ids


def run(script, *args, timeout=240, **settings):
    environment = {key: value for key, value in os.environ.items() if key not in ("HOST", "MODEL", "PROMPT", "PORT")}
    command = ["bash", str(EXAMPLE / script), *args]
    environment |= {"PYTHON": sys.executable, **{key: str(value) for key, value in settings.items()}}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
    )


def printed(script, **settings):
    first, *arguments = run(script, PRINT=1, **settings).stdout.splitlines()
    assert first == "python3 train.py"
    return arguments


def test_the_sft_command_trains_as_meant():
    args = parse_args(printed("run_sft.sh"), "slime")
    assert (args.num_rollout, args.rollout_batch_size, args.n_samples_per_prompt) == (49, 8, 1)
    assert args.global_batch_size == 8
    assert (args.lr, args.lr_decay_style, args.lr_warmup_fraction, args.weight_decay) == (2e-5, "cosine", 0.1, 0.01)
    assert args.loss_type == "sft_loss" and args.calculate_per_token_loss and args.debug_train_only
    assert args.loss_mask_type == "qwen3" and args.save_interval and "{rollout_id}" in args.save_hf
    assert args.load == args.save and args.num_gpus_per_node == 2 and not args.colocate


def test_the_grpo_command_starts_from_sft_and_evaluates_outside_test():
    args = parse_args(printed("run_grpo.sh", SFT_DIR="/runs/sft"), "slime")
    assert (args.num_rollout, args.rollout_batch_size, args.n_samples_per_prompt) == (74, 8, 4)
    assert args.global_batch_size == 32 and args.rollout_temperature == 0.7 and args.lr == 1e-6
    assert args.ref_load == "/runs/sft" and args.load == args.save != args.ref_load
    assert args.rollout_max_response_len == 4096 and args.sglang_mem_fraction_static == 0.7
    assert args.eval_interval and "test" not in str(args.eval_datasets)


@pytest.mark.parametrize("script", ["run_sft.sh", "run_grpo.sh"])
def test_the_check_names_what_is_missing(script, tmp_path):
    (tmp_path / "telecom_pool_tasks.jsonl").touch()
    (tmp_path / "teacher_traces.jsonl").write_text('{"prompt": []}\n')
    done = run(script, CHECK=1, HF_DIR=tmp_path / "nothing", DATA_DIR=tmp_path)
    assert done.returncode == 2 and str(tmp_path / "nothing") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("setting", ["CHECK", "HOST"])
def test_in_a_slime_checkout_nothing_is_handed_to_its_train_py(setting, tmp_path):
    """It would ignore --check-only and --host, and train."""
    shutil.copytree(EXAMPLE, tmp_path / "examples/tau2-bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts/models", tmp_path / "scripts/models")
    (tmp_path / "train.py").write_text("raise SystemExit('trains')")
    value = {"CHECK": 1, "HOST": "local"}[setting]
    done = run(tmp_path / "examples/tau2-bench/run_grpo.sh", **{setting: value}, HF_DIR=tmp_path, SFT_DIR=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"CHECK=1 and HOST=local need the train.py of this repository, and {tmp_path}/train.py" in done.stderr


@pytest.mark.parametrize("source", ["teacher", "hub"])
def test_traces_of_other_settings_are_not_trained_on(source, tmp_path, run_script):
    """Made by the commands themselves, then met by run_sft.sh with another prompt, another domain, and their own."""
    traces, flags = tmp_path / "teacher_traces.jsonl", ["--local_dir", tmp_path, "--prompt", "short"]
    if source == "teacher":
        succeed(run_script("examples/tau-bench/tau2_mock.py", "--local_dir", tmp_path, "--splits", "train"))
        succeed(run_script("examples/tau-bench/teacher_traces.py", *flags, "--num-traces", 1))
    else:
        said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Please restart your phone."}]
        task_id = load_split_ids("telecom")["train"][0]
        (tmp_path / "v4.jsonl").write_text(json.dumps({"task_id": f"[telecom]{task_id}", "prompt": said}) + "\n")
        succeed(run_script("examples/tau-bench/teacher_traces.py", *flags, "--from-hub-file", tmp_path / "v4.jsonl"))
    given = {"HOST": "local", "HF_DIR": tmp_path, "DATA_DIR": tmp_path, "TRACES": f"{traces}@[0:1]"}
    for settings, named in (
        ({}, "of the prompt 'short', not 'official'"),
        ({"PROMPT": "short", "DOMAIN": "retail"}, "of the domain 'telecom', not 'retail'"),
    ):
        done = run("run_sft.sh", **given, **settings)
        assert done.returncode == 2 and named in done.stderr and f"remove {traces} or set TRACES" in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run("run_sft.sh", CHECK=1, PROMPT="short", **given)
    assert done.returncode == 2 and "config.json" in done.stderr, "the traces were no matter"


def test_grpo_on_slime_wants_its_start_before_the_engines_load(tmp_path):
    (tmp_path / "ray").write_text("#!/bin/sh\n")
    (tmp_path / "ray").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("run_grpo.sh", SFT_DIR=tmp_path / "sft", RL_DIR=tmp_path / "rl", PATH=path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'sft'} is not there: run run_sft.sh")


def test_a_missing_folder_is_told_before_tasks_are_written_here(tmp_path):
    local = {"HOST": "local", "DATA_DIR": tmp_path / "data", "SFT_DIR": tmp_path / "sft", "RL_DIR": tmp_path / "rl"}
    for script in ("run_sft.sh", "run_grpo.sh"):
        done = run(script, CHECK=1, HF_DIR=tmp_path / "m", **local)
        assert done.returncode == 2 and done.stderr.startswith(f"error: no model folder at {tmp_path / 'm'} (from ")
    done = run("run_grpo.sh", CHECK=1, HF_DIR=tmp_path, **local)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'sft'} is not there: run run_sft.sh")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["run_sft.sh", "run_grpo.sh"])
def test_flags_of_a_script_are_the_last_of_train_py(script, tmp_path):
    assert run(script, "--lr", "0.5", PRINT=1).stdout.splitlines()[-2:] == ["--lr", "0.5"]
    (tmp_path / "telecom_pool_tasks.jsonl").touch()
    (tmp_path / "teacher_traces.jsonl").write_text('{"prompt": []}\n')
    done = run(script, "--no-such-flag", CHECK=1, HF_DIR=tmp_path, DATA_DIR=tmp_path)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr


def test_what_is_made_of_a_model_lies_beside_it():
    sft, grpo = (parse_args(printed(s, HF_DIR="/m/M", HOST="local"), "local") for s in ("run_sft.sh", "run_grpo.sh"))
    assert sft.save == grpo.ref_load == "/m/M_sft_telecom" and grpo.save == "/m/M_rl_telecom"
    assert str(sft.prompt_data) == "/m/tau2-telecom/teacher_traces.jsonl"
    retail = parse_args(printed("run_sft.sh", HF_DIR="/m/M", HOST="local", DOMAIN="retail"), "local")
    assert str(retail.prompt_data) == "/m/tau2-retail/retail_teacher_traces.jsonl"
    both = parse_args(printed("run_sft.sh", TRACES="/t.jsonl", HOST="local", DOMAIN="retail"), "local")
    assert str(both.prompt_data) == "/t.jsonl"


def test_an_evaluation_is_printed_and_has_no_check(tmp_path):
    done = run("run_eval.sh", "--num-tasks", "3", PRINT=1, CHECKPOINT=tmp_path / "iter_0000003", OUTPUT=tmp_path / "o")
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["--num-tasks", "3"] and not list(tmp_path.iterdir())
    done = run("run_eval.sh", CHECK=1, CHECKPOINT=tmp_path)
    assert done.returncode == 2 and "CHECK=1 belongs to" in done.stderr


def test_an_evaluation_needs_a_checkpoint():
    done = run("run_eval.sh")
    assert done.returncode != 0 and "CHECKPOINT" in done.stderr


CONVERTER = """
import argparse, shutil
parser = argparse.ArgumentParser()
for flag in ("--input-dir", "--output-dir", "--origin-hf-dir"):
    parser.add_argument(flag, required=True)
parser.add_argument("--force", action="store_true")
args = parser.parse_args()
assert args.input_dir.endswith("iter_0000073"), args
shutil.copytree(args.origin_hf_dir, args.output_dir, dirs_exist_ok=args.force)
"""


def test_an_iteration_folder_is_converted_first(tiny_model_dir, tmp_path):
    """slime's converter needs Megatron: in its place, one that takes the same flags."""
    (tmp_path / "slime" / "tools").mkdir(parents=True)
    (tmp_path / "slime" / "tools" / "convert_torch_dist_to_hf.py").write_text(CONVERTER)
    checkpoint, output = tmp_path / "rl" / "iter_0000073", tmp_path / "eval.json"
    checkpoint.mkdir(parents=True)
    (tmp_path / "rl" / "iter_0000073_hf.part").mkdir()  # what an interrupted conversion left
    settings = {"CHECKPOINT": checkpoint, "HF_DIR": tiny_model_dir, "SLIME_DIR": tmp_path / "slime", "OUTPUT": output}
    settings |= {"CUSTOMER": "scripted", "PROMPT": "short", "PORT": free_ports(1)[0]}
    succeed(run("run_eval.sh", "--num-tasks", "1", "--max-turn-tokens", "16", **settings))
    assert json.loads(output.read_text())["checkpoint"] == f"{checkpoint}_hf"


def test_the_same_arrays_run_on_this_machine(tiny_model_dir, tmp_path):
    (tmp_path / "tiny.sh").write_text(f"MODEL_ARGS=({' '.join(TINY_ARGS)})\n")
    model = os.path.relpath(tmp_path / "tiny", ROOT / "scripts" / "models")
    folders = {"DATA_DIR": tmp_path / "data", "SFT_DIR": tmp_path / "sft", "RL_DIR": tmp_path / "rl"}
    local = {"HOST": "local", "MODEL": model, "HF_DIR": tiny_model_dir, "NUM_ROLLOUT": 1, **folders}
    succeed(run("run_sft.sh", PROMPT="short", **local))
    grpo = succeed(run("run_grpo.sh", CONFIG=EXAMPLE / "local.yaml", ROLLOUT_BATCH=1, CONTEXT_LEN=1024, **local))
    assert "--ref-load" in grpo  # what it starts with
    log = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/pool" in name for row in log for name in row)
    succeed(run("run_grpo.sh", CONFIG=EXAMPLE / "local.yaml", ROLLOUT_BATCH=1, CONTEXT_LEN=1024, **local))  # resumes
    checkpoint, output = tmp_path / "rl" / "hf_0", tmp_path / "eval.json"
    settings = {"HOST": "local", "CHECKPOINT": checkpoint, "OUTPUT": output, "CUSTOMER": "scripted", "PROMPT": "short"}
    succeed(run("run_eval.sh", "--num-tasks", "2", "--max-turn-tokens", "32", PORT=free_ports(1)[0], **settings))
    assert json.loads(output.read_text())["total_tasks"] == 2


def succeed(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_folder_of_other_settings_is_refused(tmp_path):
    rest = "SFT_ROLLOUTS=70 RFT_ROUNDS=0 RFT_ROLLOUTS=40 GRPO_ROLLOUTS=6 GRPO_BATCH=6 EVAL_TASKS=40 CONTEXT=1664"
    rest += " GRPO_LR=5e-5 TRIALS=4"
    (tmp_path / "made_with").write_text(f"SEED=1 MOOD=plain KL=0.1 {rest}\n")
    done = run("run_local.sh", RUN_DIR=tmp_path)
    assert done.returncode == 2
    differ = "SEED=1, now SEED=1234; KL=0.1, now KL=0"
    assert done.stderr == f"error: {tmp_path} holds a run with {differ}; choose another RUN_DIR\n"
    assert run("run_local.sh", QUICK="yes").stderr.startswith("error: QUICK=yes: give 1, or 0")


SLEEPS = """#!/bin/sh
echo $$ >"$PID_FILE"
exec sleep 60
"""
LAUNCH = "source examples/tau-bench/launch.sh; launch --lr 1"
TIMED = """
set -euo pipefail
bash() { :; }  # no set-up
source examples/tau-bench/run_local.sh
timed step "$SLEEPS"
echo went on
"""


@pytest.mark.parametrize("settings", [LAUNCH, LAUNCH + " # CHECK=1", "examples/tau-bench/run_eval.sh", TIMED])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_ends_with_its_script(settings, number, tmp_path):
    """TERM comes to the shell alone; INT, from a terminal, to both."""
    fake, pid_file = tmp_path / "sleeps", tmp_path / "pid"
    fake.write_text(SLEEPS)
    fake.chmod(0o755)
    environment = os.environ | {"HOST": "local", "PYTHON": str(fake), "SLEEPS": str(fake), "PID_FILE": str(pid_file)}
    environment |= {"CHECKPOINT": "x", "RUN_DIR": str(tmp_path), "CHECK": str(int("CHECK=1" in settings))}
    command = ["bash", settings] if settings.endswith("run_eval.sh") else ["bash", "-c", settings]
    known = {"env": environment, "cwd": ROOT, "start_new_session": True, "stdout": subprocess.PIPE, "text": True}
    # What runs the tests may ignore INT, as what a shell puts in the background does, and children inherit that.
    shell = subprocess.Popen(command, **known, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    (os.kill if number == signal.SIGTERM else os.killpg)(shell.pid, number)
    assert shell.communicate(timeout=20)[0] == "" and shell.returncode in (-number, 128 + number)
    wait_until(lambda: not Path(f"/proc/{pid_file.read_text().strip()}").exists())


def test_a_refused_start_of_run_local_may_be_corrected(tmp_path):
    """CONTEXT=1 is refused by the first stage: the folder is not bound to it."""
    refuses = tmp_path / "bin" / "python"
    refuses.parent.mkdir()
    refuses.write_text("#!/bin/sh\ncase $* in *evaluate_tau2.py*) exit 2;; esac\n")
    refuses.chmod(0o755)
    done = run("run_local.sh", RUN_DIR=tmp_path / "run", TAU2_VENV=tmp_path, BASH_ENV=no_set_up(tmp_path))
    assert done.returncode == 2 and "evaluation of base" in done.stdout, done.stderr
    assert (tmp_path / "run").is_dir() and not (tmp_path / "run/made_with").exists()


def no_set_up(folder):
    """What bash reads first: scripts/setup_env.sh is not run."""
    (folder / "env.sh").write_text("bash() { :; }\n")
    return folder / "env.sh"


def test_the_code_of_a_timed_command_ends_run_local(tmp_path):
    for script, code, said in (("exit 7", 7, ""), ("exit 0", 0, "went on\n")):
        settings = {"SLEEPS": "sh", "RUN_DIR": str(tmp_path)}
        command = TIMED.replace('"$SLEEPS"', f"sh -c '{script}'")
        done = subprocess.run(
            ["bash", "-c", command], env=os.environ | settings, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stdout) == (code, said), done.stderr


def wait_until(true, seconds=20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def test_the_hint_of_torch_install_is_for_those_who_did_not_set_it():
    install = "root=.; step() { echo $*; }; pip_install() { :; }; lock_fits() { true; }; command() { false; }"
    install += "; torch_install=x; eval \"$(sed -n '/^install_all()/,/^}/p' scripts/setup_env.sh)\"; install_all"
    for given, hinted in (("", True), ("torch", False)):
        environment = os.environ | {"TORCH_INSTALL": given}
        done = subprocess.run(["bash", "-ec", install], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and ("says how to avoid them" in done.stdout) is hinted, done.stderr

"""The four stages through their real entry points, with a tiny random model: what run_local.sh does, in little."""

import json
import os
import subprocess
import sys

import pytest
from conftest import EXAMPLE, ROOT, free_ports

SFT = (
    "--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-mask-type qwen3 --loss-type sft_loss "
    "--calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only --input-key prompt "
    "--tool-key tools --num-rollout 2 --rollout-batch-size 2 --n-samples-per-prompt 1 --global-batch-size 2 --lr 1e-3"
).split()
GRPO = (
    "--custom-generate-function-path generate_with_tau.generate --input-key index --num-rollout 2 "
    "--custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process "
    "--custom-rollout-log-function-path tau2_reward_shaping.log_rollout --rollout-batch-size 2 "
    "--dynamic-sampling-filter-path tau2_reward_shaping.check_shaped_reward_spread_with_fallback "
    "--rollout-all-samples-process-path tau2_reward_shaping.process_all_samples --over-sampling-batch-size 3 "
    "--data-source-path tau2_curriculum.CurriculumDataSource "
    "--n-samples-per-prompt 2 --global-batch-size 4 --rollout-max-response-len 400 --rollout-max-context-len 2048 "
    "--rollout-temperature 1.0 --use-kl-loss --kl-loss-coef 0.01 --lr 1e-4 --sglang-router-port 0"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a script in an empty folder, as a user would; returns its output."""
    folder = tmp_path_factory.mktemp("pipeline")

    def call(script, *args, code=0):
        command = [sys.executable, str(script), *map(str, args)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    call.folder = folder
    return call


def test_the_four_stages(run, tiny_model_dir):
    run(EXAMPLE / "tau2_mock.py", "--local_dir", "data")
    run(EXAMPLE / "teacher_traces.py", "--local_dir", "data", "--prompt", "short", "--num-traces", "4")

    model = ["--hf-checkpoint", tiny_model_dir, "--seed", "7"]
    keep = ["--load", "sft", "--save", "sft", "--save-interval", "1", "--save-hf", "sft/hf"]
    run(ROOT / "train.py", "--host", "local", *model, *SFT, *keep, "--prompt-data", "data/teacher_traces.jsonl")
    losses = [row["train/loss"] for row in log(run.folder / "sft") if "train/loss" in row]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)

    config = EXAMPLE / "local.yaml"
    model = ["--hf-checkpoint", "sft/hf", "--ref-load", "sft/hf", "--seed", "7", "--custom-config-path", config]
    keep = ["--load", "grpo", "--save", "grpo", "--save-interval", "1", "--save-hf", "grpo/hf"]
    rollouts = ["--save-debug-rollout-data", "rollout_{rollout_id}.pt"]
    tasks = ["--prompt-data", "data/telecom_train_tasks.jsonl"]
    run(ROOT / "train.py", "--host", "local", *model, *GRPO, *keep, *rollouts, *tasks)
    logged = {name: value for row in log(run.folder / "grpo") for name, value in row.items()}
    assert logged["train/train_rollout_logprob_abs_diff"] < 1e-3
    assert any("stop/" in name for name in logged) and logged["rollout/groups/all"] >= 2
    assert logged["rollout/curriculum/untried"] + logged["rollout/curriculum/open"] == 74
    check_samples(run.folder / "rollout_0.pt")

    output = evaluate(run, "grpo", "grpo/hf")
    assert "floor" in output
    report = run(EXAMPLE / "summarize.py", "--run-dir", ".")
    assert "do not compare with published" in report
    summary = json.loads((run.folder / "summary.json").read_text())
    assert set(summary["stages"]) == {"grpo"} and 0 <= summary["floor"] <= 1
    row = summary["stages"]["grpo"]
    keys = "checkpoint domain task_split total_tasks successes pass_at_1 avg_reward avg_steps avg_partial_score"
    assert set(keys.split()) <= set(row) and row["total_tasks"] == 2
    assert len(json.loads((run.folder / "eval_grpo.json").read_text())["results"]) == 2
    logs = ["sft/metrics.jsonl", "grpo/metrics.jsonl"]
    run(EXAMPLE / "evaluate_tau2.py", "report", "eval_grpo.json", "--metrics-log", *logs, "--output", "report.html")
    assert "Training" in (run.folder / "report.html").read_text()


def evaluate(run, stage, checkpoint):
    flags = ["--num-tasks", "2", "--prompt", "short", "--max-turn-tokens", "32", "--sglang-port", *free_ports(1)]
    return run(EXAMPLE / "evaluate_tau2.py", "--checkpoint", checkpoint, "--output-path", f"eval_{stage}.json", *flags)


def check_samples(path):
    """Every sample of a rollout: one mask bit and one log-prob per response token, and no text beside the ids."""
    import torch

    samples = torch.load(path, weights_only=True)["samples"]
    assert len(samples) == 4
    for sample in samples:
        n = sample["response_length"]
        assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == n <= len(sample["tokens"])
        assert sample["reward"] in (0.0, 1.0) and sample["metadata"]["tau2"]["end_reason"]
        for bit, log_prob in zip(sample["loss_mask"], sample["rollout_log_probs"], strict=True):
            assert (bit == 1) == (log_prob != 0.0)


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_bad_input_of_the_whole_run_is_told_before_anything_runs(run):
    assert "no eval_{base,sft,rft,grpo,redrawn}.json" in run(EXAMPLE / "summarize.py", "--run-dir", "nowhere", code=2)
    assert "unknown domain 'phone'" in run(EXAMPLE / "tau2_mock.py", "--local_dir", "x", "--domain", "phone", code=2)
    assert not os.path.exists(run.folder / "x")

"""The benchmarks' own parts: timing, result files, the table; and the simulated rollout. Nothing here is timed."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import run_all
import scale
from hypothesis import given, settings
from hypothesis import strategies as st

import tau2_mock

# ---- common --------------------------------------------------------------------------------------------------


def test_sides_are_interleaved_and_the_order_turns():
    calls = []
    seconds = common.measure({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_side_may_time_itself_and_the_ratio_is_of_pairs():
    own = iter([8.0, 6.0, 2.0])
    sides = {"slow": lambda: common.Seconds(next(own)), "fast": lambda: common.Seconds(2.0)}
    found = common.ratio(common.measure(sides, repeats=3, warmup=0), "slow", "fast")
    assert (found.median, found.low, found.high, found.n) == (3.0, 1.0, 4.0, 3)


def test_a_budget_stops_after_two_rounds():
    seconds = common.measure({"a": lambda: None}, repeats=1000, warmup=0, budget=0.0)
    assert len(seconds["a"]) == 2


@pytest.mark.parametrize(
    "value, text",
    [(0.00123, "0.00123"), (4.567, "4.57"), (312.4, "312"), (14234.0, "14234"), (0, "0"), (99.96, "100")],
)
def test_numbers_have_three_digits(value, text):
    assert common.number(value) == text


@pytest.mark.parametrize("at_most, reached", [(False, True), (True, False)])
def test_a_result_is_written_whole_and_read_into_the_table(tmp_path, capsys, at_most, reached):
    found = common.ratio({"tau2": [6.0, 9.0], "ours": [1.0, 1.0]}, "tau2", "ours")
    sides = {"tau2": [6.0, 9.0], "ours": 1.0}
    common.write_result("x", "how | fast?", sides, ratio=found, target=5, at_most=at_most, folder=tmp_path)
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["sides"]["tau2"]["median"] == 7.5 and result["reached"] is reached
    assert result["ratio"] == {"median": 7.5, "low": 6.0, "high": 9.0, "n": 2}
    assert result["versions"]["python"] and result["machine"]["cores"] and result["command"].startswith("python ")
    assert "7.5x (6-9x)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    row = run_all.table(run_all.load(tmp_path)).splitlines()[2]
    assert row.startswith(r"| how \| fast? | tau2 7.5 s, ours 1 s | 7.5x (6-9x) |")
    assert row.endswith("| yes |" if reached else "| no |")


def test_a_value_without_a_target_is_neither_reached_nor_missed(tmp_path):
    result = common.write_result("memory", "memory", {"512": 150.0}, unit="kB", value=150.0, folder=tmp_path)
    assert result["reached"] is None and common.compared(result) == "150 kB"


def test_a_result_names_no_folder_of_this_machine(monkeypatch):
    home, script = "/home/me/runs/sft", str(common.ROOT / "benchmarks" / "rollout.py")
    monkeypatch.setattr("sys.argv", [script, "--checkpoint", home, "--results", f"{common.ROOT}/runs/x", "--quick"])
    assert common.command() == "python benchmarks/rollout.py --checkpoint .../sft --results runs/x --quick"


def test_a_missing_peer_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        common.need("surely_not_installed", "surely-not-installed")
    assert stop.value.code == common.EXIT_NO_PEER
    assert "pip install surely-not-installed" in capsys.readouterr().err


def test_run_all_refuses_an_unknown_name():
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no benchmark nonsense; there are:" in done.stderr


def test_every_benchmark_has_help_and_a_line_that_runs_it():
    for name in run_all.scripts():
        assert f"python benchmarks/{name}.py" in (ROOT / "benchmarks" / f"{name}.py").read_text(), name


# ---- levers.sh -----------------------------------------------------------------------------------------------

CHECK_THE_ARMS = """
bash() { :; }  # no set-up
source benchmarks/levers.sh
timed() { case $* in *" train.py "*) "$2" train.py --check-only "${@:4}" ;; *tau2_mock.py*) "${@:2}" ;; esac; }
teach() { cp "$RUN_DIR/rows.jsonl" "$DATA_DIR/$1.jsonl"; }
for arm in wordings teacher grpo own_ids shuffled handovers unfiltered curriculum two_steps full_rate groups_of_8 \\
   no_std tis kl penalty taught mixed; do
   (set -e; run_arm "$arm")
   echo "$arm is fine"
done
"""


def test_levers_refuses_an_unknown_arm():
    done = subprocess.run(["bash", "benchmarks/levers.sh", "lever"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no arm is called lever: choose of sft" in done.stderr


def test_train_py_accepts_the_commands_of_every_arm(tmp_path, smol_dir):
    (tmp_path / "data").mkdir()
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/hf").symlink_to(smol_dir)
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"prompt": dialogue, "tools": []}) + "\n") * 2)
    (tmp_path / "collected.json").write_text("{}")
    assert tau2_mock.main(["--local_dir", str(tmp_path / "data"), "--splits", "train"]) == 0
    assert tau2_mock.main(["--local_dir", str(tmp_path / "data"), "--splits", "train", "--mix", "mms_issue=1"]) == 0
    settings = {"RUN_DIR": str(tmp_path), "MODEL_DIR": str(smol_dir), "TAU2_VENV": sys.prefix}
    done = subprocess.run(
        ["bash", "-c", CHECK_THE_ARMS], env=os.environ | settings, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" is fine") == 17


# ---- the simulated rollout -----------------------------------------------------------------------------------

TURNS = [scale.Turn(40, 30, 2), scale.Turn(200, 20, 0), scale.Turn(60, 50, 3)]
SHAPES = [TURNS, TURNS * 2, TURNS * 3]
SMALL = scale.Rollout(engines=2, groups=3, samples=2, over_sampling=3, concurrency=4)


def run(rollout: scale.Rollout, **parts) -> scale.Simulation:
    simulation = scale.Simulation(rollout, episodes=SHAPES, **parts)
    simulation.result = simulation.run()
    return simulation


def test_the_same_seed_gives_the_same_rollout():
    assert run(SMALL).result == run(SMALL).result
    assert run(SMALL).result["seconds"] != run(replace(SMALL, seed=1)).result["seconds"]


@settings(max_examples=40)
@given(
    engines=st.integers(1, 4),
    groups=st.integers(1, 4),
    samples=st.integers(1, 4),
    over=st.integers(1, 6),
    concurrency=st.integers(1, 8),
    filtered=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_episode_finishes_or_is_aborted_once(engines, groups, samples, over, concurrency, filtered, seed):
    counts = run(scale.Rollout(engines, groups, samples, over, concurrency, filtered, seed)).counts
    assert counts.started == counts.finished + counts.aborted
    assert counts.kept_groups == groups
    assert counts.finished >= (counts.kept_groups + counts.dropped_groups) * samples
    assert counts.finished == len(counts.ends)


def test_nothing_is_aborted_when_no_more_is_submitted_than_needed():
    counts = run(SMALL).counts
    assert counts.aborted == 0 and counts.finished == SMALL.groups * SMALL.samples


def test_tokens_are_those_of_the_episodes():
    policy = scale.Policy(words=1, endless=0, prompt_tokens=100)
    counts = run(SMALL, policy=policy, engine=scale.Engine(cache_hits=1.0)).counts
    turns = [turn for shape in SHAPES for turn in shape] * SMALL.samples
    assert counts.tokens_sampled == sum(turn.sampled for turn in turns)
    assert counts.tokens_read == sum(turn.read for turn in turns) + 100 * SMALL.engines  # each reads the prompt once
    assert counts.customer_calls == sum(turn.customer_calls for turn in turns)


@pytest.mark.parametrize("seed", range(4))
def test_more_engines_are_never_slower_without_a_customer(seed):
    many = replace(SMALL, groups=12, over_sampling=12, samples=4, concurrency=64, seed=seed)
    seconds = [run(replace(many, engines=n), customer=scale.SCRIPTED).result["seconds"] for n in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True)


def test_a_rate_limit_bounds_the_calls():
    customer = scale.Customer(latency_s=0.01, calls_per_minute=60)
    simulation = run(SMALL, customer=customer)
    assert simulation.result["seconds"] >= simulation.counts.customer_calls - 1
    assert simulation.counts.customer_wait_s > 0


def test_an_endless_episode_ends_at_the_limit():
    policy = scale.Policy(words=1, endless=1.0, response_limit=1000)
    counts = run(SMALL, policy=policy, customer=scale.SCRIPTED).counts
    assert counts.tokens_sampled < 6 * 1000 and counts.finished == 6


def test_the_recorded_episodes_are_whole():
    episodes = scale.load_episodes()
    assert len(episodes) == 74
    assert all(turn.sampled > 0 and turn.read >= 0 for turns in episodes.values() for turn in turns)


async def test_the_stand_in_engine_decodes_together():
    """Two requests cost the steps of the longer one, not of both."""
    contexts = []

    class Counting(scale.Engine):
        def step_seconds(self, context: int) -> float:
            contexts.append(context)
            return 0.0

    engine = scale.StandInEngine(Counting())
    decoding = asyncio.create_task(engine.run())
    await asyncio.gather(engine.ask(0, 3, 10), engine.ask(0, 5, 20))
    decoding.cancel()
    assert contexts == [30, 32, 34, 23, 24]


def test_a_check_of_scale_records_nothing_unless_told_where(tmp_path, monkeypatch, capsys):
    async def slow(episodes):
        return 1e6  # a machine that others use

    recorded = (ROOT / "benchmarks/results/scale-check.json").read_text()
    monkeypatch.setattr(scale, "measured_seconds", slow)
    monkeypatch.setattr(sys, "argv", ["scale.py", "--check"])
    assert scale.main() == 1
    said = capsys.readouterr().out
    assert "not recorded: --results DIR does" in said and "load average " in said
    assert (ROOT / "benchmarks/results/scale-check.json").read_text() == recorded
    monkeypatch.setattr(sys, "argv", ["scale.py", "--check", "--results", str(tmp_path)])
    assert scale.main() == 1 and (tmp_path / "scale-check.json").exists()

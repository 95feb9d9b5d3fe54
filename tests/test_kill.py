"""kill -9 at random moments of every stage, then the same command: the files are those of an undisturbed run.

    python -m pytest tests/test_kill.py                 a few kills
    python -m pytest tests/test_kill.py -m slow -s      at least 50; TAU2_KILL_SEED gives other moments

Training compares weights, optimizer and losses bit by bit. A stage's clock and its random ids are not compared.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, free_ports
from fake_generate import FakeModel, serving
from fault_table import record

from openai_tool_adapter import load_chat_template
from slime_local import checkpoint
from tau2_mock import write_jsonl

SFT = (
    "--host local --rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss "
    "--calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only --loss-mask-type qwen3 "
    "--input-key p --prompt-data ../sft.jsonl --rollout-shuffle --rollout-batch-size 2 --global-batch-size 2 "
    "--num-rollout 12 --lr 1e-3 --lr-decay-style cosine --save out --load out --save-interval 2 --save-hf out/hf"
).split()
# One request at a time: with more, which requests share a forward pass depends on the clock, and so do last bits.
GRPO = (
    "--host local --custom-rm-path kill_reward.reward --input-key q --apply-chat-template --prompt-data ../rl.jsonl "
    "--rollout-shuffle --rollout-batch-size 2 --n-samples-per-prompt 2 --global-batch-size 2 --num-rollout 6 "
    "--rollout-max-response-len 4 --lr 1e-3 --sglang-server-concurrency 1 --save out --load out --save-interval 2 "
    "--save-hf out/hf --eval-interval 2 --eval-prompt-data held ../rl.jsonl@[4:6] --eval-temperature 0"
).split()
REWARD = """
async def reward(args, sample):
    return float(sum(sample.tokens[-sample.response_length:]) % 5)
"""
EVALUATION = "--prompt short --num-tasks 6 --max-concurrency 2 --output-path eval.json".split()


class Children:
    """The process that forks a stage for every command (tests/kill_child.py)."""

    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/kill_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the parent of the stages has ended"
        return line

    def start(self, stage: str, argv: list[str], folder: Path) -> int:
        """The pid of the stage, begun in `folder`."""
        self.process.stdin.write(json.dumps({"stage": stage, "argv": argv, "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        return int(self._line().split()[1])

    def end(self) -> int:
        """Its exit code, negative for a signal; waits."""
        code = int(self._line().split()[1])
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return code

    def run(self, stage: str, argv: list[str], folder: Path) -> None:
        self.start(stage, argv, folder)
        code = self.end()
        assert code == 0, (folder / "log.txt").read_text()[-3000:]

    def kill_after(self, seconds: float, stage: str, argv: list[str], folder: Path) -> bool:
        """Whether the stage was still at work then, and killed."""
        pid = self.start(stage, argv, folder)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # one that has ended is not reaped yet
        return self.end() == -signal.SIGKILL

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass
class Stage:
    """`files(folder)`: what an undisturbed run and a killed one must have in common."""

    name: str
    argv: list[str]
    files: Callable[[Path], dict]
    prepare: Callable[[Path], None] = lambda folder: None


def bytes_of(folder: Path, *ignored: str) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*ignored, "log.txt", ".lock")
    }


def training_files(folder: Path) -> dict:
    """Every file of every checkpoint, and the metrics without those of the clock."""
    found = bytes_of(folder / "out", "metrics.jsonl", "state.pt")
    where = [checkpoint.locate(folder / "out", step, "--load", "--ckpt-step") for step in saved(folder)]
    states = [checkpoint.read_state(location) for location in where]
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]
    plain = [
        {name: state[name] for name in ("schedule", "optimizer_steps", "skipped_steps", "extra")} for state in states
    ]
    return {**found, "states": plain, "metrics": metrics}


def saved(folder: Path) -> list[int]:
    return checkpoint.saved_iterations(folder / "out")


def evaluation_files(folder: Path) -> dict:
    """Every episode once, with the same outcome; and the same numbers."""
    result = json.loads((folder / "eval.json").read_text())
    rows = [json.loads(line) for line in (folder / "eval.rows.jsonl").read_text().splitlines()[1:]]
    clock = ("agent_seconds", "user_seconds", "run", "minutes", "simulation", "tokens")
    plain = {(row["task_id"], row["trial"]): {k: v for k, v in row.items() if k not in clock} for row in rows}
    assert len(plain) == len(rows) == result["total_episodes"]
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".log" and path.name != "log.txt")
    return {"rows": plain, "pass": result["metrics"], "ends": result["end_reasons"], "names": names}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "kill_reward.py").write_text(REWARD)
    dialogues = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}, as you wish."}]
        for i in range(7)
    ]
    write_jsonl(folder / "sft.jsonl", [{"p": dialogue} for dialogue in dialogues])
    write_jsonl(folder / "rl.jsonl", [{"q": f"Say {i}."} for i in range(6)])
    return folder


@pytest.fixture(scope="module")
def children(workshop):
    found = Children(workshop)
    yield found
    found.close()


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    """A stand-in engine that the killed evaluations share; slow enough to be hit."""
    model = FakeModel(load_chat_template(str(tiny_model_dir)), model_path=str(tiny_model_dir))
    model.delay = 0.02
    with serving(model) as (_, port):
        yield port


@pytest.fixture(scope="module")
def stages(workshop, tiny_model_dir, engine) -> dict[str, Stage]:
    model = ["--hf-checkpoint", str(tiny_model_dir)]
    evaluation = [*EVALUATION, "--checkpoint", str(tiny_model_dir), "--sglang-port", str(engine)]
    traces = "--local_dir ../data --output traces.jsonl --prompt short --num-traces 12 --slip 0.3 --redraw-ids".split()
    found = [
        Stage("tasks", "--local_dir . --splits train test pool".split(), bytes_of),
        Stage("traces", traces, bytes_of, make_tasks),
        Stage("sft", [*SFT, *model], training_files),
        Stage("grpo", [*GRPO, *model], training_files),
        Stage("evaluation", evaluation, evaluation_files),
    ]
    return {stage.name: stage for stage in found}


def make_tasks(folder: Path) -> None:
    import tau2_mock

    assert tau2_mock.main(["--local_dir", str(folder.parent / "data"), "--splits", "train"]) == 0


def check_kills(children: Children, stage: Stage, workshop: Path, kills: int, rng: random.Random) -> int:
    """Kill the stage `kills` times, in runs of one to four kills before the command is left alone. Gives the number of
    kills that hit it at work."""
    whole = workshop / f"{stage.name}-whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    stage.prepare(whole)
    children.run(stage.name, stage.argv, whole)  # warm caches: its time is not that of the next ones
    shutil.rmtree(whole)
    whole.mkdir()
    began = time.monotonic()
    children.run(stage.name, stage.argv, whole)
    seconds, wanted = time.monotonic() - began, stage.files(whole)
    hit, number = 0, 0
    while hit < kills:
        number += 1
        folder = workshop / f"{stage.name}-{number}"
        folder.mkdir()
        for _ in range(min(rng.randint(1, 4), kills - hit)):
            hit += children.kill_after(rng.uniform(0, 1.0) * seconds, stage.name, stage.argv, folder)
        children.run(stage.name, stage.argv, folder)
        assert stage.files(folder) == wanted, f"{stage.name}: run {number} differs"
        shutil.rmtree(folder)
        assert number < 20 * kills, "the kills come too late"
    return hit


def seeded(name: str) -> random.Random:
    return random.Random(f"{os.environ.get('TAU2_KILL_SEED', '0')}:{name}")


SAME = {
    "tasks": "the same bytes",
    "traces": "the same bytes",
    "sft": "same weights, optimizer, schedule, data order and losses, bit by bit; no checkpoint half written",
    "grpo": "same weights, optimizer, schedule, data order, rollouts, evaluations and losses, bit by bit",
    "evaluation": "every episode once, the same outcomes and numbers",
}


@pytest.mark.parametrize("name", ["tasks", "sft"])  # of an evaluation: tests/test_evaluate.py
def test_a_killed_stage_is_completed_by_the_same_command(name, stages, children, workshop):
    assert check_kills(children, stages[name], workshop, 2, seeded(name)) == 2


KILLS = {"tasks": 10, "traces": 10, "sft": 14, "grpo": 10, "evaluation": 12}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KILLS)
def test_kill_anywhere(name, stages, children, workshop):
    hit = check_kills(children, stages[name], workshop, KILLS[name], seeded(name))
    print(f"{name}: {hit} kills", flush=True)
    record(name, f"`kill -9`, {hit} times", SAME[name])


def test_at_least_fifty_kills_are_planned():
    assert sum(KILLS.values()) >= 50


# ---- The server --------------------------------------------------------------------------------------------------


def servers_of(pid: int) -> list[int]:
    """Its children that are model servers: it asks git for a version, too."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"slime_local.server" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_evaluation_takes_its_server_along_and_a_killed_server_loses_nothing(
    children, workshop, tiny_model_dir
):
    (port,) = free_ports(1)
    argv = [*EVALUATION, "--checkpoint", str(tiny_model_dir), "--sglang-port", str(port), "--max-turn-tokens", "8"]
    folders = [workshop / f"server-{name}" for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    children.run("evaluation", argv, folders[0])
    for _ in range(2):
        pid = children.start("evaluation", argv, folders[1])
        wait_for(lambda pid=pid: len(servers_of(pid)) == 1)
        (server,) = servers_of(pid)
        time.sleep(random.uniform(0, 6))
        os.kill(pid, signal.SIGKILL)
        assert children.end() == -signal.SIGKILL
        wait_for(lambda server=server: not Path(f"/proc/{server}").exists() and not listens(port))
    pid = children.start("evaluation", argv, folders[1])
    wait_for(lambda: len(servers_of(pid)) == 1)
    os.kill(servers_of(pid)[0], signal.SIGKILL)
    assert children.end() in (1, 2)
    children.run("evaluation", argv, folders[1])
    assert evaluation_files(folders[1]) == evaluation_files(folders[0])
    record(
        "evaluation", "`kill -9` of the evaluation: its server", "ends with it; the port is free for the same command"
    )
    record(
        "evaluation", "`kill -9` of the server", "exit code 1 or 2 with its last words; the same command completes it"
    )

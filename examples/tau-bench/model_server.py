"""The `/generate` server of an evaluation: the one that answers, checked, or one started for the time being.

    with running_server(args) as server:        # args of evaluate_tau2.py
        ... server.url, server.model_info

sglang is started where it is installed beside a GPU, else slime_local's server. Also here: what a model folder must
hold, and how one is told from another.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tau2_errors import BadInput

ANSWER_SECONDS = 10  # of a server to a question about itself
LARGEST_INFO = 2**20  # bytes of its answer
SERVER_MINUTES = 20  # to load and answer
LOG_LINES = 20  # of a server that died
PROGRESS_SECONDS = 30  # between lines in a log
PIECE = 4096  # bytes of a tensor that a fingerprint samples at a time
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What else decides the ids of a dialogue.
TEXT_FILES = (
    *TOKENIZERS,
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja"),
)
CONVERTER = (
    "python tools/convert_torch_dist_to_hf.py --input-dir {folder} --output-dir {folder}_hf --origin-hf-dir HF_DIR"
)


# ---------------------------------------------------------------------------------------------------------------------
# The model folder


def check_checkpoint(folder: Path, needs_weights: bool = True) -> None:
    """Raises BadInput when `folder` is not an HF model folder; with the converting command for an iteration folder.

    needs_weights: not so where a server elsewhere has them, and only config and tokenizer are read here."""
    if not os.path.exists(folder):
        raise BadInput(f"--checkpoint {folder}: no such folder")
    if not os.path.isdir(folder):
        raise BadInput(f"--checkpoint {folder} is a file: give a Hugging Face model folder")
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        newest = tracker.read_text(encoding="utf-8", errors="replace").strip()[:40]
        iteration = folder / (f"iter_{int(newest):07d}" if re.fullmatch("[0-9]{1,18}", newest) else newest)
        raise BadInput(_not_hf(folder, "a folder of training checkpoints", iteration))
    if re.fullmatch(r"iter_\d+", folder.resolve().name) or any(folder.glob("*.distcp")):
        raise BadInput(_not_hf(folder, "a training checkpoint, not a Hugging Face folder", folder))
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if has_weights(folder) or not needs_weights else ["weights (*.safetensors)"]
    missing += [] if any((folder / name).is_file() for name in TOKENIZERS) else ["tokenizer (tokenizer.json)"]
    if missing:
        raise BadInput(f"--checkpoint {folder}: not a Hugging Face model folder, it has no {', no '.join(missing)}")


def _not_hf(folder: Path, what: str, iteration: Path) -> str:
    use = f"--checkpoint {folder} is {what}; use the folder that --save-hf wrote"
    if (iteration / "model.safetensors").is_file():  # slime_local's own, which slime's converter cannot read
        saved = iteration.parent / "hf"
        return f"{use}: {saved}" if (saved / "config.json").is_file() else f"{use} (train.py --save-hf DIR)"
    command = CONVERTER.format(folder=shlex.quote(str(iteration)))
    return f"{use}, or convert it in slime: {command}"


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def fingerprint(folder: Path) -> str:
    """A hash of a model folder's config and weights: of sizes and samples of each file, so that 8 GB take no time.
    slime_local's server takes the same of what it loads. Of safetensors every tensor is sampled. Not seen: a change
    that leaves start, middle and end of each tensor as they are (some rows of an embedding); more in other formats."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for place, length in _sampled_pieces(file, size, path.suffix):
                file.seek(place)
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _sampled_pieces(file: BinaryIO, size: int, suffix: str) -> list[tuple[int, int]]:
    """(place, length) of the bytes of a weights file that are hashed: of safetensors the header, and start, middle and
    end of every tensor; of another format, and behind a damaged header, 16 pieces."""
    try:
        if suffix == ".safetensors":
            return _pieces_of_tensors(file, size)
    except (struct.error, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        pass
    return [(size * part // 16, 65536) for part in range(16)]


def _pieces_of_tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Raises one of many errors where the header is damaged."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(min(length, LARGEST_HEADER)))
    pieces = [(0, 8 + length)]
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        if not 8 + length <= begin <= end <= size:
            raise ValueError(f"{name} lies outside the file")
        places = begin, (begin + end) // 2, max(begin, end - PIECE)
        pieces += [(place, min(PIECE, end - place)) for place in places]
    return pieces


def text_fingerprint(folder: Path) -> str:
    """A hash of a model folder's tokenizer and chat template: of the whole files, those that are there."""
    digest = hashlib.sha256()
    for path in (folder / name for name in TEXT_FILES):
        if path.is_file():
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# The server


@dataclass
class Server:
    """A `/generate` server; `process` and `log` are set when this program started it."""

    url: str
    model_info: dict
    process: subprocess.Popen | None = None
    log: Path | None = None

    def alive(self) -> bool:
        return self.process is None or self.process.poll() is None

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:] if self.log else []
        return "\n".join([f"the server has stopped; the end of {self.log}:", *(f"  {line}" for line in lines)])


@contextlib.contextmanager
def running_server(args: Any, meanwhile: Callable[[], object] = lambda: None) -> Iterator[Server]:
    """The server that answers on the port, checked to serve this checkpoint, or one started for the block.

    meanwhile: called while a server starts. (In a thread it could be at an import when this process forks, which
    loguru's locks do not survive.)"""
    address = args.server_address or f"127.0.0.1:{args.sglang_port}"
    if not re.fullmatch(r"[^/\s]+:\d+", address):
        raise BadInput(f"--server-address {address}: give HOST:PORT")
    url = f"http://{address}"
    info = ask_model_info(url)
    if info is not None:
        yield Server(url, check_serves(info, url, args.checkpoint, args.served_as))
    elif args.server_address:
        raise BadInput(f"--server-address {address}: no server answers there")
    else:
        with started_server(args, url, meanwhile) as server:
            yield server


def ask_model_info(url: str) -> dict | None:
    """What the server says it serves; None when nothing listens. Raises BadInput when something else answers."""
    for name in ("model_info", "get_model_info"):  # today's SGLang, and earlier ones
        try:
            info = _get_json(f"{url}/{name}")
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), ConnectionRefusedError):
                return None
            raise BadInput(f"{url} is taken by something that does not answer as a model server ({error})") from None
        if info:
            return info
    raise BadInput(f"{url} is taken by something that is no model server (no /model_info): give another --sglang-port")


def _get_json(url: str) -> dict | None:
    """The JSON object at `url`; None for an HTTP error or another answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as response:
            value = json.loads(response.read(LARGEST_INFO))
    except (urllib.error.HTTPError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_serves(info: dict, url: str, checkpoint: str, served_as: str | None = None) -> dict:
    """The server's `info`. Raises BadInput unless that is of the folder `checkpoint`, with the weights that it holds.

    served_as: what the server calls it, by the user's word. Without, only a whole path will do: SGLang gives it as it
    was typed, and from where is not known. Only slime_local's server says which weights it loaded."""
    served = str(info.get("model_path", ""))
    if served and not served_as and not os.path.isabs(served):
        raise BadInput(
            f"the server at {url} calls its model {served}, which is no whole path and can be another folder than "
            f"{checkpoint}: start it with the whole path, or say --served-as {served} where it is the same"
        )
    wanted = served_as or checkpoint
    if not served or Path(served).resolve() != Path(wanted).resolve():
        served = served or "an unnamed model"
        raise BadInput(
            f"the server at {url} serves {served}, not {wanted}: "
            f"stop it, give another --sglang-port, or say --served-as {served}"
        )
    folder = Path(checkpoint)
    if "fingerprint" in info and has_weights(folder) and info["fingerprint"] != fingerprint(folder):
        raise BadInput(
            f"the server at {url} has other weights than {checkpoint} holds now: start it again, or give another "
            "--sglang-port"
        )
    return info


@contextlib.contextmanager
def started_server(args: Any, url: str, meanwhile: Callable[[], object]) -> Iterator[Server]:
    command, environment = server_command(args)
    log = Path(args.output_path).with_suffix(".server.log")
    print(f"starting {shlex.join(command[1:])}  (log: {log})", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    server = Server(url, {}, process, log)
    try:
        meanwhile()
        wait_until_ready(server)
        server.model_info = check_serves(ask_model_info(url) or {}, url, args.checkpoint)
        yield server
    finally:
        stop(process)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the new process: end it when this program is killed. A server left behind would hold the port, and answer the
    next evaluation with weights that its folder no longer has."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def weights_changed(server: Server, checkpoint: str, before: str) -> str | None:
    """What is different about the weights since the evaluation began; None when nothing is, or nobody answers.

    before: the folder's `fingerprint` then."""
    if fingerprint(Path(checkpoint)) != before:
        return f"{checkpoint} holds other weights now"
    with contextlib.suppress(BadInput):
        info = ask_model_info(server.url) or {}
        for name in ("model_path", "fingerprint", "weight_version"):
            if name in info and info[name] != server.model_info.get(name):
                return f"the server at {server.url} has other weights now ({name} {info[name]})"
    return None


def server_command(args: Any) -> tuple[list[str], dict[str, str]]:
    """sglang where it is installed beside a GPU, else slime_local's server. Raises BadInput when there is neither."""
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ}
    model = ["--model-path", str(Path(args.checkpoint).resolve()), "--port", str(args.sglang_port)]
    if shutil.which("nvidia-smi") and importlib.util.find_spec("sglang"):
        return [sys.executable, "-m", "sglang.launch_server", *model], environment
    if (here / "slime_local").is_dir():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), environment.get("PYTHONPATH")]))
    elif not importlib.util.find_spec("slime_local"):
        raise BadInput(
            "no server answers, and neither sglang nor slime_local is here to start one: give --server-address"
        )
    model += ["--max-running-requests", str(args.max_concurrency)]
    model += ["--context-length", str(args.max_context_len)] if args.max_context_len else []
    return [sys.executable, "-m", "slime_local.server", *model], environment


def wait_until_ready(server: Server) -> None:
    began = told = time.monotonic()
    while True:
        if not server.alive():
            raise BadInput(server.last_words())
        with contextlib.suppress(OSError, http.client.HTTPException):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{server.url}/health", timeout=ANSWER_SECONDS):
                return
        waited = time.monotonic() - began
        if waited > SERVER_MINUTES * 60:
            raise BadInput(f"the server did not answer within {SERVER_MINUTES} minutes; {server.last_words()}")
        if time.monotonic() - told > PROGRESS_SECONDS:
            print(f"waiting for the server ({waited:.0f} s)", flush=True)
            told = time.monotonic()
        time.sleep(0.25)


def stop(process: subprocess.Popen) -> None:
    """End the server's own process group: first asked, then killed."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)

"""What the tests share: import paths, a quiet offline environment, and the models that they run on.

Fixtures: `smol_dir` (SmolLM2-135M-Instruct as an HF folder, converted once and kept under .cache/ or $TAU2_CACHE),
`tiny_model_dir` (a random two-layer llama with SmolLM2's tokenizer and chat template), `qwen3_tokenizer` (from the
folder that $TAU2_TEST_QWEN3_TOKENIZER names; tests of it are skipped, with the reason, where that is not set) and
`run_script`. TINY_ARGS are the flags that describe the tiny model.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tau-bench"

for folder in (str(EXAMPLE), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Subprocesses that the tests start find the same modules.
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys([str(ROOT), str(EXAMPLE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
)

settings.register_profile("here", deadline=None)  # a machine that is busy for a moment is no defect
settings.load_profile("here")

TINY_ARGS = (
    "--swiglu --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm "
    "--norm-epsilon 1e-6 --rotary-base 10000 --vocab-size 49152"
).split()

CACHE = Path(os.environ.get("TAU2_CACHE") or ROOT / ".cache")


@pytest.fixture(scope="session")
def smol_dir() -> Path:
    """SmolLM2-135M-Instruct as an HF folder with the project's chat template."""
    from slime_local.smollm2 import ensure_smollm2

    return Path(ensure_smollm2(CACHE / "smollm2-135M-Instruct"))


@pytest.fixture(scope="session")
def tiny_model_dir(smol_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama (2 layers x 64, 4 heads, 2 KV heads) with SmolLM2's tokenizer (49,152 ids) and chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smol_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model.save_pretrained(folder)
    for file in smol_dir.iterdir():
        is_weight = file.suffix in (".safetensors", ".bin") or file.name.endswith(".safetensors.index.json")
        if file.is_file() and not is_weight and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_tokenizer_dir() -> Path:
    """The folder of Qwen3's tokenizer."""
    folder = os.environ.get("TAU2_TEST_QWEN3_TOKENIZER")
    if not folder:
        pytest.skip("TAU2_TEST_QWEN3_TOKENIZER does not name a folder with Qwen3's tokenizer")
    return Path(folder)


@pytest.fixture(scope="session")
def qwen3_tokenizer(qwen3_tokenizer_dir: Path):
    """Qwen3's tokenizer, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen3_tokenizer_dir)


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the project as a user does: run_script("examples/tau-bench/x.py", "--flag", timeout=60)."""

    def run(script: str, *args: object, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)

    return run


@pytest.fixture
def own_signal_handler():
    """Puts SIGTERM's handler back, which the evaluation's main() sets for its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback interface that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

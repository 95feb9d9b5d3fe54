"""Hugging Face model folders, looked at without loading anything."""

import json
from pathlib import Path

from slime_local.errors import UsageError


def check_hf_folder(path: str | Path) -> Path:
    """The folder as a Path. Raises UsageError where it is no model folder, with the command that makes one."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"no model folder at {path}")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not all((path / name).is_file() for name in weight_files(path)) or not weight_files(path):
        missing.append("safetensors weights")
    if missing:
        raise UsageError(
            f"{path} is not a Hugging Face model folder: no {', no '.join(missing)}. slime converts its checkpoints "
            f"with tools/convert_torch_dist_to_hf.py --input-dir {path} --output-dir OUT --origin-hf-dir HF, and "
            "--save-hf writes such folders while training"
        )
    return path


def weight_files(path: Path) -> list[str]:
    """Names of the folder's safetensors files, from its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return ["model.safetensors"] if (path / "model.safetensors").is_file() else []

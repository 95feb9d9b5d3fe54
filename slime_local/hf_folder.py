"""Hugging Face model folders, looked at without loading anything."""

import json
import struct
from pathlib import Path
from typing import Any

from slime_local.errors import UsageError

LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def check_hf_folder(path: str | Path) -> Path:
    """The folder as a Path. Raises UsageError where it is no model folder, with the command that makes one, and where
    one of its files is broken."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"no model folder at {path}")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    weights = weight_files(path)
    if not all((path / name).is_file() for name in weights) or not weights:
        missing.append("safetensors weights")
    if missing:
        raise UsageError(
            f"{path} is not a Hugging Face model folder: no {', no '.join(missing)}. slime converts its checkpoints "
            f"with tools/convert_torch_dist_to_hf.py --input-dir {path} --output-dir OUT --origin-hf-dir HF, and "
            "--save-hf writes such folders while training"
        )
    for name in ("config.json", "tokenizer_config.json"):
        read_json_object(path / name)
    for name in weights:
        read_safetensors_header(path / name)
    return path


def weight_files(path: Path) -> list[str]:
    """Names of the folder's safetensors files, from its index where it has one."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"] if (path / "model.safetensors").is_file() else []
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise UsageError(f"{index}: weight_map does not name the folder's weight files: copy the model again")
    return sorted(set(names.values()))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise UsageError(f"{path} is not JSON ({error}): copy the file again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object: copy the file again")
    return value


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor: {"dtype", "shape", "data_offsets"}}. Raises UsageError for a file that is broken or cut short."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, LARGEST_HEADER)))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        data = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        dimensions = [size for tensor in tensors.values() for size in tensor["shape"]]
        fits = 8 + length + data == path.stat().st_size and all(type(size) is int and size >= 0 for size in dimensions)
    except (struct.error, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no safetensors file: copy or save it again") from error
    if not fits:
        raise UsageError(f"{path} is cut short or damaged ({path.stat().st_size} bytes): copy or save it again")
    return tensors

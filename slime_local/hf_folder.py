"""Hugging Face model folders, looked at without loading anything."""

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from slime_local.errors import UsageError

FAMILIES = ("llama", "qwen2", "qwen3")
PIECE = 4096  # bytes of a tensor that a fingerprint samples at a time
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# What these families can have and this host does not compute, with the value that means: without.
WITHOUT = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SAVED_FILES = {"model.safetensors", "config.json", *TOKENIZER_FILES}  # by save_hf


@dataclass(frozen=True)
class ModelConfig:
    """What of a config.json a model is built from, by transformers' names. (transformers' own reader knows every
    family, and importing it takes 1.3 seconds of a start.)"""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_token_id: tuple[int, ...]  # none where neither file names one


def load_config(path: str | Path) -> ModelConfig:
    """The config of an HF folder. Raises UsageError for a folder that is none, and for what this host does not run."""
    config = parse_config(read_json_object(check_hf_folder(path) / "config.json"), path)
    return replace(config, eos_token_id=(*config.eos_token_id, *_generation_ends(Path(path))))


def _generation_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a turn by the folder's generation_config.json, which need not be those of its config.json."""
    file = folder / "generation_config.json"
    return _end_ids(read_json_object(file).get("eos_token_id"), file) if file.is_file() else ()


def _end_ids(said: Any, file: Path) -> tuple[int, ...]:
    """What `file` says under eos_token_id: an id, ids, or nothing."""
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(one) is int for one in ids):
        raise UsageError(f"{file.parent}: {file.name} says eos_token_id {_shown(said)}: neither an id nor ids")
    return tuple(ids)


def parse_config(said: dict[str, Any], path: str | Path) -> ModelConfig:
    """As `load_config`, from what the config.json of `path` says."""
    said = {name: value for name, value in said.items() if value is not None}
    if said.get("model_type") not in FAMILIES:
        raise UsageError(f"{path}: model type {_shown(said.get('model_type'))} is not one of {', '.join(FAMILIES)}")
    for name, value in WITHOUT.items():
        if said.get(name, value) != value:
            raise UsageError(f"{path}: {name} {_shown(said[name])} is not supported (only {_shown(value)})")
    rope = said.get("rope_parameters", said.get("rope_scaling", {}))
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UsageError(f"{path}: rope {_shown(rope)} is not supported (only the type 'default')")

    def number(name: str, default: Any = None, source: dict = said, kinds: tuple = (int,)) -> Any:
        value = source.get(name, default)
        if type(value) not in kinds or not 0 < value < 2**63:
            raise UsageError(f"{path}: config.json says {name} {_shown(value)}: not a number above 0 that fits")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    tied, ends = said.get("tie_word_embeddings", False), _end_ids(said.get("eos_token_id"), Path(path, "config.json"))
    if type(tied) is not bool:
        raise UsageError(f"{path}: config.json says tie_word_embeddings {_shown(tied)}: neither true nor false")
    if heads % number("num_key_value_heads", heads):
        said_heads = said["num_key_value_heads"]
        raise UsageError(f"{path}: config.json says num_key_value_heads {said_heads}: not a divisor of {heads}")
    return ModelConfig(
        model_type=said["model_type"],
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128 if said["model_type"] == "qwen3" else hidden // heads),
        max_position_embeddings=number("max_position_embeddings"),
        rms_norm_eps=number("rms_norm_eps", 1e-6, kinds=(int, float)),
        rope_theta=number("rope_theta", said.get("rope_theta", 10000.0), rope, (int, float)),
        tie_word_embeddings=tied,
        eos_token_id=ends,
    )


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


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


def fingerprint(path: Path) -> str:
    """Of a folder's weights, the same as model_server.py in examples/tau-bench takes it: an evaluation can then see
    whether a server loaded what the folder holds by now."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for weights in sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]):
        size = weights.stat().st_size
        digest.update(f"{weights.name}:{size}".encode())
        with weights.open("rb") as file:
            for place, length in _sampled_pieces(file, size, weights.suffix):
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

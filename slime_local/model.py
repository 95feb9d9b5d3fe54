"""The language model of the one-machine host: Llama, Qwen2 and Qwen3 decoders, for the trainer and the engine alike.

Trainer and engine run the same layers over the same parameters, so their log-probs agree and new weights need no copy.
Parameters carry Megatron's names and layouts (fused QKV per KV group, fused gate and up projection), so that slime's
`--only-train-params-name-list` and `--freeze-params-name-list` select the same parameters in both hosts.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slime_local.errors import UsageError
from slime_local.hf_folder import check_hf_folder, weight_files

FAMILIES = ("llama", "qwen2", "qwen3")
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


class Linear(nn.Module):
    """A projection whose weight is kept in fp32 and multiplied in the model's compute dtype."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False, norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.layer_norm_weight = nn.Parameter(torch.empty(n_in)) if norm else None
        self._cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype == x.dtype else self._weight_as(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: a fresh differentiable cast while training, a kept copy otherwise."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return self.weight.to(dtype)
        if self._cast is None or self._cast.dtype != dtype or self._cast.device != self.weight.device:
            self._cast = self.weight.detach().to(dtype)
        return self._cast


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.head_dim = head_dim(config)
        self.eps = config.rms_norm_eps
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        width = self.kv_heads * (self.group + 2) * self.head_dim
        self.linear_qkv = Linear(config.hidden_size, width, bias=bias, norm=True)
        self.linear_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        if config.model_type == "qwen3":
            self.q_layernorm = Norm(self.head_dim)
            self.k_layernorm = Norm(self.head_dim)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> q [T, kv_heads, group, head_dim], k and v [T, kv_heads, head_dim], positions applied."""
        x = rms_norm(x, self.linear_qkv.layer_norm_weight, self.eps)
        qkv = self.linear_qkv(x).view(-1, self.kv_heads, self.group + 2, self.head_dim)
        q, k, v = qkv[:, :, : self.group], qkv[:, :, self.group], qkv[:, :, self.group + 1]
        if hasattr(self, "q_layernorm"):
            q = rms_norm(q, self.q_layernorm.weight, self.eps)
            k = rms_norm(k, self.k_layernorm.weight, self.eps)
        return rotate(q, cos[:, None, None], sin[:, None, None]), rotate(k, cos[:, None], sin[:, None]), v


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.linear_fc1 = Linear(config.hidden_size, 2 * config.intermediate_size, norm=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(rms_norm(x, self.linear_fc1.layer_norm_weight, self.eps)).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config)
        self.mlp = Mlp(config)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x [T, H] after attention output `attended` [T, heads * head_dim]."""
        x = x + self.self_attention.linear_proj(attended)
        return x + self.mlp(x)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Module()
        self.word_embeddings.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = Norm(config.hidden_size)


class Transformer(nn.Module):
    """A decoder over packed sequences. fp32 parameters; matrix products in `compute_dtype`."""

    def __init__(self, config, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = Embedding(config)
        self.decoder = Decoder(config)
        if not config.tie_word_embeddings:
            self.output_layer = Linear(config.hidden_size, config.vocab_size)
        self._head_cast: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.word_embeddings.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [T] -> residual stream [T, H]."""
        return F.embedding(tokens, self.embedding.word_embeddings.weight).to(self.compute_dtype)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T] -> cos and sin, each [T, head_dim / 2]."""
        dim = head_dim(self.config)
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float()[:, None] * (1.0 / rope_theta(self.config) ** (steps / dim))
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Packed token ids [T] of sequences of `lengths` (sum T) -> final-norm hidden states [T, H].

        Prefixes that sequences share are computed once: dialogues share the system prompt, the samples of a group
        their first turns. The result is that of separate forward passes, gradients included.
        """
        shared = share_prefixes(tokens, lengths)
        cos, sin = self.rope(shared.positions)
        x = self.embed(shared.tokens)
        for layer in self.decoder.layers:
            q, k, v = layer.self_attention.qkv(x, cos, sin)
            x = layer.finish(x, attend_paths(q, k, v, shared.paths))
        x = self.final_norm(x)
        return x if shared.gather is None else x[shared.gather]

    def final_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.decoder.final_layernorm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> logits [N, V] in fp32."""
        if not self.config.tie_word_embeddings:
            return self.output_layer(hidden).float()
        weight = self.embedding.word_embeddings.weight
        if weight.dtype != hidden.dtype:
            weight = self._head_as(hidden.dtype)
        return F.linear(hidden, weight).float()

    def _head_as(self, dtype: torch.dtype) -> Tensor:
        weight = self.embedding.word_embeddings.weight
        if weight.requires_grad and torch.is_grad_enabled():
            return weight.to(dtype)
        if self._head_cast is None or self._head_cast.dtype != dtype:
            self._head_cast = weight.detach().to(dtype)
        return self._head_cast

    def weights_changed(self) -> None:
        """Drop the low-precision copies of the weights; the engine calls it after every optimizer step."""
        self._head_cast = None
        for module in self.modules():
            if isinstance(module, Linear):
                module._cast = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32 whatever the dtype of x."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split convention of Hugging Face checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass
class SharedPrefixes:
    """Packed sequences with every shared prefix kept once.

    tokens, positions [U]: the unique tokens, segment after segment; paths: per segment, the spans of `tokens` from
    the start of the sequence up to and with that segment; gather [T]: where each packed token is found in `tokens`
    (None when nothing is shared).
    """

    tokens: Tensor
    positions: Tensor
    paths: list[list[slice]]
    gather: Tensor | None


def share_prefixes(tokens: Tensor, lengths: list[int]) -> SharedPrefixes:
    """The prefix tree of packed sequences: tokens [T], `lengths` with sum T."""
    if len(lengths) == 1:
        positions = torch.arange(len(tokens), device=tokens.device)
        return SharedPrefixes(tokens, positions, [[slice(0, len(tokens))]], None)
    ids, ends = tokens.tolist(), list(itertools.accumulate(lengths))
    sequences = [ids[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    unique: list[int] = []
    positions: list[int] = []
    paths: list[list[slice]] = []
    gather: list[list[int]] = [[] for _ in sequences]

    def grow(members: list[int], depth: int, path: list[slice]) -> None:
        """Add the longest prefix that `members` (sorted) share beyond `depth`, then each way on from there."""
        first, last = sequences[members[0]], sequences[members[-1]]
        end = common_prefix(first, last)
        if end > depth:
            path = [*path, slice(len(unique), len(unique) + end - depth)]
            paths.append(path)
            unique.extend(first[depth:end])
            positions.extend(range(depth, end))
            for member in members:
                gather[member].extend(range(path[-1].start, path[-1].stop))
        rest = [member for member in members if len(sequences[member]) > end]
        for _, branch in itertools.groupby(rest, key=lambda member: sequences[member][end]):
            grow(list(branch), end, path)

    grow(sorted(range(len(sequences)), key=sequences.__getitem__), 0, [])
    index = torch.tensor(list(itertools.chain.from_iterable(gather)), device=tokens.device)
    return SharedPrefixes(tokens.new_tensor(unique), tokens.new_tensor(positions), paths, index)


def common_prefix(a: list[int], b: list[int], limit: int | None = None) -> int:
    """Length of the longest common prefix of two lists, at most `limit`."""
    n = min(len(a), len(b), len(b) if limit is None else limit)
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] equals b[:low], a[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def attend_paths(q: Tensor, k: Tensor, v: Tensor, paths: list[list[slice]]) -> Tensor:
    """Each segment attends causally over its path: q [U, kv, group, D], k and v [U, kv, D] -> [U, kv * group * D]."""
    out = []
    for path in paths:
        if len(path) == 1:
            keys, values = k[path[0]], v[path[0]]
        else:
            keys, values = torch.cat([k[span] for span in path]), torch.cat([v[span] for span in path])
        out.append(attend_causal(q[path[-1]], keys, values))
    return out[0] if len(out) == 1 else torch.cat(out)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last n positions of a sequence of m attend causally: q [n, kv, group, D], k and v [m, kv, D] -> [n, -1]."""
    (n, kv, group, dim), m = q.shape, len(k)
    if q.device.type == "cpu" and q.requires_grad:
        return BlockAttention.apply(q, k, v).reshape(n, -1)
    q = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    mask = None if n == m else ~_future(n, m, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n == m, enable_gqa=group > 1)
    return out[0].transpose(0, 1).reshape(n, -1)


class BlockAttention(torch.autograd.Function):
    """`attend_causal` for training on a CPU, where the fused kernel's backward was measured several times slower.

    The fused kernel runs forward; backward is plain matrix products over blocks of ATTENTION_ROWS queries, whose
    scores stay in cache and are computed again (FlashAttention, arXiv 2205.14135, section 3.1).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (n, kv, group, dim), m = q.shape, len(k)
        heads = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
        keys, values = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
        mask = None if n == m else q.new_zeros(n, m).masked_fill_(_future(n, m, q.device), float("-inf"))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = fused(heads, keys, values, 0.0, n == m, attn_mask=mask)
        out = out.view(kv, group, n, dim).transpose(1, 2)
        sums = sums.view(kv, group, n).transpose(1, 2)
        ctx.save_for_backward(q.permute(1, 0, 2, 3) * dim**-0.5, k.transpose(0, 1), v.transpose(0, 1), out, sums)
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, sums = ctx.saved_tensors
        grad = grad.transpose(0, 1)
        inner = (grad * out).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _blocks(q, k):
            q_rows, grad_rows = _flat(q[:, rows]), _flat(grad[:, rows])
            scores = _scores(q[:, rows], k[:, keys])
            weights = scores.sub_(sums[:, rows].reshape(*scores.shape[:2], 1)).exp_().to(v.dtype)
            dv[:, keys] += torch.bmm(weights.transpose(1, 2), grad_rows)
            scores = torch.bmm(grad_rows, v[:, keys].transpose(1, 2))
            scores.sub_(inner[:, rows].reshape(*scores.shape[:2], 1)).mul_(weights)
            dq[:, rows] = torch.bmm(scores, k[:, keys]).view_as(dq[:, rows])
            dk[:, keys] += torch.bmm(scores.transpose(1, 2), q_rows)
        return (dq * q.shape[-1] ** -0.5).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


ATTENTION_ROWS = 128


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the keys that its last row sees."""
    n, m = q.shape[1], k.shape[1]
    for start in range(0, n, ATTENTION_ROWS):
        end = min(start + ATTENTION_ROWS, n)
        yield slice(start, end), slice(0, m - n + end)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """fp32 scores [kv, r * group, j] of r scaled query rows [kv, r, group, D] that end where the j keys end."""
    r, group, j = q.shape[1], q.shape[2], k.shape[1]
    scores = torch.bmm(_flat(q), k.transpose(1, 2)).float()
    scores.view(-1, r, group, j)[..., j - r :].masked_fill_(_future(r, r, q.device)[:, None], float("-inf"))
    return scores


def _future(n: int, m: int, device: torch.device) -> Tensor:
    """True [n, m] where the last n of m positions must not look."""
    return torch.ones(n, m, dtype=torch.bool, device=device).triu_(1 + m - n)


def _flat(x: Tensor) -> Tensor:
    """[kv, rows, group, D] -> [kv, rows * group, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_theta(config) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0))


def pick_dtype(device: torch.device | str) -> torch.dtype:
    """The compute dtype for this device: bf16 where its matrix products are clearly faster, else fp32.

    Measured in about 0.1 s on a CPU: those without bf16 matrix units (AMX) run bf16 products slower than fp32 ones.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    seconds = {torch.float32: [], torch.bfloat16: []}
    operands = {dtype: (torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)) for dtype in seconds}
    for _ in range(8):
        for dtype, (x, w) in operands.items():
            start = time.perf_counter()
            F.linear(x, w)
            seconds[dtype].append(time.perf_counter() - start)
    return torch.bfloat16 if 1.5 * min(seconds[torch.bfloat16]) < min(seconds[torch.float32]) else torch.float32


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- Hugging Face folders ----------------------------------------------------------------------------------------


def load_config(path: str | os.PathLike):
    """The HF config of a folder; UsageError for families this host does not run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(check_hf_folder(path), trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise UsageError(f"{path}: model type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise UsageError(f"{path}: rope type {rope!r} is not supported (only 'default')")
    return config


def load_model(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """The model of an HF folder. `dtype` is the compute dtype (default: the faster one here); parameters are fp32."""
    config = load_config(path)
    device = torch.device(device) if device is not None else pick_device()
    with torch.device("meta"):
        model = Transformer(config, dtype or pick_dtype(device))
    model.to_empty(device=device)
    load_weights(model, path)
    return model


@torch.no_grad()
def load_weights(model: Transformer, path: str | os.PathLike) -> None:
    """Copy the weights of an HF folder of the same architecture into `model`, in place."""
    reader = HfWeights(Path(path))
    for name, parameter in model.named_parameters():
        value = read_parameter(reader, name, model.config)
        if value.shape != parameter.shape:
            raise UsageError(f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(value)
    model.weights_changed()


class HfWeights:
    """Tensors of a safetensors folder by name, read on demand."""

    def __init__(self, path: Path):
        self.path = path
        self.files = {}
        for file in weight_files(path):
            handle = safe_open(path / file, framework="pt")
            self.files.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UsageError(f"{self.path}: the weights have no tensor {name!r}")
        return self.files[name].get_tensor(name).float()


def read_parameter(weights: HfWeights, name: str, config) -> Tensor:
    """One parameter, by its Megatron name, out of HF tensors."""
    if name in SINGLE:
        return weights[SINGLE[name]]
    _, _, index, rest = name.split(".", 3)
    layer = f"model.layers.{index}."
    if rest in PER_LAYER:
        return weights[layer + PER_LAYER[rest]]
    kind = rest.rsplit(".", 1)[1]
    if rest.startswith("mlp.linear_fc1."):
        return torch.cat([weights[f"{layer}mlp.{part}_proj.{kind}"] for part in ("gate", "up")])
    parts = [weights[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
    kv = config.num_key_value_heads
    return torch.cat([p.view(kv, -1, head_dim(config), *p.shape[1:]) for p in parts], dim=1).flatten(0, 2)


def hf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their HF names, in the compute dtype."""
    config = model.config
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(model.compute_dtype)
        if name in SINGLE:
            yield SINGLE[name], value.contiguous()
            continue
        _, _, index, rest = name.split(".", 3)
        layer = f"model.layers.{index}."
        if rest in PER_LAYER:
            yield layer + PER_LAYER[rest], value.contiguous()
            continue
        kind = rest.rsplit(".", 1)[1]
        if rest.startswith("mlp.linear_fc1."):
            for part, half in zip(("gate", "up"), value.chunk(2), strict=True):
                yield f"{layer}mlp.{part}_proj.{kind}", half.contiguous()
            continue
        group = config.num_attention_heads // config.num_key_value_heads
        grouped = value.view(config.num_key_value_heads, group + 2, head_dim(config), *value.shape[1:])
        for part, piece in zip("qkv", grouped.split([group, 1, 1], dim=1), strict=True):
            yield f"{layer}self_attn.{part}_proj.{kind}", piece.flatten(0, 2).contiguous()


SINGLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
PER_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def save_hf(model: Transformer, out_dir: str | os.PathLike, source_dir: str | os.PathLike) -> Path:
    """Write an HF folder: weights in the compute dtype, config and tokenizer from `source_dir`. All or nothing."""
    out, source = Path(out_dir), Path(source_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file(dict(hf_tensors(model)), work / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(model.compute_dtype).removeprefix("torch.")
        (work / "config.json").write_text(json.dumps(config, indent=2))
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copy(source / name, work / name)
        work.chmod(0o755)
        replace_folder(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` at `target`; an older folder there survives until the new one is in place."""
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / "folder")
    os.replace(new, target)
    shutil.rmtree(old)

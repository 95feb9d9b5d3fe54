"""The language model of the one-machine host: Llama, Qwen2 and Qwen3 decoders, for the trainer and the engine alike.

Trainer and engine run the same layers over the same parameters, so their log-probs agree and new weights need no copy.
Parameters carry Megatron's names and layouts (fused QKV per KV group, fused gate and up projection), so that slime's
`--only-train-params-name-list` and `--freeze-params-name-list` select the same parameters in both hosts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slime_local import kernels
from slime_local.attention import attend_paths
from slime_local.errors import UsageError, one_line
from slime_local.hf_folder import TOKENIZER_FILES, ModelConfig, load_config, read_safetensors_header, weight_files
from slime_local.prefixes import SharedPrefixes, share_prefixes


class Operand:
    """A weight as matrix products read it, in the dtype of the products.

    On a CPU a kept copy is in the panels of `kernels.py`, or without those in oneDNN's own layout, in which products
    of 2 to 32 rows were measured two to four times faster than those of `F.linear`. `drop` gives the memory back and
    must follow every change of the weight.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: Tensor | None = None
        self.form: tuple | None = None

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, n_in] -> [T, n_out] for a weight [n_out, n_in], in the dtype of x."""
        bias = None if bias is None else bias.to(x.dtype)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            y = Product.apply(x, weight, self)
            return y if bias is None else y + bias
        if self.is_compiled(x):
            return kernels.product(x, self.panels(weight), len(weight), bias)
        if self.form != (x.device,):
            self.kept, self.form = _packed(weight.detach().to(self.dtype)), (x.device,)
        rounded, added = x.to(self.dtype), None if bias is None else bias.to(self.dtype)
        if self.kept.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(rounded, self.kept, added, "none", [], "").to(x.dtype)
        return F.linear(rounded, self.kept, added).to(x.dtype)

    def learn(self, x: Tensor, weight: Tensor) -> Tensor:
        """`multiply` inside a function that has its own gradient. In bf16 it is the engine's product to the bit; in
        fp32 oneDNN is as fast and needs no copy of a weight that is about to change."""
        if self.dtype == torch.bfloat16 and self.is_compiled(x):
            return kernels.product(x, self.panels(weight), len(weight))
        return _product(x.to(self.dtype), weight.to(self.dtype)).to(x.dtype)

    def is_compiled(self, x: Tensor) -> bool:
        return kernels.available(x.dtype, self.dtype, x.device)

    def panels(self, weight: Tensor) -> Tensor:
        """The weight as `kernels.product` reads it."""
        if self.form != ("panels",):
            self.kept, self.form = kernels.panels(weight.detach(), self.dtype), ("panels",)
        return self.kept

    def drop(self) -> None:
        self.kept = self.form = None


# The number of rows that the layout is made for. Any other number works too; small ones gave slower layouts.
PACKED_FOR_ROWS = 1024


def _packed(weight: Tensor) -> Tensor:
    """The weight in oneDNN's layout where there is one."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, n_in] times weight [n_out, n_in]: in fp32 on a CPU by oneDNN, measured 15 % faster than `F.linear`."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Product(torch.autograd.Function):
    """A product with its gradients, all in the operand's dtype: x [T, n_in], weight [n_out, n_in] -> [T, n_out].
    x is kept for the gradient as it was multiplied."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, operand: Operand) -> Tensor:
        ctx.save_for_backward(x.to(operand.dtype), weight)
        return operand.learn(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = ctx.needs_input_grad
        rounded = grad.to(gradient_dtype(x.dtype, x.device))
        by_x = _by_input(rounded, weight).to(grad.dtype) if to_x else None
        return by_x, _by_weight(rounded, x.to(rounded.dtype), weight) if to_weight else None, None


def gradient_dtype(products: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the products of a gradient: that of the others, or fp32 where only the kernels are fast in bf16."""
    return products if kernels.multiplies_bf16(device) else torch.float32


def _by_input(grad: Tensor, weight: Tensor) -> Tensor:
    return _product(grad, weight.to(grad.dtype).t())


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """No faster by oneDNN's own call."""
    return (grad.t() @ x).to(weight.dtype)


class GatedProduct(torch.autograd.Function):
    """silu(gate) * up, times a weight [n_out, F]: gate_up [T, 2 F] -> [T, n_out]. Only gate_up is kept, and its memory
    is the gradient's: backward can be called once."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor, operand: Operand) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.dtype = operand.dtype
        return operand.learn(gated(gate_up), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, weight = ctx.saved_tensors
        rounded = grad.to(gradient_dtype(ctx.dtype, grad.device))
        by_gate_up, product = gated_backward(gate_up, _by_input(rounded, weight).to(grad.dtype))
        to_weight = _by_weight(rounded, product.to(rounded.dtype), weight) if ctx.needs_input_grad[1] else None
        return by_gate_up, to_weight, None


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 F] -> [T, F]."""
    if kernels.available(gate_up.dtype, gate_up.dtype, gate_up.device):
        return kernels.gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gated` by gate_up, given that by its result, and its result once more; in their memory where
    there are kernels."""
    if kernels.available(gate_up.dtype, gate_up.dtype, gate_up.device):
        return kernels.gate_backward(gate_up, grad)
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    by_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((by_gate, grad * silu), dim=-1), silu * up


class Linear(nn.Module):
    """A projection whose weight is kept in fp32 and multiplied in `dtype`."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, bias: bool = False, norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.layer_norm_weight = nn.Parameter(torch.empty(n_in)) if norm else None
        self.operand = Operand(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.operand.multiply(x, self.weight, self.bias)

    def panels(self) -> Tensor:
        return self.operand.panels(self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        bias = config.model_type == "qwen2"
        width = self.kv_heads * (self.group + 2) * self.head_dim
        self.linear_qkv = Linear(config.hidden_size, width, dtype, bias=bias, norm=True)
        self.linear_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size, dtype)
        if config.model_type == "qwen3":
            self.q_layernorm = Norm(self.head_dim)
            self.k_layernorm = Norm(self.head_dim)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> q [T, kv_heads, group, head_dim], k and v [T, kv_heads, head_dim], positions applied."""
        x = rms_norm(x, self.linear_qkv.layer_norm_weight, self.eps)
        qkv = self.linear_qkv(x).view(-1, self.kv_heads, self.group + 2, self.head_dim)
        cos, sin = cos[:, None, None], sin[:, None, None]
        if hasattr(self, "q_layernorm"):
            q, k, v = qkv.split((self.group, 1, 1), dim=2)
            q = rotate(rms_norm(q, self.q_layernorm.weight, self.eps), cos, sin)
            k = rotate(rms_norm(k, self.k_layernorm.weight, self.eps), cos, sin)
        else:
            qk, v = qkv.split((self.group + 1, 1), dim=2)
            q, k = rotate(qk, cos, sin).split((self.group, 1), dim=2)
        return q, k.squeeze(2), v.squeeze(2)


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.linear_fc1 = Linear(config.hidden_size, 2 * config.intermediate_size, dtype, norm=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.linear_fc1(rms_norm(x, self.linear_fc1.layer_norm_weight, self.eps))
        if torch.is_grad_enabled() and gate_up.requires_grad:
            return GatedProduct.apply(gate_up, self.linear_fc2.weight, self.linear_fc2.operand)
        return self.linear_fc2(gated(gate_up))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.self_attention = Attention(config, dtype)
        self.mlp = Mlp(config, dtype)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x [T, H] after attention output `attended` [T, heads * head_dim]."""
        x = x + self.self_attention.linear_proj(attended)
        return x + self.mlp(x)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Module()
        self.word_embeddings.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, dtype) for _ in range(config.num_hidden_layers))
        self.final_layernorm = Norm(config.hidden_size)


class Transformer(nn.Module):
    """A decoder over packed sequences. fp32 parameters; matrix products with weights in `product_dtype` (None: as all
    else), all else in `compute_dtype`."""

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, product_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.product_dtype = product_dtype or compute_dtype
        self.embedding = Embedding(config)
        self.decoder = Decoder(config, self.product_dtype)
        if not config.tie_word_embeddings:
            self.output_layer = Linear(config.hidden_size, config.vocab_size, self.product_dtype)
        self.head = Operand(self.product_dtype)
        self.version = 0  # of the weights: counts the calls of weights_changed

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
        dim = self.config.head_dim
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float()[:, None] * (1.0 / self.config.rope_theta ** (steps / dim))
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)

    def forward(self, tokens: Tensor, lengths: list[int], lower: Tensor | None = None) -> Tensor:
        """Packed token ids [T] of sequences of `lengths` (sum T) -> final-norm hidden states [T, H].

        `lower` [T, H]: what `run_frozen` has made of the same tokens; the layers above go on from it. Prefixes that
        sequences share are computed once: dialogues share the system prompt, the samples of a group their first
        turns. The result is that of separate forward passes, gradients included.
        """
        shared = share_prefixes(tokens, lengths)
        if lower is None:
            x = self._run(self.decoder.layers, self.embed(shared.tokens), shared)
        else:
            x = self._run(self.decoder.layers[self.frozen_layers :], shared.drop_copies(lower), shared)
        return shared.restore(self.final_norm(x))

    @torch.no_grad()
    def run_frozen(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Packed token ids [T] -> the residual stream [T, H] after the frozen layers, which do not learn."""
        shared = share_prefixes(tokens, lengths)
        return shared.restore(self._run(self.decoder.layers[: self.frozen_layers], self.embed(shared.tokens), shared))

    @property
    def frozen_layers(self) -> int:
        """How many layers, from the first on, have no trained parameter in or below them."""
        if self.embedding.word_embeddings.weight.requires_grad:
            return 0
        trained = (any(p.requires_grad for p in layer.parameters()) for layer in self.decoder.layers)
        return next((i for i, found in enumerate(trained) if found), len(self.decoder.layers))

    def _run(self, layers: Iterable[Layer], x: Tensor, shared: SharedPrefixes) -> Tensor:
        """The residual stream [U, H] after `layers`."""
        cos, sin = self.rope(shared.positions)
        for layer in layers:
            q, k, v = layer.self_attention.qkv(x, cos, sin)
            x = layer.finish(x, attend_paths(q, k, v, shared.paths, self.product_dtype))
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.decoder.final_layernorm.weight, self.config.rms_norm_eps)

    @property
    def output_weight(self) -> Tensor:
        """[V, H]: the output layer's, or the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.embedding.word_embeddings.weight if tied else self.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> logits [N, V] in fp32."""
        if not self.config.tie_word_embeddings:
            return self.output_layer(hidden).float()
        return self.head.multiply(hidden, self.embedding.word_embeddings.weight).float()

    def weights_changed(self, trained_only: bool = False) -> None:
        """Drop the kept copies of the weights, or of those that are trained; to be called after every change."""
        self.version += 1
        if not (trained_only and not self.output_weight.requires_grad):
            self.head.drop()
        for module in self.modules():
            if isinstance(module, Linear) and not (trained_only and not module.weight.requires_grad):
                module.operand.drop()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32 whatever the dtype of x."""
    if kernels.available(x.dtype, x.dtype, x.device):
        return KernelNorm.apply(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class KernelNorm(torch.autograd.Function):
    """`rms_norm` that keeps nothing but x; torch's keeps the normed x too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return kernels.norm(x, weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *kernels.norm_backward(*ctx.saved_tensors, grad, ctx.eps), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split convention of Hugging Face checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pick_dtypes(device: torch.device | str) -> tuple[torch.dtype, torch.dtype]:
    """(compute dtype, product dtype) for this device: bf16 where its units multiply bf16 faster, else fp32.

    On a CPU whose vector units do (AVX512-BF16), the compiled kernels multiply in bf16 at twice the rate of fp32, and
    everything else stays fp32; for matrix units (AMX) torch's own bf16 is the faster one."""
    device = torch.device(device)
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, torch.bfloat16
    fast = kernels.available(torch.float32, torch.bfloat16, device)
    return torch.float32, torch.bfloat16 if fast else torch.float32


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- Hugging Face folders ----------------------------------------------------------------------------------------


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    product_dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of an HF folder, with fp32 parameters. The dtypes are Transformer's (default: the fastest here)."""
    config = load_config(path)
    check_size(config, Path(path))
    device = torch.device(device) if device is not None else pick_device()
    try:
        with torch.device("meta"):
            model = Transformer(config, *((dtype, product_dtype) if dtype else pick_dtypes(device)))
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: its config.json describes no model ({one_line(error)})") from error
    model.to_empty(device=device)
    load_weights(model, path)
    return model


def check_size(config, path: Path) -> None:
    """Raises UsageError where the config speaks of more layers or a larger vocabulary than the weights have: a model
    of that size must not be built to find it out."""
    tensors = {name: t for file in weight_files(path) for name, t in read_safetensors_header(path / file).items()}
    layers = {name.split(".")[2] for name in tensors if re.match(r"model\.layers\.\d+\.", name)}
    embedding = tensors.get("model.embed_tokens.weight", {}).get("shape")
    found = {"num_hidden_layers": len(layers), "[vocab_size, hidden_size]": embedding}
    said = {"num_hidden_layers": config.num_hidden_layers}
    said["[vocab_size, hidden_size]"] = [config.vocab_size, config.hidden_size]
    for name, value in said.items():
        if value != found[name]:
            raise UsageError(f"{path}: config.json says {name} {value}, the weights have {found[name]}")


@torch.no_grad()
def load_weights(model: Transformer, path: str | os.PathLike) -> None:
    """Copy the weights of an HF folder of the same architecture into `model`, in place."""
    reader = HfWeights(Path(path))
    for name, parameter in model.named_parameters():
        try:
            value = read_parameter(reader, name, model.config)
        except RuntimeError as error:  # heads that the weights do not have
            raise UsageError(f"{path}: config.json does not fit the weights of {name} ({one_line(error)})") from error
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
            try:
                handle = safe_open(path / file, framework="pt")
            except SafetensorError as error:
                raise UsageError(f"{path / file} is damaged ({one_line(error)}): copy or save it again") from error
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
    return torch.cat([p.view(kv, -1, config.head_dim, *p.shape[1:]) for p in parts], dim=1).flatten(0, 2)


def hf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their HF names, in the product dtype."""
    config = model.config
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(model.product_dtype)
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
        grouped = value.view(config.num_key_value_heads, group + 2, config.head_dim, *value.shape[1:])
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
    """Write an HF folder: weights in the product dtype, config and tokenizer from `source_dir`. All or nothing: a
    folder that is there is replaced (checks.py refuses one with other files)."""
    out, source = Path(out_dir), Path(source_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file(dict(hf_tensors(model)), work / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(model.product_dtype).removeprefix("torch.")
        (work / "config.json").write_text(json.dumps(config, indent=2))
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copy(source / name, work / name)
        work.chmod(0o755)
        replace_folder(work, out)
    except SafetensorError as error:  # its words for a full disk
        raise OSError(f"{out}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def remove_leftovers(out: Path) -> None:
    """The temporary folders beside `out` that a killed `save_hf` has left."""
    name = re.compile(rf"\.{re.escape(out.name)}-(old-)?[a-z0-9_]{{8}}")
    for folder in out.parent.iterdir():
        if name.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` at `target`; an older folder there survives until the new one is in place."""
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / "folder")
    os.replace(new, target)
    shutil.rmtree(old)

"""The layers of one engine step in one call of `kernels.c`: new tokens of all requests over what they have kept.

    decoder = CompiledDecoder(model)             # on a CPU; `fits(model)` says whether it can
    x = decoder(x, cos, sin, kept, starts, lengths, plan)

Attention is planned here, as parts: rows (new tokens) that attend over the same keys. A shared prefix is one part for
all its rows; the tokens that a request adds see what it kept, and causally each other.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime_local import kernels
from slime_local.model import Transformer
from slime_local.prefixes import Segment

# Most rows of a part: with more, the threads would have too few parts to share fairly.
PART_ROWS = 64


class _Model(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("layers", "hidden", "kv_heads", "group", "dim", "ffn", "in_bf16")]
    _fields_ += [("eps", ctypes.c_double), ("layer", ctypes.c_void_p)]


class _Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "parts")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("part", "place", "results_of", "results", "cos", "sin")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "normed", "qkv", "attended", "gate_up", "gate")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("rounded", "partial", "sums")]


@dataclass
class Span:
    """Rows that attend over positions start..end of the request `owner`; row r of them up to start + visible + r."""

    owner: int
    rows: slice
    start: int
    end: int
    visible: int


def fits(model: Transformer) -> bool:
    """Whether the kernels can run this model here."""
    dim = model.decoder.layers[0].self_attention.head_dim
    fitting = dim % kernels.LANES == 0 and dim <= kernels.MAX_DIM
    return fitting and kernels.available(model.compute_dtype, model.product_dtype, model.device)


class CompiledDecoder:
    def __init__(self, model: Transformer):
        self.model = model
        self.weights: list[Tensor | None] = []
        self.version = -1
        config, attention = model.config, model.decoder.layers[0].self_attention
        self.sizes = (config.num_hidden_layers, config.hidden_size, attention.kv_heads, attention.group)
        self.sizes += (attention.head_dim, config.intermediate_size)
        self.in_bf16 = model.product_dtype == torch.bfloat16

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        kept: list[Tensor],
        starts: list[int],
        lengths: list[int],
        plan: list[Segment],
    ) -> Tensor:
        """The residual stream x [T, H] after the last layer, in place; the arguments are those of KeptAttention, cos
        and sin [T, D / 2]. kept: in the product dtype, a whole number of panels long, in the order of kernels.c."""
        table = np.array([0 if w is None else w.data_ptr() for w in self._weights()], np.uint64)
        model = _Model(*self.sizes, self.in_bf16, self.model.config.rms_norm_eps, table.ctypes.data)
        step, memory = self._step(x, cos, sin, kept, starts, lengths, plan)
        kernels.library().decode(ctypes.byref(model), ctypes.byref(step), ctypes.c_int64(torch.get_num_threads()))
        del memory
        return x

    def drop(self) -> None:
        """Let go of the panels, which would else live until the next step."""
        self.weights, self.version = [], -1

    def _weights(self) -> list[Tensor | None]:
        """What the struct `Layer` of kernels.c points to, layer after layer."""
        if self.version != self.model.version:
            self.weights = [weight for layer in self.model.decoder.layers for weight in _layer_weights(layer)]
            self.version = self.model.version
        return self.weights

    def _step(self, x, cos, sin, kept, starts, lengths, plan) -> tuple[_Step, list]:
        """The struct, and what must live as long as it is used."""
        _, hidden, kv_heads, group, dim, ffn = self.sizes
        rows = len(x)
        spans = list(_spans(starts, lengths, plan))
        parts, results_of, results = _parts(kept, spans, rows)
        new = zip(kept, starts, lengths, strict=True)
        places = [(kv.data_ptr(), kv.stride(2), i) for kv, start, n in new for i in range(start, start + n)]
        tables = [parts, np.array(places, np.int64), results_of, results]
        heads = kv_heads * group
        widths = (hidden, (heads + 2 * kv_heads) * dim, heads * dim, 2 * ffn, ffn)
        scratch = [x.new_empty(rows, width) for width in widths]
        scratch.append(x.new_empty(rows * (max(widths) + 1) * self.in_bf16))
        scratch += [x.new_empty(len(results), heads, dim), x.new_empty(len(results), heads)]
        tensors = [cos.contiguous(), sin.contiguous(), x, *scratch]
        pointers = [table.ctypes.data for table in tables] + [tensor.data_ptr() for tensor in tensors]
        return _Step(rows, len(parts), *pointers), [tables, tensors]


def _layer_weights(layer) -> list[Tensor | None]:
    attention, mlp = layer.self_attention, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_layernorm", "k_layernorm")]
    qkv = attention.linear_qkv
    return [
        qkv.layer_norm_weight,
        qkv.panels(),
        qkv.bias,
        *(None if norm is None else norm.weight for norm in norms),
        attention.linear_proj.panels(),
        mlp.linear_fc1.layer_norm_weight,
        mlp.linear_fc1.panels(),
        mlp.linear_fc2.panels(),
    ]


def _spans(starts: list[int], lengths: list[int], plan: list[Segment]) -> Iterator[Span]:
    """All that is attended to: `plan` for the requests with one new token, which come first, then the others."""
    for segment in plan:
        yield Span(segment.rows.start, segment.rows, segment.start, segment.end, segment.end - segment.start)
    row = lengths.count(1)
    for owner, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length > 1:
            rows = slice(row, row + length)
            row = rows.stop
            if start:
                yield Span(owner, rows, 0, start, start)
            yield Span(owner, rows, start, start + length, 1)


def _parts(kept: list[Tensor], spans: list[Span], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The structs `Part` of kernels.c, and its `results_of` and `results`."""
    parts, found, result = [], [[] for _ in range(rows)], 0
    for owner, seen_by, start, keys, visible in itertools.chain.from_iterable(map(_cut, spans)):
        kv = kept[owner]
        parts.append((kv.data_ptr(), kv.stride(2), start, keys, visible, seen_by.start, len(seen_by), result))
        for row in seen_by:
            found[row].append(result)
            result += 1
    results_of = np.cumsum([0, *map(len, found)], dtype=np.int64)
    return np.array(parts, np.int64), results_of, np.array(list(itertools.chain.from_iterable(found)), np.int64)


def _cut(span: Span) -> Iterator[tuple[int, range, int, int, int]]:
    """Pieces (owner, rows, first key, keys, visible) of at most PART_ROWS rows that see something of the keys, which
    are in one of the blocks that kernels.c reads."""
    most = kernels.library().part_keys()
    for first in range(span.rows.start, span.rows.stop, PART_ROWS):
        end = min(first + PART_ROWS, span.rows.stop)
        for block in range(span.start // most * most, span.end, most):
            start = max(block, span.start)
            # A row sees visible + row - rows.start keys of the span.
            row = max(first, span.rows.start + start - span.start + 1 - span.visible)
            if row < end:
                visible = span.visible + row - span.rows.start - (start - span.start)
                yield span.owner, range(row, end), start, min(block + most, span.end) - start, visible

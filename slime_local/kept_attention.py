"""Attention of one engine step: new tokens over the keys and values that their requests have kept.

What is the same in every layer (views, rows, how the parts are joined) is made once a step:

    attention = KeptAttention(kept, starts, lengths, plan)
    attended = attention(layer, q, k, v)         # writes k and v, then attends

Keys are read in parts: a prefix that several requests share once for all of them. The parts of a row are joined by
their log-sum-exps (FlashAttention, arXiv 2205.14135, section 3.1), so the result is that of plain attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_local.attention import attend_causal
from slime_local.prefixes import Segment


@dataclass
class Part:
    """`rows` of the step attend over keys[layer] and values[layer], each [kv_heads, n, D]."""

    rows: slice
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class KeptAttention:
    """One step over requests with single new tokens (`plan` is theirs, from `decode_plan`), then those with more.

    kept: per request [layers, 2, kv_heads, capacity, D]; starts, lengths: its new tokens' first position and number.
    """

    def __init__(self, kept: list[Tensor], starts: list[int], lengths: list[int], plan: list[Segment]):
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        self.lengths = lengths
        self.written = _by_layer([kv[:, :, :, s:e] for kv, s, e in zip(kept, starts, ends, strict=True)])
        self.singles = lengths.count(1)
        self.parts = [Part(s.rows, *_views(kept[s.rows.start], s.start, s.end)) for s in plan]
        self.parts_of = _parts_of_rows(self.parts, self.singles, kept[0].device)
        # Requests with several new tokens see what they kept before as a part, and their new tokens causally.
        row, self.longer = self.singles, []
        for kv, start, length in zip(kept[row:], starts[row:], lengths[row:], strict=True):
            rows = slice(row, row + length)
            row = rows.stop
            self.longer.append(Part(rows, *_views(kv, 0, start)) if start else Part(rows, (), ()))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, kv_heads, group, D]; k and v [T, kv_heads, D] -> [T, kv_heads * group * D]."""
        new = torch.stack((k, v)).transpose(1, 2).split(self.lengths, dim=2)
        torch._foreach_copy_(self.written[layer], new)
        out = [self._single(layer, q[: self.singles])] if self.singles else []
        for part in self.longer:
            rows = q[part.rows], k[part.rows], v[part.rows]
            out.append(
                attend_append(*rows, part.keys[layer], part.values[layer]) if part.keys else attend_causal(*rows)
            )
        return out[0] if len(out) == 1 else torch.cat(out)

    def _single(self, layer: int, q: Tensor) -> Tensor:
        found = [_attend(q[part.rows], part.keys[layer], part.values[layer]) for part in self.parts]
        if self.parts_of is None:
            return torch.cat([out for out, _ in found]).reshape(len(q), -1)
        return _join(*zip(*found, strict=True), self.parts_of).reshape(len(q), -1)


def _views(kv: Tensor, start: int, end: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values at start..end of every layer, each [kv_heads, n, D]."""
    cut = kv[:, :, :, start:end]
    return cut[:, 0].unbind(), cut[:, 1].unbind()


def _by_layer(views: list[Tensor]) -> list[list[Tensor]]:
    return [list(layer) for layer in zip(*(view.unbind() for view in views), strict=True)]


def _parts_of_rows(parts: list[Part], n: int, device: torch.device) -> Tensor | None:
    """For each of n rows the places of its parts' results, filled up with the number of all: [n, most parts of a row].

    None when each row has one part, in order."""
    places: list[list[int]] = [[] for _ in range(n)]
    count = 0
    for part in parts:
        for row in range(part.rows.start, part.rows.stop):
            places[row].append(count)
            count += 1
    if count == n:
        return None
    most = max(map(len, places))
    return torch.tensor([row + [count] * (most - len(row)) for row in places], device=device)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """m queries [m, kv, group, D], all over k and v [kv, n, D] -> outputs like q, log-sum-exps [m, kv, group]."""
    m, kv, group, dim = q.shape
    if m == 1:
        return _with_sums(q, k[None], v[None])
    rows = q.transpose(0, 1).reshape(1, kv, m * group, dim)
    out, sums = _with_sums(rows, k[None], v[None])
    return out.view(kv, m, group, dim).transpose(0, 1), sums.view(kv, m, group).transpose(0, 1)


def _with_sums(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of q [b, heads, r, D] over k and v [b, heads, n, D] -> outputs like q, log-sum-exps [b, heads, r]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).float()
    sums = scores.logsumexp(-1)
    return torch.matmul((scores - sums[..., None]).exp().to(v.dtype), v), sums


def _join(parts: list[Tensor], sums: list[Tensor], parts_of: Tensor) -> Tensor:
    """Attention outputs [.., kv, group, D] over parts of the keys, with log-sum-exps [.., kv, group] -> [n, kv, ...].

    parts_of [n, m]: each row's m parts, those that it lacks pointing behind the last.
    """
    nothing = sums[0].new_full((1, *sums[0].shape[1:]), float("-inf"))
    weights = torch.cat((*sums, nothing))[parts_of].softmax(1)
    out = torch.cat((*parts, torch.zeros_like(parts[0][:1])))[parts_of]
    return (out * weights[..., None]).sum(1).to(out.dtype)


def attend_append(q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor) -> Tensor:
    """n new tokens over the kept keys and, causally, each other: q [n, kv, group, D], k and v [n, kv, D], kept_k and
    kept_v [kv, start, D] -> [n, kv * group * D]."""
    n, kv, group, dim = q.shape
    if q.device.type != "cpu":
        return attend_causal(q, *(torch.cat((old.transpose(0, 1), new)) for old, new in ((kept_k, k), (kept_v, v))))
    before, before_sums = _attend(q, kept_k, kept_v)
    heads = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
    new_k, new_v = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
    own, own_sums = _with_sums(heads, new_k, new_v, causal=True)
    own = own.view(kv, group, n, dim).permute(2, 0, 1, 3)
    own_sums = own_sums.view(kv, group, n).permute(2, 0, 1)
    share = (before_sums - own_sums).sigmoid()[..., None].to(own.dtype)
    return torch.lerp(own, before, share).reshape(n, -1)

"""Attention: over packed sequences for the trainer, over kept keys and values for the engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_local.prefixes import Segment


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


def attend_kept(q: Tensor, kv: list[Tensor], plan: list[Segment]) -> Tensor:
    """One query a sequence over its kept keys and values, a prefix that several share read once for all of them.

    q [B, kv_heads, group, D]; kv: per sequence [2, kv_heads, capacity, D] with the new token written; plan: from
    `decode_plan` -> [B, kv_heads * group * D]. The parts are joined by their log-sum-exp (FlashAttention, arXiv
    2205.14135, section 3.1), so the result is that of plain attention.
    """
    parts = [_attend_segment(q[s.rows], *kv[s.rows.start][:, :, s.start : s.end]) for s in plan]
    out = torch.cat([part for part, _ in parts])
    if len(parts) > len(q):
        rows = torch.cat([torch.arange(s.rows.start, s.rows.stop, device=q.device) for s in plan])
        out = _join(out, torch.cat([sums for _, sums in parts]), rows, len(q))
    return out.reshape(len(q), -1)


def _attend_segment(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """m queries [m, kv, group, D], all over k and v [kv, n, D] -> outputs like q, log-sum-exps [m, kv, group]."""
    m, kv, group, dim = q.shape
    rows = q if m == 1 else q.transpose(0, 1).reshape(1, kv, m * group, dim)
    if q.device.type == "cpu":
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k[None], v[None])
    else:
        scores = torch.matmul(rows * dim**-0.5, k.transpose(1, 2)).float()
        sums = scores.logsumexp(-1)
        out = torch.matmul((scores - sums[..., None]).exp().to(v.dtype), v)
    if m == 1:
        return out, sums
    return out.view(kv, m, group, dim).transpose(0, 1), sums.view(kv, m, group).transpose(0, 1)


def _join(parts: Tensor, sums: Tensor, rows: Tensor, n: int) -> Tensor:
    """Attention outputs [P, kv, group, D] over parts of the keys, with log-sum-exps [P, kv, group] -> [n, ...].

    rows [P]: the query that each part belongs to.
    """
    index = rows[:, None, None].expand_as(sums)
    top = torch.full_like(sums[:n], float("-inf")).scatter_reduce_(0, index, sums, "amax")
    weights = (sums - top[rows]).exp()
    total = torch.zeros_like(top).index_add_(0, rows, weights)
    out = parts.new_zeros(n, *parts.shape[1:], dtype=torch.float32)
    out.index_add_(0, rows, parts.float() * weights[..., None])
    return (out / total[..., None]).to(parts.dtype)


def attend_one(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """n queries [n, kv, group, D] at positions start.. over k and v [1, kv, start + n, D] -> [n, kv * group * D]."""
    n, kv, group, dim = q.shape
    mask = None
    if start:
        mask = torch.ones(n, start + n, dtype=torch.bool, device=q.device).tril_(start)
    q = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not start, enable_gqa=group > 1)
    return out[0].transpose(0, 1).reshape(n, -1)

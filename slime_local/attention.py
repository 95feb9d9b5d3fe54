"""Attention over packed sequences; the engine's, over kept keys and values, is in `kept_attention`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_local import kernels


def attend_paths(
    q: Tensor, k: Tensor, v: Tensor, paths: list[list[slice]], dtype: torch.dtype | None = None
) -> Tensor:
    """Each segment attends causally over its path: q [U, kv, group, D], k and v [U, kv, D] -> [U, kv * group * D].
    dtype: of the matrix products (without kernels of those of the gradient only)."""
    sizes = [path[-1].stop - path[-1].start for path in paths]
    place = {path[-1].start: i for i, path in enumerate(paths)}
    # Split and not sliced: the gradients of slices would be summed.
    queries, keys, values = (x.split(sizes) for x in (q, k, v))
    out = []
    for i, path in enumerate(paths):
        parts = [place[span.start] for span in path]
        out.append(attend_causal(queries[i], _cat([keys[p] for p in parts]), _cat([values[p] for p in parts]), dtype))
    return _cat(out)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The last n positions of a sequence of m attend causally: q [n, kv, group, D], k and v [m, kv, D] -> [n, -1]."""
    (n, kv, group, dim), m = q.shape, len(k)
    if q.device.type == "cpu":
        return BlockAttention.apply(q, k, v, dtype or q.dtype).reshape(n, -1)
    q = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    mask = None if n == m else ~_future(n, m, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n == m, enable_gqa=group > 1)
    return out[0].transpose(0, 1).reshape(n, -1)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel of the CPU: q [1, heads, n, D], k and v [1, heads, m, D] -> out [1, heads, n, D] and the
    log-sum-exps [1, heads, n]. It reads all keys for every row unless n equals m: so in blocks of rows."""
    n, m = q.shape[2], k.shape[2]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if n == m:
        return fused(q, k, v, 0.0, True)
    parts = []
    for start in range(0, n, FUSED_ROWS):
        rows, keys = slice(start, min(start + FUSED_ROWS, n)), slice(0, m - n + min(start + FUSED_ROWS, n))
        size = (rows.stop - rows.start, keys.stop)
        mask = q.new_zeros(size).masked_fill_(_future(*size, q.device), float("-inf"))
        parts.append(fused(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask))
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(sums, 2)


class BlockAttention(torch.autograd.Function):
    """`attend_causal` for training on a CPU, where the fused kernel's backward was measured several times slower.

    Compiled where there are kernels, with products in `dtype`, as the engine's are. Otherwise the fused kernel runs
    forward; backward is plain matrix products over blocks of ATTENTION_ROWS queries, whose scores stay in cache and
    are computed again (FlashAttention, arXiv 2205.14135, section 3.1) as exactly; the others are in `dtype`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.compiled = dtype, kernels.attends(q, k, dtype)
        if ctx.compiled:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out, sums = kernels.attend(q, k, v, dtype)
        else:
            out, sums = _fused_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if ctx.compiled and ctx.dtype == torch.bfloat16:
            return *kernels.attend_backward(*ctx.saved_tensors, grad.contiguous()), None
        return *_attention_backward(*ctx.saved_tensors, grad, ctx.dtype), None


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [n, kv, group, D] and the log-sum-exps [n, kv, group]."""
    n, kv, group, dim = q.shape
    heads = q.permute(1, 2, 0, 3).reshape(1, kv * group, n, dim)
    keys, values = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
    out, sums = _fused(heads, keys, values)
    return out.view(kv, group, n, dim).permute(2, 0, 1, 3), sums.view(kv, group, n).permute(2, 0, 1)


def _attention_backward(q, k, v, out, sums, grad, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    q, out, grad, sums = (x.transpose(0, 1) for x in (q * q.shape[-1] ** -0.5, out, grad, sums))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    inner = (grad * out).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rounded_q, rounded_k, rounded_v, rounded_grad = (x.to(dtype) for x in (q, k, v, grad))
    for rows, keys in _blocks(q, k):
        q_rows, grad_rows = _flat(rounded_q[:, rows]), _flat(rounded_grad[:, rows])
        scores = _scores(q[:, rows], k[:, keys])
        weights = scores.sub_(sums[:, rows].reshape(*scores.shape[:2], 1)).exp_()
        dv[:, keys] += torch.bmm(weights.to(dtype).transpose(1, 2), grad_rows)
        scores = torch.bmm(grad_rows, rounded_v[:, keys].transpose(1, 2)).to(v.dtype)
        scores = scores.sub_(inner[:, rows].reshape(*scores.shape[:2], 1)).mul_(weights).to(dtype)
        dq[:, rows] = torch.bmm(scores, rounded_k[:, keys]).view_as(dq[:, rows])
        dk[:, keys] += torch.bmm(scores.transpose(1, 2), q_rows)
    return (dq * q.shape[-1] ** -0.5).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


FUSED_ROWS = 256
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

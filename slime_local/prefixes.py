"""Prefixes that sequences share: dialogues share the system prompt, the samples of a group their first turns.

The trainer computes a shared prefix once (`share_prefixes`), the engine reads its keys and values once for all the
requests that have it (`decode_plan`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def restore(self, x: Tensor) -> Tensor:
        """Rows of the unique tokens [U, ...] -> rows of the packed ones [T, ...]."""
        return x if self.gather is None else x[self.gather]

    def drop_copies(self, x: Tensor) -> Tensor:
        """Rows of the packed tokens [T, ...], alike where prefixes are -> those of the unique ones [U, ...]."""
        if self.gather is None:
            return x
        kept = self.gather.new_empty(len(self.tokens))
        kept[self.gather] = torch.arange(len(self.gather), device=kept.device)
        return x[kept]


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


@dataclass
class Segment:
    """Positions start..end that the sequences `rows` have in common."""

    rows: slice
    start: int
    end: int


# A prefix is read once for several requests when that spares reading so many tokens (about what one call costs).
MIN_SPARED_TOKENS = 128


def decode_plan(sequences: list[list[int]]) -> list[Segment]:
    """How to attend over kept sequences, sorted, with one new token each: every prefix that enough of them share once.

    The segments of one row cover its positions 0..len(sequence), the last of them (the new token) included.
    """
    plan: list[Segment] = []

    def grow(first: int, last: int, start: int) -> None:
        """Cover rows first..last, which share their first `start` tokens, from there on."""
        if first == last:
            plan.append(Segment(slice(first, first + 1), start, len(sequences[first]) + 1))
            return
        end = common_prefix(sequences[first], sequences[last])
        if (last - first) * (end - start) >= MIN_SPARED_TOKENS:
            plan.append(Segment(slice(first, last + 1), start, end))
            start = end
        for token, branch in itertools.groupby(range(first, last + 1), key=lambda row: sequences[row][end : end + 1]):
            rows = list(branch)
            if token:
                grow(rows[0], rows[-1], start)
            else:  # sequences that end here: only their new tokens are left
                for row in rows:
                    grow(row, row, start)

    if sequences:
        grow(0, len(sequences) - 1, 0)
    return plan

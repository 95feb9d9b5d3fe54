"""From the rollout's train data to optimizer steps and micro-batches.

slime's rules: the rollouts are taken in order, `global_batch_size` of them a step (a rollout may have several samples,
which stay together), a remainder is left out. The samples of a step are packed into micro-batches by what they share.
"""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_local.errors import UsageError
from slime_local.prefixes import common_prefix


@dataclass(eq=False)
class TrainSample:
    """One sequence to train on. Per-token tensors are float32 [response_length]; 0 where `loss_mask` is 0."""

    tokens: Tensor  # int64 [prompt + response]
    response_length: int
    loss_mask: Tensor  # float32 [response_length]
    reward: float
    rollout_id: int
    mask_total: float  # sum of the loss masks over every sample of this rollout
    rollout_log_probs: Tensor | None = None  # the engine's
    log_probs: Tensor | None = None  # the policy's when the rollout's training starts
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None  # with --use-rollout-entropy, where `log_probs` are computed
    advantages: Tensor | None = None
    returns: Tensor | None = None
    lower: Tensor | None = (
        None  # [prompt + response, H] after the frozen layers, where several passes go on from there
    )

    @property
    def has_loss(self) -> bool:
        return bool(self.loss_mask.any())


def train_samples(data: dict, device: torch.device | str = "cpu") -> list[TrainSample]:
    """Samples of one rollout, in order. `data` has the keys of `convert_samples_to_train_data`.

    Raises UsageError when a mask or log-prob list has not the response's length, or the first token is under the loss.
    """
    count = len(data["tokens"])
    ids = data.get("rollout_ids") or list(range(count))
    mask_sums = Counter()
    for rollout_id, mask in zip(ids, data["loss_masks"], strict=True):
        mask_sums[rollout_id] += float(sum(mask))
    rewards = data.get("rewards") or [0.0] * count
    log_probs = data.get("rollout_log_probs") or [None] * count
    samples = []
    for i in range(count):
        mask = torch.as_tensor(data["loss_masks"][i], dtype=torch.float32, device=device)
        sample = TrainSample(
            tokens=torch.as_tensor(data["tokens"][i], dtype=torch.int64, device=device),
            response_length=data["response_lengths"][i],
            loss_mask=mask,
            reward=rewards[i],
            rollout_id=ids[i],
            mask_total=mask_sums[ids[i]],
        )
        _check(sample, i)
        sample.rollout_log_probs = _masked(log_probs[i], mask, i)
        samples.append(sample)
    return samples


def _check(sample: TrainSample, index: int) -> None:
    if len(sample.loss_mask) != sample.response_length:
        raise UsageError(
            f"sample {index}: loss_mask has {len(sample.loss_mask)} entries, response_length is "
            f"{sample.response_length}; they must be equal"
        )
    if sample.response_length >= len(sample.tokens) and sample.has_loss and sample.loss_mask[0] != 0:
        raise UsageError(f"sample {index}: no token comes before the response, so its first token has no log-prob")


def _masked(log_probs: list[float] | Tensor | None, mask: Tensor, index: int) -> Tensor | None:
    if log_probs is None:
        return None
    values = torch.as_tensor(log_probs, dtype=torch.float32, device=mask.device)
    if values.shape != mask.shape:
        raise UsageError(f"sample {index}: rollout_log_probs has {len(values)} entries, loss_mask has {len(mask)}")
    return torch.where(mask != 0, values, 0.0)


def split_into_steps(samples: list[TrainSample], global_batch_size: int) -> list[list[TrainSample]]:
    """Optimizer steps of `global_batch_size` rollouts each; rollouts beyond a multiple of it are left out.

    Raises UsageError when there are fewer rollouts than one step needs.
    """
    by_rollout: dict[int, list[TrainSample]] = {}
    for sample in samples:
        by_rollout.setdefault(sample.rollout_id, []).append(sample)
    rollouts = list(by_rollout.values())
    steps = len(rollouts) // global_batch_size
    if steps == 0:
        raise UsageError(
            f"{len(rollouts)} rollouts to train on, but --global-batch-size is {global_batch_size}: lower it"
        )
    chosen = (rollouts[i * global_batch_size : (i + 1) * global_batch_size] for i in range(steps))
    return [[sample for rollout in step for sample in rollout] for step in chosen]


def micro_batches(
    samples: list[TrainSample], args: Namespace, max_tokens: int | None = None
) -> list[list[TrainSample]]:
    """Samples of one step, grouped by forward pass; samples without loss are left out (they change nothing).

    With --use-dynamic-batch-size at most `max_tokens` (by default --max-tokens-per-gpu) are computed together and a
    longer sample goes alone, else --micro-batch-size samples.
    """
    samples = [sample for sample in samples if sample.has_loss]
    if args.use_dynamic_batch_size:
        return pack(samples, max_tokens or args.max_tokens_per_gpu)
    size = args.micro_batch_size
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def pack(samples: list[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Groups of samples with at most `max_tokens` tokens, where a prefix that several of a group share counts once: it
    is computed once. Sorted, samples stand next to those that they share most with."""
    by_tokens = sorted(((sample.tokens.tolist(), sample) for sample in samples), key=lambda pair: pair[0])
    bins: list[list[TrainSample]] = []
    room, last = 0, []
    for tokens, sample in by_tokens:
        own = len(tokens) - common_prefix(last, tokens)
        if not bins or own > room:
            bins.append([])
            room, own = max_tokens, len(tokens)
        bins[-1].append(sample)
        room -= own
        last = tokens
    return bins

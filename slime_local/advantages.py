"""Advantages of a rollout's samples, by slime's estimators (`--advantage-estimator`)."""

from argparse import Namespace

import torch
from torch import Tensor

from slime_local.batching import TrainSample
from slime_local.errors import UsageError

GROUP_REWARD = ("grpo", "gspo", "cispo")
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


def approx_kl(log_probs: Tensor, ref_log_probs: Tensor, kind: str, ratio: Tensor | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference), same shape as the inputs.

    `kind` is k1, k2, k3 or low_var_kl (k3 clamped to [-10, 10]); see http://joschu.net/blog/kl-approx.html.
    `ratio` (policy over sampling policy) weights the estimate when given.
    """
    log_ratio = log_probs.float() - ref_log_probs.float()
    if kind == "k1":
        kl = log_ratio
    elif kind == "k2":
        kl = log_ratio.square() / 2
    elif kind in ("k3", "low_var_kl"):
        kl = torch.exp(-log_ratio) - 1 + log_ratio
    else:
        raise UsageError(f"--kl-loss-type {kind} is unknown: k1, k2, k3 or low_var_kl")
    if ratio is not None:
        kl = ratio * kl
    return kl.clamp(-10, 10) if kind == "low_var_kl" else kl


def compute_advantages(args: Namespace, samples: list[TrainSample]) -> None:
    """Set `advantages` and `returns` of every sample in place, float32 [response_length].

    Rewards arrive already normalised within their group. Needs `ref_log_probs` when --kl-coef is set.
    """
    for sample in samples:
        sample.returns = _returns(args, sample, _reward_kl(args, sample))
        sample.advantages = sample.returns
    if args.normalize_advantages:
        whiten(samples)


def _reward_kl(args: Namespace, sample: TrainSample) -> Tensor:
    policy = sample.rollout_log_probs if args.use_rollout_logprobs else sample.log_probs
    if args.kl_coef == 0 or policy is None:
        return torch.zeros_like(sample.loss_mask)
    return approx_kl(policy, sample.ref_log_probs, args.kl_loss_type) * (sample.loss_mask != 0)


def _returns(args: Namespace, sample: TrainSample, kl: Tensor) -> Tensor:
    if args.advantage_estimator in GROUP_REWARD:
        return torch.full_like(kl, sample.reward)
    if args.advantage_estimator == "reinforce_plus_plus_baseline":
        return sample.reward - args.kl_coef * kl
    if args.advantage_estimator == "reinforce_plus_plus":
        return _discounted(args, sample, kl)
    raise UsageError(f"--advantage-estimator {args.advantage_estimator} is not available on one machine")


def _discounted(args: Namespace, sample: TrainSample, kl: Tensor) -> Tensor:
    """Discounted sum of what follows: minus the KL penalty at every token, the reward at the last one that counts."""
    if not sample.has_loss:
        return torch.zeros_like(kl)
    rewards = -args.kl_coef * kl * sample.loss_mask
    rewards[sample.loss_mask.nonzero()[-1, 0]] += sample.reward
    total, returns = 0.0, []
    for reward in reversed(rewards.tolist()):
        total = reward + args.gamma * total
        returns.append(total)
    return torch.tensor(returns[::-1], dtype=torch.float32, device=kl.device)


def whiten(samples: list[TrainSample], epsilon: float = 1e-8) -> None:
    """Shift and scale the advantages to mean 0 and variance 1 over all tokens under the loss, in place.

    Raises UsageError when no token is under the loss.
    """
    mask = torch.cat([sample.loss_mask for sample in samples])
    values = torch.cat([sample.advantages for sample in samples])
    count = mask.sum()
    if count == 0:
        raise UsageError("--normalize-advantages: no sample of this rollout has a token under the loss")
    mean = (values * mask).sum() / count
    variance = (values.square() * mask).sum() / count - mean.square()
    variance = variance * count / (count - 1).clamp_min(1)
    scale = torch.rsqrt(variance.clamp_min(0) + epsilon)
    for sample in samples:
        sample.advantages = (sample.advantages - mean) * scale

"""Log-probs of a micro-batch, and slime's losses over them: policy_loss (PPO/GRPO, GSPO, CISPO) and sft_loss.

A loss is a sum over the micro-batch; the trainer divides it by the step's normaliser, so the result does not depend on
how samples were packed. Every per-token tensor is the concatenation of the samples' responses, [R] = sum of the
response lengths.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slime_local.advantages import approx_kl
from slime_local.batching import TrainSample
from slime_local.model import gradient_dtype
from slime_local.plugins import load_function

CHUNK_ELEMENTS = 2**24  # float32 logits kept at once: 64 MiB
Reducer = Callable[[Tensor], Tensor]


def response_log_probs(
    model: nn.Module, samples: list[TrainSample], args: Namespace, entropy: str = "no"
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of every response token under `model`, and the entropy of its distribution: float32 [R] each.

    Positions outside the loss cost no logits and read 0. Logits are divided by --rollout-temperature. `entropy` is
    "no" (second result None), "value" (no gradient) or "grad". --log-probs-chunk-size positions at a time go through
    the vocabulary, so that all logits together never exist.
    """
    rows, targets, places = _loss_positions(samples)
    tokens = torch.cat([sample.tokens for sample in samples])
    lower = None if samples[0].lower is None else torch.cat([sample.lower for sample in samples])
    hidden = model(tokens, [len(sample.tokens) for sample in samples], lower)[rows]
    size = args.log_probs_chunk_size
    if size <= 0:
        size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    parts = []
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        parts.append(_token_log_probs(model, hidden[chunk], targets[chunk], args.rollout_temperature, entropy))
    empty = hidden.new_zeros(sum(sample.response_length for sample in samples), dtype=torch.float32)
    log_probs = empty.index_copy(0, places, torch.cat([part[0] for part in parts]))
    if entropy == "no":
        return log_probs, None
    return log_probs, empty.index_copy(0, places, torch.cat([part[1] for part in parts]))


def _loss_positions(samples: list[TrainSample]) -> tuple[Tensor, Tensor, Tensor]:
    """For each token under the loss: the row of the hidden state that predicts it, the token, its place in [R]."""
    rows, targets, places = [], [], []
    token_start = response_start = 0
    for sample in samples:
        at = sample.loss_mask.nonzero().squeeze(-1)
        prompt = len(sample.tokens) - sample.response_length
        rows.append(token_start + prompt + at - 1)
        targets.append(sample.tokens[prompt + at])
        places.append(response_start + at)
        token_start += len(sample.tokens)
        response_start += sample.response_length
    return torch.cat(rows), torch.cat(targets), torch.cat(places)


def _token_log_probs(
    model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: str
) -> tuple[Tensor, Tensor | None]:
    if entropy == "grad":
        return checkpoint(_with_entropy, model, hidden, targets, temperature, use_reentrant=False)
    return TokenLogProbs.apply(hidden, model.output_weight, targets, model, temperature, entropy == "value")


def _with_entropy(model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    all_log_probs = torch.log_softmax(model.logits(hidden) / temperature, dim=-1)
    log_probs = all_log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)


class TokenLogProbs(torch.autograd.Function):
    """Log-probs [N] of `targets` and, when asked for, entropies [N] without gradient, from hidden states [N, H].

    No logits are kept. The gradient of log-prob i by its hidden state is (weight[target] - probs @ weight) /
    temperature: it is made on the way forward where the weight is frozen, else the logits are computed again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, model, temperature, with_entropy):
        all_log_probs = _all_log_probs(model, hidden, temperature)
        log_probs = all_log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        ctx.model, ctx.temperature = model, temperature
        made_here = to_hidden and not to_weight
        probs = all_log_probs.exp() if with_entropy or made_here else None
        entropies = None
        if with_entropy:  # a product of rows and columns: the numbers in between are kept nowhere
            entropies = -torch.bmm(probs[:, None], all_log_probs[..., None]).flatten()
            ctx.mark_non_differentiable(entropies)
        if to_weight:
            ctx.save_for_backward(hidden, weight, targets)
        elif made_here:
            dtype = gradient_dtype(model.product_dtype, hidden.device)
            expected = (probs.to(dtype) @ weight.to(dtype)).to(hidden.dtype)
            ctx.save_for_backward((weight[targets] - expected) / temperature)
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        if not to_weight:
            (by_hidden,) = ctx.saved_tensors
            return (grad[:, None] * by_hidden).to(by_hidden.dtype), None, None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        by_logits = _all_log_probs(ctx.model, hidden, ctx.temperature).exp_().mul_(-grad[:, None])
        by_logits[torch.arange(len(targets), device=targets.device), targets] += grad
        dtype = gradient_dtype(ctx.model.product_dtype, hidden.device)
        by_logits = by_logits.div_(ctx.temperature).to(dtype)
        grad_hidden = (by_logits @ weight.to(dtype)).to(hidden.dtype) if to_hidden else None
        return grad_hidden, (by_logits.t() @ hidden.to(dtype)).to(weight.dtype), None, None, None, None


def _all_log_probs(model: nn.Module, hidden: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        logits = model.logits(hidden)
        return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


def reducer(samples: list[TrainSample], per_token: bool, masks: list[Tensor] | None = None) -> Reducer:
    """Function from a per-token tensor [R] to a scalar: the sum over rollouts of their mean over tokens under the
    loss, or with `per_token` (--calculate-per-token-loss) the plain sum over those tokens.

    `masks` replace the samples' own in the sum; the denominators stay the rollouts' own.
    """
    weights = []
    for sample, mask in zip(samples, masks or [sample.loss_mask for sample in samples], strict=True):
        weights.append(mask if per_token else mask / max(sample.mask_total, 1.0))
    weight = torch.cat(weights)
    return lambda values: (values * weight).sum()


def normaliser(samples: list[TrainSample], per_token: bool) -> float:
    """What a step's summed loss and metrics are divided by: its rollouts, or its tokens under the loss (a sample
    without any counts as one, as in slime)."""
    if per_token:
        return sum(max(float(sample.loss_mask.sum()), 1.0) for sample in samples)
    return float(len({sample.rollout_id for sample in samples}))


def sft_loss(args: Namespace, samples: list[TrainSample], log_probs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the tokens under the loss; metric `loss`."""
    loss = -reducer(samples, args.calculate_per_token_loss)(log_probs)
    return loss, {"loss": loss.detach()}


def policy_loss(
    args: Namespace, samples: list[TrainSample], log_probs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with the optional entropy bonus, KL loss and importance correction.

    The old policy is the samples' `log_probs` (or the engine's with --use-rollout-logprobs); where the samples have
    none, the step is on-policy and the current log-probs stand in for them. Returns the summed loss and detached sums
    under slime's metric names.
    """
    reduce = reducer(samples, args.calculate_per_token_loss)
    advantages = _concat(samples, "advantages")
    recomputed = _concat(samples, "log_probs")
    trainer_log_probs = log_probs.detach() if recomputed is None else recomputed
    old = _concat(samples, "rollout_log_probs") if args.use_rollout_logprobs else trainer_log_probs
    sequence_kl = _sequence_kl(samples, old, log_probs)
    ppo_kl = sequence_kl if args.advantage_estimator == "gspo" else old - log_probs

    pg, clipped = _surrogate(args, ppo_kl, log_probs, advantages)
    metrics = {}
    if args.use_opsm:
        kept = ~((advantages < 0) & (sequence_kl > args.opsm_delta))
        pg = pg * kept
        metrics["opsm_clipfrac"] = _opsm_clipfrac(samples, ~kept)
    pg_masks = None
    if args.use_tis or args.get_mismatch_metrics:
        pg, pg_masks, tis_metrics = _importance_correction(args, samples, pg, trainer_log_probs)
        metrics["ois"] = reduce(torch.exp(-ppo_kl))
        metrics |= {name: reduce(value) for name, value in tis_metrics.items()}
        reduce = reducer(samples, args.calculate_per_token_loss, pg_masks)
    pg_loss = _pg_reducer(args, samples, pg_masks, reduce)(pg)
    entropy_loss = reduce(entropy)
    loss = pg_loss - args.entropy_coef * entropy_loss
    if args.use_kl_loss:
        ratio = torch.exp(log_probs - old) if args.use_unbiased_kl else None
        kl_loss = reduce(approx_kl(log_probs, _concat(samples, "ref_log_probs"), args.kl_loss_type, ratio))
        loss = loss + args.kl_loss_coef * kl_loss
        metrics["kl_loss"] = kl_loss
    metrics |= {"loss": loss, "pg_loss": pg_loss, "entropy_loss": entropy_loss}
    metrics |= {"pg_clipfrac": reduce(clipped), "ppo_kl": reduce(ppo_kl)}
    engine = _concat(samples, "rollout_log_probs")
    if engine is not None:
        compared = log_probs if args.use_rollout_logprobs else old
        metrics["train_rollout_logprob_abs_diff"] = reduce((compared - engine).abs())
    return loss, {name: value.detach() for name, value in metrics.items()}


def _concat(samples: list[TrainSample], name: str) -> Tensor | None:
    values = [getattr(sample, name) for sample in samples]
    return None if any(value is None for value in values) else torch.cat(values)


def _sequence_kl(samples: list[TrainSample], old: Tensor, new: Tensor) -> Tensor:
    """Mean of old - new over each sample's tokens under the loss, repeated along its response."""
    lengths = [sample.response_length for sample in samples]
    parts = []
    for sample, difference in zip(samples, (old - new).split(lengths), strict=True):
        mean = (difference * sample.loss_mask).sum() / sample.loss_mask.sum().clamp_min(1)
        parts.append(mean.expand(sample.response_length))
    return torch.cat(parts)


def _opsm_clipfrac(samples: list[TrainSample], dropped: Tensor) -> Tensor:
    """slime's: what is dropped of each sample's whole response, over its tokens under the loss, summed up."""
    parts = dropped.float().split([sample.response_length for sample in samples])
    return sum(part.sum() / sample.loss_mask.sum().clamp_min(1) for part, sample in zip(parts, samples, strict=True))


def _surrogate(args: Namespace, ppo_kl: Tensor, log_probs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token policy-gradient loss and where it was clipped (1.0 or 0.0)."""
    low = 1.0 - args.eps_clip
    high = 1.0 + (args.eps_clip if args.eps_clip_high is None else args.eps_clip_high)
    ratio = torch.exp(-ppo_kl)
    if args.advantage_estimator == "cispo":
        truncated = ratio.clamp(low, high)
        return -truncated.detach() * advantages * log_probs, (truncated != ratio).float()
    plain = -ratio * advantages
    bounded = -ratio.clamp(low, high) * advantages
    loss = torch.maximum(plain, bounded)
    if args.eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(-args.eps_clip_c * advantages, loss), loss)
    return loss, (bounded > plain).float()


def _importance_correction(
    args: Namespace, samples: list[TrainSample], pg: Tensor, trainer_log_probs: Tensor
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """--use-tis, or the function of --custom-tis-function-path: corrected loss, its masks, per-token metrics."""
    function = load_function(args.custom_tis_function_path) if args.custom_tis_function_path else truncated_is
    return function(
        args,
        pg_loss=pg,
        train_log_probs=list(trainer_log_probs.split([sample.response_length for sample in samples])),
        rollout_log_probs=[sample.rollout_log_probs for sample in samples],
        loss_masks=[sample.loss_mask for sample in samples],
        total_lengths=[len(sample.tokens) for sample in samples],
        response_lengths=[sample.response_length for sample in samples],
    )


def truncated_is(
    args: Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_: object,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Truncated importance sampling: each token weighs trainer over engine, kept in [--tis-clip-low, --tis-clip]."""
    ratio = torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))
    weight = ratio.clamp(args.tis_clip_low, args.tis_clip)
    metrics = {"tis": ratio, "tis_clipfrac": (weight != ratio).float(), "tis_abs": (ratio - 1).abs()}
    return pg_loss * weight, loss_masks, metrics


def _pg_reducer(args: Namespace, samples: list[TrainSample], masks: list[Tensor] | None, default: Reducer) -> Reducer:
    if args.custom_pg_loss_reducer_function_path is None:
        return default
    build = load_function(args.custom_pg_loss_reducer_function_path)
    masks = masks or [sample.loss_mask for sample in samples]
    lengths = [sample.response_length for sample in samples]
    return build([len(sample.tokens) for sample in samples], lengths, masks, args.calculate_per_token_loss)

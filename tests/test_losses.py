"""Losses and advantages against plain formulas over transformers' own logits, and the learning-rate schedule."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_setup import make_args, make_rollout, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from slime_local.advantages import approx_kl, compute_advantages
from slime_local.batching import TrainSample, pack, train_samples
from slime_local.errors import UsageError
from slime_local.losses import normaliser, policy_loss, response_log_probs, sft_loss
from slime_local.prefixes import share_prefixes
from slime_local.schedule import Schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return tiny_model(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_log_probs(reference, sample, temperature=1.0):
    """Response log-probs [R] and entropies [R] of one sample by transformers."""
    logits = reference(sample.tokens[None]).logits[0] / temperature
    start = len(sample.tokens) - sample.response_length
    all_log_probs = torch.log_softmax(logits[start - 1 : -1], -1)
    chosen = all_log_probs.gather(-1, sample.tokens[start:, None])[:, 0]
    return chosen, -(all_log_probs.exp() * all_log_probs).sum(-1)


@pytest.mark.parametrize("chunk", [-1, 1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_equal_transformers(folder, model, reference, chunk, temperature):
    args = make_args(folder, log_probs_chunk_size=chunk, rollout_temperature=temperature)
    samples = train_samples(make_rollout())
    log_probs, entropy = response_log_probs(model, samples, args, "grad")
    expected = [hf_log_probs(reference, sample, temperature) for sample in samples]
    mask = torch.cat([sample.loss_mask for sample in samples])
    torch.testing.assert_close(log_probs, torch.cat([e[0] for e in expected]) * mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]) * mask, atol=1e-4, rtol=1e-4)


def test_chunked_logits_give_the_same_gradient(folder, model):
    gradients = []
    for chunk in (-1, 2):
        args = make_args(folder, log_probs_chunk_size=chunk)
        samples = train_samples(make_rollout())
        log_probs, entropy = response_log_probs(model, samples, args, "grad")
        model.zero_grad()
        (log_probs.square().sum() + entropy.sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_sft_loss_equals_transformers(folder, model, reference, per_token):
    args = make_args(folder, loss_type="sft_loss", calculate_per_token_loss=per_token)
    samples = train_samples(make_rollout(samples=3))
    loss, metrics = sft_loss(args, samples, response_log_probs(model, samples, args)[0])
    loss = loss / normaliser(samples, per_token)
    means, tokens = [], 0
    for sample in samples:
        labels = torch.full_like(sample.tokens, -100)
        labels[-sample.response_length :][sample.loss_mask == 1] = sample.tokens[-sample.response_length :][
            sample.loss_mask == 1
        ]
        count = int(sample.loss_mask.sum())
        means.append((reference(sample.tokens[None], labels=labels[None]).loss, count))
        tokens += count
    expected = sum(m * n for m, n in means) / tokens if per_token else sum(m for m, _ in means) / len(samples)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["loss"] / normaliser(samples, per_token), expected, atol=1e-4, rtol=1e-4)


def plain_grpo(args, reference, samples):
    """Loss and KL loss of a step by the textbook: one sample after the other, one token after the other."""
    losses, kls, weights = [], [], []
    for sample in samples:
        new = hf_log_probs(reference, sample)[0]
        loss = kl = 0.0
        for t in range(sample.response_length):
            if sample.loss_mask[t] == 0:
                continue
            ratio = torch.exp(new[t] - sample.log_probs[t])
            low, high = 1 - args.eps_clip, 1 + args.eps_clip_high
            token = torch.max(-ratio * sample.reward, -ratio.clamp(low, high) * sample.reward)
            if args.eps_clip_c and sample.reward < 0:
                token = torch.min(token, torch.tensor(-args.eps_clip_c * sample.reward))
            if args.use_tis:
                token = token * torch.exp(sample.log_probs[t] - sample.rollout_log_probs[t]).clamp(
                    args.tis_clip_low, args.tis_clip
                )
            gap = sample.ref_log_probs[t] - new[t]
            loss, kl = loss + token, kl + (torch.exp(gap) - gap - 1)
        losses.append(loss)
        kls.append(kl)
        weights.append(int(sample.loss_mask.sum()))
    if args.calculate_per_token_loss:
        return sum(losses) / sum(weights), sum(kls) / sum(weights)
    count = len(samples)
    return (
        sum(x / w for x, w in zip(losses, weights, strict=True)) / count,
        sum(x / w for x, w in zip(kls, weights, strict=True)) / count,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"calculate_per_token_loss": True},
        {"eps_clip": 0.1, "eps_clip_high": 0.28, "eps_clip_c": 1.2},
        {"use_tis": True, "tis_clip": 1.5, "tis_clip_low": 0.5},
        {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3"},
    ],
)
def test_policy_loss_equals_the_textbook(folder, model, reference, changes):
    args = make_args(folder, **changes)
    samples = train_samples(make_rollout(samples=4))
    noise = torch.Generator().manual_seed(3)
    for sample in samples:
        current = hf_log_probs(reference, sample)[0].detach()
        sample.log_probs = (current + 0.4 * torch.randn(len(current), generator=noise)) * sample.loss_mask
        sample.ref_log_probs = (current + 0.4 * torch.randn(len(current), generator=noise)) * sample.loss_mask
        sample.rollout_log_probs = (sample.log_probs + 0.9 * torch.randn(len(current), generator=noise)) * (
            sample.loss_mask
        )
    compute_advantages(args, samples)
    loss, metrics = policy_loss(args, samples, *response_log_probs(model, samples, args, "value"))
    scale = normaliser(samples, args.calculate_per_token_loss)
    pg, kl = plain_grpo(args, reference, samples)
    torch.testing.assert_close(metrics["pg_loss"] / scale, pg.detach(), atol=1e-4, rtol=1e-4)
    assert metrics["pg_clipfrac"] > 0
    expected = pg + args.kl_loss_coef * kl if args.use_kl_loss else pg
    torch.testing.assert_close(loss / scale, expected, atol=1e-4, rtol=1e-4)
    model.zero_grad()
    reference.zero_grad()
    (loss / scale).backward()
    expected.backward()
    mine = model.decoder.final_layernorm.weight.grad
    torch.testing.assert_close(mine, reference.model.norm.weight.grad, atol=1e-4, rtol=1e-3)


def test_entropy_bonus_enters_with_its_coefficient(folder, model):
    samples = train_samples(make_rollout())
    args = make_args(folder, entropy_coef=0.5)
    compute_advantages(args, samples)
    loss, metrics = policy_loss(args, samples, *response_log_probs(model, samples, args, "grad"))
    torch.testing.assert_close(loss.detach(), metrics["pg_loss"] - 0.5 * metrics["entropy_loss"])
    assert metrics["entropy_loss"] > 0


def test_gspo_clips_whole_sequences(folder, model):
    samples = train_samples(make_rollout(samples=1))
    args = make_args(folder, advantage_estimator="gspo", eps_clip=0.05, eps_clip_high=0.05)
    log_probs, entropy = response_log_probs(model, samples, args, "value")
    samples[0].log_probs = log_probs.detach() - 0.1 * samples[0].loss_mask
    samples[0].reward = 1.0
    compute_advantages(args, samples)
    _, metrics = policy_loss(args, samples, log_probs, entropy)
    assert float(metrics["ppo_kl"]) == pytest.approx(-0.1, abs=1e-5)
    assert float(metrics["pg_clipfrac"]) == 1.0
    assert float(metrics["pg_loss"]) == pytest.approx(-1.05, abs=1e-5)


def test_cispo_keeps_the_gradient_of_clipped_tokens(folder, model):
    samples = train_samples(make_rollout(samples=1))
    args = make_args(folder, advantage_estimator="cispo", eps_clip=1.0, eps_clip_high=0.1)
    log_probs, entropy = response_log_probs(model, samples, args, "value")
    samples[0].log_probs = log_probs.detach() - samples[0].loss_mask
    samples[0].reward = 2.0
    compute_advantages(args, samples)
    gradient = torch.autograd.grad(policy_loss(args, samples, log_probs, entropy)[0], log_probs)[0]
    weight = samples[0].loss_mask / samples[0].loss_mask.sum()
    torch.testing.assert_close(gradient, -1.1 * 2.0 * weight)


def test_kl_estimators_agree_with_their_formulas():
    new, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    gap = new - ref
    torch.testing.assert_close(approx_kl(new, ref, "k1"), gap)
    torch.testing.assert_close(approx_kl(new, ref, "k2"), gap**2 / 2)
    torch.testing.assert_close(approx_kl(new, ref, "k3"), torch.exp(-gap) - 1 + gap)
    far = approx_kl(torch.tensor([-20.0]), torch.tensor([0.0]), "low_var_kl")
    assert far.item() == 10.0


def test_kl_penalty_and_discount_of_reinforce_plus_plus(folder):
    args = make_args(folder, advantage_estimator="reinforce_plus_plus", gamma=0.5, kl_coef=0.1, kl_loss_type="k1")
    data = {
        "tokens": [[1, 2, 3, 4, 5]],
        "response_lengths": [4],
        "loss_masks": [[1, 0, 1, 0]],
        "rewards": [2.0],
    }
    (sample,) = train_samples(data)
    sample.log_probs = torch.tensor([-1.0, 0, -1.0, 0])
    sample.ref_log_probs = torch.tensor([-2.0, 0, -3.0, 0])
    compute_advantages(args, [sample])
    last = 2.0 - 0.1 * 2.0
    torch.testing.assert_close(sample.returns, torch.tensor([-0.1 + last / 4, last / 2, last, 0.0]))


def test_normalised_advantages_have_mean_0_and_variance_1_over_the_loss(folder):
    samples = train_samples(make_rollout(samples=5))
    compute_advantages(make_args(folder, normalize_advantages=True), samples)
    mask = torch.cat([sample.loss_mask for sample in samples]) == 1
    kept = torch.cat([sample.advantages for sample in samples])[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-5)
    assert kept.var().item() == pytest.approx(1, abs=1e-4)


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=20), st.integers(1, 60))
def test_packing_keeps_every_sample_once_and_under_the_limit(sequences, limit):
    """Of tokens that are computed: a prefix that samples share counts once."""
    bins = pack(unmasked(sequences), limit)
    assert sorted(s.tokens.tolist() for group in bins for s in group) == sorted(sequences)
    assert all(len(group) == 1 or computed_tokens(group) <= limit for group in bins)


def test_packing_puts_together_what_shares_a_prefix():
    groups = [[[kind] * 20 + [sample] * 5 for sample in range(4)] for kind in (1, 2, 3)]
    in_turns = [sequence for turn in zip(*groups, strict=True) for sequence in turn]
    bins = pack(unmasked(in_turns), 40)
    assert [[s.tokens.tolist() for s in group] for group in bins] == groups
    assert len(pack(unmasked(in_turns), 39)) == 6


def unmasked(sequences: list[list[int]]) -> list[TrainSample]:
    empty = {"response_lengths": [0] * len(sequences), "loss_masks": [[] for _ in sequences]}
    return train_samples({"tokens": sequences, **empty})


def computed_tokens(samples: list[TrainSample]) -> int:
    return len(share_prefixes(torch.cat([s.tokens for s in samples]), [len(s.tokens) for s in samples]).tokens)


def test_wrong_lengths_are_named():
    with pytest.raises(UsageError, match="sample 1: loss_mask has 1 entries"):
        train_samples({"tokens": [[1, 2], [1, 2, 3]], "response_lengths": [1, 2], "loss_masks": [[1], [1]]})
    with pytest.raises(UsageError, match="no token comes before"):
        train_samples({"tokens": [[1, 2]], "response_lengths": [2], "loss_masks": [[1, 1]]})


# ---- Schedule ----------------------------------------------------------------------------------------------------


def learning_rates(folder, steps, num_rollout=10, **changes):
    args = make_args(folder, lr=1.0, **changes)
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 1.0}])
    schedule = Schedule(args, optimizer, num_rollout)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step(args.global_batch_size)
    return seen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_decay_style": "constant"}, [1, 1, 1, 1]),
        ({"lr_decay_style": "linear"}, [1, 0.9, 0.8, 0.7]),
        ({"lr_decay_style": "linear", "lr_decay_iters": 2, "min_lr": 0.1}, [1, 0.55, 0.1, 0.1]),
        ({"lr_decay_style": "cosine"}, [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(4)]),
        ({"lr_decay_style": "constant", "lr_warmup_iters": 2}, [0, 0.5, 1, 1]),
        ({"lr_decay_style": "linear", "lr_warmup_fraction": 0.2, "lr_warmup_init": 0.5}, [0.5, 0.75, 1, 1 - 1 / 8]),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1}, [0, 1, 0.5**0.5, (1 / 3) ** 0.5]),
        (
            {
                "lr_decay_style": "WSD",
                "lr_decay_iters": 4,
                "lr_wsd_decay_iters": 2,
                "lr_wsd_decay_style": "linear",
            },
            [1, 1, 1, 0.5],
        ),
    ],
)
def test_learning_rate_schedules(folder, changes, expected):
    assert learning_rates(folder, 4, **changes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_warmup_iters": 10}, "warm-up"),
        ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, "exclude each other"),
        ({"min_lr": 2.0}, "--min-lr"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"global_batch_size": 1000}, "no whole optimizer step"),
    ],
)
def test_contradicting_schedules_are_refused(folder, changes, message):
    with pytest.raises(UsageError, match=message):
        learning_rates(folder, 1, **changes)

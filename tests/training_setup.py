"""A tiny random llama, slime's default args and made-up rollouts for the tests of the trainer."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slime_local.flags import parse_args
from slime_local.model import Transformer, load_model

VOCAB = 61


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A llama of 2 layers x 16 with random weights, as an HF folder without tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    (Path(folder) / "tokenizer_config.json").write_text("{}")
    return folder


def tiny_model(folder: Path) -> Transformer:
    return load_model(folder, dtype=torch.float32, device="cpu")


def make_args(model: Path, **settings: Any) -> Namespace:
    """slime's defaults for a run of 4 rollouts of 2 x 2 samples on `model`, changed by `settings`."""
    argv = ["--hf-checkpoint", str(model), "--prompt-data", "unused.jsonl", "--num-rollout", "4"]
    argv += ["--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--global-batch-size", "4", "--lr", "1e-2"]
    args = parse_args(argv)
    for name, value in settings.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def make_rollout(seed: int = 0, samples: int = 4, **changes: Any) -> dict:
    """Train data of `samples` random sequences with gaps in their masks, as the rollout hands it to the trainer."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> torch.Tensor:
        return torch.randint(low, high, size, generator=random)

    data: dict = {"tokens": [], "response_lengths": [], "loss_masks": [], "rollout_log_probs": []}
    for _ in range(samples):
        prompt, response = int(draw(1, 6)), int(draw(2, 9))
        mask = draw(0, 2, (response,))
        mask[-1] = 1
        data["tokens"].append(draw(0, VOCAB, (prompt + response,)).tolist())
        data["response_lengths"].append(response)
        data["loss_masks"].append(mask.tolist())
        noise = torch.rand(response, generator=random)
        data["rollout_log_probs"].append((-4.0 - noise).mul(mask).tolist())
    rewards = torch.randn(samples, generator=random).tolist()
    data |= {"rewards": rewards, "raw_reward": rewards, "rollout_ids": list(range(samples))}
    return {**data, **changes}

"""One GRPO training step on the same stored rollout: slime_local's trainer beside the loss step of TRL's GRPOTrainer.

    python benchmarks/grpo_step.py           # 2 groups of 4 samples; --quick: 1 group of a short one

Both sides get the same tokens, masks, advantages and engine log-probs, train all parameters and do forward, clipped
loss, backward and AdamW, weights in fp32; TRL in whichever of fp32 and bf16 (autocast) this machine multiplies faster.
The samples are dialogues of the scripted teacher; those of a group share the first quarter. TRL's side is
`GRPOTrainer._compute_loss`, one sample at a time (no padding), without gradient checkpointing.
"""

from __future__ import annotations

import tempfile

from common import best_matrix_rate, measure, need, parser, ratio, share_of_rate, smollm2_dir, write_result
from parts.telecom import dialogues, flags, huge_pages, product_flops

GROUP = 4


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--groups", type=int, help="groups of 4 samples (2; --quick: 1)")
    made.add_argument("--repeats", type=int, help="measured steps of each side (3; --quick: 2)")
    args = made.parse_args()
    need("trl", "trl (requirements/bench.txt)")
    huge_pages()
    folder = smollm2_dir()
    samples = stored_rollout(folder, args.groups or (1 if args.quick else 2), longest=not args.quick)
    rate, dtype = best_matrix_rate()
    ours, model = our_step(folder, samples)
    sides = {"TRL": trl_step(folder, samples, dtype == "bfloat16"), "ours": ours}
    seconds = measure(sides, repeats=args.repeats or (2 if args.quick else 3))
    tokens = sum(len(sample["tokens"]) for sample in samples)
    rates = {side: [tokens / value for value in values] for side, values in seconds.items()}
    question = f"GRPO step on {len(samples)} stored samples: tokens a second beside TRL's GRPOTrainer"
    result = {"target": 3, "quick": args.quick, "packages": ("trl",), "folder": args.results}
    details = {"samples": len(samples), "tokens": tokens, "trl_dtype": dtype}
    speedup = ratio(seconds, "TRL", "ours")
    write_result("grpo-step", question, rates, unit="tokens/s", ratio=speedup, details=details, **result)
    flops = product_flops(model, tokens, sum(sum(sample["mask"]) for sample in samples))
    shares = {side: share_of_rate(flops, values, rate) for side, values in seconds.items()}
    details |= {"matrix_rate_tflops": rate, "product_flops": flops}
    write_result(
        "grpo-step-rate",
        "GRPO step: share of the machine's matrix rate, of which attention and what a group shares are no part",
        {side: share.median for side, share in shares.items()},
        unit="%",
        value=shares["ours"],
        details=details,
        **result | {"target": None},
    )


def stored_rollout(folder, groups: int, longest: bool) -> list[dict]:
    """Samples {"tokens", "mask" (of the response), "prompt" (tokens before it), "log_probs", "reward"}.

    A group is one dialogue whose samples go their own ways (other words in the agent's turns) after its first quarter.
    """
    samples = []
    for ids, mask in dialogues(folder, groups, longest):
        prompt = mask.index(1)
        for member in range(GROUP):
            tokens = list(ids)
            for i in range(len(ids) // 4, len(ids)):
                tokens[i] = (tokens[i] + member) % 49000 if mask[i] else tokens[i]
            response = mask[prompt:]
            sample = {"tokens": tokens, "mask": response, "prompt": prompt, "reward": float(member % 2)}
            samples.append(sample | {"log_probs": [-2.0 * bit for bit in response]})
    return samples


def our_step(folder, samples: list[dict]):
    """(one optimizer step of slime_local's trainer with run_local.sh's GRPO settings, its model)"""
    from slime_local.model import load_model
    from slime_local.trainer import Trainer

    count = len(samples)
    changes = {"rollout_batch_size": count // GROUP, "n_samples_per_prompt": GROUP, "global_batch_size": count}
    changes |= {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 4096, "use_rollout_logprobs": True}
    changes |= {"eps_clip": 0.2, "eps_clip_high": 0.28, "lr": 1e-6, "lr_decay_style": "constant"}
    model = load_model(folder, device="cpu")
    trainer = Trainer(flags(folder, **changes), model, 100)
    data = {
        "tokens": [sample["tokens"] for sample in samples],
        "response_lengths": [len(sample["mask"]) for sample in samples],
        "loss_masks": [sample["mask"] for sample in samples],
        "rollout_log_probs": [sample["log_probs"] for sample in samples],
        "rewards": [advantage(sample) for sample in samples],
        "rollout_ids": list(range(count)),
    }
    return lambda: trainer.train(0, data), model


def advantage(sample: dict) -> float:
    """(reward - mean) / deviation of a group with two solved samples of four."""
    return 2 * sample["reward"] - 1


def trl_step(folder, samples: list[dict], in_bf16: bool):
    """One optimizer step with the loss of TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="grpo-step-"),
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["unused"]}),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    model, batches = trainer.model.train(), [trl_inputs(sample) for sample in samples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    trainer.current_gradient_accumulation_steps = len(batches)

    def step() -> None:
        for inputs in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                loss = trainer._compute_loss(model, inputs)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trl_inputs(sample: dict) -> dict:
    """What TRL's generation hands to its loss: prompt and completion ids, and the completion's tool mask."""
    import torch

    prompt, completion = sample["tokens"][: sample["prompt"]], sample["tokens"][sample["prompt"] :]
    ids = [torch.tensor([part]) for part in (prompt, completion)]
    return {
        "prompt_ids": ids[0],
        "prompt_mask": torch.ones_like(ids[0]),
        "completion_ids": ids[1],
        "completion_mask": torch.ones_like(ids[1]),
        "tool_mask": torch.tensor([sample["mask"]]),
        "old_per_token_logps": torch.tensor([sample["log_probs"]]),
        "advantages": torch.tensor([advantage(sample)]),
        "num_items_in_batch": torch.tensor(sum(sample["mask"])),
    }


if __name__ == "__main__":
    main()

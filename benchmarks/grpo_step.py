"""One GRPO training step on the same stored rollout: slime_local's trainer beside the loss step of TRL's GRPOTrainer.

    python benchmarks/grpo_step.py --checkpoint RUN/sft/hf --stored RUN/grpo/rollouts/0.pt      # of levers.sh's run
    python benchmarks/grpo_step.py      # a rollout made up: 2 groups of 4 samples; --quick: 1 short one

Both sides get the same tokens, masks, advantages and engine log-probs, train all parameters and do forward, clipped
loss, backward and AdamW, weights in fp32; TRL in whichever of fp32 and bf16 (autocast) this machine multiplies faster.
Samples of a real rollout share two thirds of their tokens, which is computed once here. Those made up are dialogues of
the scripted teacher; in a group they share the first quarter. TRL's side is
`GRPOTrainer._compute_loss`, one sample at a time (no padding), without gradient checkpointing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import best_matrix_rate, measure, need, parser, ratio, share_of_rate, smollm2_dir, write_result
from parts.telecom import dialogues, flags, huge_pages, kept_once, step_flops

GROUP = 4


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--stored", type=Path, help="a rollout in groups of 4, of --save-debug-rollout-data (made up)")
    made.add_argument("--checkpoint", type=Path, help="HF folder of the model that sampled it (SmolLM2-135M-Instruct)")
    made.add_argument("--groups", type=int, help="groups of 4 samples (2; --quick: 1; of --stored: all)")
    made.add_argument("--repeats", type=int, help="measured steps of each side (3; --quick: 2)")
    args = made.parse_args()
    need("trl", "trl (requirements/bench.txt)")
    huge_pages()
    folder = args.checkpoint or smollm2_dir()
    if args.stored:
        data = stored_rollout(folder, args.stored, args.groups)
    else:
        data = made_up_rollout(folder, args.groups or (1 if args.quick else 2), longest=not args.quick)
    rate, dtype = best_matrix_rate()
    ours, model = our_step(folder, data)
    sides = {"TRL": trl_step(folder, data, dtype == "bfloat16"), "ours": ours}
    seconds = measure(sides, repeats=args.repeats or (2 if args.quick else 3))
    tokens, count = sum(map(len, data["tokens"])), len(data["tokens"])
    rates = {side: [tokens / value for value in values] for side, values in seconds.items()}
    question = f"GRPO step on {count} stored samples: tokens a second beside TRL's GRPOTrainer"
    result = {"target": 3, "quick": args.quick, "packages": ("trl",), "folder": args.results}
    details = {"samples": count, "tokens": tokens, "tokens_kept_once": kept_once(data["tokens"])}
    details |= {"stored": args.stored is not None, "trl_dtype": dtype}
    speedup = ratio(seconds, "TRL", "ours")
    write_result("grpo-step", question, rates, unit="tokens/s", ratio=speedup, details=details, **result)
    loss_tokens = sum(map(sum, data["loss_masks"]))
    flops = {side: step_flops(model, data["tokens"], loss_tokens, shared=side == "ours") for side in seconds}
    shares = {side: share_of_rate(flops[side], values, rate) for side, values in seconds.items()}
    details |= {"matrix_rate_tflops": rate, "flops": flops}
    write_result(
        "grpo-step-rate",
        "GRPO step: share of the machine's matrix rate, of which what a group shares is no part",
        {side: share.median for side, share in shares.items()},
        unit="%",
        value=shares["ours"],
        details=details,
        **result | {"target": None},
    )


def stored_rollout(folder: Path, path: Path, groups: int | None) -> dict[str, list]:
    """The rollout as the trainer gets it, with the advantages of the shaped reward: slime's keys, a sample each."""
    from slime_local.train_data import convert_samples_to_train_data, load_debug_samples

    samples = load_debug_samples(str(path).replace("{", "{{").replace("}", "}}"), 0)
    samples = samples[: GROUP * groups] if groups else samples
    plugin = {"custom_reward_post_process_path": "tau2_reward_shaping.tau2_reward_post_process"}
    args = flags(folder, rollout_batch_size=len(samples) // GROUP, n_samples_per_prompt=GROUP, **plugin)
    return convert_samples_to_train_data(args, samples)


def made_up_rollout(folder: Path, groups: int, longest: bool) -> dict[str, list]:
    """The same without a model: a group is one dialogue whose samples go their own ways (other words in the agent's
    turns) after its first quarter."""
    data: dict[str, list] = {"tokens": [], "response_lengths": [], "loss_masks": [], "rollout_log_probs": []}
    for ids, mask in dialogues(folder, groups, longest):
        response = mask[mask.index(1) :]
        for member in range(GROUP):
            tokens = list(ids)
            for i in range(len(ids) // 4, len(ids)):
                tokens[i] = (tokens[i] + member) % 49000 if mask[i] else tokens[i]
            data["tokens"].append(tokens)
            data["response_lengths"].append(len(response))
            data["loss_masks"].append(response)
            data["rollout_log_probs"].append([-2.0 * bit for bit in response])
    count = len(data["tokens"])
    advantages = [2.0 * (number % 2) - 1 for number in range(count)]  # two samples of four are solved
    return data | {"rewards": advantages, "rollout_ids": list(range(count))}


def our_step(folder: Path, data: dict[str, list]):
    """(one optimizer step of slime_local's trainer with run_local.sh's GRPO settings, its model)"""
    from slime_local.model import load_model
    from slime_local.trainer import Trainer

    count = len(data["tokens"])
    changes = {"rollout_batch_size": count // GROUP, "n_samples_per_prompt": GROUP, "global_batch_size": count}
    changes |= {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 4096, "use_rollout_logprobs": True}
    changes |= {"eps_clip": 0.2, "eps_clip_high": 0.28, "lr": 1e-6, "lr_decay_style": "constant"}
    model = load_model(folder, device="cpu")
    trainer = Trainer(flags(folder, **changes), model, 100)
    return lambda: trainer.train(0, data), model


def trl_step(folder: Path, data: dict[str, list], in_bf16: bool):
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
    model = trainer.model.train()
    batches = [trl_inputs(data, number) for number in range(len(data["tokens"]))]
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


def trl_inputs(data: dict[str, list], number: int) -> dict:
    """What TRL's generation hands to its loss: prompt and completion ids, and the completion's tool mask."""
    import torch

    tokens, mask = data["tokens"][number], data["loss_masks"][number]
    prompt = len(tokens) - data["response_lengths"][number]
    ids = [torch.tensor([part]) for part in (tokens[:prompt], tokens[prompt:])]
    return {
        "prompt_ids": ids[0],
        "prompt_mask": torch.ones_like(ids[0]),
        "completion_ids": ids[1],
        "completion_mask": torch.ones_like(ids[1]),
        "tool_mask": torch.tensor([mask]),
        "old_per_token_logps": torch.tensor([data["rollout_log_probs"][number]]),
        "advantages": torch.tensor([data["rewards"][number]]),
        "num_items_in_batch": torch.tensor(sum(mask)),
    }


if __name__ == "__main__":
    main()

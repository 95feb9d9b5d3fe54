"""One SFT step, all parameters trained: slime_local's trainer beside TRL's SFTTrainer.

    python benchmarks/sft_step.py            # SmolLM2-135M-Instruct, 4 dialogues of the scripted teacher a step
    python benchmarks/sft_step.py --quick    # 2 dialogues

Same model, dialogues, loss mask and fused AdamW, weights in fp32. TRL runs in whichever of fp32 and bf16 (autocast)
this machine multiplies faster, and without gradient checkpointing, which is slower. Also says which share of that
matrix rate our step reaches: products of the weights and of attention, what the dialogues share counted once.
"""

from __future__ import annotations

import tempfile
import time

from common import Seconds, best_matrix_rate, measure, need, parser, ratio, share_of_rate, smollm2_dir, write_result
from parts.telecom import dialogues, flags, huge_pages, kept_once, step_flops

PEER = ("trl", "accelerate", "datasets")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--dialogues", type=int, help="dialogues a step (4; --quick: 2; 8 are more than 23 GB for TRL)")
    made.add_argument("--repeats", type=int, help="measured steps of each side (3; --quick: 2)")
    args = made.parse_args()
    need("trl", "trl (requirements/bench.txt)")
    huge_pages()
    count = args.dialogues or (2 if args.quick else 4)
    folder = smollm2_dir()
    data = dialogues(folder, count)
    ours, model = our_step(folder, data)
    rate, dtype = best_matrix_rate()
    sides = {"TRL": trl_step(folder, data, dtype == "bfloat16"), "ours": ours}
    seconds = measure(sides, repeats=args.repeats or (2 if args.quick else 3))
    tokens, loss_tokens = sum(len(ids) for ids, _ in data), sum(sum(mask) for _, mask in data)
    shared = {"quick": args.quick, "packages": PEER, "folder": args.results}
    details = {"dialogues": count, "tokens": tokens, "tokens_kept_once": kept_once([ids for ids, _ in data])}
    details |= {"loss_tokens": loss_tokens, "trl_dtype": dtype}
    rates = {side: [tokens / value for value in values] for side, values in seconds.items()}
    question = "SFT step, all parameters: tokens a second beside TRL's SFTTrainer"
    speedup = ratio(seconds, "TRL", "ours")
    write_result("sft-step", question, rates, unit="tokens/s", ratio=speedup, target=5, details=details, **shared)
    flops = step_flops(model, [ids for ids, _ in data], loss_tokens, shared=True)
    share = share_of_rate(flops, seconds["ours"], rate)
    details |= {"matrix_rate_tflops": rate, "flops": flops}
    question = "SFT step: share of the machine's matrix rate"
    write_result(
        "sft-step-rate", question, {"ours": share.median}, unit="%", value=share, target=30, details=details, **shared
    )


def our_step(folder, data):
    """(one optimizer step of slime_local's trainer, its model)"""
    from slime_local.model import load_model
    from slime_local.trainer import Trainer

    count = len(data)
    changes = {"loss_type": "sft_loss", "calculate_per_token_loss": True, "rollout_batch_size": count, "lr": 1e-5}
    changes |= {
        "global_batch_size": count,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 8192,
        "lr_decay_style": "constant",
    }
    model = load_model(folder, device="cpu")
    trainer = Trainer(flags(folder, **changes), model, 100)
    rollout = {
        "tokens": [ids for ids, _ in data],
        "response_lengths": [len(ids) - 1 for ids, _ in data],
        "loss_masks": [mask[1:] for _, mask in data],
    }
    return lambda: trainer.train(0, rollout), model


def trl_step(folder, data, in_bf16: bool):
    """One optimizer step of TRL's SFTTrainer on the same tokens and mask; data loading is not timed."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.began

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="sft-step-"),
        per_device_train_batch_size=len(data),
        max_steps=1,
        max_length=None,
        gradient_checkpointing=False,
        bf16=in_bf16,
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": [i for i, _ in data], "assistant_masks": [m for _, m in data]}),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        callbacks=[clock],
    )

    def step() -> Seconds:
        trainer.train()
        return Seconds(clock.seconds)

    return step


if __name__ == "__main__":
    main()

"""How far the engine's log-probs are from the trainer's, for the same tokens of the same weights.

    python benchmarks/log_probs.py           # 6 dialogues, 40 sampled tokens each; --quick: 2 dialogues
    python benchmarks/log_probs.py --checkpoint runs/local/sft/hf    # untrained, a model is less sure

Each of the scripted teacher's dialogues, cut in its middle, is continued by the engine at temperature 1; the trainer
then computes the log-prob of every token sampled. Once in the dtypes that are chosen here, once in fp32 throughout.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from common import parser, smollm2_dir, spread, write_result
from parts.telecom import dialogues, flags

NEW = 40  # tokens sampled after each prompt


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--checkpoint", type=Path, help="HF folder of a SmolLM2 (default: SmolLM2-135M-Instruct)")
    args = made.parse_args()
    import torch

    from slime_local.model import load_model

    folder = args.checkpoint or smollm2_dir()
    prompts = [ids[: len(ids) // 2] for ids, _ in dialogues(folder, 2 if args.quick else 6)]
    for name, dtypes in (("chosen", {}), ("fp32", {"dtype": torch.float32, "product_dtype": torch.float32})):
        model = load_model(folder, device="cpu", **dtypes).requires_grad_(False)
        gaps = differences(folder, model, prompts)
        products = str(model.product_dtype).removeprefix("torch.")
        question = f"log-probs of {len(gaps)} sampled tokens, products in {products}: engine and trainer apart, mean"
        result = {"details": {"max": max(gaps), "products": products}, "quick": args.quick, "folder": args.results}
        name = f"log-probs-{name}-trained" if args.checkpoint else f"log-probs-{name}"
        write_result(name, question, {"max": max(gaps)}, unit="nats", value=mean(gaps), **result)


def differences(folder, model, prompts: list[list[int]]) -> list[float]:
    """|engine - trainer| of every token that the engine samples after the prompts."""
    import torch

    from slime_local.batching import train_samples
    from slime_local.losses import response_log_probs

    answers = sampled(folder, model, prompts)
    data = {
        "tokens": [prompt + tokens for prompt, (tokens, _) in zip(prompts, answers, strict=True)],
        "response_lengths": [len(tokens) for tokens, _ in answers],
        "loss_masks": [[1] * len(tokens) for tokens, _ in answers],
    }
    with torch.no_grad():
        found, _ = response_log_probs(model, train_samples(data), flags(folder, rollout_temperature=1.0))
    engines = [value for _, log_probs in answers for value in log_probs]
    return [abs(a - b) for a, b in zip(found.tolist(), engines, strict=True)]


def sampled(folder, model, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs that the engine gives for all prompts, in one batch."""
    import torch
    from transformers import AutoTokenizer

    from slime_local.engine import Engine, Request, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    engine = Engine(model, tokenizer, max(map(len, prompts)) + NEW, len(prompts), own_thread=False)
    requests = []
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=1.0, max_new_tokens=NEW, ignore_eos=True, sampling_seed=seed)
        requests.append(Request(prompt, params, Future()))
        engine.submit(requests[-1])
    with torch.inference_mode():
        while not all(request.future.done() for request in requests):
            engine._admit(lambda: False)
            engine._step()
    return [(request.output, request.logprobs) for request in requests]


def mean(values: list[float]):
    return spread([sum(values) / len(values)])


if __name__ == "__main__":
    main()

"""Reading prompts and appending to kept keys and values: slime_local's engine beside transformers with a cache.

    python benchmarks/prefill.py             # 4 prompts of 1.5k tokens; 60 new tokens for each of 40 episodes of 800
    python benchmarks/prefill.py --quick     # 2 prompts; 16 episodes
    python benchmarks/prefill.py --device cuda --shape qwen3-4b    # random weights, bf16; not tried on a GPU

transformers reads one prompt or one append after the other, in fp32 and in bf16; the faster one counts. Ours takes all
at once; no two requests share a prefix. The share of the matrix rate counts the weights' products only.
"""

from __future__ import annotations

from concurrent.futures import Future

from common import best_matrix_rate, measure, parser, ratio, share_of_rate, smollm2_dir, with_the_faster, write_result
from parts.telecom import huge_pages, product_flops

KEPT, NEW, PROMPT = 800, 60, 1500


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, help="runs of each side (5; --quick: 2)")
    made.add_argument("--device", default="cpu")
    made.add_argument("--shape", choices=("smollm2", "qwen3-4b"), default="smollm2")
    args = made.parse_args()
    huge_pages()
    from parts.models import both_models

    ours, theirs = both_models(args.shape, args.device)
    prompts, episodes = (2, 16) if args.quick else (4, 40)
    report("prefill", f"reading {prompts} prompts of {PROMPT} tokens", (prompts, 0, PROMPT), ours, theirs, args)
    appends = f"appending {NEW} tokens to each of {episodes} episodes of {KEPT}"
    report("append", appends, (episodes, KEPT, NEW), ours, theirs, args)


def report(name: str, task: str, work: tuple[int, int, int], ours, theirs, args) -> None:
    """Tokens a second of both sides, and the share of the matrix rate that ours reaches."""
    import torch

    count, _, new = work
    run, engine_steps = our_run(ours, *work)
    sides = {dtype: their_run(model, *work) for dtype, model in theirs.items()} | {"ours": run}
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    seconds = measure(sides, repeats=args.repeats or (2 if args.quick else 5), sync=sync)
    seconds, dtype = with_the_faster(seconds, "transformers")
    rates = {side: [count * new / value for value in values] for side, values in seconds.items()}
    result = {"quick": args.quick, "folder": args.results, "details": {"engine_steps": engine_steps[-1]}}
    result["details"]["transformers_dtype"] = dtype
    speedup = ratio(seconds, "transformers", "ours")
    write_result(name, f"{task}: tokens a second", rates, unit="tokens/s", ratio=speedup, **result)
    rate, dtype = best_matrix_rate(args.device)
    flops = product_flops(ours, count * new, count, passes=1)
    share = share_of_rate(flops, seconds["ours"], rate)
    result |= {"unit": "%", "target": 50, "details": {"matrix_rate_tflops": rate, "matrix_dtype": dtype}}
    result["details"]["product_flops"] = flops
    write_result(f"{name}-rate", f"{task}: share of the matrix rate", {"ours": share.median}, value=share, **result)


def our_run(model, count: int, kept: int, new: int):
    """(reads `new` tokens of each of `count` requests that have kept `kept`, list of how many steps it took)"""
    import torch
    from transformers import AutoTokenizer

    from slime_local.engine import Engine, Request, SamplingParams

    engine = Engine(
        model,
        AutoTokenizer.from_pretrained(smollm2_dir(), trust_remote_code=False),
        kept + new + 8,
        count,
        own_thread=False,
    )
    for slot in engine.slots:
        slot.reserve(kept + new)
        slot.kv.normal_()
    params = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)
    steps = []

    def run() -> None:
        for row, slot in enumerate(engine.slots):
            prompt = [row, *range(kept + new - 1)]
            slot.tokens = prompt[:kept]
            engine.submit(Request(prompt, params, Future()))
        steps.append(0)
        with torch.inference_mode():
            while engine.waiting or engine.running:
                engine._admit(lambda: False)
                engine._step()
                steps[-1] += 1

    return run, steps


def their_run(model, count: int, kept: int, new: int):
    """Forward passes with a cache of `kept` random keys and values, one request after the other."""
    import torch
    from transformers import DynamicCache

    config = model.config
    shape = (1, config.num_key_value_heads, kept, config.head_dim)
    tokens = torch.arange(new, device=model.device)[None]

    def run() -> None:
        with torch.inference_mode():
            for _ in range(count):
                cache = DynamicCache(config=config)
                for layer in range(config.num_hidden_layers if kept else 0):
                    cache.update(*2 * [torch.zeros(shape, device=model.device, dtype=model.dtype)], layer)
                model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return run


if __name__ == "__main__":
    main()

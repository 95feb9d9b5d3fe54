"""Decoding at 1.5k tokens of context: slime_local's engine beside transformers' generate and generate_batch.

    python benchmarks/decode.py              # batches 1, 8, 16, 32, and generate_batch at 16
    python benchmarks/decode.py --quick      # batches 1, 8, 16; no generate_batch
    python benchmarks/decode.py --device cuda --shape qwen3-4b    # random weights in bf16; has not been tried on a GPU

The median of the steps of a run counts, without the reading of the prompts: keys and values are put there, random ones
for both sides. transformers computes in fp32 and in bf16, and the faster one counts. No requests share a prefix, so
ours reads everything too. The bound is the time to read weights, keys and values once at this machine's measured
bandwidth. From some batch on multiplying by the weights takes longer than reading them: the least time has that, at
the measured matrix rate, in place of their reading; attention's own products are for nothing in it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from concurrent.futures import Future

from common import (
    Seconds,
    best_matrix_rate,
    measure,
    parser,
    ratio,
    read_bandwidth,
    smollm2_dir,
    spread,
    with_the_faster,
    write_result,
)
from parts.telecom import huge_pages

CONTEXT = 1500
BLOCK = 256  # tokens in a page of generate_batch's cache


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--batches", type=int, nargs="+")
    made.add_argument("--steps", type=int, default=8, help="decoded tokens a run (%(default)s)")
    made.add_argument("--repeats", type=int, help="runs of each side (5; --quick: 3)")
    made.add_argument("--device", default="cpu")
    made.add_argument("--shape", choices=("smollm2", "qwen3-4b"), default="smollm2")
    args = made.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 5)
    huge_pages()
    from parts.models import both_models

    ours, theirs = both_models(args.shape, args.device)
    for batch in args.batches or ((1, 8, 16) if args.quick else (1, 8, 16, 32)):
        sides = {dtype: generate_run(model, batch, args.steps) for dtype, model in theirs.items()}
        seconds, dtype = with_the_faster(
            measure(sides | {"ours": our_run(ours, batch, args.steps)}, args.repeats), "generate"
        )
        question = f"decoding, {CONTEXT} tokens of context, batch {batch}: tokens a second beside generate"
        rates = {side: [batch / value for value in values] for side, values in seconds.items()}
        result = {"unit": "tokens/s", "target": 4 if batch >= 8 else None, "quick": args.quick, "folder": args.results}
        result["details"] = {"generate_dtype": dtype}
        write_result(f"decode-{batch}", question, rates, ratio=ratio(seconds, "generate", "ours"), **result)
        report_bound(ours, batch, seconds["ours"], args)
    if not args.quick and args.device == "cpu":
        report_generate_batch(ours, theirs["bfloat16"], args)


def report_bound(model, batch: int, seconds: list[float], args) -> None:
    """What share of the reading bound and of the least time a step reaches."""
    from slime_local.loop import _kv_bytes

    numbers = sum(p.numel() for p in model.parameters())
    weights = numbers * model.product_dtype.itemsize / 1e9
    kept = batch * CONTEXT * _kv_bytes(model) / 1e9
    bandwidth = max(read_bandwidth(args.device), sum_bandwidth(args.device))
    rate, dtype = best_matrix_rate(args.device)
    products = 2 * batch * numbers / 1e12 / rate
    bound, least = (weights + kept) / bandwidth, max(weights / bandwidth, products) + kept / bandwidth
    details = {
        "gigabytes_a_step": weights + kept,
        "read_bandwidth_gb_s": bandwidth,
        "matrix_rate_tflops": rate,
        "matrix_dtype": dtype,
        "seconds_of_products": products,
        "least_seconds": least,
    }
    for name, shortest, what, target in (
        ("bound", bound, "share of the bound that memory bandwidth sets", 60 if batch == 1 else None),
        ("least", least, "share of the least time: the weights' reading or products, then keys and values", None),
    ):
        share = spread([100 * shortest / value for value in seconds])
        result = {"unit": "%", "target": target, "quick": args.quick, "folder": args.results, "details": details}
        question = f"decoding at batch {batch}: {what}"
        write_result(f"decode-{batch}-{name}", question, {"ours": share.median}, value=share, **result)


def sum_bandwidth(device: str) -> float:
    """GB/s at which torch adds up 256 MiB: with some libraries faster than their matrix-vector product."""
    import torch

    values = torch.ones(2**26, device=device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = measure({"sum": lambda: values.sum()}, repeats=9, sync=sync)["sum"]
    return 4 * 2**26 / min(seconds) / 1e9


def our_run(model, batch: int, steps: int, context: int = CONTEXT):
    """Seconds of the median step of an engine with `batch` requests of `context` tokens."""
    import torch
    from transformers import AutoTokenizer

    from slime_local.engine import Engine, Request, SamplingParams

    engine = Engine(
        model,
        AutoTokenizer.from_pretrained(smollm2_dir(), trust_remote_code=False),
        context + 64,
        batch,
        own_thread=False,
    )
    prompts = [[row, *range(context)] for row in range(batch)]
    for slot in engine.slots:
        slot.reserve(context + 64)
        slot.kv.normal_()
    params = SamplingParams(temperature=0.0, max_new_tokens=steps + 1, ignore_eos=True)

    def step() -> None:
        engine._admit(lambda: False)
        engine._step()

    def run() -> Seconds:
        for slot, prompt in zip(engine.slots, prompts, strict=True):
            slot.tokens = prompt[:-1]
            engine.submit(Request(prompt, params, Future()))
        with torch.inference_mode():
            clock = list(timestamps(step, steps + 1))
        return median_step(clock)

    return run


def timestamps(function, times: int):
    for _ in range(times):
        function()
        yield time.perf_counter()


def median_step(clock: list[float]) -> Seconds:
    """The first of the steps, which also starts the requests, is left out."""
    return Seconds(statistics.median(b - a for a, b in itertools.pairwise(clock)))


def generate_run(model, batch: int, steps: int):
    """Seconds of the median step of `model.generate` with its default cache."""
    import torch
    from transformers import DynamicCache, StoppingCriteria

    config, device = model.config, model.device
    shape = (batch, config.num_key_value_heads, CONTEXT, config.head_dim)
    tokens = torch.ones(batch, CONTEXT + 1, dtype=torch.long, device=device)

    class Clock(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            self.times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=device)

    clock = Clock()

    def run() -> Seconds:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2)), layer)
        clock.times = []
        options = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            model.generate(tokens, attention_mask=mask, past_key_values=cache, stopping_criteria=[clock], **options)
        return median_step(clock.times)

    return run


def report_generate_batch(ours, theirs, args, batch: int = 16, steps: int = 16) -> None:
    """Continuous batching: the median time between two tokens of the request that starts last."""
    seconds = {
        "generate_batch": generate_batch_run(theirs, batch, steps),
        "ours": [our_run(ours, batch, args.steps)()],
    }
    rates = {side: [batch / value for value in values] for side, values in seconds.items()}
    question = f"decoding, {CONTEXT} tokens of context, batch {batch}: tokens a second beside continuous batching"
    result = {"unit": "tokens/s", "target": 20, "quick": args.quick, "folder": args.results}
    speedup = ratio(seconds, "generate_batch", "ours")
    write_result(f"decode-{batch}-continuous", question, rates, ratio=speedup, **result)


def generate_batch_run(model, batch: int, steps: int) -> list[float]:
    """[seconds of a step] of `model.generate_batch`, with a pool of blocks that just holds the requests."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [[row, *range(100, 99 + CONTEXT)] for row in range(batch)]
    blocks = batch * ((CONTEXT + steps) // BLOCK + 1)
    found = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, page_size=BLOCK),
        record_timestamps=True,
    )
    last = max((output.timestamps for output in found.values()), key=lambda times: times[0])
    return [median_step(last)]


if __name__ == "__main__":
    main()

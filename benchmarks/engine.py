"""Speed of the one-machine engine: tokens read and tokens sampled a second, medians over steps.

    python benchmarks/engine.py --checkpoint runs/SmolLM2-135M-Instruct
    python benchmarks/engine.py --checkpoint DIR --batches 8 32 --length 1000 --shared 400

Every request has `length` tokens of which the first `shared` are the same (a system prompt). Close everything else
that computes: on two cores one busy process beside this slows single steps many times over.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import Future

import torch
from transformers import AutoTokenizer

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from slime_local.engine import Engine, Request, SamplingParams
from slime_local.model import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 40])
    parser.add_argument("--length", type=int, default=800)
    parser.add_argument("--shared", type=int, default=400)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    model = load_model(args.checkpoint).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=False)
    print(f"{args.checkpoint} in {model.dtype}, {torch.get_num_threads()} threads, {args.length} tokens a request")
    with torch.inference_mode():
        for batch in args.batches:
            read, step = measure(model, tokenizer, batch, args)
            rates = f"read {read:6.0f} tokens/s, sampled {batch / step:6.1f} tokens/s, {step:.3f} s a step"
            print(f"{batch:4} requests: {rates}")


def measure(model, tokenizer, batch: int, args: argparse.Namespace) -> tuple[float, float]:
    """(tokens read a second, shared ones counted once; median seconds of a step that samples one token a request)"""
    engine = Engine(model, tokenizer, args.length + args.steps + 8, batch, own_thread=False)
    params = SamplingParams(temperature=0.0, max_new_tokens=args.steps + 4, ignore_eos=True)
    for row in range(batch):
        engine.submit(Request(prompt(model, row, args), params, Future()))
    started = time.perf_counter()
    while engine.waiting or any(request.reading for request in engine.running):
        advance(engine)
    read = (args.shared + batch * (args.length - args.shared)) / (time.perf_counter() - started)
    return read, statistics.median(timed(advance, engine) for _ in range(args.steps))


def prompt(model, row: int, args: argparse.Namespace) -> list[int]:
    vocabulary = model.config.vocab_size
    own = range(args.length - args.shared)
    return [31 * i % vocabulary for i in range(args.shared)] + [(31 * i + 977 * (row + 1)) % vocabulary for i in own]


def advance(engine: Engine) -> None:
    engine._admit(lambda: False)
    engine._step()


def timed(function, *args) -> float:
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

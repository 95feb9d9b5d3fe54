"""How costs grow: live episodes, group size and context length, each doubled; slime_local's engine and trainer.

    python benchmarks/growth.py              # --quick: fewer points and repeats

- episodes: a decoding step of n requests of 1,024 tokens that share nothing
- group size: one prompt of 1,024 tokens read and answered n times with 8 tokens (the prompt is read once)
- context: a decoding step of 8 requests of n tokens
- training: forward and backward of one dialogue of n tokens, all parameters trained

Each doubling is given as its factor in time: 2 is proportional, 1 is free.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future

from common import Seconds, measure, parser, smollm2_dir, spread, write_result
from decode import our_run
from parts.telecom import flags, huge_pages

CONTEXT = 1024
STEPS = 8


def main() -> None:
    args = parser(__doc__).parse_args()
    huge_pages()

    from slime_local.model import load_model

    model = load_model(smollm2_dir(), device="cpu")
    curves: dict[str, tuple[tuple[int, ...], Callable[[int], Callable]]] = {
        "live episodes": ((1, 2, 4, 8, 16, 32), lambda n: our_run(model, n, STEPS, CONTEXT)),
        "group size": ((1, 2, 4, 8, 16), lambda n: group_run(model, n)),
        "context": ((512, 1024, 2048, 4096), lambda n: our_run(model, 8, STEPS, n)),
        "trained tokens": ((512, 1024, 2048), lambda n: training_run(n)),
    }
    for name, (points, make) in curves.items():
        report(name, points[:: 2 if args.quick else 1], make, args)


def report(name: str, points: tuple[int, ...], make: Callable[[int], Callable], args) -> None:
    repeats = 2 if args.quick else 4
    seconds = {str(n): measure({"ours": make(n)}, repeats=repeats)["ours"] for n in points}
    medians = [spread(values).median for values in seconds.values()]
    steps = zip(itertools.pairwise(points), itertools.pairwise(medians), strict=True)
    factors = {f"{a} to {b}": (after / before) ** (1 / math.log2(b / a)) for (a, b), (before, after) in steps}
    write_result(
        f"growth-{name.replace(' ', '-')}",
        f"seconds by {name}",
        seconds,
        quick=args.quick,
        details={"factor_of_a_doubling": factors},
        folder=args.results,
    )


def group_run(model, size: int):
    """Seconds in which an engine reads one prompt and answers it `size` times."""
    import torch
    from transformers import AutoTokenizer

    from slime_local.engine import Engine, Request, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir(), trust_remote_code=False)
    params = SamplingParams(temperature=1.0, max_new_tokens=STEPS, ignore_eos=True)
    first = itertools.count(1)

    def run() -> Seconds:
        engine = Engine(model, tokenizer, CONTEXT + 64, size, own_thread=False)
        prompt = [next(first), *range(CONTEXT - 1)]
        answers: list[Future] = [Future() for _ in range(size)]
        for answer in answers:
            engine.submit(Request(prompt, params, answer))
        began = time.perf_counter()
        with torch.inference_mode():
            while not all(answer.done() for answer in answers):
                engine._admit(lambda: False)
                engine._step()
        return Seconds(time.perf_counter() - began)

    return run


def training_run(length: int):
    """Seconds of one optimizer step on one dialogue of `length` tokens, a fifth of them trained."""

    from slime_local.model import load_model
    from slime_local.trainer import Trainer

    changes = {"loss_type": "sft_loss", "calculate_per_token_loss": True, "rollout_batch_size": 1, "lr": 1e-5}
    changes |= {"global_batch_size": 1, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 8192}
    folder = smollm2_dir()
    trainer = Trainer(flags(folder, **changes, lr_decay_style="constant"), load_model(folder, device="cpu"), 1000)
    mask = [int(i % 5 == 0) for i in range(length - 1)]
    rollout = {"tokens": [list(range(length))], "response_lengths": [length - 1], "loss_masks": [mask]}
    return lambda: trainer.train(0, rollout)


if __name__ == "__main__":
    main()

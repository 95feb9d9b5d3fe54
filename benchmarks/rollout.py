"""A rollout of 4 x 4 telecom episodes: keys and values kept between turns, beside reading all again each turn.

    python benchmarks/rollout.py --checkpoint runs/local/sft/hf     # a trained agent; without: the untrained model
    python benchmarks/rollout.py --quick                            # 2 x 2 episodes

Both sides are this repository's loop, plug-ins and engine, with the same seeds; the second empties a slot before every
request and copies nothing from others: the samples of a group have much the same dialogue. Also says for which share
of a rollout the engine waits: for episodes, which call tools, ask the customer, are built and graded.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from pathlib import Path

from common import EXAMPLE, Seconds, measure, parser, ratio, smollm2_dir, spread, write_result
from parts.telecom import huge_pages, tasks


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--checkpoint", type=Path, help="HF folder of the agent (SmolLM2-135M-Instruct)")
    made.add_argument("--repeats", type=int, default=2, help="rollouts of each side (%(default)s)")
    made.add_argument("--context", type=int, help="tokens an episode may have (1664; --quick: 1024)")
    args = made.parse_args()
    huge_pages()
    side = 2 if args.quick else 4
    command = rollout_flags(args.checkpoint or smollm2_dir(), side, args.context or (1024 if args.quick else 1664))
    outside: list[float] = []
    sides = {"re-reading": lambda: rollout(command, True), "keeping": lambda: rollout(command, False, outside)}
    seconds = measure(sides, repeats=args.repeats, warmup=0)
    question = f"rollout of {side} x {side} telecom episodes: seconds, beside reading everything again each turn"
    result = {"quick": args.quick, "folder": args.results, "details": {"trained": args.checkpoint is not None}}
    write_result("rollout", question, seconds, ratio=ratio(seconds, "re-reading", "keeping"), target=2.5, **result)
    share = spread(outside)
    result |= {"unit": "%", "target": 5, "at_most": True}
    write_result("rollout-outside", "rollout: time outside the engine", {"ours": outside}, value=share, **result)


def rollout_flags(checkpoint: Path, side: int, context: int) -> list[str]:
    """run_local.sh's flags for one rollout of side x side episodes, without training."""
    flags = {
        "--hf-checkpoint": checkpoint,
        "--prompt-data": tasks(),
        "--input-key": "index",
        "--num-rollout": 1,
        "--rollout-batch-size": side,
        "--n-samples-per-prompt": side,
        "--global-batch-size": side * side,
        "--rollout-max-response-len": 4096,
        "--rollout-max-context-len": context,
        "--rollout-temperature": 1.0,
        "--custom-generate-function-path": "generate_with_tau.generate",
        "--custom-reward-post-process-path": "tau2_reward_shaping.tau2_reward_post_process",
        "--custom-config-path": EXAMPLE / "local.yaml",
        "--advantage-estimator": "grpo",
    }
    return [str(word) for pair in flags.items() for word in pair] + ["--debug-rollout-only"]


def rollout(command: list[str], reads_again: bool, outside: list[float] | None = None) -> Seconds:
    """Seconds of the rollout in a run of the loop; `outside` gets the share in which its engine waits, in %."""
    from slime_local import engine, loop
    from slime_local.flags import parse_args

    class ClockedCondition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            began = time.perf_counter()
            try:
                return super().wait(timeout)
            finally:
                Clocked.waited += time.perf_counter() - began

    class Clocked(engine.Engine):
        waited = 0.0
        rollout_seconds = 0.0

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.lock = ClockedCondition()

        def _start(self, request, slot) -> None:
            if reads_again:
                for other in self.slots:
                    if other.request is None:
                        other.tokens = []
            super()._start(request, slot)

        def run_beside(self, *args, **kwargs):
            began = time.perf_counter()
            try:
                return super().run_beside(*args, **kwargs)
            finally:
                Clocked.rollout_seconds = time.perf_counter() - began

    original, loop.Engine = loop.Engine, Clocked
    least, engine.MIN_SHARED_PREFIX = engine.MIN_SHARED_PREFIX, 10**9 if reads_again else engine.MIN_SHARED_PREFIX
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(parse_args(command))
    finally:
        loop.Engine, engine.MIN_SHARED_PREFIX = original, least
    if outside is not None:
        outside.append(100 * Clocked.waited / Clocked.rollout_seconds)
    return Seconds(Clocked.rollout_seconds)


if __name__ == "__main__":
    main()

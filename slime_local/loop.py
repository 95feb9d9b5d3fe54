"""The training loop on one machine: rollout, training, new weights for the engine, checkpoint, evaluation.

Trainer and engine share one model in memory. SFT (--debug-train-only, or the SFT rollout) starts no engine.
"""

import contextlib
import ctypes
import random
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from slime_local import checkpoint
from slime_local.data import load_tokenizer
from slime_local.engine import Engine, kept_dtype
from slime_local.errors import UsageError
from slime_local.metrics import eval_metrics, rollout_metrics, train_data_metrics
from slime_local.model import Transformer, load_model, save_hf
from slime_local.plugins import SFT_ROLLOUT, load_function
from slime_local.rollout import sampling_seed
from slime_local.sample import Sample
from slime_local.server import serve
from slime_local.tracking import Tracker
from slime_local.train_data import (
    convert_samples_to_train_data,
    flatten,
    load_debug_samples,
    save_debug_samples,
    save_plain,
)
from slime_local.trainer import Trainer

MAX_RUNNING = 64
# Share of a GPU's free memory that the engine's KV slots may take; the rest is for gradients and activations.
KV_SHARE = 0.3


@dataclass
class Run:
    """What the steps of one run share."""

    args: Namespace
    model: Transformer
    data_source: Any
    trainer: Trainer | None
    tracker: Tracker
    num_rollout: int
    rollouts_per_epoch: int | None
    engine: Engine | None = None
    started: float = field(default_factory=time.monotonic)


def train(args: Namespace) -> None:
    """Run from the first rollout (or the one after the checkpoint's) to the last. Raises UsageError."""
    _seed(args.seed)
    with checkpoint.sole_writer(args.save):
        run = _prepare(args)
        first = _resume(run)
        with _engine(run):
            if run.num_rollout == 0 and args.eval_interval is not None:
                _evaluate(run, 0)
            if _evaluation_is_owed(run, first):
                _evaluate(run, first - 1)
            for rollout_id in range(first, run.num_rollout):
                _one_rollout(run, rollout_id)
        run.tracker.close()
    _print_summary(run, first)


def _prepare(args: Namespace) -> Run:
    data_source = load_function(args.data_source_path)(args)
    num_rollout, per_epoch = _count_rollouts(args, data_source)
    model = load_model(args.hf_checkpoint)
    trainer = None if args.debug_rollout_only else Trainer(args, model, num_rollout)
    return Run(args, model, data_source, trainer, Tracker(args), num_rollout, per_epoch)


def _count_rollouts(args: Namespace, data_source: Any) -> tuple[int, int | None]:
    """(rollouts of the run, rollouts of an epoch where the run is counted in epochs)."""
    if args.num_rollout is not None:
        return args.num_rollout, None
    per_epoch = len(data_source) // args.rollout_batch_size
    if per_epoch == 0:
        raise UsageError(
            f"--num-epoch: the data has {len(data_source)} rows, less than one rollout of {args.rollout_batch_size}"
        )
    args.num_rollout = per_epoch * args.num_epoch
    return args.num_rollout, per_epoch


def _resume(run: Run) -> int:
    if run.trainer is None:
        return run.args.start_rollout_id or 0
    first = run.trainer.load()
    step = _rollout_step(run.args, first)
    run.tracker.continue_at({"train/rollout": first, "rollout/step": step, "eval/step": step})
    run.args.start_rollout_id = first
    state = run.trainer.loaded_extra.get("data_source")
    if state is not None and hasattr(run.data_source, "load_state_dict"):
        run.data_source.load_state_dict(state)
    elif first > 0 and hasattr(run.data_source, "load"):
        run.data_source.load(first - 1)
    if first > 0:
        print(f"continuing at rollout {first} of {run.num_rollout}", flush=True)
    return first


def _evaluation_is_owed(run: Run, first: int) -> bool:
    """Whether the run was ended between a checkpoint and the evaluation that follows it."""
    args, last = run.args, first - 1
    if first == 0 or args.debug_train_only or not is_due(last, args.eval_interval, run.rollouts_per_epoch):
        return False
    before_training = last == 0 and not args.skip_eval_before_train
    return run.tracker.count("eval/step", _rollout_step(args, last)) < 1 + before_training


# ---- Engine --------------------------------------------------------------------------------------------------


def needs_engine(args: Namespace) -> bool:
    """Whether any rollout or evaluation of this command generates."""
    trains_on_rows = args.rollout_function_path == SFT_ROLLOUT and args.eval_interval is None
    return not (args.debug_train_only or trains_on_rows)


@contextlib.contextmanager
def _engine(run: Run) -> Iterator[None]:
    """The /generate server over the trainer's model; its address goes into args, where plug-ins look for it."""
    args = run.args
    if not needs_engine(args):
        yield
        return
    context = _context_length(args, run.model.config.max_position_embeddings)
    options = {
        "max_context": context,
        "max_running": _max_running(run, context),
        "seed": args.rollout_seed,
        "own_thread": False,
    }
    run.engine = Engine(run.model, load_tokenizer(args.hf_checkpoint), **options)
    host, port = args.sglang_router_ip or "127.0.0.1", args.sglang_router_port or 0
    try:
        with serve(run.engine, host=host, port=port, model_path=str(args.hf_checkpoint)) as address:
            args.sglang_router_ip, args.sglang_router_port = address
            print(f"/generate at http://{address[0]}:{address[1]}, context {context}", flush=True)
            yield
    finally:
        run.engine.close()


def _context_length(args: Namespace, model_limit: int) -> int:
    wanted = args.sglang_context_length or max(args.rollout_max_context_len or 0, args.eval_max_context_len or 0)
    return min(wanted or model_limit, model_limit)


def _max_running(run: Run, context: int) -> int:
    """Samples whose KV the engine keeps at a time: all that a rollout or an evaluation has, as far as memory goes."""
    args = run.args
    limit = args.sglang_max_running_requests or MAX_RUNNING
    if args.sglang_max_running_requests is None and not args.eval_datasets:
        limit = min(limit, args.over_sampling_batch_size * args.n_samples_per_prompt)
    if run.model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.model.device)
        limit = min(limit, int(KV_SHARE * free / (context * _kv_bytes(run.model))))
    return max(1, limit)


def _kv_bytes(model: Transformer) -> int:
    """Bytes of keys and values for one token."""
    attention = model.decoder.layers[0].self_attention
    per_layer = 2 * attention.kv_heads * attention.head_dim * kept_dtype(model).itemsize
    return per_layer * len(model.decoder.layers)


# ---- One rollout ---------------------------------------------------------------------------------------------


def _one_rollout(run: Run, rollout_id: int) -> None:
    args = run.args
    if args.eval_interval is not None and rollout_id == 0 and not args.skip_eval_before_train:
        _evaluate(run, rollout_id)
    started = time.monotonic()
    samples, metrics = _generate(run, rollout_id)
    if run.trainer is not None:
        metrics |= _train(run, rollout_id, samples)
    metrics["perf/step_time"] = time.monotonic() - started
    step = _rollout_step(args, rollout_id)
    by_rollout = {name: value for name, value in metrics.items() if not name.startswith("train/")}
    run.tracker.log({**by_rollout, "rollout/step": step}, step)
    print(_line(run, rollout_id, metrics), flush=True)
    saves = is_due(rollout_id, args.save_interval, run.rollouts_per_epoch, run.num_rollout)
    if saves:
        _save(run, rollout_id)
    if run.engine is not None:
        run.engine.update_weights()
    if run.trainer is not None and (saves or run.engine is not None):
        give_memory_back()
    if is_due(rollout_id, args.eval_interval, run.rollouts_per_epoch):
        _evaluate(run, rollout_id)


def is_due(
    rollout_id: int, interval: int | None, per_epoch: int | None = None, num_rollout: int | None = None
) -> bool:
    """slime's rule: every `interval` rollouts, at the end of an epoch, and (given `num_rollout`) after the last."""
    if interval is None:
        return False
    done = rollout_id + 1
    return done == num_rollout or done % interval == 0 or (per_epoch is not None and done % per_epoch == 0)


def _generate(run: Run, rollout_id: int) -> tuple[list[Sample], dict[str, float]]:
    args = run.args
    _seed(args.rollout_seed, rollout_id)
    if args.load_debug_rollout_data:
        share = args.load_debug_rollout_data_subsample
        return load_debug_samples(args.load_debug_rollout_data, rollout_id, share), {}
    started = time.monotonic()
    output = _call(run, args.rollout_function_path, args, rollout_id, run.data_source, evaluation=False)
    seconds = time.monotonic() - started
    groups, extra = getattr(output, "samples", output), getattr(output, "metrics", None) or {}
    samples = flatten(groups)
    if args.save_debug_rollout_data:
        save_debug_samples(args.save_debug_rollout_data, rollout_id, samples)
    return samples, _rollout_log(args, rollout_id, samples, extra, seconds)


def _call(run: Run, path: str, *arguments: Any, **options: Any) -> Any:
    """Call a rollout function; while it runs in a thread of its own, this thread is the engine's."""
    function = load_function(path)
    if run.engine is None:
        return function(*arguments, **options)
    return run.engine.run_beside(function, *arguments, **options)


def _rollout_log(
    args: Namespace, rollout_id: int, samples: list[Sample], extra: dict[str, Any], seconds: float
) -> dict[str, float]:
    """The rollout's metrics. The plug-in may add to `extra`, and return True when it has logged everything itself."""
    path = args.custom_rollout_log_function_path
    if path and load_function(path)(rollout_id, args, samples, extra, seconds):
        return {"perf/rollout_time": seconds}
    return extra | rollout_metrics(args, samples, seconds)


def _train(run: Run, rollout_id: int, samples: list[Sample]) -> dict[str, float]:
    args = run.args
    data = convert_samples_to_train_data(args, samples)
    if args.save_debug_train_data:
        save_plain(args.save_debug_train_data, rollout_id, {"rollout_data": data})
    _seed(args.seed, rollout_id)
    if run.engine is not None:
        run.engine.flush()  # its keys and values belong to weights that are about to change; training needs the memory
    metrics = train_data_metrics(args, data) | run.trainer.train(rollout_id, data)
    for step in run.trainer.last_steps:
        run.tracker.log({**step, "train/rollout": rollout_id}, step["train/step"])
    return metrics


def _save(run: Run, rollout_id: int) -> None:
    if run.trainer is None:
        return
    saved = []
    if run.args.save_hf:  # first: a run that is ended in between makes both again, and none is ever missing
        path = run.args.save_hf.format(rollout_id=rollout_id)
        saved.append(str(save_hf(run.model, path, run.args.hf_checkpoint)))
    has_state = hasattr(run.data_source, "state_dict")
    folder = run.trainer.save(rollout_id, {"data_source": run.data_source.state_dict()} if has_state else {})
    if not has_state and hasattr(run.data_source, "save"):
        run.data_source.save(rollout_id)
    print(f"saved {', '.join([str(folder), *saved])}", flush=True)


def _evaluate(run: Run, rollout_id: int) -> None:
    args = run.args
    if args.debug_train_only:
        return
    _seed(args.rollout_seed, "eval")
    started = time.monotonic()
    output = _call(run, args.eval_function_path, args, rollout_id, run.data_source, evaluation=True)
    data, extra = getattr(output, "data", output), getattr(output, "metrics", None) or {}
    if args.save_debug_rollout_data:
        samples = [sample for result in data.values() for sample in result["samples"]]
        save_debug_samples(args.save_debug_rollout_data, f"eval_{rollout_id}", samples)
    path, step = args.custom_eval_rollout_log_function_path, _rollout_step(args, rollout_id)
    if path and load_function(path)(rollout_id, args, data, extra):
        run.tracker.note({"eval/step": step}, step)  # or a resumed run would owe this evaluation again
        return
    metrics = extra | eval_metrics(args, data)
    run.tracker.log({**metrics, "eval/step": step}, step)
    scores = ", ".join(f"{name} {metrics[f'eval/{name}']:.3f}" for name in data)
    print(f"eval {rollout_id}: {scores or 'no number'} ({time.monotonic() - started:.0f} s)", flush=True)


def _rollout_step(args: Namespace, rollout_id: int) -> int:
    if not args.wandb_always_use_train_step:
        return rollout_id
    return rollout_id * args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size


def _seed(*parts: Any) -> None:
    """Seed every generator, so that rollout n draws the same whether or not the run was resumed before it."""
    seed = sampling_seed(*parts)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


# ---- What the user sees --------------------------------------------------------------------------------------

SHOWN = {
    "reward": ("rollout/raw_reward", "{:.3f}"),
    "loss": ("train/loss", "{:.4f}"),
    "grad": ("train/grad_norm", "{:.3f}"),
    "lr": ("train/lr", "{:.2e}"),
    "kl": ("train/kl_loss", "{:.4f}"),
    "engine gap": ("train/train_rollout_logprob_abs_diff", "{:.4f}"),
    "tokens": ("rollout/response_len/mean", "{:.0f}"),
    "truncated": ("rollout/truncated_ratio", "{:.2f}"),
    "rollout": ("perf/rollout_time", "{:.1f} s"),
    "train": ("perf/train_time", "{:.1f} s"),
    "tok/s": ("perf/actor_train_tok_per_s", "{:.0f}"),
}
NOT_FOR_SFT = ("reward", "truncated", "rollout")


def _line(run: Run, rollout_id: int, metrics: dict[str, float]) -> str:
    hidden = NOT_FOR_SFT if run.args.loss_type == "sft_loss" else ()
    parts = [
        f"{label} {form.format(metrics[name])}"
        for label, (name, form) in SHOWN.items()
        if name in metrics and label not in hidden
    ]
    return f"rollout {rollout_id + 1}/{run.num_rollout}: " + ", ".join(parts)


def _print_summary(run: Run, first: int) -> None:
    minutes = (time.monotonic() - run.started) / 60
    done = max(0, run.num_rollout - first)
    text = f"done: {done} rollouts in {minutes:.1f} min, peak memory {peak_memory_gb():.1f} GB"
    if run.model.device.type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    if run.trainer is not None and run.trainer.skipped_steps:
        text += f", {run.trainer.skipped_steps} optimizer steps skipped"
    print(text, flush=True)


def give_memory_back() -> None:
    """Return what was freed to the system. run_local.sh has glibc keep it, in pieces that what comes next does not fit
    into: six rollouts of GRPO peaked at 6.3 GB, and at 5.5 with this. SFT, which has no rollouts between, does it only
    where it saves: the new pages are smaller, and training 5 % slower."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""Learning-rate and weight-decay schedule, with Megatron's flags and Megatron's arithmetic.

Progress is counted in samples, as Megatron counts it: every optimizer step moves on by the global batch size, and the
first step uses the value at zero samples (so a warm-up from 0 makes the first step a step of size 0).
"""

import math
from argparse import Namespace

from torch.optim import Optimizer

from slime_local.errors import UsageError

# What a checkpoint and the command line have to agree on, and the flag that says it.
CHECKED = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "init_lr": "--lr-warmup-init",
    "decay_style": "--lr-decay-style",
    "warmup_samples": "--lr-warmup-iters/--lr-warmup-fraction",
    "decay_samples": "--lr-decay-iters (by default the length of the run)",
    "start_wd": "--weight-decay/--start-weight-decay",
    "end_wd": "--weight-decay/--end-weight-decay",
}


def global_batch_size(args: Namespace) -> int:
    """Rollouts per optimizer step; without --global-batch-size that is one micro-batch, as in Megatron."""
    return args.global_batch_size or args.micro_batch_size


def total_optimizer_steps(args: Namespace, num_rollout: int) -> int:
    """Optimizer steps of the whole run, as slime estimates them."""
    return num_rollout * args.rollout_batch_size * args.n_samples_per_prompt // global_batch_size(args)


class Schedule:
    """Sets `lr` and `weight_decay` of every parameter group; groups with `weight_decay` 0 at the start keep it.

    Raises UsageError when the flags contradict each other.
    """

    def __init__(self, args: Namespace, optimizer: Optimizer, num_rollout: int) -> None:
        self.optimizer = optimizer
        self.decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        self.num_samples = 0
        self._read_learning_rate(args, num_rollout)
        self._read_weight_decay(args, num_rollout)
        self.override = args.override_opt_param_scheduler
        self.use_checkpoint = args.use_checkpoint_opt_param_scheduler
        self.apply()

    def _read_learning_rate(self, args: Namespace, num_rollout: int) -> None:
        batch = global_batch_size(args)
        self.max_lr, self.min_lr, self.init_lr = args.lr, args.min_lr, args.lr_warmup_init
        self.decay_style, self.wsd_style = args.lr_decay_style, args.lr_wsd_decay_style
        steps = args.lr_decay_iters or total_optimizer_steps(args, num_rollout)
        self.decay_samples = steps * batch
        if args.lr_warmup_fraction is not None and args.lr_warmup_iters:
            raise UsageError("--lr-warmup-fraction and --lr-warmup-iters exclude each other: give one of them")
        if args.lr_warmup_fraction is not None:
            self.warmup_samples = args.lr_warmup_fraction * self.decay_samples
        else:
            self.warmup_samples = args.lr_warmup_iters * batch
        self.wsd_samples = (args.lr_wsd_decay_iters or 0) * batch
        self._check(num_rollout)

    def _check(self, num_rollout: int) -> None:
        if num_rollout > 0 and self.decay_samples <= 0:
            raise UsageError("this run has no whole optimizer step: lower --global-batch-size or raise --num-rollout")
        if self.max_lr < self.min_lr:
            raise UsageError(f"--min-lr {self.min_lr} is above --lr {self.max_lr}")
        if num_rollout > 0 and self.warmup_samples >= self.decay_samples:
            raise UsageError(
                f"the warm-up ({self.warmup_samples:g} samples) is as long as the whole schedule "
                f"({self.decay_samples} samples): lower --lr-warmup-iters or --lr-warmup-fraction"
            )
        if self.decay_style == "WSD" and not self.wsd_samples:
            raise UsageError("--lr-decay-style WSD needs --lr-wsd-decay-iters")

    def _read_weight_decay(self, args: Namespace, num_rollout: int) -> None:
        self.wd_style = args.weight_decay_incr_style
        constant = self.wd_style == "constant"
        if constant or args.start_weight_decay is None or args.end_weight_decay is None:
            if not constant:
                raise UsageError(
                    f"--weight-decay-incr-style {self.wd_style} needs --start-weight-decay and --end-weight-decay"
                )
            self.start_wd = self.end_wd = args.weight_decay
        else:
            self.start_wd, self.end_wd = args.start_weight_decay, args.end_weight_decay
        self.wd_samples = total_optimizer_steps(args, num_rollout) * global_batch_size(args)

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step."""
        n, warmup, decay = self.num_samples, self.warmup_samples, self.decay_samples
        if warmup > 0 and n <= warmup:
            return self.init_lr + (self.max_lr - self.init_lr) * n / warmup
        if self.decay_style == "constant":
            return self.max_lr
        if n > decay:
            return self.min_lr
        if self.decay_style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(warmup, 1) / max(n, 1)))
        return self.min_lr + self._coefficient((n - warmup) / max(decay - warmup, 1)) * (self.max_lr - self.min_lr)

    def _coefficient(self, done: float) -> float:
        """Share of the way from min_lr up to max_lr, `done` in [0, 1] being the part of the decay already behind."""
        if self.decay_style == "linear":
            return 1.0 - done
        if self.decay_style == "cosine":
            return 0.5 * (math.cos(math.pi * done) + 1.0)
        start = self.decay_samples - self.wsd_samples
        if self.num_samples <= start:
            return 1.0
        annealed = (self.num_samples - start) / self.wsd_samples
        return {
            "linear": 1.0 - annealed,
            "cosine": 0.5 * (math.cos(math.pi * annealed) + 1.0),
            "exponential": 2.0 * 0.5**annealed - 1.0,
            "minus_sqrt": 1.0 - math.sqrt(annealed),
        }[self.wsd_style]

    @property
    def weight_decay(self) -> float:
        """Weight decay of the next optimizer step."""
        if self.num_samples > self.wd_samples or self.start_wd == self.end_wd:
            return self.end_wd
        done = self.num_samples / self.wd_samples
        if self.wd_style == "cosine":
            done = 0.5 * (math.cos(math.pi * (1 - done)) + 1.0)
        return self.start_wd + done * (self.end_wd - self.start_wd)

    def apply(self) -> None:
        """Write the current values into the optimizer's parameter groups."""
        for group, decayed in zip(self.optimizer.param_groups, self.decayed, strict=True):
            group["lr"] = self.lr
            group["weight_decay"] = self.weight_decay if decayed else 0.0

    def step(self, samples: int) -> None:
        """Count `samples` more rollouts as trained on."""
        self.num_samples += samples
        self.apply()

    def state_dict(self) -> dict:
        return {"num_samples": self.num_samples, **{name: getattr(self, name) for name in CHECKED}}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`. A setting that differs from the command line is a UsageError, as in Megatron, unless
        --override-opt-param-scheduler (the command line wins) or --use-checkpoint-opt-param-scheduler is given."""
        for name, flag in CHECKED.items():
            mine, saved = getattr(self, name), state[name]
            if mine == saved or self.override or self._has_no_effect(name):
                continue
            if not self.use_checkpoint:
                raise UsageError(
                    f"the checkpoint was made with {flag} = {saved}, this command says {mine}: give the same value, "
                    "or --override-opt-param-scheduler (this command wins), "
                    "or --use-checkpoint-opt-param-scheduler (the checkpoint wins)"
                )
            setattr(self, name, saved)
        self.num_samples = state["num_samples"]
        self.apply()

    def _has_no_effect(self, name: str) -> bool:
        return self.decay_style == "constant" and (
            name in ("decay_samples", "min_lr") or (name == "init_lr" and not self.warmup_samples)
        )

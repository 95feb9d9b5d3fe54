"""Policy training on one machine: AdamW steps over rollouts, with slime's flags and slime's arithmetic.

trainer = Trainer(args, model, num_rollout)
first = trainer.load()                       # resumes, or starts from --ref-load / --hf-checkpoint
metrics = trainer.train(rollout_id, data)    # data from convert_samples_to_train_data
trainer.save(rollout_id, {"data_source": source.state_dict()})
"""

import logging
import re
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slime_local import checkpoint
from slime_local.advantages import compute_advantages
from slime_local.batching import TrainSample, micro_batches, split_into_steps, train_samples
from slime_local.errors import UsageError
from slime_local.losses import normaliser, policy_loss, reducer, response_log_probs, sft_loss
from slime_local.schedule import Schedule, global_batch_size

logger = logging.getLogger(__name__)


class Trainer:
    """Owns the optimizer, the schedule and the reference weights of `model`, which it trains in place.

    Attributes: `last_steps`, the metrics of each optimizer step of the last `train`; `skipped_steps`, how many steps
    of this run had a gradient that is not finite; `loaded_extra`, the `extra` of the checkpoint that `load` resumed.
    Raises UsageError for flags that cannot be met.
    """

    def __init__(self, args: Namespace, model: nn.Module, num_rollout: int) -> None:
        check_flags(args)
        self.args = args
        self.model = model
        freeze_parameters(model, args)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(args, self.trainable)
        self.schedule = Schedule(args, self.optimizer, num_rollout)
        self.needs_reference = args.loss_type == "policy_loss" and (args.use_kl_loss or args.kl_coef != 0)
        self.reference: dict[str, Tensor] | None = None
        if self.needs_reference:
            checkpoint.reference_location(args)
        self.weights_from = checkpoint.Location(Path(args.hf_checkpoint), None) if args.hf_checkpoint else None
        self.optimizer_steps = 0
        self.skipped_steps = 0
        self.last_steps: list[dict[str, float]] = []
        self.loaded_extra: dict = {}

    # ---- One rollout -----------------------------------------------------------------------------------------

    def train(self, rollout_id: int, data: dict) -> dict[str, float]:
        """Train on one rollout: as many optimizer steps as it has global batches. Returns the means of the steps'
        metrics under slime's names (`train/...`, `rollout/...`, `perf/...`)."""
        started = time.perf_counter()
        batch = global_batch_size(self.args)
        steps = split_into_steps(train_samples(data, self.model.device), batch)
        samples = [sample for step in steps for sample in step]
        metrics = self._prepare_policy(samples, len(steps)) if self.args.loss_type == "policy_loss" else {}
        if self.args.reset_optimizer_states:
            self.optimizer.state.clear()
        self.model.weights_changed(trained_only=True)  # gives the engine's copies of them back
        train_started = time.perf_counter()
        self.last_steps = []
        with tqdm(total=len(samples), desc="train", unit="sample", leave=False, disable=None) as bar:
            for index, step in enumerate(steps):
                done = self._optimizer_step(step, batch, bar)
                self.last_steps.append({**done, "train/step": rollout_id * len(steps) + index})
        self.model.weights_changed()
        metrics |= _means(self.last_steps)
        return metrics | self._speed(samples, started, train_started)

    def _speed(self, samples: list[TrainSample], started: float, train_started: float) -> dict[str, float]:
        now = time.perf_counter()
        tokens = sum(len(sample.tokens) for sample in samples if sample.has_loss)
        return {
            "perf/train_time": now - started,
            "perf/actor_train_time": now - train_started,
            "perf/actor_train_tok_per_s": tokens / (now - train_started),
        }

    # ---- Before the steps: log-probs and advantages ----------------------------------------------------------

    def _prepare_policy(self, samples: list[TrainSample], num_steps: int) -> dict[str, float]:
        """Fill in what policy_loss reads beside the model; returns the rollout's means of it."""
        self._check_engine_log_probs(samples)
        metrics: dict[str, float] = {}
        needs_old = self._needs_old_log_probs(num_steps)
        if self.needs_reference:
            self._load_reference()
        if (self.needs_reference or needs_old) and self._shares_frozen_layers():
            with _timed(metrics, "perf/frozen_layers_time"):
                self._run_frozen_layers(samples)
        if self.needs_reference:
            with _timed(metrics, "perf/ref_log_probs_time"), self._reference_weights():
                self._record_log_probs(samples, "ref_log_probs")
        if needs_old:
            with _timed(metrics, "perf/log_probs_time"):
                self._record_log_probs(samples, "log_probs", "value" if self.args.use_rollout_entropy else "no")
        compute_advantages(self.args, samples)
        return metrics | self._rollout_means(samples)

    def _check_engine_log_probs(self, samples: list[TrainSample]) -> None:
        needed = self.args.use_tis or self.args.get_mismatch_metrics or self.args.use_rollout_logprobs
        missing = sum(sample.rollout_log_probs is None for sample in samples)
        if needed and missing:
            raise UsageError(
                f"{missing} of {len(samples)} samples have no rollout_log_probs, which --use-tis, "
                "--use-rollout-logprobs and --get-mismatch-metrics need: the generate function has to set them"
            )

    def _needs_old_log_probs(self, num_steps: int) -> bool:
        """With a single step per rollout the loss is on-policy, and its own log-probs are the old ones."""
        args = self.args
        if args.get_mismatch_metrics:
            return True
        on_policy = num_steps == 1 and args.kl_coef == 0 and args.advantage_estimator != "gspo"
        return not args.use_rollout_logprobs and not on_policy

    def _shares_frozen_layers(self) -> bool:
        """Whether there are layers that the policy, before and after its steps, and the reference have in common."""
        own = (self.reference or {}).keys() <= self.trainable.keys()
        return own and self.model.frozen_layers > 0

    def _run_frozen_layers(self, samples: list[TrainSample]) -> None:
        for batch in micro_batches(samples, self.args, self.args.log_probs_max_tokens_per_gpu):
            lengths = [len(sample.tokens) for sample in batch]
            lower = self.model.run_frozen(torch.cat([sample.tokens for sample in batch]), lengths)
            for sample, part in zip(batch, lower.split(lengths), strict=True):
                sample.lower = part

    @torch.no_grad()
    def _record_log_probs(self, samples: list[TrainSample], attribute: str, entropy: str = "no") -> None:
        for name in (attribute, "entropy") if entropy == "value" else (attribute,):
            for sample in samples:
                setattr(sample, name, torch.zeros_like(sample.loss_mask))
        for batch in micro_batches(samples, self.args, self.args.log_probs_max_tokens_per_gpu):
            log_probs, entropies = response_log_probs(self.model, batch, self.args, entropy)
            _spread(batch, attribute, log_probs)
            if entropies is not None:
                _spread(batch, "entropy", entropies)

    def _rollout_means(self, samples: list[TrainSample]) -> dict[str, float]:
        mean = reducer(samples, per_token=False)
        count = normaliser(samples, per_token=False)
        metrics = {}
        for name in ("log_probs", "ref_log_probs", "rollout_log_probs", "entropy", "advantages", "returns"):
            values = [getattr(sample, name) for sample in samples]
            if all(value is not None for value in values):
                metrics[f"rollout/{name}"] = float(mean(torch.cat(values))) / count
        return metrics

    # ---- One optimizer step ----------------------------------------------------------------------------------

    def _optimizer_step(self, samples: list[TrainSample], batch: int, bar: tqdm) -> dict[str, float]:
        scale = 1.0 / normaliser(samples, self.args.calculate_per_token_loss)
        sums = Counter()
        parts: dict[bool, list[TrainSample]] = {True: [], False: []}
        for sample in samples:
            parts[self._has_gradient(sample)].append(sample)
        learning, still = (micro_batches(part, self.args) for part in parts.values())
        for group in [*learning, *still]:
            with torch.set_grad_enabled(group in learning):
                loss, metrics = self._loss(group)
            if loss.requires_grad:
                (loss * scale).backward()
            sums.update({name: float(value) * scale for name, value in metrics.items()})
            bar.update(len(group))
        if not learning:  # as in slime, also where all are removed: a gradient of 0 is a gradient, and moments decay
            for parameter in self.trainable.values():
                parameter.grad = torch.zeros_like(parameter)
        norm = self._clipped_gradient_norm()
        result = {f"train/{name}": value for name, value in sums.items()}
        result |= {"train/grad_norm": norm, "train/lr": self.schedule.lr, "train/global_batch_size": batch}
        self._apply_gradient(result, batch)
        result["train/skipped_steps"] = self.skipped_steps
        return result

    def _loss(self, samples: list[TrainSample]) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.args
        if args.loss_type == "sft_loss":
            return sft_loss(args, samples, response_log_probs(self.model, samples, args)[0])
        entropy = "grad" if args.entropy_coef != 0 else "value"
        return policy_loss(args, samples, *response_log_probs(self.model, samples, args, entropy))

    def _has_gradient(self, sample: TrainSample) -> bool:
        """False where the loss is the same for any weights: nothing but advantages, all 0 (a group of equal rewards).
        Such samples count in the metrics and the normaliser, and need no backward pass."""
        args = self.args
        kl = args.use_kl_loss and args.kl_loss_coef != 0
        if args.loss_type != "policy_loss" or args.entropy_coef != 0 or kl:
            return True
        return bool(sample.advantages.any())

    def _clipped_gradient_norm(self) -> float:
        limit = self.args.clip_grad if self.args.clip_grad > 0 else float("inf")
        return float(nn.utils.clip_grad_norm_(list(self.trainable.values()), limit))

    def _apply_gradient(self, result: dict[str, float], batch: int) -> None:
        """Step the optimizer and the schedule, unless the gradient or the loss is not finite."""
        norm, loss = result["train/grad_norm"], result.get("train/loss", 0.0)
        if _finite(norm) and _finite(loss):
            self.optimizer.step()
            self.model.weights_changed(trained_only=True)
            self.optimizer_steps += 1
            self.schedule.step(batch)
        else:
            self.skipped_steps += 1
            logger.error(
                "optimizer step skipped: loss %s, gradient norm %s (%d skipped so far)", loss, norm, self.skipped_steps
            )
        self.optimizer.zero_grad(set_to_none=True)

    # ---- Reference weights -----------------------------------------------------------------------------------

    def _load_reference(self) -> None:
        """Keep the reference's values of every parameter that differs from it or is going to."""
        if self.reference is not None:
            return
        location = checkpoint.reference_location(self.args)
        if location == self.weights_from and self.optimizer_steps == 0:
            self.reference = {name: p.detach().clone() for name, p in self.trainable.items()}
            return
        parameters = dict(self.model.named_parameters())
        self.reference = {}
        for name, value in checkpoint.read_weights(location, list(parameters), self.model.config):
            value = _fitting(value, parameters[name], name, location)
            if name in self.trainable or not torch.equal(value, parameters[name]):
                self.reference[name] = value

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The model computes with the reference's weights inside."""
        self._swap_reference()
        try:
            yield
        finally:
            self._swap_reference()

    def _swap_reference(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in self.reference.items():
            self.reference[name], parameters[name].data = parameters[name].data, value
        self.model.weights_changed()

    # ---- Checkpoints -----------------------------------------------------------------------------------------

    def load(self, path: str | None = None) -> int:
        """Load what the run starts from (`checkpoint.find_start`; `path` stands in for --load) and say so in one line.

        The model is expected to hold the weights of --hf-checkpoint. Returns the first rollout id: the one after the
        checkpoint's when it continues a run, else 0 (or --start-rollout-id). Raises UsageError.
        """
        args = Namespace(**{**vars(self.args), "load": path or self.args.load})
        start = checkpoint.find_start(args)
        print(f"{start.reason}: {start.location}", flush=True)
        if start.location != self.weights_from:
            self._load_weights(start.location)
        first = self._resume(start.location) if start.resume else 0
        return first if args.start_rollout_id is None else args.start_rollout_id

    @torch.no_grad()
    def _load_weights(self, location: checkpoint.Location) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in checkpoint.read_weights(location, list(parameters), self.model.config):
            parameters[name].copy_(_fitting(value, parameters[name], name, location))
        self.model.weights_changed()
        self.weights_from = location

    def _resume(self, location: checkpoint.Location) -> int:
        state = checkpoint.read_state(location)
        if missing := {"schedule", "random", "optimizer_steps", "skipped_steps", "extra"} - state.keys():
            raise UsageError(f"{location}/state.pt holds no {', '.join(sorted(missing))}: choose an older iteration")
        if not self.args.no_load_optim:
            self._load_optimizer(location)
            self.schedule.load_state_dict(state["schedule"])
        if not self.args.no_load_rng and state["random"] is not None:
            checkpoint.set_random_state(state["random"])
        self.optimizer_steps = state["optimizer_steps"]
        self.skipped_steps = state["skipped_steps"]
        self.loaded_extra = state["extra"]
        return location.iteration + 1

    def _load_optimizer(self, location: checkpoint.Location) -> None:
        saved = checkpoint.read_optimizer(location)
        if saved is None:
            raise UsageError(f"{location} was saved without optimizer state: add --no-load-optim or --finetune")
        unknown = sorted(saved.keys() - self.trainable.keys())
        missing = sorted(self.trainable.keys() - saved.keys()) if saved else []
        if unknown or missing:
            raise UsageError(
                f"{location} was trained with other parameters frozen ({(unknown or missing)[0]}): give the same "
                "--only-train-params-name-list/--freeze-params-name-list, or --no-load-optim"
            )
        for name, slots in saved.items():
            device = self.trainable[name].device
            self.optimizer.state[self.trainable[name]] = {slot: value.to(device) for slot, value in slots.items()}

    def save(self, rollout_id: int, extra: dict | None = None) -> Path:
        """Write iteration `rollout_id` under --save and return its folder. `extra` (plain values and tensors, such as
        the data source's state) comes back as `loaded_extra`."""
        if self.args.save is None:
            raise UsageError("--save is not given: there is no folder to save to")
        state = {
            "schedule": self.schedule.state_dict(),
            "random": None if self.args.no_save_rng else checkpoint.random_state(),
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": self.skipped_steps,
            "extra": extra or {},
        }
        weights = dict(self.model.named_parameters())
        optimizer = None if self.args.no_save_optim else self._optimizer_state()
        previous = checkpoint.saved_iterations(self.args.save)
        folder = checkpoint.write(self.args.save, rollout_id, weights, optimizer, state)
        self._drop_unretained(previous, rollout_id)
        return folder

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        state = self.optimizer.state
        return {name: dict(state[p]) for name, p in self.trainable.items() if p in state}

    def _drop_unretained(self, previous: list[int], newest: int) -> None:
        """--save-retain-interval: the iteration before this one goes unless it is a multiple (Megatron's rule)."""
        interval = self.args.save_retain_interval
        for iteration in previous[-1:]:
            if interval and iteration % interval and iteration < newest:
                shutil.rmtree(checkpoint.iteration_folder(self.args.save, iteration))


# ---- Parts -------------------------------------------------------------------------------------------------------


def check_flags(args: Namespace) -> None:
    """Raise UsageError for settings that the losses cannot meet."""
    if args.loss_type not in ("policy_loss", "sft_loss"):
        raise UsageError(f"--loss-type {args.loss_type} is not available on one machine: policy_loss or sft_loss")
    if args.loss_type == "sft_loss":
        return
    if args.advantage_estimator == "ppo":
        raise UsageError("--advantage-estimator ppo needs a critic, which is not available on one machine")
    if not args.compute_advantages_and_returns:
        raise UsageError("--disable-compute-advantages-and-returns leaves policy_loss without advantages")
    if args.get_mismatch_metrics and args.custom_tis_function_path is None:
        raise UsageError("--get-mismatch-metrics needs --custom-tis-function-path")
    if args.eps_clip_c is not None and args.eps_clip_c <= 1.0:
        raise UsageError(f"--eps-clip-c {args.eps_clip_c} must be above 1")
    if args.rollout_top_p != 1.0:
        raise UsageError("--rollout-top-p below 1 would need the nucleus of every sampled token; train with 1.0")


def freeze_parameters(model: nn.Module, args: Namespace) -> None:
    """Set `requires_grad` by --only-train-params-name-list or --freeze-params-name-list: regular expressions, searched
    in the Megatron names. Raises UsageError when one matches nothing or nothing is left to train."""
    only, freeze = args.only_train_params_name_list, args.freeze_params_name_list
    if only and freeze:
        raise UsageError("--only-train-params-name-list and --freeze-params-name-list exclude each other")
    flag = "--only-train-params-name-list" if only else "--freeze-params-name-list"
    patterns = {pattern: _compiled(pattern, flag) for pattern in only or freeze or []}
    parameters = dict(model.named_parameters())
    for pattern, compiled in patterns.items():
        if not any(compiled.search(name) for name in parameters):
            raise UsageError(f"{flag} {pattern!r} matches no parameter; one is called {next(iter(parameters))}")
    for name, parameter in parameters.items():
        matched = any(compiled.search(name) for compiled in patterns.values())
        parameter.requires_grad_(matched if only else not matched)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(f"{flag} leaves no parameter to train")


def _compiled(pattern: str, flag: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from error


def build_optimizer(args: Namespace, trainable: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW over fp32 parameters, without weight decay for biases and one-dimensional ones (Megatron's grouping)."""
    plain = [p for name, p in trainable.items() if name.endswith(".bias") or p.dim() == 1]
    decayed = [p for name, p in trainable.items() if not (name.endswith(".bias") or p.dim() == 1)]
    # The schedule writes the real decay; here it only marks the group as decayed.
    groups = [{"params": decayed, "weight_decay": 1.0}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        fused=True,
    )


def _fitting(value: Tensor, parameter: Tensor, name: str, location: checkpoint.Location) -> Tensor:
    if value.shape != parameter.shape:
        raise UsageError(
            f"{location}: {name} has shape {tuple(value.shape)}, this model's is {tuple(parameter.shape)}"
        )
    return value.to(device=parameter.device, dtype=parameter.dtype)


def _spread(samples: list[TrainSample], attribute: str, values: Tensor) -> None:
    """Give each sample its part of the per-token `values` [R]."""
    for sample, part in zip(samples, values.split([s.response_length for s in samples]), strict=True):
        setattr(sample, attribute, part)


@contextmanager
def _timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    metrics[name] = time.perf_counter() - started


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the steps that report a metric; counters and the learning rate as after the last step."""
    last = ("train/step", "train/lr", "train/skipped_steps")
    names = dict.fromkeys(name for step in steps for name in step)
    result = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        result[name] = values[-1] if name in last else sum(values) / len(values)
    return result


def _finite(value: float) -> bool:
    return abs(value) < float("inf")

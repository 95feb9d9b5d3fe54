"""A rollout: groups of samples generated over the /generate server and filtered; and evaluations.

`--rollout-function-path slime.rollout.sglang_rollout.generate_rollout` (slime's default) leads here. The order is
slime's: generate, reward where the plug-in left none, dynamic filter for each group, abort what still runs, sample
filter. `slime_local.train_data` takes it from there.
"""

import asyncio
import copy
import hashlib
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tqdm import tqdm

from slime_local.data import Dataset, load_tokenizer, template_renderer
from slime_local.errors import UsageError
from slime_local.filters import call_filter
from slime_local.flags import EvalDataset
from slime_local.generate import Limits, generate_and_reward, known_reward, post, reward_many, server_url
from slime_local.plugins import load_function
from slime_local.sample import Sample
from slime_local.sampling import eval_sampling_params, rollout_sampling_params

ABORT_EVERY_SECONDS = 1.0


@dataclass
class RolloutOutput:
    """Groups in the order of their indices, and what the rollout counted, for the log."""

    samples: list[list[Any]]
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvalOutput:
    """For each data set {"rewards", "truncated", "samples"}, in the order of its rows."""

    data: dict[str, dict[str, list[Any]]]
    metrics: dict[str, Any] = field(default_factory=dict)


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutOutput | EvalOutput:
    """One training rollout of --rollout-batch-size groups, or one evaluation on every data set."""
    if evaluation:
        return run_in_loop(_evaluate(args))
    return run_in_loop(_Rollout(args, rollout_id, data_source).run())


# ---- Event loop ----------------------------------------------------------------------------------------------


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop in one thread for all rollouts, so that what a plug-in keeps between them stays usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollout", daemon=True).start()
    return loop


def run_in_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run in the rollout loop and wait. An interrupt cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


# ---- One training rollout ------------------------------------------------------------------------------------


class _Rollout:
    def __init__(self, args: Any, rollout_id: int, data_source: Any):
        self.args, self.rollout_id, self.data_source = args, rollout_id, data_source
        self.pending: set[asyncio.Task] = set()
        self.promised = 0  # groups submitted and not dropped
        self.kept: list[list[Any]] = []
        self.finished: list[list[Any]] = []
        self.dropped: Counter[str] = Counter()
        self.filter = _optional(args.dynamic_sampling_filter_path)

    async def run(self) -> RolloutOutput:
        self.limits = Limits(self.args)
        self.bar = progress(self.args.rollout_batch_size * self.args.n_samples_per_prompt, "rollout")
        try:
            while len(self.kept) < self.args.rollout_batch_size:
                self._submit()
                await self._collect()
            await self._abort()
        finally:
            self.bar.close()
            for task in self.pending:
                task.cancel()
        return self._output()

    def _submit(self) -> None:
        while self.promised < self.args.rollout_batch_size:
            groups = self.data_source.get_samples(self.args.over_sampling_batch_size)
            self.promised += len(groups)
            self.pending |= {asyncio.create_task(self._group(group)) for group in groups}

    async def _group(self, group: list[Sample]) -> list[Any]:
        if self.limits.aborted:
            return group
        params = [self._sampling_params(position, sample) for position, sample in enumerate(group)]
        tasks = [
            generate_and_reward(self.args, sample, own, self.limits, self.rollout_id)
            for sample, own in zip(group, params, strict=True)
        ]
        done = await asyncio.gather(*tasks)
        if self.args.group_rm and not self.limits.aborted:
            rewards = await reward_many(self.args, done)
            for sample, reward in zip(done, rewards, strict=True):
                sample.reward = reward
        return list(done)

    def _sampling_params(self, position: int, sample: Sample) -> dict[str, Any]:
        if sample.session_id is None:
            sample.session_id = str(
                uuid.UUID(bytes=_digest(self.args.rollout_seed, self.rollout_id, sample.index)[:16])
            )
        if self.args.sglang_enable_deterministic_inference:
            seed = self.args.rollout_seed + position
        else:
            seed = sampling_seed(self.args.rollout_seed, self.rollout_id, sample.index)
        return {**rollout_sampling_params(self.args), "sampling_seed": seed}

    async def _collect(self) -> None:
        done, self.pending = await asyncio.wait(self.pending, return_when=asyncio.FIRST_COMPLETED)
        groups = sorted((task.result() for task in done), key=_group_key)
        for group in groups:
            self._judge(group)

    def _judge(self, group: list[Any]) -> None:
        if len(group) != self.args.n_samples_per_prompt:
            raise UsageError(f"a group came back with {len(group)} of {self.args.n_samples_per_prompt} samples")
        self.finished.append(group)
        output = call_filter(self.filter, self.args, group)
        too_few = output.keep_when_insufficient and self.promised <= self.args.rollout_batch_size
        if not output.keep and not too_few:
            self.dropped[output.reason or ""] += 1
            self.promised -= 1
            self.bar.set_postfix(dropped=self.dropped.total())
        elif len(self.kept) < self.args.rollout_batch_size:
            self.kept.append(group)
            self.bar.update(len(group))

    async def _abort(self) -> None:
        """End what is still running: nothing of it is used, and the engine has to be idle for new weights."""
        self.limits.aborted = True
        while self.pending:
            await post(server_url(self.args, "/abort_request"), {"abort_all": True})
            _, self.pending = await asyncio.wait(self.pending, timeout=ABORT_EVERY_SECONDS)

    def _output(self) -> RolloutOutput:
        kept = sorted(self.kept, key=_group_key)
        if self.args.rollout_sample_filter_path:
            load_function(self.args.rollout_sample_filter_path)(self.args, kept)
        if self.args.rollout_all_samples_process_path:
            process = load_function(self.args.rollout_all_samples_process_path)
            process(self.args, sorted(self.finished, key=_group_key), self.data_source)
        metrics = {f"rollout/dynamic_filter/drop_{reason}": n for reason, n in self.dropped.items() if reason}
        return RolloutOutput(kept, metrics)


def sampling_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on every part and on nothing else, so that a resumed run samples the same."""
    return int.from_bytes(_digest(*parts)[:4], "big") >> 1


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _group_key(group: list[Any]) -> int:
    return (group[0][0] if isinstance(group[0], list) else group[0]).index


def progress(total: int, name: str) -> tqdm:
    """A progress bar on a terminal; nothing elsewhere."""
    return tqdm(total=total, desc=name, unit="sample", leave=False, disable=not sys.stderr.isatty())


def _optional(path: str | None) -> Any:
    return load_function(path) if path else None


# ---- Evaluation ----------------------------------------------------------------------------------------------


async def _evaluate(args: Any) -> EvalOutput:
    if args.group_rm:
        raise UsageError("--group-rm has no evaluation: give --eval-function-path")
    limits = Limits(args)
    results = await asyncio.gather(*(_evaluate_dataset(args, dataset, limits) for dataset in args.eval_datasets))
    return EvalOutput({dataset.name: result for dataset, result in zip(args.eval_datasets, results, strict=True)})


async def _evaluate_dataset(args: Any, dataset: EvalDataset, limits: Limits) -> dict[str, list[Any]]:
    samples = _eval_samples(args, dataset)
    shared = eval_sampling_params(dataset)
    tasks = []
    for sample in samples:
        params = {**shared, "sampling_seed": sampling_seed(args.rollout_seed, dataset.name, sample.index)}
        tasks.append(asyncio.create_task(generate_and_reward(args, sample, params, limits, evaluation=True)))
    done = await _gather_with_bar(tasks, f"eval {dataset.name}")
    flat = [sample for result in done for sample in (result if isinstance(result, list) else [result])]
    flat.sort(key=lambda sample: sample.index)
    key = args.eval_reward_key
    return {
        "rewards": [known_reward(sample.reward[key] if key else sample.reward, sample) for sample in flat],
        "truncated": [sample.status is Sample.Status.TRUNCATED for sample in flat],
        "samples": flat,
    }


async def _gather_with_bar(tasks: list[asyncio.Task], name: str) -> list[Any]:
    bar = progress(len(tasks), name)
    for task in tasks:
        task.add_done_callback(lambda _: bar.update())
    try:
        return await asyncio.gather(*tasks)
    finally:
        bar.close()
        for task in tasks:
            task.cancel()


_eval_data: dict[str, Dataset] = {}


def _eval_samples(args: Any, settings: EvalDataset) -> list[Sample]:
    """Fresh copies of the data set's prompts, n for each, indexed from 0."""
    key = repr((settings, args.hf_checkpoint))
    if key not in _eval_data:
        _eval_data[key] = _load_eval_data(args, settings)
    samples = []
    for prompt in _eval_data[key].samples:
        for _ in range(settings.n_samples_per_eval_prompt):
            sample = copy.deepcopy(prompt)
            sample.index = len(samples)
            sample.metadata = {**sample.metadata, **settings.metadata_overrides}
            sample.custom_rm_path = settings.custom_rm_path
            sample.generate_function_path = settings.custom_generate_function_path
            samples.append(sample)
    return samples


def _load_eval_data(args: Any, settings: EvalDataset) -> Dataset:
    tokenizer = load_tokenizer(args.hf_checkpoint)
    options = settings.apply_chat_template_kwargs
    return Dataset(
        settings.path,
        prompt_key=settings.input_key,
        label_key=settings.label_key,
        tool_key=settings.tool_key,
        metadata_key=settings.metadata_key,
        render=template_renderer(tokenizer, options) if settings.apply_chat_template else None,
        tokenizer=tokenizer,
        max_length=args.eval_max_prompt_len,
    )

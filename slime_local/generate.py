"""One sample: the generate plug-in or a plain /generate call, then its reward."""

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

import aiohttp

from slime_local.data import load_tokenizer
from slime_local.errors import UsageError
from slime_local.plugins import load_function
from slime_local.sample import Sample


class Limits:
    """What the samples of one rollout share: how many run at a time, and whether the rollout has ended."""

    def __init__(self, args: Any):
        self.running = asyncio.Semaphore(args.sglang_server_concurrency)
        self.aborted = False


async def generate_and_reward(
    args: Any,
    sample: Sample,
    sampling_params: dict[str, Any],
    limits: Limits,
    rollout_id: int | None = None,
    evaluation: bool = False,
) -> Any:
    """Generate one sample and reward it unless the plug-in did. A plug-in may return a list cut out of one episode."""
    async with limits.running:
        if limits.aborted:
            sample.status = Sample.Status.ABORTED
            return sample
        result = await _generate_one(args, sample, sampling_params, evaluation)
    result = await _apply_hooks(args, result, rollout_id=rollout_id, evaluation=evaluation)
    if not args.group_rm:
        await _reward(args, result if isinstance(result, list) else [result])
    return result


async def _generate_one(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool) -> Any:
    path = sample.generate_function_path or args.custom_generate_function_path
    if not path:
        return await generate(args, sample, sampling_params)
    function = load_function(path)
    if "evaluation" in inspect.signature(function).parameters:
        return await function(args, sample, sampling_params, evaluation=evaluation)
    return await function(args, sample, sampling_params)


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Without a plug-in: one /generate call that answers the prompt text."""
    if not isinstance(sample.prompt, str):
        raise UsageError("prompts are not text: add --apply-chat-template, or --custom-generate-function-path")
    sample.tokens = load_tokenizer(args.hf_checkpoint).encode(sample.prompt, add_special_tokens=False)
    payload = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
    answer = await post(server_url(args, "/generate"), payload)
    pairs = answer["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[pair[1] for pair in pairs],
        log_probs=[pair[0] for pair in pairs],
        meta_info=answer["meta_info"],
        text=answer["text"],
    )
    return sample


async def _apply_hooks(args: Any, value: Any, **options: Any) -> Any:
    if isinstance(value, list):
        return [await _apply_hooks(args, item, **options) for item in value]
    for path in args.rollout_sample_hook_path or []:
        hook = load_function(path)
        result = hook(args, value, **_accepted(hook, options))
        result = await result if inspect.isawaitable(result) else result
        value = value if result is None else result
    return value


def _accepted(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


async def _reward(args: Any, samples: list[Sample]) -> None:
    if any(sample.status is Sample.Status.ABORTED for sample in samples):
        return
    waiting = [sample for sample in samples if sample.reward is None]
    rewards = await asyncio.gather(*(_reward_one(args, sample) for sample in waiting))
    for sample, reward in zip(waiting, rewards, strict=True):
        sample.reward = reward


def _reward_one(args: Any, sample: Sample) -> Awaitable[Any]:
    path = sample.custom_rm_path or args.custom_rm_path
    if not path:
        raise UsageError("the generate function sets no reward: add --custom-rm-path")
    return load_function(path)(args, sample)


async def reward_many(args: Any, samples: list[Sample]) -> list[Any]:
    if args.custom_rm_path:
        return await load_function(args.custom_rm_path)(args, samples)
    return await asyncio.gather(*(_reward_one(args, sample) for sample in samples))


def known_reward(reward: Any, sample: Sample) -> Any:
    """`reward`. Raises UsageError where a sample came back without one."""
    if reward is None:
        raise UsageError(f"sample {sample.index} ({sample.status.value}) came back without a reward")
    return reward


def server_url(args: Any, endpoint: str) -> str:
    """Address of the /generate server that the loop started."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


async def post(url: str, payload: dict[str, Any]) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=payload) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {(await response.text())[:500]}")
        return await response.json() if response.content_type == "application/json" else {}

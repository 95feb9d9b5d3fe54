"""Which groups a rollout keeps: our equivalents of slime's dynamic sampling filters."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime_local.plugins import may_end_job
from slime_local.sample import Sample


@dataclass
class DynamicFilterOutput:
    """A filter's word on one group. A group that is not kept may still fill a batch that would stay short of it."""

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


def check_reward_nonzero_std(args: Any, samples: list[Sample], **_: Any) -> DynamicFilterOutput:
    """Keep a group whose rewards differ: equal rewards give no advantage."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    keep = len(rewards) > 1 and statistics.stdev(rewards) > 1e-6
    return DynamicFilterOutput(keep, None if keep else f"zero_std_{round(rewards[0], 1)}")


def check_reward_nonzero_std_with_fallback(args: Any, samples: list[Sample], **_: Any) -> DynamicFilterOutput:
    """The same, but no further round of sampling is started for it."""
    output = check_reward_nonzero_std(args, samples)
    output.keep_when_insufficient = True
    return output


def call_filter(function: Callable[..., Any] | None, args: Any, group: list[Sample]) -> DynamicFilterOutput:
    """The filter's output, which may also be a plain truth value; without a filter every group is kept."""
    if function is None:
        return DynamicFilterOutput(True)
    with may_end_job(args.dynamic_sampling_filter_path):
        output = function(args, group)
    return output if hasattr(output, "keep") else DynamicFilterOutput(bool(output))

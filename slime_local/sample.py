"""The record that travels from the data source through generation to training, with slime's field names.

Plug-ins get one `Sample` for each episode, change it in place and return it.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass
class PrefixCacheInfo:
    """How much of a sample's prompts the engine found in its KV cache, summed over its /generate calls."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        return {"cached_tokens": self.cached_tokens, "total_prompt_tokens": self.total_prompt_tokens}


@dataclass
class Sample:
    """One prompt with, after generation, its response. Lengths are in tokens.

    `tokens` is prompt ids + response ids; `loss_mask` and `rollout_log_probs` cover the response only, so each has
    `response_length` entries (0 and 0.0 where the model did not sample the token). Samples of one prompt share
    `group_index`. Samples cut out of one episode share a `rollout_id`, which is None where an episode is one sample.
    """

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: Any = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    @property
    def effective_response_length(self) -> int:
        """Response tokens under the loss; all of them while there is no mask."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> Any:
        """`reward`, or its --reward-key entry where the reward is a dict."""
        return self.reward[args.reward_key] if args.reward_key else self.reward

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Iterable[int] | None = None,
        log_probs: Iterable[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append tokens to the response and keep mask and log-probs in step.

        Sampled tokens are `trainable` and come with their `log_probs`; tokens from the environment are not and get
        mask 0 and log-prob 0.0. `meta_info` is the server's: it sets the status from the finish reason, the weight
        version and the cache counts. Raises ValueError where tokens and log-probs do not belong together.
        """
        new_tokens = [int(token) for token in tokens] if tokens is not None else []
        new_log_probs = _aligned_log_probs(new_tokens, log_probs, trainable)
        if text is not None:
            self.response += text
        if new_tokens:
            self._extend(new_tokens, new_log_probs, trainable)
        if meta_info is not None and update_terminal_info:
            self._read_meta_info(meta_info)

    def _extend(self, tokens: list[int], log_probs: list[float], trainable: bool) -> None:
        before = self.response_length
        if self.rollout_log_probs is None and trainable and before:
            raise ValueError("the response so far has no log-probs, so sampled tokens cannot follow it")
        self.loss_mask = [1] * before if self.loss_mask is None else self.loss_mask
        self.rollout_log_probs = [0.0] * before if self.rollout_log_probs is None else self.rollout_log_probs
        self.tokens += tokens
        self.response_length += len(tokens)
        self.loss_mask += [int(trainable)] * len(tokens)
        self.rollout_log_probs += log_probs
        if len(self.loss_mask) != self.response_length:
            raise ValueError(f"loss_mask has {len(self.loss_mask)} entries for {self.response_length} response tokens")

    def _read_meta_info(self, meta_info: dict[str, Any]) -> None:
        reason = meta_info.get("finish_reason")
        if reason is None:
            return
        self.prefix_cache_info.add(meta_info)
        if "weight_version" in meta_info:
            self.weight_versions.append(meta_info["weight_version"])
        self.status = FINISH_STATUS.get(reason["type"], self.status)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, so that the file they are saved in loads without unpickling classes."""
        value = dict(self.__dict__)
        value["status"] = self.status.value
        value["prefix_cache_info"] = self.prefix_cache_info.to_dict()
        return copy.deepcopy(value)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Sample":
        """The inverse of `to_dict`; keys that are not fields become attributes."""
        data = copy.deepcopy(data)
        data["status"] = Sample.Status(data["status"])
        data["prefix_cache_info"] = PrefixCacheInfo(**data.get("prefix_cache_info", {}))
        names = Sample.__dataclass_fields__
        sample = Sample(**{key: value for key, value in data.items() if key in names})
        for key in data.keys() - names.keys():
            setattr(sample, key, data[key])
        return sample


FINISH_STATUS = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}


def _aligned_log_probs(tokens: list[int], log_probs: Iterable[float] | None, trainable: bool) -> list[float]:
    if not trainable:
        if tokens and log_probs is not None:
            raise ValueError("tokens that the model did not sample have no log-probs")
        return [0.0] * len(tokens)
    values = [float(value) for value in log_probs] if log_probs is not None else []
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} sampled tokens came with {len(values)} log-probs")
    return values

"""What a request may ask of the sampling, by SGLang's names, and what a run asks for. Nothing here loads a library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_REQUESTS = 1024  # that a server reads, lets wait or runs; what comes on top is answered 503 before it is read
LARGEST_NUMBER = 1e9  # of a sampling parameter
GREEDY_BELOW = 1e-6  # SGLang's: a lower temperature takes the likeliest token, and log-probs at temperature 1
# Parameters of SGLang's that are accepted with these values, which change nothing; a text is never trimmed here.
NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_p": 0.0, "n": 1}
NEUTRAL |= {"no_stop_trim": True}


class RequestError(Exception):
    """A request that the engine refuses; the server answers it with HTTP 400 and this text."""


class ParameterError(RequestError):
    """A sampling parameter that is refused: its `name`, and `told`, its value and why."""

    def __init__(self, name: str, value: object, why: str) -> None:
        self.name, self.told = name, f"{str(value)[:40]} {why}"
        super().__init__(f"sampling_params.{name}={self.told}")


@dataclass
class SamplingParams:
    """The part of SGLang's sampling_params that this engine honours; anything else must be unset or neutral."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    sampling_seed: int | None = None

    @classmethod
    def from_payload(cls, given: dict) -> SamplingParams:
        """Build from a request; RequestError names a value that is out of range or a parameter not supported."""
        if not isinstance(given or {}, dict):
            raise RequestError("sampling_params must be a JSON object")
        given = {name: value for name, value in (given or {}).items() if value is not None}
        known = {name: given.pop(name) for name in list(given) if name in cls.__dataclass_fields__}
        for name, value in given.items():
            if name != "spaces_between_special_tokens" and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise ParameterError(name, value, "is not supported here")
        if isinstance(known.get("stop"), str):
            known["stop"] = [known["stop"]]
        params = cls(**known)
        params._check()
        return params

    def _check(self) -> None:
        """A wrong value must not reach the engine's thread, where it would end every request."""
        for name in ("temperature", "top_p"):
            self._require(name, type(getattr(self, name)) in (int, float), "a number")
        for name in ("top_k", "max_new_tokens", "min_new_tokens"):
            self._require(name, type(getattr(self, name)) is int, "a whole number")
        for name in ("ignore_eos", "skip_special_tokens"):
            self._require(name, type(getattr(self, name)) is bool, "true or false")
        self._require("temperature", 0 <= self.temperature < LARGEST_NUMBER, "0 or more, and finite")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("top_k", -1 <= self.top_k < LARGEST_NUMBER, "-1 or more")
        self._require("max_new_tokens", 1 <= self.max_new_tokens < LARGEST_NUMBER, "1 or more")
        self._require("min_new_tokens", 0 <= self.min_new_tokens < LARGEST_NUMBER, "0 or more")
        self._require("stop", _is_list_of(self.stop, str) and "" not in self.stop, "a list of texts, none empty")
        self._require("stop_token_ids", _is_list_of(self.stop_token_ids, int), "a list of token ids")
        seed = self.sampling_seed
        self._require("sampling_seed", seed is None or (type(seed) is int and 0 <= seed < 2**64), "0 or more")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ParameterError(name, getattr(self, name), f"must be {what}")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


# ---- What a run asks for -------------------------------------------------------------------------------------


def rollout_sampling_params(args: Any) -> dict[str, Any]:
    """SGLang's sampling_params for training, without a seed."""
    return {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


def eval_sampling_params(settings: Any) -> dict[str, Any]:
    """SGLang's sampling_params for one evaluation data set, without a seed."""
    params = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_new_tokens": settings.max_response_len,
        "stop": settings.stop,
        "stop_token_ids": settings.stop_token_ids,
        "skip_special_tokens": settings.skip_special_tokens,
        "no_stop_trim": True if settings.no_stop_trim is None else settings.no_stop_trim,
        "spaces_between_special_tokens": False,
    }
    optional = {"repetition_penalty": settings.repetition_penalty, "min_new_tokens": settings.min_new_tokens}
    return params | {name: value for name, value in optional.items() if value is not None}

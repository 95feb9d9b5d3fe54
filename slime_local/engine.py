"""The inference engine: token ids in, token ids with log-probs out, in the shape of SGLang's `/generate`.

One thread runs all live requests together, its own or the caller's (`run`). In each step every request contributes the
tokens it still has to read, or the one it sampled last; the projections run over all of them at once, attention over
each request's own KV slot.
A slot stays filled after its request is done, so the next turn of an episode reads only its new tokens, and a new
request starts from whichever slot shares its longest prefix (the system prompt, for a new episode).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import mmap
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slime_local import kernels
from slime_local.compiled_decoder import CompiledDecoder, fits
from slime_local.kept_attention import KeptAttention
from slime_local.model import Transformer
from slime_local.prefixes import common_prefix, decode_plan
from slime_local.sampling import GREEDY_BELOW, RequestError, SamplingParams

# Copying a shared prefix from another slot pays off above about this many tokens.
MIN_SHARED_PREFIX = 16
# Slots grow by multiples of so many tokens,
KV_BLOCK = 256
# and are copied by multiples of so many, the most that kernels.c mixes.
KV_PANEL = 32


@dataclass
class Slot:
    """Keys and values of one dialogue: `tokens` are the ids that they belong to.

    kv [layers, 2, kv_heads, capacity, head_dim] grows with the dialogue, a quarter at a time.
    It is copied by whole KV_PANELs: within one, the kernels have an order of their own (kernels.c).
    """

    index: int
    kv: Tensor
    tokens: list[int] = field(default_factory=list)
    request: Request | None = None
    last_used: int = 0

    def reserve(self, n: int) -> None:
        """Make room for n tokens."""
        capacity = self.kv.shape[3]
        if n > capacity:
            shape = list(self.kv.shape)
            shape[3] = -(-max(n, capacity * 5 // 4) // KV_BLOCK) * KV_BLOCK
            grown = room_of_its_own(shape, self.kv)
            _copy(self.kv, grown, len(self.tokens))
            self.kv = grown

    def copy_prefix(self, donor: Slot, n: int) -> None:
        self.tokens = []
        self.reserve(n)
        _copy(donor.kv, self.kv, n)


def room_of_its_own(shape: list[int], like: Tensor) -> Tensor:
    """A tensor of this shape whose memory the system gets back at once when it goes. In malloc's heap, which training
    takes turns with, slots of all sizes would leave holes."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    # A shared mapping, mmap's default, takes no huge pages where the system keeps them from shared memory.
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _copy(kv: Tensor, to: Tensor, n: int) -> None:
    """The first n tokens' keys and values."""
    whole = -(-n // KV_PANEL) * KV_PANEL
    to[..., :whole, :] = kv[..., :whole, :]


@dataclass(eq=False)
class Request:
    prompt: list[int]
    params: SamplingParams
    future: Future
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: Slot | None = None
    pending: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    aborted: bool = False
    rid: str | None = None

    @property
    def reading(self) -> bool:
        """True until the whole prompt has been read."""
        return len(self.slot.tokens) < len(self.prompt)


class Engine:
    """Continuous batching over `max_running` KV slots of at most `max_context` tokens each.

    Memory: 2 * layers * kv_heads * head_dim values a token held (46 kB for SmolLM2-135M in fp32, 23 kB in bf16).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer,
        max_context: int = 8192,
        max_running: int = 64,
        max_step_tokens: int = 2048,
        seed: int = 0,
        own_thread: bool = True,
    ):
        config = model.config
        self.model, self.tokenizer = model, tokenizer
        self.max_context = min(max_context, config.max_position_embeddings)
        self.max_step_tokens = max_step_tokens
        self.weight_version = 0
        self.eos = eos_ids(model, tokenizer)
        attention = model.decoder.layers[0].self_attention
        shape = (len(model.decoder.layers), 2, attention.kv_heads, 0, attention.head_dim)
        self.compiled = CompiledDecoder(model) if fits(model) else None
        empty = torch.empty(shape, dtype=kept_dtype(model), device=model.device)
        self.slots = [Slot(i, empty) for i in range(max_running)]
        self.cos, self.sin = model.rope(torch.arange(self.max_context, device=model.device))
        self.rng = np.random.default_rng(seed)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.clock = itertools.count()
        self.lock = threading.Condition()
        self.closed = False
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        if own_thread:
            self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
            self.thread.start()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Answer requests in this thread until the engine is closed or `until` holds (`wake` makes it look again).

        A process computes fastest in a single thread: a second one that uses torch has a pool of OpenMP workers of its
        own, and two pools on the same cores were measured two to three times slower.
        """
        try:
            with torch.inference_mode():
                while self._admit(until):
                    self._step()
        except BaseException as error:  # every caller gets the reason
            self.failure = error
            raise
        finally:
            if self.failure or self.closed:
                self._fail_requests()

    def run_beside(self, function: Callable, *args, **kwargs):
        """The result of function(*args, **kwargs), called in another thread while this one answers its requests.

        Where the engine fails, or Ctrl-C ends it, nobody waits for that thread: a rollout that gets no answers may
        begin new episodes for ever. What it leaves unanswered, of a caller that has gone away, is aborted."""
        result: Future = Future()

        def call() -> None:
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)
            self.wake()

        threading.Thread(target=call, name="beside-engine", daemon=True).start()
        self.run(until=result.done)
        self._abort_all()
        return result.result()

    def _abort_all(self) -> None:
        with self.lock:
            for request in [*self.waiting, *self.running]:
                self._finish_aborted(request)

    def wake(self) -> None:
        with self.lock:
            self.lock.notify()

    # ---- what callers use ----------------------------------------------------------------------------------------

    async def generate(self, payload: dict) -> dict:
        """One `/generate` request: {"input_ids" or "text", "sampling_params", "rid"} -> SGLang's answer."""
        request = self._request(payload)
        self.submit(request)
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            request.aborted = True
            raise

    def submit(self, request: Request) -> None:
        with self.lock:
            if self.closed or self.failure:
                raise RuntimeError(f"the engine has stopped: {self.failure or 'closed'}")
            request.future.set_running_or_notify_cancel()  # from here on only the engine ends it
            self.waiting.append(request)
            self.lock.notify()

    def abort(self, rid: str | None = None) -> None:
        """End the request `rid`, or all of them, with finish_reason abort; tokens sampled so far are returned."""
        with self.lock:
            for request in [*self.waiting, *self.running]:
                if rid is None or request.rid == rid:
                    request.aborted = True
            self.lock.notify()

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def update_weights(self, model: Transformer | None = None) -> None:
        """Take new weights: the trainer's, already in place when it shares its model, else copied from `model`.

        Kept KV belongs to the old weights, so every slot is emptied. Call it while no request is running.
        """
        with self.lock:
            if self.running:
                raise RuntimeError("weights can only change while no request is running")
            if model is not None and model is not self.model:
                with torch.no_grad():
                    for mine, new in zip(self.model.parameters(), model.parameters(), strict=True):
                        mine.copy_(new)
            self.model.weights_changed()
            self._flush()
            self.weight_version += 1

    def flush(self) -> None:
        """Empty every idle slot and give its memory back."""
        with self.lock:
            self._flush()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify()
        if self.thread is not None:
            self.thread.join()

    # ---- steps --------------------------------------------------------------------------------------------------

    def _fail_requests(self) -> None:
        reason = self.failure or RuntimeError("the engine was closed")
        with self.lock:
            for request in [*self.waiting, *self.running]:
                if not request.future.done():
                    request.future.set_exception(RuntimeError(f"the engine has stopped: {reason!r}"))
            self.waiting.clear()
            self.running.clear()

    def _admit(self, until: Callable[[], bool]) -> bool:
        """Wait for work, end aborted requests, give waiting ones a slot. False when there is to be no further step."""
        with self.lock:
            while not (self.closed or until() or self.waiting or self.running):
                self.lock.wait()
            if self.closed or until():
                return False
            for request in [r for r in [*self.waiting, *self.running] if r.aborted]:
                self._finish_aborted(request)
            for request in list(self.waiting):
                if self._worth_waiting(request):
                    continue
                slot = self._free_slot(request.prompt)
                if slot is None:
                    break
                self.waiting.remove(request)
                self._start(request, slot)
            return True

    def _worth_waiting(self, request: Request) -> bool:
        """True while a running request still reads a prefix that this one shares: soon it can be copied."""
        ready = max(common_prefix(slot.tokens, request.prompt) for slot in self.slots)
        coming = max((common_prefix(r.prompt, request.prompt) for r in self.running if r.reading), default=0)
        return coming >= ready + MIN_SHARED_PREFIX

    def _free_slot(self, prompt: list[int]) -> Slot | None:
        """The idle slot sharing the longest prefix with `prompt`; an empty or the oldest one if none shares much."""
        idle = [slot for slot in self.slots if slot.request is None]
        if not idle:
            return None
        shared = {slot.index: common_prefix(slot.tokens, prompt) for slot in idle}
        best = max(idle, key=lambda slot: shared[slot.index])
        # Reuse only a slot that this prompt continues: overwriting another episode's KV would cost that episode.
        if shared[best.index] == len(best.tokens) and best.tokens:
            return best
        return min(idle, key=lambda slot: (len(slot.tokens) > 0, slot.last_used))

    def _start(self, request: Request, slot: Slot) -> None:
        limit = len(request.prompt) - 1  # the last prompt token is always computed: its logits are needed
        shared = common_prefix(slot.tokens, request.prompt, limit)
        donor = max(self.slots, key=lambda other: common_prefix(other.tokens, request.prompt, limit))
        donated = common_prefix(donor.tokens, request.prompt, limit)
        if donated >= shared + MIN_SHARED_PREFIX:
            slot.copy_prefix(donor, donated)
            shared = donated
        slot.tokens = request.prompt[:shared]
        slot.request, request.slot = request, slot
        slot.last_used = next(self.clock)
        request.cached_tokens, request.pending = shared, request.prompt[shared:]
        self.running.append(request)

    def _step(self) -> None:
        """Advance every running request by the tokens it has pending (up to max_step_tokens in all)."""
        batch, budget = [], self.max_step_tokens
        for request in sorted(self.running, key=lambda r: len(r.pending)):
            if budget > 0:
                chunk = request.pending[:budget]
                budget -= len(chunk)
                batch.append((request, chunk))
        batch.sort(key=lambda pair: (len(pair[1]), pair[0].slot.tokens if len(pair[1]) == 1 else []))
        if not batch:
            return
        hidden = self._forward(batch)
        ready = []
        for (request, chunk), last in zip(batch, hidden, strict=True):
            request.slot.tokens.extend(chunk)
            del request.pending[: len(chunk)]
            if not request.pending:
                ready.append((request, last))
        if ready:
            self._sample([r for r, _ in ready], self.model.logits(torch.stack([h for _, h in ready])))

    def _forward(self, batch: list[tuple[Request, list[int]]]) -> Tensor:
        """Run the new tokens of each request through the model, KV written; last hidden states [len(batch), H].

        The requests with a single new token come first, sorted by their tokens.
        """
        model, device = self.model, self.model.device
        starts = [len(request.slot.tokens) for request, _ in batch]
        lengths = [len(chunk) for _, chunk in batch]
        for (request, _), start, length in zip(batch, starts, lengths, strict=True):
            request.slot.reserve(start + length)
        plan = decode_plan([request.slot.tokens for request, chunk in batch if len(chunk) == 1])
        step = [request.slot.kv for request, _ in batch], starts, lengths, plan
        tokens = torch.tensor([t for _, chunk in batch for t in chunk], device=device)
        spans = zip(starts, lengths, strict=True)
        positions = torch.tensor([i for start, n in spans for i in range(start, start + n)], device=device)
        cos, sin = self.cos[positions], self.sin[positions]
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        x = model.embed(tokens)
        if self.compiled is not None:
            return model.final_norm(self.compiled(x, cos, sin, *step)[last])
        attention = KeptAttention(*step)
        for index, layer in enumerate(model.decoder.layers):
            attended = attention(index, *layer.self_attention.qkv(x, cos, sin))
            if index + 1 == len(model.decoder.layers):  # only the last position of each request is needed from here
                x, attended = x[last], attended[last]
            x = layer.finish(x, attended)
        return model.final_norm(x)

    def _sample(self, requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            if len(request.output) < request.params.min_new_tokens:
                row[self._known_ids(self.eos.union(request.params.stop_token_ids))] = -torch.inf
        ids, logprobs = sample(logits, [r.params for r in requests], [self._uniform(r) for r in requests])
        for request, token, logprob in zip(requests, ids, logprobs, strict=True):
            request.output.append(token)
            request.logprobs.append(logprob)
            request.pending = [token]
            reason = self._finish_reason(request, token)
            if reason is not None:
                with self.lock:
                    self._finish(request, reason)

    def _known_ids(self, ids: set[int]) -> list[int]:
        """Those in the vocabulary: clients also name the stop tokens of other models, which never come."""
        return [i for i in ids if 0 <= i < self.model.config.vocab_size]

    def _uniform(self, request: Request) -> float:
        """The random number for the next token: a function of (seed, position) when it has a seed."""
        if request.params.sampling_seed is None:
            return self.rng.random()
        position = len(request.prompt) + len(request.output)
        return np.random.default_rng((request.params.sampling_seed, position)).random()

    def _finish_reason(self, request: Request, token: int) -> dict | None:
        params = request.params
        full = len(request.prompt) + len(request.output) >= self.max_context
        if full or len(request.output) >= params.max_new_tokens:  # first, as in slime's SGLang (0.5.15)
            return {"type": "length", "length": len(request.output)}
        if token in params.stop_token_ids or (token in self.eos and not params.ignore_eos):
            return {"type": "stop", "matched": token}
        if params.stop and len(request.output) >= params.min_new_tokens:
            text = self.tokenizer.decode(request.output)
            for stop in params.stop:
                if stop in text:
                    return {"type": "stop", "matched": stop}
        return None

    def _finish_aborted(self, request: Request) -> None:
        self._finish(request, {"type": "abort", "message": "aborted"})

    def _finish(self, request: Request, reason: dict) -> None:
        """Answer a request and leave its slot filled for the next turn. Called with the lock held."""
        if request in self.running:
            self.running.remove(request)
            request.slot.request = None
        else:
            self.waiting.remove(request)
        if not request.future.done():
            request.future.set_result(self._answer(request, reason))

    def _answer(self, request: Request, reason: dict) -> dict:
        text = self.tokenizer.decode(request.output, skip_special_tokens=request.params.skip_special_tokens)
        pairs = [[logprob, token, None] for logprob, token in zip(request.logprobs, request.output, strict=True)]
        return {
            "text": text,
            "output_ids": request.output,
            "meta_info": {
                "id": request.rid,
                "finish_reason": reason,
                "prompt_tokens": len(request.prompt),
                "completion_tokens": len(request.output),
                "cached_tokens": request.cached_tokens,
                "weight_version": str(self.weight_version),
                "output_token_logprobs": pairs,
            },
        }

    def _request(self, payload: dict) -> Request:
        if not isinstance(payload, dict):
            raise RequestError("the request body must be a JSON object")
        if payload.get("stream"):
            raise RequestError("stream=true is not supported here")
        ids = payload.get("input_ids")
        if ids is None and isinstance(payload.get("text"), str):
            text = payload["text"].encode(errors="replace").decode()  # half a surrogate pair has no tokens
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not isinstance(ids, list) or not ids:
            raise RequestError("input_ids must be a non-empty list of token ids (or give text)")
        vocab = self.model.config.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise RequestError(f"input_ids must be integers from 0 to {vocab - 1}")
        if len(ids) >= self.max_context:
            raise RequestError(f"the prompt has {len(ids)} tokens, the context is {self.max_context}")
        params = SamplingParams.from_payload(payload.get("sampling_params"))
        return Request(list(ids), params, Future(), rid=payload.get("rid"))

    def _flush(self) -> None:
        if self.compiled is not None:
            self.compiled.drop()
        for slot in self.slots:
            if slot.request is None:
                slot.tokens, slot.kv = [], slot.kv[..., :0, :].clone()


def kept_dtype(model: Transformer) -> torch.dtype:
    """Of keys and values."""
    return model.product_dtype if fits(model) else model.compute_dtype


def eos_ids(model: Transformer, tokenizer) -> set[int]:
    """Every id that ends a turn: the tokenizer's and the folder's."""
    return {i for i in (*model.config.eos_token_id, tokenizer.eos_token_id) if i is not None}


def sample(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Next tokens [N] from logits [N, V], with their log-probs.

    As in SGLang, a log-prob is that of softmax(logits / temperature) before top-p and top-k; a temperature below
    GREEDY_BELOW is greedy and reports softmax(logits).
    """
    temperatures = [p.temperature if p.temperature >= GREEDY_BELOW else 0.0 for p in params]
    whole = all(p.top_k <= 0 and p.top_p == 1 for p in params)
    if whole and kernels.available(logits.dtype, logits.dtype, logits.device):
        return kernels.sample(logits, temperatures, uniforms)
    scale = torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)
    logprobs = torch.log_softmax(logits / scale[:, None], dim=-1)
    ids = logits.argmax(dim=-1)
    drawn = [i for i, temperature in enumerate(temperatures) if temperature > 0]
    if drawn:
        kept = truncate(logprobs[drawn], [params[i] for i in drawn])
        ids[drawn] = draw(kept, torch.tensor([uniforms[i] for i in drawn], device=logits.device))
    return ids.tolist(), logprobs.gather(1, ids[:, None])[:, 0].tolist()


def truncate(logprobs: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities [N, V] with everything outside top-k and top-p set to 0 (not renormalised)."""
    probs = logprobs.exp()
    for row, p in enumerate(params):
        if p.top_k > 0 or p.top_p < 1:
            values, order = probs[row].sort(descending=True)
            keep = (values.cumsum(0) - values) < p.top_p
            if p.top_k > 0:
                keep[p.top_k :] = False
            probs[row, order[~keep]] = 0.0
    return probs


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draws [N] from unnormalised probabilities [N, V] with one uniform number each."""
    cumulative = probs.double().cumsum(dim=-1)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)

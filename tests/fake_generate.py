"""A stand-in for the inference server at the outer edge: `/generate` that says what the scripted teacher would say.

It keeps one teacher per routing key, reads the new messages out of the token ids, and checks that every request
repeats the ids of the one before. Sampled ids are cut differently from how the tokenizer would cut the same text, as a
real model's can be: whoever decodes and encodes again is caught.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator

from aiohttp import web

from openai_tool_adapter import render_turn
from tau2_teacher import ScriptedTeacher

ANSWER = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
USER = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n", re.DOTALL)


class FakeModel:
    """`behave(number of the request, payload)` may return an answer, an HTTP status, or None for the teacher."""

    def __init__(self, template, agent: type = ScriptedTeacher, model_path: str = "fake"):
        self.template, self.agent, self.model_path = template, agent, model_path
        self.behave: Callable[[int, dict], dict | int | None] = lambda number, payload: None
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.sessions: dict[str, tuple] = {}
        self.broken_prefixes: list[str] = []
        self.delay = 0.0
        self.max_context = 8192

    async def generate(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.requests.append(payload)
        self.headers.append(dict(request.headers))
        if self.delay:
            await asyncio.sleep(self.delay)
        special = self.behave(len(self.requests), payload)
        if isinstance(special, int):
            return web.json_response({"error": {"message": "no"}}, status=special)
        return web.json_response(special or await self._teach(request.headers["X-SMG-Routing-Key"], payload))

    async def _teach(self, key: str, payload: dict) -> dict:
        ids = payload["input_ids"]
        agent, said = self.sessions.get(key, (None, []))
        if len(ids) <= len(said) or agent is None:  # a new episode under this key
            agent, said = self.agent(), []
        if ids[: len(said)] != said:
            self.broken_prefixes.append(key)
        if not said:
            await agent.start([], [])
        turn = await agent.act([{"role": "user", "content": self._last_message(ids[len(said) :])}])
        sampled = [*self._odd_ids(render_turn(turn)), self.template.end_id]
        self.sessions[key] = (agent, ids + sampled)
        return self.answer(sampled, ids, cached=len(said))

    def _last_message(self, ids: list[int]) -> str:
        text = USER.findall(self.template.tokenizer.decode(ids))[-1]
        results = ANSWER.findall(text)
        return results[-1] if results else text

    def _odd_ids(self, text: str) -> list[int]:
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        return [i for piece in pieces for i in self.template.tokenizer.encode(piece, add_special_tokens=False)]

    def answer(self, sampled: list[int], prompt: list[int], finish: str = "stop", cached: int = 0) -> dict:
        return {
            "text": "the text is not what counts",
            "output_ids": sampled,
            "meta_info": {
                "finish_reason": {"type": finish},
                "output_token_logprobs": [[-0.001 * (i + 1), token, None] for i, token in enumerate(sampled)],
                "prompt_tokens": len(prompt),
                "completion_tokens": len(sampled),
                "cached_tokens": cached,
                "weight_version": "7",
            },
        }

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"model_path": self.model_path, "weight_version": "7", "max_context": self.max_context}
        )

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()


@contextlib.contextmanager
def serving(model: FakeModel) -> Iterator[tuple[str, int]]:
    """Serve in a thread of its own while the block runs; gives (host, port)."""
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/generate", model.generate)
    app.router.add_get("/model_info", model.model_info)
    app.router.add_get("/health", model.health)
    with serving_app(app) as address:
        yield address


@contextlib.contextmanager
def serving_app(app: web.Application) -> Iterator[tuple[str, int]]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[str, int]:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][:2]

    address = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

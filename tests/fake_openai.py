"""A stand-in for the provider of the customer's model, at the outer edge: `/chat/completions`, misbehaving on demand.

When it behaves it plays a sensible customer: for each request it reads the dialogue anew, from its start, and says
what the scripted customer would say next. A history that is not what it has said itself is a broken one.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from fake_generate import serving_app

from tau2_users import ScriptedCustomer


class FakeProvider:
    """`behave(number of the request, body)` may return an HTTP status, or a way to misbehave:

    hang, trickle (bytes that never end), drop (the connection), html, empty, blank, no choices, broken (JSON of a tool
    call) or list (for its arguments)."""

    def __init__(self, tasks: list) -> None:
        self.scenarios = {str(task.user_scenario): task.user_scenario for task in tasks}
        self.behave: Callable[[int, dict], str | int | None] = lambda number, body: None
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.broken_histories: list[list] = []
        self.retry_after = ""
        self.delay = 0.0
        self.running = self.most_running = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay)
            return await self._respond(request, body, self.behave(len(self.requests), body))
        finally:
            self.running -= 1

    async def _respond(self, request: web.Request, body: dict, how: str | int | None) -> web.StreamResponse:
        if isinstance(how, int):  # as careless providers do, it repeats the key
            error = {"error": {"message": f"refused, {request.headers.get('Authorization')}", "type": "x"}}
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return web.json_response(error, status=how, headers=headers)
        if how == "hang":
            await asyncio.sleep(60)
        if how == "trickle":
            return await self._trickle(request)
        if how == "drop":
            request.transport.close()
            return web.Response()
        if how == "html":
            return web.Response(text="<html>Welcome</html>", content_type="text/html")
        return web.json_response(self._completion(body, how))

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for _ in range(600):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    def _completion(self, body: dict, how: str | None) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": {"empty": None, "blank": " \n"}.get(how)}
        if how in ("broken", "list"):
            arguments = '{"mode": ' if how == "broken" else "[1]"
            message["tool_calls"] = [_tool_call("c1", "check_status_bar", arguments)]
        elif how is None:
            message |= self._customer_says(body["messages"])
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [] if how == "no choices" else [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        }

    def _customer_says(self, messages: list[dict]) -> dict:
        if messages[0]["role"] != "system":
            return {"content": "OK"}  # the preflight
        scenario = next(found for text, found in self.scenarios.items() if text in messages[0]["content"])
        customer, said, heard = ScriptedCustomer(scenario), {}, []
        for message in [*messages[1:], {"role": "assistant"}]:
            if message["role"] != "assistant":
                heard.append(message)
                continue
            said = _spoken(customer.reply(_heard(heard)))
            heard = []
            if message != {"role": "assistant"} and not _same(message, said):
                self.broken_histories.append(messages)
        return said

    async def gemini(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("x-goog-api-key"))
        content = {"role": "model", "parts": [{"text": "OK"}]}
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 1, "totalTokenCount": 4}
        candidate = {"content": content, "finishReason": "STOP", "index": 0}
        return web.json_response({"candidates": [candidate], "usageMetadata": usage})


def _heard(messages: list[dict]) -> SimpleNamespace:
    """What the customer's simulator passed on since its last turn, as ScriptedCustomer takes it."""
    if messages[0]["role"] == "tool":
        results = [SimpleNamespace(content=message["content"]) for message in messages]
        return SimpleNamespace(role="tool", tool_messages=results)
    (message,) = messages  # two texts in a row: a turn of the customer is missing
    return SimpleNamespace(role="assistant", content=message["content"])


def _spoken(message: Any) -> dict:
    calls = [_tool_call(call.id, call.name, json.dumps(call.arguments)) for call in message.tool_calls or []]
    return {"content": message.content, **({"tool_calls": calls} if calls else {})}


def _same(message: dict, said: dict) -> bool:
    def of(turn: dict) -> tuple:
        return turn.get("content"), [call["function"]["name"] for call in turn.get("tool_calls") or []]

    return of(message) == of(said)


def _tool_call(call_id: str, name: str, arguments: str) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@contextlib.contextmanager
def serving_openai(provider: FakeProvider) -> Iterator[str]:
    """Serve while the block runs; gives the api_base."""
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", provider.complete)
    app.router.add_post("/v1/models/{call}", provider.gemini)
    with serving_app(app) as (host, port):
        yield f"http://{host}:{port}/v1"

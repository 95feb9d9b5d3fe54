"""A stand-in for a provider of models, at the outer edge: `/chat/completions`, misbehaving on demand.

When it behaves it plays a sensible customer (FakeProvider) or agent (FakeAgent): for each request it reads the
dialogue anew, from its start, and says what the scripted (or recited) customer or teacher would say next. A history
that is not what it has said itself is a broken one.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from fake_generate import serving_app

from tau2_episode import AgentTurn
from tau2_recited import RecitedCustomer
from tau2_teacher import ScriptedTeacher
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
        return web.json_response(await self._completion(body, how))

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for _ in range(600):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    async def _completion(self, body: dict, how: str | None) -> dict:
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
        is_free_text = scenario.instructions.domain in ("retail", "airline")
        customer = RecitedCustomer(scenario) if is_free_text else ScriptedCustomer(scenario)
        said, heard = {}, []
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


class FakeAgent(FakeProvider):
    """A provider whose model is the scripted teacher. `behave` may also return the choice to answer with, or a
    (status, error text).

    What it has not said itself is kept in `odd_turns`, and the teacher says its turn again."""

    def __init__(self) -> None:
        super().__init__([])
        self.calls_the_probe, self.reads_tools = True, True
        self.odd_turns: list[dict] = []

    async def _respond(self, request: web.Request, body: dict, how: Any) -> web.StreamResponse:
        if isinstance(how, tuple):
            return web.json_response({"error": {"message": how[1]}}, status=how[0])
        return await super()._respond(request, body, how)

    async def _completion(self, body: dict, how: Any) -> dict:
        if isinstance(how, str):
            return await super()._completion(body, how)
        choice = how or {"finish_reason": "stop", "message": {"role": "assistant", **await self._says(body)}}
        read = len(json.dumps([body["messages"], body.get("tools") if self.reads_tools else None])) // 4
        usage = {"prompt_tokens": read, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": read // 2}}
        return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}

    async def _says(self, body: dict) -> dict:
        messages = body["messages"]
        if messages[0]["role"] != "system":  # the preflight
            calls = self.calls_the_probe and self.reads_tools and body.get("tools")
            return (
                {"content": None, "tool_calls": [_tool_call("p", "check_status_bar", "{}")]}
                if calls
                else {"content": "OK"}
            )
        self._check_history(messages)
        teacher, said = ScriptedTeacher(), None
        for message in messages[2:]:
            if message["role"] == "assistant":
                self.odd_turns += [] if _same(message, said) else [message]
                said = None if _same(message, said) else said
            elif said is None:
                said = _as_message(await teacher.act([message]), len(messages))
        return said

    def _check_history(self, messages: list[dict]) -> None:
        """What strict servers insist on: ids that match, arguments that are objects, no empty turn."""
        asked: list[str] = []
        for message in messages:
            if message["role"] == "tool":
                assert message["tool_call_id"] == asked.pop(0)
                continue
            assert not asked
            calls = message.get("tool_calls") or []
            assert calls or message["content"]
            assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
            asked = [call["id"] for call in calls]
            assert len(set(asked)) == len(asked)
        assert not asked


class FakeGoldAgent(FakeAgent):
    """A provider whose model knows the tasks' gold actions, done one a turn: a good teacher of any domain."""

    def __init__(self, tasks: list, gold_turns: Callable[[Any], list[AgentTurn]]) -> None:
        super().__init__()
        self.plans = {" ".join(task.user_scenario.instructions.reason_for_call.split()): task for task in tasks}
        self.gold_turns = gold_turns

    async def _says(self, body: dict) -> dict:
        messages = body["messages"]
        if messages[0]["role"] != "system":
            return await super()._says(body)
        self._check_history(messages)
        opening = next(message["content"] for message in messages if message["role"] == "user")
        turns = self.gold_turns(next(task for reason, task in self.plans.items() if reason in opening))
        said = sum(message["role"] == "assistant" for message in messages[2:])
        return _as_message(turns[min(said, len(turns) - 1)], len(messages))


def _as_message(turn: AgentTurn, number: int) -> dict:
    calls = [_tool_call(f"own-{number}", call.name, json.dumps(call.arguments)) for call in turn.tool_calls]
    return {"content": turn.content, **({"tool_calls": calls} if calls else {})}


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

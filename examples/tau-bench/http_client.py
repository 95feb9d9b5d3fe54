"""JSON over HTTP to a model server, tried again a bounded number of times.

A library, used by token_agent.py and chat_agent.py. Call `close_session` before an event loop ends that made
calls.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import aiohttp

from retry_wait import seconds_to_wait
from tau2_llm_customer import SHORTEST_SECRET, mask

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FIRST_WAIT = 0.5  # seconds before another attempt; doubled each time
CONNECT_SECONDS = 10
RETRIED_STATUSES = (408, 409, 425, 429)  # beside 5xx
QUOTED = 400  # characters of an error's text
LARGEST_ANSWER = 64 * 2**20  # bytes; 100,000 tokens with log-probs take 5 MB


class RequestFailed(Exception):
    """The server could not answer; the message holds no key. `status` is None when there was no HTTP answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class UnusableAnswer(ValueError):
    """Raised by `read` of `post_json` for an answer that another attempt may mend."""


# ---------------------------------------------------------------------------------------------------------------------
# One session per event loop

_sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}


def _session() -> aiohttp.ClientSession:
    """Connections are not limited here: the server queues."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None or session.closed:
        for gone in [other for other in _sessions if other.is_closed()]:
            del _sessions[gone]
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        session = _sessions[loop] = aiohttp.ClientSession(connector=connector, trust_env=False)
    return session


async def close_session() -> None:
    """Close this event loop's session. Call it before a loop ends that made calls."""
    session = _sessions.pop(asyncio.get_running_loop(), None)
    if session is not None:
        await session.close()


@atexit.register
def _close_sessions() -> None:
    """Closes the sessions of hosts whose loop runs until the process ends (slime's does)."""
    for loop, session in _sessions.items():
        if loop.is_running():
            with contextlib.suppress(Exception):  # nobody is left to tell
                asyncio.run_coroutine_threadsafe(session.close(), loop).result(timeout=2)


# ---------------------------------------------------------------------------------------------------------------------
# One request


async def post_json(
    url: str,
    payload: dict,
    headers: dict | None = None,
    timeout: float = 900.0,
    *,
    attempts: int = ATTEMPTS,
    first_wait: float | None = None,
    read: Callable[[Any], Any] = lambda answer: answer,
) -> Any:
    """POST `payload`; gives read(answer). Raises RequestFailed.

    Connection errors, time-outs (`timeout` seconds an attempt), 408, 409, 425, 429, 5xx and what `read` finds unusable
    are tried `attempts` times in all, later and later, and not before a Retry-After. Any other status is final.
    """
    first_wait = FIRST_WAIT if first_wait is None else first_wait
    for attempt in range(1, attempts + 1):
        try:
            return read(await _post_once(url, payload, headers, timeout))
        except RequestFailed as error:
            failed, wait = RequestFailed(_without_keys(str(error), headers), error.status), None
        except (aiohttp.ClientError, TimeoutError, OSError, UnusableAnswer, _Again) as error:
            problem = _without_keys(f"{url}: {_name(error)}{error}".rstrip(), headers)
            failed = RequestFailed(f"{problem} ({attempts} attempts)", getattr(error, "status", None))
            wait = seconds_to_wait(attempt, first_wait, getattr(error, "retry_after", ""))
        if wait is None or attempt == attempts:
            break
        logger.warning("%s; trying again in %.1f s", problem, wait)
        await asyncio.sleep(wait)
    raise failed  # here and not above, so that the server's own words, which may hold a key, are not chained to it


class _Again(Exception):
    """An answer that a second attempt may mend; `retry_after` is the server's header."""

    def __init__(self, message: str, status: int, retry_after: str):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


async def _post_once(url: str, payload: dict, headers: dict | None, timeout: float) -> Any:
    limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
    request = _session().post(url, json=payload, headers=headers, timeout=limits, allow_redirects=False)
    async with request as response:
        body = (await _read_body(response, url)).decode(errors="replace")
    status, begin = response.status, body[: 10 * QUOTED]
    if status in RETRIED_STATUSES or status >= 500:
        raise _Again(f"HTTP {status}: {begin}", status, response.headers.get("Retry-After", ""))
    if status != 200:
        raise RequestFailed(f"{url}: HTTP {status}: {begin}", status)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestFailed(f"{url}: the answer is not JSON: {begin!r}", status) from None


async def _read_body(response: aiohttp.ClientResponse, url: str) -> bytes:
    """The whole body, or RequestFailed when it never ends."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(2**16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise RequestFailed(f"{url}: the answer is larger than {LARGEST_ANSWER // 2**20} MB", response.status)
    return b"".join(parts)


def _name(error: Exception) -> str:
    return "" if isinstance(error, (_Again, UnusableAnswer)) else f"{type(error).__name__} "


def _without_keys(text: str, headers: dict | None) -> str:
    """The text in one line, cut, without what looks like a key or was sent as one; masked first, then cut."""
    sent = (headers or {}).get("Authorization", "").removeprefix("Bearer ")
    if len(sent) >= SHORTEST_SECRET:
        text = text.replace(sent, "***")
    return " ".join(mask(text).split())[:QUOTED]

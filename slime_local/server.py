"""SGLang's `/generate` in front of the one-machine engine.

    python -m slime_local.server --model-path runs/local/sft/hf --port 30000

The plug-in and the evaluator speak this protocol wherever they run. Binds to loopback unless told otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from slime_local.errors import UsageError
from slime_local.lasting import lasting
from slime_local.sampling import MAX_REQUESTS, RequestError

MAX_REQUEST_BYTES = 16 * 2**20
BODY_SECONDS = 60.0  # in which a request's body has to arrive
LONGEST_RID = 200  # characters of a request's own name


def make_app(
    engine,
    model_path: str,
    fingerprint: str = "",
    max_requests: int = MAX_REQUESTS,
    body_seconds: float = BODY_SECONDS,
):
    """The aiohttp application over an Engine. fingerprint: of the folder whose weights it has; "" in training."""
    from aiohttp import web

    held = 0

    def refuse(status: int, message: object):
        return web.json_response({"error": {"message": str(message)}}, status=status)

    async def read_object(request) -> dict:
        """The body. Raises RequestError when it is no JSON object or does not arrive."""
        try:
            value = json.loads(await asyncio.wait_for(request.read(), body_seconds) or b"{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {body_seconds:g} s") from None
        if not isinstance(value, dict):
            raise RequestError("the request body must be a JSON object")
        if not isinstance(value.get("rid") or "", str) or len(value.get("rid") or "") > LONGEST_RID:
            raise RequestError(f"rid must be a text of at most {LONGEST_RID} characters")
        return value

    async def generate(request):
        nonlocal held
        if held >= max_requests:
            return refuse(503, f"{held} requests are waiting: try again later")
        held += 1
        try:
            return web.json_response(await engine.generate(await read_object(request)))
        except RequestError as error:
            return refuse(400, error)
        except RuntimeError as error:
            return refuse(503, error)
        finally:
            held -= 1

    @web.middleware
    async def no_browsers(request, handler):
        """A page that somebody reads on this machine must not reach the engine: browsers name the page's origin."""
        return (
            refuse(403, "requests of web pages are refused") if "Origin" in request.headers else await handler(request)
        )

    async def health(request):
        return web.Response(status=503 if engine.failure else 200)

    async def model_info(request):
        return web.json_response(
            {
                "model_path": model_path,
                "tokenizer_path": model_path,
                "is_generation": True,
                "fingerprint": fingerprint,
                "weight_version": str(engine.weight_version),
                "max_context": engine.max_context,
                "server": "slime_local",
            }
        )

    async def abort(request):
        try:
            body = await read_object(request)
        except RequestError as error:
            return refuse(400, error)
        engine.abort(None if body.get("abort_all") else body.get("rid") or None)
        return web.Response()

    async def workers(request):
        return web.json_response({"workers": [{"url": f"http://{request.host}", "is_healthy": True}]})

    async def loads(request):
        return web.json_response(
            {"loads": [{"num_reqs": engine.num_requests, "num_running_reqs": engine.num_requests}]}
        )

    app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[no_browsers])
    app.router.add_post("/generate", generate)
    app.router.add_post("/abort_request", abort)
    for path, handler in {
        "/health": health,
        "/health_generate": health,
        "/model_info": model_info,
        "/get_model_info": model_info,
        "/server_info": model_info,
        "/get_server_info": model_info,
        "/workers": workers,
        "/v1/loads": loads,
    }.items():
        app.router.add_get(path, handler)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A bound listening socket (port 0: any free one); UsageError when the port is taken."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OverflowError, UnicodeError):
        sock.close()
        raise UsageError(f"cannot listen on {host}:{port}: ports go from 0 to 65535, hosts are names") from None
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} on {host} is already in use: stop what listens there or choose another"
            ) from None
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    sock.listen(1024)
    return sock


@contextlib.contextmanager
def serve(
    engine, host: str = "127.0.0.1", port: int = 0, model_path: str = "", fingerprint: str = ""
) -> Iterator[tuple[str, int]]:
    """Serve `engine` from a thread of its own while the block runs; gives (host, port)."""
    from aiohttp import web

    sock = bind(host, port)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="generate-server", daemon=True)
    thread.start()
    # Of a client that has gone away the handler is cancelled, and the engine decodes no further for nobody.
    options = {"access_log": None, "shutdown_timeout": 1.0, "handler_cancellation": True}
    runner = web.AppRunner(make_app(engine, model_path, fingerprint), **options)

    async def start():
        await runner.setup()
        await web.SockSite(runner, sock).start()

    async def stop():
        await runner.cleanup()
        idle = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in idle:  # connections that a client keeps open
            task.cancel()
        await asyncio.gather(*idle, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield sock.getsockname()[:2]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slime_local.server", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-path", required=True, help="Hugging Face model folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--context-length", type=int, default=8192, help="longest prompt plus answer, in tokens")
    parser.add_argument("--max-running-requests", type=int, default=64, help="episodes whose KV is kept")
    parser.add_argument("--seed", type=int, default=0, help="for requests without a sampling_seed")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from slime_local.data import load_tokenizer
    from slime_local.hf_folder import fingerprint, load_config

    if args.context_length < 2 or args.max_running_requests < 1 or args.seed < 0:
        raise UsageError("--context-length must be 2 or more, --max-running-requests 1 or more, --seed 0 or more")
    load_config(args.model_path)
    folder = Path(args.model_path).resolve()  # what was typed means another folder to who asks from elsewhere
    bind(args.host, args.port).close()  # a busy port is told before the model loads
    with lasting():
        from slime_local.engine import Engine
        from slime_local.model import load_model

    loaded = fingerprint(folder)  # before the weights: what is written from here on is not what it says
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    options = {"seed": args.seed, "own_thread": False}
    engine = Engine(model, tokenizer, args.context_length, args.max_running_requests, **options)
    with serve(engine, args.host, args.port, str(folder), loaded) as (host, port):
        dtypes = f"{model.compute_dtype}, products {model.product_dtype}"
        print(f"serving {folder} on http://{host}:{port} ({model.device}, {dtypes})", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

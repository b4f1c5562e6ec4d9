"""The OpenAI door's process: an engine's client, the application and uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import Unavailable
from radix_backend.metrics.publisher import Identity, Publisher
from radix_backend.metrics.recorder import Recorder
from radix_backend.openai.app import Routes, make_app
from radix_backend.openai.exchange import Exchanges
from radix_backend.openai.gate import Gate
from radix_backend.openai.metrics import Registry
from radix_backend.openai.requests import MAX_COMPLETIONS
from radix_backend.openai.uploads import Uploads

_LAST_WORDS_SECONDS = 2  # for ended streams to reach their clients
_KEEP_ALIVE_SECONDS = 75  # longer than proxies keep a connection: it must be they who close it


@dataclass(frozen=True)
class Options:
    host: str
    port: int
    names: tuple[str, ...]  # of the served model; answers tell the first
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # that browsers may send requests from
    max_body: int = 16 << 20  # bytes
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_seconds: float = 20.0  # for running requests, when the server is told to stop


def serve(client: EngineClient, config: EngineConfig, options: Options, on_start: Callable[[], None]) -> None:
    """Until SIGTERM or Ctrl-C, or until the engine fails for good. ``on_start`` is called once it listens."""
    recorder, registry = Recorder(), Registry()
    exchanges, uploads = Exchanges(client, recorder), Uploads()
    publisher = Publisher(client, recorder, Identity({"model": options.names[0], "version": "1"}), registry)
    max_completions = min(MAX_COMPLETIONS, config.max_queue_size)
    fingerprint = f"fp_{config.identity()}"
    app: ASGIApp = make_app(Routes(exchanges, uploads, options.names, fingerprint, max_completions, registry))
    app = Gate(app, options.api_keys, options.max_body)
    if options.origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # we tell where we listen, and of each request
    settings = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(options.drain_seconds) + _LAST_WORDS_SECONDS,
    )
    try:
        _Server(settings, exchanges, uploads, options.drain_seconds, on_start).run()
    finally:
        publisher.close()


class _Server(uvicorn.Server):
    def __init__(
        self,
        settings: uvicorn.Config,
        exchanges: Exchanges,
        uploads: Uploads,
        drain_seconds: float,
        on_start: Callable[[], None],
    ) -> None:
        super().__init__(settings)
        self._exchanges = exchanges
        self._uploads = uploads
        self._drain_seconds = drain_seconds
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._exchanges.client.status.state == "failed"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nothing new is accepted from here on; what runs has its time, and a typed error after that."""
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._end_all)
        await super().shutdown(sockets)
        timer.cancel()

    def _end_all(self) -> None:
        end = Unavailable("the server is stopping")
        self._uploads.end_all(end)
        self._exchanges.end_all(end)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's raises the signal again when all is done; here the client must still be closed."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before: dict[int, Any] = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

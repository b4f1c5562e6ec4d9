"""The HTTP response that the engine writes: server-sent events as tokens come, or one JSON object at the end."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from radix_backend.errors import Cancelled, RadixError
from radix_backend.metrics.recorder import Recorder
from radix_backend.openai.answers import Answers
from radix_backend.openai.exchange import Exchange, Part
from radix_backend.openai.requests import Generation
from radix_backend.openai.responses import Error, json_response

_DONE = b"data: [DONE]\n\n"
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

_encode = msgspec.json.Encoder().encode


class EngineResponse(Response):
    """Ends the exchange with itself, and with the client: one that goes away is noticed whatever the engine does."""

    def __init__(self, exchange: Exchange, answers: Answers, asked: Generation, recorder: Recorder) -> None:
        super().__init__()
        self._exchange = exchange
        self._answers = answers
        self._asked = asked
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises the engine's error if nothing was sent yet, so that it gets its status."""
        watch = asyncio.create_task(self._watch(scope, receive))
        try:
            parts = await self._exchange.take()
            if self._asked.stream:
                await self._send_events(parts, send)
            else:
                whole = json_response(self._answers.whole(self._exchange, parts))
                await whole(scope, receive, send)
        finally:
            watch.cancel()
            self._exchange.close()

    async def _watch(self, scope: Scope, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["client_left"] = True
        self._exchange.fail(Cancelled("the client went away"))

    async def _send_events(self, parts: list[Part], send: Send) -> None:
        exchange = self._exchange
        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        while not exchange.done:
            await send({"type": "http.response.body", "body": self._events(parts), "more_body": True})
            try:
                parts = await exchange.take()
            except RadixError as error:
                self._recorder.failed(error)
                await send({"type": "http.response.body", "body": _event(Error.of(error))})
                return
        body = self._events(parts)
        if self._asked.includes_usage:
            body += _event(self._answers.usage_chunk(exchange))
        await send({"type": "http.response.body", "body": body + _DONE})

    def _events(self, parts: list[Part]) -> bytes:
        self._recorder.sent(sum(len(part.choice.token_ids) for part in parts))
        return b"".join(map(_event, self._answers.chunks(self._exchange, parts)))


def _event(data: msgspec.Struct) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"

"""What every request passes first: its id, its key, the size of its body, and a line in the log."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radix_backend.errors import Cancelled
from radix_backend.openai.responses import refusal
from radix_backend.validation import show

OPEN_PATHS = ("/health", "/metrics")  # for probes, which have no key

_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

_log = logging.getLogger(__name__)


class TooLarge(Exception):
    """The body is. A body whose size is not told beforehand raises it where it is read; `answer` says so."""

    def __init__(self, max_body: int) -> None:
        super().__init__(f"the body is larger than this server takes; accepted: at most {max_body} bytes")

    def answer(self) -> Response:
        return refusal(413, str(self), "body_too_large")


class Gate:
    """ASGI middleware. ``scope["request_id"]`` is the request's id; handlers put who asks in ``scope["asked_by"]``, and
    True in ``scope["client_left"]`` if the client left before its answer was complete."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body: int) -> None:
        """Without ``keys`` everybody may pass. ``max_body`` is in bytes."""
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers, status = time.monotonic(), Headers(scope=scope), 0
        given = headers.get("x-request-id", "")
        request_id = scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(16)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if refused := self._refuse(scope, headers):
                await refused(scope, receive, answer)
            else:
                await self._app(scope, self._limited(receive), answer)
        finally:
            if scope.get("client_left"):  # whatever status a stream began with
                status = Cancelled.http_status
            who = f", for {show(scope['asked_by'])}" if scope.get("asked_by") else ""
            took = time.monotonic() - started
            level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
            _log.log(level, "%s %s %d %.3f s, id %s%s", scope["method"], scope["path"], status, took, request_id, who)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        if self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(key.encode(), each) for each in self._keys):
                message = "the request has no valid key; accepted: the header 'Authorization: Bearer KEY'"
                return refusal(401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            # The connection stays open and uvicorn drops what still comes: clients read an answer only after they have
            # written all, and a closed connection would break their writing first.
            return TooLarge(self._max_body).answer()
        return None

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise TooLarge(self._max_body)
            return message

        return limited

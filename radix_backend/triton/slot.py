"""One request in the stub: what the engine generated and has not been sent yet.

The client's I/O thread and `Bridge.execute` put, one of the bridge's sender threads takes. A slot that holds something
to send stands in its outbox once: idle, that makes a response a token; busy, tokens coalesce while the slot waits.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from typing import Any, Protocol

import numpy.typing as npt

from radix_backend.errors import RadixError, Unavailable
from radix_backend.metrics.recorder import Recorder
from radix_backend.sidecar.sink import Delta
from radix_backend.triton.request import Request
from radix_backend.triton.response import Answer, size

SMALL_BYTES = 8192  # of content: what the stub has allocated holds so much


class Wire(Protocol):
    """The way back to one Triton client. Every method may raise."""

    def send(self, tensors: list[tuple[str, npt.NDArray[Any]]], final: bool) -> None: ...

    def has_room(self, size: int) -> bool:
        """Whether shared memory takes so many bytes of content."""

    def refuse(self, error: RadixError) -> None:
        """The error, and FINAL."""

    def is_cancelled(self) -> bool: ...


class Slot:
    """The sink of one request. Ends with exactly one FINAL, whatever comes after it."""

    def __init__(self, wire: Wire, outbox: SimpleQueue[Slot | None], namespace: str, recorder: Recorder) -> None:
        self.engine_id: int | None = None  # once submitted
        self.ended = False  # FINAL was sent, or cannot be sent
        self._wire = wire
        self._outbox = outbox
        self._namespace = namespace
        self._recorder = recorder
        self._request: Request | None = None  # once parsed
        self._inbox: deque[Delta | RadixError] = deque()
        self._queued = False
        self._running = 1  # completions that have not finished
        self._answer = Answer()
        self._closing = threading.Lock()  # Triton's side of the request is gone after FINAL: asking it then is not safe

    def begin(self, request: Request) -> None:
        """What is asked for is known. Comes before any call as a sink, but for an error."""
        self._request = request
        self._running = request.params.n
        self._answer = Answer(request.params.n)

    def on_delta(self, delta: Delta) -> None:
        self._inbox.append(delta)
        if delta.finish:
            self._running -= 1
        if not self._running or (self._request is not None and self._request.stream):
            self._wake()

    def on_error(self, error: RadixError) -> None:
        self._inbox.append(error)
        self._wake()

    def _wake(self) -> None:
        # `_queued` is cleared before the inbox is emptied: a put that still sees it set will be taken.
        if not self._queued:
            self._queued = True
            self._outbox.put(self)

    def is_cancelled(self) -> bool:
        with self._closing:
            return not self.ended and self._wire.is_cancelled()

    def flush(self) -> None:
        """Send what there is. On the sender thread only. Raises what the wire does; `fail` comes next then."""
        self._queued = False
        if self.ended:
            return
        error = self._take()
        request, answer = self._request, self._answer
        if request is not None and (answer.finished or (request.stream and answer.has_text)):
            self._send(request)
        if error is not None and not self.ended:
            self.fail(error)

    def fail(self, error: RadixError) -> None:
        """End with an error. On the sender thread only."""
        with self._closing:
            if not self.ended:
                self.ended = True
                self._recorder.failed(error)
                self._wire.refuse(error)

    def _take(self) -> RadixError | None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, RadixError):
                return item
            self._answer.add(item)
        return None

    def _send(self, request: Request) -> None:
        if request.stream:
            self._recorder.sent(sum(len(choice.token_ids) for choice in self._answer.choices))
        tensors = self._answer.encode(request, self._namespace)
        if not self._answer.finished:
            self._wire.send(tensors, final=False)
            return
        # FINAL goes with the last content, as vllm_backend sends it: alone it reaches only those gRPC clients
        # that ask for empty responses. But a send with FINAL that finds no shared memory cannot be repeated, and the
        # client would wait for ever. So what may not fit is not tried.
        if (content := size(tensors)) > SMALL_BYTES and not self._wire.has_room(content):
            self.fail(Unavailable(f"the response of {content} bytes finds no room in /dev/shm"))
            return
        with self._closing:
            self.ended = True
            self._wire.send(tensors, final=True)

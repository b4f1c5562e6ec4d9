"""The I/O thread of a client: its lease, its socket to the gateway, and the requests that run.

Everything but the outbox and the current status belongs to that one thread; other threads `post` what they want done.
So a request's calls come in order, and exactly one of them is its last.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq
from msgspec.structs import replace

from radix_backend.config import EngineConfig
from radix_backend.errors import Cancelled, RadixError, Unavailable, from_code
from radix_backend.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Admitted,
    GatewayMessage,
    Goodbye,
    Hello,
    Lease,
    Log,
    ModelInfo,
    PromptLogprobs,
    Pulse,
    Refused,
    Rejected,
    Reply,
    Status,
    Submit,
    Update,
    Welcome,
    array,
)
from radix_backend.sampling_params import MAX_N
from radix_backend.sidecar.lease import LeaseSocket, join_or_start
from radix_backend.sidecar.runtime import RunDir
from radix_backend.sidecar.sink import Delta, Sink

_RETRY_SECONDS = (0.1, 5.0)  # between attempts to find a sidecar: the first, doubling up to the last
_BURST = 64  # messages handled before others get their turn
_NO_TOKENS = np.empty(0, np.int32)

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Running:
    """A request: as many requests to the gateway as it has completions left."""

    sink: Sink
    open: set[int]  # indices of the completions that have not finished

    def gateway_ids(self, request: int) -> list[int]:
        return [_gateway_id(request, index) for index in self.open]


def _gateway_id(request: int, index: int) -> int:
    return request * MAX_N + index


def encode(request: int, submit: Submit) -> list[bytes]:
    """``submit`` without its id as messages: each completion is a request of its own to the gateway.

    For the thread that submits: whatever cannot be encoded is its problem, not that of the others' I/O thread.
    """
    choices = (
        replace(submit, id=_gateway_id(request, index), params=submit.params.choice(index))
        for index in range(submit.params.n)
    )
    return [msgspec.msgpack.encode(choice) for choice in choices]


class Connection(threading.Thread):
    """Keeps a lease and, while the sidecar is ready, a socket to the gateway of its current generation."""

    def __init__(
        self,
        config: EngineConfig,
        parent: int,
        on_log: Callable[[str, str, str], None] | None,
        on_status: Callable[[Status], None] | None,
    ) -> None:
        """Joins or starts the sidecar. Raises what `join_or_start` does, except that a missing sidecar is waited for
        if ``engine_endpoint`` says that somebody else starts it."""
        super().__init__(name="radix-client", daemon=True)
        self._config = config
        self._request = Lease(PROTOCOL_VERSION, config.identity(), on_log is not None, parent, config.linger)
        self._on_log = on_log
        self._on_status = on_status
        self._run_dir = RunDir.of(config)
        self._status = Status("starting", 0)
        try:
            lease = join_or_start(config, self._request)
        except Unavailable as error:
            if config.engine_endpoint is None:
                raise
            lease = None
            self._status = Status("starting", 0, str(error))
        self.model: ModelInfo | None = None
        self._progress_at = time.monotonic()  # the last that is known of
        self._changed = threading.Condition()
        self._outbox: deque[Callable[[], None]] = deque()
        self._outbox_lock = threading.Lock()
        self._closing: Goodbye | None = None  # guarded, like the wake-up's life, by the outbox's lock
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._gateway: zmq.Socket[bytes] | None = None
        self._offered = self._status  # the "ready" that `_gateway` answers to
        self._running: dict[int, _Running] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(GatewayMessage)
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._lease: LeaseSocket | None = None
        self._retry_at = 0.0
        self._retry_delay = _RETRY_SECONDS[0]
        if lease is not None:
            self._hold(lease)
        self.start()

    # ── for any thread ──────────────────────────────────────────────────────────────────────

    @property
    def status(self) -> Status:
        """The sidecar's as this client sees it: "ready" once the gateway has welcomed it."""
        return self._status

    @property
    def silence(self) -> float:
        """Seconds since the sidecar last made progress, as far as is known here."""
        return time.monotonic() - self._progress_at

    def unavailable(self) -> Unavailable:
        """Why nothing can be asked now."""
        status = self._status
        return Unavailable(f"the engine is {status.state}" + (f": {status.detail}" if status.detail else ""))

    def wait_settled(self, timeout: float | None) -> Status:
        """Wait until it is ready, failed or closed, at most ``timeout`` seconds; returns the status then."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._status.state in ("ready", "failed") or self._closing is not None, timeout
            )
            return self._status

    def post(self, action: Callable[[], None]) -> None:
        """Have ``action`` run on the I/O thread. Raises Unavailable when the client is closed."""
        with self._outbox_lock:
            if self._closing is not None:
                raise Unavailable("the client is closed")
            self._outbox.append(action)
            os.eventfd_write(self._wake, 1)

    def close(self, goodbye: Goodbye) -> None:
        """End what runs as cancelled, leave, and wait for the thread (unless called on it)."""
        with self._outbox_lock:
            if self._closing is None:
                self._closing = goodbye
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self:
            self.join()

    # ── on the I/O thread, through `post` ────────────────────────────────────────────────────

    def submit(self, request: int, sink: Sink, messages: list[bytes]) -> None:
        """``messages`` are those of `encode`."""
        if self._gateway is None or self._status.state != "ready":
            self._fail(sink, self.unavailable())
            return
        self._running[request] = _Running(sink, set(range(len(messages))))
        for message in messages:
            self._gateway.send(message)

    def abort(self, requests: list[int]) -> None:
        for running in self._withdraw(requests):
            self._fail(running.sink, Cancelled("the request was cancelled"))

    def call(self, call: int, future: Future[Any], message: bytes) -> None:
        if self._gateway is None or self._status.state != "ready":
            future.set_exception(self.unavailable())
        else:
            self._calls[call] = future
            self._gateway.send(message)

    # ── the thread ──────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        try:
            while self._closing is None:
                events = dict(self._poller.poll(self._patience()))
                if self._wake in events:
                    os.eventfd_read(self._wake)
                self._do_posted()
                if self._gateway is not None and self._gateway in events:
                    self._read_gateway(self._gateway)
                if self._lease is not None and self._lease.fileno() in events:
                    self._read_lease(self._lease)
                if self._lease is None and time.monotonic() >= self._retry_at:
                    self._rejoin()
        finally:
            self._end()

    def _end(self) -> None:
        with self._outbox_lock:
            goodbye = self._closing = self._closing or Goodbye()
            os.close(self._wake)
        self._do_posted()
        self._abort([id for request, running in self._running.items() for id in running.gateway_ids(request)])
        self._set_status(replace(self._status, state="stopping", detail="the client is closed"))
        self._disconnect(Cancelled("the client was closed"), linger=200)
        self._context.term()
        if self._lease is not None:
            self._lease.close(goodbye)

    def _patience(self) -> int | None:
        """Milliseconds until something must be done unasked."""
        if self._lease is not None:
            return None
        return max(0, math.ceil((self._retry_at - time.monotonic()) * 1000))

    def _do_posted(self) -> None:
        while self._outbox:
            self._outbox.popleft()()

    # ── lease ──────────────────────────────────────────────────────────────────────

    def _rejoin(self) -> None:
        try:
            lease = join_or_start(self._config, self._request)
        except RadixError as error:
            self._retry_later()
            if self._status.state != "failed":
                self._set_status(replace(self._status, detail=str(error)))
        else:
            self._hold(lease)

    def _hold(self, lease: LeaseSocket) -> None:
        self._lease = lease
        self._poller.register(lease.fileno(), zmq.POLLIN)
        self._take_status(lease.first)

    def _read_lease(self, lease: LeaseSocket) -> None:
        try:
            for _ in range(_BURST):
                message = lease.receive()
                if message is None:
                    return
                if isinstance(message, Status):
                    self._take_status(message)
                elif isinstance(message, Pulse):
                    self._progress_at = time.monotonic() - message.silence
                else:
                    self._show(message)
        except OSError:
            self._lose_lease(lease)

    def _lose_lease(self, lease: LeaseSocket) -> None:
        self._poller.unregister(lease.fileno())
        lease.close()
        self._lease = None
        self._retry_later()
        if self._status.state != "failed":  # a refusal remains true until somebody says otherwise
            self._set_status(replace(self._status, state="restarting", detail="the sidecar's supervisor ended"))
        self._disconnect(self.unavailable())

    def _retry_later(self) -> None:
        self._retry_at = time.monotonic() + self._retry_delay
        self._retry_delay = min(2 * self._retry_delay, _RETRY_SECONDS[1])

    def _take_status(self, status: Status) -> None:
        if status.state != "ready":
            self._set_status(status)
            self._disconnect(self.unavailable())
        elif self._gateway is None or status.generation != self._offered.generation:
            self._set_status(replace(status, state="starting", detail="connecting to the gateway"))
            self._disconnect(self.unavailable())
            self._connect(status)

    def _set_status(self, status: Status) -> None:
        if status == self._status:
            return
        with self._changed:
            self._status = status
            self._changed.notify_all()
        if self._on_status is not None:
            with _logged():
                self._on_status(status)

    def _show(self, log: Log) -> None:
        if self._on_log is not None:
            with _logged():
                self._on_log(log.level, log.source, log.line)

    # ── gateway ──────────────────────────────────────────────────────────────────────

    def _connect(self, offered: Status) -> None:
        self._offered = offered
        self._gateway = self._context.socket(zmq.DEALER)
        self._gateway.setsockopt(zmq.SNDHWM, 0)  # a send never blocks and never drops
        self._gateway.connect(self._run_dir.gateway_address(offered.generation))
        self._poller.register(self._gateway, zmq.POLLIN)
        self._gateway.send(msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, self._request.identity)))

    def _disconnect(self, reason: RadixError, linger: int = 0) -> None:
        """Leave the gateway, if there is one; what runs there ends for ``reason``. ``linger`` is in milliseconds."""
        if self._gateway is not None:
            self._poller.unregister(self._gateway)
            self._gateway.close(linger)
        self._gateway = self.model = None
        running, self._running = self._running, {}
        calls, self._calls = self._calls, {}
        for request in running.values():
            self._fail(request.sink, reason)
        for future in calls.values():
            future.set_exception(reason)

    def _read_gateway(self, gateway: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_BURST):
                message = self._decoder.decode(gateway.recv(zmq.NOBLOCK))
                if isinstance(message, Update):
                    self._update(message)
                elif isinstance(message, Admitted):
                    self._admitted(message)
                elif isinstance(message, PromptLogprobs):
                    self._give(message.id, Delta(_NO_TOKENS, "", prompt_logprobs=message.tokens))
                elif isinstance(message, Rejected):
                    self._rejected(message)
                elif isinstance(message, Reply):
                    self._reply(message)
                elif isinstance(message, Welcome):
                    self.model = message.model
                    self._retry_delay = _RETRY_SECONDS[0]
                    self._progress_at = time.monotonic()
                    self._set_status(self._offered)
                elif isinstance(message, Refused):
                    self._refused(message.reason)
                    return

    def _update(self, update: Update) -> None:
        tokens = array(update.tokens, "<i4")
        ends = np.cumsum(array(update.counts, "<i4")).tolist()
        receipts = iter(update.receipts)
        ids = array(update.ids, "<i8").tolist()
        start = 0
        for row, (id, end, finish, text) in enumerate(zip(ids, ends, update.finish, update.texts, strict=True)):
            receipt = next(receipts) if finish else None
            logprobs = update.logprobs[row] if update.logprobs else []
            self._give(id, Delta(tokens[start:end], text, finish, receipt, id % MAX_N, logprobs))
            start = end

    def _give(self, id: int, delta: Delta) -> None:
        """Hand over what the request ``id`` of the gateway got."""
        request = id // MAX_N
        running = self._running.get(request)
        if running is None:
            return
        if delta.finish:
            running.open.discard(delta.index)
            if not running.open:
                del self._running[request]
        try:
            running.sink.on_delta(delta)
        except Exception:
            _log.exception("a sink failed; its request is aborted")
            self._withdraw([request])

    def _admitted(self, message: Admitted) -> None:
        index, count = message.id % MAX_N, message.num_input_tokens
        input_ids = array(message.input_ids, "<i4") if message.input_ids else None
        self._give(message.id, Delta(_NO_TOKENS, "", index=index, num_input_tokens=count, input_ids=input_ids))

    def _rejected(self, message: Rejected) -> None:
        for running in self._withdraw([message.id // MAX_N]):
            self._fail(running.sink, from_code(message.code, message.message))

    def _reply(self, reply: Reply) -> None:
        future = self._calls.pop(reply.call, None)
        if future is None:
            return
        if reply.code:
            future.set_exception(from_code(reply.code, reply.message))
        else:
            future.set_result(reply.value)

    def _refused(self, reason: str) -> None:
        if self._status.state != "ready":
            self._set_status(replace(self._offered, state="failed", detail=reason))
            self._disconnect(self.unavailable())
        else:  # cut off for not reading in time: a new connection starts afresh
            self._set_status(replace(self._offered, state="restarting", detail=reason))
            self._disconnect(self.unavailable())
            self._connect(self._offered)

    def _withdraw(self, requests: list[int]) -> list[_Running]:
        """Forget requests and tell the gateway to; returns those that were running."""
        found = {request: running for request in requests if (running := self._running.pop(request, None))}
        self._abort([id for request, running in found.items() for id in running.gateway_ids(request)])
        return list(found.values())

    def _abort(self, ids: list[int]) -> None:
        if ids and self._gateway is not None:
            self._gateway.send(msgspec.msgpack.encode(Abort(ids)))

    def _fail(self, sink: Sink, reason: RadixError) -> None:
        with _logged():
            sink.on_error(reason)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """A callback that raises is its author's problem, not that of the others on this thread."""
    try:
        yield
    except Exception:
        _log.exception("a callback failed")

"""Between Triton's requests and the engine's client: slots, sender threads, and a slow look at cancellations."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from radix_backend.client import EngineClient
from radix_backend.errors import RadixError, Unavailable
from radix_backend.metrics.recorder import Recorder
from radix_backend.protocol import STOP
from radix_backend.sidecar.sink import Delta
from radix_backend.triton.request import HEALTH_CHECK, is_health_check, parse
from radix_backend.triton.slot import Slot, Wire

POLL_SECONDS = 0.25  # between looks at cancellations: each is a round trip to the server
_CLOSE_SECONDS = 5.0  # for the last responses of a model that is unloaded

# A sender thread mostly waits for the server to acknowledge a response. On few cores a second one only takes time from
# the first; with four the stub's GIL is the limit (docs/performance.md).
_CORES_A_SENDER, _MAX_SENDERS = 4, 2

_log = logging.getLogger(__name__)


class Bridge:
    """Serves requests for one model instance."""

    def __init__(
        self,
        client: EngineClient,
        namespace: str,
        recorder: Recorder,
        ending: Callable[[bool], str] = lambda busy: "",
        arrive: Callable[[], None] = lambda: None,
        num_senders: int = 1,
    ) -> None:
        """``ending(busy)`` says why running requests must end now, or ""; the watcher's thread asks every so often.

        ``arrive`` is called for each request before anything else.
        """
        self._client = client
        self._ending = ending
        self._arrive = arrive
        self._recorder = recorder
        self._namespace = namespace
        self._live: set[Slot] = set()
        # A request has one sender, so that its responses keep their order.
        self._outboxes: list[SimpleQueue[Slot | None]] = [SimpleQueue() for _ in range(num_senders)]
        self._next_outbox = itertools.cycle(self._outboxes)
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch_loop, name="radix-watcher", daemon=True),
            *(
                threading.Thread(target=self._send_loop, args=(outbox,), name=f"radix-sender-{number}", daemon=True)
                for number, outbox in enumerate(self._outboxes)
            ),
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, wire: Wire, read: Callable[[], tuple[Mapping[str, npt.NDArray[Any]], str]]) -> None:
        """Start a request, whose tensors and parameters ``read`` returns. Never waits, never raises, sends nothing."""
        self._arrive()
        slot = Slot(wire, next(self._next_outbox), self._namespace, self._recorder)
        self._live.add(slot)
        try:
            tensors, parameters = read()
            if is_health_check(parameters):
                slot.begin(HEALTH_CHECK)
                slot.on_delta(Delta(np.array([], dtype=np.int32), "", STOP))
                return
            request = parse(tensors, parameters)
            slot.begin(request)
            slot.engine_id = self._client.submit(
                request.params,
                text=request.text,
                input_ids=request.input_ids,
                messages=request.messages,
                chat_template_kwargs=request.chat_template_kwargs,
                priority=request.priority,
                sink=self._recorder.watch(slot),
            )
        except RadixError as error:
            slot.on_error(error)
        except Exception as error:
            _log.exception("a request could not be started")
            slot.on_error(RadixError(f"the request could not be started: {error}"))

    def close(self) -> None:
        """End what runs with Unavailable and stop the threads; the client stays open."""
        self._closing.set()
        for slot in list(self._live):
            slot.on_error(Unavailable("the model is being unloaded"))
        for outbox in self._outboxes:
            outbox.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _send_loop(self, outbox: SimpleQueue[Slot | None]) -> None:
        while (slot := outbox.get()) is not None:
            try:
                slot.flush()
            except Exception as error:
                self._give_up(slot, error)
            if slot.ended:
                self._live.discard(slot)
            del slot  # its sender keeps the model loaded: it must not wait here for the next one

    def _give_up(self, slot: Slot, cause: Exception) -> None:
        _log.error("a response could not be sent: %s", cause)
        if slot.engine_id is not None:
            self._client.abort([slot.engine_id])
        try:
            slot.fail(RadixError(f"the response could not be sent: {cause}"))
        except Exception as error:
            _log.error("nor could this error; the client is left without an answer: %s", error)

    def _watch_loop(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                if reason := self._ending(bool(self._live)):
                    self._end_all(Unavailable(reason))
                # Their slots end with the client's `Cancelled`.
                self._abort([slot for slot in list(self._live) if slot.is_cancelled()])
            except Exception:
                _log.exception("looking for cancelled requests failed")

    def _end_all(self, error: RadixError) -> None:
        slots = list(self._live)
        for slot in slots:
            slot.on_error(error)
        self._abort(slots)  # what they hear of it comes after their end

    def _abort(self, slots: list[Slot]) -> None:
        self._client.abort([slot.engine_id for slot in slots if slot.engine_id is not None])


def suitable_senders() -> int:
    """Sender threads for this machine."""
    return max(1, min(_MAX_SENDERS, len(os.sched_getaffinity(0)) // _CORES_A_SENDER))

"""What a door observes of its requests, kept until the publisher takes it.

On the path of a token: an `append` to a deque, which needs no lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from radix_backend.errors import Cancelled, RadixError
from radix_backend.metrics.families import (
    E2E_LATENCY,
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    QUEUE_TIME,
    REQUEST_FAILURE,
    REQUEST_GENERATION_TOKENS,
    REQUEST_PROMPT_TOKENS,
    REQUEST_SUCCESS,
    TIME_TO_FIRST_TOKEN,
    TOKENS_PER_RESPONSE,
    Family,
)
from radix_backend.protocol import FINISH_REASONS
from radix_backend.sidecar.sink import Delta, Sink

# While nobody takes, the oldest go: as many as the busiest server observes in some ten seconds.
LIMIT = 2**18

Observation = tuple[Family, str, float]  # the family, the value of its label, what was observed


class Recorder:
    """Puts come from the client's I/O thread and the sender threads, `take` is for the publisher's alone."""

    def __init__(self) -> None:
        self._observations: deque[Observation] = deque(maxlen=LIMIT)
        self.record = self._observations.append

    def watch(self, sink: Sink) -> Sink:
        """A sink that observes one request, which arrives now, and hands everything on."""
        return _Watch(sink, self)

    def sent(self, num_tokens: int) -> None:
        """A response of a stream was sent."""
        if num_tokens:
            self.record((TOKENS_PER_RESPONSE, "", num_tokens))

    def failed(self, error: RadixError) -> None:
        """A request ends with this error."""
        if isinstance(error, Cancelled):
            self.record((REQUEST_SUCCESS, "abort", 1))
        else:
            self.record((REQUEST_FAILURE, error.code, 1))

    def take(self) -> Iterator[Observation]:
        """Everything observed since the last time, in order."""
        for _ in range(len(self._observations)):
            yield self._observations.popleft()


class _Watch:
    """Each completion of a request counts as one of its own."""

    def __init__(self, sink: Sink, recorder: Recorder) -> None:
        self._sink = sink
        self._record = recorder.record
        self._arrival = time.monotonic()
        self._last_token: dict[int, float] = {}  # by the completion's index

    def on_delta(self, delta: Delta) -> None:
        self._sink.on_delta(delta)
        now = time.monotonic()
        if num_tokens := len(delta.token_ids):
            if last_token := self._last_token.get(delta.index):
                self._record((INTER_TOKEN_LATENCY, "", now - last_token))
            else:
                self._record((TIME_TO_FIRST_TOKEN, "", now - self._arrival))
            self._last_token[delta.index] = now
            self._record((GENERATION_TOKENS, "", num_tokens))
        if delta.finish:
            self._record((REQUEST_SUCCESS, FINISH_REASONS[delta.finish], 1))
            self._record((E2E_LATENCY, "", now - self._arrival))
        if (receipt := delta.receipt) is not None:
            self._record((QUEUE_TIME, "", receipt.queue_ms / 1e3))
            self._record((REQUEST_PROMPT_TOKENS, "", receipt.num_input_tokens))
            self._record((REQUEST_GENERATION_TOKENS, "", receipt.num_output_tokens))

    def on_error(self, error: RadixError) -> None:
        self._sink.on_error(error)

"""Between the event loop and the engine's client: what an HTTP request waits for, and who wakes it.

The client's I/O thread puts into an exchange, the loop takes out of it all that has come since. So a client that reads
slowly gets more at a time, holds up nobody, and costs no more memory than its answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from radix_backend.client import EngineClient
from radix_backend.errors import RadixError
from radix_backend.metrics.recorder import Recorder
from radix_backend.openai.requests import Prompt
from radix_backend.protocol import Logprob, Receipt
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.sink import Choice, Delta


class Question(NamedTuple):
    """One prompt."""

    prompt: Mapping[str, Any]  # keywords of `EngineClient.submit`
    num_scored: int = 0  # tokens of the prompt whose log probabilities must come before any part of the answer

    @classmethod
    def of(cls, prompt: Prompt, add_special_tokens: bool) -> Question:
        if isinstance(prompt, str):
            return cls({"text": prompt, "add_special_tokens": add_special_tokens})
        return cls({"input_ids": prompt})


class Part(NamedTuple):
    """What is new of one completion."""

    question: int
    completion: int  # which of its
    choice: Choice


class Exchanges:
    """All that run, and the bell by which the client's I/O thread wakes them: once for all that a step brought."""

    def __init__(self, client: EngineClient, recorder: Recorder) -> None:
        self.client = client
        self.recorder = recorder
        self._live: set[Exchange] = set()
        self._rung: deque[Exchange] = deque()
        self._ringing = False
        self._end: RadixError | None = None

    def open(self, questions: Sequence[Question], params: SamplingParams, priority: int, stream: bool) -> Exchange:
        """Ask the engine. On the loop. Close the exchange. Raises what `EngineClient.submit` does, and what `end_all`
        was given."""
        if self._end is not None:
            raise self._end
        exchange = Exchange(self, questions, params.n, stream)
        self._live.add(exchange)
        try:
            for number, question in enumerate(questions):
                sink = self.recorder.watch(_Sink(exchange, number))
                exchange.ids.append(self.client.submit(params, sink=sink, priority=priority, **question.prompt))
        except BaseException:
            exchange.close()
            raise
        return exchange

    def end_all(self, error: RadixError) -> None:
        """On the loop. Those to come too."""
        self._end = error
        for exchange in list(self._live):
            exchange.fail(error)

    def forget(self, exchange: Exchange) -> None:
        self._live.discard(exchange)

    def ring(self, exchange: Exchange) -> None:
        """Wake it on its loop. From any thread."""
        self._rung.append(exchange)
        if not self._ringing:
            self._ringing = True
            exchange.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._ringing = False  # before they are taken: one that is put later rings again
        while self._rung:
            self._rung.popleft().wake()


class Exchange:
    """One HTTP request: some prompts, with `n` completions each."""

    def __init__(self, exchanges: Exchanges, questions: Sequence[Question], n: int, stream: bool) -> None:
        self.ids: list[int] = []  # of the engine client's requests
        self.loop = asyncio.get_running_loop()
        self.receipts: list[dict[int, Receipt]] = [{} for _ in questions]  # of each question, by completion
        self.prompt_logprobs: list[list[list[Logprob]]] = [[] for _ in questions]
        self.done = False  # nothing will come after what was taken
        self._exchanges = exchanges
        self._questions = questions
        self._stream = stream
        self._choices = [[Choice() for _ in range(n)] for _ in questions]
        self._running = n * len(questions)
        self._error: RadixError | None = None
        self._lock = threading.Lock()  # of all that the I/O thread writes
        self._waiter: asyncio.Future[None] | None = None
        self._news = False

    # ── on the client's I/O thread ──────────────────────────────────────────────────────────────────────

    def add(self, question: int, delta: Delta) -> None:
        with self._lock:
            if delta.prompt_logprobs:
                self.prompt_logprobs[question] += delta.prompt_logprobs
            elif not delta.num_input_tokens:  # the receipt tells it again
                self._choices[question][delta.index].add(delta)
                if delta.receipt is not None:
                    self.receipts[question][delta.index] = delta.receipt
                self._running -= bool(delta.finish)
        if self._stream or not self._running:
            self._exchanges.ring(self)

    def end(self, error: RadixError) -> None:
        with self._lock:
            self._error = self._error or error
        self._exchanges.ring(self)

    # ── on the loop ──────────────────────────────────────────────────────────────────────

    async def take(self) -> list[Part]:
        """What is new: of a stream as soon as something is, otherwise all of it at the end. Raises the error that ends
        it, after the last part."""
        while True:
            await self._wait()
            with self._lock:
                self.done = not self._running
                if (self._stream or self.done) and (parts := self._new_parts()):
                    return parts
                if self._error is not None:
                    raise self._error

    def fail(self, error: RadixError) -> None:
        """Have it end with this error, unless it has ended already."""
        with self._lock:
            self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """What still runs is cancelled."""
        self._exchanges.forget(self)
        if self._running and self.ids:
            self._exchanges.client.abort(self.ids)

    async def _wait(self) -> None:
        if not self._news:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False

    def _new_parts(self) -> list[Part]:
        parts = []
        for number, choices in enumerate(self._choices):
            if len(self.prompt_logprobs[number]) < self._questions[number].num_scored and not self.done:
                continue
            for index, choice in enumerate(choices):
                if choice.text or choice.finish or choice.logprobs:
                    parts.append(Part(number, index, choice))
                    choices[index] = Choice()
        return parts


class _Sink:
    def __init__(self, exchange: Exchange, question: int) -> None:
        self.on_delta = partial(exchange.add, question)
        self.on_error = exchange.end

"""The one client of the engine: Triton's stub, the OpenAI door, the offline LLM and the command line all use it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import queue
import secrets
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, RadixError, Unavailable
from radix_backend.protocol import (
    RUNNING,
    Detokenize,
    Goodbye,
    Message,
    ModelInfo,
    Profile,
    RenderChat,
    Stats,
    Status,
    Submit,
    Tokenize,
    column,
)
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.connection import Connection, encode
from radix_backend.sidecar.sink import Delta, Sink
from radix_backend.validation import show

__all__ = ["Delta", "EngineClient", "Sink"]

TokenIds = Sequence[int] | npt.NDArray[Any]

STALL_SECONDS = 10.0  # without a sign of progress, after which an engine is taken for stuck
_CALL_TIMEOUT = 30.0  # seconds
_PROFILE_TIMEOUT = 300.0
_MAX_TOKEN_ID = 2**31 - 1


class EngineClient:
    """A lease on a sidecar and a stream of requests to it. Every method may be called from any thread.

    The sidecar is found, or started where none serves this configuration, and lives at least as long as this object.
    When it dies, requests that run end with Unavailable and the client follows it to its next life by itself.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_log: Callable[[str, str, str], None] | None = None,
        on_status: Callable[[Status], None] | None = None,
        parent: int = 0,
    ) -> None:
        """Returns as soon as the supervisor has answered; `wait_ready` waits for the model.

        ``on_log(level, source, line)`` is given the sidecar's log, if no older client shows it already; ``on_status``
        every change of `status`. Both are called on the client's I/O thread. ``parent`` is the id of this process's
        parent if this process must not outlive it: two seconds later the supervisor kills it.

        Raises Unavailable if the supervisor does not start, InvalidArgument for an unusable runtime directory or
        interpreter. With ``config.engine_endpoint`` nothing is started: the client joins whenever it can.
        """
        self._ids = itertools.count(1)
        self._connection = Connection(config, parent, on_log, on_status)

    @property
    def status(self) -> Status:
        """The sidecar's, as far as this client is concerned: "ready" means that `submit` works."""
        return self._connection.status

    @property
    def ailment(self) -> str:
        """Why nobody should be sent here; "" while the engine is ready and gets things done.

        An engine is taken for stuck `STALL_SECONDS` after its last sign of progress (steps while there are requests,
        turns of its loop while there are none), which is long before the supervisor replaces it.
        """
        status, silence = self.status, self._connection.silence
        if status.state != "ready":
            return str(self._connection.unavailable())
        return f"the engine has made no progress for {silence:.0f} s" if silence >= STALL_SECONDS else ""

    def wait_ready(self, timeout: float | None = None) -> None:
        """Raises Unavailable after ``timeout`` seconds, InvalidArgument if waiting longer cannot help."""
        status = self._connection.wait_settled(timeout)
        if status.state == "failed":
            raise InvalidArgument(status.detail)
        if status.state != "ready":
            raise self._connection.unavailable()

    @property
    def model(self) -> ModelInfo:
        """Raises Unavailable before the engine is ready."""
        model = self._connection.model
        if model is None:
            raise self._connection.unavailable()
        return model

    def submit(
        self,
        params: SamplingParams,
        *,
        text: str | None = None,
        input_ids: TokenIds | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sink: Sink,
        priority: int = 0,
        output_ids: TokenIds = (),
        emitted_chars: int = 0,
        add_special_tokens: bool = True,
        wants_input_ids: bool = False,
    ) -> int:
        """Start a request, or go on with one that had ``output_ids``; returns its id at once.

        From then on ``sink`` gets exactly one last call. A seed is drawn if ``params`` has none. Of several completions
        (``params.n``) each is scheduled for itself; if one of them is refused, all end. With ``wants_input_ids`` the
        first `Delta` of each has the tokens of the prompt.
        Raises Unavailable when the engine is not ready, InvalidArgument for a prompt that is none.
        """
        if sum(prompt is not None for prompt in (text, input_ids, messages)) != 1:
            raise InvalidArgument("a prompt is 'text', 'input_ids' or 'messages'; accepted: exactly one of them")
        if messages is not None and not messages:
            raise InvalidArgument("'messages' is empty; accepted: at least one message")
        if self.status.state != "ready":
            raise self._connection.unavailable()
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        request = next(self._ids)
        message = Submit(
            0,
            params,
            text,
            b"" if input_ids is None else _token_column("input_ids", input_ids),
            priority,
            _token_column("output_ids", output_ids) if len(output_ids) else b"",
            emitted_chars,
            add_special_tokens,
            [dict(message) for message in messages or ()],
            dict(chat_template_kwargs or {}),
            wants_input_ids,
        )
        self._connection.post(partial(self._connection.submit, request, sink, encode(request, message)))
        return request

    def abort(self, ids: Sequence[int]) -> None:
        """Cancel requests: those that still run end with Cancelled, on the I/O thread. Other ids are ignored."""
        with contextlib.suppress(Unavailable):  # then nothing runs any more
            self._connection.post(partial(self._connection.abort, list(ids)))

    def generate(
        self, prompt: str | TokenIds | None, params: SamplingParams, **request: Any
    ) -> Generator[Delta, None, None]:
        """Submit at the first `next`, then iterate until the request ends. Closing the iterator aborts the request.

        ``request`` are further keywords of `submit`, ``messages`` where ``prompt`` is None. Raises what `submit` does,
        and whatever error ends the request.
        """
        inbox: queue.SimpleQueue[Delta | RadixError] = queue.SimpleQueue()
        id = self._submit_prompt(prompt, params, _Inbox(inbox.put), request)
        left = params.n
        try:
            while left:
                delta = _delta(inbox.get())
                left -= delta.finish != RUNNING
                yield delta
        finally:
            self.abort([id])

    async def agenerate(
        self, prompt: str | TokenIds | None, params: SamplingParams, **request: Any
    ) -> AsyncGenerator[Delta, None]:
        """`generate` for asyncio. Cancelling the task that iterates aborts the request too."""
        inbox: asyncio.Queue[Delta | RadixError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: Delta | RadixError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        id = self._submit_prompt(prompt, params, _Inbox(put), request)
        left = params.n
        try:
            while left:
                delta = _delta(await inbox.get())
                left -= delta.finish != RUNNING
                yield delta
        finally:
            self.abort([id])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        timeout: float = _CALL_TIMEOUT,
    ) -> str:
        """The prompt text of a conversation; submit it with ``add_special_tokens=False``.

        Like every call that waits for an answer: raises Unavailable after ``timeout`` seconds or when the engine is
        not ready, and must not be made on the I/O thread.
        """
        conversation = [dict(message) for message in messages]
        chat = partial(RenderChat, add_generation_prompt=add_generation_prompt, variables=dict(variables or {}))
        return str(self._ask(lambda call: chat(call, conversation), timeout))

    def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float = _CALL_TIMEOUT) -> list[int]:
        return list(self._ask(lambda call: Tokenize(call, text, add_special_tokens), timeout))

    def detokenize(self, ids: Sequence[int], *, timeout: float = _CALL_TIMEOUT) -> str:
        return str(self._ask(lambda call: Detokenize(call, list(ids)), timeout))

    def token_pieces(self, ids: Sequence[int], *, timeout: float = _CALL_TIMEOUT) -> list[str]:
        """What each token adds to the text of all."""
        return list(self._ask(lambda call: Detokenize(call, list(ids), pieces=True), timeout))

    def stats(self, *, audit: bool = False, timeout: float = _CALL_TIMEOUT) -> dict[str, float]:
        """The engine's figures, see engine/stats.py; ``audit`` checks its page invariant first."""
        return dict(self._ask(lambda call: Stats(call, audit), timeout))

    def profile(self, start: bool, *, timeout: float = _PROFILE_TIMEOUT) -> str:
        """Start or stop recording a profile of the engine, whoever started it; a stop returns the file.

        To write it takes seconds, for which every stream waits. Raises InvalidArgument for a second start, or a stop
        without a start.
        """
        return str(self._ask(lambda call: Profile(call, start), timeout))

    def close(self, linger: bool = True) -> None:
        """Give the lease up; requests that run end with Cancelled. Returns when the I/O thread is done.

        ``linger`` False: if no other client is left, the sidecar stops now and not ``config.linger`` seconds later.
        """
        self._connection.close(Goodbye(linger))

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit_prompt(
        self, prompt: str | TokenIds | None, params: SamplingParams, sink: Sink, request: Mapping[str, Any]
    ) -> int:
        given: dict[str, Any] = {} if prompt is None else {"text" if isinstance(prompt, str) else "input_ids": prompt}
        return self.submit(params, sink=sink, **given, **request)

    def _ask(self, message: Callable[[int], Message], timeout: float) -> Any:
        call = next(self._ids)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        data = msgspec.msgpack.encode(message(call))
        self._connection.post(partial(self._connection.call, call, future, data))
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise Unavailable(f"the engine did not answer within {timeout:g} s") from None


class _Inbox:
    """A sink that turns calls into items of a queue."""

    def __init__(self, put: Callable[[Delta | RadixError], object]) -> None:
        self._put = put

    def on_delta(self, delta: Delta) -> None:
        if not delta.num_input_tokens or delta.input_ids is not None:  # the number alone is in the receipt
            self._put(delta)

    def on_error(self, error: RadixError) -> None:
        self._put(error)


def _delta(item: Delta | RadixError) -> Delta:
    if isinstance(item, RadixError):
        raise item
    return item


def _token_column(name: str, ids: TokenIds) -> bytes:
    try:
        values = np.asarray(ids)
    except ValueError:  # lists of different lengths
        values = np.empty(0)
    accepted = f"a list of 1 or more integers from 0 to {_MAX_TOKEN_ID}"
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise InvalidArgument(f"{name!r} is {show(values.tolist())}; accepted: {accepted}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _MAX_TOKEN_ID:
        raise InvalidArgument(f"{name!r} holds {low if low < 0 else high}; accepted: {accepted}")
    return column(values, "<i4")

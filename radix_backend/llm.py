"""The offline door: `LLM` in a script, a notebook or a service of your own. No server, and no torch in your process.

The engine is the same sidecar that serves Triton. LLM objects with equal settings, also in other processes, share it,
and with it the prefix cache.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, overload

import numpy as np
from tqdm.auto import tqdm

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, RadixError
from radix_backend.output import Completion, Output
from radix_backend.protocol import Status
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.sink import Delta

_IN_FLIGHT = 1024  # completions of a list that the engine is given at a time: some steps' worth

Conversation = list[dict[str, Any]]


class LLM:
    """An engine to generate with. May be used from any thread, with or without an event loop.

    Use it in ``with`` or ``async with``, or `close` it; otherwise it is closed when nobody holds it any more, at the
    latest when the interpreter exits.
    """

    def __init__(self, config: EngineConfig | None = None, *, progress: bool = True) -> None:
        """Returns when the model is loaded; raises InvalidArgument when it cannot be.

        ``progress`` shows what is waited for, here and with lists of prompts, if stderr is a terminal. What the engine
        logs goes to the loggers ``radix_backend.*``.
        """
        self.config = config or EngineConfig()
        self._bar = partial(tqdm, disable=None if progress else True)
        with self._bar(desc="engine: starting", bar_format="{desc} [{elapsed}]", leave=False) as bar:

            def show(status: Status) -> None:
                bar.set_description_str(f"engine: {status.detail or status.state}")

            self.client = EngineClient(self.config, on_log=_log, on_status=show)
            self._close = weakref.finalize(self, self.client.close)
            try:
                self.client.wait_ready()
            except BaseException:
                self.close()
                raise

    @overload
    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, priority: int = 0
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[Output]: ...
    def generate(self, prompt: Any, params: Any = None, *, priority: int = 0) -> Generation | list[Output]:
        """Continue a prompt, or a list of them. A prompt is a text, or a list (or an array) of token ids.

        A single one gives a `Generation`: iterate or await it. A list is computed together, and its outputs come in its
        order; its ``params`` may be a list as long. Lower ``priority`` is served earlier.
        Raises whatever error ends a request; the others of a list are cancelled then, as at Ctrl-C.
        """
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], int | np.integer)):
            return Generation(self, prompt, params, _prompt(prompt, priority))
        return self._generate_list(prompt, params, [_prompt(each, priority) for each in prompt])

    @overload
    def chat(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: list[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> list[Output]: ...
    def chat(
        self,
        messages: Any,
        params: Any = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> Generation | list[Output]:
        """`generate` for a conversation, or a list of them: dicts with 'role' and 'content'.

        The model's own template makes the prompt; ``chat_template_kwargs`` are further variables of it.
        """
        request = partial(dict[str, Any], chat_template_kwargs=chat_template_kwargs, priority=priority)
        if messages and isinstance(messages[0], Mapping):
            return Generation(self, messages, params, request(messages=messages))
        return self._generate_list(messages, params, [request(messages=each) for each in messages])

    def close(self) -> None:
        """Give the engine up, which ends `EngineConfig.linger` seconds after its last user; what runs is cancelled."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> LLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _generate_list(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        requests: list[dict[str, Any]],
    ) -> list[Output]:
        """``requests`` are keywords of `EngineClient.submit`, one for each of ``prompts``."""
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(requests)
        if len(each) != len(requests):
            raise InvalidArgument(f"'params' is a list of {len(each)}; accepted: one, or as many as prompts")
        outputs = [_empty_output(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        inbox: SimpleQueue[tuple[int, Delta | RadixError]] = SimpleQueue()
        limit = min(_IN_FLIGHT, self.config.max_queue_size)
        running: dict[int, int] = {}  # index → id of the request
        num_sent = num_open = num_tokens = 0
        with self._bar(total=len(requests), unit="request") as bar:
            try:
                while num_sent < len(requests) or running:
                    while num_sent < len(requests) and (not running or num_open + each[num_sent].n <= limit):
                        sink = _Sink(inbox, num_sent)
                        running[num_sent] = self.client.submit(
                            each[num_sent], sink=sink, wants_input_ids=True, **requests[num_sent]
                        )
                        num_open += each[num_sent].n
                        num_sent += 1
                    index, item = inbox.get()
                    if isinstance(item, RadixError):
                        raise type(item)(f"prompt {index} of the list: {item}")
                    outputs[index].add(item)
                    num_tokens += len(item.token_ids)
                    num_open -= bool(item.finish)
                    if outputs[index].finished:
                        del running[index]
                        bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-3):.0f} tok/s", False)
                        bar.update()
            finally:
                self.client.abort(list(running.values()))
        return outputs


class Generation:
    """One prompt and how to continue it. Every use asks the engine anew:

    - ``for`` and ``async for`` give the text piece by piece; leaving the loop cancels the request;
    - `result` and ``await`` give the whole `Output`.

    `output` is what the last use has brought so far.
    """

    def __init__(self, llm: LLM, prompt: Any, params: SamplingParams | None, request: dict[str, Any]) -> None:
        self._llm = llm  # which lives as long as this
        self._prompt = prompt
        self._params = params or SamplingParams()
        self._request = request
        self.output = _empty_output(prompt, self._params)

    def result(self) -> Output:
        for _ in self._deltas():
            pass
        return self.output

    def __await__(self) -> Generator[Any, None, Output]:
        return self._aresult().__await__()

    def __iter__(self) -> Iterator[str]:
        self._check_streams()
        with closing(self._deltas()) as deltas:
            for delta in deltas:
                if delta.text:
                    yield delta.text

    async def __aiter__(self) -> AsyncIterator[str]:
        self._check_streams()
        async with aclosing(self._adeltas()) as deltas:
            async for delta in deltas:
                if delta.text:
                    yield delta.text

    async def _aresult(self) -> Output:
        async for _ in self._adeltas():
            pass
        return self.output

    def _deltas(self) -> Generator[Delta, None, None]:
        self.output = output = _empty_output(self._prompt, self._params)
        with closing(self._llm.client.generate(None, self._params, wants_input_ids=True, **self._request)) as deltas:
            for delta in deltas:
                output.add(delta)
                yield delta

    async def _adeltas(self) -> AsyncGenerator[Delta, None]:
        self.output = output = _empty_output(self._prompt, self._params)
        request = self._llm.client.agenerate(None, self._params, wants_input_ids=True, **self._request)
        async with aclosing(request) as deltas:
            async for delta in deltas:
                output.add(delta)
                yield delta

    def _check_streams(self) -> None:
        if self._params.n != 1:
            raise InvalidArgument(f"'n' is {self._params.n}; accepted for a stream: 1 (`result` and `await` take more)")


class _Sink:
    """Of one request of a list."""

    def __init__(self, inbox: SimpleQueue[tuple[int, Delta | RadixError]], index: int) -> None:
        self._inbox = inbox
        self._index = index

    def on_delta(self, delta: Delta) -> None:
        self._inbox.put((self._index, delta))

    def on_error(self, error: RadixError) -> None:
        self._inbox.put((self._index, error))


def _prompt(prompt: str | Sequence[int], priority: int) -> dict[str, Any]:
    return {"text" if isinstance(prompt, str) else "input_ids": prompt, "priority": priority}


def _empty_output(prompt: Any, params: SamplingParams) -> Output:
    return Output(prompt, [Completion() for _ in range(params.n)])


def _log(level: str, source: str, line: str) -> None:
    logging.getLogger(f"radix_backend.{source}").log(logging.getLevelName(level.upper()), "%s", line)

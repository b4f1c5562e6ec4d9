"""The offline door: `LLM` in a script, a notebook or a service of your own. No server, and no torch in your process.

The engine is the same sidecar that serves Triton. LLM objects with equal settings, also in other processes, share it,
and with it the prefix cache.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeGuard, overload

import numpy as np
from tqdm import tqdm

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, RadixError, call_it_prompt
from radix_backend.output import Completion, Output
from radix_backend.protocol import Status
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.sink import Delta
from radix_backend.validation import show

_IN_FLIGHT = 1024  # completions of a list that the engine is given at a time: some steps' worth

Conversation = list[dict[str, Any]]


class LLM:
    """An engine to generate with. May be used from any thread, with or without an event loop.

    Use it in ``with`` or ``async with``, or `close` it; otherwise it is closed when nobody holds it any more, at the
    latest when the interpreter exits.
    """

    def __init__(
        self, config: EngineConfig | str | os.PathLike[str] | None = None, *, progress: bool = True, **settings: Any
    ) -> None:
        """Returns when the model is loaded; raises InvalidArgument when it cannot be.

        ``LLM("Qwen3-0.6B", max_bs=4)`` is ``LLM(EngineConfig(model="Qwen3-0.6B", max_bs=4))``.
        ``progress`` shows what is waited for, here and with lists of prompts, if stderr is a terminal or a notebook's.
        What the engine logs goes to the loggers ``radix_backend.*``.
        """
        self.config = _config(config, settings)
        # None is "unless stderr is no terminal". A notebook's is none, and shows a bar all the same.
        self._bar = partial(tqdm, disable=True if not progress else False if _in_notebook() else None)
        with self._bar(desc="engine: starting", bar_format="{desc} [{elapsed}]", leave=False) as bar:

            def show_status(status: Status) -> None:
                bar.set_description_str(f"engine: {status.detail or status.state}")

            self.client = EngineClient(self.config, on_log=_log, on_status=show_status)
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
        if isinstance(prompt, str) or (_is_list(prompt) and len(prompt) and isinstance(prompt[0], int | np.integer)):
            return Generation(self, prompt, params, _prompt(prompt, priority))
        if not _is_list(prompt):
            raise InvalidArgument(f"'prompt' is {show(prompt)}; accepted: {_PROMPT}, or a list of prompts")
        return self._generate_list(prompt, params, partial(_prompt, priority=priority))

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
        request = partial(_conversation, chat_template_kwargs=chat_template_kwargs, priority=priority)
        if not _is_list(messages):
            accepted = f"{_CONVERSATION}, or a list of conversations"
            raise InvalidArgument(f"'messages' is {show(messages)}; accepted: {accepted}")
        if len(messages) and isinstance(messages[0], Mapping):
            return Generation(self, messages, params, request(messages))
        return self._generate_list(messages, params, request)

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
        request: Callable[[Any], dict[str, Any]],
    ) -> list[Output]:
        """``request`` makes keywords of `EngineClient.submit` of a prompt."""
        requests = []
        for index, prompt in enumerate(prompts):
            with _our_words(index):
                requests.append(request(prompt))
        each = [_params(one) for one in params] if _is_list(params) else [_params(params)] * len(requests)
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
                        with _our_words(num_sent):
                            running[num_sent] = self.client.submit(
                                each[num_sent], sink=sink, wants_input_ids=True, **requests[num_sent]
                            )
                        num_open += each[num_sent].n
                        num_sent += 1
                    index, item = inbox.get()
                    if isinstance(item, RadixError):
                        with _our_words(index):
                            raise item
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
        self._params = _params(params)
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
        request = self._llm.client.generate(None, self._params, wants_input_ids=True, **self._request)
        with _our_words(), closing(request) as deltas:
            for delta in deltas:
                output.add(delta)
                yield delta

    async def _adeltas(self) -> AsyncGenerator[Delta, None]:
        self.output = output = _empty_output(self._prompt, self._params)
        request = self._llm.client.agenerate(None, self._params, wants_input_ids=True, **self._request)
        with _our_words():
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


_PROMPT = "a text, or a list (or an array) of token ids"
_CONVERSATION = "a list of messages, dicts with 'role' and 'content'"


def _config(config: Any, settings: dict[str, Any]) -> EngineConfig:
    """Raises InvalidArgument or Unsupported for what is none."""
    if isinstance(config, EngineConfig):
        if settings:
            names = ", ".join(settings)
            raise InvalidArgument(f"{names} beside an EngineConfig; accepted: settings in it, or as keywords alone")
        return config
    if isinstance(config, str | os.PathLike):
        if "model" in settings:
            raise InvalidArgument(f"'model' is {os.fspath(config)!r} and {settings['model']!r}; accepted: one value")
        settings = {"model": os.fspath(config), **settings}
    elif config is not None:
        accepted = "an EngineConfig, a model by name or directory, or settings as keywords"
        raise InvalidArgument(f"'config' is {show(config)}; accepted: {accepted}")
    return EngineConfig(**settings)


def _params(params: Any) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidArgument(f"'params' is {show(params)}; accepted: SamplingParams(…), or for a list a list of these")
    return params


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _prompt(prompt: Any, priority: int) -> dict[str, Any]:
    if not (isinstance(prompt, str) or _is_list(prompt)):
        raise InvalidArgument(f"'prompt' is {show(prompt)}; accepted: {_PROMPT}")
    return {"text" if isinstance(prompt, str) else "input_ids": prompt, "priority": priority}


def _conversation(messages: Any, **request: Any) -> dict[str, Any]:
    if not (_is_list(messages) and all(isinstance(message, Mapping) for message in messages)):
        raise InvalidArgument(f"'messages' is {show(messages)}; accepted: {_CONVERSATION}")
    return {"messages": messages, **request}


@contextmanager
def _our_words(index: int | None = None) -> Iterator[None]:
    """Inside, an error calls the prompt as its user does, and names which one of a list it was."""
    try:
        yield
    except RadixError as error:
        where = "" if index is None else f"prompt {index} of the list: "
        raise type(error)(where + call_it_prompt(str(error))) from None


def _in_notebook() -> bool:
    return type(sys.stderr).__module__.startswith("ipykernel.")


def _empty_output(prompt: Any, params: SamplingParams) -> Output:
    return Output(prompt, [Completion() for _ in range(params.n)])


def _log(level: str, source: str, line: str) -> None:
    logger = logging.getLogger(f"radix_backend.{source}")
    # The supervisor's one error is that the engine failed, and why. Where nobody has set up logging, it would stand on
    # stderr beside the exception, and after the same words of the process that failed.
    if (source, level) != ("supervisor", "error") or logger.hasHandlers():
        logger.log(logging.getLevelName(level.upper()), "%s", line)

"""From what the engine generated to OpenAI's objects: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from radix_backend.openai.exchange import Exchange, Part
from radix_backend.openai.requests import ChatRequest, CompletionRequest, Generation
from radix_backend.openai.responses import (
    ByTokenId,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptTokensDetails,
    Usage,
    chat_logprobs,
    completion_logprobs,
)
from radix_backend.protocol import FINISH_REASONS, LENGTH, Logprob
from radix_backend.sampling_params import SamplingParams
from radix_backend.sidecar.sink import Choice, by_token_id


class Heading(NamedTuple):
    """What all chunks of an answer repeat."""

    id: str
    model: str
    system_fingerprint: str


class Echo(NamedTuple):
    """A prompt that its completions begin with."""

    text: str
    pieces: Sequence[str] = ()  # each token's share of it, where log probabilities are asked for


class Answers(ABC):
    """Makes the answer to one HTTP request."""

    def __init__(self, kind: str, request: Generation, params: SamplingParams, heading: Heading) -> None:
        """``kind`` is OpenAI's prefix of the answer's id."""
        self._params = params
        self._wants_token_ids = request.return_token_ids
        self._heading = heading._asdict() | {"id": f"{kind}-{heading.id}", "created": int(time.time())}
        self._usage: UnsetType | None = None if request.includes_usage else UNSET  # of chunks but the last

    @abstractmethod
    def chunks(self, exchange: Exchange, parts: Iterable[Part]) -> Iterable[msgspec.Struct]:
        """Of a stream. What was given is not given again."""

    @abstractmethod
    def usage_chunk(self, exchange: Exchange) -> msgspec.Struct: ...

    @abstractmethod
    def whole(self, exchange: Exchange, parts: Sequence[Part]) -> msgspec.Struct: ...

    def _token_ids(self, choice: Choice) -> list[int] | UnsetType:
        return choice.token_ids if self._wants_token_ids else UNSET

    def _prompt_logprobs(self, exchange: Exchange, question: int) -> list[ByTokenId | None] | UnsetType:
        if self._params.prompt_logprobs is None:
            return UNSET
        return [None, *map(by_token_id, exchange.prompt_logprobs[question])]


class ChatAnswers(Answers):
    def __init__(self, request: ChatRequest, params: SamplingParams, heading: Heading) -> None:
        super().__init__("chatcmpl", request, params, heading)
        self._wants_logprobs = request.logprobs
        self._opened = False

    def chunks(self, exchange: Exchange, parts: Iterable[Part]) -> Iterable[ChatChunk]:
        if not self._opened:
            self._opened = True
            for index in range(self._params.n):
                yield self._chunk(ChatChunkChoice(index, ChatDelta("assistant", "")))
        for _, index, choice in parts:
            delta = ChatDelta(content="".join(choice.text) or None)
            token_ids = self._token_ids(choice)
            yield self._chunk(ChatChunkChoice(index, delta, self._logprobs(choice), _finish(choice), token_ids))

    def usage_chunk(self, exchange: Exchange) -> ChatChunk:
        return ChatChunk(**self._heading, choices=[], usage=usage(exchange))

    def whole(self, exchange: Exchange, parts: Sequence[Part]) -> ChatCompletion:
        choices = []
        for _, index, choice in parts:
            answer, token_ids = ChatAnswer("".join(choice.text)), self._token_ids(choice)
            choices.append(ChatChoice(index, answer, self._logprobs(choice), FINISH_REASONS[choice.finish], token_ids))
        prompt_logprobs = self._prompt_logprobs(exchange, 0)
        return ChatCompletion(**self._heading, choices=choices, usage=usage(exchange), prompt_logprobs=prompt_logprobs)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(**self._heading, choices=[choice], usage=self._usage)

    def _logprobs(self, choice: Choice) -> ChatLogprobs | None:
        return chat_logprobs(choice.logprobs) if self._wants_logprobs else None


class CompletionAnswers(Answers):
    def __init__(
        self, request: CompletionRequest, params: SamplingParams, heading: Heading, echoes: Sequence[Echo]
    ) -> None:
        """``echoes``: one a prompt, or none where they are not asked for."""
        super().__init__("cmpl", request, params, heading)
        self._echoes = echoes
        self._echoes_alone = request.max_tokens == 0
        self._lengths: dict[int, int] = {}  # characters of each choice that were made into chunks

    def chunks(self, exchange: Exchange, parts: Iterable[Part]) -> Iterable[Completion]:
        for part in parts:
            yield Completion(**self._heading, choices=[self._choice(exchange, part)], usage=self._usage)

    def usage_chunk(self, exchange: Exchange) -> Completion:
        return Completion(**self._heading, choices=[], usage=self._count(exchange))

    def whole(self, exchange: Exchange, parts: Sequence[Part]) -> Completion:
        choices = [self._choice(exchange, part) for part in parts]
        if not self._echoes:  # an echo has them in its log probabilities
            choices = [
                replace(choice, prompt_logprobs=self._prompt_logprobs(exchange, part.question))
                for choice, part in zip(choices, parts, strict=True)
            ]
        return Completion(**self._heading, choices=choices, usage=self._count(exchange))

    def _count(self, exchange: Exchange) -> Usage:
        count = usage(exchange)
        if self._echoes_alone:
            return replace(count, completion_tokens=0, total_tokens=count.prompt_tokens)
        return count

    def _choice(self, exchange: Exchange, part: Part) -> CompletionChoice:
        choice = part.choice
        if self._echoes_alone:  # the engine generated a token all the same
            choice.clear()
            choice.finish = LENGTH
        number = part.question * self._params.n + part.completion
        text, before = "".join(choice.text), self._lengths.get(number, 0)
        echo = self._echoes[part.question] if self._echoes and number not in self._lengths else Echo("")
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = completion_logprobs(choice.logprobs, before + len(echo.text))
            if echo.pieces:
                logprobs = echo_logprobs(echo, exchange.prompt_logprobs[part.question]).joined_to(logprobs)
        text = echo.text + text
        self._lengths[number] = before + len(text)
        return CompletionChoice(number, text, logprobs, _finish(choice), self._token_ids(choice))


def echo_logprobs(echo: Echo, scores: list[list[Logprob]]) -> CompletionLogprobs:
    """Of the prompt's tokens. Nothing can be said of the first one."""
    first, *pieces = echo.pieces
    rows = [
        [replace(token, decoded_token=piece), *likeliest]
        for piece, (token, *likeliest) in zip(pieces, scores, strict=True)
    ]
    return CompletionLogprobs([0], [None], [first], [None]).joined_to(completion_logprobs(rows, len(first)))


def usage(exchange: Exchange) -> Usage:
    """Of a finished exchange. A prompt counts once, whatever `n`; what is cached of it, as its first completion saw."""
    firsts = [receipts[0] for receipts in exchange.receipts]
    prompt_tokens = sum(first.num_input_tokens for first in firsts)
    completion_tokens = sum(each.num_output_tokens for receipts in exchange.receipts for each in receipts.values())
    cached = PromptTokensDetails(sum(first.cached_tokens for first in firsts))
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, cached)


def _finish(choice: Choice) -> str | None:
    return FINISH_REASONS[choice.finish] or None

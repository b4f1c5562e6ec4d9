"""What OpenAI's clients get, in the shapes that OpenAI documents: `null` and absent are two things to some clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from radix_backend.errors import InvalidArgument, NotFound, RadixError, Unsupported, call_it_prompt
from radix_backend.protocol import Logprob

LOWEST_LOGPROB = -9999.0  # OpenAI's number for what JSON cannot say: minus infinity

FinishReason = str  # "stop", "length"; in chunks before the last one null
ByTokenId = dict[str, dict[str, Any]]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: Annotated[int, Meta(description="found in the radix cache")]


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]

    def joined_to(self, following: CompletionLogprobs) -> CompletionLogprobs:
        both = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(following), strict=True)
        return CompletionLogprobs(*(these + those for these, those in both))


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[ByTokenId | None] | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: Annotated[str, Meta(description="the same exactly while the engine's settings are")]


class ChatCompletion(Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[ByTokenId | None] | UnsetType = UNSET


class ChatChunk(Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET  # null in all but the last chunk, where it is asked for


class Completion(Answer, frozen=True, kw_only=True):
    """Chunks of a stream have the same shape."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "radix-backend"
    max_model_len: Annotated[int | None, Meta(description="the context; null before the engine is ready")]


class Models(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct, frozen=True):
    prompt: str


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    status: Literal["ok", "unavailable"]
    reason: str | None = None


class ErrorDetails(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: Annotated[str | None, Meta(description="the field that is wrong")]
    code: str | None


class Error(msgspec.Struct, frozen=True):
    error: ErrorDetails

    @classmethod
    def of(cls, error: RadixError) -> Error:
        message = str(error)
        if not message.startswith("unknown field"):  # which may be one of Triton's
            message = call_it_prompt(message)
        if not isinstance(error, InvalidArgument | NotFound | Unsupported):
            return cls(ErrorDetails(message, "server_error", None, error.code.lower()))
        quoted = message.split("'", 2)  # our messages name the field first
        param = quoted[1] if len(quoted) == 3 and quoted[1].isidentifier() else None
        return cls(ErrorDetails(message, "invalid_request_error", param, _CODES.get(error.code)))


_CODES = {NotFound.code: "model_not_found", Unsupported.code: "unsupported_value"}


def chat_logprobs(tokens: list[list[Logprob]]) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(token, likeliest) for token, *likeliest in tokens])


def _token_logprob(token: Logprob, likeliest: list[Logprob]) -> TokenLogprob:
    top = [TopLogprob(each.decoded_token, _finite(each.logprob), _bytes(each)) for each in likeliest]
    return TokenLogprob(token.decoded_token, _finite(token.logprob), _bytes(token), top)


def completion_logprobs(tokens: list[list[Logprob]], offset: int) -> CompletionLogprobs:
    """``offset``: characters of the text before these tokens."""
    shown = CompletionLogprobs([], [], [], [])
    for token, *likeliest in tokens:
        shown.text_offset.append(offset)
        shown.tokens.append(token.decoded_token)
        shown.token_logprobs.append(_finite(token.logprob))
        top = {token.decoded_token: _finite(token.logprob)}
        for each in likeliest:
            if each.token_id != token.token_id:  # parts of characters share a text: the likeliest one has it
                top.setdefault(each.decoded_token, _finite(each.logprob))
        shown.top_logprobs.append(top)
        offset += len(token.decoded_token)
    return shown


def _bytes(token: Logprob) -> list[int]:
    return list(token.decoded_token.encode() if token.raw is None else token.raw)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def json_response(body: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def refusal(status: int, message: str, code: str | None, headers: Mapping[str, str] | None = None) -> Response:
    """An error that is HTTP's, not the engine's."""
    return json_response(Error(ErrorDetails(message, "invalid_request_error", None, code)), status, headers)

"""The servers that `radix-backend chat` can talk to, all in one way."""

from __future__ import annotations

import http
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from radix_backend.cli.extras import extra
from radix_backend.errors import InvalidArgument, RadixError, Unavailable
from radix_backend.llm import LLM
from radix_backend.sampling_params import SamplingParams

Messages = list[dict[str, Any]]

_TRITON_MODEL = "radix"
# What somebody answers to Triton's own path who is no Triton; a server that wants a key may ask for it everywhere.
_NO_TRITON = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
_RETURNS = (
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_cache_receipt",
)


@dataclass(frozen=True)
class Figures:
    """What a complete answer took."""

    num_input_tokens: int
    num_output_tokens: int
    finish_reason: str
    cached_tokens: int | None = None  # of the prompt; None where it is not told


class Door(Protocol):
    name: str  # for people

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str | Figures, None, None]:
        """The answer's text piece by piece, then its figures. Closing the iterator cancels it. Raises RadixError."""


class EngineDoor:
    """A sidecar: the one that runs with these settings, or a new one."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.client.model.name

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str | Figures, None, None]:
        generation = self._llm.chat(messages, SamplingParams.parse(params))
        yield from generation
        output = generation.output
        assert output.receipt is not None
        tokens = output.receipt
        yield Figures(tokens.num_input_tokens, tokens.num_output_tokens, output.finish_reason, tokens.cached_tokens)


class TritonDoor:
    """A Triton server with our model, over HTTP."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model or _TRITON_MODEL
        self._url = url
        self.name = f"{self._model} at {url}"

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str | Figures, None, None]:
        last: dict[str, Any] = {}  # of each output: the final response of all may be empty
        num_output_tokens = 0
        with closing(self._responses(_inputs(messages, params))) as responses:
            for response in responses:
                last |= response
                num_output_tokens += int(response.get("num_output_tokens", 0))
                yield response.get("text_output", "")
        cached = json.loads(last["cache_receipt"])["cached_tokens"]
        yield Figures(int(last["num_input_tokens"]), num_output_tokens, last["finish_reason"], cached)

    def _responses(self, inputs: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The outputs of each response by name."""
        yield from _events(f"{self._url}/v2/models/{self._model}/generate_stream", inputs)


class TritonGrpcDoor(TritonDoor):
    def __init__(self, address: str, model: str) -> None:
        super().__init__(address, model)
        with extra("server"):
            import radix_backend.cli.triton_stream as triton_stream
        self._triton = triton_stream

    def _responses(self, inputs: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        from tritonclient.utils import InferenceServerException

        try:
            with closing(self._triton.stream(self._url, self._model, inputs)) as responses:
                for response in responses:
                    named = {
                        output.name: response.as_numpy(output.name)[0] for output in response.get_response().outputs
                    }
                    yield {name: value.decode() if isinstance(value, bytes) else value for name, value in named.items()}
        except InferenceServerException as error:
            raise RadixError(error.message()) from None


class OpenAIDoor:
    """Any server with OpenAI's API. A key, if it wants one, is in OPENAI_API_KEY."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._model = model
        if not model:
            with _open(f"{url}/models", None, self._headers) as answer:
                self._model = json.load(answer)["data"][0]["id"]
        self.name = f"{self._model} at {url}"

    def ask(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str | Figures, None, None]:
        body = {"model": self._model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        usage: dict[str, Any] = {}
        reason = ""
        with closing(_events(f"{self._url}/chat/completions", {**body, **params}, self._headers)) as chunks:
            for chunk in chunks:
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
                    reason = choice.get("finish_reason") or reason
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        yield Figures(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), reason, cached)


def find_door(url: str, model: str) -> Door:
    """The server at ``url``: HOST:PORT of Triton's gRPC, http://HOST:PORT of its HTTP, or http://HOST:PORT/v1."""
    url = url.rstrip("/")
    scheme, separator, address = url.partition("://")
    if not separator or scheme == "grpc":
        return TritonGrpcDoor(address or url, model)
    if scheme not in ("http", "https"):
        raise InvalidArgument(f"the URL is {url!r}; accepted: HOST:PORT, grpc://HOST:PORT, http://HOST:PORT[/v1]")
    if url.endswith("/v1"):
        return OpenAIDoor(url, model)
    try:
        _open(f"{url}/v2/health/live").close()
    except _Refusal as refusal:
        if refusal.status in _NO_TRITON:
            return OpenAIDoor(f"{url}/v1", model)
    return TritonDoor(url, model)


def _inputs(messages: Messages, params: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"messages": json.dumps(messages), "sampling_parameters": json.dumps(params)}
    return texts | dict.fromkeys(("stream", *_RETURNS), True)


class _Refusal(RadixError):
    """A server's answer with an error's status, in its own words."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        self.status = error.code
        with error:
            super().__init__(_reason(error.read(4000).decode(errors="replace")) or f"{error.url}: {error}")


def _open(url: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] = {}) -> http.client.HTTPResponse:
    """Raises _Refusal or Unavailable."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        raise _Refusal(error) from None
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from None
    return answer


def _events(url: str, body: Mapping[str, Any], headers: Mapping[str, str] = {}) -> Generator[Any, None, None]:
    """The server-sent events of an answer, decoded. Raises what `_open` does, and an error among them."""
    with _open(url, body, headers) as answer:
        for line in _lines(answer):
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RadixError(_reason(data.decode()))
                yield event


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"the connection broke: {error or type(error).__name__}") from None


def _reason(body: str) -> str:
    """What an error's JSON says, in Triton's shape or OpenAI's; "" if it is neither."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return ""
    return str(error.get("message", error) if isinstance(error, dict) else error)

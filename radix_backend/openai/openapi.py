"""The server's own OpenAPI document, from the structs that requests are read into and answers are made of."""

from __future__ import annotations

from typing import Any

import msgspec

from radix_backend.openai import requests, responses
from radix_backend.openai.requests import MAX_COMPLETIONS
from radix_backend.sampling_params import SamplingParams
from radix_backend.version import __version__

_REF = "#/components/schemas/{name}"
_REQUESTS = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.TokenizeRequest,
    requests.DetokenizeRequest,
)
_NULLABLE = (*_REQUESTS, requests.ChatMessage)  # whose optional members may be null
_RESPONSES = (
    responses.ChatCompletion,
    responses.Completion,
    responses.Tokens,
    responses.Text,
    responses.Models,
    responses.Model,
    responses.Health,
    responses.Error,
)
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_PROMPTS = {"minItems": 1, "maxItems": MAX_COMPLETIONS}


def _schemas() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components((*_REQUESTS, *_RESPONSES, SamplingParams), ref_template=_REF)
    sampling = schemas.pop("SamplingParams")["properties"]
    for name in ("stop", "bad_words"):
        sampling[name] = {"anyOf": [{"type": "string"}, sampling[name]]}
    for cls in (requests.ChatRequest, requests.CompletionRequest):
        schema = schemas[cls.__name__]
        schema["properties"] = sampling | {"max_new_tokens": sampling["max_tokens"]} | schema["properties"]
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]
    del prompt["anyOf"]
    texts, lists = {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": _TOKENS}
    prompt["anyOf"] = [{"type": "string"}, _TOKENS, texts | _PROMPTS, lists | _PROMPTS]
    for struct in _NULLABLE:
        schema = schemas[struct.__name__]
        for name in schema["properties"].keys() - set(schema.get("required", ())):
            schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "null"}]}
    return schemas


def _content(schema: str, kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": {"$ref": _REF.format(name=schema)} if schema else {"type": "string"}}}


def _operation(summary: str, answer: dict[str, Any], errors: dict[str, str], **others: Any) -> dict[str, Any]:
    refusals = {status: {"description": text, "content": _content("Error")} for status, text in errors.items()}
    answers: dict[str, Any] = {"200": {"description": "the answer", "content": answer}}
    return {"summary": summary, "responses": answers | _KEY_ERROR | refusals, **others}


def _post(summary: str, request: str, answer: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": _content(request)}
    return {"post": _operation(summary, answer, _POST_ERRORS, requestBody=body)}


def _get(summary: str, answer: dict[str, Any], errors: dict[str, str], **others: Any) -> dict[str, Any]:
    return {"get": _operation(summary, answer, errors, **others)}


_KEY_ERROR = {"401": {"description": "no valid API key", "content": _content("Error")}}
_NO_MODEL = {"404": "another model was asked for"}
_POST_ERRORS = {
    "400": "the request is wrong, or asks for what this server does not support",
    **_NO_MODEL,
    "413": "the body is too large",
    "500": "a failure of the server",
    "503": "the engine starts, restarts or has failed, its queue is full, or the server stops",
}
_EVENTS = _content("", "text/event-stream")
_NAME = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
_HEALTH = _get("Whether to send requests here", _content("Health"), {}, security=[])
_HEALTH["get"]["responses"]["503"] = {"description": "better not: see `reason`", "content": _content("Health")}

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Radix Backend", "version": __version__},
    "paths": {
        "/v1/chat/completions": _post("Answer a conversation", "ChatRequest", _content("ChatCompletion") | _EVENTS),
        "/v1/completions": _post("Complete prompts", "CompletionRequest", _content("Completion") | _EVENTS),
        "/v1/models": _get("The served model, by each of its names", _content("Models"), {}),
        "/v1/models/{name}": _get("The served model", _content("Model"), _NO_MODEL, parameters=_NAME),
        "/tokenize": _post("The tokens of a prompt or a conversation", "TokenizeRequest", _content("Tokens")),
        "/detokenize": _post("The text of tokens", "DetokenizeRequest", _content("Text")),
        "/health": _HEALTH,
        "/metrics": _get("Figures for Prometheus", _content("", "text/plain"), {}, security=[]),
    },
    "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "security": [{"key": []}],
}

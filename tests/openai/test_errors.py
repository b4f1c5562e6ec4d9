"""What is wrong is refused by name, in OpenAI's shape and with its status."""

from __future__ import annotations

import http.client
import json
import typing
import urllib.request
from typing import Any

import openai.types.chat.completion_create_params as chat_fields
import openai.types.completion_create_params as completion_fields
import pytest

from radix_backend.openai.requests import ChatRequest, CompletionRequest
from radix_backend.sampling_params import PARAMETER_NAMES
from tests.openai.door import Door
from tests.triton.server import eventually

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "hi", "max_tokens": 2}

WRONG: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("completions", {"max_tokens": 3}, 400, "prompt", "field 'prompt' is missing"),
    ("completions", TEXT | {"prompt": ""}, 400, "prompt", "'prompt' is 0 tokens long; accepted: 1 to 32767"),
    ("completions", TEXT | {"prompt": [1] * 40_000}, 400, "prompt", "'prompt' is 40000 tokens long"),
    ("completions", TEXT | {"prompt": [5, 999]}, 400, "prompt", "'prompt' holds 999; accepted: 0 to 319"),
    ("completions", TEXT | {"prompt": []}, 400, "prompt", "field 'prompt' is []; accepted: a text, token ids"),
    ("completions", TEXT | {"prompt": ["a", 1]}, 400, "prompt", "field 'prompt' is ['a', 1]"),
    (
        "completions",
        TEXT | {"prompt": ["a"] * 1024, "n": 2},
        400,
        "prompt",
        "'prompt' holds 1024 prompts and 'n' is 2, which is 2048 completions; accepted: at most 1024 completions",
    ),
    ("completions", TEXT | {"prompt": ["ab"] * 1024, "n": 64, "echo": True}, 400, "prompt", "is 65536 completions"),
    ("completions", TEXT | {"prompt": ["ab"] * 1025}, 400, "prompt", "or a list of 1 to 1024 of either"),
    ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens", "or 0 with 'echo' true"),
    ("completions", TEXT | {"temperature": -1}, 400, "temperature", "is -1; accepted: float >= 0.0"),
    ("completions", TEXT | {"temperature": "0.5"}, 400, "temperature", "is '0.5'; accepted: float"),
    ("completions", TEXT | {"stop": [""]}, 400, "stop", "holds ''"),
    ("completions", TEXT | {"stop_token_ids": [999]}, 400, "stop_token_ids", "holds 999"),
    ("completions", TEXT | {"logprobs": 99}, 400, "logprobs", "is 99; accepted: int <= 20"),
    ("completions", TEXT | {"stream_options": {"include_usage": True}}, 400, "stream_options", "'stream' is true"),
    ("completions", TEXT | {"stream": True, "prompt_logprobs": 1}, 400, "prompt_logprobs", "unless 'stream' is true"),
    ("completions", TEXT | {"echo": True, "prompt_logprobs": 1}, 400, "prompt_logprobs", "unless 'echo' is true"),
    (
        "completions",
        TEXT | {"guided_json": {}},
        400,
        "guided_json",
        "unknown field 'guided_json'; accepted: add_special",
    ),
    ("completions", TEXT | {"text_input": "a"}, 400, "text_input", "unknown field 'text_input'; accepted: add_special"),
    ("completions", TEXT | {"best_of": 2}, 400, "best_of", "not supported; accepted: 1"),
    (
        "completions",
        TEXT | {"model": "gpt"},
        404,
        "model",
        "'model' is 'gpt', which is not served here; accepted: tiny",
    ),
    ("completions", TEXT | {"max_new_tokens": 2}, 400, "max_tokens", "beside 'max_new_tokens'"),
    ("chat/completions", {"messages": []}, 400, "messages", "accepted: array of length >= 1"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "lacks 'content' (at messages[0])"),
    (
        "chat/completions",
        {"messages": [*CHAT["messages"], {"role": "assistant", "content": None}]},
        400,
        "messages",
        "field 'messages' lacks 'content' (at messages[1])",
    ),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "(at messages[0].role)"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages",
        "(at messages[0].content[0]",
    ),
    ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "not supported; accepted: []"),
    (
        "chat/completions",
        CHAT | {"response_format": {"type": "json_object"}},
        400,
        "response_format",
        '{"type":"text"}',
    ),
    ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "with 'logprobs' true"),
    ("chat/completions", CHAT | {"max_completion_tokens": 2}, 400, "max_completion_tokens", "beside 'max_tokens'"),
    (
        "chat/completions",
        {"messages": CHAT["messages"], "truncate_prompt_tokens": -1},
        400,
        "truncate_prompt_tokens",
        "with 'max_completion_tokens'",
    ),
]


@pytest.mark.parametrize(("path", "fields", "status", "param", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_told_what_is_wrong(
    door: Door, path: str, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    for stream in (False, True):
        asked = fields if "stream_options" in fields else {"stream": stream} | fields
        answer = door.post(f"/v1/{path}", **asked)
        assert (answer.status, answer.error["param"]) == (status, param)
        assert message in answer.error["message"]
        assert answer.error["type"] == "invalid_request_error"


def test_wrong_conversations_and_tokens_are_told_by_the_fields_that_clients_know(door: Door) -> None:
    for path, fields, param, message in (
        ("/tokenize", {"messages": [{"content": "x"}]}, "messages", "field 'messages' lacks 'role' (at messages[0])"),
        ("/tokenize", {"messages": [{"role": "user", "content": None}]}, "messages", "lacks 'content'"),
        ("/detokenize", {"tokens": [5, 99999]}, "tokens", "'tokens' holds 99999; accepted: 0 to 319"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "(at tokens[0])"),
    ):
        answer = door.post(path, fields)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert message in answer.error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": "\xff"}', b"[" * 100_000, b"NaN"])
def test_a_body_that_is_no_json_object_is_refused(door: Door, body: bytes) -> None:
    answer = door.post("/v1/completions", body)
    assert answer.status == 400
    assert "the body is" in answer.error["message"]


def test_a_number_beyond_all_floats_is_told_as_such(door: Door) -> None:
    answer = door.post("/v1/completions", b'{"prompt": "a", "temperature": 1e999}')
    assert (answer.status, answer.error["param"]) == (400, None)
    assert answer.error["message"] == "the body is JSON with a number that is too large; accepted: 64-bit floats"


@pytest.mark.parametrize(
    ("fields", "cls"),
    [(chat_fields, ChatRequest), (completion_fields, CompletionRequest)],
)
def test_every_field_of_openai_s_is_supported_or_refused_by_name(fields: Any, cls: Any) -> None:
    """As the official SDK of today knows them."""
    base = fields.CompletionCreateParamsBase
    theirs = set(typing.get_type_hints(base)) | {"stream"}
    ours = {*cls.__struct_fields__, *PARAMETER_NAMES}
    assert theirs - ours == set(cls.UNSUPPORTED)


def test_fields_that_ask_for_nothing_are_accepted(door: Door) -> None:
    nothing = {name: values[0] for name, values in ChatRequest.UNSUPPORTED.items() if values}
    nulls = dict.fromkeys(
        {*ChatRequest.UNSUPPORTED, *PARAMETER_NAMES} - nothing.keys() - CHAT.keys() - {"max_new_tokens"}
    )
    assert door.post("/v1/chat/completions", CHAT | nothing | nulls).status == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_answered_like_get_without_the_body(door: Door, path: str) -> None:
    head = door.open(urllib.request.Request(door.url(path), method="HEAD"))
    got = door.get(path)
    assert (head.status, head.content, head.headers["content-type"]) == (200, b"", got.headers["content-type"])
    assert int(head.headers["content-length"]) > 0


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(door: Door) -> None:
    for path, status in (("/v1/embeddings", 404), ("/v1/completions", 405), ("/v1/models/other", 404)):
        answer = door.get(path)
        assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert door.get("/v1/models/other").error["code"] == "model_not_found"


@pytest.mark.parametrize("told", [True, False])
def test_a_body_beyond_the_limit_is_refused_once_it_is_written(door: Door, told: bool) -> None:
    body = json.dumps({"prompt": "x" * 2**24}).encode()  # more than the sockets' buffers hold
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
    try:
        if told:
            connection.request("POST", "/v1/completions", body)
        else:  # in chunks, whose sum nobody tells beforehand
            half = len(body) // 2
            connection.request("POST", "/v1/completions", iter([body[:half], body[half:]]), encode_chunked=True)
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"]) == (413, "body_too_large")
        assert "accepted: at most 1048576 bytes" in error["message"]
        connection.request("GET", "/health")  # the same connection goes on
        assert connection.getresponse().status == 200
    finally:
        connection.close()


def test_a_request_keeps_its_id_and_gets_one_otherwise(door: Door) -> None:
    answer = door.post("/v1/completions", TEXT, {"x-request-id": "mine-7"})
    assert (answer.headers["x-request-id"], answer.json["id"]) == ("mine-7", "cmpl-mine-7")
    for strange in ("with space", "x" * 200, "é"):
        got = door.post("/v1/completions", TEXT, {"x-request-id": strange.encode().decode("latin-1")})
        assert got.headers["x-request-id"].isalnum()
    door.post("/v1/completions", TEXT | {"user": "ann"}, {"x-request-id": "hers"})
    eventually(lambda: "id hers, for 'ann'" in door.log.read_text())  # it comes after the answer

"""/v1/chat/completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from radix_backend.client import EngineClient
from radix_backend.sampling_params import SamplingParams
from tests.openai.door import Door, serving
from tests.openai.test_completions import PLAIN

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def expected(engine: EngineClient, messages: list[dict[str, str]] = MESSAGES) -> str:
    deltas = engine.generate(engine.render_chat(messages), SamplingParams.parse(PLAIN), add_special_tokens=False)
    return "".join(delta.text for delta in deltas)


def test_an_answer_has_openai_s_shape(door: Door, engine: EngineClient) -> None:
    answer = door.post("/v1/chat/completions", model="tiny", messages=MESSAGES, **PLAIN).json
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": expected(engine), "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 8


def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_the_usage(door: Door, engine: EngineClient) -> None:
    fields = PLAIN | {"messages": MESSAGES, "stream": True, "n": 2}
    *chunks, last = door.post("/v1/chat/completions", stream_options={"include_usage": True}, **fields).events
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], last["usage"]["prompt_tokens"] + 16)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == expected(engine)
        assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "length"]
    assert "usage" not in door.post("/v1/chat/completions", **fields).events[-1]


def test_log_probabilities_join_to_the_text(door: Door) -> None:
    fields = PLAIN | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    (choice,) = door.post("/v1/chat/completions", **fields).json["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == choice["message"]["content"]
    assert {len(token["top_logprobs"]) for token in tokens} == {2}
    assert all(token["logprob"] <= token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)
    plain = door.post("/v1/chat/completions", **fields | {"top_logprobs": None}).json["choices"][0]["logprobs"]
    assert [token["top_logprobs"] for token in plain["content"]] == [[]] * 8


def test_bytes_of_tokens_that_are_part_of_a_character_are_their_own(door: Door) -> None:
    """Of the tiny model every token is a byte; what it generates is no text at all."""
    fields = {"messages": MESSAGES, "seed": 1, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}
    fields |= {"skip_special_tokens": False, "ignore_eos": True}
    for stream in (False, True):
        answer = door.post("/v1/chat/completions", stream=stream, **fields)
        if stream:
            choices = [chunk["choices"][0] for chunk in answer.events]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
        else:
            (choice,) = answer.json["choices"]
            text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
        assert len(tokens) == 100
        data = b"".join(bytes(token["bytes"]) for token in tokens)
        assert data.decode(errors="replace") == text
        assert "\ufffd" in text
        parts = [top for token in tokens for top in token["top_logprobs"] if top["token"] == "\ufffd"]
        assert parts
        assert all(len(top["bytes"]) == 1 and top["bytes"][0] >= 0x80 for top in parts)


def test_parts_developers_names_and_what_the_sdk_sends_back_are_understood(door: Door, engine: EngineClient) -> None:
    said = {"role": "assistant", "content": "Because.", "refusal": None, "tool_calls": None, "audio": None}
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    conversation = [{"role": "developer", "content": parts}, said, {"role": "user", "content": "Why?", "name": "Ann"}]
    rendered = [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Why?", "name": "Ann"},
    ]
    (choice,) = door.post("/v1/chat/completions", messages=conversation, **PLAIN).json["choices"]
    assert choice["message"]["content"] == expected(engine, rendered)


def test_without_a_limit_the_context_is_one(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    with serving(tmp_path, tiny_settings | {"context_len": 100}) as door:
        answer = door.post("/v1/chat/completions", messages=MESSAGES, temperature=0, ignore_eos=True).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 100


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_each_name_of_the_limit_holds(door: Door, limit: str) -> None:
    fields = {"messages": MESSAGES, "ignore_eos": True, limit: 3}
    assert door.post("/v1/chat/completions", **fields).json["usage"]["completion_tokens"] == 3

"""/v1/completions, against what the engine's own client gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from radix_backend.client import EngineClient
from radix_backend.sampling_params import SamplingParams
from tests.openai.door import GREEDY, Door

# Every token a letter or two: none is held back as part of a character.
LETTERS = {"logit_bias": {str(token): 50 for token in range(64, 90)}}
PLAIN = GREEDY | LETTERS | {"max_tokens": 8, "ignore_eos": True}


def expected(engine: EngineClient, prompt: str | list[int], **params: Any) -> str:
    deltas = engine.generate(prompt, SamplingParams.parse(params))
    return "".join(delta.text for delta in deltas)


def test_an_answer_has_openai_s_shape(door: Door, engine: EngineClient) -> None:
    answer = door.post("/v1/completions", model="tiny", prompt="a question", **PLAIN)
    assert answer.status == 200
    assert answer.json["id"] == f"cmpl-{answer.headers['x-request-id']}"
    assert (answer.json["object"], answer.json["model"]) == ("text_completion", "tiny")
    assert answer.json["choices"] == [
        {"index": 0, "text": expected(engine, "a question", **PLAIN), "logprobs": None, "finish_reason": "length"}
    ]
    assert answer.json["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 8,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_come_as_texts_or_tokens_alone_or_in_lists(door: Door, engine: EngineClient) -> None:
    one, other = engine.tokenize("one"), engine.tokenize("another")
    texts = [expected(engine, prompt, **PLAIN) for prompt in ("one", "another")]
    assert texts[0] != texts[1]
    for prompt, wanted in (
        ("one", texts[:1]),
        (["one", "another"], texts),
        (one, texts[:1]),
        ([one, other], texts),
        ([other], texts[1:]),
    ):
        answer = door.post("/v1/completions", prompt=prompt, **PLAIN)
        assert [choice["text"] for choice in answer.json["choices"]] == wanted


def test_a_stream_joins_to_the_whole_answer(door: Door) -> None:
    sampled = {"prompt": ["one", "two"], "n": 2, "seed": 3, "max_tokens": 12, "ignore_eos": True, **LETTERS}
    whole = door.post("/v1/completions", **sampled).json
    answer = door.post("/v1/completions", stream=True, stream_options={"include_usage": True}, **sampled)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = answer.events
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4 * 12)
    assert {json.dumps([chunk["id"], chunk["usage"]]) for chunk in chunks} == {json.dumps([last["id"], None])}
    texts, ends = ["", "", "", ""], [[], [], [], []]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]].append(choice["finish_reason"])
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert [end[-1] for end in ends] == ["length"] * 4
    assert {reason for end in ends for reason in end[:-1]} <= {None}


def test_cached_tokens_are_told_and_a_prompt_counts_once(door: Door) -> None:
    prompt = list(range(10, 74))
    door.post("/v1/completions", prompt=prompt, **PLAIN)
    usage = door.post("/v1/completions", prompt=[*prompt, 75], n=3, **PLAIN).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (65, 24)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 64


def test_log_probabilities_are_the_engine_s(door: Door, engine: EngineClient) -> None:
    (choice,) = door.post("/v1/completions", prompt="why", logprobs=2, **PLAIN).json["choices"]
    deltas = engine.generate("why", SamplingParams.parse(PLAIN | {"logprobs": 2}))
    rows = [row for delta in deltas for row in delta.logprobs]
    shown = choice["logprobs"]
    assert "".join(shown["tokens"]) == choice["text"]
    assert shown["token_logprobs"] == pytest.approx([row[0].logprob for row in rows])
    offsets = [sum(map(len, shown["tokens"][:n])) for n in range(len(rows))]
    assert shown["text_offset"] == offsets
    for row, top in zip(rows, shown["top_logprobs"], strict=True):
        assert top[row[0].decoded_token] == pytest.approx(row[0].logprob)
        assert 1 <= len(top) <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities_scores_the_prompt(door: Door, engine: EngineClient, stream: bool) -> None:
    prompt = "to be"
    fields = PLAIN | {"prompt": prompt, "echo": True, "logprobs": 1, "n": 2, "seed": 1}
    answer = door.post("/v1/completions", stream=stream, **fields)
    choices = [choice for event in answer.events for choice in event["choices"]] if stream else answer.json["choices"]
    text = "".join(choice["text"] for choice in choices if choice["index"] == 1)
    logprobs = {
        name: [value for choice in choices if choice["index"] == 1 for value in choice["logprobs"][name]]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    }
    assert text == prompt + expected(engine, prompt, **PLAIN)
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["tokens"][: len(prompt)] == list(prompt)  # a byte a token
    assert logprobs["text_offset"] == list(range(len(prompt) + 8))
    params = SamplingParams.parse(PLAIN | {"prompt_logprobs": 1})
    scored = [row for delta in engine.generate(prompt, params) for row in delta.prompt_logprobs]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:5] == pytest.approx([row[0].logprob for row in scored], abs=1e-4)


def test_max_tokens_0_with_echo_scores_and_generates_nothing(door: Door, engine: EngineClient) -> None:
    tokens = engine.tokenize("to be")
    for prompt in ("to be", tokens):
        answer = door.post("/v1/completions", prompt=prompt, echo=True, logprobs=0, max_tokens=0).json
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("to be", "length")
        assert len(choice["logprobs"]["tokens"]) == len(tokens)
        assert (answer["usage"]["completion_tokens"], answer["usage"]["total_tokens"]) == (0, len(tokens))


def test_echo_alone_repeats_the_prompt(door: Door, engine: EngineClient) -> None:
    for prompt in ("to be", engine.tokenize("to be")):
        (choice,) = door.post("/v1/completions", prompt=prompt, echo=True, **PLAIN).json["choices"]
        assert choice["text"] == "to be" + expected(engine, "to be", **PLAIN)


def test_vllm_s_fields_reach_the_engine(door: Door, engine: EngineClient) -> None:
    for field, value in {
        "top_k": 1,
        "min_p": 1.0,
        "repetition_penalty": 5.0,
        "stop_token_ids": [70, 71, 72, 73, 74, 75, 76],
        "min_tokens": 6,
        "truncate_prompt_tokens": 2,
        "bad_words": ["e"],
        "max_new_tokens": 3,
    }.items():
        usual = {name: value for name, value in PLAIN.items() if name != "max_tokens"} | {"temperature": 0.5, "seed": 5}
        fields = usual | ({} if field == "max_new_tokens" else {"max_tokens": 8}) | {field: value}
        (choice,) = door.post("/v1/completions", prompt="to be", **fields).json["choices"]
        assert choice["text"] == expected(engine, "to be", **fields), field


def test_token_ids_and_prompt_logprobs_come_where_they_are_asked_for(door: Door, engine: EngineClient) -> None:
    fields = PLAIN | {"prompt": "to be", "return_token_ids": True}
    (choice,) = door.post("/v1/completions", prompt_logprobs=0, **fields).json["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [list(token) for token in others] == [[str(token)] for token in engine.tokenize("to be")[1:]]
    assert engine.detokenize(choice["token_ids"]) == choice["text"]
    chunks = door.post("/v1/completions", stream=True, **fields).events
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]


def test_tokenize_and_detokenize(door: Door, engine: EngineClient) -> None:
    answer = door.post("/tokenize", prompt="to be").json
    assert answer == {"count": 5, "max_model_len": 32_768, "tokens": engine.tokenize("to be")}
    assert door.post("/detokenize", tokens=answer["tokens"]).json == {"prompt": "to be"}
    messages = [{"role": "user", "content": "hi"}]
    tokens = door.post("/tokenize", messages=messages).json["tokens"]
    assert tokens == engine.tokenize(engine.render_chat(messages), add_special_tokens=False)

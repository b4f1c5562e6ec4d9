"""One engine, several doors, one behaviour."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from radix_backend import LLM, EngineConfig, SamplingParams
from tests.openai.door import Door, serving
from tests.triton.conftest import EXACT
from tests.triton.requests import stream, text_of
from tests.triton.server import TritonServer

pytestmark = [pytest.mark.server, pytest.mark.model]

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 24},
    "seeded": {"temperature": 0.9, "seed": 11, "max_tokens": 24, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "penalised": {"temperature": 0.7, "seed": 5, "max_tokens": 24, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
    "stopped": {"temperature": 0, "max_tokens": 64, "stop": ["."], "include_stop_str_in_output": True},
}


@pytest.fixture(scope="module")
def door(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """With the settings of the Triton server, whose engine it joins."""
    with serving(tmp_path_factory.mktemp("openai"), EXACT) as door:
        yield door


@pytest.fixture(scope="module")
def llm(server: TritonServer) -> Iterator[LLM]:
    with LLM(EngineConfig.parse(EXACT)) as llm:
        yield llm


@pytest.mark.parametrize("way", WAYS)
def test_the_same_prompt_gives_the_same_text_through_every_door(
    server: TritonServer, door: Door, llm: LLM, way: str
) -> None:
    params = WAYS[way]
    by_json = {"sampling_parameters": json.dumps(params), "exclude_input_in_output": True}
    grpc = stream(server.grpc, text_input=PROMPT, sampling_parameters=params)
    texts = {
        "gRPC": text_of(list(grpc)),
        "/generate": server.generate(text_input=PROMPT, **by_json)["text_output"],
        "OpenAI": door.post("/v1/completions", prompt=PROMPT, **params).json["choices"][0]["text"],
        "offline": llm.generate([PROMPT], SamplingParams.parse(params))[0].text,
        "OpenAI's SDK, streamed": "".join(
            chunk.choices[0].text
            for chunk in door.sdk().completions.create(
                model="embedded", prompt=PROMPT, stream=True, **_for_the_sdk(params)
            )
        ),
    }
    assert len(set(texts.values())) == 1, texts
    assert texts["gRPC"]


def test_a_conversation_gives_the_same_answer_through_every_door(server: TritonServer, door: Door, llm: LLM) -> None:
    params = WAYS["seeded"]
    by_triton = server.generate(messages=json.dumps(MESSAGES), sampling_parameters=json.dumps(params))["text_output"]
    answer = door.post("/v1/chat/completions", messages=MESSAGES, **params).json
    assert answer["choices"][0]["message"]["content"] == by_triton
    assert llm.chat([MESSAGES], SamplingParams.parse(params))[0].text == by_triton


def test_what_one_door_computed_another_finds_in_the_cache(server: TritonServer, door: Door) -> None:
    text = "A text that both doors are asked about, long enough for several pages of the cache to be full of it. " * 4
    server.generate(text_input=text, max_tokens=1)
    usage = door.post("/v1/completions", prompt=text, max_tokens=1).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 17


def _for_the_sdk(params: dict[str, Any]) -> dict[str, Any]:
    """The SDK takes fields that OpenAI does not know in a dictionary of their own."""
    extra = {"top_k", "min_p", "repetition_penalty", "include_stop_str_in_output"}
    known = {name: value for name, value in params.items() if name not in extra}
    return known | {"extra_body": {name: value for name, value in params.items() if name in extra}}

"""Input that no good client sends: each has a defined answer, and none leaves a trace in server or engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from radix_backend.client import EngineClient
from tests.triton.requests import GREEDY, Response, Stream, joined, stream, text_of
from tests.triton.server import TritonServer, eventually, serving
from tests.triton.tiny_server import settings, tiny_model  # noqa: F401

pytestmark = pytest.mark.server

CONTEXT = 256
USUAL = {"text_input": "a usual question", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TritonServer]:  # noqa: F811
    with serving(tmp_path_factory.mktemp("strange"), settings(tiny_model, context_len=CONTEXT)) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: TritonServer) -> Iterator[EngineClient]:
    with server.engine() as client:
        yield client


@pytest.fixture(scope="module")
def usual_answer(server: TritonServer) -> str:
    return str(server.generate(**USUAL)["text_output"])


def without_a_trace(engine: EngineClient) -> bool:
    """Nothing runs, every page is free or in the tree, and the audit finds nothing wrong."""
    figures = engine.stats(audit=True)
    assert figures["audit_findings"] == figures["pages_quarantined"] == 0
    busy = ("requests_running", "requests_waiting", "pages_leased", "pages_retiring")
    return not any(figures[name] for name in busy) and figures["pages_free"] + figures["pages_tree"] == figures["pages"]


@pytest.fixture(autouse=True)
def goes_on(server: TritonServer, engine: EngineClient, usual_answer: str) -> Iterator[None]:
    yield
    assert server.generate(**USUAL)["text_output"] == usual_answer
    eventually(lambda: without_a_trace(engine))


def refusal(server: TritonServer, **request: Any) -> str:
    """The message of the error that a request gets as its only answer. It is short, whatever it repeats."""
    with pytest.raises(InferenceServerException) as raised:  # with `triton_grpc_error` Triton 2.51 crashes now and then
        list(stream(server.grpc, **request))
    said = str(raised.value.message())
    assert len(said) < 1000
    return said


def answer(server: TritonServer, **request: Any) -> list[Response]:
    wanted = {"return_token_ids": True, "return_num_input_tokens": True, "return_finish_reason": True}
    return list(stream(server.grpc, **request, **wanted))


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=object)


# ── prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


LIMIT = f"accepted: 1 to {CONTEXT - 1} (the context of {CONTEXT}, less one to generate)"
WRONG_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"text_input": ""}, f"'text_input' is 0 tokens long; {LIMIT}"),
    "no-ids": ({"input_ids": []}, "'input_ids' is []; accepted: a list of 1 or more integers"),
    "as-long-as-the-context": ({"text_input": "a" * CONTEXT}, f"'text_input' is {CONTEXT} tokens long; {LIMIT}"),
    "ids-as-long-as-the-context": ({"input_ids": [1] * CONTEXT}, f"'input_ids' is {CONTEXT} tokens long; {LIMIT}"),
    "longer": ({"text_input": "a" * (CONTEXT + 1)}, f"'text_input' is {CONTEXT + 1} tokens long; {LIMIT}"),
    "a-megabyte": ({"text_input": "a" * 10**6}, f"'text_input' is 1000000 tokens long; {LIMIT}"),
    "a-million-ids": ({"input_ids": [1] * 10**6}, f"'input_ids' is 1000000 tokens long; {LIMIT}"),
    "not-utf-8": ({"text_input": strings(b"caf\xe9")}, "input 'text_input' is b'caf\\xe9'; accepted: UTF-8"),
    "half-a-surrogate": ({"text_input": strings(b"\xed\xa0\x80")}, "accepted: UTF-8"),
    "a-megabyte-not-utf-8": ({"text_input": strings(b"a" * 10**6 + b"\xff")}, "…; accepted: UTF-8"),
    "nothing": ({}, "'messages'; given: none"),
    "both": ({"text_input": "a", "input_ids": [1]}, "given: text_input, input_ids"),
}


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS.values(), ids=WRONG_PROMPTS)
def test_a_prompt_that_is_none_is_refused(server: TritonServer, prompt: dict[str, Any], message: str) -> None:
    assert message in refusal(server, **prompt)


@pytest.mark.parametrize(("length", "generated"), [(1, 4), (CONTEXT - 4, 4), (CONTEXT - 1, 1)])
def test_a_prompt_may_fill_the_context_but_for_one_token(server: TritonServer, length: int, generated: int) -> None:
    sampling = GREEDY | {"max_tokens": 4, "ignore_eos": True}
    for prompt in ({"text_input": "a" * length}, {"input_ids": [65] * length}):
        responses = answer(server, sampling_parameters=sampling, **prompt)
        assert len(joined(responses, "token_ids")) == generated
        assert responses[-1].outputs["finish_reason"] == ["length"]
        assert responses[-1].outputs["num_input_tokens"] == [length]


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────


OF_ANOTHER_KIND = {"STRING": np.array([1], dtype=np.int32), "BOOL": strings(b"true"), "INT32": np.array([1.0])}
INPUTS = {
    "text_input": "STRING",
    "input_ids": "INT32",
    "stream": "BOOL",
    "sampling_parameters": "STRING",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "image": "STRING",
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_a_wrong_type_is_refused(server: TritonServer, name: str) -> None:
    assert f"'{name}'" in refusal(server, **({"text_input": "a"} | {name: OF_ANOTHER_KIND[INPUTS[name]]}))


WRONG_SHAPES = {
    "two-texts": {"text_input": strings(b"a", b"b")},
    "no-text": {"text_input": strings()},
    "a-matrix-of-one-text": {"text_input": strings(b"a").reshape(1, 1)},
    "two-flags": {"text_input": "a", "stream": np.array([True, False])},
    "no-flag": {"text_input": "a", "return_token_ids": np.array([], dtype=bool)},
    "two-parameters": {"text_input": "a", "sampling_parameters": strings(b"{}", b"{}")},
    "a-matrix-of-ids": {"input_ids": np.ones((2, 3), dtype=np.int32)},
}


@pytest.mark.parametrize("inputs", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_an_input_of_a_wrong_shape_is_refused(server: TritonServer, inputs: dict[str, Any]) -> None:
    assert f"'{list(inputs)[-1]}'" in refusal(server, **inputs)


def test_an_input_that_there_is_not_is_refused(server: TritonServer) -> None:
    assert "'top_p'" in refusal(server, text_input="a", top_p=np.array([0.5]))


# ── parameters ─────────────────────────────────────────────────────────────────────────────────────────────────


MANY = [f"stop{number}" for number in range(10_000)]
WRONG_PARAMETERS: dict[str, tuple[str, str]] = {
    "half-an-object": ('{"max_tokens": 1', "input 'sampling_parameters' is '{\"max_tokens\": 1'; accepted: a JSON"),
    "no-json": ("max_tokens=1", "input 'sampling_parameters' is 'max_tokens=1'; accepted: a JSON object"),
    "empty": ("", "input 'sampling_parameters' is ''; accepted: a JSON object"),
    "a-list": ("[1]", "input 'sampling_parameters' is '[1]'; accepted: a JSON object"),
    "nested-too-deeply": ("[" * 10**5, "accepted: a JSON object"),
    "half-a-surrogate": ('{"stop": ["\\ud800"]}', "accepted: a JSON object"),
    "nan": ('{"temperature": NaN}', "accepted: a JSON object"),
    "infinity": ('{"temperature": Infinity}', "accepted: a JSON object"),
    "nan-as-text": ('{"temperature": "nan"}', "sampling parameter 'temperature' is "),
    "infinity-as-text": ('{"temperature": "inf"}', "sampling parameter 'temperature' is "),
    "beyond-a-float": ('{"temperature": 1e999}', "accepted: "),
    "beyond-a-float-as-text": ('{"temperature": "1e999"}', "sampling parameter 'temperature' is "),
    "no-tokens": ('{"max_tokens": 0}', "sampling parameter 'max_tokens' is 0; accepted: int >= 1"),
    "fewer-than-none": ('{"max_tokens": -5}', "sampling parameter 'max_tokens' is -5; accepted: int >= 1"),
    "half-a-token": ('{"max_tokens": 1.5}', "sampling parameter 'max_tokens' is 1.5; accepted: int"),
    "beyond-64-bits": (f'{{"max_tokens": {10**30}}}', "sampling parameter 'max_tokens' is 1"),
    "a-seed-beyond-64-bits": (f'{{"seed": {-(2**63) - 1}}}', "sampling parameter 'seed' is -9223372036854775809; "),
    "ten-thousand-stops": (json.dumps({"stop": MANY}), "'stop' is ['stop0', 'stop1', "),
    "an-empty-stop": ('{"stop": [""]}', "sampling parameter 'stop' holds ''; accepted: strings of 1 to 1024"),
    "a-megabyte-of-stop": (json.dumps({"stop": "x" * 10**6}), "…; accepted: strings of 1 to 1024 characters"),
    "a-number-as-stop": ('{"stop": [1]}', "sampling parameter 'stop' is [1]; accepted: "),
    "ten-thousand-stop-ids": (json.dumps({"stop_token_ids": [1] * 10**4}), "'stop_token_ids' is [1, 1, "),
    "a-name-of-a-megabyte": (json.dumps({"x" * 10**6: 1}), "unknown sampling parameter 'xxx"),
    "a-priority-beyond-bits": (f'{{"priority": {2**31}}}', "request parameter 'priority' is 2147483648; accepted: "),
}


@pytest.mark.parametrize(("parameters", "message"), WRONG_PARAMETERS.values(), ids=WRONG_PARAMETERS)
def test_sampling_parameters_that_are_none_are_refused(server: TritonServer, parameters: str, message: str) -> None:
    assert message in refusal(server, text_input="a", sampling_parameters=parameters)


WRONG_REQUEST_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"temperature": math.nan}, "request parameters is '{\"temperature\":NaN}'; accepted: a JSON"),
    "infinity": ({"temperature": math.inf}, "request parameters is '{\"temperature\":Infinity}'; accepted: a JSON"),
    "nan-as-text": ({"temperature": "nan"}, "'temperature'"),
    "no-tokens": ({"max_tokens": 0}, "'max_tokens' is 0"),
    "fewer-than-none": ({"max_tokens": -(2**63)}, f"'max_tokens' is {-(2**63)}"),
    "a-megabyte-of-stop": ({"stop": "x" * 10**6}, "…; accepted: strings of 1 to 1024 characters"),
    "a-megabyte-of-number": ({"max_tokens": "9" * 10**6}, "'max_tokens' is '999"),
    "a-name-of-a-megabyte": ({"x" * 10**6: 1}, "unknown sampling parameter 'xxx"),
    "a-name-in-quotes": ({'"} {': 1}, "unknown sampling parameter '\"} {'"),
}


@pytest.mark.parametrize(("parameters", "message"), WRONG_REQUEST_PARAMETERS.values(), ids=WRONG_REQUEST_PARAMETERS)
def test_request_parameters_that_are_none_are_refused(
    server: TritonServer, parameters: dict[str, Any], message: str
) -> None:
    assert message in refusal(server, text_input="a", parameters=parameters)


def test_more_tokens_than_there_is_room_for_end_with_the_context(server: TritonServer) -> None:
    sampling = {"max_tokens": 2**63 - 1, "temperature": 1e300, "top_k": 2**63 - 1, "seed": 2**63 - 1}
    parameters = {name: value for name, value in sampling.items() if name != "temperature"}
    for request in ({"sampling_parameters": sampling | {"ignore_eos": True}}, {"parameters": parameters}):
        responses = answer(server, text_input="a" * (CONTEXT - 20), **request)
        assert len(joined(responses, "token_ids")) <= 20
        assert responses[-1].final


def test_wrong_bodies_over_http_are_refused(server: TritonServer) -> None:
    for body in (
        {},
        {"text_input": 1},
        {"text_input": ["a", "b"]},
        {"text_input": "a", "max_tokens": 0},
        {"text_input": "a", "temperature": math.nan},  # `NaN` in the body
        {"text_input": "a", "stop": ["x"]},  # Triton takes no lists as parameters
        {"text_input": "\ud800"},
    ):
        status, said = server.post("/v2/models/radix/generate", body)
        assert status in (400, 500), body  # 500: Triton's own, for a text that is a number
        assert set(said) == {"error"}, body


# ── streams ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_with_the_same_id_are_all_answered(server: TritonServer) -> None:
    sampling = GREEDY | {"max_tokens": 100, "ignore_eos": True}
    (alone, other) = (
        joined(answer(server, text_input=text, sampling_parameters=sampling), "token_ids") for text in ("a", "b")
    )
    with Stream(server.grpc) as first, Stream(server.grpc) as second:
        for one, text in ((first, "a"), (second, "b")):
            one.submit(request_id="same", text_input=text, sampling_parameters=sampling, return_token_ids=True)
        for one, expected in ((first, alone), (second, other)):
            responses = [one.receive()]
            while not responses[-1].final:
                responses.append(one.receive())
            assert joined(responses, "token_ids") == expected
            assert {response.request_id for response in responses} == {"same"}
    with Stream(server.grpc) as shared:  # whose client can't tell them apart any more
        for text in ("a", "b"):
            shared.submit(request_id="same", text_input=text, sampling_parameters=sampling, return_token_ids=True)
        responses = []
        while sum(response.final for response in responses) < 2:
            responses.append(shared.receive())
    assert sorted(joined(responses, "token_ids")) == sorted(alone + other)


def test_a_thousand_requests_on_one_stream_are_all_answered(server: TritonServer) -> None:
    sampling = GREEDY | {"max_tokens": 6, "ignore_eos": True}
    prompts = [f"prompt {number}" for number in range(8)]
    alone = {text: text_of(answer(server, text_input=text, sampling_parameters=sampling)) for text in prompts}
    received: dict[str, list[Response]] = {str(number): [] for number in range(1000)}
    with Stream(server.grpc) as shared:
        for number in received:
            text = prompts[int(number) % len(prompts)]
            shared.submit(request_id=number, text_input=text, sampling_parameters=sampling)
        for _ in received:
            while not (response := shared.receive()).final:
                received[response.request_id].append(response)
            received[response.request_id].append(response)
    for number, responses in received.items():
        assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]
        assert text_of(responses) == alone[prompts[int(number) % len(prompts)]]

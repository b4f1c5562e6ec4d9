"""Wrong requests and wrong settings, through a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from radix_backend.client import EngineClient
from tests.triton.requests import GREEDY, Stream, stream, text_of
from tests.triton.server import TritonServer

pytestmark = [pytest.mark.server, pytest.mark.model]

WRONG_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "INVALID_ARGUMENT", "one of 'text_input', 'input_ids', 'messages'; given: none"),
    ({"text_input": "a", "input_ids": [1]}, "INVALID_ARGUMENT", "given: text_input, input_ids, accepted: exactly one"),
    (
        {"text_input": np.array([b"\xff"], dtype=object)},
        "INVALID_ARGUMENT",
        "'text_input' is b'\\xff'; accepted: UTF-8",
    ),
    ({"input_ids": [-3]}, "INVALID_ARGUMENT", "'input_ids' holds -3"),
    ({"input_ids": [10**6]}, "INVALID_ARGUMENT", "1000000"),
    ({"input_ids": np.array([], dtype=np.int32)}, "INVALID_ARGUMENT", "'input_ids'"),
    (
        {"text_input": "a", "stream": True, "exclude_input_in_output": False},
        "INVALID_ARGUMENT",
        "exclude_input_in_output",
    ),
    ({"text_input": "a", "sampling_parameters": "{"}, "INVALID_ARGUMENT", "'sampling_parameters' is '{'"),
    (
        {"text_input": "a", "sampling_parameters": {"top_p": 2}},
        "INVALID_ARGUMENT",
        "'top_p' is 2; accepted: float <= 1",
    ),
    ({"text_input": "a", "sampling_parameters": {"topp": 1}}, "INVALID_ARGUMENT", "unknown sampling parameter 'topp'"),
    ({"text_input": "a", "parameters": {"max_tokens": "many"}}, "INVALID_ARGUMENT", "'max_tokens' is 'many'"),
    ({"text_input": "word " * 9000}, "INVALID_ARGUMENT", "8192"),
    ({"text_input": "a", "sampling_parameters": {"logprobs": 21}}, "INVALID_ARGUMENT", "'logprobs' is 21; accepted:"),
    ({"text_input": "a", "sampling_parameters": {"n": 0}}, "INVALID_ARGUMENT", "'n' is 0; accepted: int >= 1"),
    (
        {"text_input": "a", "sampling_parameters": {"logit_bias": {"49152": 1}}},
        "INVALID_ARGUMENT",
        "'logit_bias' holds 49152; accepted: token ids from 0 to 49151",
    ),
    ({"text_input": "a", "image": "b"}, "UNIMPLEMENTED", "image"),
]


@pytest.mark.parametrize(("request_", "code", "message"), WRONG_REQUESTS, ids=[case[2][:30] for case in WRONG_REQUESTS])
def test_wrong_request_gets_a_typed_error(
    server: TritonServer, request_: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        list(stream(server.grpc, headers={"triton_grpc_error": "true"}, **request_))
    assert raised.value.status() == f"StatusCode.{code}"
    assert message in raised.value.message()


def test_wrong_request_leaves_its_stream_usable(server: TritonServer) -> None:
    with Stream(server.grpc) as shared:
        shared.submit(text_input="a", sampling_parameters={"top_k": -2})
        with pytest.raises(InferenceServerException, match="'top_k' is -2"):
            shared.receive()
        shared.submit(text_input="a", sampling_parameters=GREEDY | {"max_tokens": 1})
        assert shared.receive().final


def test_wrong_requests_over_http(server: TritonServer, engine: EngineClient) -> None:
    status, answer = server.post("/v2/models/radix/generate", {"text_input": "a", "temperature": -1})
    assert (status, answer["error"]) == (400, "sampling parameter 'temperature' is -1; accepted: float >= 0.0")
    status, answer = server.post("/v2/models/radix/generate", {"text_input": "a", "image": "b"})
    assert (status, answer["error"].split(",")[0]) == (400, "input 'image' is given")
    assert server.generate(text_input="a", max_tokens=1)["text_output"]
    assert engine.stats()["requests_running"] == 0


def test_text_of_any_bytes_in_utf8_is_accepted(server: TritonServer) -> None:
    prompt = "🜂 ünï\u0000 ‮code"
    responses = list(stream(server.grpc, text_input=prompt, sampling_parameters=GREEDY | {"max_tokens": 8}))
    assert "�" not in text_of(responses[:-1])


@pytest.fixture(scope="module")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Runs, and has loaded no model."""
    server = TritonServer(tmp_path_factory.mktemp("empty"), {"model": "embedded"}, "--model-control-mode=explicit")
    try:
        server.wait_live()
        yield server
    finally:
        server.stop()


def load(server: TritonServer, **parameters: str) -> str:
    """The reason that the index shows after a load with these parameters in ``config.pbtxt``; the error has it too."""
    config = {"backend": "python", "parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    status, answer = server.post("/v2/repository/models/radix/load", {"parameters": {"config": json.dumps(config)}})
    assert status == 400
    _, index = server.post("/v2/repository/index", {})
    assert index[0]["state"] == "UNAVAILABLE"
    reason = str(index[0]["reason"])
    assert reason in answer["error"]
    return reason


def test_wrong_settings_fail_the_load(empty_server: TritonServer) -> None:
    assert "unknown setting 'max_batch'; accepted: all_reduce, attention_backend, " in load(empty_server, max_batch="3")
    assert "setting 'max_bs' is 'many'; accepted: int" in load(empty_server, max_bs="many")
    assert "setting 'device_ids' is '1,1'; accepted: 2 different ids" in load(
        empty_server, tp_size="2", device_ids="1,1"
    )


def test_wrong_settings_in_the_file_fail_the_load(empty_server: TritonServer) -> None:
    file: Path = empty_server.repository / "radix" / "1" / "model.json"
    before = file.read_text()
    try:
        file.write_text('{"page_size": 0}')
        assert "setting 'page_size' is 0; accepted: int >= 1" in load(empty_server)
        file.write_text("[]")
        assert "model.json holds []; accepted: a JSON object of settings" in load(empty_server)
    finally:
        file.write_text(before)

"""What a client of the tensor contract gets, through a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess

import pytest
import tritonclient.grpc.aio

from radix_backend.client import EngineClient
from tests.triton.requests import GREEDY, Response, Stream, aio_stream, joined, stream, text_of
from tests.triton.server import TritonServer, eventually

pytestmark = [pytest.mark.server, pytest.mark.model]

PROMPT = "Once upon a time, there was a"
COUNTED = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_token_ids": True}


def whole(server: TritonServer, **body: object) -> str:
    answer = server.generate(temperature=0, exclude_input_in_output=True, **body)
    return str(answer["text_output"])


def test_deltas_of_a_stream_join_to_the_whole_answer(server: TritonServer) -> None:
    expected = whole(server, text_input=PROMPT, max_tokens=24)

    def several() -> bool:
        responses = list(stream(server.grpc, text_input=PROMPT, sampling_parameters=GREEDY | {"max_tokens": 24}))
        assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]
        assert text_of(responses) == expected
        return len(responses) > 1

    eventually(several)  # a server that is held up sends what came meanwhile as one


def test_asyncio_client_streams(server: TritonServer) -> None:
    async def run() -> list[Response]:
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            parameters = GREEDY | {"max_tokens": 12}
            return [part async for part in aio_stream(client, text_input=PROMPT, sampling_parameters=parameters)]

    assert text_of(asyncio.run(run())) == whole(server, text_input=PROMPT, max_tokens=12)


def test_requests_on_one_stream_do_not_mix(server: TritonServer) -> None:
    prompts = {str(number): f"The number {number} is" for number in range(6)}
    received: dict[str, list[Response]] = {request_id: [] for request_id in prompts}
    with Stream(server.grpc) as shared:
        for request_id, prompt in prompts.items():
            parameters = GREEDY | {"max_tokens": 4 + 2 * int(request_id)}
            shared.submit(request_id=request_id, text_input=prompt, sampling_parameters=parameters)
        while not all(parts and parts[-1].final for parts in received.values()):
            response = shared.receive()
            received[response.request_id].append(response)
    for request_id, prompt in prompts.items():
        assert text_of(received[request_id]) == whole(server, text_input=prompt, max_tokens=4 + 2 * int(request_id))


def test_generate_stream_under_curl(server: TritonServer) -> None:
    body = {"text_input": PROMPT, "stream": True, "max_tokens": 8, "temperature": 0}
    url = server.url("/v2/models/radix/generate_stream")
    expected = whole(server, text_input=PROMPT, max_tokens=8)

    def several() -> bool:
        output = subprocess.run(
            ["curl", "--silent", "--no-buffer", "--max-time", "60", url, "-d", json.dumps(body)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        events = [json.loads(line.removeprefix("data: ")) for line in output.splitlines() if line]
        assert "".join(event["text_output"] for event in events) == expected
        return len(events) > 1

    eventually(several)


def test_whole_answer_repeats_its_prompt_unless_told_otherwise(server: TritonServer) -> None:
    generated = whole(server, text_input=PROMPT, max_tokens=4)
    told = server.generate(text_input=PROMPT, max_tokens=4, temperature=0, exclude_input_in_output=False)
    default = server.generate(text_input=PROMPT, max_tokens=4, temperature=0)
    assert told["text_output"] == default["text_output"] == PROMPT + generated


def test_whole_answer_comes_as_one_response_on_a_stream(server: TritonServer) -> None:
    parameters = GREEDY | {"max_tokens": 6}
    (response,) = stream(server.grpc, text_input=PROMPT, stream=False, sampling_parameters=parameters)
    assert response.text == PROMPT + whole(server, text_input=PROMPT, max_tokens=6)


def test_counts_and_token_ids_of_a_stream(server: TritonServer, engine: EngineClient) -> None:
    parameters = GREEDY | {"max_tokens": 20}
    responses = list(stream(server.grpc, text_input=PROMPT, sampling_parameters=parameters, **COUNTED))
    token_ids = joined(responses, "token_ids")
    assert engine.detokenize(token_ids) == text_of(responses)
    assert sum(joined(responses, "num_output_tokens")) == len(token_ids) == 20
    for response in responses:
        assert response.outputs["num_output_tokens"] == [len(response.outputs["token_ids"])]
    assert {tuple(response.outputs["num_input_tokens"]) for response in responses} == {(len(engine.tokenize(PROMPT)),)}


def test_counts_of_a_whole_answer(server: TritonServer, engine: EngineClient) -> None:
    answer = server.generate(text_input=PROMPT, max_tokens=5, temperature=0, **COUNTED)
    assert answer["num_input_tokens"] == len(engine.tokenize(PROMPT))
    assert answer["num_output_tokens"] == 5
    assert PROMPT + engine.detokenize(answer["token_ids"]) == answer["text_output"]


def test_token_ids_are_a_prompt(server: TritonServer, engine: EngineClient) -> None:
    ids = engine.tokenize(PROMPT)
    parameters = GREEDY | {"max_tokens": 8}
    responses = list(stream(server.grpc, input_ids=ids, sampling_parameters=parameters, return_num_input_tokens=True))
    assert text_of(responses) == whole(server, text_input=PROMPT, max_tokens=8)
    assert {tuple(response.outputs["num_input_tokens"]) for response in responses} == {(len(ids),)}


def test_finish_reasons(server: TritonServer) -> None:
    def reasons(**parameters: object) -> list[str]:
        sampling = GREEDY | parameters
        wanted = {"text_input": PROMPT, "sampling_parameters": sampling, "return_finish_reason": True}
        return joined(list(stream(server.grpc, **wanted)), "finish_reason")

    *before, last = eventually(lambda: found if len(found := reasons(max_tokens=6)) > 1 else None)
    assert (set(before), last) == ({"None"}, "length")
    *before, last = reasons(max_tokens=24, stop=whole(server, text_input=PROMPT, max_tokens=24)[10:14])
    assert (set(before) <= {"None"}, last) == (True, "stop")


def test_sampling_parameters_beat_request_parameters_and_strings_are_coerced(server: TritonServer) -> None:
    answer = server.generate(
        text_input=PROMPT,
        max_tokens=9,
        temperature="0",
        ignore_eos="true",
        priority=3,
        sampling_parameters=json.dumps({"max_tokens": "3"}),
        return_num_output_tokens=True,
    )
    assert answer["num_output_tokens"] == 3


def test_seeded_stream_is_replayable(server: TritonServer) -> None:
    parameters = {"seed": 7, "temperature": 1.2, "top_p": 0.9, "max_tokens": 16}
    first, second = (
        text_of(list(stream(server.grpc, text_input=PROMPT, sampling_parameters=parameters))) for _ in range(2)
    )
    assert first == second != whole(server, text_input=PROMPT, max_tokens=16)


def test_cache_receipt_tells_what_was_found_in_the_cache(server: TritonServer) -> None:
    prompt = "A receipt tells what was cached. " * 8
    first, second = (
        json.loads(server.generate(text_input=prompt, max_tokens=1, return_cache_receipt=True)["cache_receipt"])
        for _ in range(2)
    )
    assert first["cached_tokens"] < second["cached_tokens"]
    assert second["cached_tokens"] % 16 == 0
    assert set(second) == {
        *("cached_tokens", "namespace", "queue_ms", "prefill_ms", "decode_ms", "retractions", "resumed")
    }

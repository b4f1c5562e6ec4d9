"""Many requests at once, clients that do not read, a server that does not keep up: nothing is lost or mixed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from radix_backend.bench.light_client import Load, request_bytes
from radix_backend.client import EngineClient
from radix_backend.metrics.publisher import SAMPLES
from tests.triton.requests import GREEDY, Response, Stream, aio_stream, joined, stream, text_of
from tests.triton.scrape import Metrics, settled
from tests.triton.server import TritonServer, eventually, serving, stopped
from tests.triton.tiny_server import LONG, Start, settings, start_tiny, tiny_model  # noqa: F401

pytestmark = pytest.mark.server

STREAMS = 256
LETTER = {"logit_bias": {"40": 100}}  # every token a letter: none is held back as part of a character


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TritonServer]:  # noqa: F811
    with serving(tmp_path_factory.mktemp("load"), settings(tiny_model)) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: TritonServer) -> Iterator[EngineClient]:
    with server.engine() as client:
        yield client


def idle(engine: EngineClient) -> bool:
    figures = engine.stats(audit=True)
    assert figures["audit_findings"] == figures["pages_quarantined"] == 0
    return not any(figures[name] for name in ("requests_running", "requests_waiting", "pages_leased", "pages_retiring"))


def generated(engine: EngineClient) -> float:
    return engine.stats()["generation_tokens_total"]


async def token_ids(client: tritonclient.grpc.aio.InferenceServerClient, number: int) -> list[int]:
    sampling = GREEDY | {"max_tokens": 8 + number % 25, "ignore_eos": True}
    inputs = {"text_input": f"{number} bottles", "sampling_parameters": sampling, "return_token_ids": True}
    return joined([response async for response in aio_stream(client, **inputs)], "token_ids")


def test_256_streams_at_once_equal_the_same_alone(server: TritonServer, engine: EngineClient) -> None:
    async def run() -> tuple[list[list[int]], list[list[int]]]:
        async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            together = await asyncio.gather(*(token_ids(client, number) for number in range(STREAMS)))
            return together, [await token_ids(client, number) for number in range(STREAMS)]

    together, alone = asyncio.run(run())
    assert [len(tokens) for tokens in together] == [8 + number % 25 for number in range(STREAMS)]
    assert together == alone
    eventually(lambda: idle(engine))


# ── a bounded queue ────────────────────────────────────────────────────────────────────────────────────────────


def outcomes(shared: Stream, count: int) -> tuple[Counter[str], int]:
    """How ``count`` requests of a stream ended, by error ("" without one), and how many tokens they got."""
    ends: Counter[str] = Counter()
    tokens = 0
    while ends.total() < count:
        try:
            response = shared.receive()
        except InferenceServerException as error:
            ends[str(error.message())] += 1
        else:
            tokens += len(response.outputs.get("token_ids", []))
            ends.update([""] * response.final)
    return ends, tokens


def test_beyond_a_full_queue_requests_are_refused_at_once(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(max_bs=4, max_queue_size=16)
    server.wait_serving()
    with server.engine() as engine, Stream(server.grpc) as shared:

        def present() -> tuple[float, float]:
            figures = engine.stats()
            return figures["requests_running"], figures["requests_waiting"]

        for running, waiting in ((4, 0), (4, 16)):
            for number in range(waiting or running):
                shared.submit(text_input=f"{number}", sampling_parameters=LONG)
            eventually(lambda expected=(running, waiting): present() == expected)
        with pytest.raises(InferenceServerException, match=r"16 requests wait \(max_queue_size\)"):
            list(stream(server.grpc, text_input="one more", sampling_parameters=LONG))
        assert present() == (4, 16)  # nobody had to go for the answer


def test_the_queue_is_served_by_priority(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(max_bs=1)
    server.wait_serving()
    with server.engine() as engine, Stream(server.grpc) as shared:
        with Stream(server.grpc) as first:
            first.submit(text_input="first", sampling_parameters=LONG)
            first.receive()
            for priority in (3, 2, 1, 0):
                sampling = GREEDY | {"max_tokens": 2, "priority": priority}
                shared.submit(text_input="a", sampling_parameters=sampling, stream=False, request_id=f"{priority}")
            eventually(lambda: engine.stats()["requests_waiting"] == 4)
        assert [shared.receive().request_id for _ in range(4)] == ["0", "1", "2", "3"]


def test_requests_that_gave_way_to_others_are_counted_and_lose_nothing(start_tiny: Start) -> None:  # noqa: F811
    sampling = GREEDY | {"max_tokens": 300, "ignore_eos": True}
    wanted = {"sampling_parameters": sampling, "stream": False, "return_token_ids": True, "return_cache_receipt": True}
    prompts = [f"prompt {number}" for number in range(4)]
    server = start_tiny(kv_cache_memory="256KiB")  # 512 tokens
    server.wait_serving()
    alone = [joined(list(stream(server.grpc, text_input=prompt, **wanted)), "token_ids") for prompt in prompts]
    before = Metrics(server)
    with Stream(server.grpc) as shared:
        for number, prompt in enumerate(prompts):
            shared.submit(text_input=prompt, request_id=f"{number}", **wanted)
        responses = [shared.receive() for _ in prompts]
    assert {int(response.request_id): response.outputs["token_ids"] for response in responses} == dict(enumerate(alone))
    retractions = sum(json.loads(response.outputs["cache_receipt"][0])["retractions"] for response in responses)
    assert retractions > 0
    eventually(lambda: Metrics(server).since(before, "num_preemptions_total") == retractions)


def published(server: TritonServer, name: str) -> float:
    """0 before there are metrics."""
    try:
        return Metrics(server)[name]
    except LookupError:
        return 0.0


def test_of_2000_requests_each_is_answered_or_refused_and_counted(start_tiny: Start) -> None:  # noqa: F811
    server = start_tiny(max_bs=16, max_queue_size=100)
    server.wait_serving()
    eventually(lambda: published(server, "request_success_total") == 1)  # what came before is counted
    before = Metrics(server)
    count = 48  # tokens of each: more work than comes in meanwhile
    sampling = GREEDY | {"max_tokens": count, "ignore_eos": True}
    with server.engine() as engine, ExitStack() as stack:
        shared = [stack.enter_context(Stream(server.grpc)) for _ in range(4)]
        for number in range(2000):
            shared[number % 4].submit(
                text_input=f"{number}", sampling_parameters=sampling, return_token_ids=True, request_id=f"{number}"
            )
        results = [outcomes(one, 500) for one in shared]
        eventually(lambda: idle(engine))
    ends = sum((end for end, _ in results), Counter())
    completed = ends.pop("")
    refused = ends.total()
    assert completed + refused == 2000
    assert completed >= 100
    assert refused > 0
    assert [end for end in ends if "(max_queue_size)" not in end] == []
    assert sum(tokens for _, tokens in results) == count * completed

    def counted() -> bool:
        now = Metrics(server)
        success = now.since(before, "request_success_total", finished_reason="length")
        failures = now.since(before, "request_failure_total", code="UNAVAILABLE")
        tokens = now.since(before, "generation_tokens_total")
        return (success, failures, tokens) == (completed, refused, count * completed)

    eventually(counted)


# ── slow clients, slow servers ─────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_does_not_read_delays_nobody_and_loses_nothing(
    server: TritonServer, engine: EngineClient
) -> None:
    """Triton keeps what a client does not take: the request ends, its pages are free, and all can be read later."""
    count = 3000
    request = request_bytes("radix", [1, 2, 3], Load([], count))
    usual = {"text_input": "a usual question", "sampling_parameters": GREEDY | {"max_tokens": 40, "ignore_eos": True}}
    alone = text_of(list(stream(server.grpc, **usual)))

    def unread_while_others_were_served() -> list[bytes] | None:
        """What it reads in the end; nothing where its request was done before the other's."""
        before = generated(engine)
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            unread = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([request]))
            eventually(lambda: generated(engine) > before)
            assert text_of(list(stream(server.grpc, **usual))) == alone
            still_ran = engine.stats()["requests_running"] == 1
            eventually(lambda: idle(engine))
            assert generated(engine) - before == count + 40
            assert text_of(list(stream(server.grpc, **usual))) == alone
            return list(unread) if still_ran else None

    data = eventually(unread_while_others_were_served, 60)
    responses = [tritonclient.grpc.service_pb2.ModelStreamInferResponse.FromString(each) for each in data]
    assert not any(response.error_message for response in responses)
    texts = [response.infer_response.raw_output_contents[0][4:].decode() for response in responses]
    whole = stream(server.grpc, input_ids=[1, 2, 3], sampling_parameters=LONG | {"max_tokens": count}, stream=False)
    assert "".join(texts) == text_of(list(whole))


def lettered(server: TritonServer, count: int) -> list[Response]:
    sampling: dict[str, Any] = LONG | LETTER | {"max_tokens": count}
    return list(stream(server.grpc, text_input="a", sampling_parameters=sampling, return_token_ids=True))


def test_one_stream_gets_a_response_a_token(server: TritonServer) -> None:
    """While the server keeps up with a model that takes a millisecond: on a busy machine not at every attempt."""
    before = settled(server)
    responses: list[int] = []  # of each attempt

    def one_each() -> bool:
        attempt = lettered(server, 8)
        assert len(joined(attempt, "token_ids")) == 8
        responses.append(len(attempt))
        return len(attempt) == 8

    eventually(one_each)
    eventually(lambda: Metrics(server).since(before, "tokens_per_response_sum") == 8 * len(responses))
    assert Metrics(server).since(before, "tokens_per_response_count") == sum(responses)


def test_tokens_coalesce_while_the_server_lags(server: TritonServer, engine: EngineClient) -> None:
    before = settled(server)
    count = SAMPLES  # metrics observe no more responses a push
    sampling: dict[str, Any] = LONG | LETTER | {"max_tokens": count}
    sizes: list[int] = []  # of the responses of all attempts

    def attempt() -> int:
        """Responses to a request for which the server stood still during 200 tokens; 0 where not so many were left."""
        start = generated(engine)
        with Stream(server.grpc) as one:
            one.submit(text_input="a", sampling_parameters=sampling, return_token_ids=True)
            responses = [one.receive()]
            with stopped(server.process):
                seen = generated(engine)
                eventually(lambda: generated(engine) >= min(seen + 200, start + count))
            while not responses[-1].final:
                responses.append(one.receive())
        new = [len(response.outputs["token_ids"]) for response in responses]
        assert sum(new) == count
        sizes.extend(new)
        eventually(lambda: Metrics(server).since(before, "tokens_per_response_sum") == sum(sizes))
        assert Metrics(server).since(before, "tokens_per_response_count") == len(sizes)
        return len(new) if seen + 200 <= start + count else 0

    assert eventually(attempt) <= count - 150  # the 200 that came meanwhile went out in a few

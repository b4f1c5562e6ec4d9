"""A client that goes away frees what its request held."""

from __future__ import annotations

import http.client
import json

import pytest

from radix_backend.client import EngineClient
from tests.triton.requests import GREEDY, Stream, stream
from tests.triton.server import TritonServer, eventually

pytestmark = [pytest.mark.server, pytest.mark.model]

LONG = GREEDY | {"max_tokens": 4000, "ignore_eos": True}


def leased(engine: EngineClient) -> float:
    return engine.stats()["pages_leased"]


def idle(engine: EngineClient) -> bool:
    stats = engine.stats()
    return stats["requests_running"] == stats["requests_waiting"] == stats["pages_leased"] == 0


def test_grpc_cancel_frees_pages(server: TritonServer, engine: EngineClient) -> None:
    responses = stream(server.grpc, text_input="Tell me everything.", sampling_parameters=LONG)
    next(responses)
    assert leased(engine) > 0
    responses.close()
    eventually(lambda: idle(engine))


def test_http_disconnect_frees_pages(server: TritonServer, engine: EngineClient) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=60)
    body = {"text_input": "Tell me everything.", "stream": True} | LONG
    connection.request("POST", "/v2/models/radix/generate_stream", json.dumps(body))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    assert leased(engine) > 0
    response.close()
    connection.close()
    eventually(lambda: idle(engine))


def test_cancel_of_one_request_leaves_others_running(server: TritonServer, engine: EngineClient) -> None:
    with Stream(server.grpc) as other:
        other.submit(text_input="A", sampling_parameters=GREEDY | {"max_tokens": 60, "ignore_eos": True})
        other.receive()
        cancelled = stream(server.grpc, text_input="B", sampling_parameters=LONG)
        next(cancelled)
        cancelled.close()
        while not other.receive().final:
            pass
    eventually(lambda: idle(engine))


def test_cancel_while_queued(server: TritonServer, engine: EngineClient) -> None:
    def present() -> float:
        stats = engine.stats()
        return stats["requests_running"] + stats["requests_waiting"]

    first = server.config.max_bs + 1
    with Stream(server.grpc) as others:
        for number in range(first):
            others.submit(text_input=f"{number}", sampling_parameters=LONG)
        eventually(lambda: present() == first)
        with Stream(server.grpc) as queued:
            queued.submit(text_input="queued", sampling_parameters=LONG)
            eventually(lambda: present() == first + 1)
        eventually(lambda: present() == first)
    eventually(lambda: idle(engine))

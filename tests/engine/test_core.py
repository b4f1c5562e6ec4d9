"""The engine's loop over a real socket pair; the test plays the gateway, the worker is simulated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from radix_backend.config import EngineConfig
from radix_backend.engine.core import EngineCore, bind
from radix_backend.process import Reporter
from radix_backend.protocol import (
    ABORT,
    LENGTH,
    STOP,
    Admit,
    EngineMessage,
    EngineRejected,
    EngineReply,
    EngineStats,
    Finish,
    Message,
    Step,
    array,
    column,
)
from radix_backend.sampling_params import SamplingParams
from tests.engine.sim import SimWorker, continuation


class Gateway:
    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.connect(address)
        self.decoder = msgspec.msgpack.Decoder(EngineMessage)

    def send(self, message: Message) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> EngineMessage:
        assert self.socket.poll(10_000), "the engine does not answer"
        return self.decoder.decode(self.socket.recv())

    def admit(self, request: int, prompt: list[int], max_tokens: int, stop: tuple[int, ...] = ()) -> None:
        self.send(Admit(request, column(prompt, "<i4"), SamplingParams(max_tokens=max_tokens), list(stop)))

    def collect(self, *requests: int) -> dict[int, tuple[list[int], int]]:
        """Tokens and finish of each request, once all have ended."""
        tokens: dict[int, list[int]] = {request: [] for request in requests}
        ends: dict[int, int] = {}
        while set(ends) != set(requests):
            step = self.receive()
            assert isinstance(step, Step)
            flat, at = array(step.tokens, "<i4").tolist(), 0
            finishes = array(step.finish, "u1").tolist()
            assert len(step.receipts) == sum(finish > 0 for finish in finishes)
            for request, count, finish in zip(
                array(step.ids, "<i8").tolist(), array(step.counts, "<i4").tolist(), finishes, strict=True
            ):
                tokens[request] += flat[at : at + count]
                at += count
                if finish:
                    ends[request] = finish
        return {request: (tokens[request], ends[request]) for request in requests}

    def stats(self) -> dict[str, float]:
        self.send(EngineStats(1, audit=True))
        reply = self.receive()
        assert isinstance(reply, EngineReply)
        return reply.value


@pytest.fixture(params=[False, True], ids=["async", "sync"])
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    config = EngineConfig(max_bs=4, max_batched_tokens=32, page_size=4, disable_async_scheduling=request.param)
    address = f"ipc://{tmp_path}/engine.sock"
    context, socket = bind(address)
    core = EngineCore(config, SimWorker(1024, 4, 4), socket, Reporter())
    thread = threading.Thread(target=core.run, daemon=True)
    thread.start()
    gateway = Gateway(address)
    yield gateway
    core.stop()
    thread.join(10)
    assert not thread.is_alive()
    gateway.context.destroy(linger=0)
    context.destroy(linger=0)


def test_requests_stream_and_leave_nothing_behind(gateway: Gateway) -> None:
    for i in range(4):
        gateway.admit(i, [1, 2, 3, i], max_tokens=10 + i)
    for i, (tokens, finish) in gateway.collect(0, 1, 2, 3).items():
        assert tokens == continuation([1, 2, 3, i], 10 + i)
        assert finish == LENGTH
    stats = gateway.stats()
    assert stats["audit_findings"] == stats["pages_leased"] == stats["pages_retiring"] == stats["requests_running"] == 0
    assert stats["generation_tokens_total"] == 46


def test_stop_is_answered_and_abort_is_silent(gateway: Gateway) -> None:
    gateway.admit(1, [1, 2, 3], max_tokens=1900)  # more than is generated until the last message is sent
    gateway.admit(2, [4, 5, 6], max_tokens=1900)
    gateway.send(Finish([1], ABORT))
    gateway.send(Finish([2], STOP))
    gateway.send(Finish([77], ABORT))  # unknown: it may just have ended
    while True:
        step = gateway.receive()
        assert isinstance(step, Step)
        finishes = dict(zip(array(step.ids, "<i8").tolist(), array(step.finish, "u1").tolist(), strict=True))
        assert finishes.get(1, 0) == 0
        if finishes.get(2):
            assert finishes[2] == STOP
            break
    assert gateway.stats()["pages_leased"] == 0


def test_a_prompt_that_can_never_run_is_rejected(gateway: Gateway) -> None:
    gateway.admit(1, [0] * 4096, max_tokens=1)
    answer = gateway.receive()
    assert isinstance(answer, EngineRejected)
    assert (answer.id, answer.code) == (1, "INVALID_ARG")
    gateway.admit(2, [1], max_tokens=1)
    assert gateway.collect(2)[2] == (continuation([1], 1), LENGTH)

"""Slots, the sender and the watcher, with an engine and a Triton that fail on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from radix_backend.client import Sink
from radix_backend.errors import Cancelled, RadixError, Unavailable
from radix_backend.metrics.recorder import Recorder
from radix_backend.protocol import LENGTH, RUNNING, Receipt
from radix_backend.sidecar.sink import Delta
from radix_backend.triton.bridge import Bridge
from radix_backend.triton.slot import SMALL_BYTES
from tests.triton.server import eventually

RECEIPT = Receipt(3, 0, 0, 0.0, 0.0, 0.0, 0, False)


class Engine:
    """Stands for EngineClient: remembers sinks, and does what a test says."""

    def __init__(self) -> None:
        self.sinks: dict[int, Sink] = {}
        self.aborted: list[int] = []
        self.unavailable = False

    def submit(self, params: Any, *, sink: Sink, **prompt: Any) -> int:
        if self.unavailable:
            raise Unavailable("the engine is starting")
        request = len(self.sinks) + 1
        self.sinks[request] = sink
        return request

    def abort(self, ids: Sequence[int]) -> None:
        for request in ids:
            if request not in self.aborted:
                self.aborted.append(request)
                self.sinks[request].on_error(Cancelled("the request was cancelled"))

    def emit(self, request: int, text: str, finish: int = RUNNING) -> None:
        ids = np.arange(1, dtype=np.int32)
        self.sinks[request].on_delta(Delta(ids, text, finish, RECEIPT if finish else None))


class Wire:
    """A Triton client's end: records (text or error, final), and fails where told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str | RadixError, bool]] = []
        self.cancelled = False
        self.broken = False  # content cannot be sent
        self.room = 10**6  # bytes of shared memory
        self.gate: threading.Event | None = None  # a send waits for it

    def send(self, tensors: list[tuple[str, Any]], final: bool) -> None:
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.broken:
            raise RuntimeError("Failed to increase the shared memory pool size")
        self.sent.append((tensors[0][1][0].decode(), final))

    def has_room(self, size: int) -> bool:
        return size <= self.room

    def refuse(self, error: RadixError) -> None:
        self.sent.append((error, True))

    def is_cancelled(self) -> bool:
        assert not self.ended, "asked after FINAL"
        return self.cancelled

    @property
    def ended(self) -> bool:
        return any(final for _, final in self.sent)

    def error(self) -> RadixError:
        """The error that the request ended with, after its only FINAL."""
        eventually(lambda: self.ended)
        assert [final for _, final in self.sent].count(True) == 1
        assert isinstance(self.sent[-1][0], RadixError)
        return self.sent[-1][0]


def reads(**inputs: Any) -> Callable[[], tuple[dict[str, Any], str]]:
    tensors = {"text_input": np.array([b"a"], dtype=object)} | {name: np.array(value) for name, value in inputs.items()}
    return lambda: (tensors, "")


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def bridge(engine: Engine) -> Iterator[Bridge]:
    bridge = Bridge(engine, "", Recorder())  # type: ignore[arg-type]
    yield bridge
    bridge.close()


def start(bridge: Bridge, stream: bool = True) -> Wire:
    wire = Wire()
    bridge.execute(wire, reads(stream=[stream]))
    return wire


def test_idle_stream_gets_a_response_a_token(bridge: Bridge, engine: Engine) -> None:
    wire = start(bridge)
    for number in range(4):
        engine.emit(1, f"t{number}", LENGTH if number == 3 else RUNNING)
        eventually(lambda number=number: len(wire.sent) == number + 1)
    assert wire.sent == [("t0", False), ("t1", False), ("t2", False), ("t3", True)]


def test_tokens_coalesce_while_sending_lags(bridge: Bridge, engine: Engine) -> None:
    wire, other = start(bridge), start(bridge)
    wire.gate = threading.Event()
    engine.emit(1, "t0")
    for number in range(1, 50):
        engine.emit(1, f" t{number}", LENGTH if number == 49 else RUNNING)
        engine.emit(2, f"u{number}", LENGTH if number == 49 else RUNNING)
    wire.gate.set()
    eventually(lambda: wire.ended and other.ended)
    assert "".join(str(text) for text, _ in wire.sent) == " ".join(f"t{number}" for number in range(50))
    assert len(wire.sent) <= 2
    assert len(other.sent) == 1


def test_slow_send_delays_no_other_senders_requests(engine: Engine) -> None:
    bridge = Bridge(engine, "", Recorder(), num_senders=3)  # type: ignore[arg-type]
    slow, *others = [start(bridge) for _ in range(6)]
    slow.gate = threading.Event()
    for number in range(20):
        for request in range(1, 7):
            engine.emit(request, f" t{number}", LENGTH if number == 19 else RUNNING)
    eventually(lambda: sum(wire.ended for wire in others) == 4)  # the fifth has the sender of the slow one
    slow.gate.set()
    eventually(lambda: slow.ended and all(wire.ended for wire in others))
    for wire in [slow, *others]:
        assert "".join(str(text) for text, _ in wire.sent) == "".join(f" t{number}" for number in range(20))
    bridge.close()


def test_whole_answer_is_sent_once(bridge: Bridge, engine: Engine) -> None:
    wire = start(bridge, stream=False)
    for number in range(3):
        engine.emit(1, f" t{number}", LENGTH if number == 2 else RUNNING)
    eventually(lambda: wire.ended)
    assert wire.sent == [("a t0 t1 t2", True)]


def test_held_back_text_makes_no_response(bridge: Bridge, engine: Engine) -> None:
    wire = start(bridge)
    engine.emit(1, "")
    engine.emit(1, "b")
    eventually(lambda: wire.sent)
    assert wire.sent == [("b", False)]


def test_final_goes_with_the_last_content_however_large(bridge: Bridge, engine: Engine) -> None:
    wire = start(bridge)
    engine.emit(1, "x" * (SMALL_BYTES + 1), LENGTH)
    eventually(lambda: wire.ended)
    assert wire.sent == [("x" * (SMALL_BYTES + 1), True)]


def test_a_last_response_without_room_is_not_tried_but_ends_in_an_error(bridge: Bridge, engine: Engine) -> None:
    wire, small = start(bridge), start(bridge)
    wire.room = small.room = SMALL_BYTES
    engine.emit(1, "x" * (SMALL_BYTES + 1), LENGTH)
    engine.emit(2, "x" * SMALL_BYTES, LENGTH)
    assert str(wire.error()) == f"the response of {SMALL_BYTES + 1} bytes finds no room in /dev/shm"
    assert wire.error().code == "UNAVAILABLE"
    eventually(lambda: small.ended)
    assert small.sent == [("x" * SMALL_BYTES, True)]


@pytest.mark.parametrize("size", [1, SMALL_BYTES + 1])
def test_failed_send_aborts_the_request_and_ends_in_an_error(bridge: Bridge, engine: Engine, size: int) -> None:
    wire = start(bridge)
    wire.broken = True
    engine.emit(1, "x" * size)
    assert "could not be sent: Failed to increase the shared memory" in str(wire.error())
    eventually(lambda: engine.aborted == [1])
    engine.emit(1, "late", LENGTH)
    well = start(bridge)
    engine.emit(2, "b", LENGTH)
    eventually(lambda: well.ended)
    assert wire.error() is wire.sent[-1][0]


def test_engine_error_follows_what_was_generated(bridge: Bridge, engine: Engine) -> None:
    wire = start(bridge)
    wire.gate = threading.Event()
    engine.emit(1, "a")
    engine.emit(1, "b")
    engine.sinks[1].on_error(Unavailable("the engine is restarting"))
    wire.gate.set()
    assert str(wire.error()) == "the engine is restarting"
    assert "".join(str(text) for text, final in wire.sent if not final) == "ab"


def test_unavailable_engine_and_wrong_request_end_in_an_error(bridge: Bridge, engine: Engine) -> None:
    wrong = Wire()
    bridge.execute(wrong, reads(image=["x"]))
    assert wrong.error().code == "UNSUPPORTED"
    engine.unavailable = True
    assert start(bridge).error().code == "UNAVAILABLE"


def test_request_that_cannot_be_read_ends_in_an_error(bridge: Bridge) -> None:
    wire = Wire()

    def read() -> tuple[dict[str, Any], str]:
        raise RuntimeError("no such tensor")

    bridge.execute(wire, read)
    assert str(wire.error()) == "the request could not be started: no such tensor"


def test_cancelled_request_is_aborted_before_its_first_token(bridge: Bridge, engine: Engine) -> None:
    wire, other = start(bridge), start(bridge)
    wire.cancelled = True
    assert wire.error().code == "CANCELLED"
    assert engine.aborted == [1]
    assert not other.ended


def test_close_ends_what_runs(engine: Engine) -> None:
    bridge = Bridge(engine, "", Recorder())  # type: ignore[arg-type]
    wires = [start(bridge) for _ in range(3)]
    bridge.close()
    assert [wire.error().code for wire in wires] == ["UNAVAILABLE"] * 3

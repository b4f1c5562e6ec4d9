"""The gateway as a process: greeting, calls, doors that vanish or do not read, messages that make no sense."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from radix_backend.protocol import (
    ABORT,
    LENGTH,
    PROTOCOL_VERSION,
    RUNNING,
    Abort,
    Admit,
    Detokenize,
    EngineReply,
    EngineStats,
    Hello,
    ModelInfo,
    Refused,
    Rejected,
    RenderChat,
    Reply,
    Stats,
    Tokenize,
    Update,
    Welcome,
    column,
)
from tests.gateway.harness import Client, Sidecar
from tests.gateway.small_models import CONTEXT_LEN, byte_level, sentencepiece, write_model

Start = Callable[..., Sidecar]

IDS = byte_level().encode("the quick brown fox").ids
LONG = byte_level().get_vocab_size()  # the token of LONG_TEXT

# ── greeting ──────────────────────────────────────────────────────────────────────────────


def test_a_client_is_told_about_the_model(sidecar: Sidecar) -> None:
    for identity in ("", sidecar.config.identity()):
        client = sidecar.client(Hello(PROTOCOL_VERSION, identity))
        assert client.greeting == Welcome(ModelInfo(sidecar.config.model, CONTEXT_LEN, 400, [1]))
        client.close()


@pytest.mark.parametrize(
    ("hello", "complaint"),
    [
        (Hello("0.0.1/7", ""), f"client speaks protocol '0.0.1/7'; accepted: '{PROTOCOL_VERSION}'"),
        (Hello(PROTOCOL_VERSION, "beef"), "client wants engine 'beef'; this is "),
        (Stats(1), "the first message of a client is Hello"),
    ],
)
def test_a_client_of_something_else_is_refused(sidecar: Sidecar, hello: Hello, complaint: str) -> None:
    refused = sidecar.client(hello).greeting
    assert isinstance(refused, Refused)
    assert complaint in refused.reason


# ── calls ──────────────────────────────────────────────────────────────────────────────


def test_calls_are_answered(start_sidecar: Start, tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", sentencepiece())
    (model_dir / "chat_template.jinja").write_text("<bos>{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}")
    sidecar = start_sidecar(model_dir)
    client = sidecar.client()
    client.send(RenderChat(1, [{"role": "user", "content": "the fox"}], variables={"mark": "!"}))
    text = client.receive().value
    assert text == "<bos>the fox!"
    client.send(Tokenize(2, text, add_special_tokens=False))
    ids = client.receive().value
    assert ids.count(0) == 1
    client.send(Tokenize(3, "the fox!"))
    assert client.receive().value[0] == 0
    client.send(Detokenize(4, ids))
    assert client.receive() == Reply(4, " the fox!".strip())
    long = "the fox " * 1000
    client.send(Tokenize(5, long))
    client.send(Detokenize(6, client.receive().value))
    assert client.receive() == Reply(6, long)


def test_calls_that_cannot_be_answered_say_why(sidecar: Sidecar, client: Client) -> None:
    client.send(RenderChat(1, [{"role": "user", "content": "x"}]))
    client.send(Detokenize(2, [400]))
    client.send(Detokenize(3, [-1]))
    client.send_bytes(msgspec.msgpack.encode(["Tokenize", 4, 5]))
    replies = [client.receive() for _ in range(4)]
    assert [(reply.call, reply.code) for reply in replies] == [(n, "INVALID_ARG") for n in range(1, 5)]
    complaints = ["no chat template", "'ids' holds 400; accepted: 0 to 399", "'ids' holds -1", "Expected `str`"]
    assert all(complaint in reply.message for complaint, reply in zip(complaints, replies, strict=True))


def test_the_engines_figures_reach_who_asked(sidecar: Sidecar, client: Client) -> None:
    other = sidecar.client()
    calls = []
    for who, call in ((client, 5), (other, 5)):
        who.send(Stats(call, audit=who is other))
        calls.append(sidecar.engine.receive(EngineStats))
    assert [call.audit for call in calls] == [False, True]
    for n in (1, 0):
        sidecar.engine.send(EngineReply(calls[n].call, {"steps": float(n)}))
    assert client.receive() == Reply(5, {"steps": 0.0})
    assert other.receive() == Reply(5, {"steps": 1.0})
    other.close()


# ── doors that misbehave ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xff\x00garbage"],
        [msgspec.msgpack.encode(["Nonsense", 1])],
        [msgspec.msgpack.encode({"type": "Submit"})],
        [msgspec.msgpack.encode(["Abort", 3])],
        [msgspec.msgpack.encode(["Submit", "seven"])],
        [b"a", b"b", b"c"],
        [b"\x93\xaaRenderChat\x01" + b"\x91" * 100_000],
        [b"\x92\xa8Tokenize\xff" + b"\xa1\xff"],
    ],
)
def test_a_client_that_makes_no_sense_is_refused_and_its_requests_end(
    sidecar: Sidecar, client: Client, frames: list[bytes]
) -> None:
    bad = sidecar.client()
    bad.submit(1)
    admit = sidecar.engine.receive(Admit)
    bad.send_bytes(*frames)
    refused = bad.receive()
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("unreadable message")
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)
    client.submit(1)
    assert sidecar.engine.receive(Admit)


DOOR = """
import sys, time, msgspec
from radix_backend.protocol import *
from radix_backend.sampling_params import SamplingParams
import zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
for message in (Hello(PROTOCOL_VERSION, ""), Submit(1, SamplingParams(seed=1, max_tokens=400), "the")):
    socket.send(msgspec.msgpack.encode(message))
time.sleep(600)
"""


@pytest.fixture
def door(sidecar: Sidecar) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with one running request, that reads nothing."""
    process = subprocess.Popen([sys.executable, "-c", DOOR, sidecar.address])
    yield process
    process.kill()
    process.wait()


def test_requests_of_a_killed_door_end(sidecar: Sidecar, door: subprocess.Popen[bytes]) -> None:
    admit = sidecar.engine.receive(Admit)
    door.kill()
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)


def test_requests_of_a_door_killed_with_its_queue_full_end_too(sidecar: Sidecar, door: subprocess.Popen[bytes]) -> None:
    admit = sidecar.engine.receive(Admit)
    door.send_signal(signal.SIGSTOP)
    for _ in range(5000):
        sidecar.engine.step((admit.id, IDS, RUNNING))
    door.kill()
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)


def test_a_door_that_does_not_read_is_cut_off_and_disturbs_nobody(
    sidecar: Sidecar, client: Client, door: subprocess.Popen[bytes]
) -> None:
    stuck = sidecar.engine.receive(Admit)
    client.submit(1)
    admit = sidecar.engine.receive(Admit)
    door.send_signal(signal.SIGSTOP)
    for n in range(600):
        sidecar.engine.step((stuck.id, [LONG], RUNNING), (admit.id, [IDS[n % 4]], RUNNING))
        assert client.row().tokens == [IDS[n % 4]]
    assert sidecar.engine.is_told_to_finish(ABORT, stuck.id)
    assert resident_bytes(sidecar.process.pid) < 300 * 2**20


def resident_bytes(pid: int) -> int:
    psutil = pytest.importorskip("psutil")
    size: int = psutil.Process(pid).memory_info().rss
    return size


def test_a_client_that_was_cut_off_is_told_when_it_reads_again(sidecar: Sidecar) -> None:
    client = sidecar.client(rcvhwm=1)
    client.submit(1)
    admit = sidecar.engine.receive(Admit)
    for _ in range(600):
        sidecar.engine.step((admit.id, [LONG], RUNNING))
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)
    message = client.receive()
    while isinstance(message, Update):
        message = client.receive()
    assert message == Refused("more than 32 MiB of answers were not read")
    client.close()


def test_a_slow_client_gets_everything_in_order(sidecar: Sidecar) -> None:
    client = sidecar.client(rcvhwm=1)
    client.submit(1)
    admit = sidecar.engine.receive(Admit)
    expected = [2 + n % 300 for n in range(5_000)]
    for token in expected[:-1]:
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, expected[-1:], LENGTH))
    client.send(Tokenize(9, "the"))  # answered after all that, and nothing is skipped
    rows = client.rows(1)
    assert [token for row in rows for token in row.tokens] == expected
    assert client.receive().call == 9
    client.close()


def test_a_running_client_hears_from_the_gateway_while_nothing_happens(sidecar: Sidecar, client: Client) -> None:
    """The probe is an empty update, which any client can read."""
    client.submit(1)
    sidecar.engine.receive(Admit)
    message = client.receive(probes=True)
    assert message == Update(b"", b"", b"", b"", [], [])


# ── life ──────────────────────────────────────────────────────────────────────────────


def test_sigterm_ends_it_with_requests_running_and_leaves_no_socket(start_sidecar: Start, tmp_path: Path) -> None:
    sidecar = start_sidecar(write_model(tmp_path / "model", byte_level()))
    sidecar.report("ready")
    client = sidecar.client()
    client.submit(1)
    sidecar.engine.receive(Admit)
    client.submit(2, "the fox " * 1_000_000)
    sidecar.process.send_signal(signal.SIGTERM)
    assert sidecar.process.wait(20) == 0
    assert not (tmp_path / "run" / "doors").exists()


@pytest.mark.parametrize(
    ("settings", "config", "complaint"),
    [
        ({"context_len": 513}, {}, "setting 'context_len' is 513; accepted: 2 to 512 (the model)"),
        ({}, {"vocab_size": None}, "'vocab_size' is None; accepted: a positive integer"),
        ({}, {"max_position_embeddings": "many"}, "'max_position_embeddings' is 'many'"),
    ],
)
def test_what_a_restart_cannot_cure_is_reported(
    start_sidecar: Start, tmp_path: Path, settings: dict[str, int], config: dict[str, object], complaint: str
) -> None:
    sidecar = start_sidecar(write_model(tmp_path / "model", byte_level(), **config), **settings)
    assert complaint in sidecar.report("failed").message
    assert sidecar.process.wait(20) == 3


def test_eos_tokens_come_from_the_generation_config_first(start_sidecar: Start, tmp_path: Path) -> None:
    model_dir = write_model(tmp_path / "model", byte_level())
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    sidecar = start_sidecar(model_dir, context_len=64)
    client = sidecar.client()
    assert client.greeting.model.eos_token_ids == [4, 3]
    client.submit(1, params={"stop_token_ids": [9]})
    admit = sidecar.engine.receive(Admit)
    assert admit.stop_token_ids == [3, 4, 9]
    assert admit.params.max_tokens == 64 - len(byte_level().encode("the").ids)
    client.send(Abort([1]))
    client.submit(2, text=None, input_ids=column([2] * 64, "<i4"))
    assert isinstance(client.receive(), Rejected)


@pytest.mark.model
def test_the_embedded_model_streams_its_own_text(start_sidecar: Start, embedded_model_dir: Path) -> None:
    sidecar = start_sidecar(embedded_model_dir)
    client = sidecar.client()
    text = "Naïve café, 12345 🦊 — done."
    client.send(Tokenize(1, text))
    ids = client.receive().value
    client.submit(1, "The capital of France is")
    admit = sidecar.engine.receive(Admit)
    assert admit.stop_token_ids == [2]
    for token in ids:
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, [2], 1))
    assert "".join(row.text for row in client.rows(1)) == text

"""The way to ranks on other hosts: who may use it, and what its two ends notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from radix_backend.worker.agent import RankTask, attend
from radix_backend.worker.channel import Door, EngineLost, Hub, Lifeline, RemoteConnection, client
from radix_backend.worker.messages import RankAlive, RankLog, decode_from_rank
from tests.triton.server import eventually

LOOPBACK = "127.0.0.1"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(LOOPBACK, [1, 2])
    yield hub
    hub.close()


def test_a_rank_gets_plans_and_is_known_by_its_key(hub: Hub) -> None:
    ranks = [RemoteConnection(hub.door(rank)) for rank in (1, 2)]
    hub.send(b"plan")
    assert [rank.recv_bytes() for rank in ranks] == [b"plan", b"plan"]
    ranks[1].send_bytes(b"result")
    assert eventually(hub.receive) == (2, b"result")
    for rank in ranks:
        rank.close()


def test_a_stranger_gets_nothing_and_is_not_heard(hub: Hub) -> None:
    door = hub.door(1)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    other, _ = (key.decode() for key in zmq.curve_keypair())
    context: zmq.Context[Any] = zmq.Context()
    unknown = Door(door.plans, door.reports, door.server_key, public, secret)
    astray = Door(door.plans, door.reports, other, door.public_key, door.secret_key)
    sockets = []
    for kind, address in ((zmq.DEALER, door.plans), (zmq.PUSH, door.reports)):
        without_key = context.socket(kind)
        for socket in (client(context, kind, unknown), client(context, kind, astray), without_key):
            socket.connect(address)
            socket.send(b"let me in")
            sockets.append(socket)
    ranks = [RemoteConnection(hub.door(rank)) for rank in (1, 2)]
    hub.send(b"plan")
    assert [rank.recv_bytes() for rank in ranks] == [b"plan", b"plan"]
    ranks[0].send_bytes(b"result")
    assert eventually(hub.receive) == (1, b"result")
    assert hub.receive() is None
    assert not any(socket.poll(100) for socket in sockets if socket.type == zmq.DEALER)
    context.destroy(linger=0)
    for rank in ranks:
        rank.close()


def test_plans_for_a_rank_that_is_gone_are_an_error(hub: Hub) -> None:
    ranks = [RemoteConnection(hub.door(rank)) for rank in (1, 2)]
    hub.send(b"plan")
    ranks[0].close()

    def refused() -> bool:
        try:
            hub.send(b"plan")
        except zmq.ZMQError:
            return True
        return False

    eventually(refused)
    ranks[1].close()


def heard(hub: Hub) -> list[object]:
    """What is heard next but signs of life."""
    found = []
    while (message := hub.receive()) is not None:
        found.append(decode_from_rank(message[1]))
    return [each for each in found if not isinstance(each, RankAlive)]


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import sys; print('ERROR', sys.stdin.read(), file=sys.stderr); sys.exit(7)", "exited with status 7"),
        ("import os, sys; os.write(2, b'ERROR the spec'); os.kill(os.getpid(), 9)", "was killed by signal 9 (Killed)"),
    ],
)
def test_an_agent_tells_what_its_rank_writes_and_how_it_ends(hub: Hub, program: str, how: str) -> None:
    assert attend(RankTask(2, b"the spec", hub.door(2)), ("-c", program)) == how
    assert eventually(lambda: heard(hub)) == [RankLog("ERROR the spec")]


def test_an_agent_ends_its_rank_when_the_engine_is_gone(hub: Hub) -> None:
    ends: list[str] = []
    task = RankTask(1, b"", hub.door(1))
    waiting = ("-c", "import os, sys, time; print(os.getpid(), file=sys.stderr); time.sleep(1000)")
    agent = threading.Thread(target=lambda: ends.append(attend(task, waiting)))
    agent.start()
    eventually(lambda: heard(hub))
    hub.close()
    agent.join(30)
    (how,) = ends
    assert how == f"was ended: the engine at {task.door.reports} does not answer any more"


def test_an_agent_that_is_slow_finds_the_engine_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection may be there before the agent goes on."""

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return monitor(*arguments)

    monitor = zmq.Socket.get_monitor_socket
    monkeypatch.setattr(zmq.Socket, "get_monitor_socket", slowly)
    monkeypatch.setattr("radix_backend.worker.channel._CONNECT_SECONDS", 5.0)
    Lifeline(hub.door(1)).close()


def test_an_agent_that_cannot_reach_the_engine_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_backend.worker.channel._CONNECT_SECONDS", 0.5)
    door = hub.door(1)
    hub.close()
    with pytest.raises(EngineLost, match=f"cannot reach the engine at {door.reports}: is a firewall between"):
        Lifeline(door)

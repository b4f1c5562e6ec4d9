"""The way between the engine's process and ranks on other hosts: TCP that only they can use.

CURVE encrypts and proves both ends: the engine makes all keys anew at every start, and each rank gets its own. Who has
none of them is turned away before a message of his is read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

HEARTBEAT_SECONDS = 0.5  # between two signs of life
SILENCE_SECONDS = 3.5  # without one: a rank's host is gone, or the network between
# The same of the engine's host, for its ranks. A killed engine is noticed at once; this is for a host that is silent.
# Longer, because the library takes the time in which it stood still itself for silence.
ENGINE_SILENCE_SECONDS = 10.0
_CONNECT_SECONDS = 30.0  # for an engine, or ranks, that run already: accepting them may have to wait for an interpreter
_FLUSH_SECONDS = 2.0


class Door(msgspec.Struct, frozen=True):
    """How one rank, and the agent beside it, reaches the engine."""

    plans: str  # addresses
    reports: str
    server_key: str  # z85
    public_key: str
    secret_key: str


class Hub:
    """The engine's end. ``plans`` is for the thread that launches, ``reports`` for the one that watches."""

    def __init__(self, host: str, ranks: Iterable[int]) -> None:
        """Listens on free ports of an address of this host."""
        self._context = zmq.Context()
        self._public, self._secret = zmq.curve_keypair()
        self._keys = {rank: zmq.curve_keypair() for rank in ranks}
        self._authenticator = _Authenticator(self._context, {public: rank for rank, (public, _) in self._keys.items()})
        self._authenticator.start()
        self._plans, self._plans_at = self._listen(zmq.ROUTER, host)
        self._plans.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error where a rank is gone, not silence
        self.reports, self._reports_at = self._listen(zmq.PULL, host)
        self._ways: dict[int, bytes] = {}  # to ranks that have said that they are there

    def _listen(self, kind: int, host: str) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(kind)
        socket.curve_server = True
        socket.curve_secretkey = self._secret
        socket.set_hwm(0)  # nothing is dropped; the steps in flight bound what can wait
        socket.bind(f"tcp://{host}:*")
        return socket, str(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def door(self, rank: int) -> Door:
        keys = (self._public, *self._keys[rank])
        return Door(self._plans_at, self._reports_at, *(key.decode() for key in keys))

    def send(self, data: bytes) -> None:
        """To all ranks. Raises ZMQError where one is gone, TimeoutError where one has not come."""
        while len(self._ways) < len(self._keys):
            if not self._plans.poll(int(_CONNECT_SECONDS * 1000)):
                missing = ", ".join(str(rank) for rank in self._keys.keys() - self._ways)
                raise TimeoutError(f"ranks that take part, but do not listen for plans: {missing}")
            way, hello = self._plans.recv_multipart(copy=False)
            self._ways[_rank_of(hello)] = way.bytes
        for path in self._ways.values():
            self._plans.send_multipart((path, data))

    def receive(self) -> tuple[int, bytes] | None:
        """The next message and the rank it is from; None where there is none. Does not wait."""
        try:
            (frame,) = self.reports.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return _rank_of(frame), frame.bytes

    def close(self) -> None:
        self._authenticator.stop()
        self._context.destroy(linger=int(_FLUSH_SECONDS * 1000))


class _Authenticator(ThreadAuthenticator):
    """Knows ranks by their keys, and names them so that each message tells its sender."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], ranks: dict[bytes, int]) -> None:
        super().__init__(context)
        self._ranks = ranks
        self.configure_curve_callback("*", self)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._ranks

    def curve_user_id(self, client_public_key: bytes) -> str:
        return str(self._ranks.get(z85.encode(client_public_key), ""))


def _rank_of(frame: zmq.Frame) -> int:
    return int(frame["User-Id"])


def client(context: zmq.Context[zmq.Socket[bytes]], kind: int, door: Door) -> zmq.Socket[bytes]:
    """Not connected yet."""
    socket = context.socket(kind)
    socket.curve_serverkey = door.server_key.encode()
    socket.curve_publickey = door.public_key.encode()
    socket.curve_secretkey = door.secret_key.encode()
    socket.set_hwm(0)
    # By the library's own threads, which wait for no interpreter: a busy engine answers too.
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_SECONDS * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(ENGINE_SILENCE_SECONDS * 1000))
    return socket


class RemoteConnection:
    """A rank's end; as a `multiprocessing.Connection`, one thread receives and one at a time sends."""

    def __init__(self, door: Door) -> None:
        self._context = zmq.Context()
        self._plans = client(self._context, zmq.DEALER, door)
        self._plans.connect(door.plans)
        self._plans.send(b"")  # from now on the engine knows the way here
        self._reports = client(self._context, zmq.PUSH, door)
        self._reports.connect(door.reports)

    def recv_bytes(self) -> bytes:
        return self._plans.recv()

    def send_bytes(self, data: bytes) -> None:
        self._reports.send(data)

    def close(self) -> None:
        """What was sent goes out first."""
        self._context.destroy(linger=int(_FLUSH_SECONDS * 1000))


class EngineLost(Exception):
    """The engine cannot be reached, or cannot any more."""


class Lifeline:
    """An agent's end: it tells that this host lives, and finds out when the engine does not."""

    def __init__(self, door: Door) -> None:
        """Raises EngineLost where the engine cannot be reached."""
        self._context = zmq.Context()
        self._reports = client(self._context, zmq.PUSH, door)
        self._address = door.reports
        self._linger = int(_FLUSH_SECONDS * 1000)
        self.monitor = self._reports.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._reports.connect(self._address)  # after: what happens at once is to be seen too
        if not self._connected():
            self._linger = 0
            self.close()
            raise EngineLost(f"cannot reach the engine at {self._address}: is a firewall between?")

    def _connected(self) -> bool:
        deadline = time.monotonic() + _CONNECT_SECONDS
        while self.monitor.poll(int(max(deadline - time.monotonic(), 0) * 1000)):
            if self._event() == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
        return False

    def check(self) -> None:
        """Raises EngineLost where the connection has ended."""
        while self.monitor.poll(0):
            if self._event() == zmq.EVENT_DISCONNECTED:
                self._linger = 0
                raise EngineLost(f"the engine at {self._address} does not answer any more")

    def _event(self) -> int:
        from zmq.utils.monitor import recv_monitor_message

        return int(recv_monitor_message(self.monitor)["event"])

    def send(self, data: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._reports.send(data, zmq.NOBLOCK)

    def close(self) -> None:
        self._reports.disable_monitor()
        self._context.destroy(linger=self._linger)

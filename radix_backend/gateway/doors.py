"""The doors' side of the gateway: who is connected, who is gone, who does not read.

ZeroMQ tells a ROUTER nothing about peers that leave (`DISCONNECT_MSG` and `ROUTER_NOTIFY` are draft features, absent
from pyzmq's wheels). But with `ROUTER_MANDATORY` a send to one that left fails, so that doors with something running
get an empty `Update` a few times a second: it finds the dead and is harmless to the living.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from radix_backend.protocol import Logprob, Message, Receipt, Refused, Update, column

log = logging.getLogger(__name__)

MAX_BACKLOG = 32 * 2**20  # bytes waiting for a door that does not read, before it is cut off
_SNDHWM = 64  # messages that ZeroMQ queues a door; the rest is ours to count in bytes


class Door:
    """One connected client."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.requests: dict[int, int] = {}  # the client's id of each running request → the gateway's
        self.backlog: deque[bytes] = deque()
        self.backlog_bytes = 0
        self.open = True


class Doors:
    """All doors, over a ROUTER. Nothing here ever blocks."""

    def __init__(self, socket: zmq.Socket[bytes], on_lost: Callable[[Door], None]) -> None:
        """``socket`` is not bound yet. ``on_lost`` is called once for a door that is gone or cut off."""
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, _SNDHWM)
        self._socket = socket
        self._on_lost = on_lost
        self._encoder = msgspec.msgpack.Encoder()
        self._doors: dict[bytes, Door] = {}
        self._refusals: dict[bytes, bytes] = {}  # last words to doors that do not read, by identity

    def get(self, identity: bytes) -> Door | None:
        return self._doors.get(identity)

    def open(self, identity: bytes) -> Door:
        """The door, new or known. Those that left without having anything running are swept out on this occasion."""
        self.probe(idle_too=True)
        return self._doors.setdefault(identity, Door(identity))

    def send(self, door: Door, message: Message) -> None:
        """Send or queue; a door that has too much waiting is cut off."""
        data = self._encoder.encode(message)
        if self._drain(door) and self._transmit(door, data):
            return
        door.backlog.append(data)
        door.backlog_bytes += len(data)
        if door.backlog_bytes > MAX_BACKLOG:
            self.refuse(door.identity, f"more than {MAX_BACKLOG >> 20} MiB of answers were not read")

    def refuse(self, identity: bytes, reason: str) -> None:
        """Drop a client's requests and tell it, as soon as it can be told, that nothing else will be answered."""
        log.warning("refusing a client: %s", reason)
        if identity in self._doors:
            self._lose(self._doors[identity])
        self._refusals.setdefault(identity, self._encoder.encode(Refused(reason)))
        self.drain()

    def probe(self, idle_too: bool = False) -> None:
        """Find doors that left, among those with something running (or all)."""
        for door in list(self._doors.values()):
            if not door.backlog and (door.requests or idle_too):
                self.send(door, Rows().update())

    def drain(self) -> bool:
        """Go on sending what waits. False if something still does."""
        for identity, data in list(self._refusals.items()):
            if self._try_send(identity, data) is not False:
                del self._refusals[identity]
        waiting = [door for door in self._doors.values() if door.backlog]
        return all([self._drain(door) for door in waiting]) and not self._refusals

    @property
    def busy(self) -> bool:
        return any(door.requests for door in self._doors.values())

    def _drain(self, door: Door) -> bool:
        while door.backlog and self._transmit(door, door.backlog[0]):
            if door.open:
                door.backlog_bytes -= len(door.backlog.popleft())
        return not door.backlog

    def _transmit(self, door: Door, data: bytes) -> bool:
        """False if the door must be tried again later."""
        if not door.open:
            return True
        sent = self._try_send(door.identity, data)
        if sent is None:
            self._lose(door)
        return sent is not False

    def _try_send(self, identity: bytes, data: bytes) -> bool | None:
        """True: sent. False: its queue is full. None: it left."""
        try:
            self._socket.send_multipart((identity, data), zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return None
        return True

    def _lose(self, door: Door) -> None:
        del self._doors[door.identity]
        door.open = False
        door.backlog.clear()
        door.backlog_bytes = 0
        self._on_lost(door)


class Rows:
    """Collects one `Update`."""

    __slots__ = ("counts", "finish", "ids", "logprobs", "receipts", "texts", "tokens")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.counts: list[int] = []
        self.finish: list[int] = []
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.receipts: list[Receipt] = []
        self.logprobs: list[list[list[Logprob]]] = []

    def add(
        self,
        id: int,
        tokens: list[int],
        text: str,
        finish: int,
        receipt: Receipt | None,
        logprobs: list[list[Logprob]] | None = None,
    ) -> None:
        """A row of one request; ``receipt`` exactly when it finishes, ``logprobs`` where they are wanted."""
        if logprobs:
            self.logprobs += [[]] * (len(self.ids) - len(self.logprobs))
            self.logprobs.append(logprobs)
        self.ids.append(id)
        self.counts.append(len(tokens))
        self.finish.append(finish)
        self.tokens += tokens
        self.texts.append(text)
        if receipt is not None:
            self.receipts.append(receipt)

    def update(self) -> Update:
        return Update(
            ids=column(self.ids, "<i8"),
            counts=column(self.counts, "<i4"),
            finish=column(self.finish, "u1"),
            tokens=column(self.tokens, "<i4"),
            texts=self.texts,
            receipts=self.receipts,
            logprobs=self.logprobs + [[]] * (len(self.ids) - len(self.logprobs)) if self.logprobs else [],
        )

"""The supervisor's side of the leases: who holds one, what they are told, and whose parent died."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from radix_backend.protocol import Goodbye, Lease, Log, Pulse, Status
from radix_backend.sidecar.lease import receive_datagram

ORPHAN_GRACE = 2.0  # seconds a client may outlive its parent

_message: msgspec.json.Decoder[Lease | Goodbye] = msgspec.json.Decoder(Lease | Goodbye)


class Process:
    """A process that is not our child, told from a later one with the same id by its start time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.parent_pid, self._started = _stat(pid)

    def alive(self) -> bool:
        return self._started != 0 and _stat(self.pid)[1] == self._started

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[int, int]:
    """Parent and start time (clock ticks since boot) of a process; (0, 0) when it has ended."""
    try:
        # What follows the command's name, which is in parentheses and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    state, parent, started = fields[0], int(fields[1]), int(fields[19])
    return (0, 0) if state in "ZX" else (parent, started)


@dataclass(eq=False)
class _Member:
    sock: socket.socket
    process: Process
    lease: Lease | None = None  # None until it has asked
    parent: Process | None = None  # must not be outlived
    orphaned_at: float | None = None
    unsent: bytes = b""  # the newest Status, when the socket was full


class Leases:
    """Accepts, refuses, informs and drops clients. `joined` and `left` are the supervisor's reactions."""

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        refusal: Callable[[Lease | None], str],
        joined: Callable[[], Status],
        left: Callable[[float], None],
    ) -> None:
        """``refusal`` says why a lease (None: an unreadable one) is refused, or "". ``joined`` returns what to tell
        the newcomer, ``left`` gets the seconds that the client wants to be outlived. Events of ``selector`` have
        a callable as their data."""
        self._listener = listener
        self._selector = selector
        self._refusal = refusal
        self._joined = joined
        self._left = left
        self._members: list[_Member] = []  # the oldest first
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def __len__(self) -> int:
        return sum(member.lease is not None for member in self._members)

    def tell(self, status: Status) -> None:
        """Send a status to every client; a slow reader gets the newest one as soon as it has read."""
        data = msgspec.json.encode(status)
        for member in self._members:
            if member.lease is not None:
                member.unsent = b"" if _send(member, data) else data

    def resend(self) -> None:
        for member in self._members:
            if member.unsent and _send(member, member.unsent):
                member.unsent = b""

    def pulse(self, pulse: Pulse) -> None:
        """Send a sign of life to every client; dropped where one does not keep up."""
        data = msgspec.json.encode(pulse)
        for member in self._members:
            if member.lease is not None:
                _send(member, data)

    def log(self, log: Log) -> None:
        """Send a line to the oldest client that shows logs; dropped if that one does not keep up."""
        for member in self._members:
            if member.lease is not None and member.lease.wants_logs:
                _send(member, msgspec.json.encode(log))
                return

    def kill_orphans(self) -> list[int]:
        """SIGKILL clients that outlive their parent by `ORPHAN_GRACE`; returns their process ids."""
        now = time.monotonic()
        killed = []
        for member in self._members:
            if member.parent is None or member.parent.alive():
                continue
            if member.orphaned_at is None:
                member.orphaned_at = now
            elif now - member.orphaned_at >= ORPHAN_GRACE and member.process.alive():
                member.process.kill()
                member.parent = None
                killed.append(member.process.pid)
        return killed

    def close(self) -> None:
        for sock in (self._listener, *(member.sock for member in self._members)):
            self._selector.unregister(sock)
            sock.close()
        self._members.clear()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            member = _Member(sock, Process(pid))
            self._members.append(member)
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(member))

    def _read(self, member: _Member) -> None:
        try:
            datagram = receive_datagram(member.sock)
        except BlockingIOError:
            return
        if not datagram:
            self._drop(member)
            return
        message: Lease | Goodbye | None = None
        with contextlib.suppress(msgspec.DecodeError):
            message = _message.decode(datagram)
        if isinstance(message, Goodbye):
            self._drop(member, message)
        elif refusal := self._refusal(message):
            _send(member, msgspec.json.encode(Status("failed", 0, refusal)))
            self._drop(member)
        elif message is not None:
            self._admit(member, message)

    def _admit(self, member: _Member, lease: Lease) -> None:
        member.lease = lease
        # A number from another container's process table is nobody's parent here.
        if lease.parent and lease.parent == member.process.parent_pid:
            member.parent = Process(lease.parent)
        _send(member, msgspec.json.encode(self._joined()))

    def _drop(self, member: _Member, goodbye: Goodbye | None = None) -> None:
        self._members.remove(member)
        self._selector.unregister(member.sock)
        member.sock.close()
        if member.lease is not None:
            self._left(member.lease.linger if goodbye is None or goodbye.linger else 0.0)


def _send(member: _Member, data: bytes) -> bool:
    """Whether the message need not be sent again."""
    try:
        member.sock.send(data)
    except BlockingIOError:
        return False
    except OSError:  # it is gone, which the next read tells
        pass
    return True

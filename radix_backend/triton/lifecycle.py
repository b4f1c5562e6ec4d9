"""What the server means to do with this model. Triton tells a model that it must go only once nothing runs any more.

An unloaded model and a stopping server both wait for running requests: without an end from our side a long stream holds
up the first, and makes the second exit with status 1, seconds or minutes late.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

_DEFAULT_EXIT_SECONDS = 30.0  # tritonserver's
# For clients to leave after the last stream, and for the server to be done in time. Triton 2.51 needs up to three of
# them: one until it lets go of a model whose last stream has gone, one until it looks again, and its own end.
_MARGIN_SECONDS = 6.0
_QUESTION_SECONDS = 0.5  # between two questions: each is a round trip to the server
_LISTEN = "0A"  # state of a socket in /proc/net/tcp

_log = logging.getLogger(__name__)


class Lifecycle:
    """Looks at the server from one of its stubs. For one thread, but for `arrive`."""

    def __init__(self, server: int, is_model_ready: Callable[[], bool]) -> None:
        """``server`` is the server's process id. ``is_model_ready`` asks whether it still serves this model."""
        self._listeners = Listeners(server)
        self._exit_seconds = exit_seconds(server)
        self._is_model_ready: Callable[[], bool] | None = is_model_ready
        self._next_question = 0.0
        self._stop_seen_at: float | None = None
        self._arrived = False

    def arrive(self) -> None:
        """A request has come: the server's doors are open, and must be known before they can be seen to close."""
        if not self._arrived:
            self._arrived = True
            self._listeners.closed()

    def ending(self, busy: bool) -> str:
        """Why running requests must end now; "" while they may go on. Look every so often, ``busy`` or not."""
        now = time.monotonic()
        if self._stop_seen_at is None and self._listeners.closed():
            self._stop_seen_at = now
            _log.info("the server stops: running requests have %g s to end", self._patience())
        if self._stop_seen_at is not None:  # from here on a question can make tritonserver 2.51 hang or crash
            return "the server is stopping" if now - self._stop_seen_at >= self._patience() else ""
        return "the model is being unloaded" if busy and self._unloaded(now) else ""

    def _patience(self) -> float:
        return self._exit_seconds - min(_MARGIN_SECONDS, self._exit_seconds / 2)

    def _unloaded(self, now: float) -> bool:
        if self._is_model_ready is None or now < self._next_question:
            return False
        self._next_question = now + _QUESTION_SECONDS
        try:
            return not self._is_model_ready()
        except Exception as error:
            self._is_model_ready = None
            _log.warning("the server does not tell whether it serves this model: %s", error)
            return False


class Listeners:
    """The TCP sockets that a process listens on. A server that got SIGTERM closes those of HTTP and gRPC first."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._all: set[str] = set()  # inodes of all listening sockets, when the process's were last looked up
        self._own: set[str] = set()

    def closed(self) -> bool:
        """Whether it has closed one that it had. False for ever where /proc does not tell."""
        listening = _listening()
        if self._own - listening:
            return True
        if listening != self._all:
            self._own |= listening & _sockets(self._pid)
            self._all = listening
        return False


def exit_seconds(server: int) -> float:
    """How long this tritonserver waits for running requests when it stops: its --exit-timeout-secs."""
    arguments: list[str] = []
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{server}/cmdline").read_text(errors="replace").split("\0")
    seconds = _DEFAULT_EXIT_SECONDS
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, given, value = argument.partition("=")
        if name == "--exit-timeout-secs":  # the last one counts
            with contextlib.suppress(ValueError):
                seconds = float(value if given else following)
    return seconds


def _listening() -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    inodes.add(fields[9])
    return inodes


def _sockets(pid: int) -> set[str]:
    """Inodes of a process's open sockets."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                kind, _, inode = os.readlink(entry.path).partition(":")
                if kind == "socket":
                    inodes.add(inode.strip("[]"))
    return inodes

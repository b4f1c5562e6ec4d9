"""Where the other ranks are, and the way to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.process import PARENT_PID, Reporter
from radix_backend.worker.agent import RANK_PROGRAM, ending
from radix_backend.worker.rank import RankSpec
from radix_backend.worker.ranks import Meeting, listen, own_gpu


class RankMessage(NamedTuple):
    rank: int
    data: bytes


class RankEnded(NamedTuple):
    rank: int
    reason: str


class Executor(Protocol):
    """Places, starts and ends all ranks but rank 0, which is this process.

    One thread calls `receive`, another everything else.
    """

    notice_seconds: float  # in which `receive` knows of a rank's end

    def start(self, config: EngineConfig, model_dir: Path, reporter: Reporter) -> tuple[Meeting, socket.socket]:
        """Returns where rank 0 meets those it started, listening already. Raises RadixError; nothing runs then."""

    def send(self, data: bytes) -> None:
        """To every rank. Raises an exception where one is gone."""

    def receive(self, timeout: float) -> list[RankMessage | RankEnded] | None:
        """What happened, after so many seconds at most; None once nothing more will. Nothing follows a rank's end."""

    def end(self, patience: float) -> None:
        """Wait so many seconds for ranks to end by themselves; then `receive` returns None soon."""

    def close(self) -> None:
        """After the last `receive`: no rank is left."""


class LocalExecutor:
    """Ranks are child processes, reached over socket pairs."""

    notice_seconds = 2.0

    def __init__(self, program: Sequence[str] = RANK_PROGRAM) -> None:
        """``program``: what this interpreter runs as a rank."""
        self._program = program
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self._connections: dict[int, Connection] = {}
        self._open: dict[Connection, int] = {}  # the watching thread's

    def start(self, config: EngineConfig, model_dir: Path, reporter: Reporter) -> tuple[Meeting, socket.socket]:
        listener = listen(config)
        port = listener.getsockname()[1]
        for rank in range(1, config.num_ranks):
            meeting = Meeting(port, gpu=own_gpu(config, rank))
            self._connections[rank], theirs = Pipe()
            spec = RankSpec(config, os.fspath(model_dir), rank, theirs.fileno(), meeting)
            self._processes[rank] = subprocess.Popen(
                [sys.executable, *self._program, msgspec.json.encode(spec).decode()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {PARENT_PID: str(os.getpid())},
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
        self._open = {connection: rank for rank, connection in self._connections.items()}
        return Meeting(port, gpu=own_gpu(config, 0)), listener

    def send(self, data: bytes) -> None:
        for connection in self._connections.values():
            connection.send_bytes(data)

    def receive(self, timeout: float) -> list[RankMessage | RankEnded] | None:
        if not self._open:
            return None
        events: list[RankMessage | RankEnded] = []
        for connection in wait(list(self._open), timeout):
            assert isinstance(connection, Connection)
            try:
                events.append(RankMessage(self._open[connection], connection.recv_bytes()))
            except (EOFError, OSError):
                rank = self._open.pop(connection)
                events.append(RankEnded(rank, self._ending(rank)))
        return events

    def _ending(self, rank: int) -> str:
        process = self._processes[rank]
        try:
            how = ending(process.wait(1.0))
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        return f"rank {rank} (pid {process.pid}) {how}"

    def end(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        for process in self._processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

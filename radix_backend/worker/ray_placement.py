"""Ranks on the hosts of a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import NotFound, Unavailable, from_code
from radix_backend.process import PARENT_PID
from radix_backend.worker.agent import Place, RankTask

CONNECT_SECONDS = 30.0  # for the cluster to answer
PLACE_SECONDS = 60.0  # for it to have room
_CLOSE_SECONDS = 5.0


class Wish(msgspec.Struct, frozen=True):
    """What the engine asks of the cluster."""

    address: str | None
    num_ranks: int
    tp_size: int
    gpus: bool
    patience: float  # seconds for room to be found, and again for actors to start


class Joined(msgspec.Struct, frozen=True, tag=True):
    """The cluster has answered."""


class Placed(msgspec.Struct, frozen=True, tag=True):
    places: list[Place]  # by rank


class Refused(msgspec.Struct, frozen=True, tag=True):
    """See errors.from_code."""

    code: str
    message: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    rank: int
    how: str


encode = msgspec.msgpack.encode
decode_wish = msgspec.msgpack.Decoder(Wish).decode
decode_tasks = msgspec.msgpack.Decoder(list[RankTask]).decode
_decode = msgspec.msgpack.Decoder(Joined | Placed | Refused | Ended).decode


class RayPlacement:
    """`Placement` through a client of Ray in a process of its own (`ray_client`).

    So the engine's step loop shares no interpreter with Ray's threads, nothing of Ray's reaches its log, and whatever
    Ray does to a process that has lost its cluster, the engine can still say what happened. Ray ends the actors of a
    client that is gone, however it went; this client dies with the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._wish = Wish(config.ray_address, config.num_ranks, config.tp_size, config.device == "cuda", PLACE_SECONDS)
        self._debug = config.log_level == "debug"
        self._connection: Connection | None = None
        self._client: subprocess.Popen[bytes] | None = None

    def place(self) -> list[Place]:
        if importlib.util.find_spec("ray") is None:
            hint = f"{sys.executable} -m pip install 'radix-backend[ray]'"
            raise NotFound(f"setting 'executor' is 'ray', which takes the package ray; install it with: {hint}")
        self._connection, theirs = Pipe()
        output = None if self._debug else subprocess.DEVNULL
        self._client = subprocess.Popen(
            [sys.executable, "-m", "radix_backend.worker.ray_client", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {PARENT_PID: str(os.getpid())},
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self._connection.send_bytes(encode(self._wish))
        try:
            self._answer(CONNECT_SECONDS)
            placed = self._answer(3 * self._wish.patience)  # it has bounds of its own, which tell more
        except BaseException:
            self.close(0)
            raise
        assert isinstance(placed, Placed)
        return placed.places

    def _answer(self, patience: float) -> Joined | Placed | Ended:
        assert self._connection is not None
        where = f" at {self._wish.address}" if self._wish.address else ""
        if not self._connection.poll(patience):
            raise Unavailable(f"the Ray cluster{where} did not answer within {patience:g} s")
        try:
            answer = _decode(self._connection.recv_bytes())
        except EOFError:
            raise Unavailable(f"the Ray cluster{where} cannot be used: Ray's client has ended") from None
        if isinstance(answer, Refused):
            raise from_code(answer.code, answer.message)
        return answer

    def start(self, tasks: Sequence[RankTask]) -> None:
        assert self._connection is not None
        self._connection.send_bytes(encode(tasks))

    def fileno(self) -> int:
        assert self._connection is not None
        return self._connection.fileno()

    def ended(self) -> list[tuple[int, str]]:
        assert self._connection is not None
        found = []
        try:
            while self._connection.poll():
                message = _decode(self._connection.recv_bytes())
                assert isinstance(message, Ended)
                found.append((message.rank, message.how))
        except OSError:  # as its end may look where something was under way
            raise EOFError from None
        return found

    def close(self, patience: float = _CLOSE_SECONDS) -> None:
        if self._connection is None or self._client is None:
            return
        self._connection.close()
        try:
            self._client.wait(patience)
        except subprocess.TimeoutExpired:
            self._client.kill()
            self._client.wait()
